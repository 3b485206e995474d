"""What brings models in beside requests: imports from elsewhere, and the watched folder."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from bus import messages as m
from bus.client import Client
from bus.instance import Instance
from bus.jobs import Jobs
from bus.subjects import MODEL_IMPORT, MODEL_LOAD
from services.candle.fetching.imports import Imports
from services.candle.repository.folder import Folder
from services.candle.repository.repository import Repository
from services.candle.settings import LIVE_IMPORTS, CandleSettings


@asynccontextmanager
async def taking_in(
    client: Client,
    instance: Instance,
    repository: Repository,
    cache_dir: Path,
    models_dir: Path,
) -> AsyncGenerator[Jobs[m.ImportModel]]:
    """Do jobs and watch the models folder while inside.

    Args:
        client: The bus.
        instance: This process's place on it; its settings are taken live.
        repository: Where models go.
        cache_dir: Where what is being fetched lies, in a folder of its own.
        models_dir: The models folder.

    Raises:
        InvalidRequest: A setting cannot be meant; names it.
    """

    def settings() -> CandleSettings:
        return instance.settings(CandleSettings)

    async def load(request: m.LoadModel) -> None:
        await instance.answer_here(MODEL_LOAD, request)

    imports = Imports(cache_dir / "imports", repository, settings, load)
    imports.check()
    instance.on_config(LIVE_IMPORTS, imports.check)
    jobs = Jobs(client, instance, imports, lambda: settings().import_jobs)
    folder = Folder(models_dir, repository, lambda: settings().watch_folder)
    async with (
        folder.watching(),
        jobs.serving(),
        instance.serving(MODEL_IMPORT, jobs.enter),
    ):
        yield jobs

"""A candle worker in the test's own process, on a real broker."""

import asyncio
import json
import shutil
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from bus import messages as m
from bus.client import Client, connect
from bus.instance import join
from bus.settings import Settings
from bus.testing import until
from services.candle.cache import Cache
from services.candle.models import make
from services.candle.repository import Repository
from services.candle.service import Candle
from services.candle.settings import CandleSettings

Worker = Callable[..., AbstractAsyncContextManager[Candle]]
SetTo = Callable[..., Awaitable[None]]


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample models, trained once for all tests."""
    folder = tmp_path_factory.mktemp("samples")
    make.make(folder)
    return folder


@pytest.fixture
def models_dir(tmp_path: Path, samples: Path) -> Path:
    """The folder that models are loaded from, with the samples in it."""
    return shutil.copytree(samples, tmp_path / "models")


@pytest.fixture
def linear(models_dir: Path) -> Callable[..., str]:
    """Write a linear model, and return its path below the models folder."""

    def write(name: str = "m.json", **changes: object) -> str:
        content = {"input_dim": 2, "output_dim": 1, "weights": [1, 1], "bias": [0], **changes}
        (models_dir / name).write_text(json.dumps(content))
        return name

    return write


@pytest.fixture
def set_to(client: Client) -> SetTo:
    """Write candle's settings, as the supervisor does when somebody changes them."""

    async def write(**changes: object) -> None:
        config = m.PluginConfig(
            name="candle", description="", entrypoint="x", capabilities=[], settings=changes
        )
        desired = m.DesiredState(
            config=config, enabled=True, generation=1, changed_by="t", changed_at=m.now()
        )
        await client.store.desired.put(desired, "candle")

    return write


@pytest.fixture
def worker(settings: Settings, models_dir: Path) -> Worker:
    """Start a worker; each has a cache of its own, as on another host."""

    @asynccontextmanager
    async def start(slot: int = 0, **changes: object) -> AsyncGenerator[Candle]:
        here = msgspec.structs.replace(settings, slot=slot)
        async with (
            connect(here.nats_url, name="candle", root=here.root) as client,
            join(client, here, plugin="candle", description="a test") as instance,
        ):
            cache = Cache(models_dir.parent / f"cache-{slot}", 1 << 30)
            repository = Repository(client.store, models_dir, cache)
            wanted = CandleSettings(**changes)
            candle = Candle(instance, repository, wanted, client.store.served)
            serving = asyncio.create_task(candle.run())
            await until(lambda: instance._registration.status == "running" or serving.done())
            try:
                yield candle
            finally:
                serving.cancel()
                await asyncio.gather(serving, return_exceptions=True)

    return start

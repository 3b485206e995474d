"""rustyface's life: its galleries caught up, its capabilities served, its own HTTP, its counts."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final

import structlog

from bus import messages as m
from bus import tasks
from bus.errors import Conflict, NotFound
from bus.instance import Instance
from bus.probes import Route
from bus.subjects import (
    DATASET_JOB_CANCEL,
    DATASET_JOB_RETRY,
    DATASET_MANAGE,
    FACES_DETECT,
    FACES_ENCODE,
    FACES_SEARCH,
    FACES_SHEET,
    FACES_VERIFY,
    Endpoint,
)
from services.rustyface.calibration import Thresholds
from services.rustyface.galleries.galleries import Galleries
from services.rustyface.photos.workers import Workers
from services.rustyface.settings import RustyfaceSettings, settings_of
from services.rustyface.transfers.transfer import take_in

SERVED: Final = (
    FACES_ENCODE,
    FACES_SEARCH,
    FACES_DETECT,
    FACES_VERIFY,
    FACES_SHEET,
    DATASET_MANAGE,
    DATASET_JOB_CANCEL,
    DATASET_JOB_RETRY,
)

log = structlog.get_logger("rustyface.service")

Answer = tuple[Endpoint[Any, Any], Callable[[Any], Awaitable[Any]]]


class NameDataset(m.Message, frozen=True):
    """Names a dataset in a path; one that could not be a name is one that is not there."""

    dataset: str


class Rustyface:
    """Serves faces and datasets once the galleries are caught up.

    Args:
        instance: This process's place on the bus.
        galleries: Where faces are kept.
        answers: What is served, and by what.
        workers: The threads that images are worked on in.
        thresholds: Takes the plugin's setting.
        settings: How.
        datasets_dir: Dataset files in it are taken in at the start; None for none.
        beside: What is open while it serves; each is entered once the galleries are caught up.

    Attributes:
        galleries: As given.
    """

    def __init__(
        self,
        instance: Instance,
        galleries: Galleries,
        answers: Sequence[Answer],
        workers: Workers,
        thresholds: Thresholds,
        settings: RustyfaceSettings,
        datasets_dir: Path | None,
        beside: Sequence[Callable[[], AbstractAsyncContextManager[None]]] = (),
    ) -> None:
        self.galleries = galleries
        self._instance = instance
        self._answers = answers
        self._workers = workers
        self._thresholds = thresholds
        self._datasets_dir = datasets_dir
        self._beside = beside
        self._default = settings.default_dataset
        self._take(settings)
        instance.on_config(("threshold", "max_waiting"), self._take_settings)

    async def run(self) -> None:
        """Serve until cancelled."""
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(tasks.beside(self.galleries.run()))
            await stack.enter_async_context(self._instance.local_routes(*self._routes()))
            await self.galleries.caught_up.wait()
            # First, so that there can be a file of the default dataset.
            if self._datasets_dir is not None:
                await take_in(self._datasets_dir, self.galleries)
            try:
                await self.galleries.create(self._default)
            except Conflict as error:
                # The other datasets can be used all the same.
                log.error("dataset.not_created", cause=error.message)
            self._tell()
            # Not earlier: leaving `serving` answers what the broker had sent here already.
            stack.callback(self._workers.close)
            for opened in self._beside:
                await stack.enter_async_context(opened())
            for endpoint, handler in self._answers:
                await stack.enter_async_context(self._instance.serving(endpoint, handler))
            await self._instance.ready()
            while True:
                await asyncio.sleep(1)
                self._tell()

    def _take_settings(self) -> None:
        self._take(settings_of(self._instance))

    def _take(self, settings: RustyfaceSettings) -> None:
        self._workers.max_waiting = settings.max_waiting
        self._thresholds.plugin = settings.threshold

    def _routes(self) -> tuple[Route, ...]:
        search = partial(self._instance.answer_here, FACES_SEARCH)
        return (
            Route("GET", "/health", m.Empty, self._health),
            Route("GET", "/datasets", m.Empty, self._list_here),
            Route("GET", "/datasets/{dataset}", NameDataset, self._show_here),
            Route("POST", "/datasets/{dataset}/search", m.SearchFaces, search),
        )

    async def _health(self, _request: m.Empty) -> dict[str, Any]:
        datasets = len(self.galleries.datasets())
        return {"status": "ok", "datasets": datasets, "entries": self.galleries.count}

    async def _list_here(self, _request: m.Empty) -> m.DatasetList:
        asked = m.ManageDataset(action="list")
        return await self._instance.answer_here(DATASET_MANAGE, asked)

    async def _show_here(self, request: NameDataset) -> m.DatasetInfo:
        listed = (await self._list_here(m.Empty())).datasets
        found = next((one for one in listed if one.id == request.dataset), None)
        if found is None:
            known = ", ".join(one.id for one in listed) or "none"
            raise NotFound(
                f"there is no dataset {request.dataset!r}; there are: {known}", field="dataset"
            )
        return found

    def _tell(self) -> None:
        self._instance.counts["datasets"] = len(self.galleries.datasets())
        self._instance.counts["entries"] = self.galleries.count
        self._instance.gauges["images_waiting"] = self._workers.waiting

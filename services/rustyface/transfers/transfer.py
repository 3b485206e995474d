"""Datasets that come from elsewhere or go there: jobs, and the folder that is looked at once."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import structlog

from bus import codec, job_rules
from bus import messages as m
from bus.client import Client
from bus.errors import (
    BusError,
    Conflict,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unavailable,
)
from bus.instance import Instance
from bus.jobs import Jobs, Told
from bus.tasks import beside, to_its_end
from services.rustyface.galleries.galleries import Galleries
from services.rustyface.transfers.exports import Export
from services.rustyface.transfers.files import Reader, format_of, reader
from services.rustyface.transfers.imports import Import, as_new, rejected_again
from services.rustyface.transfers.leftovers import Leftovers
from services.rustyface.transfers.reading import batches, checked
from services.rustyface.transfers.reembed import Encoder, Reembed
from services.rustyface.transfers.scratch import Scratch

BEGUN: Final = ".importing"
DONE: Final = ".imported"
# How long a worker that stops waits until exports are gone of what was deleted.
DROP_S: Final = 5.0

log = structlog.get_logger("rustyface.transfer")


class GalleryJobs:
    """Imports, exports and new embeddings of datasets, as jobs.

    Args:
        client: The bus.
        instance: This process's place on it.
        galleries: The datasets.
        encoder: The embedder of today.
        folder: Where files lie while they are read or written; replicas of a host share it.
        at_once: How many jobs this instance may do at a time, now.
    """

    def __init__(
        self,
        client: Client,
        instance: Instance,
        galleries: Galleries,
        encoder: Encoder,
        folder: Path,
        at_once: Callable[[], int] = lambda: 1,
    ) -> None:
        self._client = client
        self._store = client.store.faces
        self._galleries = galleries
        self._scratch = Scratch(folder)
        self._work = _Work(client, galleries, encoder, self._scratch)
        self._jobs = Jobs(client, instance, self._work, at_once)
        self._leftovers = Leftovers(
            client, instance, galleries, self._work.exports, self._work.closed
        )
        self._dropping: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def serving(self) -> AsyncGenerator[None]:
        """Do jobs while inside, and see that nothing is left of them; galleries are caught up."""
        chores = beside(self._scratch.keep_tidy(), self._leftovers.keep_clearing())
        try:
            async with self._jobs.serving(), chores:
                yield
        finally:
            if self._dropping:
                await asyncio.wait(self._dropping, timeout=DROP_S)
            for left in self._dropping:
                left.cancel()
            await to_its_end(self._scratch.close)

    async def enter(self, work: m.GalleryWork) -> m.Job:
        """Queue a job; asked again with the same key, return the first one.

        Raises:
            InvalidRequest: Something is missing, or cannot be meant; names the field.
            NotFound: There is no such dataset, or the file was not uploaded.
            Conflict: The key was used for something else.
            Overloaded: Too many are queued.
        """
        work, _ = self._work.checked(work)
        await self._galleries.wait(await self._galleries.newest())
        if await self._is_known(work):
            # Whatever has become of its file or dataset since.
            return await self._jobs.enter(work)
        if work.action == "import":
            # Touched, so that nobody clears it away before the job is there.
            if work.artefact is not None and await self._store.touch(work.artefact) is None:
                raise NotFound(
                    f"the file {work.artefact} is not stored: upload it first, and import it "
                    "within an hour",
                    field="artefact",
                )
        elif work.dataset not in self._galleries:
            known = ", ".join(one.id for one in self._galleries.datasets()) or "none"
            raise NotFound(
                f"there is no dataset {work.dataset!r}; there are: {known}", field="dataset"
            )
        return await self._jobs.enter(work)

    async def _is_known(self, work: m.GalleryWork) -> bool:
        if work.key is None:
            return False
        name = job_rules.new(work, m.now(), only=None).job
        found = await self._client.store.jobs.get(name)
        return found is not None and found.value is not None

    async def drop_exports(self, dataset: str, revision: int) -> None:
        """Delete every exported file of a dataset; see `Export.drop`.

        Goes on though the caller gives up: what was deleted must not be fetched for that.
        """
        dropping = self._begun(dataset, revision)
        try:
            await asyncio.shield(dropping)
        except asyncio.CancelledError:
            dropping.add_done_callback(_say_left)
            raise

    def drop_exports_behind(self, dataset: str) -> None:
        """Do the same where nobody waits any more who would know of a revision."""
        self._begun(dataset, None).add_done_callback(_say_left)

    def _begun(self, dataset: str, revision: int | None) -> asyncio.Task[None]:
        async def drop() -> None:
            at = await self._galleries.newest() if revision is None else revision
            await self._work.exports.drop(dataset, at)

        dropping = asyncio.create_task(drop(), name=f"exports of {dataset}")
        self._dropping.add(dropping)
        dropping.add_done_callback(self._dropping.discard)
        return dropping


class _Work:
    """What jobs of datasets are about."""

    kind: Final = "gallery"

    def __init__(
        self, client: Client, galleries: Galleries, encoder: Encoder, scratch: Scratch
    ) -> None:
        store = client.store.faces
        self._client = client
        self._scratch = scratch
        self._import = Import(
            store,
            galleries,
            embedder=encoder.name,
            digest=encoder.digest,
            dimensions=encoder.dimensions,
            scratch=scratch,
        )
        self._reembed = Reembed(store, galleries, encoder)
        self.exports = Export(client, galleries, scratch)

    def checked(self, request: m.GalleryWork) -> tuple[m.GalleryWork, str | None]:
        """See `Work.checked`.

        Raises:
            InvalidRequest: Something is missing, or cannot be meant; names the field.
        """
        # Put together by us, and so not looked at by anybody yet.
        work = codec.convert(codec.plain(request), m.GalleryWork)
        if work.action == "import" and work.artefact is None:
            raise InvalidRequest("import needs the field artefact", field="artefact")
        if work.action == "reembed" and work.into is None:
            raise InvalidRequest("reembed needs the field into", field="into")
        if work.action == "reembed" and work.into == work.dataset:
            raise InvalidRequest(
                "reembed makes a new dataset: into must be another one", field="into"
            )
        return work, None

    async def carry(self, job: m.Job, _secret: str | None, told: Told) -> m.GalleryWorkDone:
        """See `Work.carry`."""
        work = _work_of(job)
        try:
            match work.action:
                case "import":
                    return await self._import.carry(job, work, told)
                case "export":
                    return await self.exports.carry(job, work, told)
                case "reembed":
                    return await self._reembed.carry(job, work, told)
        except (DeadlineExceeded, Overloaded) as error:
            # A job has time.
            raise Unavailable(error.message, retry_after_s=error.retry_after_s) from None
        except OSError as error:
            raise Unavailable(
                f"{self._scratch.shared} cannot be used: {error}", retry_after_s=30
            ) from None

    async def closed(self, job: m.Job) -> None:
        """See `Work.closed`: of an import that failed the file stays for a day, for a retry."""
        work = _work_of(job)
        if work.action == "export":
            await self.exports.closed(job)
        elif work.action == "reembed":
            await self._reembed.closed(job, work)
        elif job.state != "done":
            await self._import.undo(job, work)
        elif work.artefact is not None and not await self._is_wanted(work.artefact):
            # Brought again since the job was asked for, somebody is about to import it.
            await self._client.store.faces.delete(work.artefact, unless_since=job.started_at)

    async def tidy(self, _live: set[str]) -> None:
        """See `Work.tidy`: what they have left goes by whether its worker lives, see `Scratch`."""

    async def _is_wanted(self, artefact: str) -> bool:
        """Tell whether another job has not imported a file yet."""
        jobs = [one.value for one in await self._client.store.jobs.all() if one.value]
        return any(
            job.gallery is not None and job.gallery.artefact == artefact and job.state != "done"
            for job in jobs
        )


async def take_in(folder: Path, galleries: Galleries) -> None:
    """Enrol every dataset file of a folder of which there is no dataset yet, once.

    A file that is begun gets the ending `.importing`, one that is done `.imported`: so it is
    never taken in again when its dataset was deleted, and one that was interrupted goes on at the
    next start. A file that cannot be used stays as it is, and the log says why.
    """
    for path in await asyncio.to_thread(_files_in, folder):
        try:
            dataset, entries = await _take_in(path, galleries)
        except FileNotFoundError:
            # Another replica on this host has it.
            continue
        except (BusError, OSError) as error:
            log.error("dataset.not_imported", file=path.name, cause=str(error))
        else:
            log.info("dataset.imported", dataset=dataset, entries=entries)


async def _take_in(path: Path, galleries: Galleries) -> tuple[str, int]:
    where = path
    kind = await to_its_end(format_of, where)

    def opened() -> Reader:
        return reader(where, kind, galleries.dimensions)

    # All of it before the first one is stored: half a dataset would be worse than none.
    sound = await checked(opened)
    dataset = codec.convert({"dataset": sound.head.id}, _Named).dataset
    if path.suffix != BEGUN:
        await galleries.wait(await galleries.newest())
        if dataset in galleries:
            raise Conflict(f"there is a dataset {dataset!r} already")
        # Where nothing can be renamed nothing is taken in: it would come back at every start.
        where = await asyncio.to_thread(path.rename, path.with_name(path.name + BEGUN))
    await galleries.create(dataset, at=sound.head.created_at, settings=sound.head.settings)
    file = await to_its_end(opened)
    async with contextlib.aclosing(batches(file.batches())) as found:
        async for rows in found:
            await galleries.enrol_many(
                dataset, [as_new(row, None) for row in rows], existing="skip"
            )
    said = await rejected_again(galleries, dataset, file, None, None)
    for cause in said.told:
        log.warning("rejection.not_imported", dataset=dataset, cause=cause)
    with contextlib.suppress(FileNotFoundError):
        done = where.with_name(where.name.removesuffix(BEGUN) + DONE)
        await asyncio.to_thread(where.rename, done)
    return dataset, sound.total


class _Named(m.Message, frozen=True):
    """What a file has to say to become a dataset."""

    dataset: m.Name


def _say_left(dropping: asyncio.Task[None]) -> None:
    if not dropping.cancelled() and (error := dropping.exception()) is not None:
        log.error("exports.not_deleted", of=dropping.get_name(), cause=str(error))


def _work_of(job: m.Job) -> m.GalleryWork:
    if job.gallery is None:
        raise InvalidRequest(f"job {job.job!r} does not say what to do", field="gallery")
    return job.gallery


def _files_in(folder: Path) -> list[Path]:
    kinds = ("*.json", "*.npz", "*.parquet")
    return sorted(
        path for kind in kinds for name in (kind, f"{kind}{BEGUN}") for path in folder.glob(name)
    )

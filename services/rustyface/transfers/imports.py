"""The import of a dataset file: read it whole and find it sound, then enrol what is in it."""

import contextlib
import hashlib
import secrets
import shutil
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from bus import messages as m
from bus.artefacts import Artefacts
from bus.errors import Conflict, NotFound, Unavailable, Unprocessable
from bus.job_rules import Progress
from bus.jobs import Told
from bus.tasks import to_its_end
from services.rustyface.galleries.galleries import Galleries, NewEntry
from services.rustyface.transfers.files import Head, Reader, Row, format_of, reader
from services.rustyface.transfers.files.rows import refuse

# What else may need the disk meanwhile.
DISK_SPARE_BYTES: Final = 256 * 1024 * 1024
Open = Callable[[], Reader]


class Pace:
    """Tells how far a stage of a job has come, how fast, and how long yet.

    Args:
        told: Who is told.
        stage: Of which stage.
        total: How many entries it is about, where that is known.
    """

    def __init__(self, told: Told, stage: m.JobStage, total: int | None) -> None:
        self._told = told
        self._stage: m.JobStage = stage
        self._total = total
        self._began = time.monotonic()
        self.to(0)

    def to(self, done: int) -> None:
        """Say how many entries are done."""
        spent_s = time.monotonic() - self._began
        rate = done / spent_s if spent_s > 1 else None
        left = None if self._total is None or not rate else (self._total - done) / rate
        progress = Progress(
            entries=done,
            total_entries=self._total,
            entries_per_s=None if rate is None else round(rate, 1),
            eta_s=None if left is None else round(max(0.0, left), 1),
        )
        self._told(self._stage, progress)


@dataclass(frozen=True)
class Sound:
    """A file that can be taken in as a whole: how many rows, and what it says of itself."""

    total: int
    head: Head


class Import:
    """Brings a dataset file into a dataset.

    Args:
        store: Where the file is.
        galleries: Where its entries go.
        embedder: What makes the vectors of new datasets.
        digest: Which version of it.
        dimensions: How long those are.
        folder: Where the file lies while it is read.
    """

    def __init__(
        self,
        store: Artefacts,
        galleries: Galleries,
        *,
        embedder: str,
        digest: str,
        dimensions: int,
        folder: Path,
    ) -> None:
        self._store = store
        self._galleries = galleries
        self._embedder = embedder
        self._digest = digest
        self._dimensions = dimensions
        self._folder = folder

    async def carry(self, job: m.Job, work: m.GalleryWork, told: Told) -> m.GalleryWorkDone:
        """Take a file in; what an earlier try has enrolled is gone on from.

        Nothing is enrolled before the whole file was found sound.

        Raises:
            Unprocessable: The file cannot be taken; says which entry of it, and why.
            Conflict: An entry is there already, and the import was to fail then.
            BusError: The file is gone, or the entries could not be stored.
        """
        await self._galleries.wait(await self._galleries.newest())
        dimensions = self._dimensions_of(work.dataset)
        async with self._fetched(job, work) as path:
            kind = await to_its_end(format_of, path) if work.format is None else work.format

            def opened() -> Reader:
                return reader(path, kind, dimensions)

            record = await self._record(job, work, kind)
            looked = work if work.existing == "fail" else None
            sound = await self._checked(opened, told, looked, record.id)
            self._check_embedder(sound.head)
            await self._galleries.create(work.dataset, by=work.by)
            await self._galleries.begin_import(work.dataset, record)
            return await self._enrolled(opened, work, record, Pace(told, "writing", sound.total))

    async def undo(self, job: m.Job, work: m.GalleryWork) -> None:
        """Take out what an import has added that failed or was cancelled.

        What it replaced stays replaced: it cannot be brought back.
        """
        with contextlib.suppress(NotFound):
            for record in await self._records(job, work):
                if record.state == "running":
                    await self._galleries.undo_import(work.dataset, record.id, by=work.by)

    def _dimensions_of(self, dataset: str) -> int:
        """Return how long the vectors of a dataset are, or will be.

        Raises:
            Conflict: It holds those of another embedder.
        """
        there = next((one for one in self._galleries.datasets() if one.id == dataset), None)
        if there is None:
            return self._dimensions
        if there.embedder != self._embedder:
            raise Conflict(
                f"the dataset {dataset!r} holds vectors of {there.embedder}, this worker makes "
                f"those of {self._embedder}; import into another dataset",
                field="dataset",
            )
        return there.dimensions

    def _check_embedder(self, head: Head) -> None:
        if head.embedder is not None and head.embedder != self._embedder:
            raise Unprocessable(
                f"the file has vectors of {head.embedder}, this worker makes those of "
                f"{self._embedder}; they cannot be mixed",
                field="embedder",
            )
        if head.embedder_digest not in (None, self._digest):
            raise Unprocessable(
                f"the file has vectors of another version of {self._embedder}, "
                f"{str(head.embedder_digest)[:12]}; this worker's is {self._digest[:12]}, and they "
                "cannot be mixed",
                field="embedder_digest",
            )

    @contextlib.asynccontextmanager
    async def _fetched(self, job: m.Job, work: m.GalleryWork) -> AsyncGenerator[Path]:
        """Have the uploaded file here while inside."""
        if work.artefact is None:
            raise NotFound("an import needs the file that was uploaded", field="artefact")
        size = await self._store.size(work.artefact)
        if size is None:
            raise NotFound(
                f"the file {work.artefact} is not stored any more: upload it again, and import it "
                "within an hour",
                field="artefact",
            )
        await to_its_end(self._folder.mkdir, parents=True, exist_ok=True)
        free = (await to_its_end(shutil.disk_usage, self._folder)).free
        if size + DISK_SPARE_BYTES > free:
            raise Unavailable(
                f"the file has {size:,} bytes, and {self._folder} has {free:,} free",
                retry_after_s=60,
            )
        path = self._folder / f"{job.job}.{secrets.token_hex(4)}.import"
        try:
            await self._store.fetch(work.artefact, path)
            yield path
        finally:
            path.unlink(missing_ok=True)

    async def _records(self, job: m.Job, work: m.GalleryWork) -> list[m.GalleryImport]:
        """Return the imports that were begun for a job, the oldest first: one, and its retries."""
        if work.dataset not in self._galleries:
            return []
        found = await self._galleries.imports(work.dataset)
        ours = [one for one in found if one.id.partition(".")[0] == job.job]
        return sorted(ours, key=lambda one: (len(one.id), one.id))

    async def _record(self, job: m.Job, work: m.GalleryWork, kind: str) -> m.GalleryImport:
        """Return what this import is entered as; one that was undone is never gone on with."""
        records = await self._records(job, work)
        if records and records[-1].state == "running":
            return records[-1]
        name = f"{job.job}.{len(records)}" if records else job.job
        source = work.file_name or work.artefact or ""
        return m.GalleryImport(id=name, at=m.now(), source=source, format=kind, by=work.by)

    async def _checked(
        self, opened: Open, told: Told, refusing: m.GalleryWork | None, own: str
    ) -> Sound:
        """Read a file to its end; with `refusing`, no entry of it may be in that dataset."""
        pace: Pace | None = None

        async def look(rows: list[Row], first: int, total: int | None) -> None:
            nonlocal pace
            pace = pace or Pace(told, "reading", total)
            pace.to(first + len(rows))
            if refusing is None or refusing.dataset not in self._galleries:
                return
            for there in self._galleries.picked(refusing.dataset, [row.id for row in rows]):
                if there.imported != own:
                    raise Conflict(
                        f"the dataset {refusing.dataset!r} has an entry {there.id!r} already; "
                        "existing says what to do then: skip, replace or fail",
                        field="existing",
                    )

        return await checked(opened, look)

    async def _enrolled(
        self, opened: Open, work: m.GalleryWork, record: m.GalleryImport, pace: Pace
    ) -> m.GalleryWorkDone:
        added = replaced = skipped = done = revision = 0
        async with contextlib.aclosing(batches(opened)) as found:
            async for rows in found:
                fresh = [as_new(row, record.id) for row in rows]
                # What a try that was cut short has added counts as added here.
                outcome = await self._galleries.enrol_many(
                    work.dataset, fresh, existing=work.existing, by=work.by
                )
                added += outcome.added
                replaced += outcome.replaced
                skipped += outcome.skipped
                revision = max(revision, outcome.revision)
                done += len(rows)
                pace.to(done)
        end = msgspec.structs.replace(
            record, state="done", added=added, replaced=replaced, skipped=skipped
        )
        revision = max(revision, await self._galleries.end_import(work.dataset, end))
        return m.GalleryWorkDone(
            entries=done, added=added, replaced=replaced, skipped=skipped, revision=revision
        )


async def checked(
    opened: Open, look: Callable[[list[Row], int, int | None], Awaitable[None]] | None = None
) -> Sound:
    """Read a file to its end.

    Args:
        opened: Opens it from the start.
        look: Is awaited with each batch, where it begins, and how many rows there are.

    Raises:
        Unprocessable: It cannot be taken; says which entry, and why.
    """
    file = await to_its_end(opened)
    seen, first = _Seen(), 0
    async with contextlib.aclosing(batches(lambda: file)) as found:
        async for rows in found:
            seen.add(rows)
            if look is not None:
                await look(rows, first, file.total)
            first += len(rows)
    if doubled := await to_its_end(seen.doubled):
        await _refuse_doubled(opened, doubled)
    return Sound(first, file.head)


async def batches(opened: Open) -> AsyncGenerator[list[Row]]:
    """Give the rows of a file, read in a thread: a cancelled job waits for one batch at most."""
    rows = (await to_its_end(opened)).batches()
    try:
        while (batch := await to_its_end(next, rows, None)) is not None:
            yield batch
    finally:
        close = getattr(rows, "close", None)
        if close is not None:
            close()


def as_new(row: Row, imported: str | None) -> NewEntry:
    """Return a row as an entry that is to be enrolled."""
    return NewEntry(
        id=row.id,
        vector=row.vector,
        metadata=row.metadata,
        subject=row.subject,
        quality=row.quality,
        imported=imported,
        at=row.last_seen,
    )


class _Seen:
    """Which ids there were: eight bytes of a digest for each, so that millions have room."""

    def __init__(self) -> None:
        self._digests = bytearray()

    def add(self, rows: list[Row]) -> None:
        for row in rows:
            self._digests += _digest(row.id)

    def doubled(self) -> set[bytes]:
        """Return the digests that came more than once."""
        sorted_ = np.sort(np.frombuffer(self._digests, np.uint64))
        return {one.tobytes() for one in sorted_[1:][sorted_[1:] == sorted_[:-1]]}


async def _refuse_doubled(opened: Open, doubled: set[bytes]) -> None:
    """Raise Unprocessable if one of these ids is there twice; two ids may share a digest."""
    first_at: dict[str, int] = {}
    index = 0
    async with contextlib.aclosing(batches(opened)) as found:
        async for rows in found:
            for row in rows:
                if _digest(row.id) in doubled:
                    if row.id in first_at:
                        first = first_at[row.id]
                        refuse(index, row.id, f"its id is that of entry {first:,} already")
                    first_at[row.id] = index
                index += 1


def _digest(entry: str) -> bytes:
    return hashlib.blake2b(entry.encode(), digest_size=8).digest()

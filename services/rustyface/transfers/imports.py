"""The import of a dataset file: read it whole and find it sound, then take in what is in it."""

import contextlib
import secrets
import shutil
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from bus import codec
from bus import messages as m
from bus.artefacts import Artefacts
from bus.errors import Conflict, NotFound, Unavailable, Unprocessable
from bus.job_rules import Progress
from bus.jobs import Told
from bus.tasks import to_its_end
from services.rustyface.galleries.galleries import Galleries, NewEntry, NewRejection
from services.rustyface.transfers.files import Head, Reader, Row, format_of, reader
from services.rustyface.transfers.reading import Open, Sound, batches, checked
from services.rustyface.transfers.scratch import Scratch

# What else may need the disk meanwhile.
DISK_SPARE_BYTES: Final = 256 * 1024 * 1024
TOLD_MAX: Final = 100


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


@dataclass
class Repeating:
    """What has become of the rejections of a file, or of another dataset.

    Attributes:
        added: How many are new.
        known: How many were there already.
        left: How many were left out.
        told: Which those are, and why, the first of them.
    """

    added: int = 0
    known: int = 0
    left: int = 0
    told: list[str] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """What is not plain from how many are new, in sentences."""
        said = [f"rejections that were there already: {self.known:,}"] if self.known else []
        if self.left > len(self.told):
            said.append(f"rejections left out: {self.left:,}")
        return said

    def leave(self, rejection: str, why: str) -> None:
        """Count one that is left out.

        Whom it concerns is not said: a job outlives their deletion.
        """
        self.left += 1
        if len(self.told) < TOLD_MAX:
            self.told.append(f"rejection {rejection}: {why}")


class Import:
    """Brings a dataset file into a dataset.

    Args:
        store: Where the file is.
        galleries: Where its entries go.
        embedder: What makes the vectors of new datasets.
        digest: Which version of it.
        dimensions: How long those are.
        scratch: Where the file lies while it is read.
    """

    def __init__(
        self,
        store: Artefacts,
        galleries: Galleries,
        *,
        embedder: str,
        digest: str,
        dimensions: int,
        scratch: Scratch,
    ) -> None:
        self._store = store
        self._galleries = galleries
        self._embedder = embedder
        self._digest = digest
        self._dimensions = dimensions
        self._scratch = scratch

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
            made = await self._made(job, work, record, sound.head)
            await self._galleries.begin_import(work.dataset, record)
            pace = Pace(told, "writing", sound.total)
            return await self._taken(opened, work, record, pace, is_new=made)

    async def undo(self, job: m.Job, work: m.GalleryWork) -> None:
        """Take out what an import has added that failed or was cancelled.

        What it replaced stays replaced: it cannot be brought back. Of settings it has changed none:
        those of a dataset that was there are the last that it takes.
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
        name = f"{job.job}.{secrets.token_hex(4)}.import"
        path = await to_its_end(self._scratch.place, name)
        free = (await to_its_end(shutil.disk_usage, path.parent)).free
        if size + DISK_SPARE_BYTES > free:
            raise Unavailable(
                f"the file has {size:,} bytes, and {self._scratch.shared} has {free:,} free",
                retry_after_s=60,
            )
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

    async def _made(
        self, job: m.Job, work: m.GalleryWork, record: m.GalleryImport, head: Head
    ) -> bool:
        """Make the dataset if it is not there; tell whether this job has, in whichever try.

        Raises:
            NotFound: It had, and somebody has deleted it since.
        """
        await check_not_deleted(self._galleries, work.dataset, job)
        settings = None if work.file_settings == "keep" else head.settings
        await self._galleries.create(
            work.dataset, at=head.created_at, settings=settings, imported=record.id, by=work.by
        )
        maker = self._galleries.maker(work.dataset)
        return maker is not None and maker.partition(".")[0] == job.job

    async def _taken(
        self,
        opened: Open,
        work: m.GalleryWork,
        record: m.GalleryImport,
        pace: Pace,
        *,
        is_new: bool,
    ) -> m.GalleryWorkDone:
        """Take in a sound file: its entries, then its rejections, and its settings at last."""
        added = replaced = skipped = done = revision = 0
        file = await to_its_end(opened)
        async with contextlib.aclosing(batches(file.batches())) as found:
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
        said = await rejected_again(self._galleries, work.dataset, file, record.id, work.by)
        settings, notes = await self._settled(work, file.head.settings, is_new=is_new)
        end = msgspec.structs.replace(
            record,
            state="done",
            added=added,
            replaced=replaced,
            skipped=skipped,
            rejections=said.added,
        )
        revision = max(revision, await self._galleries.end_import(work.dataset, end))
        return m.GalleryWorkDone(
            entries=done,
            added=added,
            replaced=replaced,
            skipped=skipped,
            failed=said.told,
            rejections=said.added,
            settings=settings,
            notes=notes + said.notes,
            revision=revision,
        )

    async def _settled(
        self, work: m.GalleryWork, theirs: m.DatasetSettings | None, *, is_new: bool
    ) -> tuple[Literal["taken", "kept"] | None, list[str]]:
        """Set a dataset that was there as its file says, if that is wanted.

        Returns:
            What became of the file's settings, and what else is to be said of them.
        """
        if theirs is None:
            asked = work.file_settings == "take"
            return None, ["the file has no settings that could be taken"] if asked else []
        if is_new and work.file_settings != "keep":
            return "taken", []
        own = await self._galleries.settings(work.dataset)
        if not (names := differing(own, theirs)):
            return "taken" if work.file_settings == "take" else "kept", []
        if work.file_settings == "take":
            await self._galleries.configure(work.dataset, theirs, by=work.by)
            return "taken", []
        note = (
            f"the dataset is set otherwise than the file says, in {', '.join(names)}, and stays "
            "so; with file_settings (--settings) take an import sets it as the file says"
        )
        return "kept", [note]


async def check_not_deleted(galleries: Galleries, dataset: str, job: m.Job) -> None:
    """Raise NotFound if a dataset was deleted that a try of a job has made which was cut short.

    One that somebody has asked to be tried again has no entries done, and makes it anew.
    """
    if not job.entries:
        return
    maker = await galleries.ended_maker(dataset)
    if maker is not None and maker.partition(".")[0] == job.job:
        raise NotFound(
            f"the dataset {dataset!r} that this job had made was deleted meanwhile; try the job "
            "again to have it made anew",
            field="dataset",
        )


async def rejected_again(
    galleries: Galleries, dataset: str, file: Reader, imported: str | None, by: str | None
) -> Repeating:
    """Say the rejections of a file in a dataset that has its entries by now.

    Raises as `Galleries.reject_again` does.
    """
    told = Repeating()
    async with contextlib.aclosing(batches(file.rejections())) as found:
        async for rows in found:
            fresh = [
                NewRejection(
                    id=row.id,
                    subject=row.subject,
                    vector=row.vector,
                    entry=row.entry,
                    imported=imported,
                )
                for row in rows
            ]
            said = await galleries.reject_again(dataset, fresh, by=by)
            told.added += said.added
            told.known += said.known
            for one, why in said.refused:
                told.leave(one.id, why)
    return told


def differing(own: m.DatasetSettings, theirs: m.DatasetSettings) -> list[str]:
    """Return the names of settings that are not the same, those of `quality` by their place."""
    mine = _flat(own)
    return [name for name, value in _flat(theirs).items() if mine[name] != value]


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


def _flat(settings: m.DatasetSettings) -> dict[str, Any]:
    plain: dict[str, Any] = codec.plain(settings)
    quality = plain.pop("quality")
    return plain | {f"quality.{name}": value for name, value in quality.items()}

"""The export of a dataset: all that it has as a file in the object store, for an hour."""

import contextlib
import hashlib
import secrets
from datetime import UTC, timedelta
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import structlog

from bus import job_rules
from bus import messages as m
from bus.client import Client
from bus.errors import BusError, Conflict, NotFound
from bus.jobs import Told
from bus.subjects import JOB
from bus.tasks import to_its_end
from services.rustyface.galleries.galleries import Galleries, NewRejection
from services.rustyface.transfers.files import BATCH, Head, RejectionRow, Row, Writer, writer
from services.rustyface.transfers.imports import Pace

KEPT: Final = timedelta(hours=1)
_TRIES: Final = 20

log = structlog.get_logger("rustyface.exports")


class Export:
    """Writes datasets into files, and sees that no file has what was deleted since.

    Args:
        client: The bus; the files go to its object store of faces.
        galleries: Where the entries are.
        folder: Where a file lies while it is written.
    """

    def __init__(self, client: Client, galleries: Galleries, folder: Path) -> None:
        self._client = client
        self._store = client.store.faces
        self._galleries = galleries
        self._folder = folder
        # What was stored for a job that has not ended yet.
        self._stored: dict[str, str] = {}

    async def carry(self, job: m.Job, work: m.GalleryWork, told: Told) -> m.GalleryWorkDone:
        """Export a dataset as it is now.

        Raises:
            NotFound: There is no such dataset.
            Unprocessable: It cannot be said in that format; says what.
            BusError: The file could not be stored.
        """
        await self._galleries.wait(await self._galleries.newest())
        dataset, kind = work.dataset, work.format or "json"
        ids = self._galleries.ids(dataset)
        there = next((one for one in self._galleries.datasets() if one.id == dataset), None)
        if there is None:
            raise NotFound(f"there is no dataset {dataset!r}", field="dataset")
        settings = await self._galleries.settings(dataset)
        head = Head(dataset, there.created_at, there.embedder, there.embedder_digest, settings)
        await to_its_end(self._folder.mkdir, parents=True, exist_ok=True)
        path = self._folder / f"{job.job}.{secrets.token_hex(4)}.export"
        pace = Pace(told, "writing", len(ids))
        count = rejections = 0
        opened: list[Writer] = []

        def open_file() -> None:
            # Cancelled while this goes on, the caller is given nothing that it could close.
            opened.append(writer(path, kind, head, there.dimensions))

        try:
            try:
                await to_its_end(open_file)
                [file] = opened
                for first in range(0, len(ids), BATCH):
                    part = ids[first : first + BATCH]
                    entries = self._galleries.picked(dataset, part, embeddings=True)
                    await to_its_end(file.add, [_row(entry) for entry in entries])
                    count += len(entries)
                    pace.to(first + len(part))
                said = self._galleries.rejections(dataset)
                rejections = len(said)
                for first in range(0, rejections, BATCH):
                    rows = [_rejection(one) for one in said[first : first + BATCH]]
                    await to_its_end(file.reject, rows)
                await to_its_end(file.finish)
            finally:
                for file in opened:
                    await to_its_end(file.abandon)
            digest, size = await to_its_end(_digest_of, path)
            self._stored[job.job] = digest
            await self._store.put(digest, path)
        finally:
            path.unlink(missing_ok=True)
        return m.GalleryWorkDone(
            entries=count,
            rejections=rejections,
            settings="written",
            artefact=digest,
            size_bytes=size,
            file_name=f"{dataset}-{m.now():%Y%m%d-%H%M}.{kind}",
            revision=self._galleries.revision,
        )

    async def closed(self, job: m.Job) -> None:
        """Delete the file of an export that did not end well."""
        digest = self._stored.pop(job.job, None)
        if digest is not None and job.state != "done":
            await self._store.delete(digest)

    async def drop(self, dataset: str) -> None:
        """Delete every file of a dataset: somebody was deleted from it, or a rejection taken back.

        An export that runs is cancelled, since it may have read them already; one that is queued
        begins after the deletion and is left.
        """
        for entry in await self._client.store.jobs.all():
            job = entry.value
            if job is None or job.gallery is None or job.gallery.action != "export":
                continue
            if job.gallery.dataset == dataset and job.state in ("running", "done"):
                await self._drop(job.job)

    async def drop_old(self) -> None:
        """Delete the files whose hour has passed."""
        for entry in await self._client.store.jobs.all():
            job = entry.value
            done = job.gallery_result if job else None
            if job and done and done.artefact and job.ended_at and job.ended_at < m.now() - KEPT:
                # Made anew by another export since, it is left.
                await self._store.delete(done.artefact, unless_since=m.now() - KEPT)

    async def _drop(self, name: str) -> None:
        """Cancel an export, or delete the file that it has led to."""
        jobs = self._client.store.jobs
        for _ in range(_TRIES):
            found = await jobs.get(name)
            job = found.value if found else None
            if found is None or job is None or job.state in ("failed", "cancelled", "queued"):
                return
            if job.state == "done":
                done = job.gallery_result
                if done is not None and done.artefact is not None:
                    await self._store.delete(done.artefact)
                    log.info("export.dropped", job=name, artefact=done.artefact)
                return
            changed = job_rules.cancelled(job, m.now())
            if changed is job:
                return
            why = (
                "somebody was deleted from the dataset meanwhile, or a rejection taken back; "
                "export it again"
            )
            changed = msgspec.structs.replace(changed, error=why)
            with contextlib.suppress(Conflict):
                await jobs.update(changed, found.revision, name)
                with contextlib.suppress(BusError):
                    await self._client.publish(JOB, changed, job=name)
                return
        raise Conflict(f"others keep changing job {name!r}")


def _row(entry: m.EntryInfo) -> Row:
    return Row(
        entry.id,
        np.asarray(entry.embedding, np.float32),
        entry.metadata,
        entry.subject,
        entry.last_seen.astimezone(UTC),
        entry.quality,
    )


def _rejection(said: NewRejection) -> RejectionRow:
    return RejectionRow(said.id, said.subject, said.vector, said.entry)


def _digest_of(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return digest, path.stat().st_size

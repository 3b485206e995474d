"""The export of a dataset: all that it has as a file in the object store, for an hour.

In no file that can be found is anything that was deleted before. An export looks for deletions when
its file is stored, and writes it anew if there were any; what is deleted between that look and the
end of the job is written into the job by whoever deletes, so that the end is refused. After the end
whoever deletes deletes the file.
"""

import asyncio
import contextlib
import hashlib
import secrets
from datetime import timedelta
from pathlib import Path
from typing import Final

import structlog

from bus import job_rules
from bus import messages as m
from bus.client import Client
from bus.errors import BusError, Conflict, NotFound, Unavailable
from bus.jobs import Told
from bus.tasks import to_its_end
from services.rustyface.galleries.galleries import Galleries
from services.rustyface.transfers.files import Head, Writer, writer
from services.rustyface.transfers.imports import Pace
from services.rustyface.transfers.scratch import Scratch
from services.rustyface.transfers.snapshot import Snapshot

KEPT: Final = timedelta(hours=1)
# So often a file is stored in which something is found that was deleted meanwhile. Whoever deletes
# more often than a file can be stored would not let anybody fetch it either.
STORED_MAX: Final = 20
# How long a worker that stops waits until what it has stored is deleted.
UNSTORE_S: Final = 2.0
_TRIES: Final = 20

log = structlog.get_logger("rustyface.exports")


class Export:
    """Writes datasets into files, and sees that no file has what was deleted since.

    Args:
        client: The bus; the files go to its object store of faces.
        galleries: Where the entries are.
        scratch: Where a file lies while it is written.
    """

    def __init__(self, client: Client, galleries: Galleries, scratch: Scratch) -> None:
        self._client = client
        self._store = client.store.faces
        self._galleries = galleries
        self._scratch = scratch
        # What was stored for a job that has not ended yet.
        self._stored: dict[str, str] = {}

    async def carry(self, job: m.Job, work: m.GalleryWork, told: Told) -> m.GalleryWorkDone:
        """Export a dataset, as it is when its file is written.

        What is deleted while the file is in the making is left out: the rows wait beside it, and it
        is written anew without them, which takes far less time than to gather them.

        Raises:
            NotFound: There is no such dataset, or it was deleted meanwhile.
            Unprocessable: It cannot be said in that format; says what.
            Unavailable: Something was deleted each time that the file was being stored.
            BusError: The file could not be stored.
        """
        await self._galleries.wait(await self._galleries.newest())
        dataset, kind = work.dataset, work.format or "json"
        there = next((one for one in self._galleries.datasets() if one.id == dataset), None)
        if there is None:
            raise NotFound(f"there is no dataset {dataset!r}", field="dataset")
        settings = await self._galleries.settings(dataset)
        head = Head(dataset, there.created_at, there.embedder, there.embedder_digest, settings)
        name = f"{job.job}.{secrets.token_hex(4)}.export"
        path = await to_its_end(self._scratch.place, name)
        opened: list[Writer] = []

        def open_file() -> None:
            # Cancelled while this goes on, the caller is given nothing that it could close.
            opened.append(writer(path, kind, head, there.dimensions))

        try:
            await to_its_end(open_file)
            [file] = opened
            snapshot = Snapshot(self._galleries, dataset, file)
            await snapshot.catch_up(Pace(told, "writing", there.entries).to)
            digest, size, revision = await self._stored_whole(job, snapshot, path, told)
        except (BusError, asyncio.CancelledError):
            # Nobody knows of it, so nobody else would.
            with contextlib.suppress(BusError, TimeoutError):
                async with asyncio.timeout(UNSTORE_S):
                    await self._unstore(job)
            raise
        finally:
            try:
                for file in opened:
                    await to_its_end(file.close)
            finally:
                path.unlink(missing_ok=True)
        return m.GalleryWorkDone(
            entries=snapshot.entries,
            rejections=snapshot.rejections,
            settings="written",
            artefact=digest,
            size_bytes=size,
            file_name=f"{dataset}-{m.now():%Y%m%d-%H%M}.{kind}",
            revision=revision,
        )

    async def _stored_whole(
        self, job: m.Job, snapshot: Snapshot, path: Path, told: Told
    ) -> tuple[str, int, int]:
        """Store a file in which nothing is that was deleted.

        Returns:
            Its SHA-256, its size, and the revision up to which deletions were looked for.
        """
        for _ in range(STORED_MAX):
            await self._galleries.wait(await self._galleries.newest())
            await snapshot.catch_up()
            told("storing", None)
            await snapshot.write()
            digest, size = await to_its_end(_digest_of, path)
            self._stored[job.job] = digest
            await self._store.put(digest, path)
            await self._galleries.wait(await self._galleries.newest())
            revision = self._galleries.revision
            if not await snapshot.has_deleted():
                return digest, size, revision
            log.info("export.anew", job=job.job)
            await self._unstore(job)
        raise Unavailable(
            f"something was deleted from the dataset each of {STORED_MAX} times that its file was "
            "being stored; export it when less is deleted"
        )

    async def closed(self, job: m.Job) -> None:
        """Delete the file of an export that has not led to it."""
        if job.state != "done":
            await self._unstore(job)
        self._stored.pop(job.job, None)

    async def _unstore(self, job: m.Job) -> None:
        """Delete what was stored for a job that has not ended well."""
        digest = self._stored.get(job.job)
        if digest is not None:
            await self._store.delete(digest)
            self._stored.pop(job.job, None)

    async def drop(self, dataset: str, revision: int) -> None:
        """Delete every file of a dataset: something of it was deleted, at that revision.

        An export that runs is told, and ends with a file in which that is not; one that is queued
        begins after the deletion and is left.

        Raises:
            BusError: A file could not be deleted; the others are.
        """
        names = [
            job.job
            for entry in await self._client.store.jobs.all()
            if (job := entry.value) is not None
            and job.gallery is not None
            and (job.gallery.action, job.gallery.dataset) == ("export", dataset)
            and job.state in ("running", "done")
        ]
        # All at once: to erase one takes seconds, and until then the others could be fetched.
        dropped = await asyncio.gather(
            *(self._drop(one, revision) for one in names), return_exceptions=True
        )
        failed = [one for one in dropped if isinstance(one, BaseException)]
        if failed:
            raise failed[0]

    async def drop_old(self) -> None:
        """Delete the files whose hour has passed."""
        for entry in await self._client.store.jobs.all():
            job = entry.value
            done = job.gallery_result if job else None
            if job and done and done.artefact and job.ended_at and job.ended_at < m.now() - KEPT:
                # Made anew by another export since, it is left.
                await self._store.delete(done.artefact, unless_since=m.now() - KEPT)

    async def drop_missed(self) -> None:
        """Delete the files of what something was deleted of since: who did that may be killed."""
        await self._galleries.wait(await self._galleries.newest())
        for entry in await self._client.store.jobs.all():
            job = entry.value
            done = job.gallery_result if job else None
            if job is None or job.gallery is None or done is None or done.revision is None:
                continue
            old = job.ended_at is None or job.ended_at < m.now() - KEPT
            if done.artefact is None or old:
                continue
            missed = self._galleries.deleted_since(job.gallery.dataset, done.revision)
            if missed and await self._store.delete(done.artefact):
                log.info("export.dropped", job=job.job, artefact=done.artefact)

    async def _drop(self, name: str, revision: int) -> None:
        """Have an export heed a deletion, or delete the file that it has led to."""
        jobs = self._client.store.jobs
        for _ in range(_TRIES):
            found = await jobs.get(name)
            job = found.value if found else None
            if found is None or job is None or job.state in ("failed", "cancelled", "queued"):
                return
            if job.state == "done":
                done = job.gallery_result
                # It is gone already where this is not the first deletion since.
                if done and done.artefact and await self._store.delete(done.artefact):
                    log.info("export.dropped", job=name, artefact=done.artefact)
                return
            changed = job_rules.outdated(job, revision)
            if changed is job:
                return
            with contextlib.suppress(Conflict):
                await jobs.update(changed, found.revision, name)
                return
        raise Conflict(f"others keep changing job {name!r}")


def _digest_of(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return digest, path.stat().st_size

"""What lies in the object store of faces and nobody needs any more."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from functools import partial
from typing import Final

import structlog

from bus import messages as m
from bus.client import Client
from bus.errors import BusError
from bus.instance import Instance
from services.rustyface.galleries.galleries import Galleries
from services.rustyface.transfers.exports import Export

# An image is stored before its event, a file before its import is asked for.
YOUNG: Final = timedelta(hours=1)
# Of an import that failed or was cancelled: somebody may try it again.
RETRIED: Final = timedelta(days=1)
# An upload that broke off may be gone on with.
UNFINISHED: Final = timedelta(days=1)
# Whoever ended a job has cleared up after it by then, or is gone.
CLOSED: Final = timedelta(minutes=5)
# So long after whoever began to delete something is at it, or gone.
CUT_SHORT: Final = timedelta(minutes=5)
EXPORTS_S: Final = 60.0
ALL_EVERY: Final = 60

log = structlog.get_logger("rustyface.leftovers")


class Leftovers:
    """Clears the object store of faces: one replica does it for all.

    Args:
        client: The bus.
        instance: This process's place on it.
        galleries: Know which images are kept.
        exports: Know which files have had their hour.
        closed: Takes out what a job has left that has come to its end.
    """

    def __init__(
        self,
        client: Client,
        instance: Instance,
        galleries: Galleries,
        exports: Export,
        closed: Callable[[m.Job], Awaitable[None]],
    ) -> None:
        self._client = client
        self._store = client.store.faces
        self._instance = instance
        self._galleries = galleries
        self._exports = exports
        self._closed = closed

    async def keep_clearing(self) -> None:
        """Delete exports that are to go each minute, and at the start and hourly all the rest."""
        turn = 0
        while True:
            try:
                if await self._leads():
                    await self._exports.drop_old()
                    await self._exports.drop_missed()
                    if turn % ALL_EVERY == 0:
                        await self.clear()
                    turn += 1
            except BusError as error:
                log.warning("leftovers.not_cleared", cause=error.message)
            await asyncio.sleep(EXPORTS_S)

    async def clear(self) -> None:
        """Delete what no entry, no job and no person needs; what is younger than an hour stays.

        Safe while others store: what is needed is asked for after what there is, and what was
        brought again in between is left.
        """
        await self._close_jobs()
        before = m.now() - YOUNG
        old = [one for one in await self._store.all() if one.stored_at < before]
        wanted = await self._wanted_by_jobs()
        await self._galleries.wait(await self._galleries.newest())
        wanted |= self._galleries.images
        for one in old:
            if one.digest in wanted:
                continue
            if await self._store.delete(one.digest, unless_since=before):
                log.info("leftover.deleted", artefact=one.digest, size_bytes=one.size)
        for digest in await self._store.half_deleted(m.now() - CUT_SHORT):
            named = partial(self._galleries.names_image, digest)
            if await self._store.delete(digest, unless=named):
                log.info("leftover.deleted", artefact=digest)
        for upload in await self._store.unfinished():
            if upload.written_at < m.now() - UNFINISHED:
                await self._store.discard(upload.upload_id)

    async def _close_jobs(self) -> None:
        """Take out what jobs have left whose workers died just before they could."""
        for entry in await self._client.store.jobs.all():
            job = entry.value
            if job is None or job.gallery is None or job.ended_at is None:
                continue
            if job.state != "done" and job.ended_at <= m.now() - CLOSED:
                await self._closed(job)

    async def _wanted_by_jobs(self) -> set[str]:
        """Return the files that jobs still have to import, or may be asked to again."""
        wanted = set()
        for entry in await self._client.store.jobs.all():
            job = entry.value
            if job is None or job.gallery is None or job.gallery.artefact is None:
                continue
            given_up = job.ended_at is not None and job.ended_at < m.now() - RETRIED
            if job.state != "done" and not given_up:
                wanted.add(job.gallery.artefact)
        return wanted

    async def _leads(self) -> bool:
        """Tell whether this is the replica with the lowest slot; two that think so do no harm."""
        found = [one.value for one in await self._client.store.instances.all() if one.value]
        slots = [one.slot for one in found if one.plugin == self._instance.plugin]
        return self._instance.slot <= min(slots, default=self._instance.slot)

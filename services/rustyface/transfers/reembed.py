"""A dataset embedded anew, by the embedder of today, from the images that it has kept."""

import asyncio
import contextlib
import dataclasses
from typing import Any, Final, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from bus import codec
from bus import messages as m
from bus.artefacts import Artefacts
from bus.errors import BusError, Conflict, InvalidRequest, NotFound, Unavailable
from bus.jobs import Told
from bus.tasks import to_its_end
from services.rustyface.galleries.galleries import Galleries, NewEntry, NewRejection
from services.rustyface.photos.workers import processors
from services.rustyface.transfers.files import BATCH
from services.rustyface.transfers.imports import TOLD_MAX, Pace, Repeating, check_not_deleted

Floats = npt.NDArray[np.float32]

# So many images are embedded before their vectors are stored.
STEP: Final = 32
IMAGE_MAX_BYTES: Final = 64 * 1024 * 1024
# A vector that is stored again comes out a bit otherwise in its last digits.
SAME_WITHIN: Final = 1e-6


class Encoder(Protocol):
    """What turns an image file into a vector; blocks."""

    @property
    def name(self) -> str:
        """Of the embedder."""

    @property
    def digest(self) -> str:
        """Which version of it."""

    @property
    def dimensions(self) -> int:
        """Of its vectors."""

    def encode(self, data: bytes) -> tuple[Floats, Any]:
        """Return the vector that stands for an image, and the faces in it."""


class Reembed:
    """Makes a new dataset of the kept images of another.

    Args:
        store: Where the images are.
        galleries: Where both datasets are.
        encoder: The embedder of today.
    """

    def __init__(self, store: Artefacts, galleries: Galleries, encoder: Encoder) -> None:
        self._store = store
        self._galleries = galleries
        self._encoder = encoder
        self._at_once = asyncio.Semaphore(processors())

    async def carry(self, job: m.Job, work: m.GalleryWork, told: Told) -> m.GalleryWorkDone:
        """Embed every kept image; what an earlier try has enrolled is gone on from.

        Ids, persons, metadata and times are those of the old entries at the end, whatever was
        changed in between; settings and rejections of entries come with them. What has no image,
        and what the embedder finds no face in, is left out and named.

        Raises:
            NotFound: There is no such dataset; or the new one was deleted meanwhile.
            Conflict: The new one is there already, and not of this job.
            BusError: The entries could not be stored.
        """
        source, into = work.dataset, work.into
        if into is None:
            raise InvalidRequest("reembed needs the new dataset, into", field="into")
        await self._galleries.wait(await self._galleries.newest())
        record = await self._begun(job, work, into)
        pace = Pace(told, "embedding", len(self._galleries.ids(source)))
        done = 0
        # By id, as they were when that was said.
        failed: dict[str, tuple[m.EntryInfo, str]] = {}
        # Hours may pass: then what has changed meanwhile is embedded, and so on until nothing has.
        while left := await self._differing(source, into, record.id, failed, work.by):
            for first in range(0, len(left), STEP):
                part = self._galleries.picked(source, left[first : first + STEP])
                await self._carry_over(part, into, record.id, failed, work.by)
                done += len(part)
                pace.to(min(done, len(self._galleries.ids(source))))
        rejected = await self._reject_again(source, into, record.id, work.by)
        ids = self._galleries.ids(source)
        said = [failed[one][1] for one in ids if one in failed]
        added = sum(one.imported == record.id for one in self._galleries.picked(into, ids))
        end = msgspec.structs.replace(
            record, state="done", added=added, skipped=len(said), rejections=rejected.added
        )
        revision = await self._galleries.end_import(into, end)
        # One that somebody had made before, without entries, stays set as it is.
        taken = self._galleries.maker(into) == job.job
        return m.GalleryWorkDone(
            entries=len(ids),
            added=added,
            skipped=len(said),
            failed=[*said, *rejected.told][:TOLD_MAX],
            rejections=rejected.added,
            settings="taken" if taken else "kept",
            notes=[*(await self._left_behind(source, into) if taken else []), *rejected.notes],
            revision=revision,
        )

    async def closed(self, job: m.Job, work: m.GalleryWork) -> None:
        """Say of a new dataset whose making was given up that it is not whole."""
        if work.into is None or work.into not in self._galleries or job.state == "done":
            return
        for record in await self._galleries.imports(work.into):
            if record.id == job.job and record.state == "running":
                failed = msgspec.structs.replace(record, state="failed")
                await self._galleries.end_import(work.into, failed)

    async def _begun(self, job: m.Job, work: m.GalleryWork, into: str) -> m.GalleryImport:
        """Make the new dataset, or find the one that an earlier try has made."""
        await check_not_deleted(self._galleries, into, job)
        settings = await self._galleries.settings(work.dataset)
        record = m.GalleryImport(
            id=job.job, at=m.now(), source=work.dataset, format="reembed", by=work.by
        )
        if into in self._galleries:
            known = [one for one in await self._galleries.imports(into) if one.id == job.job]
            if known:
                return known[0]
            if self._galleries.ids(into):
                raise Conflict(
                    f"there is a dataset {into!r} already; reembed makes a new one", field="into"
                )
        if not self._same_embedder(work.dataset):
            # Cosines of another embedder mean something else.
            settings = msgspec.structs.replace(settings, threshold=None, verify_threshold=None)
        await self._galleries.create(into, settings=settings, imported=job.job, by=work.by)
        await self._galleries.begin_import(into, record)
        return record

    async def _embedded(self, entry: m.EntryInfo, imported: str) -> NewEntry | str:
        """Return an entry with its new vector; or a sentence that says why it has none."""
        if entry.image is None:
            return f"{entry.id}: its image was not kept"
        async with self._at_once:
            try:
                size = await self._store.size(entry.image)
                if size is None or size > IMAGE_MAX_BYTES:
                    return f"{entry.id}: its image {entry.image} is gone"
                data = b"".join([block async for block in self._store.read(entry.image)])
                vector, _ = await to_its_end(self._encoder.encode, data)
            except Unavailable:
                raise
            except BusError as error:
                return f"{entry.id}: {error.message}"
        if not vector.any():
            return f"{entry.id}: its image is all black, it has no vector"
        return _with(entry, vector, imported)

    async def _differing(
        self,
        source: str,
        into: str,
        imported: str,
        failed: dict[str, tuple[m.EntryInfo, str]],
        by: str | None,
    ) -> list[str]:
        """Return the entries that the new dataset does not have as the old one has them now.

        What was removed from the old one meanwhile is removed from the new one. What somebody has
        put into the new dataset under such an id stays theirs.
        """
        await self._without_deleted(source, into, imported, by)
        ids = self._galleries.ids(source)
        found = []
        for first in range(0, len(ids), BATCH):
            part = ids[first : first + BATCH]
            made = {one.id: one for one in self._galleries.picked(into, part)}
            for entry in self._galleries.picked(source, part):
                new = made.get(entry.id)
                if new is None:
                    known = failed.get(entry.id)
                    if known is None or known[0].image != entry.image:
                        found.append(entry.id)
                elif new.imported == imported and not _alike(entry, new):
                    found.append(entry.id)
        return found

    async def _carry_over(
        self,
        entries: list[m.EntryInfo],
        into: str,
        imported: str,
        failed: dict[str, tuple[m.EntryInfo, str]],
        by: str | None,
    ) -> None:
        """Enrol entries with their new vectors; what has the same image has its vector already."""
        ids = [one.id for one in entries]
        made = {one.id: one for one in self._galleries.picked(into, ids, embeddings=True)}
        fresh = [one for one in entries if one.id not in made or made[one.id].image != one.image]
        known = [
            _with(one, there.embedding, imported)
            for one in entries
            if (there := made.get(one.id)) is not None
            and there.image == one.image
            and there.embedding is not None
        ]
        embedded = await asyncio.gather(*(self._embedded(one, imported) for one in fresh))
        new = [one for one in embedded if isinstance(one, NewEntry)]
        for entry, said in zip(fresh, embedded, strict=True):
            failed.pop(entry.id, None)
            if isinstance(said, str):
                failed[entry.id] = entry, said
                if entry.id in made:
                    # The face that it had is the old photo's.
                    with contextlib.suppress(NotFound):
                        await self._galleries.remove(into, entry.id, imported=imported, by=by)
        # Not over what somebody has put there since it was looked at.
        await self._galleries.enrol_many(into, [*known, *new], existing="renew", by=by)

    async def _reject_again(
        self, source: str, into: str, imported: str, by: str | None
    ) -> Repeating:
        """Say in the new dataset, too, of entries that they are not somebody.

        A rejected face that is no entry, or was another photo's of its entry, has only its old
        vector, and is left behind.
        """
        told = Repeating()
        fresh = []
        for one in self._galleries.rejections(source):
            if one.entry is None:
                told.leave(one.id, "its face is no entry and has no photo; reject it again")
            elif not self._has_face_of(source, one.entry, one):
                told.leave(one.id, f"{one.entry} has another photo by now; reject it again")
            else:
                fresh.append(dataclasses.replace(one, vector=None, imported=imported))
        said = await self._galleries.reject_again(into, fresh, by=by)
        told.added, told.known = said.added, said.known
        for one, why in said.refused:
            told.leave(one.id, why)
        return told

    def _has_face_of(self, source: str, entry: str, rejection: NewRejection) -> bool:
        there = self._galleries.picked(source, [entry], embeddings=True)
        if not there or there[0].embedding is None or rejection.vector is None:
            return False
        return np.allclose(there[0].embedding, rejection.vector, rtol=0, atol=SAME_WITHIN)

    async def _left_behind(self, source: str, into: str) -> list[str]:
        """Return in sentences what of the old dataset's settings the new one has not got."""
        if source not in self._galleries or self._same_embedder(source):
            return []
        old = await self._galleries.settings(source)
        return [
            f"{name}, {value}, was left behind: cosines of {self._encoder.name} mean something "
            f"else; {into!r} has that of its embedder"
            for name in ("threshold", "verify_threshold")
            if (value := getattr(old, name)) is not None
        ]

    def _same_embedder(self, dataset: str) -> bool:
        there = next((one for one in self._galleries.datasets() if one.id == dataset), None)
        today = (self._encoder.name, self._encoder.digest)
        return there is not None and (there.embedder, there.embedder_digest) == today

    async def _without_deleted(self, source: str, into: str, imported: str, by: str | None) -> None:
        """Remove from the new dataset what was removed from the old one meanwhile."""
        await self._galleries.wait(await self._galleries.newest())
        ids = self._galleries.ids(into)
        for first in range(0, len(ids), BATCH):
            part = ids[first : first + BATCH]
            there = {one.id for one in self._galleries.picked(source, part)}
            for entry in self._galleries.picked(into, part):
                if entry.id in there or entry.imported != imported:
                    continue
                with contextlib.suppress(NotFound):
                    await self._galleries.remove(into, entry.id, imported=imported, by=by)


def _alike(old: m.EntryInfo, new: m.EntryInfo) -> bool:
    # As bytes: in metadata there may be a number that is none, and such a one never equals itself.
    before, now = (
        codec.encode(
            [one.subject, one.metadata, one.quality, one.image, one.last_seen], codec.MSGPACK
        )
        for one in (old, new)
    )
    return before == now


def _with(entry: m.EntryInfo, vector: npt.ArrayLike, imported: str) -> NewEntry:
    return NewEntry(
        id=entry.id,
        vector=np.asarray(vector, np.float32),
        metadata=entry.metadata,
        subject=entry.subject,
        image=entry.image,
        quality=entry.quality,
        imported=imported,
        at=entry.last_seen,
    )

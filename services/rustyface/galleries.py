"""The galleries, event-sourced: append to the stream, replay it, follow it.

The stream keeps the last message of each subject. A gallery's own subject says that it was created
or deleted, an entry's subject carries its vector, or says that it was removed; so a removed vector
leaves the stream the moment its tombstone is stored. What a process holds is a projection: every
replica reads the same events in the same order, this one's own included.

An entry is appended under the condition that its gallery's subject has not had another message
since: an entry is never accepted into a gallery that was deleted meanwhile.
"""

import asyncio
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import structlog

from bus import codec
from bus import messages as m
from bus.errors import BusError, Conflict, DeadlineExceeded, InvalidRequest, NotFound
from bus.state import Stored, Stream
from bus.subjects import GALLERY_ENTRY, GALLERY_HEAD, gallery_events, name_of
from services.rustyface.search import Hit, Matrix

Floats = npt.NDArray[np.float32]

LITTLE_ENDIAN: Final = np.dtype("<f4")
WAIT_S: Final = 5.0

log = structlog.get_logger("rustyface.galleries")


@dataclass
class _Gallery:
    """One gallery as the events so far say.

    Attributes:
        head: Its own last event.
        head_seq: That event's sequence; entries below it belong to a predecessor.
        matrix: The vectors.
        entries: The last event of each entry, without its vector.
        revision: The last event that concerned it.
        updated_at: When that was.
    """

    head: m.GalleryHead
    head_seq: int
    matrix: Matrix
    entries: dict[str, m.GalleryEntry] = field(default_factory=dict)
    revision: int = 0
    updated_at: datetime = field(default_factory=m.now)


class Galleries:
    """Every gallery of the deployment, in memory.

    Args:
        stream: Where the events are.
        root: The first token of their subjects.
        embedder: What makes the vectors of new galleries.
        dimensions: How long those are.

    Attributes:
        caught_up: Set once everything that was there at the start has been read.
        revision: The last event that was read.
    """

    def __init__(self, stream: Stream, root: str, embedder: str, dimensions: int) -> None:
        self.caught_up = asyncio.Event()
        self.revision = 0
        self._stream = stream
        self._root = root
        self._embedder = embedder
        self._dimensions = dimensions
        self._galleries: dict[str, _Gallery] = {}
        # Of deleted ones too: a new gallery of that name follows this event.
        self._heads: dict[str, int] = {}
        self._moved = asyncio.Condition()

    async def run(self) -> None:
        """Read the events, from the first one on, until cancelled."""
        async for batch in self._stream.follow(gallery_events(self._root)):
            for stored in batch.messages:
                self._apply(stored)
            if batch.caught_up:
                self.caught_up.set()
            async with self._moved:
                self._moved.notify_all()

    @property
    def entries(self) -> int:
        """How many entries there are in all galleries."""
        return sum(len(gallery.matrix) for gallery in self._galleries.values())

    def datasets(self) -> list[m.DatasetInfo]:
        """Return every gallery, by name."""
        return [_info(self._galleries[name]) for name in sorted(self._galleries)]

    def __contains__(self, gallery: str) -> bool:
        return gallery in self._galleries

    async def wait(self, revision: int) -> None:
        """Wait until this replica has read an event.

        Raises:
            DeadlineExceeded: It has not within `WAIT_S`.
        """
        try:
            async with asyncio.timeout(WAIT_S), self._moved:
                await self._moved.wait_for(lambda: self.revision >= revision)
        except TimeoutError:
            raise DeadlineExceeded(
                f"this replica has read the galleries up to revision {self.revision}, not yet "
                f"to {revision}",
                retry_after_s=1,
            ) from None

    async def newest(self) -> int:
        """Return the newest revision that the broker has, of all galleries together."""
        return await self._stream.last_seq()

    async def create(self, gallery: str) -> None:
        """Create a gallery; one that is there stays as it is."""
        await self.wait(await self.newest())
        if gallery in self._galleries:
            return
        head = m.GalleryHead(
            id=gallery, at=m.now(), embedder=self._embedder, dimensions=self._dimensions
        )
        subject = GALLERY_HEAD.subject(self._root, gallery=gallery)
        try:
            revision = await self._stream.append(
                subject, codec.encode(head), expect=(subject, self._heads.get(gallery, 0))
            )
        except Conflict:
            # Another replica has created it at the same moment.
            revision = await self.newest()
        await self.wait(revision)

    async def delete(self, gallery: str) -> None:
        """Delete a gallery with all its entries, here and in the stream.

        Raises:
            NotFound: There is none.
        """
        there = await self._known(gallery)
        head = m.GalleryHead(
            id=gallery,
            at=m.now(),
            embedder=there.head.embedder,
            dimensions=there.head.dimensions,
            deleted=True,
        )
        subject = GALLERY_HEAD.subject(self._root, gallery=gallery)
        revision = await self._stream.append(
            subject, codec.encode(head), expect=(subject, there.head_seq)
        )
        entries = GALLERY_ENTRY.subject(self._root, gallery=gallery)
        await self._stream.purge(entries, keep_from=revision)
        await self.wait(revision)

    async def enrol(self, gallery: str, entry: str, vector: Floats, metadata: Any) -> int:
        """Store an entry, replacing one of the same id; return the revision that has it.

        Raises:
            NotFound: There is no such gallery, or it was deleted at this moment.
            InvalidRequest: Its vectors come from another embedder.
        """
        there = await self._known(gallery)
        self._check_embedder(gallery, there)
        return await self._append(
            gallery,
            there,
            m.GalleryEntry(
                id=entry,
                at=m.now(),
                embedding=vector.astype(LITTLE_ENDIAN).tobytes(),
                metadata=metadata,
            ),
        )

    async def remove(self, gallery: str, entry: str) -> None:
        """Remove an entry, here and from the stream.

        Raises:
            NotFound: There is no such gallery or entry.
        """
        there = await self._known(gallery)
        if entry not in there.entries:
            raise NotFound(f"the dataset {gallery!r} has no entry {entry!r}", field="entry_id")
        tombstone = m.GalleryEntry(id=entry, at=m.now())
        await self.wait(await self._append(gallery, there, tombstone))

    async def search(
        self, gallery: str, query: Floats, *, k: int, threshold: float, revision: int | None
    ) -> tuple[list[tuple[Hit, m.GalleryEntry]], int]:
        """Return the nearest entries, best first, and the revision that was searched.

        Args:
            gallery: Where.
            query: Shape ``[dimensions]``.
            k: How many at most.
            threshold: Cosine below which a result leaves.
            revision: What must have been read; the newest that the broker has if None.

        Raises:
            NotFound: There is no such gallery.
            InvalidRequest: The query has another length than the gallery's vectors.
        """
        there = await self._known(gallery, revision)
        hits = there.matrix.top_k(query, k, threshold)
        return [(hit, there.entries[hit.id]) for hit in hits], max(there.revision, there.head_seq)

    def check_vector(self, gallery: str, vector: Floats) -> None:
        """Raise InvalidRequest unless a vector from elsewhere fits a gallery.

        Nothing that does not fit may be appended: every replica would pass over it for ever.
        """
        dimensions = self._galleries[gallery].head.dimensions
        if vector.shape != (dimensions,) or not np.isfinite(vector).all() or not vector.any():
            raise InvalidRequest(
                f"an embedding of the dataset {gallery!r} has {dimensions} finite numbers, not all "
                f"of them zero; this one has {len(vector)}",
                field="embedding",
            )

    async def _known(self, gallery: str, revision: int | None = None) -> _Gallery:
        await self.wait(await self.newest() if revision is None else revision)
        there = self._galleries.get(gallery)
        if there is None:
            known = ", ".join(sorted(self._galleries)) or "none"
            raise NotFound(f"there is no dataset {gallery!r}; there are: {known}", field="dataset")
        return there

    def _check_embedder(self, gallery: str, there: _Gallery) -> None:
        if there.head.embedder != self._embedder:
            raise InvalidRequest(
                f"the dataset {gallery!r} holds vectors of {there.head.embedder}, this worker "
                f"makes those of {self._embedder}; they cannot be mixed",
                field="dataset",
            )

    async def _append(self, gallery: str, there: _Gallery, entry: m.GalleryEntry) -> int:
        head = GALLERY_HEAD.subject(self._root, gallery=gallery)
        subject = GALLERY_ENTRY.subject(self._root, gallery=gallery, entry=entry.id)
        try:
            return await self._stream.append(
                subject,
                codec.encode(entry, codec.MSGPACK),
                headers={codec.CONTENT_TYPE: codec.MSGPACK},
                expect=(head, there.head_seq),
            )
        except Conflict:
            raise NotFound(
                f"the dataset {gallery!r} was deleted at this moment", field="dataset"
            ) from None

    def _apply(self, stored: Stored) -> None:
        """Take one event in; one that cannot be read is passed over."""
        self.revision = stored.seq
        parts = stored.subject.split(".")
        gallery = name_of(parts[2])
        try:
            if parts[3] == "head":
                head = codec.decode(stored.body, m.GalleryHead)
                self._apply_head(gallery, head, stored.seq)
            else:
                kind = stored.headers.get(codec.CONTENT_TYPE)
                entry = codec.decode(stored.body, m.GalleryEntry, kind)
                self._apply_entry(gallery, entry, stored.seq)
        except BusError as error:
            log.warning("event.unreadable", subject=stored.subject, cause=error.message)

    def _apply_head(self, gallery: str, head: m.GalleryHead, seq: int) -> None:
        self._heads[gallery] = seq
        if head.deleted:
            self._galleries.pop(gallery, None)
        else:
            self._galleries[gallery] = _Gallery(
                head, seq, Matrix(head.dimensions), revision=seq, updated_at=head.at
            )

    def _apply_entry(self, gallery: str, entry: m.GalleryEntry, seq: int) -> None:
        there = self._galleries.get(gallery)
        if there is None:
            return
        if entry.embedding is None:
            there.matrix.delete(entry.id)
            there.entries.pop(entry.id, None)
        else:
            vector = np.frombuffer(entry.embedding, LITTLE_ENDIAN).astype(np.float32)
            there.matrix.put(entry.id, vector)
            there.entries[entry.id] = m.GalleryEntry(
                id=entry.id, at=entry.at, metadata=entry.metadata
            )
        there.revision, there.updated_at = seq, entry.at


def _info(gallery: _Gallery) -> m.DatasetInfo:
    return m.DatasetInfo(
        id=gallery.head.id,
        entries=len(gallery.matrix),
        created_at=gallery.head.at,
        updated_at=gallery.updated_at,
        embedder=gallery.head.embedder,
        dimensions=gallery.head.dimensions,
    )

"""The galleries, event-sourced: append to the stream, replay it, follow it.

The stream keeps the last message of each subject. A gallery's own subject says that it was created
or deleted, an entry's subject carries its vector, or says that it was removed; so a removed vector
leaves the stream the moment its tombstone is stored. What a process holds is a projection: every
replica reads the same events in the same order, this one's own included.

An entry is appended under the condition that its gallery's subject has not had another message
since: an entry is never accepted into a gallery that was deleted meanwhile.
"""

import asyncio
import contextlib
import hashlib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import structlog

from bus import codec
from bus import messages as m
from bus.errors import (
    BusError,
    Conflict,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    TooLarge,
    Unavailable,
)
from bus.streams import Stored, Stream
from bus.subjects import GALLERY_ENTRY, GALLERY_HEAD, gallery_events, name_of, token
from bus.tasks import beside
from services.rustyface.search import Hit, Matrix

Floats = npt.NDArray[np.float32]
E = TypeVar("E", m.GalleryHead, m.GalleryEntry)

LITTLE_ENDIAN: Final = np.dtype("<f4")
WAIT_S: Final = 5.0
# An event comes round within a few milliseconds. After this long it may be one that somebody
# deleted from the stream by hand, and that will never come.
PATIENCE_S: Final = 0.5
# Searches give it back with every result, and an answer has to fit into one message.
METADATA_MAX_BYTES: Final = 64 * 1024
DIMENSIONS_MAX: Final = 16_384
# A subject and the broker's own words beside it have to fit into a line of 4,096 bytes, otherwise
# the broker hangs up for good.
ENTRY_TOKEN_MAX: Final = 512

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

    def put(self, entry: m.GalleryEntry) -> None:
        """Add an entry, or replace it.

        Raises:
            InvalidRequest: Its vector is none, or of another length.
        """
        values = entry.embedding or b""
        if len(values) != self.matrix.dimensions * LITTLE_ENDIAN.itemsize:
            raise InvalidRequest(
                f"its embedding has {len(values)} bytes, the gallery has vectors of "
                f"{self.matrix.dimensions} values of {LITTLE_ENDIAN.itemsize} bytes"
            )
        self.matrix.put(entry.id, np.frombuffer(values, LITTLE_ENDIAN))
        self.entries[entry.id] = m.GalleryEntry(id=entry.id, at=entry.at, metadata=entry.metadata)

    def forget(self, entry: str) -> None:
        """Take an entry out, if it is there."""
        self.matrix.delete(entry)
        self.entries.pop(entry, None)


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
        # Those whose own last event cannot be read.
        self._unreadable: set[str] = set()
        # Those with entries in the stream that no longer count.
        self._left_behind: set[str] = set()
        self._moved = asyncio.Condition()
        self._replaced = asyncio.Event()

    async def run(self) -> None:
        """Read the events, from the first one on, until cancelled.

        Raises:
            Unavailable: The stream is not the one that was read so far.
        """
        async with beside(self._end_when_replaced()):
            async for batch in self._stream.follow(gallery_events(self._root)):
                for stored in batch.messages:
                    self._apply(stored)
                if batch.caught_up and not self.caught_up.is_set():
                    await self._clear_away()
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
            async with asyncio.timeout(WAIT_S):
                while self.revision < revision:
                    if not await self._comes_to(revision):
                        await self._step_over_gap()
        except TimeoutError:
            raise DeadlineExceeded(
                f"this replica has read the galleries up to revision {self.revision}, not yet "
                f"to {revision}",
                retry_after_s=1,
            ) from None

    async def newest(self) -> int:
        """Return the newest revision that the broker has, of all galleries together.

        Raises:
            Unavailable: It is older than what was read: the stream was deleted, or restored from
                a backup. This replica then ends, since nothing that it holds is certain.
        """
        read = self.revision
        newest = await self._stream.last_seq()
        if newest < read:
            self._replaced.set()
            raise Unavailable(
                f"the stream of the galleries ends at revision {newest}, read was {read}: it was "
                "replaced, and this worker begins anew",
                retry_after_s=2,
            )
        return newest

    async def create(self, gallery: str, *, at: datetime | None = None) -> None:
        """Create a gallery; one that is there stays as it is.

        Args:
            gallery: Its name.
            at: When it was created; now if None.

        Raises:
            Conflict: There is an event of that gallery which this worker cannot read.
        """
        await self.wait(await self.newest())
        if gallery in self._galleries:
            return
        self._check_readable(gallery)
        head = m.GalleryHead(
            id=gallery, at=_utc(at or m.now()), embedder=self._embedder, dimensions=self._dimensions
        )
        subject, predecessor = self._head_subject(gallery), self._heads.get(gallery, 0)
        try:
            revision = await self._stream.append(
                subject, codec.encode(head), expect=(subject, predecessor)
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
        subject = self._head_subject(gallery)
        revision = await self._stream.append(
            subject, codec.encode(head), expect=(subject, there.head_seq)
        )
        # Killed in between, the next worker that starts does it: see `_clear_away`.
        await self._stream.purge(self._entries_subject(gallery), keep_from=revision)
        await self.wait(revision)

    async def enrol(
        self,
        gallery: str,
        entry: str,
        vector: Floats,
        metadata: Any,
        *,
        at: datetime | None = None,
    ) -> int:
        """Store an entry, replacing one of the same id; return the revision that has it.

        Args:
            gallery: Where.
            entry: Its id.
            vector: What `check_vector` lets pass.
            metadata: Whatever MessagePack can carry.
            at: When it was last seen; now if None.

        Raises:
            NotFound: There is no such gallery, or it was deleted at this moment.
            InvalidRequest: Its vectors come from another embedder, or the metadata cannot be
                stored.
            TooLarge: The metadata are.
        """
        check_metadata(metadata)
        there = await self._known(gallery)
        self._check_embedder(gallery, there)
        return await self._append(
            gallery,
            there,
            m.GalleryEntry(
                id=entry,
                at=_utc(at or m.now()),
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
        self,
        gallery: str,
        query: Floats,
        *,
        k: int,
        threshold: float,
        revision: int | None,
        by_embedder: bool = False,
    ) -> tuple[list[tuple[Hit, m.GalleryEntry]], int]:
        """Return the nearest entries, best first, and the revision that was searched.

        Args:
            gallery: Where.
            query: Shape ``[dimensions]``.
            k: How many at most.
            threshold: Cosine below which a result leaves.
            revision: What must have been read; the newest that the broker has if None.
            by_embedder: Whether this worker's embedder made the query; then it has to be the
                gallery's own.

        Raises:
            NotFound: There is no such gallery.
            InvalidRequest: The query has another length than the gallery's vectors, or comes
                from another embedder.
        """
        there = await self._known(gallery, revision)
        if by_embedder:
            self._check_embedder(gallery, there)
        hits = there.matrix.top_k(query, k, threshold)
        return [(hit, there.entries[hit.id]) for hit in hits], max(there.revision, there.head_seq)

    def check_vector(self, vector: Floats) -> None:
        """Raise InvalidRequest unless a vector from elsewhere could be this embedder's.

        Nothing else may be appended: every replica would pass over it for ever.
        """
        shape = (self._dimensions,)
        if vector.shape != shape or not np.isfinite(vector).all() or not vector.any():
            raise InvalidRequest(
                f"an embedding of {self._embedder} has {self._dimensions} finite numbers, not all "
                f"of them zero; this one has {len(vector)}",
                field="embedding",
            )

    async def _known(self, gallery: str, revision: int | None = None) -> _Gallery:
        await self.wait(await self.newest() if revision is None else revision)
        there = self._galleries.get(gallery)
        if there is None:
            self._check_readable(gallery)
            known = ", ".join(sorted(self._galleries)) or "none"
            raise NotFound(f"there is no dataset {gallery!r}; there are: {known}", field="dataset")
        return there

    def _check_readable(self, gallery: str) -> None:
        # Never to be created over: its entries may well be those of a newer version.
        if gallery in self._unreadable:
            raise Conflict(
                f"the last event of the dataset {gallery!r}, revision {self._heads[gallery]}, "
                "cannot be read by this worker; the log says why",
                field="dataset",
            )

    def _check_embedder(self, gallery: str, there: _Gallery) -> None:
        if there.head.embedder != self._embedder:
            raise InvalidRequest(
                f"the dataset {gallery!r} holds vectors of {there.head.embedder}, this worker "
                f"makes those of {self._embedder}; they cannot be mixed",
                field="dataset",
            )

    async def _append(self, gallery: str, there: _Gallery, entry: m.GalleryEntry) -> int:
        head = self._head_subject(gallery)
        subject = GALLERY_ENTRY.subject(self._root, gallery=gallery, entry=_addressed(entry.id))
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

    def _head_subject(self, gallery: str) -> str:
        return GALLERY_HEAD.subject(self._root, gallery=gallery)

    def _entries_subject(self, gallery: str) -> str:
        return GALLERY_ENTRY.subject(self._root, gallery=gallery)

    async def _comes_to(self, revision: int) -> bool:
        """Return whether an event is read soon."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S), self._moved:
                await self._moved.wait_for(lambda: self.revision >= revision)
                return True
        return False

    async def _step_over_gap(self) -> None:
        """Count what was deleted from the end of the stream as read."""
        # In this order: what is stored between the two questions is not stepped over.
        newest = await self.newest()
        last = await self._stream.last(gallery_events(self._root))
        if last is None or last.seq <= self.revision:
            self.revision = max(self.revision, newest)

    async def _end_when_replaced(self) -> None:
        await self._replaced.wait()
        raise Unavailable("the stream of the galleries was replaced; they are read anew")

    async def _clear_away(self) -> None:
        """Delete from the stream what a deletion that was cut short has left there."""
        for gallery in self._left_behind & self._heads.keys() - self._unreadable:
            try:
                await self._stream.purge(
                    self._entries_subject(gallery), keep_from=self._heads[gallery]
                )
            except BusError as error:
                log.warning("dataset.not_cleared", dataset=gallery, cause=error.message)
            else:
                log.info("dataset.cleared", dataset=gallery)
        self._left_behind.clear()

    def _apply(self, stored: Stored) -> None:
        """Take one event in; one that cannot be read is passed over.

        Whatever it says, the event before it on its subject has left the stream. So that leaves
        the projection as well, and a replica that replays knows the same as one that was there.
        """
        self.revision = stored.seq
        _, _, gallery, kind, *entry = stored.subject.split(".")
        try:
            if kind == "head":
                self._apply_head(name_of(gallery), stored)
            else:
                self._apply_entry(name_of(gallery), entry[0], stored)
        except BusError as error:
            log.warning("event.unreadable", subject=stored.subject, cause=error.message)

    def _apply_head(self, gallery: str, stored: Stored) -> None:
        self._galleries.pop(gallery, None)
        self._heads[gallery] = stored.seq
        self._unreadable.add(gallery)
        head = _event(stored, m.GalleryHead)
        if head.id != gallery or not 1 <= head.dimensions <= DIMENSIONS_MAX:
            raise InvalidRequest(
                f"it is about {head.id!r} with {head.dimensions} dimensions, expected are "
                f"{gallery!r} and 1 to {DIMENSIONS_MAX}"
            )
        self._unreadable.discard(gallery)
        if not head.deleted:
            self._galleries[gallery] = _Gallery(
                head, stored.seq, Matrix(head.dimensions), revision=stored.seq, updated_at=head.at
            )

    def _apply_entry(self, gallery: str, address: str, stored: Stored) -> None:
        there = self._galleries.get(gallery)
        if there is None:
            self._left_behind.add(gallery)
            return
        there.revision = stored.seq
        try:
            entry = _event(stored, m.GalleryEntry)
            if token(_addressed(entry.id)) != address:
                raise InvalidRequest("it is about another entry than its subject says")
            if entry.embedding is None:
                there.forget(entry.id)
            else:
                there.put(entry)
        except BusError:
            for known in [e for e in there.entries if token(_addressed(e)) == address]:
                there.forget(known)
            raise
        there.updated_at = max(there.updated_at, entry.at)


def check_metadata(metadata: Any) -> None:
    """Refuse metadata that cannot be stored, or be given back.

    Raises:
        InvalidRequest: There is something in it that neither JSON nor MessagePack can carry.
        TooLarge: It is over `METADATA_MAX_BYTES`.
    """
    try:
        size = len(codec.encode(metadata, codec.MSGPACK))
    except (OverflowError, TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"metadata: it cannot be stored: {error}; allowed are objects, lists, texts, numbers "
            "of 64 bits, true, false and null",
            field="metadata",
        ) from None
    if size > METADATA_MAX_BYTES:
        raise TooLarge(
            f"metadata: it has {size:,} bytes, allowed are {METADATA_MAX_BYTES:,}",
            field="metadata",
        )


def _event(stored: Stored, kind: type[E]) -> E:
    """Read an event, its time in UTC.

    Raises:
        InvalidRequest: It is none of that kind.
    """
    try:
        event = codec.decode(stored.body, kind, stored.headers.get(codec.CONTENT_TYPE))
    except OverflowError:
        raise InvalidRequest("its time is beyond the year 9999") from None
    at = _utc(event.at)
    return event if at is event.at else msgspec.structs.replace(event, at=at)


def _utc(at: datetime) -> datetime:
    """Return a time with a zone; one without is in UTC."""
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def _addressed(entry: str) -> str:
    """Return what stands for an entry in its subject: its id, or a digest of a long one."""
    # A short id that looks like a digest is turned into one too, or it could take another's place.
    if len(token(entry)) <= ENTRY_TOKEN_MAX and not entry.startswith("sha256-"):
        return entry
    return f"sha256-{hashlib.sha256(entry.encode()).hexdigest()}"


def _info(gallery: _Gallery) -> m.DatasetInfo:
    return m.DatasetInfo(
        id=gallery.head.id,
        entries=len(gallery.matrix),
        created_at=gallery.head.at,
        updated_at=gallery.updated_at,
        embedder=gallery.head.embedder,
        dimensions=gallery.head.dimensions,
    )

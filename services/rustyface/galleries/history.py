"""What was done to galleries, and by whom: a ring for each person, so that it can go with them."""

import asyncio
import contextlib
import hashlib
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final

import msgspec
import structlog

from bus import codec
from bus import messages as m
from bus.errors import BusError, Unavailable
from bus.streams import Stored, Stream
from bus.subjects import GALLERY_CHANGE
from services.rustyface.galleries.clearing import soon
from services.rustyface.galleries.persons import Borne
from services.rustyface.galleries.projection import Projection, addressed

NOBODY: Final = "-"
_WINDOW: Final = 2_000
CHANGES_MAX: Final = 10_000
TOLD_AT_ONCE: Final = 100

log = structlog.get_logger("rustyface.history")


class History:
    """The changes of all galleries. They say who and what, and never carry a vector.

    A change is told after its event was acknowledged, so one may be missing after a crash, but
    none is told that did not happen.

    Args:
        stream: Where they are kept; None keeps none.
        root: The first token of their subjects.
    """

    def __init__(self, stream: Stream | None, root: str) -> None:
        self._stream = stream
        self._root = root

    async def tell(self, change: m.GalleryChange) -> int | None:
        """Store a change, in the ring of the person that it is about.

        Returns:
            Its number; None if it could not be stored.
        """
        if self._stream is None:
            return None
        try:
            return await self._stream.append(
                self._subject(change.dataset, change.subject), codec.encode(change)
            )
        except BusError as error:
            log.warning(
                "history.not_kept",
                dataset=change.dataset,
                action=change.action,
                cause=error.message,
            )
            return None

    async def take_back(self, seq: int) -> None:
        """Delete one change; raises Unavailable where that is not possible now."""
        if self._stream is None:
            return
        try:
            await self._stream.remove(seq)
        except Unavailable:
            raise
        except BusError as error:
            log.error("history.not_cleared", seq=seq, cause=error.message)

    async def forget(self, gallery: str, trail: Iterable[Borne] | None = None) -> None:
        """Delete the history of somebody, or all of a gallery.

        Args:
            gallery: Where.
            trail: Under which names they were known, and when; what rings have of others stays.
        """
        if self._stream is None:
            return
        try:
            if trail is None:
                await self._stream.purge(GALLERY_CHANGE.subject(self._root, gallery=gallery))
                return
            rings: defaultdict[str, list[Borne]] = defaultdict(list)
            for one in trail:
                rings[self._subject(gallery, one.name)].append(one)
            for ring, borne in rings.items():
                await self._forget_in(self._stream, ring, borne)
        except BusError as error:
            log.warning("history.not_cleared", dataset=gallery, cause=error.message)

    async def _forget_in(self, stream: Stream, ring: str, borne: Sequence[Borne]) -> None:
        found = list[Stored]()
        # One by one: a consumer would wait for a broker that is away as long as that takes.
        while (
            stored := await stream.at_or_after(found[-1].seq + 1 if found else 1, ring)
        ) is not None:
            found.append(stored)
        theirs = [stored.seq for stored in found if _may_be_of(stored, borne)]
        if len(theirs) == len(found):
            # What is told from here on is about somebody else.
            await stream.purge(ring, keep_from=max(theirs, default=0) + 1)
            return
        for seq in theirs:
            await self.take_back(seq)

    async def read(
        self, gallery: str, *, limit: int, before: int | None
    ) -> tuple[list[m.GalleryChange], int | None]:
        """Return the changes of a gallery, the newest first, and where the next ones begin.

        Args:
            gallery: Whose.
            limit: How many at most.
            before: Only those with a smaller number.
        """
        if self._stream is None:
            return [], None
        first, last = await self._stream.bounds()
        end = last if before is None else min(last, before - 1)
        found: list[Stored] = []
        window = _WINDOW
        # The stream can be read forwards alone, and others' changes stand between: so in windows
        # from the end, each larger than the one before.
        while end >= max(first, 1) and len(found) <= limit:
            begin = max(first, end - window + 1, 1)
            found = await self._between(self._stream, gallery, begin, end) + found
            end, window = begin - 1, 4 * window
        more = len(found) > limit
        shown = found[-limit:]
        changes = [_change(stored) for stored in reversed(shown)]
        return [one for one in changes if one is not None], shown[0].seq if more else None

    async def _between(self, stream: Stream, gallery: str, begin: int, end: int) -> list[Stored]:
        subject = GALLERY_CHANGE.subject(self._root, gallery=gallery)
        found = []
        reading = stream.read(subject, after=begin - 1)
        async with contextlib.aclosing(reading) as events:  # type: ignore[type-var]
            async for stored in events:
                if stored.seq > end:
                    break
                found.append(stored)
        return found

    def _subject(self, gallery: str, person: str | None) -> str:
        ring = NOBODY if person is None else addressed(person)
        if person == NOBODY:
            # Somebody may be called so.
            ring = f"sha256-{hashlib.sha256(person.encode()).hexdigest()}"
        return GALLERY_CHANGE.subject(self._root, gallery=gallery, subject=ring)


class Telling:
    """Changes on their way into the history, behind the answers.

    Of its own: where changes cannot be told, deletions go on all the same.

    Args:
        history: Where they are kept.
        projection: What was read of the galleries.
        read_all: Waits until what the broker has is read.
    """

    def __init__(
        self, history: History, projection: Projection, read_all: Callable[[], Awaitable[None]]
    ) -> None:
        self._history = history
        self._projection = projection
        self._read_all = read_all
        self._changes: asyncio.Queue[m.GalleryChange] = asyncio.Queue(CHANGES_MAX)

    def put(self, change: m.GalleryChange) -> None:
        """Have a change told in the history, behind the answer."""
        try:
            self._changes.put_nowait(change)
        except asyncio.QueueFull:
            log.warning(
                "history.not_kept",
                dataset=change.dataset,
                action=change.action,
                cause=f"{CHANGES_MAX:,} changes wait already",
            )

    async def all_told(self) -> None:
        """Wait until every change was told, but not long."""
        await soon(self._changes.join())

    async def run(self) -> None:
        """Tell changes until cancelled."""
        told: list[tuple[m.GalleryChange, int]] = []
        while True:
            changes = [await self._changes.get()]
            while len(changes) < TOLD_AT_ONCE and not self._changes.empty():
                changes.append(self._changes.get_nowait())
            try:
                seqs = [await self._history.tell(change) for change in changes]
                pairs = zip(changes, seqs, strict=True)
                told += [(change, seq) for change, seq in pairs if seq is not None]
                told = await self._take_back(told)
            finally:
                for _ in changes:
                    self._changes.task_done()

    async def _take_back(
        self, told: list[tuple[m.GalleryChange, int]]
    ) -> list[tuple[m.GalleryChange, int]]:
        """Delete told changes of whom, or of what, was removed before they were told.

        Whoever removed has deleted the history by then. So it has to be looked for afterwards, and
        the removal is in the stream if these came too late.

        Returns:
            Those that could not be looked at.
        """
        try:
            await self._read_all()
            for change, seq in told:
                if self._is_over(change):
                    await self._history.take_back(seq)
        except BusError as error:
            log.warning("history.not_looked_at", changes=len(told), cause=error.message)
            return told[-CHANGES_MAX:]
        return []

    def _is_over(self, change: m.GalleryChange) -> bool:
        """Tell whether a change is about somebody, or a gallery, that was removed after it."""
        if change.dataset in self._projection.unreadable:
            return False
        revision = change.revision or 0
        if revision < self._projection.heads.get(change.dataset, 0):
            return True
        there = self._projection.galleries.get(change.dataset)
        if there is None or change.subject is None:
            return False
        # From just before it: a renaming is told by the name that was left with it.
        return there.moves.walk(change.subject, revision - 1)[0] is None


def _may_be_of(stored: Stored, borne: Sequence[Borne]) -> bool:
    """Tell whether a change is about somebody, by when they bore the name of its ring.

    Of one that does not say when it was nobody knows, so it is.
    """
    change = _change(stored)
    if change is None or change.revision is None:
        return True
    return any(one.after < change.revision <= one.until for one in borne)


def _change(stored: Stored) -> m.GalleryChange | None:
    try:
        change = codec.decode(stored.body, m.GalleryChange)
    except BusError as error:
        log.warning("history.unreadable", seq=stored.seq, cause=error.message)
        return None
    return msgspec.structs.replace(change, seq=stored.seq)

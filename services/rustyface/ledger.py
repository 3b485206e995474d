"""The events of all galleries: appended under a condition, followed, cleared away.

The stream keeps the last message of each subject. A gallery's own subject says that it was created
or deleted, an entry's subject carries its vector, or says that it was removed; so a removed vector
leaves the stream the moment its tombstone is stored. What a process holds is a projection: every
replica reads the same events in the same order, this one's own included.

Some events take away what others told of: a gallery's end, a person's removal, an import undone.
They count at once, everywhere. What they have taken away is then deleted from the stream, and by
the next worker that starts, if that was cut short.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import structlog

from bus import codec
from bus import messages as m
from bus.errors import (
    BusError,
    Conflict,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    Unavailable,
)
from bus.streams import Stored, Stream
from bus.subjects import (
    GALLERY_ENTRY,
    GALLERY_HEAD,
    GALLERY_REJECTION,
    gallery_events,
)
from bus.tasks import beside
from services.rustyface.asking import Asking
from services.rustyface.gallery import Gallery
from services.rustyface.history import History
from services.rustyface.projection import MESSAGE_ID, Dead, Projection, addressed

WAIT_S: Final = 5.0
# An event comes round within a few milliseconds. After this long it may be one that somebody
# deleted from the stream by hand, and that will never come.
PATIENCE_S: Final = 0.5
# What has to be deleted besides goes on behind an answer that would have to wait longer.
PATIENT_S: Final = 5.0
CHORES_MAX: Final = 10_000
CLEARED_AT_ONCE: Final = 64
TRIES: Final = 16

ImagesGone = Callable[[set[str]], Awaitable[None]]
Chore = Callable[[], Awaitable[None]]

log = structlog.get_logger("rustyface.galleries")


class Ledger:
    """The stream of events and what this process has read of it.

    Args:
        stream: Where the events are.
        root: The first token of their subjects.
        history: Where changes are told.
        images_gone: Is called with the images that no entry names any more.

    Attributes:
        caught_up: Set once everything that was there at the start has been read.
        projection: What was read.
    """

    def __init__(
        self, stream: Stream, root: str, history: History, images_gone: ImagesGone | None
    ) -> None:
        self.caught_up = asyncio.Event()
        # One thread: a search uses all processors, and two at once only halve each other.
        self._threads = ThreadPoolExecutor(1, "search")
        self.projection = Projection(self._threads)
        self._stream = stream
        self._root = root
        self._history = history
        self._images_gone = images_gone
        # The same for all who wait together: a question to the broker costs as much as a search.
        self._last_seq = Asking(stream.last_seq)
        self._moved = asyncio.Condition()
        self._replaced = asyncio.Event()
        # What was found in the stream at the start and need not be there any more.
        self._left: list[Dead] = []
        # By message id, what this process's own events have taken away.
        self._taken: dict[str, list[Dead]] = {}
        self._chores: asyncio.Queue[Chore] = asyncio.Queue(CHORES_MAX)
        # Of its own: where changes cannot be told, deletions go on all the same.
        self._changes: asyncio.Queue[m.GalleryChange] = asyncio.Queue(CHORES_MAX)

    async def run(self) -> None:
        """Read the events, from the first one on, until cancelled.

        Raises:
            Unavailable: The stream is not the one that was read so far.
        """
        try:
            async with beside(self._end_when_replaced(), self._do_chores(), self._tell_changes()):
                async for batch in self._stream.follow(gallery_events(self._root)):
                    self._sort(self.projection.apply(batch.messages))
                    if batch.caught_up and not self.caught_up.is_set():
                        await self._clear_away()
                        self.caught_up.set()
                    async with self._moved:
                        self._moved.notify_all()
        finally:
            await self._last_seq.close()
            self._threads.shutdown(wait=False, cancel_futures=True)

    # --- Reading ----------------------------------------------------------------------------------

    async def wait(self, revision: int) -> None:
        """Wait until this replica has read an event.

        Raises:
            DeadlineExceeded: It has not within `WAIT_S`.
        """
        try:
            async with asyncio.timeout(WAIT_S):
                while self.projection.revision < revision:
                    if not await self._comes_to(revision):
                        await self._step_over_gap()
        except TimeoutError:
            raise DeadlineExceeded(
                f"this replica has read the galleries up to revision {self.projection.revision}, "
                f"not yet to {revision}",
                retry_after_s=1,
            ) from None

    async def newest(self) -> int:
        """Return the newest revision that the broker has, of all galleries together.

        Raises:
            Unavailable: It is older than what was read: the stream was deleted, or restored from
                a backup. This replica then ends, since nothing that it holds is certain.
        """
        read = self.projection.revision
        newest = await self._last_seq.answer()
        if newest < read:
            self._replaced.set()
            raise Unavailable(
                f"the stream of the galleries ends at revision {newest}, read was {read}: it was "
                "replaced, and this worker begins anew",
                retry_after_s=2,
            )
        return newest

    async def known(self, gallery: str, revision: int | None = None) -> Gallery:
        """Return a gallery as of a revision, the broker's newest if None.

        Raises:
            NotFound: There is none.
            Conflict: An event of it cannot be read by this worker.
            InvalidRequest: The broker has no such revision yet.
        """
        if revision is None or revision > self.projection.revision:
            newest = await self.newest()
            if revision is not None and revision > newest:
                raise InvalidRequest(
                    f"revision: it is {revision}, the newest that there is is {newest}",
                    field="revision",
                )
            revision = newest if revision is None else revision
        await self.wait(revision)
        there = self.projection.galleries.get(gallery)
        if there is None:
            self.check_readable(gallery)
            known = ", ".join(sorted(self.projection.galleries)) or "none"
            raise NotFound(f"there is no dataset {gallery!r}; there are: {known}", field="dataset")
        return there

    def check_readable(self, gallery: str) -> None:
        """Raise Conflict if there is an event of a gallery that this worker cannot read."""
        # Never to be created over: its entries may well be those of a newer version.
        if gallery in self.projection.unreadable:
            raise Conflict(
                f"an event of the dataset {gallery!r}, revision "
                f"{self.projection.unreadable[gallery]}, cannot be read by this worker; the log "
                "says why",
                field="dataset",
            )

    async def last(self, subject: str, there: Gallery) -> tuple[Stored | None, int]:
        """Return a subject's last event in a gallery, if any, and what to expect as its sequence.

        The broker is asked: the projection does not keep what it has no use for.
        """
        stored = await self._stream.last(subject)
        if stored is None:
            return None, 0
        # Below the gallery's own event it is a predecessor's, not cleared away yet.
        return (stored if stored.seq > there.head_seq else None), stored.seq

    # --- Appending --------------------------------------------------------------------------------

    async def append(
        self,
        there: Gallery,
        subject: str,
        event: m.Message,
        *,
        content_type: str = codec.JSON,
        message_id: str | None = None,
    ) -> int:
        """Store an event in a gallery that is still the same; return its revision.

        Raises:
            NotFound: The gallery was deleted at this moment.
        """
        head = GALLERY_HEAD.subject(self._root, gallery=there.head.id)
        try:
            return await self._stream.append(
                subject,
                codec.encode(event, content_type),
                headers=_headers(content_type, message_id),
                expect=(head, there.head_seq),
            )
        except Conflict:
            raise _deleted(there) from None

    async def append_after(
        self,
        there: Gallery,
        subject: str,
        seq: int,
        event: m.Message,
        *,
        content_type: str = codec.JSON,
        message_id: str | None = None,
    ) -> int:
        """Store an event if its own subject has had none since `seq`, and wait until it is read.

        Raises:
            Conflict: It has had one.
            NotFound: The gallery was deleted at this moment.
        """
        revision = await self._stream.append(
            subject,
            codec.encode(event, content_type),
            headers=_headers(content_type, message_id),
            expect=(subject, seq),
        )
        await self.wait(revision)
        now = self.projection.galleries.get(there.head.id)
        # One condition is all that a message can have. Nothing of a dead gallery may stay; but what
        # has come into one that was made anew meanwhile everybody has read, and it does.
        if now is None or revision < now.head_seq:
            await self._stream.remove(revision)
            raise _deleted(there)
        return revision

    async def append_head(self, head: m.GalleryHead, predecessor: int) -> int:
        """Store a gallery's own event; raises Conflict unless the one before is `predecessor`."""
        subject = GALLERY_HEAD.subject(self._root, gallery=head.id)
        return await self._stream.append(subject, codec.encode(head), expect=(subject, predecessor))

    async def append_entry(self, there: Gallery, entry: m.GalleryEntry) -> int:
        """Store an entry's event; raises as `append` does."""
        return await self.append(
            there, self.entry_subject(there, entry.id), entry, content_type=codec.MSGPACK
        )

    def entry_subject(self, there: Gallery, entry: str) -> str:
        """Return the subject of an entry's events."""
        return GALLERY_ENTRY.subject(self._root, gallery=there.head.id, entry=addressed(entry))

    # --- Clearing ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def taking(self) -> Iterator[tuple[str, list[Dead]]]:
        """Give a message id for an event, and collect what that event takes away."""
        message_id = secrets.token_hex(12)
        taken = self._taken[message_id] = []
        try:
            yield message_id, taken
        finally:
            del self._taken[message_id]

    async def clear(self, dead: list[Dead]) -> None:
        """Delete what was taken away from the stream, and its images; wait for it, but not long."""
        done = asyncio.Event()

        async def chore() -> None:
            try:
                await self._clear(dead)
            finally:
                done.set()

        await self._chores.put(chore)
        await _soon(done.wait())

    async def clear_gallery(self, gallery: str, seq: int, images: Iterable[str]) -> None:
        """Delete all events of a gallery below its own last one from the stream, and its images."""
        await self.drop_images(images)
        await self._stream.purge(gallery_events(self._root, gallery), keep_from=seq)

    async def drop_images(self, images: Iterable[str]) -> None:
        """Say of images that no entry names them any more, if that is so."""
        gone = {one for one in images if self.projection.images[one] <= 0}
        if not gone or self._images_gone is None:
            return
        try:
            await self._images_gone(gone)
        except BusError as error:
            log.warning("images.not_deleted", images=len(gone), cause=error.message)

    async def withdraw(self, there: Gallery, rejection: str) -> int:
        """Store that a rejection counts no more, and with that delete its face."""
        # Without the name: that of somebody who was removed does not come back with it.
        event = m.GalleryRejection(id=rejection, at=m.now(), subject="")
        subject = GALLERY_REJECTION.subject(self._root, gallery=there.head.id, rejection=rejection)
        return await self.append(there, subject, event)

    async def withdraw_orphans(self, there: Gallery) -> None:
        """Withdraw rejections whose face was removed, or whose person has no entry any more.

        Does not wait until that is read: the reader itself calls this.
        """
        for one in list(there.rejections.values()):
            if one.person.entries and (one.entry is None or one.entry in there.entries):
                continue
            try:
                await self.withdraw(there, one.id)
            except BusError as error:
                log.warning("rejection.not_withdrawn", rejection=one.id, cause=error.message)

    def tell(self, change: m.GalleryChange) -> None:
        """Have a change told in the history, behind the answer."""
        try:
            self._changes.put_nowait(change)
        except asyncio.QueueFull:
            log.warning(
                "history.not_kept",
                dataset=change.dataset,
                action=change.action,
                cause=f"{CHORES_MAX:,} changes wait already",
            )

    async def all_told(self) -> None:
        """Wait until every change was told, but not long."""
        await _soon(self._changes.join())

    def drop_images_after(self, revision: int, images: list[str]) -> None:
        """Once an event is read, drop the images that it has left, behind the answer."""

        async def drop() -> None:
            await self.wait(revision)
            await self.drop_images(images)

        if not images:
            return
        try:
            self._chores.put_nowait(drop)
        except asyncio.QueueFull:
            log.warning("images.not_deleted", images=len(images), cause="too much waits already")

    async def chores_done(self) -> None:
        """Wait until nothing is left to be cleared away, but not long."""
        await _soon(self._chores.join())

    async def _do_chores(self) -> None:
        while True:
            chore = await self._chores.get()
            try:
                await chore()
            except BusError as error:
                log.warning("galleries.chore_failed", cause=error.message)
            finally:
                self._chores.task_done()

    async def _tell_changes(self) -> None:
        while True:
            change = await self._changes.get()
            try:
                await self._history.tell(change)
            finally:
                self._changes.task_done()

    def _sort(self, dead: list[Dead]) -> None:
        """Keep what this process has to clear away: the other replicas' own is theirs."""
        if not self.caught_up.is_set():
            self._left += dead
            return
        for one in dead:
            if one.cause in self._taken:
                self._taken[one.cause].append(one)

    async def _clear(self, dead: Iterable[Dead]) -> None:
        dead = list(dead)
        await self.drop_images(one.image for one in dead if one.image)
        left = iter(dead)

        async def remove() -> None:
            for one in left:
                await self._stream.remove(one.seq)

        results = await asyncio.gather(
            *(remove() for _ in range(min(CLEARED_AT_ONCE, len(dead)))), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _clear_away(self) -> None:
        """Delete from the stream what a deletion that was cut short has left there."""
        projection = self.projection
        left = projection.left_behind
        for gallery in left.keys() & projection.heads.keys() - projection.unreadable.keys():
            try:
                if gallery not in projection.galleries:
                    await self._history.forget(gallery)
                await self.clear_gallery(gallery, projection.heads[gallery], left[gallery])
            except BusError as error:
                log.warning("dataset.not_cleared", dataset=gallery, cause=error.message)
            else:
                log.info("dataset.cleared", dataset=gallery)
        left.clear()
        if self._left:
            for gallery, person in {(one.gallery, one.person) for one in self._left}:
                there = projection.galleries.get(gallery)
                if there is not None and person is not None:
                    await self._history.forget(gallery, there.moves.names_of(person))
            try:
                await self._clear(self._left)
            except BusError as error:
                log.warning("entries.not_cleared", events=len(self._left), cause=error.message)
            else:
                log.info("entries.cleared", events=len(self._left))
            self._left = []
        for there in list(projection.galleries.values()):
            await self.withdraw_orphans(there)

    async def _comes_to(self, revision: int) -> bool:
        """Return whether an event is read soon."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S), self._moved:
                await self._moved.wait_for(lambda: self.projection.revision >= revision)
                return True
        return False

    async def _step_over_gap(self) -> None:
        """Count what was deleted from the end of the stream as read."""
        # In this order: what is stored between the two questions is not stepped over.
        newest = await self.newest()
        last = await self._stream.last(gallery_events(self._root))
        if last is None or last.seq <= self.projection.revision:
            self.projection.revision = max(self.projection.revision, newest)

    async def _end_when_replaced(self) -> None:
        await self._replaced.wait()
        raise Unavailable("the stream of the galleries was replaced; they are read anew")


async def _soon(event: Awaitable[object]) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(PATIENT_S):
            await event


def _headers(content_type: str, message_id: str | None) -> dict[str, str]:
    headers = {} if content_type == codec.JSON else {codec.CONTENT_TYPE: content_type}
    return headers if message_id is None else headers | {MESSAGE_ID: message_id}


def _deleted(there: Gallery) -> NotFound:
    return NotFound(f"the dataset {there.head.id!r} was deleted at this moment", field="dataset")

"""The events of all galleries: appended under a condition, followed, cleared away.

Of each subject the last message counts. A gallery's own subject says that it was created or
deleted, an entry's subject carries its vector, or says that it was removed. What a process holds is
a projection: every replica reads the same events in the same order, this one's own included.

Many events take away what others told of: an entry removed, replaced or moved, a gallery's end, a
person's removal, an import undone. They count at once, everywhere. Only then the process that has
made them erases what they have taken away, and the next worker that starts, if that was cut short:
the other order would leave a face with the replicas that are there, and not with those that start.
"""

import asyncio
import contextlib
import itertools
import secrets
from collections.abc import Callable, Iterator, Sequence
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
from bus.streams import Outgoing, Stored, Stream
from bus.subjects import (
    GALLERY_ENTRY,
    GALLERY_HEAD,
    GALLERY_REJECTION,
    gallery_events,
)
from bus.tasks import beside
from services.rustyface.galleries.asking import Asking
from services.rustyface.galleries.clearing import Clearing, DropImage, Ended, Unerased, soon
from services.rustyface.galleries.gallery import Gallery
from services.rustyface.galleries.history import History, Telling
from services.rustyface.galleries.pointless import Pointless
from services.rustyface.galleries.projection import MESSAGE_ID, Dead, Projection, addressed

WAIT_S: Final = 5.0
# An event comes round within a few milliseconds. After this long it may be one that somebody
# deleted from the stream by hand, and that will never come.
PATIENCE_S: Final = 0.5
TRIES: Final = 16


log = structlog.get_logger("rustyface.galleries")


class Ledger:
    """The stream of events and what this process has read of it.

    Args:
        stream: Where the events are.
        root: The first token of their subjects.
        history: What was done, as it is kept.
        drop_image: Deletes an image that no entry names any more.

    Attributes:
        caught_up: Set once everything that was there at the start has been read.
        projection: What was read.
        telling: Where changes are told.
    """

    def __init__(
        self, stream: Stream, root: str, history: History, drop_image: DropImage | None
    ) -> None:
        self.caught_up = asyncio.Event()
        # One thread: a search uses all processors, and two at once only halve each other.
        self._threads = ThreadPoolExecutor(1, "search")
        self.projection = Projection(self._threads)
        self._stream = stream
        self._root = root
        self._history = history
        self._clearing = Clearing(
            stream, root, self.projection.images, self.names_image, drop_image
        )
        # The same for all who wait together: a question to the broker costs as much as a search.
        self._last_seq = Asking(stream.last_seq)
        self._moved = asyncio.Condition()
        self._replaced = asyncio.Event()
        # What was found in the stream at the start and need not be there any more.
        self._left: list[Dead] = []
        # Its own events are known by the beginning of their message ids.
        self._mine = f"{secrets.token_hex(8)}-"
        self._numbers = itertools.count()
        # By message id, what those have taken away for whose answer somebody waits.
        self._taken: dict[str, list[Dead]] = {}
        self._pointless = Pointless(self.projection.galleries, self.withdraw_orphans)
        self.telling = Telling(history, self.projection, self._read_all)

    async def run(self) -> None:
        """Read the events, from the first one on, until cancelled.

        Raises:
            Unavailable: The stream is not the one that was read so far.
        """
        try:
            async with beside(
                self._end_when_replaced(),
                self._clearing.run(),
                self.telling.run(),
                self._pointless.run(),
            ):
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

    async def names_image(self, image: str) -> bool:
        """Tell whether an entry names an image, as of the broker's newest revision.

        Raises:
            Unavailable: The broker is away.
            DeadlineExceeded: This replica has not read that revision yet.
        """
        await self._read_all()
        return image in self.projection.images

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
                headers=self._headers(content_type, message_id),
                expect=(head, there.head_seq),
            )
        except Conflict:
            raise deleted(there) from None

    async def append_after(
        self,
        there: Gallery,
        subject: str,
        seq: int,
        event: m.Message,
        *,
        content_type: str = codec.JSON,
        message_id: str | None = None,
        watched: str | None = None,
    ) -> int:
        """Store an event if its own subject has had none since `seq`, and wait until it is read.

        With `watched`, which may have wildcards, none of those subjects may have had one.

        Raises:
            Conflict: It has had one.
            NotFound: The gallery was deleted at this moment.
        """
        revision = await self._stream.append(
            subject,
            codec.encode(event, content_type),
            headers=self._headers(content_type, message_id),
            expect=(watched or subject, seq),
        )
        await self.wait(revision)
        now = self.projection.galleries.get(there.head.id)
        # One condition is all that a message can have. Nothing of a dead gallery may stay; but what
        # has come into one that was made anew meanwhile everybody has read, and it does.
        if now is None or revision < now.head_seq:
            await self.clear([Dead(there.head.id, revision)])
            raise deleted(there)
        return revision

    async def append_head(
        self, head: m.GalleryHead, predecessor: int, message_id: str | None = None
    ) -> int:
        """Store a gallery's own event; raises Conflict unless the one before is `predecessor`."""
        subject = GALLERY_HEAD.subject(self._root, gallery=head.id)
        return await self._stream.append(
            subject,
            codec.encode(head),
            headers=self._headers(codec.JSON, message_id),
            expect=(subject, predecessor),
        )

    async def append_entry(
        self,
        there: Gallery,
        entry: m.GalleryEntry,
        message_id: str | None = None,
        *,
        since: int | None = None,
    ) -> int:
        """Store an entry's event as `append` does; with `since`, as `append_after` does."""
        subject, kind = self.entry_subject(there, entry.id), codec.MSGPACK
        if since is None:
            return await self.append(
                there, subject, entry, content_type=kind, message_id=message_id
            )
        return await self.append_after(
            there, subject, since, entry, content_type=kind, message_id=message_id
        )

    def outgoing(
        self, subject: str, event: m.Message, content_type: str, expect: tuple[str, int]
    ) -> Outgoing:
        """Return an event that is to be stored under a condition, with an id of its own."""
        headers = self._headers(content_type, None)
        return Outgoing(subject, codec.encode(event, content_type), headers, expect)

    async def bury(self, there: Gallery, entry: str, seq: int) -> None:
        """Remove an entry that still is as one event has left it."""
        with self.taking() as (message_id, dead):
            with contextlib.suppress(Conflict):
                tombstone = m.GalleryEntry(id=entry, at=m.now())
                await self.append_entry(there, tombstone, message_id, since=seq)
            await self.settle(there, dead)

    def entry_subject(self, there: Gallery, entry: str) -> str:
        """Return the subject of an entry's events."""
        return GALLERY_ENTRY.subject(self._root, gallery=there.head.id, entry=addressed(entry))

    # --- Clearing ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def taking(self) -> Iterator[tuple[str, list[Dead]]]:
        """Give a message id for an event, and collect what that event takes away.

        To be left once that is being cleared: what fails or is cancelled before has it cleared all
        the same.
        """
        message_id = self._message_id()
        taken = self._taken[message_id] = []
        try:
            yield message_id, taken
        except BaseException:
            self._clearing.put(taken)
            raise
        finally:
            del self._taken[message_id]

    @contextlib.contextmanager
    def ending(self, ended: Ended) -> Iterator[None]:
        """Have a gallery that has ended cleared if what is done inside fails or is cancelled."""
        try:
            yield
        except BaseException:
            self._clearing.put([], ended=ended)
            raise

    async def clear(self, dead: Sequence[Dead], *, ended: Ended | None = None) -> Unerased | None:
        """Erase what was taken away, and its images; see `Clearing.clear`."""
        return await self._clearing.clear(dead, ended=ended)

    async def keeps_up(self) -> None:
        """Wait until erasing keeps up with replacing; see `Clearing.keeps_up`."""
        await self._clearing.keeps_up()

    async def settle(self, there: Gallery, dead: Sequence[Dead]) -> Unerased | None:
        """Clear what was taken away, and the rejections that are pointless without it.

        Returns:
            What of all that is not erased yet; None if all is.
        """
        pointless: list[list[Dead]] = []
        with contextlib.ExitStack() as takings:

            def taking() -> str:
                message_id, taken = takings.enter_context(self.taking())
                pointless.append(taken)
                return message_id

            await self.wait(await self.withdraw_orphans(there, taking))
        return await self.clear([*itertools.chain(*pointless), *dead])

    async def withdraw(self, there: Gallery, rejection: str, message_id: str | None = None) -> int:
        """Store that a rejection counts no more."""
        # Without the name: that of somebody who was removed does not come back with it.
        event = m.GalleryRejection(id=rejection, at=m.now(), subject="")
        subject = GALLERY_REJECTION.subject(self._root, gallery=there.head.id, rejection=rejection)
        return await self.append(there, subject, event, message_id=message_id)

    async def withdraw_orphans(
        self, there: Gallery, message_id: Callable[[], str] | None = None
    ) -> int:
        """Withdraw rejections whose face was removed or is that person's now, or whose person left.

        Does not wait until that is read: the reader itself calls this.

        Args:
            there: The gallery.
            message_id: Gives the message id of each event; any if None.

        Returns:
            The last revision; 0 if there was nothing to withdraw.
        """
        revision = 0
        for one in list(there.rejections.values()):
            if there.has_sense(one):
                continue
            try:
                revision = await self.withdraw(there, one.id, message_id and message_id())
            except BusError as error:
                log.warning("rejection.not_withdrawn", rejection=one.id, cause=error.message)
        return revision

    async def chores_done(self) -> None:
        """Wait until nothing is left to be cleared away, but not long."""
        await soon(self._clearing.done())

    def _message_id(self) -> str:
        return f"{self._mine}{next(self._numbers)}"

    def _headers(self, content_type: str, message_id: str | None) -> dict[str, str]:
        headers = {MESSAGE_ID: message_id or self._message_id()}
        return (
            headers if content_type == codec.JSON else headers | {codec.CONTENT_TYPE: content_type}
        )

    def _sort(self, dead: list[Dead]) -> None:
        """Keep what this process has to clear away: the other replicas' own is theirs."""
        if not self.caught_up.is_set():
            self._left += dead
            return
        self.projection.left_behind.clear()
        behind: list[Dead] = []
        for one in dead:
            if one.cause is not None and one.cause.startswith(self._mine):
                self._taken.get(one.cause, behind).append(one)
        if behind:
            self._clearing.put(behind)
            self._pointless.look(behind)

    async def _clear_away(self) -> None:
        """Clear what deletions that were cut short have left."""
        projection = self.projection
        ended = projection.left_behind & projection.heads.keys() - projection.unreadable.keys()
        # What was a gallery's that has ended since is found with all else of that.
        left = [
            one
            for one in self._left
            if one.gallery not in ended or one.seq > projection.heads[one.gallery]
        ]
        self._left = []
        if left:
            for gallery, removal in {(one.gallery, one.removal) for one in left}:
                there = projection.galleries.get(gallery)
                if there is not None and removal is not None:
                    await self._history.forget(gallery, there.moves.trail_of(removal))
            log.info("entries.left_behind", events=len(left))
            self._clearing.put(left)
        for gallery in sorted(ended):
            # Of one that is not there all is over that was read, also what somebody has stored
            # behind its end and could not take back.
            head = below = projection.heads[gallery]
            if gallery not in projection.galleries:
                below = projection.revision + 1
                await self._history.forget(gallery)
            log.info("dataset.left_behind", dataset=gallery)
            self._clearing.put([], ended=Ended(gallery, head, below))
        projection.left_behind.clear()
        # In this order: an image is dropped once this replica has read what the broker has.
        await self.chores_done()
        for there in list(projection.galleries.values()):
            await self.withdraw_orphans(there)

    async def _read_all(self) -> None:
        """Wait until what the broker has is read."""
        await self.wait(await self.newest())

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


def deleted(there: Gallery) -> NotFound:
    """Return what is said to whoever wanted to change a gallery that is gone."""
    return NotFound(f"the dataset {there.head.id!r} was deleted at this moment", field="dataset")

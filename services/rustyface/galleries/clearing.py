"""What events have taken away, cleared away: erased from the broker's files, with the images.

A face that nobody may see any more is not merely deleted. What the broker displaces or purges it
marks as gone and leaves in its files as it is; what it erases it writes over. So nothing of a
gallery is ever purged: what it has when it ends is looked for in the stream, and erased.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import structlog

from bus.errors import BusError, DeadlineExceeded, Unavailable
from bus.streams import Stream
from bus.subjects import GALLERY_ENTRY, GALLERY_REJECTION, gallery_events
from services.rustyface.galleries.projection import Dead, addressed, as_dead

# What has to be cleared goes on behind an answer that would have to wait longer.
PATIENT_S: Final = 5.0
# So many may wait, and so many more of which the broker refuses something.
CHORES_MAX: Final = 10_000
# An erasure is an fsync, 150 to 450 a second on one disk (deleting alone: 1,500). With more at
# once others' events would wait for longer.
ERASED_AT_ONCE: Final = 16
# So many, and the next chore has its turn.
ERASED_IN_TURN: Final = 500
# What a gallery has left is looked for in parts: it may be a million.
FOUND_AT_ONCE: Final = 5_000
# More than so many that nobody waits for, and whoever replaces many entries waits.
BEHIND_MAX: Final = 5_000
# Between tries while the broker is away.
PAUSE_S: Final = 0.5
PAUSE_MAX_S: Final = 60.0
# Between tries of what it refuses: a back-up ends, a stream that denies it has to be made anew.
REFUSED_PAUSE_MAX_S: Final = 3_600.0
NAMED_MAX: Final = 10

# Deletes an image, unless it is told that an entry names it after all.
DropImage = Callable[[str, Callable[[str], Awaitable[bool]]], Awaitable[None]]

log = structlog.get_logger("rustyface.galleries")


class Unerased(NamedTuple):
    """What is gone for every question, but not from the broker's files (yet).

    Attributes:
        left: How many faces and images, as far as is known.
        cause: Why the broker refuses some of them; None where all only takes a while.
    """

    left: int
    cause: str | None


class Ended(NamedTuple):
    """A gallery of which nothing counts any more below an event, but for its own last one.

    Attributes:
        gallery: Which.
        head: The sequence of its own last event, which stays.
        below: The sequence of the event.
    """

    gallery: str
    head: int
    below: int


@dataclass(eq=False)
class _Chore:
    """What has to be cleared away, and how far that has come.

    Attributes:
        images: Those that nothing else names.
        events: Most of them with a face.
        ended: What is looked for in the stream once those are done. Others may be about to erase
            some of it, and be killed before they do.
        looked: Up to which sequence it was.
        behind: Nobody waits for it.
        left: How many images and faces are not erased yet, as far as is known.
        refused: What the broker refuses.
        cause: Why.
        again: How much of it is tried again, because it was refused before.
        pause_s: After how long.
        done: Set once each was tried.
    """

    images: deque[str] = field(default_factory=deque)
    events: deque[Dead] = field(default_factory=deque)
    ended: Ended | None = None
    looked: int = 0
    behind: bool = False
    left: int = 0
    refused: list[str | Dead | Ended] = field(default_factory=list)
    cause: str | None = None
    again: int = 0
    pause_s: float = 0.0
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def is_over(self) -> bool:
        """Tell whether each part of it was tried."""
        return not (self.images or self.events or self.ended)

    def begin_again(self) -> None:
        """Have what was refused to be done once more."""
        refused, self.refused, self.cause, self.behind = self.refused, [], None, False
        self.again = len(refused)
        self.images.extend(one for one in refused if isinstance(one, str))
        self.events.extend(one for one in refused if isinstance(one, Dead))
        self.ended = next((one for one in refused if isinstance(one, Ended)), None)

    def faces_of(self, ended: Ended, after: int) -> int:
        """Count the faces of a gallery that are not erased yet, between two sequences."""
        there = (*self.events, *self.refused)
        return sum(
            isinstance(one, Dead)
            and one.face
            and one.gallery == ended.gallery
            and after < one.seq < ended.below
            for one in there
        )


class Clearing:
    """Chores, done one after the other.

    While the broker is away, all of them wait. What it refuses is put aside, told to the log and
    tried again, less and less often; the rest goes on. What is not done when the process ends is
    found by the next one that starts.

    Args:
        stream: Where the events are.
        root: The first token of their subjects.
        images: How many entries name an image.
        named: Tells whether one does, as of the broker's newest revision.
        drop_image: Deletes an image; None where none are kept.
    """

    def __init__(
        self,
        stream: Stream,
        root: str,
        images: Mapping[str, int],
        named: Callable[[str], Awaitable[bool]],
        drop_image: DropImage | None,
    ) -> None:
        self._stream = stream
        self._root = root
        self._images = images
        self._named = named
        self._drop_image = drop_image
        # Bounded where something is put in, so that the rest of a chore always finds its place.
        self._chores: asyncio.Queue[_Chore] = asyncio.Queue()
        # Those that are not over.
        self._open: set[_Chore] = set()
        # Those of which the broker refuses something, and when they have their turn again.
        self._stuck: dict[_Chore, asyncio.TimerHandle] = {}
        # Images that may be out of sight already: whether they are deleted has to be decided.
        self._begun: set[str] = set()
        # How many events nobody waits for.
        self._behind = 0
        self._keeps_up = asyncio.Event()
        self._keeps_up.set()

    async def run(self) -> None:
        """Do chores until cancelled."""
        pause_s = PAUSE_S
        try:
            while True:
                chore = await self._chores.get()
                try:
                    await self._carry_on(chore)
                except (Unavailable, DeadlineExceeded) as error:
                    log.warning("galleries.not_cleared", again_in_s=pause_s, cause=error.message)
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, PAUSE_MAX_S)
                else:
                    pause_s = PAUSE_S
                if chore.is_over():
                    self._end(chore)
                else:
                    self._chores.put_nowait(chore)
                self._chores.task_done()
        finally:
            for timer in self._stuck.values():
                timer.cancel()

    def put(self, dead: Sequence[Dead], *, ended: Ended | None = None) -> None:
        """Have something cleared behind the answer; see `clear`."""
        self._put(self._chore(dead, ended, behind=True))

    async def keeps_up(self) -> None:
        """Wait until not much is left of what nobody waits for.

        Entries can be replaced far faster than erased. What they have taken the place of would
        gather, in memory and in the broker's files. What the broker refuses is not waited for.
        """
        await self._keeps_up.wait()

    async def clear(self, dead: Sequence[Dead], *, ended: Ended | None = None) -> Unerased | None:
        """Erase what was taken away, and its images; wait for it, but not long.

        What is not erased by then is erased behind the answer, as soon as it can be.

        Args:
            dead: What an event has taken away.
            ended: A gallery that has ended: all else that the stream has of it is erased too.

        Returns:
            What is not erased yet; None if all is. Of what another replica is about to erase of a
            gallery that has ended, it is what was found so far.
        """
        chore = self._chore(dead, ended)
        self._put(chore)
        await soon(chore.done.wait())
        left = chore.left
        if chore.ended is not None:
            others = (self._open | self._stuck.keys()) - {chore}
            left += sum(one.faces_of(chore.ended, chore.looked) for one in others)
        unseen = any(isinstance(one, Ended) for one in chore.refused)
        return Unerased(left, chore.cause) if left or unseen else None

    async def done(self) -> None:
        """Wait until nothing is left to be cleared away but what the broker refuses."""
        await self._chores.join()

    def _chore(self, dead: Sequence[Dead], ended: Ended | None, *, behind: bool = False) -> _Chore:
        images = {one.image for one in dead if one.image} if self._drop_image else set()
        return _Chore(
            images=deque(images),
            events=deque(dead),
            ended=ended,
            behind=behind,
            left=len(images) + len(dead),
        )

    def _put(self, chore: _Chore) -> None:
        if self._chores.qsize() < CHORES_MAX:
            self._chores.put_nowait(chore)
            self._open.add(chore)
            if chore.behind:
                self._count(len(chore.events))
            return
        chore.cause = f"{CHORES_MAX:,} chores wait already; the next worker that starts does it"
        log.error("galleries.not_cleared", events=len(chore.events), cause=chore.cause)
        chore.done.set()

    async def _carry_on(self, chore: _Chore) -> None:
        """Do a part of a chore.

        Raises:
            Unavailable: The broker is away.
            DeadlineExceeded: This process has not read what the broker has.
        """
        # In this order: whoever finds an event that was left finds the image by it.
        await self._each(chore, chore.images, self._drop)
        if not chore.images:
            await self._each(chore, chore.events, self._erase)
        if not chore.images and not chore.events and chore.ended is not None:
            try:
                await self._look(chore, chore.ended)
            except (Unavailable, DeadlineExceeded):
                raise
            except BusError as error:
                chore.refused.append(chore.ended)
                chore.cause = chore.cause or error.message
                chore.ended = None

    async def _look(self, chore: _Chore, ended: Ended) -> None:
        """Find what the stream still has of a gallery that has ended; the next part of it."""
        # Of the own list; of what was found itself nothing is looked at again.
        known = {one.seq for one in chore.refused if isinstance(one, Dead)}
        found, looked = list[Dead](), chore.looked
        reading = self._stream.read(gallery_events(self._root, ended.gallery), after=chore.looked)
        async with contextlib.aclosing(reading) as events:  # type: ignore[type-var]
            async for stored in events:
                if stored.seq >= ended.below or len(found) == FOUND_AT_ONCE:
                    break
                looked = stored.seq
                if stored.seq != ended.head and stored.seq not in known:
                    found.append(as_dead(ended.gallery, stored))
        # Only now: what fails in between has found nothing.
        chore.looked = looked
        if not found:
            chore.ended = None
            return
        images = {one.image for one in found if one.image} if self._drop_image else set()
        chore.images.extend(images)
        chore.events.extend(found)
        chore.left += len(images) + sum(one.face for one in found)
        if chore.behind:
            self._count(len(found))

    async def _each(
        self, chore: _Chore, left: deque[Any], do: Callable[[Any], Awaitable[None]]
    ) -> None:
        """Do some of what is left of one kind."""
        turn, away = min(len(left), ERASED_IN_TURN), list[BusError]()

        async def work() -> None:
            nonlocal turn
            while turn and not away:
                turn -= 1
                one = left.popleft()
                try:
                    await do(one)
                except (Unavailable, DeadlineExceeded) as error:
                    left.append(one)
                    away.append(error)
                    return
                except BusError as error:
                    chore.refused.append(one)
                    chore.cause = chore.cause or error.message
                else:
                    chore.left -= isinstance(one, str) or one.face
                if chore.behind and isinstance(one, Dead):
                    self._count(-1)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(turn, ERASED_AT_ONCE)):
                tasks.create_task(work())
        if away:
            raise away[0]

    async def _drop(self, image: str) -> None:
        # Looked at just before: erasing takes a while, and an entry may bring it again.
        if self._drop_image is None or (image in self._images and image not in self._begun):
            return
        self._begun.add(image)
        await self._drop_image(image, self._named)
        self._begun.discard(image)

    async def _erase(self, one: Dead) -> None:
        if one.older is not None:
            subject = (
                GALLERY_REJECTION.subject(self._root, gallery=one.gallery, rejection=one.older)
                if one.entry is None
                else GALLERY_ENTRY.subject(
                    self._root, gallery=one.gallery, entry=addressed(one.older)
                )
            )
            while (first := await self._stream.at_or_after(1, subject)) and first.seq < one.seq:
                await self._stream.remove(first.seq, erase=True)
        await self._stream.remove(one.seq, erase=True)

    def _end(self, chore: _Chore) -> None:
        """Let go of a chore; if the broker refuses some of it, have that tried again."""
        chore.done.set()
        self._open.discard(chore)
        self._stuck.pop(chore, None)
        if chore.again > len(chore.refused):
            log.info("galleries.erased_late", parts=chore.again - len(chore.refused))
        if not chore.refused:
            return
        again = len(self._stuck) < CHORES_MAX
        if again:
            chore.pause_s = min(2 * chore.pause_s or PAUSE_S, REFUSED_PAUSE_MAX_S)
            loop = asyncio.get_running_loop()
            self._stuck[chore] = loop.call_later(chore.pause_s, self._try_again, chore)
        events = [one for one in chore.refused if isinstance(one, Dead)]
        images = [one for one in chore.refused if isinstance(one, str)]
        unseen = {one.gallery for one in chore.refused if isinstance(one, Ended)}
        log.error(
            "galleries.not_erased",
            faces=sum(one.face for one in events),
            images=len(images),
            others=sum(not one.face for one in events),
            datasets=sorted(unseen | {one.gallery for one in events})[:NAMED_MAX],
            revisions=sorted(one.seq for one in events)[:NAMED_MAX],
            digests=sorted(images)[:NAMED_MAX],
            # None: when the next worker starts.
            again_in_s=chore.pause_s if again else None,
            cause=chore.cause,
        )

    def _try_again(self, chore: _Chore) -> None:
        chore.begin_again()
        self._open.add(chore)
        self._chores.put_nowait(chore)

    def _count(self, more: int) -> None:
        self._behind += more
        if self._behind > BEHIND_MAX:
            self._keeps_up.clear()
        else:
            self._keeps_up.set()


async def soon(event: Awaitable[object]) -> None:
    """Wait for something, but not longer than an answer may wait."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(PATIENT_S):
            await event

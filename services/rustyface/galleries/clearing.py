"""What events have taken away, cleared away: erased from the broker's files, with the images.

A face that nobody may see any more is not merely deleted. What the broker displaces or purges it
marks as gone and leaves in its files as it is; what it erases it writes over.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import structlog

from bus.errors import BusError
from bus.streams import Stream
from bus.subjects import gallery_events
from services.rustyface.galleries.projection import Dead

# What has to be cleared goes on behind an answer that would have to wait longer.
PATIENT_S: Final = 5.0
CHORES_MAX: Final = 10_000
# An erasure is an fsync, 150 to 450 a second on one disk (deleting alone: 1,500). With more at
# once others' events would wait for longer.
ERASED_AT_ONCE: Final = 16
# So many, and the next chore has its turn.
ERASED_IN_TURN: Final = 500
# More than so many that nobody waits for, and whoever replaces many entries waits.
BEHIND_MAX: Final = 5_000
# Between tries.
PAUSE_S: Final = 0.5
PAUSE_MAX_S: Final = 60.0

ImagesGone = Callable[[set[str]], Awaitable[None]]

log = structlog.get_logger("rustyface.galleries")


@dataclass(frozen=True)
class _Chore:
    """What has to be cleared away.

    Attributes:
        dead: These events, and the images that nothing else names.
        below: Then all else that a gallery has below an event.
        behind: Nobody waits for it.
        done: Set at its end.
    """

    dead: Sequence[Dead]
    below: tuple[str, int] | None = None
    behind: bool = False
    done: asyncio.Event = field(default_factory=asyncio.Event)


class Clearing:
    """Chores, done one after the other; one that fails is tried again until it does not.

    Those that are waiting when the process ends are found by the next one that starts.

    Args:
        stream: Where the events are.
        root: The first token of their subjects.
        images: How many entries name an image.
        images_gone: Is called with the images that no entry names any more.
    """

    def __init__(
        self,
        stream: Stream,
        root: str,
        images: Mapping[str, int],
        images_gone: ImagesGone | None,
    ) -> None:
        self._stream = stream
        self._root = root
        self._images = images
        self._images_gone = images_gone
        # Bounded where something is put in, so that the rest of a chore always finds its place.
        self._chores: asyncio.Queue[_Chore] = asyncio.Queue()
        # How many events nobody waits for.
        self._behind = 0
        self._keeps_up = asyncio.Event()
        self._keeps_up.set()

    async def run(self) -> None:
        """Do chores until cancelled."""
        pause_s = PAUSE_S
        while True:
            chore = await self._chores.get()
            left: _Chore | None = chore
            try:
                left = await self._carried_on(chore)
            except BusError as error:
                log.warning("galleries.not_cleared", again_in_s=pause_s, cause=error.message)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, PAUSE_MAX_S)
            else:
                pause_s = PAUSE_S
            if left is not None:
                self._chores.put_nowait(left)
            self._chores.task_done()

    def put(self, dead: Sequence[Dead], *, below: tuple[str, int] | None = None) -> None:
        """Have something cleared behind the answer; see `clear`."""
        self._put(_Chore(dead, below, behind=True))

    async def keeps_up(self) -> None:
        """Wait until not much is left of what nobody waits for.

        Entries can be replaced far faster than erased. What they have taken the place of would
        gather, in memory and in the broker's files.
        """
        await self._keeps_up.wait()

    async def clear(self, dead: Sequence[Dead], *, below: tuple[str, int] | None = None) -> None:
        """Erase what was taken away, and its images; wait for it, but not long.

        What cannot be erased now is tried again until it can, behind the answer.

        Args:
            dead: What an event has taken away.
            below: A gallery of which nothing stays below an event: all else of it is deleted too.
        """
        chore = _Chore(dead, below)
        self._put(chore)
        await soon(chore.done.wait())

    async def done(self) -> None:
        """Wait until nothing is left to be cleared away."""
        await self._chores.join()

    def _put(self, chore: _Chore) -> None:
        if self._chores.qsize() < CHORES_MAX:
            self._chores.put_nowait(chore)
            if chore.behind:
                self._count(len(chore.dead))
            return
        log.warning("galleries.not_cleared", cause=f"{CHORES_MAX:,} chores wait already")
        chore.done.set()

    async def _carried_on(self, chore: _Chore) -> _Chore | None:
        """Do a part of a chore, and return what is left of it."""
        part, rest = chore.dead[:ERASED_IN_TURN], chore.dead[ERASED_IN_TURN:]
        if part:
            await self._erase(part)
        if chore.below is not None and not rest:
            gallery, seq = chore.below
            # Settings, names, imports: nothing with a face, so it need not be erased.
            await self._stream.purge(gallery_events(self._root, gallery), keep_from=seq)
        if chore.behind:
            self._count(-len(part))
        if rest:
            return replace(chore, dead=rest)
        chore.done.set()
        return None

    def _count(self, more: int) -> None:
        self._behind += more
        if self._behind > BEHIND_MAX:
            self._keeps_up.clear()
        else:
            self._keeps_up.set()

    async def _erase(self, dead: Sequence[Dead]) -> None:
        await self._drop_images(one.image for one in dead if one.image)
        left = iter(dead)

        async def remove() -> None:
            for one in left:
                await self._stream.remove(one.seq, erase=True)

        results = await asyncio.gather(
            *(remove() for _ in range(min(ERASED_AT_ONCE, len(dead)))), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _drop_images(self, images: Iterable[str]) -> None:
        if self._images_gone is None:
            return
        for image in set(images):
            # Looked at just before each: erasing takes a while, and an entry may bring it again.
            if image in self._images:
                continue
            try:
                await self._images_gone({image})
            except BusError as error:
                log.warning("image.not_deleted", image=image, cause=error.message)


async def soon(event: Awaitable[object]) -> None:
    """Wait for something, but not longer than an answer may wait."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(PATIENT_S):
            await event

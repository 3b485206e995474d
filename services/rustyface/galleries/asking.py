"""One question to elsewhere, asked once for all who wait for its answer together."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import Context
from typing import Final, Generic, TypeVar

from bus.errors import Unavailable

T = TypeVar("T")


# One alone would make all who ask wait for each other in step.
AT_ONCE: Final = 4


class Asking(Generic[T]):
    """Asks one question, and gives each answer to everybody who waited when it was asked.

    Whoever comes later waits for another one: an answer is never older than the call that gets it.
    A few may be under way; beyond these, all who come share the next one.

    Args:
        ask: Asks it once.

    Attributes:
        asked: How often that was.
    """

    def __init__(self, ask: Callable[[], Awaitable[T]]) -> None:
        self.asked = 0
        self._ask = ask
        self._under_way: set[asyncio.Task[T]] = set()
        self._next: asyncio.Task[T] | None = None
        self._closed = False

    async def answer(self) -> T:
        """Return the answer to a question that was not asked before this call.

        Raises whatever asking raises.

        Raises:
            Unavailable: No more is asked.
        """
        if self._closed:
            raise _closed()
        if self._next is None:
            # Without what belongs to the caller, a trace or a deadline: others wait for it, too.
            self._next = asyncio.create_task(self._asked_in_turn(), context=Context())
            self._next.add_done_callback(_look_at)
        task = self._next
        try:
            # Whoever asked first may be cancelled, but not the others with it.
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            me = asyncio.current_task()
            if task.cancelled() and not (me and me.cancelling()):
                raise _closed() from None
            raise

    async def close(self) -> None:
        """Ask no more; whoever waits is told so."""
        self._closed = True
        for task in (self._next, *self._under_way):
            if task is not None:
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task

    async def _asked_in_turn(self) -> T:
        if len(self._under_way) >= AT_ONCE:
            await asyncio.wait(self._under_way, return_when=asyncio.FIRST_COMPLETED)
        task = self._next
        if task is not None:
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)
        self._next = None
        self.asked += 1
        return await self._ask()


def _closed() -> Unavailable:
    return Unavailable("this worker ends, and asks no more", retry_after_s=1)


def _look_at(task: asyncio.Task[T]) -> None:
    """Look at an error that nobody waits for any more, so that it is not reported as lost."""
    if not task.cancelled():
        task.exception()

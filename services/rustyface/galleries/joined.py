"""Searches that wait together, joined into one pass over the rows, off the event loop."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any, Final

from services.rustyface.galleries.search import Matrix, Result, Search, Snapshot

AT_ONCE_MAX: Final = 32

# What waits: searches join, anything else stands alone.
_Work = Search | Callable[[Snapshot], Any]


class Joined:
    """Reads one matrix, one pass at a time, in a thread.

    A pass over a million rows takes as long for one search as the memory needs to give them; for
    32 it takes six times as long. So nothing waits in order to be joined: what comes while a pass
    runs goes together into the next one. Who waits is bounded by the requests in flight.

    Callbacks instead of a task: whoever asked first may be cancelled, and the others' pass with
    it.

    Args:
        matrix: Whose rows.
        threads: Where they are read. numpy lets go of the GIL meanwhile.
    """

    def __init__(self, matrix: Matrix, threads: Executor) -> None:
        self.passes = 0
        self._matrix = matrix
        self._threads = threads
        self._waiting: list[tuple[_Work, asyncio.Future[Any]]] = []
        self._running = False

    async def search(self, search: Search) -> Result:
        """Answer a search from rows that are no older than this call."""
        found: Result = await self._answered(search)
        return found

    async def read(self, work: Callable[[Snapshot], Any]) -> Any:
        """Return what `work` makes of the rows; it is called in the thread."""
        return await self._answered(work)

    async def _answered(self, work: _Work) -> Any:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((work, answer))
        if not self._running:
            self._begin()
        return await answer

    def _begin(self) -> None:
        # Those who have gone away meanwhile are not worked for.
        waiting = [one for one in self._waiting if not one[1].done()]
        joined = 1
        while (
            joined < min(len(waiting), AT_ONCE_MAX)
            and isinstance(waiting[0][0], Search)
            and isinstance(waiting[joined][0], Search)
        ):
            joined += 1
        now, self._waiting = waiting[:joined], waiting[joined:]
        if not now:
            return
        self._running = True
        self.passes += 1
        snapshot = self._matrix.snapshot()
        works = [work for work, _ in now]
        done = asyncio.get_running_loop().run_in_executor(self._threads, _pass, snapshot, works)
        answers = [answer for _, answer in now]
        done.add_done_callback(lambda made: self._end(answers, made))

    def _end(self, answers: list[asyncio.Future[Any]], made: asyncio.Future[list[Any]]) -> None:
        self._running = False
        self._matrix.release()
        error = asyncio.CancelledError() if made.cancelled() else made.exception()
        for i, answer in enumerate(answers):
            if answer.done():
                continue
            if isinstance(error, asyncio.CancelledError):
                answer.cancel()
            elif error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(made.result()[i])
        self._begin()


def _pass(snapshot: Snapshot, works: Sequence[_Work]) -> list[Any]:
    if callable(works[0]):
        return [works[0](snapshot)]
    return list(snapshot.find([work for work in works if isinstance(work, Search)]))

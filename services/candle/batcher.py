"""Requests that wait together run together.

No timer: the first request runs at once, and while it runs the next ones gather. So a lone request
never waits, and a busy model gets the largest batches that the load makes.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from bus.errors import Overloaded

Array = npt.NDArray[Any]
Outputs = Mapping[str, Array]
Forward = Callable[[Array], Outputs]

MAX_ROWS: Final = 256
MAX_WAITING: Final = 4_096


@dataclass(frozen=True)
class Waiting:
    """Rows that wait, and who waits for theirs."""

    rows: Array
    done: asyncio.Future[Outputs]


def next_batch(lengths: Sequence[int], max_rows: int) -> int:
    """Return how many of the waiting requests, first come first, run together.

    As many as fit into `max_rows`; the first one always, even if it alone is larger.
    """
    taken, rows = 1, lengths[0]
    while taken < len(lengths) and rows + lengths[taken] <= max_rows:
        rows += lengths[taken]
        taken += 1
    return taken


class Batcher:
    """Gathers rows for one model and hands each asker its own outputs.

    Args:
        forward: Runs rows of shape ``[n, ...]`` and returns outputs by name, each ``[n, ...]``.
            Blocks; is called in a thread.
        max_rows: Rows in one batch. A request with more runs alone.
        max_waiting: Rows that may wait; more are refused.
    """

    def __init__(
        self, forward: Forward, *, max_rows: int = MAX_ROWS, max_waiting: int = MAX_WAITING
    ) -> None:
        self._forward = forward
        self._max_rows = max_rows
        self._max_waiting = max_waiting
        self._waiting: deque[Waiting] = deque()
        self._rows_waiting = 0
        self._came = asyncio.Event()

    async def submit(self, rows: Array) -> Outputs:
        """Return the outputs for `rows`, in their order.

        Raises:
            Overloaded: Too many rows wait already.
            BusError: What `forward` raised for these rows.
        """
        if self._rows_waiting and self._rows_waiting + len(rows) > self._max_waiting:
            raise Overloaded(
                f"{self._rows_waiting} rows wait for this model; max_waiting allows "
                f"{self._max_waiting}",
                retry_after_s=1,
            )
        asked = Waiting(rows, asyncio.get_running_loop().create_future())
        self._waiting.append(asked)
        self._rows_waiting += len(rows)
        self._came.set()
        return await asked.done

    async def run(self) -> None:
        """Work until cancelled; who still waits then is refused."""
        try:
            while True:
                await self._came.wait()
                self._came.clear()
                while batch := self._take():
                    await self._work(batch)
        finally:
            for asked in self._waiting:
                asked.done.cancel()

    def _take(self) -> list[Waiting]:
        """Return the next batch; whoever went away meanwhile is passed over."""
        present = [asked for asked in self._waiting if not asked.done.done()]
        count = next_batch([len(w.rows) for w in present], self._max_rows) if present else 0
        self._waiting = deque(present[count:])
        self._rows_waiting = sum(len(asked.rows) for asked in self._waiting)
        return present[:count]

    async def _work(self, batch: list[Waiting]) -> None:
        try:
            rows = batch[0].rows if len(batch) == 1 else np.concatenate([w.rows for w in batch])
            outputs = await asyncio.to_thread(self._forward, rows)
        except Exception as error:  # noqa: BLE001 - it belongs to whoever asked
            await self._fail(batch, error)
        else:
            start = 0
            for asked in batch:
                end = start + len(asked.rows)
                if not asked.done.done():
                    asked.done.set_result({k: v[start:end] for k, v in outputs.items()})
                start = end

    async def _fail(self, batch: list[Waiting], error: Exception) -> None:
        """Hand the error to a lone asker; of several, let each run alone and have its own."""
        if len(batch) == 1:
            if not batch[0].done.done():
                batch[0].done.set_exception(error)
            return
        for asked in batch:
            await self._work([asked])

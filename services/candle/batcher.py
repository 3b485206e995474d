"""Requests that wait together run together.

No timer: the first request runs at once, and while it runs the next ones gather. So a lone request
never waits, and a busy model gets the largest batches that the load makes.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from bus.errors import Overloaded, Unavailable

Array = npt.NDArray[Any]
Outputs = Mapping[str, Array]
Forward = Callable[[Array], Outputs]

MAX_ROWS: Final = 256
MAX_WAITING: Final = 4_096


@dataclass(frozen=True, eq=False)
class Waiting:
    """Rows that wait, and who waits for theirs."""

    rows: Array
    done: asyncio.Future[Outputs]

    @property
    def kind(self) -> Hashable:
        """What rows must have in common to stand in one array without being converted."""
        return self.rows.dtype, self.rows.shape[1:]


def next_batch(waiting: Iterable[tuple[int, Hashable]], max_rows: int) -> int:
    """Return how many of the waiting requests, first come first, run together.

    As many as follow each other with the kind of the first one and fit into `max_rows`; the first
    one always, even if it alone is larger. Nobody overtakes, so nobody starves.

    Args:
        waiting: The number of rows and the kind of each request.
        max_rows: Rows in one batch.
    """
    taken, total, first = 0, 0, None
    for rows, kind in waiting:
        if taken and (kind != first or total + rows > max_rows):
            break
        taken, total, first = taken + 1, total + rows, kind
    return taken


def apart(outputs: Outputs, lengths: Sequence[int]) -> list[Outputs] | None:
    """Return each request's own rows, or None if an output has not one row for each row asked."""
    if any(v.ndim == 0 or len(v) != sum(lengths) for v in outputs.values()):
        return None
    ends = np.cumsum(lengths)
    return [
        {name: v[end - length : end] for name, v in outputs.items()}
        for length, end in zip(lengths, ends, strict=True)
    ]


class Batcher:
    """Gathers rows for one model and hands each asker its own outputs.

    A model that turns out to give other than one row for each row is run for one request at a
    time from then on, and its outputs are handed over whole.

    Args:
        forward: Runs rows of shape ``[n, ...]`` and returns outputs by name, each ``[n, ...]``.
            Blocks; is called in a thread, never twice at once.
        max_rows: Rows in one batch. A request with more runs alone, undivided.
        max_waiting: Rows that may wait; more are refused. A single request with more is taken
            when nothing else waits.
        name: What the model is called in the error of a full queue.

    Attributes:
        batches: How many runs there were.
        rows: How many rows ran in them.
    """

    def __init__(
        self,
        forward: Forward,
        *,
        max_rows: int = MAX_ROWS,
        max_waiting: int = MAX_WAITING,
        name: str = "this model",
    ) -> None:
        self._forward = forward
        self._max_rows = max_rows
        self._max_waiting = max_waiting
        self._name = name
        self._one_by_one = False
        # Ordered, and a caller that goes away leaves at once whatever its place.
        self._waiting: OrderedDict[Waiting, None] = OrderedDict()
        self._rows_waiting = 0
        self._running: list[Waiting] = []
        self._came = asyncio.Event()
        self._ended = False
        self.batches = 0
        self.rows = 0

    @property
    def rows_waiting(self) -> int:
        """Rows that wait for a run."""
        return self._rows_waiting

    def limit(self, *, max_rows: int, max_waiting: int) -> None:
        """Go on with other limits, from the next batch on."""
        self._max_rows, self._max_waiting = max_rows, max_waiting

    async def submit(self, rows: Array) -> Outputs:
        """Return the outputs for `rows`, in their order.

        Raises:
            Overloaded: Too many rows wait already.
            Unavailable: `run` has ended, or ends before these rows were through.
            BusError: What `forward` raised for these rows.
        """
        if self._ended:
            raise self._gone()
        if self._rows_waiting and self._rows_waiting + len(rows) > self._max_waiting:
            raise Overloaded(
                f"the queue of {self._name} is full: {self._rows_waiting} rows wait and "
                f"{len(rows)} came; max_waiting_rows allows {self._max_waiting}",
                retry_after_s=1,
            )
        asked = Waiting(rows, asyncio.get_running_loop().create_future())
        self._waiting[asked] = None
        self._rows_waiting += len(rows)
        self._came.set()
        try:
            return await asked.done
        finally:
            # Still in the queue: the caller was cancelled. Its rows make room at once.
            if asked in self._waiting:
                del self._waiting[asked]
                self._rows_waiting -= len(rows)

    async def run(self) -> None:
        """Work until cancelled; whoever still waits then is told so."""
        try:
            while True:
                await self._came.wait()
                self._came.clear()
                while self._waiting:
                    self._running = self._take()
                    await self._work(self._running)
                    self._running = []
        finally:
            self._ended = True
            for asked in (*self._running, *self._waiting):
                if not asked.done.done():
                    asked.done.set_exception(self._gone())

    def _take(self) -> list[Waiting]:
        max_rows = 1 if self._one_by_one else self._max_rows
        count = next_batch(((len(w.rows), w.kind) for w in self._waiting), max_rows)
        batch = [self._waiting.popitem(last=False)[0] for _ in range(count)]
        rows = sum(len(asked.rows) for asked in batch)
        self._rows_waiting -= rows
        self.batches += 1
        self.rows += rows
        return batch

    async def _work(self, batch: list[Waiting]) -> None:
        """Run a batch, and give each asker their rows or their error."""
        if len(batch) == 1:
            await self._work_alone(batch[0])
            return
        try:
            rows = np.concatenate([asked.rows for asked in batch])
            outputs = await asyncio.to_thread(self._forward, rows)
            shares = apart(outputs, [len(asked.rows) for asked in batch])
        except Exception:  # noqa: BLE001 - whoever caused it gets it when run alone
            shares = None
        else:
            if shares is None:
                self._one_by_one = True
        if shares is None:
            for asked in batch:
                await self._work_alone(asked)
            return
        for asked, share in zip(batch, shares, strict=True):
            if not asked.done.done():
                asked.done.set_result(share)

    async def _work_alone(self, asked: Waiting) -> None:
        if asked.done.done():
            return
        try:
            outputs = await asyncio.to_thread(self._forward, asked.rows)
        except Exception as error:  # noqa: BLE001 - it belongs to whoever asked
            if not asked.done.done():
                asked.done.set_exception(error)
        else:
            if not asked.done.done():
                asked.done.set_result(outputs)

    def _gone(self) -> Unavailable:
        return Unavailable(f"{self._name} is being stopped here; try again", retry_after_s=1)

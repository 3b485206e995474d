"""Requests that wait together run together.

The first request runs at once, and while it runs the next ones gather: a lone request never waits,
and a busy model gets the largest batches that the load makes. `Limits.max_delay_s` lets a batch
that is not full wait for more, for models that gain more by it than their callers lose.

Everything happens in callbacks of the event loop but the run itself; that, too, where earlier runs
were over sooner than a thread is reached (`services.candle.serving.pace`). Who asks is called when
it is over. There is one timer for all requests; no task and no future, so that a small model is
not dearer to reach than to run.
"""

import asyncio
import heapq
import itertools
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Final, NamedTuple

import structlog

from bus.errors import (
    BusError,
    DeadlineExceeded,
    Internal,
    Overloaded,
    Unavailable,
)
from services.candle.runtimes.base import Tensors
from services.candle.serving.joining import (
    Limits,
    Outcome,
    Run,
    count_rows,
    kind_of,
    next_batch,
    outcome_of,
)
from services.candle.serving.pace import Pace
from services.candle.serving.statistics import Statistics

# How long the end of `Batcher.run` waits for a run that goes on in its thread.
STOP_S: Final = 3.0
# What a refused caller is told at most.
MAX_RETRY_S: Final = 60
# Weight of the last run in the measured time of a row.
LAST_RUN: Final = 0.2
# A run that fails may be over long before one that does not would be, so it tells nothing of how
# quick a model is, unless it held everybody up for so long itself.
FAILED_SLOW_NS: Final = 5_000_000

log = structlog.get_logger("candle.batcher")


class Ran(NamedTuple):
    """A request's part of a run.

    Attributes:
        outputs: By name: the request's own rows, as views into what the run gave.
        queue_ns: How long it waited for the run.
        compute_ns: How long the model ran.
        batch_rows: How many rows it ran with, its own included.
    """

    outputs: Tensors
    queue_ns: int
    compute_ns: int
    batch_rows: int


# Called once with what became of a request; must not raise. Returns why the outputs could not be
# handed over, where that is so: the request is counted as failed then.
Done = Callable[[Ran | BusError], BusError | None]


@dataclass(slots=True, eq=False)
class Asked:
    """A request on its way: what it brought, of how many elements, and who waits for it."""

    tensors: Tensors
    rows: int
    elements: int
    kind: Hashable
    done: Done
    came_ns: int
    deadline_ns: int | None
    over: bool = False


@dataclass(slots=True, eq=False)
class _Batch:
    """Requests that run together."""

    asked: list[Asked]
    rows: int
    elements: int


class Batcher:
    """Gathers requests for one model and hands each asker its own outputs.

    A model that turns out to give other than one row for each row is run for one request at a
    time from then on, and its outputs are handed over whole. A joined run that fails is repeated
    for one request at a time, so that whoever caused it is the only one who hears of it; these
    stand first in the queue, even if it is over its limit by them.

    Args:
        run: Runs the model on one array for each input. Blocks; is called in a thread, at most
            `limits.instances` times at once.
        joins: Whether requests can be joined along axis 0. If not, each runs alone, whole, and
            counts as one row whatever its shapes; so does one without rows.
        limits: How many, how long.
        name: What the model is called in errors, such as `model 'iris'`.
        statistics: Where the requests are counted.
        threads: Where `run` is called; needs a thread for each of `limits.instances`.
        pace: Tells which runs are so quick that they are made on the event loop; none if it is
            not given.
    """

    def __init__(
        self,
        run: Run,
        *,
        joins: bool,
        limits: Limits,
        name: str,
        statistics: Statistics,
        threads: Executor,
        pace: Pace | None = None,
    ) -> None:
        self._run = run
        self._joins = joins
        self._limits = limits
        self._name = name
        self._statistics = statistics
        self._threads = threads
        self._pace = pace or Pace(quick_ns=0)
        # Ordered, and a caller that goes away leaves at once whatever its place.
        self._waiting: OrderedDict[Asked, None] = OrderedDict()
        self._rows_waiting = 0
        self._running: set[_Batch] = set()
        # Who has left the queue may still stand here; see `_remember`.
        self._deadlines: list[tuple[int, int, Asked]] = []
        self._ties = itertools.count()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ns = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._looking = False
        self._ended = False
        self._idle = asyncio.Event()
        self._row_ns = 0.0

    @property
    def rows_waiting(self) -> int:
        """Rows that wait for a run."""
        return self._rows_waiting

    def limit(self, limits: Limits) -> None:
        """Go on with other limits, from the next batch on; who waits already stays."""
        self._limits = limits
        self._look_soon()

    async def submit(
        self,
        tensors: Tensors,
        deadline: float | None = None,
        check: Callable[[Tensors], None] | None = None,
    ) -> Ran:
        """Return the model's outputs for these inputs, rows in their order.

        Cancelled while it waits, the request leaves the queue at once and is not run.

        Args:
            tensors: One array for each input.
            deadline: The moment of `time.monotonic()` after which no run begins for it.
            check: Raises a BusError for outputs that are of no use; the request fails with it.

        Raises:
            InvalidRequest: The inputs have no common number of rows.
            Overloaded: Too many rows wait already.
            DeadlineExceeded: The deadline passed before a run began.
            Unavailable: `run` has ended, or ended while this request waited.
            Internal: The model failed in an unexpected way; the log has the cause.
            BusError: What the model raised for these inputs.
        """
        ran: asyncio.Future[Ran] = asyncio.get_running_loop().create_future()
        asked = self.put(tensors, deadline, _settling(ran, check))
        try:
            return await ran
        except asyncio.CancelledError:
            self.drop(asked)
            raise

    def put(self, tensors: Tensors, deadline: float | None, done: Done) -> Asked:
        """Do what `submit` does without waiting, and have `done` called with the outcome.

        That is never before this returns. Who waits no longer calls `drop`.

        Raises:
            BusError: The request is not taken; `done` is not called then.
        """
        came_ns = time.monotonic_ns()
        deadline_ns = None if deadline is None else int(deadline * 1e9)
        try:
            rows, kind = self._admit(tensors, came_ns, deadline_ns)
        except BusError as error:
            self._statistics.failed(error.code)
            raise
        elements = sum(array.size for array in tensors.values())
        asked = Asked(tensors, rows, elements, kind, done, came_ns, deadline_ns)
        self._waiting[asked] = None
        self._rows_waiting += rows
        if deadline_ns is not None:
            self._remember(deadline_ns, asked)
            self._look_soon()
        elif len(self._running) < self._limits.instances:
            self._look_soon()
        return asked

    def drop(self, asked: Asked) -> None:
        """Let nobody wait for a request; still in the queue, it makes room at once."""
        if asked in self._waiting:
            self._leave(asked)
        if not asked.over:
            asked.over = True
            self._statistics.failed("cancelled", time.monotonic_ns() - asked.came_ns)

    async def run(self) -> None:
        """Work until cancelled.

        Then whoever waits is told so at once, and what runs is waited for, for `STOP_S` at most:
        its askers still get their outputs, and no thread uses a model that is being freed.
        """
        self._loop = asyncio.get_running_loop()
        self._look_soon()
        try:
            await asyncio.Event().wait()
        finally:
            self._ended = True
            if self._timer:
                self._timer.cancel()
            for asked in [*self._waiting]:
                self._leave(asked)
                self._refuse(asked, self._gone())
            if self._running:
                try:
                    async with asyncio.timeout(STOP_S):
                        await self._idle.wait()
                except TimeoutError:
                    log.warning("model.still-running", model=self._name, waited_s=STOP_S)
                finally:
                    for batch in self._running:
                        for asked in batch.asked:
                            self._refuse(asked, self._gone())

    def _admit(
        self, tensors: Tensors, came_ns: int, deadline_ns: int | None
    ) -> tuple[int, Hashable]:
        """Return how many rows a request has, and what it can be joined with, or say why not."""
        if self._ended:
            raise self._gone()
        rows, kind = (count_rows(tensors), kind_of(tensors)) if self._joins else (1, None)
        if not rows:
            # What a model makes of nothing is asked of it alone; in the queue it counts as one.
            rows, kind = 1, None
        if deadline_ns is not None and deadline_ns <= came_ns:
            raise self._late(0)
        if self._waiting and self._rows_waiting + rows > self._limits.max_waiting_rows:
            raise Overloaded(
                f"the queue of {self._name} is full: {self._rows_waiting} rows wait and "
                f"{rows} came; max_waiting_rows allows {self._limits.max_waiting_rows}",
                retry_after_s=self._retry_s(),
            )
        return rows, kind

    def _look_soon(self) -> None:
        """See to the queue once all that came in this turn of the event loop stand in it."""
        if self._loop and not self._looking:
            self._looking = True
            self._loop.call_soon(self._look)

    def _look(self) -> None:
        """Take out who is late, start what can run, and set the timer for what comes next."""
        self._looking = False
        if self._ended:
            return
        now_ns = time.monotonic_ns()
        first_ns = self._refuse_late(now_ns)
        held_ns = self._start(now_ns, first_ns)
        if not self._waiting:
            self._deadlines.clear()
            return
        due = [ns for ns in (first_ns, held_ns) if ns is not None]
        # One that rings too early is left alone: it costs a look, setting it anew costs more.
        if due and (self._timer is None or min(due) < self._timer_ns):
            if self._timer:
                self._timer.cancel()
            self._timer_ns = min(due)
            # The clock of an event loop counts milliseconds: rung too early, it must not ring
            # over and over until the moment has come.
            delay_s = max((self._timer_ns - now_ns) / 1e9, 0.001)
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._ring)

    def _ring(self) -> None:
        self._timer = None
        self._look()

    def _refuse_late(self, now_ns: int) -> int | None:
        """Tell those whose deadline has passed, and return the next deadline."""
        deadlines = self._deadlines
        while deadlines:
            deadline_ns, _, asked = deadlines[0]
            if asked in self._waiting:
                if deadline_ns > now_ns:
                    return deadline_ns
                self._leave(asked)
                self._refuse(asked, self._late(now_ns - asked.came_ns))
            heapq.heappop(deadlines)
        return None

    def _start(self, now_ns: int, first_ns: int | None) -> int | None:
        """Hand to threads what can run, and return until when the rest is held back for more."""
        limits = self._limits
        while self._waiting and len(self._running) < limits.instances:
            requests, rows, full = next_batch(
                ((asked.rows, asked.kind) for asked in self._waiting), limits.max_rows
            )
            if not full and limits.max_delay_s > 0:
                until_ns = next(iter(self._waiting)).came_ns + int(limits.max_delay_s * 1e9)
                # Whose time ends before that is not held back to be refused.
                if now_ns < until_ns and (first_ns is None or until_ns < first_ns):
                    return until_ns
            asked = [self._waiting.popitem(last=False)[0] for _ in range(requests)]
            batch = _Batch(asked, rows, sum(one.elements for one in asked))
            self._rows_waiting -= rows
            if self._pace.quick(batch.elements):
                self._conclude(batch, outcome_of(self._run, batch.asked))
                if self._waiting:
                    # One after the other, so that whoever else is due has a turn between.
                    self._look_soon()
                return None
            self._running.add(batch)
            # Not `loop.run_in_executor`: a future on each side and the copying between them cost
            # as much as the rest of the hop (measured: 33 to 43 us for it, 26 us so).
            try:
                self._threads.submit(self._work, batch)
            except RuntimeError:
                # The threads are shut down already: the worker ends.
                self._running.discard(batch)
                for one in asked:
                    self._refuse(one, self._gone())
        return None

    def _work(self, batch: _Batch) -> None:
        """Run a batch; called in a thread."""
        outcome = outcome_of(self._run, batch.asked)
        assert self._loop is not None  # noqa: S101 - nothing starts before `run`
        self._loop.call_soon_threadsafe(self._finish, batch, outcome)

    def _finish(self, batch: _Batch, outcome: Outcome) -> None:
        """Take a batch back from its thread, and go on with what waits."""
        self._running.discard(batch)
        self._conclude(batch, outcome)
        if not self._ended:
            self._look()
        elif not self._running:
            self._idle.set()

    def _conclude(self, batch: _Batch, outcome: Outcome) -> None:
        """Give each asker of a batch their rows or their error."""
        took_ns = outcome.ended_ns - outcome.began_ns
        if outcome.shares is not None or took_ns > FAILED_SLOW_NS:
            self._pace.ran(batch.elements, outcome.computed_ns, took_ns)
        row_ns = took_ns / batch.rows
        self._row_ns += LAST_RUN * (row_ns - self._row_ns) if self._row_ns else row_ns
        if outcome.shares is not None:
            self._deliver(batch, outcome, outcome.shares)
        elif len(batch.asked) > 1:
            if outcome.error is None:
                log.info("model.not-joined", model=self._name, cause="rows are not kept")
                self._join_no_more()
            self._repeat(batch)
        else:
            assert outcome.error is not None  # noqa: S101 - alone, whatever came is a share
            self._refuse(batch.asked[0], self._as_error(outcome.error))

    def _deliver(self, batch: _Batch, outcome: Outcome, shares: list[Tensors]) -> None:
        compute_ns = outcome.ran_ns - outcome.joined_ns
        queue_ns = requests = 0
        for asked, share in zip(batch.asked, shares, strict=True):
            if not asked.over:
                waited_ns = outcome.began_ns - asked.came_ns
                asked.over = True
                failed = asked.done(Ran(share, waited_ns, compute_ns, batch.rows))
                if failed is None:
                    queue_ns += waited_ns
                    requests += 1
                else:
                    self._statistics.failed(failed.code, outcome.ended_ns - asked.came_ns)
        self._statistics.ran(
            requests=requests,
            rows=batch.rows,
            queue_ns=queue_ns,
            input_ns=outcome.joined_ns - outcome.began_ns,
            infer_ns=compute_ns,
            output_ns=outcome.ended_ns - outcome.ran_ns,
        )

    def _repeat(self, batch: _Batch) -> None:
        """Put the requests of a failed batch back to the head of the queue, each to run alone."""
        for asked in reversed(batch.asked):
            if asked.over:
                continue
            if self._ended:
                self._refuse(asked, self._gone())
                continue
            asked.kind = None
            self._waiting[asked] = None
            self._waiting.move_to_end(asked, last=False)
            self._rows_waiting += asked.rows
            if asked.deadline_ns is not None:
                self._remember(asked.deadline_ns, asked)

    def _join_no_more(self) -> None:
        self._joins = False
        for asked in self._waiting:
            asked.kind = None

    def _remember(self, deadline_ns: int, asked: Asked) -> None:
        """Note a deadline; those of requests that left are forgotten when they are most."""
        if len(self._deadlines) > 2 * len(self._waiting) + 16:
            self._deadlines = [one for one in self._deadlines if one[2] in self._waiting]
            heapq.heapify(self._deadlines)
        heapq.heappush(self._deadlines, (deadline_ns, next(self._ties), asked))

    def _leave(self, asked: Asked) -> None:
        del self._waiting[asked]
        self._rows_waiting -= asked.rows

    def _refuse(self, asked: Asked, error: BusError) -> None:
        if not asked.over:
            asked.over = True
            self._statistics.failed(error.code, time.monotonic_ns() - asked.came_ns)
            asked.done(error)

    def _as_error(self, error: BaseException) -> BusError:
        if isinstance(error, BusError):
            return error
        log.error("model.run-failed", model=self._name, exc_info=error)
        return Internal(f"{self._name} failed in a way that nobody expected; the log has the cause")

    def _late(self, waited_ns: int) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"the caller's time was up after {waited_ns / 1e9:.3g} s in the queue of "
            f"{self._name}, before a run began"
        )

    def _retry_s(self) -> float:
        """Return when what waits now will have run, in whole seconds."""
        left_s = self._rows_waiting * self._row_ns / 1e9 / self._limits.instances
        return min(max(math.ceil(left_s), 1), MAX_RETRY_S)

    def _gone(self) -> Unavailable:
        return Unavailable(f"{self._name} is being stopped here; try again", retry_after_s=1)


def _settling(ran: asyncio.Future[Ran], check: Callable[[Tensors], None] | None) -> Done:
    """Return what gives a future the outcome."""

    def done(outcome: Ran | BusError) -> BusError | None:
        failed: BusError | None = None
        if check and isinstance(outcome, Ran):
            try:
                check(outcome.outputs)
            except BusError as error:
                outcome = failed = error
        if not ran.done():
            if isinstance(outcome, BusError):
                ran.set_exception(outcome)
            else:
                ran.set_result(outcome)
        return failed

    return done

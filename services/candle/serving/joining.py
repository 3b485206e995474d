"""Which requests run together, how their rows are put together and taken apart, and the run."""

import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from bus.errors import InvalidRequest
from services.candle.runtimes.base import Tensors

Run = Callable[[Tensors], Tensors]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How a model's requests are put together.

    Attributes:
        max_rows: Rows in one run. A request with more runs alone, undivided.
        max_waiting_rows: Rows that may wait; more are refused. A single request with more is
            taken when nothing else waits.
        max_delay_s: How long a batch that is not full waits for more, from the moment when its
            oldest request came.
        instances: Runs that may go on at the same time.
    """

    max_rows: int = 256
    max_waiting_rows: int = 4_096
    max_delay_s: float = 0.0
    instances: int = 1

    def __post_init__(self) -> None:
        if min(self.max_rows, self.max_waiting_rows, self.instances) < 1 or self.max_delay_s < 0:
            raise ValueError(
                f"{self}: rows and instances must be at least 1, the delay must not be negative"
            )


def count_rows(tensors: Tensors) -> int:
    """Return how many rows a request has: the length of axis 0 of all its inputs.

    Raises:
        InvalidRequest: There is no input, an input is a scalar, or the lengths differ.
    """
    rows: int | None = None
    for name, array in tensors.items():
        shape = array.shape
        if not shape:
            raise InvalidRequest(
                f"input {name!r} is a scalar; axis 0 of every input is its rows", field=name
            )
        if rows is None:
            rows = shape[0]
        elif rows != shape[0]:
            shapes = ", ".join(f"{one!r} {list(a.shape)}" for one, a in tensors.items())
            raise InvalidRequest(
                f"axis 0 is the rows and must be equally long in all inputs; they are {shapes}",
                field=name,
            )
    if rows is None:
        raise InvalidRequest("the request has no inputs; there must be at least one")
    return rows


def kind_of(tensors: Tensors) -> Hashable:
    """Return what requests must have in common to be joined without being converted."""
    if len(tensors) == 1:
        ((name, array),) = tensors.items()
        return name, array.dtype, array.shape[1:]
    return tuple((name, tensors[name].dtype, tensors[name].shape[1:]) for name in sorted(tensors))


class NextBatch(NamedTuple):
    """What runs next: so many requests, with so many rows; whether more can join it."""

    requests: int
    rows: int
    full: bool


def next_batch(waiting: Iterable[tuple[int, Hashable]], max_rows: int) -> NextBatch:
    """Return how many of the waiting requests, first come first, run together.

    As many as follow each other with the kind of the first one and fit into `max_rows`; the first
    one always, even if it alone is larger. Nobody overtakes, so nobody starves. A batch is full
    when nothing that comes later could join it.

    Args:
        waiting: The number of rows and the kind of each request; what has the kind None runs
            alone.
        max_rows: Rows in one batch.
    """
    taken, total, first = 0, 0, None
    for rows, kind in waiting:
        if taken and (kind != first or kind is None or total + rows > max_rows):
            return NextBatch(taken, total, full=True)
        taken, total, first = taken + 1, total + rows, kind
    return NextBatch(taken, total, full=taken > 0 and (first is None or total >= max_rows))


class Joined(Protocol):
    """A request that runs with others."""

    @property
    def tensors(self) -> Tensors:
        """One array for each input."""

    @property
    def rows(self) -> int:
        """Its rows."""


@dataclass(slots=True, frozen=True)
class Outcome:
    """How a run went, with the moments between its steps; without shares it failed.

    Attributes:
        computed_ns: The processor time of the thread that ran it.
    """

    began_ns: int
    joined_ns: int
    ran_ns: int
    ended_ns: int
    computed_ns: int
    shares: list[Tensors] | None
    error: BaseException | None


def outcome_of(run: Run, requests: Sequence[Joined]) -> Outcome:
    """Run requests as one, a single one as it is, and return how that went; blocks."""
    shares: list[Tensors] | None = None
    failure: BaseException | None = None
    began_ns = joined_ns = ran_ns = time.monotonic_ns()
    computed_ns = time.thread_time_ns()
    try:
        if len(requests) == 1:
            shares = [run(requests[0].tensors)]
            ran_ns = time.monotonic_ns()
        else:
            joined = together([one.tensors for one in requests])
            joined_ns = ran_ns = time.monotonic_ns()
            outputs = run(joined)
            ran_ns = time.monotonic_ns()
            shares = apart(outputs, [one.rows for one in requests])
    except BaseException as error:  # noqa: BLE001 - it belongs to whoever asked
        failure = error
    computed_ns = time.thread_time_ns() - computed_ns
    ended_ns = time.monotonic_ns()
    return Outcome(began_ns, joined_ns, ran_ns, ended_ns, computed_ns, shares, failure)


def together(requests: Sequence[Tensors]) -> Tensors:
    """Return the inputs of requests of one kind as one, rows in the order of the requests."""
    return {name: np.concatenate([one[name] for one in requests]) for name in requests[0]}


def apart(outputs: Tensors, lengths: Sequence[int]) -> list[Tensors] | None:
    """Return each request's own rows, or None if an output has not one row for each row asked."""
    total = sum(lengths)
    if any(v.ndim == 0 or len(v) != total for v in outputs.values()):
        return None
    shares: list[Tensors] = []
    start = 0
    for length in lengths:
        end = start + length
        shares.append({name: v[start:end] for name, v in outputs.items()})
        start = end
    return shares

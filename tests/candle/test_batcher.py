"""Requests that wait together run together, and everybody gets their own rows."""

import asyncio
import contextlib
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.errors import Overloaded, Unavailable, Unprocessable
from bus.testing import until
from services.candle.batcher import Batcher, apart, next_batch


class Doubler:
    """A model that doubles, and can be held up."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.go_on = threading.Event()
        self.go_on.set()

    def forward(self, rows):
        self.batches.append(len(rows))
        self.go_on.wait(10)
        if (rows < 0).any():
            raise Unprocessable("negative")
        return {"y": 2 * rows, "n": np.arange(len(rows))}


@contextlib.asynccontextmanager
async def batching(doubler: Doubler, **limits: object):
    batcher = Batcher(doubler.forward, **limits)
    running = asyncio.create_task(batcher.run())
    try:
        yield batcher
    finally:
        doubler.go_on.set()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running


def rows(*values: float):
    return np.array([[value] for value in values], np.float32)


async def held(doubler: Doubler, batcher: Batcher):
    """Have one request run, and not end."""
    doubler.go_on.clear()
    first = asyncio.create_task(batcher.submit(rows(1)))
    await until(lambda: doubler.batches == [1])
    return first


async def test_requests_that_wait_together_run_as_one_batch():
    doubler = Doubler()
    async with batching(doubler) as batcher:
        first = await held(doubler, batcher)
        others = [asyncio.create_task(batcher.submit(rows(i, i))) for i in range(8)]
        await until(lambda: len(batcher._waiting) == 8)
        doubler.go_on.set()
        replies = await asyncio.gather(first, *others)
    assert doubler.batches == [1, 16]
    assert [reply["y"].tolist() for reply in replies[1:]] == [[[2 * i]] * 2 for i in range(8)]


async def test_a_batch_never_has_more_rows_than_allowed():
    doubler = Doubler()
    async with batching(doubler, max_rows=4) as batcher:
        first = await held(doubler, batcher)
        others = [asyncio.create_task(batcher.submit(rows(i, i, i))) for i in range(3)]
        large = asyncio.create_task(batcher.submit(rows(*range(9))))
        await until(lambda: len(batcher._waiting) == 4)
        doubler.go_on.set()
        await asyncio.gather(first, *others, large)
    assert doubler.batches == [1, 3, 3, 3, 9]


async def test_a_full_queue_refuses_and_names_its_limit():
    doubler = Doubler()
    async with batching(doubler, max_waiting=3, name="iris") as batcher:
        first = await held(doubler, batcher)
        waiting = asyncio.create_task(batcher.submit(rows(1, 2, 3)))
        await until(lambda: batcher._rows_waiting == 3)
        with pytest.raises(Overloaded, match=r"queue of iris is full.*max_waiting_rows allows 3"):
            await batcher.submit(rows(4))
        doubler.go_on.set()
        await asyncio.gather(first, waiting)


async def test_who_went_away_is_not_worked_for():
    doubler = Doubler()
    async with batching(doubler) as batcher:
        first = await held(doubler, batcher)
        gone = asyncio.create_task(batcher.submit(rows(7, 7, 7)))
        stays = asyncio.create_task(batcher.submit(rows(8)))
        await until(lambda: len(batcher._waiting) == 2)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        doubler.go_on.set()
        await first
        assert (await stays)["y"].tolist() == [[16]]
    assert doubler.batches == [1, 1]


async def test_who_went_away_makes_room_at_once():
    doubler = Doubler()
    async with batching(doubler, max_waiting=2) as batcher:
        first = await held(doubler, batcher)
        gone = asyncio.create_task(batcher.submit(rows(7, 7)))
        await until(lambda: batcher._rows_waiting == 2)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        later = asyncio.create_task(batcher.submit(rows(8, 8)))
        await until(lambda: batcher._rows_waiting == 2)
        doubler.go_on.set()
        await first
        assert (await later)["y"].tolist() == [[16], [16]]


async def test_who_runs_or_waits_when_the_batcher_stops_is_told():
    doubler = Doubler()
    batcher = Batcher(doubler.forward)
    running = asyncio.create_task(batcher.run())
    first = await held(doubler, batcher)
    waits = asyncio.create_task(batcher.submit(rows(2)))
    await until(lambda: batcher._rows_waiting == 1)
    running.cancel()
    told = await asyncio.gather(running, first, waits, return_exceptions=True)
    doubler.go_on.set()
    assert [type(one) for one in told] == [asyncio.CancelledError, Unavailable, Unavailable]
    with pytest.raises(Unavailable, match="is being stopped"):
        await batcher.submit(rows(3))


async def test_rows_of_another_width_or_type_run_in_a_batch_of_their_own():
    doubler = Doubler()
    asked = [rows(2), rows(3), np.ones((1, 2), np.float32), np.ones((1, 2), np.float64)]
    async with batching(doubler) as batcher:
        first = await held(doubler, batcher)
        others = [asyncio.create_task(batcher.submit(one)) for one in asked]
        await until(lambda: len(batcher._waiting) == 4)
        doubler.go_on.set()
        replies = await asyncio.gather(*others)
        await first
    assert doubler.batches == [1, 2, 1, 1]
    assert [reply["y"].dtype for reply in replies] == [one.dtype for one in asked]


@pytest.mark.parametrize("summed", [np.sum, lambda rows: rows.sum(axis=0), lambda rows: rows[1:]])
async def test_a_model_that_does_not_keep_rows_runs_for_one_request_at_a_time(summed):
    doubler = Doubler()
    double = doubler.forward
    doubler.forward = lambda rows: {"y": np.asarray(summed(double(rows)["y"]))}
    async with batching(doubler) as batcher:
        first = await held(doubler, batcher)
        asked = [rows(10 * i, 10 * i + 1) for i in range(3)]
        others = [asyncio.create_task(batcher.submit(one)) for one in asked]
        await until(lambda: len(batcher._waiting) == 3)
        doubler.go_on.set()
        replies = await asyncio.gather(*others)
        await first
        again = await asyncio.gather(*(batcher.submit(one) for one in asked))
    # Tried together once, then each alone, and never together again.
    assert doubler.batches == [1, 6, 2, 2, 2, 2, 2, 2]
    for one, reply, later in zip(asked, replies, again, strict=True):
        assert reply["y"].tolist() == later["y"].tolist() == np.asarray(summed(2 * one)).tolist()


async def test_one_bad_request_does_not_fail_its_neighbours():
    doubler = Doubler()
    async with batching(doubler) as batcher:
        first = await held(doubler, batcher)
        asked = [asyncio.create_task(batcher.submit(rows(v))) for v in (1, -1, 3)]
        await until(lambda: len(batcher._waiting) == 3)
        doubler.go_on.set()
        await first
        good, bad, also_good = await asyncio.gather(*asked, return_exceptions=True)
    assert (good["y"].tolist(), also_good["y"].tolist()) == ([[2]], [[6]])
    assert isinstance(bad, Unprocessable)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.sampled_from("ab")), min_size=1, max_size=40),
    st.integers(1, 16),
)
def test_the_next_batch_is_the_longest_run_of_one_kind_that_fits(waiting, max_rows):
    def fits(run):
        return sum(n for n, _ in run) <= max_rows and len({kind for _, kind in run}) == 1

    taken = next_batch(waiting, max_rows)
    assert 1 <= taken <= len(waiting)
    assert taken == 1 or fits(waiting[:taken])
    assert taken == len(waiting) or not fits(waiting[: taken + 1])


def test_nobody_waits_and_nothing_is_next():
    assert next_batch([], 8) == 0


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20))
def test_outputs_are_taken_apart_as_the_rows_were_put_together(lengths):
    y = np.arange(sum(lengths))
    shares = apart({"y": y}, lengths)
    assert [len(share["y"]) for share in shares] == lengths
    assert np.concatenate([share["y"] for share in shares]).tolist() == y.tolist()
    assert apart({"y": y, "z": np.arange(len(y) + 1)}, lengths) is None


@given(st.lists(st.integers(1, 5), min_size=1, max_size=30), st.integers(1, 12))
def test_every_asker_gets_their_own_rows(sizes, max_rows):
    async def ask_all() -> None:
        doubler = Doubler()
        async with batching(doubler, max_rows=max_rows) as batcher:
            asked = [rows(*(100 * i + j for j in range(n))) for i, n in enumerate(sizes)]
            replies = await asyncio.gather(*(batcher.submit(one) for one in asked))
        for one, reply in zip(asked, replies, strict=True):
            assert reply["y"].tolist() == (2 * one).tolist()
        assert sum(doubler.batches) == sum(sizes)

    asyncio.run(ask_all())

"""Requests that wait together run together, and everybody gets their own rows."""

import asyncio
import contextlib
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.errors import Overloaded, Unprocessable
from bus.testing import until
from services.candle.batcher import Batcher, next_batch


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
async def batching(doubler: Doubler, **limits: int):
    batcher = Batcher(doubler.forward, **limits)
    running = asyncio.create_task(batcher.run())
    try:
        yield batcher
    finally:
        doubler.go_on.set()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


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
    async with batching(doubler, max_waiting=3) as batcher:
        first = await held(doubler, batcher)
        waiting = asyncio.create_task(batcher.submit(rows(1, 2, 3)))
        await until(lambda: batcher._rows_waiting == 3)
        with pytest.raises(Overloaded, match="max_waiting allows 3"):
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


@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.integers(1, 16))
def test_the_next_batch_is_the_longest_run_that_fits(lengths, max_rows):
    taken = next_batch(lengths, max_rows)
    assert 1 <= taken <= len(lengths)
    assert taken == 1 or sum(lengths[:taken]) <= max_rows
    assert taken == len(lengths) or sum(lengths[: taken + 1]) > max_rows


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

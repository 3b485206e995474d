"""Which runs are made on the event loop: those that are known to be quick, and no others."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from bus.errors import Unprocessable
from bus.tasks import beside
from services.candle.serving.batcher import Batcher
from services.candle.serving.joining import Limits
from services.candle.serving.pace import QUICK_NS, Pace
from services.candle.serving.statistics import Statistics


def after(
    *computed_ns: int, elements: int = 1, passed_ns: int = 0, pace: Pace | None = None
) -> Pace:
    pace = pace or Pace()
    for one in computed_ns:
        pace.ran(elements, one, passed_ns or one)
    return pace


def test_nothing_is_quick_before_it_is_known():
    assert not Pace().quick(1)
    assert not after(1, 1).quick(1)
    assert after(1, 1, 1).quick(1)


def test_the_slowest_but_one_of_the_latest_runs_counts():
    assert after(*[QUICK_NS] * 7, 9 * QUICK_NS).quick(1)
    assert not after(*[QUICK_NS] * 6, *[9 * QUICK_NS] * 2).quick(1)
    assert not after(*[QUICK_NS + 1] * 20).quick(1)


def test_one_quick_run_in_eight_makes_no_model_quick():
    pace = Pace()
    for _ in range(50):
        after(QUICK_NS, *[75 * QUICK_NS] * 7, pace=pace)
        assert not pace.quick(1)


def test_a_run_that_computed_for_long_is_not_repeated_soon():
    pace = after(*[1] * 8, 26 * QUICK_NS)
    assert not pace.quick(1)
    assert not after(*[1] * 100, pace=pace).quick(1)
    assert after(*[1] * 400, pace=pace).quick(1)


def test_what_the_machine_does_besides_makes_no_run_slow():
    assert after(*[QUICK_NS] * 3, passed_ns=10 * QUICK_NS).quick(1)


def test_what_waits_is_not_quick_however_little_it_computes():
    assert not after(*[1] * 8, passed_ns=30 * QUICK_NS).quick(1)


def test_each_size_is_known_by_itself():
    pace = after(*[1] * 3, elements=4)
    assert pace.quick(7)
    assert not pace.quick(3)
    assert not pace.quick(8)


def test_a_model_that_has_become_slow_is_quick_no_longer():
    assert not after(*[1] * 8, *[2 * QUICK_NS] * 8).quick(1)


def test_a_run_that_held_everybody_up_is_not_repeated_soon():
    pace = after(1, 1, 1)
    pace.ran(1, 1, 200 * QUICK_NS)
    assert not pace.quick(1)
    assert after(*[1] * 500, pace=pace).quick(1)


def test_none_is_quick_where_that_is_wanted():
    assert not after(*[1] * 9, pace=Pace(quick_ns=0)).quick(1)


class Noting:
    """A model that notes where it is run, and takes as long as it is told."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []
        self.takes_s = 0.0

    def run(self, tensors):
        self.threads.append(threading.current_thread())
        if self.takes_s:
            time.sleep(self.takes_s)
        if (tensors["x"] < 0).any():
            raise Unprocessable("negative")
        return {"y": 2 * tensors["x"]}

    @property
    def here(self) -> list[bool]:
        return [one is threading.main_thread() for one in self.threads]


@pytest.fixture
async def noting(threads):
    model = Noting()
    batcher = Batcher(
        model.run, joins=True, limits=Limits(), name="m", statistics=Statistics("m"),
        threads=threads, pace=Pace(quick_ns=5_000_000),
    )  # fmt: skip
    model.batcher = batcher
    running = asyncio.create_task(batcher.run())
    yield model
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


@pytest.fixture
def threads():
    with ThreadPoolExecutor(1) as executor:
        yield executor


async def double(model, value: float) -> float:
    ran = await model.batcher.submit({"x": np.full((1, 1), value)})
    return float(ran.outputs["y"][0, 0])


async def test_a_model_is_run_in_a_thread_until_it_is_known_to_be_quick(noting):
    for value in range(6):
        assert await double(noting, value) == 2 * value
    assert noting.here == [False, False, False, True, True, True]


@pytest.mark.parametrize("joins", [True, False])
async def test_a_row_that_is_long_enough_to_be_slow_is_never_run_on_the_loop(threads, joins):
    """One row each, as a model with a dynamic second axis takes them."""
    here: dict[int, set[bool]] = {1: set(), 4_096: set()}

    def run(tensors):
        length = tensors["x"].size
        here[length].add(threading.current_thread() is threading.main_thread())
        until_ns = time.thread_time_ns() + (10_000_000 if length > 1 else 0)
        while time.thread_time_ns() < until_ns:
            pass
        return {"y": tensors["x"]}

    batcher = Batcher(
        run, joins=joins, limits=Limits(), name="m", statistics=Statistics("m"), threads=threads,
        pace=Pace(quick_ns=1_000_000),
    )  # fmt: skip
    async with beside(batcher.run()):
        for length in [*[1] * 20, 4_096] * 8:
            await batcher.submit({"x": np.zeros((1, length), np.float32)})
    assert here == {1: {False, True}, 4_096: {False}}


async def test_requests_of_one_turn_share_a_run_on_the_loop_and_one_error_is_its_own(noting):
    for value in range(4):
        await double(noting, value)
    for _ in range(4):
        await asyncio.gather(double(noting, 1), double(noting, 2))
    runs = len(noting.threads)
    assert await asyncio.gather(double(noting, 1), double(noting, 2)) == [2, 4]
    assert noting.here[runs:] == [True]
    asked = (double(noting, 1), double(noting, -1), double(noting, 3))
    one, bad, three = await asyncio.gather(*asked, return_exceptions=True)
    assert (one, three) == (2, 6)
    assert isinstance(bad, Unprocessable)


async def test_a_model_that_becomes_slow_goes_back_to_its_thread(noting):
    for value in range(4):
        await double(noting, value)
    noting.takes_s = 0.6
    await double(noting, 1)
    noting.takes_s = 0.0
    await double(noting, 1)
    assert noting.here[-2:] == [True, False]


async def test_runs_that_fail_at_once_make_no_model_quick(noting):
    for _ in range(5):
        with pytest.raises(Unprocessable):
            await double(noting, -1)
    await double(noting, 1)
    assert noting.here == [False] * 6


async def test_a_failed_run_that_held_everybody_up_sends_the_model_back_to_its_thread(noting):
    for value in range(4):
        await double(noting, value)
    noting.takes_s = 0.6
    with pytest.raises(Unprocessable):
        await double(noting, -1)
    noting.takes_s = 0.0
    await double(noting, 1)
    assert noting.here[-2:] == [True, False]

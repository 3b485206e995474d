"""Requests that wait together run together, and everybody gets their own rows."""

import asyncio
import contextlib
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.errors import (
    BusError,
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    Overloaded,
    Unavailable,
    Unprocessable,
)
from bus.testing import until
from services.candle.serving.batcher import Batcher
from services.candle.serving.joining import Limits, NextBatch, apart, count_rows, next_batch
from services.candle.serving.statistics import Statistics


class Doubler:
    """A model that doubles each input, and can be held up."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.running = 0
        self.most_at_once = 0
        self.go_on = threading.Event()
        self.go_on.set()
        self._lock = threading.Lock()

    def run(self, tensors):
        rows = max(len(array) if array.ndim else 1 for array in tensors.values())
        with self._lock:
            self.batches.append(rows)
            self.running += 1
            self.most_at_once = max(self.most_at_once, self.running)
        try:
            assert self.go_on.wait(60)
            return self.answer(tensors)
        finally:
            with self._lock:
                self.running -= 1

    def answer(self, tensors):
        if any((array < 0).any() for array in tensors.values()):
            raise Unprocessable("negative")
        return {f"2{name}": 2 * array for name, array in tensors.items()}


@contextlib.asynccontextmanager
async def batching(doubler: Doubler, *, joins: bool = True, **limits: float):
    with ThreadPoolExecutor(4) as threads:
        batcher = Batcher(
            doubler.run,
            joins=joins,
            limits=Limits(**limits),
            name="model 'iris'",
            statistics=Statistics("iris"),
            threads=threads,
        )
        running = asyncio.create_task(batcher.run())
        try:
            yield batcher
        finally:
            doubler.go_on.set()
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running


def rows(*values: float):
    return {"x": np.array([[value] for value in values], np.float32)}


def values(ran, output: str = "2x"):
    return ran.outputs[output].tolist()


def ask(batcher, *numbers: float, deadline: float | None = None):
    return asyncio.create_task(batcher.submit(rows(*numbers), deadline))


async def held(doubler: Doubler, batcher: Batcher):
    """Have one request run, and not end."""
    doubler.go_on.clear()
    first = ask(batcher, 1)
    await until(lambda: doubler.running == 1)
    return first


async def waiting(batcher: Batcher, requests: int):
    await until(lambda: len(batcher._waiting) == requests)


async def test_requests_that_wait_together_run_as_one_batch():
    doubler = Doubler()
    async with batching(doubler) as batcher:
        first = await held(doubler, batcher)
        others = [ask(batcher, i, i) for i in range(8)]
        await waiting(batcher, 8)
        doubler.go_on.set()
        replies = await asyncio.gather(first, *others)
    assert doubler.batches == [1, 16]
    assert [values(reply) for reply in replies[1:]] == [[[2 * i]] * 2 for i in range(8)]


async def test_requests_that_come_in_the_same_moment_run_together():
    doubler = Doubler()
    async with batching(doubler) as batcher:
        await batcher.submit(rows(1))
        await asyncio.gather(*(batcher.submit(rows(i)) for i in range(5)))
    assert doubler.batches == [1, 5]


async def test_each_input_is_joined_by_its_name():
    doubler = Doubler()
    asked = [
        {"a": np.full((n, 2), n, np.int64), "b": np.full((n,), 10 * n, np.float32)}
        for n in (1, 2, 3)
    ]
    # The order in which a caller names the inputs means nothing.
    asked[1] = {"b": asked[1]["b"], "a": asked[1]["a"]}
    async with batching(doubler) as batcher:
        first = await held(doubler, batcher)
        others = [asyncio.create_task(batcher.submit(one)) for one in asked]
        await waiting(batcher, 3)
        doubler.go_on.set()
        await first
        replies = await asyncio.gather(*others)
    assert doubler.batches == [1, 6]
    for one, reply in zip(asked, replies, strict=True):
        assert values(reply, "2a") == (2 * one["a"]).tolist()
        assert values(reply, "2b") == (2 * one["b"]).tolist()


async def test_an_answer_tells_how_long_it_waited_and_ran_and_with_how_many():
    doubler = Doubler()
    async with batching(doubler) as batcher:
        first = await held(doubler, batcher)
        others = [ask(batcher, 1, 2), ask(batcher, 3)]
        await waiting(batcher, 2)
        came_ns = time.monotonic_ns()
        await asyncio.sleep(0.02)
        waited_ns = time.monotonic_ns() - came_ns
        doubler.go_on.set()
        replies = await asyncio.gather(first, *others)
    assert [reply.batch_rows for reply in replies] == [1, 3, 3]
    assert all(reply.queue_ns >= waited_ns for reply in replies[1:])
    assert replies[0].compute_ns >= waited_ns
    assert all(reply.compute_ns > 0 for reply in replies)


async def test_outputs_of_a_batch_are_handed_out_without_being_copied():
    doubler = Doubler()
    async with batching(doubler) as batcher:
        first = await held(doubler, batcher)
        others = [ask(batcher, 1, 2), ask(batcher, 3)]
        await waiting(batcher, 2)
        doubler.go_on.set()
        await first
        one, other = await asyncio.gather(*others)
    assert one.outputs["2x"].base is other.outputs["2x"].base is not None


async def test_the_arrays_of_a_lone_request_reach_the_model_as_they_are():
    seen = []
    doubler = Doubler()
    doubler.answer = lambda tensors: seen.append(tensors) or tensors
    asked = rows(1, 2)
    async with batching(doubler) as batcher:
        reply = await batcher.submit(asked)
    assert seen[0] is asked
    assert reply.outputs is asked


async def test_a_batch_never_has_more_rows_than_allowed():
    doubler = Doubler()
    async with batching(doubler, max_rows=4) as batcher:
        first = await held(doubler, batcher)
        others = [ask(batcher, i, i, i) for i in range(3)]
        large = ask(batcher, *range(9))
        await waiting(batcher, 4)
        doubler.go_on.set()
        await asyncio.gather(first, *others, large)
    assert doubler.batches == [1, 3, 3, 3, 9]


async def test_a_full_queue_refuses_at_once_and_names_its_limit():
    doubler = Doubler()
    async with batching(doubler, max_waiting_rows=3) as batcher:
        first = await held(doubler, batcher)
        others = ask(batcher, 1, 2, 3)
        await waiting(batcher, 1)
        with pytest.raises(
            Overloaded,
            match=r"queue of model 'iris' is full: 3 rows wait and 1 came; "
            r"max_waiting_rows allows 3",
        ) as refused:
            await batcher.submit(rows(4))
        assert refused.value.retry_after_s == 1
        doubler.go_on.set()
        await asyncio.gather(first, others)
        assert batcher._statistics.failures == {"overloaded": 1}


async def test_a_refusal_says_when_to_come_back_by_how_fast_rows_have_run():
    doubler = Doubler()
    async with batching(doubler, max_waiting_rows=4) as batcher:
        first = await held(doubler, batcher)
        others = ask(batcher, 1, 2, 3, 4)
        await waiting(batcher, 1)
        for row_s, expected in ((0.0, 1), (2.6, 11), (1e6, 60)):
            batcher._row_ns = row_s * 1e9
            with pytest.raises(Overloaded) as refused:
                await batcher.submit(rows(5))
            assert refused.value.retry_after_s == expected
        doubler.go_on.set()
        await asyncio.gather(first, others)


async def test_a_request_larger_than_the_queue_is_taken_when_nothing_waits():
    doubler = Doubler()
    async with batching(doubler, max_waiting_rows=3) as batcher:
        first = await held(doubler, batcher)
        large = ask(batcher, *range(9))
        await waiting(batcher, 1)
        doubler.go_on.set()
        await asyncio.gather(first, large)
    assert doubler.batches == [1, 9]


async def test_who_went_away_is_not_worked_for():
    doubler = Doubler()
    async with batching(doubler) as batcher:
        first = await held(doubler, batcher)
        gone = ask(batcher, 7, 7, 7)
        stays = ask(batcher, 8)
        await waiting(batcher, 2)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        doubler.go_on.set()
        await first
        assert values(await stays) == [[16]]
        assert batcher._statistics.failures == {"cancelled": 1}
    assert doubler.batches == [1, 1]


async def test_who_went_away_makes_room_at_once():
    doubler = Doubler()
    async with batching(doubler, max_waiting_rows=2) as batcher:
        first = await held(doubler, batcher)
        gone = ask(batcher, 7, 7)
        await waiting(batcher, 1)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        assert batcher.rows_waiting == 0
        later = ask(batcher, 8, 8)
        await waiting(batcher, 1)
        doubler.go_on.set()
        await first
        assert values(await later) == [[16], [16]]


async def test_the_outputs_of_who_went_away_while_they_ran_are_dropped():
    doubler = Doubler()
    async with batching(doubler) as batcher:
        first = await held(doubler, batcher)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        later = ask(batcher, 8)
        await waiting(batcher, 1)
        doubler.go_on.set()
        assert values(await later) == [[16]]


async def test_who_waits_at_the_stop_is_told_at_once_and_what_runs_is_finished():
    doubler = Doubler()
    async with batching(doubler) as batcher:
        first = await held(doubler, batcher)
        waits = ask(batcher, 2)
        await waiting(batcher, 1)
        running = next(t for t in asyncio.all_tasks() if t.get_coro().__qualname__ == "Batcher.run")
        running.cancel()
        with pytest.raises(Unavailable, match="model 'iris' is being stopped"):
            await waits
        with pytest.raises(Unavailable, match="is being stopped"):
            await batcher.submit(rows(3))
        assert not first.done()
        assert not running.done()
        doubler.go_on.set()
        assert values(await first) == [[2]]
        await until(running.done)
    assert doubler.batches == [1]


async def test_a_run_that_does_not_end_does_not_hold_up_the_stop_for_ever(monkeypatch):
    monkeypatch.setattr("services.candle.serving.batcher.STOP_S", 0.05)
    doubler = Doubler()
    with ThreadPoolExecutor(1) as threads:
        batcher = Batcher(
            doubler.run, joins=True, limits=Limits(), name="m", statistics=Statistics("m"),
            threads=threads,
        )  # fmt: skip
        running = asyncio.create_task(batcher.run())
        first = await held(doubler, batcher)
        running.cancel()
        told = await asyncio.gather(running, first, return_exceptions=True)
        doubler.go_on.set()
        await until(lambda: doubler.running == 0)
    assert [type(one) for one in told] == [asyncio.CancelledError, Unavailable]


async def test_who_meets_threads_that_are_shut_down_is_told():
    doubler = Doubler()
    async with batching(doubler) as batcher:
        batcher._threads.shutdown()
        with pytest.raises(Unavailable, match="is being stopped"):
            await batcher.submit(rows(1))
        assert not batcher._running


async def test_rows_of_another_width_type_or_name_run_in_a_batch_of_their_own():
    doubler = Doubler()
    asked = [
        rows(2),
        rows(3),
        {"x": np.ones((1, 2), np.float32)},
        {"x": np.ones((1, 2), np.float64)},
        {"y": np.ones((1, 2), np.float64)},
    ]
    async with batching(doubler) as batcher:
        first = await held(doubler, batcher)
        others = [asyncio.create_task(batcher.submit(one)) for one in asked]
        await waiting(batcher, 5)
        doubler.go_on.set()
        replies = await asyncio.gather(*others)
        await first
    assert doubler.batches == [1, 2, 1, 1, 1]
    for one, reply in zip(asked, replies, strict=True):
        ((name, array),) = one.items()
        assert reply.outputs[f"2{name}"].dtype == array.dtype


async def test_requests_that_cannot_be_joined_run_one_at_a_time_and_whole():
    doubler = Doubler()
    asked = {"a": np.ones((3, 2)), "scalar": np.float32(2) * np.ones(()), "b": np.ones(5)}
    async with batching(doubler, joins=False) as batcher:
        replies = await asyncio.gather(*(batcher.submit(asked) for _ in range(3)))
        assert batcher._statistics.inference_count == 3
    assert doubler.batches == [5, 5, 5]
    assert doubler.most_at_once == 1
    assert [reply.outputs["2scalar"].tolist() for reply in replies] == [4, 4, 4]


@pytest.mark.parametrize("summed", [np.sum, lambda rows: rows.sum(axis=0), lambda rows: rows[1:]])
async def test_a_model_that_does_not_keep_rows_runs_for_one_request_at_a_time(summed):
    doubler = Doubler()
    double = doubler.answer
    doubler.answer = lambda tensors: {"y": np.asarray(summed(double(tensors)["2x"]))}
    async with batching(doubler) as batcher:
        first = await held(doubler, batcher)
        asked = [rows(10 * i, 10 * i + 1) for i in range(3)]
        others = [asyncio.create_task(batcher.submit(one)) for one in asked]
        await waiting(batcher, 3)
        doubler.go_on.set()
        replies = await asyncio.gather(*others)
        await first
        again = await asyncio.gather(*(batcher.submit(one) for one in asked))
        assert not batcher._joins
    # Tried together once, then each alone, and never together again.
    assert doubler.batches == [1, 6, 2, 2, 2, 2, 2, 2]
    for one, reply, later in zip(asked, replies, again, strict=True):
        expected = np.asarray(summed(2 * one["x"])).tolist()
        assert values(reply, "y") == values(later, "y") == expected


async def test_one_bad_request_does_not_fail_its_neighbours():
    doubler = Doubler()
    async with batching(doubler) as batcher:
        first = await held(doubler, batcher)
        asked = [ask(batcher, v) for v in (1, -1, 3)]
        await waiting(batcher, 3)
        doubler.go_on.set()
        await first
        good, bad, also_good = await asyncio.gather(*asked, return_exceptions=True)
        assert (values(good), values(also_good)) == ([[2]], [[6]])
        assert isinstance(bad, Unprocessable)
        # The next ones are joined again.
        doubler.batches.clear()
        first = await held(doubler, batcher)
        asked = [ask(batcher, v) for v in (1, 3)]
        await waiting(batcher, 2)
        doubler.go_on.set()
        await asyncio.gather(first, *asked)
    assert doubler.batches == [1, 2]


async def test_who_goes_away_or_is_late_before_a_failed_batch_is_repeated_is_not_worked_for():
    doubler = Doubler()
    answer = doubler.answer

    def answer_and_hold_up(tensors):
        if len(tensors["x"]) > 1:
            doubler.go_on.clear()
        return answer(tensors)

    doubler.answer = answer_and_hold_up
    async with batching(doubler) as batcher:
        first = await held(doubler, batcher)
        asked = [ask(batcher, v) for v in (1, -1, 3)]
        asked.append(ask(batcher, 4, deadline=time.monotonic() + 2))
        await waiting(batcher, 4)
        doubler.go_on.set()
        await first
        # The joined run has failed, and the first of them is being run alone.
        await until(lambda: doubler.batches == [1, 4, 1])
        assert batcher.rows_waiting == 3
        asked[2].cancel()
        with pytest.raises(DeadlineExceeded):
            await asked[3]
        doubler.go_on.set()
        good, bad, gone, _ = await asyncio.gather(*asked, return_exceptions=True)
    assert values(good) == [[2]]
    assert isinstance(bad, Unprocessable)
    assert isinstance(gone, asyncio.CancelledError)
    assert doubler.batches == [1, 4, 1, 1]


@pytest.mark.parametrize("surprise", [ZeroDivisionError, MemoryError, StopIteration, SystemExit])
async def test_a_model_that_fails_unexpectedly_is_an_internal_error_and_the_next_one_runs(surprise):
    doubler = Doubler()
    answer = doubler.answer

    def fail(_tensors):
        raise surprise("a secret")

    doubler.answer = fail
    async with batching(doubler) as batcher:
        with pytest.raises(Internal, match="model 'iris' failed.*the log has the cause") as told:
            await batcher.submit(rows(1))
        assert "secret" not in str(told.value)
        doubler.answer = answer
        assert values(await batcher.submit(rows(1))) == [[2]]


async def test_a_request_is_taken_out_at_the_moment_when_its_deadline_passes():
    doubler = Doubler()
    async with batching(doubler) as batcher:
        first = await held(doubler, batcher)
        patient = ask(batcher, 5, deadline=time.monotonic() + 300)
        deadline = time.monotonic() + 0.1
        late = ask(batcher, 6, 6, deadline=deadline)
        with pytest.raises(
            DeadlineExceeded, match=r"after [\d.]+ s in the queue of model 'iris', before a run"
        ):
            await late
        assert time.monotonic() >= deadline
        # The model was held up all the time: nothing but the deadline can have ended it.
        assert (doubler.batches, batcher.rows_waiting) == ([1], 1)
        assert batcher._statistics.failures == {"deadline-exceeded": 1}
        doubler.go_on.set()
        await first
        assert values(await patient) == [[10]]
    assert doubler.batches == [1, 1]


async def test_deadlines_pass_in_their_own_order_not_in_that_of_coming():
    doubler = Doubler()
    order: list[int] = []
    async with batching(doubler) as batcher:
        first = await held(doubler, batcher)
        now = time.monotonic()
        late = [ask(batcher, i, deadline=now + after) for i, after in enumerate((0.6, 0.2, 0.4))]
        for i, one in enumerate(late):
            one.add_done_callback(lambda _, i=i: order.append(i))
        await asyncio.gather(*late, return_exceptions=True)
        await until(lambda: len(order) == 3)
        doubler.go_on.set()
        await first
    assert order == [1, 2, 0]
    assert doubler.batches == [1]


async def test_a_request_whose_deadline_has_passed_is_never_run():
    doubler = Doubler()
    async with batching(doubler) as batcher:
        with pytest.raises(DeadlineExceeded, match="after 0 s in the queue"):
            await batcher.submit(rows(1), time.monotonic() - 1)
        first = await held(doubler, batcher)
        deadline = time.monotonic() + 0.05
        late = ask(batcher, 2, deadline=deadline)
        await asyncio.sleep(0)
        # It waits now. The event loop has no time to ring, and the model goes on first.
        while time.monotonic() <= deadline:
            pass
        doubler.go_on.set()
        with pytest.raises(DeadlineExceeded):
            await late
        await first
    assert doubler.batches == [1]


async def test_deadlines_of_those_who_have_gone_are_forgotten():
    doubler = Doubler()
    async with batching(doubler) as batcher:
        first = await held(doubler, batcher)
        # The next deadline is that of somebody who stays; theirs all come later.
        stays = ask(batcher, 1, deadline=time.monotonic() + 200)
        for i in range(200):
            gone = ask(batcher, i, deadline=time.monotonic() + 300)
            await asyncio.sleep(0)
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)
        assert batcher.rows_waiting == 1
        assert len(batcher._deadlines) <= 40
        doubler.go_on.set()
        await asyncio.gather(first, stays)
        assert batcher._deadlines == []


async def test_a_batch_that_is_not_full_waits_for_more_and_then_runs():
    doubler = Doubler()
    async with batching(doubler, max_delay_s=0.5) as batcher:
        began = time.monotonic()
        asked = [ask(batcher, 1), ask(batcher, 2)]
        for _ in range(5):
            await asyncio.sleep(0)
        assert batcher.rows_waiting == 2
        asked.append(ask(batcher, 3))
        await asyncio.gather(*asked)
        assert time.monotonic() - began >= 0.49
    assert doubler.batches == [3]


async def test_a_batch_runs_at_once_when_it_is_full_or_nothing_more_can_join_it():
    doubler = Doubler()
    async with batching(doubler, max_delay_s=300, max_rows=3) as batcher:
        await asyncio.gather(*(batcher.submit(rows(i)) for i in range(3)))
        # Too large for the rest of the batch; and larger than a batch by itself.
        other = ask(batcher, 1)
        await waiting(batcher, 1)
        await batcher.submit(rows(1, 2, 3, 4))
        await other
        # Of another kind: nobody overtakes, so the first one cannot get company.
        first = ask(batcher, 1)
        await waiting(batcher, 1)
        last = asyncio.create_task(batcher.submit({"x": np.ones((3, 9))}))
        await asyncio.gather(first, last)
    assert doubler.batches == [3, 1, 4, 1, 3]


async def test_who_has_less_time_than_the_delay_is_not_held_back():
    doubler = Doubler()
    async with batching(doubler, max_delay_s=300) as batcher:
        await batcher.submit(rows(1), time.monotonic() + 60)
    assert doubler.batches == [1]


async def test_requests_that_cannot_be_joined_are_not_held_back():
    doubler = Doubler()
    async with batching(doubler, joins=False, max_delay_s=300) as batcher:
        await batcher.submit(rows(1))
    assert doubler.batches == [1]


async def test_as_many_runs_go_on_at_the_same_time_as_there_are_instances():
    doubler = Doubler()
    doubler.go_on.clear()
    async with batching(doubler, instances=3, max_rows=1) as batcher:
        asked = [ask(batcher, i) for i in range(5)]
        await until(lambda: doubler.running == 3)
        assert (len(batcher._running), batcher.rows_waiting) == (3, 2)
        doubler.go_on.set()
        assert [values(one) for one in await asyncio.gather(*asked)] == [
            [[2 * i]] for i in range(5)
        ]
    assert doubler.most_at_once == 3


async def test_limits_change_while_requests_wait():
    doubler = Doubler()
    async with batching(doubler, max_waiting_rows=1) as batcher:
        first = await held(doubler, batcher)
        asked = [ask(batcher, 1)]
        await waiting(batcher, 1)
        with pytest.raises(Overloaded):
            await batcher.submit(rows(2))
        batcher.limit(Limits(max_waiting_rows=2, max_rows=1, instances=2))
        # There is a second place now, and it is taken without another request.
        await until(lambda: doubler.batches == [1, 1])
        asked += [ask(batcher, 2), ask(batcher, 3)]
        await waiting(batcher, 2)
        doubler.go_on.set()
        await asyncio.gather(first, *asked)
    assert doubler.batches == [1, 1, 1, 1]


async def test_a_delay_that_is_taken_back_holds_nobody_any_longer():
    doubler = Doubler()
    async with batching(doubler, max_delay_s=300) as batcher:
        asked = ask(batcher, 1)
        await waiting(batcher, 1)
        batcher.limit(Limits())
        assert values(await asked) == [[2]]


async def test_requests_that_come_before_the_batcher_works_wait_for_it():
    doubler = Doubler()
    with ThreadPoolExecutor(1) as threads:
        batcher = Batcher(
            doubler.run, joins=True, limits=Limits(), name="m", statistics=Statistics("m"),
            threads=threads,
        )  # fmt: skip
        asked = [ask(batcher, 1), ask(batcher, 2)]
        await waiting(batcher, 2)
        running = asyncio.create_task(batcher.run())
        assert [values(one) for one in await asyncio.gather(*asked)] == [[[2]], [[4]]]
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert doubler.batches == [2]


@pytest.mark.parametrize(
    ("tensors", "sentence", "field"),
    [
        ({"a": np.ones((3, 2)), "b": np.ones(2)}, r"equally long.*'a' \[3, 2\], 'b' \[2\]", "b"),
        ({"a": np.ones((3, 2)), "s": np.ones(())}, "input 's' is a scalar", "s"),
        ({}, "no inputs; there must be at least one", None),
    ],
)
async def test_inputs_without_a_common_number_of_rows_are_refused_by_name(tensors, sentence, field):
    doubler = Doubler()
    async with batching(doubler) as batcher:
        with pytest.raises(InvalidRequest, match=sentence) as told:
            await batcher.submit(tensors)
        assert told.value.field == field
    assert doubler.batches == []


async def test_what_has_no_rows_runs_alone_and_its_outcome_is_given_back_whole():
    doubler = Doubler()
    async with batching(doubler) as batcher:
        doubler.go_on.clear()
        first = ask(batcher, 1)
        await until(lambda: doubler.batches == [1])
        nothing = asyncio.ensure_future(batcher.submit({"x": np.ones((0, 1))}))
        asked = [ask(batcher, 2), ask(batcher, 3)]
        await waiting(batcher, 3)
        doubler.go_on.set()
        await first
        await asyncio.gather(nothing, *asked)
    assert nothing.result().outputs["2x"].shape == (0, 1)
    assert doubler.batches == [1, 0, 2]


async def test_requests_without_rows_fill_the_queue_like_others():
    doubler = Doubler()
    async with batching(doubler, max_waiting_rows=2) as batcher:
        doubler.go_on.clear()
        first = ask(batcher, 1)
        await until(lambda: doubler.batches == [1])
        asked = [asyncio.ensure_future(batcher.submit({"x": np.ones((0, 1))})) for _ in range(2)]
        await waiting(batcher, 2)
        with pytest.raises(Overloaded):
            await batcher.submit({"x": np.ones((0, 1))})
        doubler.go_on.set()
        await asyncio.gather(first, *asked)


@pytest.mark.parametrize(
    "limits", [{"max_rows": 0}, {"max_waiting_rows": 0}, {"instances": 0}, {"max_delay_s": -1}]
)
def test_limits_under_which_nothing_could_run_are_refused(limits):
    with pytest.raises(ValueError, match="must be at least 1"):
        Limits(**limits)


@given(st.integers(1, 99), st.lists(st.lists(st.integers(0, 3), max_size=2), min_size=1))
def test_the_rows_of_a_request_are_the_length_of_axis_0(length, shapes):
    tensors = {str(i): np.empty((length, *shape)) for i, shape in enumerate(shapes)}
    assert count_rows(tensors) == length


@given(
    st.lists(st.tuples(st.integers(1, 9), st.sampled_from(["a", "b", None])), max_size=40),
    st.integers(1, 16),
)
def test_the_next_batch_is_the_longest_run_of_one_kind_that_fits(waiting, max_rows):
    def fits(run):
        kinds = {kind for _, kind in run}
        return len(run) <= 1 or (
            sum(n for n, _ in run) <= max_rows and len(kinds) == 1 and None not in kinds
        )

    taken, total, full = next_batch(waiting, max_rows)
    assert bool(taken) == bool(waiting)
    assert taken <= len(waiting)
    assert total == sum(n for n, _ in waiting[:taken])
    assert fits(waiting[:taken])
    assert taken == len(waiting) or not fits(waiting[: taken + 1])
    # Full: whatever comes behind, the batch stays as it is.
    if full:
        for kind in ("a", "b", None):
            assert next_batch([*waiting, (1, kind)], max_rows).requests == taken
    elif taken:
        first = waiting[0][1]
        assert next_batch([*waiting, (1, first)], max_rows).requests == taken + 1


def test_nobody_waits_and_nothing_is_next():
    assert next_batch([], 8) == NextBatch(0, 0, full=False)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20))
def test_outputs_are_taken_apart_as_the_rows_were_put_together(lengths):
    y = np.arange(sum(lengths))
    shares = apart({"y": y}, lengths)
    assert [len(share["y"]) for share in shares] == lengths
    assert np.concatenate([share["y"] for share in shares]).tolist() == y.tolist()
    assert apart({"y": y, "z": np.arange(len(y) + 1)}, lengths) is None
    assert apart({"y": np.float32(1) * np.ones(())}, lengths) is None


# Most of one kind, and close together: what never meets in a run tells nothing of neighbours.
requests = st.fixed_dictionaries(
    {
        "rows": st.integers(1, 4),
        "width": st.sampled_from([1] * 6 + [2]),
        "inputs": st.sampled_from([1] * 6 + [2]),
        "does": st.sampled_from(["runs"] * 4 + ["fails"] * 2 + ["leaves", "is late", "has time"]),
        "turns": st.sampled_from([0, 0, 0, 1, 3]),
    }
)


def test_every_asker_gets_their_own_rows_or_their_own_error():
    """Whatever comes, in whatever sizes, and whoever fails, leaves or is late in between."""
    met: Counter[str] = Counter()

    @settings(max_examples=300)
    @given(
        st.lists(requests, min_size=3, max_size=30),
        st.sampled_from([1, 4, 8, 16]),
        st.sampled_from([12, 60, 4_096]),
        st.sampled_from([1, 1, 2, 3]),
        st.sampled_from([0.0, 0.0, 0.002]),
        st.sampled_from([True, True, True, False]),
        st.sampled_from([True, True, True, False]),
    )
    def whatever_comes(
        asked, max_rows, max_waiting_rows, instances, max_delay_s, joins, hold
    ) -> None:
        limits = {
            "max_rows": max_rows,
            "max_waiting_rows": max_waiting_rows,
            "instances": instances,
            "max_delay_s": max_delay_s,
        }
        asyncio.run(ask_all(asked, limits, joins=joins, hold=hold, met=met))

    whatever_comes()
    # Neighbours did meet, and some of them failed.
    assert met["joined"] > 60
    assert met["joined and failed"] > 20


async def ask_all(asked, limits, *, joins: bool, hold: bool, met: Counter[str]) -> None:
    doubler = Doubler()
    answer = doubler.answer
    runs: list[list[int]] = []

    def noted(tensors):
        # Each row says whose it is: no asker's rows may be torn apart or run in disorder.
        first = tensors["i0"][:, 0]
        runs.append((np.abs(first) // 100).astype(int).tolist())
        if len(set(runs[-1])) > 1:
            met["joined"] += 1
            met["joined and failed"] += bool((first < 0).any())
        return answer(tensors)

    doubler.answer = noted

    def tensors_of(i: int, one):
        sign = -1 if one["does"] == "fails" else 1
        marks = 100 * (i + 1) + np.arange(one["rows"], dtype=np.float64)
        wide = np.repeat(marks[:, None], one["width"], axis=1)
        return {f"i{k}": sign * (wide + 10_000 * k) for k in range(one["inputs"])}

    async with batching(doubler, joins=joins, **limits) as batcher:
        if hold:
            doubler.go_on.clear()
        tasks = []
        for i, one in enumerate(asked):
            deadline = {"is late": time.monotonic() + 0.005, "has time": time.monotonic() + 90}
            work = batcher.submit(tensors_of(i, one), deadline.get(one["does"]))
            tasks.append(asyncio.create_task(work))
            for _ in range(one["turns"]):
                await asyncio.sleep(0)
        for one, task in zip(asked, tasks, strict=True):
            if one["does"] == "leaves":
                task.cancel()
        if hold:
            # What waits and is late goes although nothing else moves.
            await until(
                lambda: (
                    not any(
                        a.deadline_ns and a.deadline_ns < time.monotonic_ns() - 50_000_000
                        for a in batcher._waiting
                    )
                )
            )
            doubler.go_on.set()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert (batcher.rows_waiting, len(batcher._waiting)) == (0, 0)
        # What runs may run for nobody any more.
        await until(lambda: not batcher._running)
        statistics = batcher._statistics.message()

    allowed = {
        "runs": (),
        "has time": (),
        "fails": (Unprocessable,),
        "leaves": (asyncio.CancelledError,),
        "is late": (DeadlineExceeded,),
    }
    for i, (one, result) in enumerate(zip(asked, done, strict=True)):
        if isinstance(result, Overloaded):
            assert limits["max_waiting_rows"] < 4_096
            assert i + 1 not in {owner for run in runs for owner in run}
            continue
        if isinstance(result, BaseException):
            assert isinstance(result, allowed[one["does"]]), (one, result)
            if isinstance(result, DeadlineExceeded):
                continue
        else:
            assert one["does"] != "fails"
            for name, array in tensors_of(i, one).items():
                assert result.outputs[f"2{name}"].tolist() == (2 * array).tolist()
            assert result.queue_ns >= 0
            assert result.compute_ns > 0
    for run in runs:
        owners = list(dict.fromkeys(run))
        # Whole, next to each other, in the order in which they came.
        assert owners == sorted(owners)
        assert run == [o for o in owners for _ in range(asked[o - 1]["rows"])]
        assert len(owners) == 1 or (joins and len(run) <= limits["max_rows"])
    assert doubler.most_at_once <= limits["instances"]
    # Every asker is counted once. Who left may have had outputs at the same moment, or may
    # never have begun to ask.
    success, fail = (
        statistics.inference_stats.success.count,
        statistics.inference_stats.fail.count,
    )
    got = sum(not isinstance(one, BaseException) for one in done)
    failed = sum(isinstance(one, BusError) for one in done)
    left = len(done) - got - failed
    assert got <= success <= got + left
    assert failed <= fail <= failed + left
    assert success + fail <= len(done)

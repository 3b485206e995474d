"""What models were asked is counted as Triton counts it, and adds up over instances."""

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus import codec
from bus import messages as m
from bus.errors import Unprocessable
from bus.statistics import sum_statistics
from services.candle.serving.batcher import Batcher
from services.candle.serving.joining import Limits
from services.candle.serving.statistics import Statistics

durations = st.builds(m.DurationStat, count=st.integers(0, 99), ns=st.integers(0, 1 << 40))
stats = st.builds(
    m.ModelStatistics,
    name=st.sampled_from(["iris", "mnist"]),
    version=st.sampled_from(["1", "2"]),
    last_inference=st.integers(0, 1 << 42),
    inference_count=st.integers(0, 1 << 40),
    execution_count=st.integers(0, 1 << 40),
    inference_stats=st.builds(
        m.InferenceStats,
        **dict.fromkeys(
            ["success", "fail", "queue", "compute_input", "compute_infer", "compute_output"],
            durations,
        ),
    ),
    batch_stats=st.lists(
        st.builds(
            m.BatchStat,
            batch_size=st.integers(1, 5),
            compute_input=durations,
            compute_infer=durations,
            compute_output=durations,
        ),
        max_size=4,
        unique_by=lambda one: one.batch_size,
    ).map(lambda each: sorted(each, key=lambda one: one.batch_size)),
    failures=st.dictionaries(
        st.sampled_from(["overloaded", "internal", "cancelled"]), st.integers(1, 9)
    ),
    queue_rows=st.integers(0, 999),
    threads=st.integers(0, 9),
    instances=st.integers(0, 9),
)


def ran(statistics: Statistics, requests: int, rows: int, queue_ns: int = 0) -> None:
    statistics.ran(
        requests=requests, rows=rows, queue_ns=queue_ns, input_ns=1, infer_ns=100, output_ns=10
    )


def test_each_request_of_a_batch_waited_for_all_of_it_and_the_batch_ran_once():
    statistics = Statistics("iris", "3")
    ran(statistics, requests=2, rows=5, queue_ns=7_000)
    ran(statistics, requests=1, rows=5)
    told = statistics.message(queue_rows=4, threads=2, instances=1)
    assert (told.name, told.version, told.inference_count, told.execution_count) == (
        "iris", "3", 10, 2,
    )  # fmt: skip
    assert told.inference_stats == m.InferenceStats(
        success=m.DurationStat(count=3, ns=7_000 + 3 * 111),
        queue=m.DurationStat(count=3, ns=7_000),
        compute_input=m.DurationStat(count=3, ns=3),
        compute_infer=m.DurationStat(count=3, ns=300),
        compute_output=m.DurationStat(count=3, ns=30),
    )
    assert told.batch_stats == [
        m.BatchStat(
            batch_size=5,
            compute_input=m.DurationStat(count=2, ns=2),
            compute_infer=m.DurationStat(count=2, ns=200),
            compute_output=m.DurationStat(count=2, ns=20),
        )
    ]
    assert (told.queue_rows, told.threads, told.instances) == (4, 2, 1)


def test_failures_are_told_by_their_code():
    statistics = Statistics("iris")
    statistics.failed("overloaded")
    statistics.failed("deadline-exceeded", 500)
    statistics.failed("overloaded", 20)
    told = statistics.message()
    assert told.failures == {"overloaded": 2, "deadline-exceeded": 1}
    assert told.inference_stats.fail == m.DurationStat(count=3, ns=520)
    assert told.last_inference == 0


def test_the_last_inference_is_told_in_milliseconds_since_1970():
    statistics = Statistics("iris")
    before = time.time_ns() // 1_000_000
    ran(statistics, requests=1, rows=1)
    assert before <= statistics.message().last_inference <= time.time_ns() // 1_000_000


@given(st.lists(st.integers(1, 1 << 20), max_size=300))
def test_whatever_sizes_come_few_are_told_and_no_run_is_lost(sizes):
    statistics = Statistics("iris")
    for size in sizes:
        ran(statistics, requests=1, rows=size)
    told = statistics.message().batch_stats
    assert len(told) <= 256 + 12
    assert sum(one.compute_infer.count for one in told) == len(sizes)
    assert {one.batch_size for one in told if one.batch_size <= 256} == {
        size for size in sizes if size <= 256
    }
    assert [one.batch_size for one in told] == sorted(one.batch_size for one in told)


def test_every_field_of_triton_is_written_even_at_zero():
    written = json.loads(codec.encode(m.ModelStatistics(batch_stats=[m.BatchStat()])))
    zero = {"count": 0, "ns": 0}
    assert written["inference_stats"] == dict.fromkeys(
        ["success", "fail", "queue", "compute_input", "compute_infer", "compute_output"], zero
    )
    assert written["batch_stats"] == [
        {"batch_size": 0, "compute_input": zero, "compute_infer": zero, "compute_output": zero}
    ]
    assert {"name", "version", "last_inference", "inference_count", "execution_count"} <= {*written}


@given(st.lists(stats, min_size=1, max_size=3), st.lists(stats, min_size=1, max_size=3))
def test_sums_do_not_depend_on_the_order_or_the_grouping(some, others):
    total = sum_statistics([*some, *others])
    assert sum_statistics([*others, *some]) == total
    assert sum_statistics([sum_statistics(some), sum_statistics(others)]) == total


@given(stats)
def test_the_sum_of_one_is_itself(one):
    assert sum_statistics([one]) == one


def test_nothing_adds_up_to_zeros():
    assert sum_statistics([]) == m.ModelStatistics()


def test_replicas_add_up_and_only_what_they_agree_on_keeps_its_name():
    first, second = Statistics("iris", "1"), Statistics("iris", "2")
    ran(first, requests=1, rows=2)
    ran(second, requests=3, rows=4)
    first.failed("internal")
    second.failed("internal")
    total = sum_statistics(
        [first.message(threads=1, instances=2), second.message(threads=2, instances=2)]
    )
    assert (total.name, total.version) == ("iris", "")
    assert (total.inference_count, total.execution_count, total.failures) == (6, 2, {"internal": 2})
    assert [one.batch_size for one in total.batch_stats] == [2, 4]
    assert total.last_inference == max(first.last_inference, second.last_inference)
    assert (total.threads, total.instances) == (3, 4)


async def test_a_batcher_counts_what_it_ran_and_what_it_refused():
    statistics = Statistics("iris")

    def run(tensors):
        if (tensors["x"] < 0).any():
            raise Unprocessable("negative")
        return tensors

    with ThreadPoolExecutor(1) as threads:
        batcher = Batcher(
            run, joins=True, limits=Limits(), name="iris", statistics=statistics, threads=threads
        )
        running = asyncio.create_task(batcher.run())
        await batcher.submit({"x": np.ones((3, 2))})
        with pytest.raises(Unprocessable):
            await batcher.submit({"x": -np.ones((1, 2))})
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    told = statistics.message()
    assert (told.inference_count, told.execution_count) == (3, 1)
    assert told.failures == {"unprocessable": 1}
    assert told.inference_stats.success.count == told.inference_stats.fail.count == 1
    assert told.inference_stats.success.ns >= told.inference_stats.compute_infer.ns > 0

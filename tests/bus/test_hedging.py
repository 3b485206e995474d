"""What may be asked twice: copies that find out, late answers, and what neither may cost."""

import asyncio
import dataclasses
import socket
import time

import pytest
import uvloop

from bus import balance
from bus.balance import GROUP, Balance, Choice
from bus.client import IDEMPOTENT
from bus.errors import DeadlineExceeded, Internal, InvalidRequest, Overloaded
from bus.hedging import COPIED_MAX_BYTES
from bus.instance import join
from bus.late import HELD_UP_S, Late
from bus.subjects import ENDPOINTS, MODEL_INFER, RAW_ENDPOINTS
from bus.testing import until
from bus.wire import Incoming
from tests.bus.pairs import Two, two

A, B = "candle.0", "candle.1"
ONCE = dataclasses.replace(MODEL_INFER, idempotent=False)

# --- Who is asked, when, and how often ------------------------------------------------------------


def balanced(*each_ms: float, idempotent: bool = True) -> Balance:
    """Return a balance that knows so many slots, and draws nothing at random."""
    made = Balance(draw=lambda: 0.999)
    for i, took_ms in enumerate(each_ms):
        made.ended("s", None, "answered", 0, f"candle.{i}", took_ms / 1e3, idempotent)
    return made


def test_a_slow_instance_is_sent_a_copy_and_the_request_goes_to_the_fast_one():
    both = balanced(1, 50)
    asked = [both.choose("s", 1.1, 1) for _ in range(3)]
    assert [(one.slot, one.copy) for one in asked] == [(A, B), (A, None), (A, None)]


def test_what_cannot_be_sent_twice_is_the_probe_itself():
    assert balanced(1, 50).choose("s", 1.1) == Choice(B)
    assert balanced(1, 50, idempotent=False).choose("s", 1.1, 1) == Choice(B)


def test_others_are_looked_for_with_a_copy():
    both = balanced(1, 1)
    both._draw = lambda: 0.9 / balance.EXPLORE
    found = both.choose("s", 0, 1)
    assert found.slot in {A, B}
    assert found.copy == GROUP
    assert both.choose("s", 0) is None


def test_all_known_instances_have_to_say_that_they_may_be_asked_twice():
    both = balanced(1, 50)
    both.ended("s", None, "answered", 0, A, 0.001, False)
    assert both.choose("s", 1.1, 1) == Choice(B)
    both.ended("s", B, "gone", 1.2)
    both.ended("s", None, "answered", 1.2, A, 0.001, True)
    both.ended("s", None, "answered", 1.2, B, 0.001, True)
    assert both.choose("s", 1.3, 1).late_s


def test_an_answer_is_late_after_a_multiple_of_what_is_expected():
    assert balanced(10, 10).choose("s", 0, 1).late_s == pytest.approx(balance.LATE * 0.01)
    assert balanced(0.1, 0.1).choose("s", 0, 1).late_s == balance.LATE_MIN_S


def test_where_the_others_are_as_late_none_is_asked():
    both = balanced(10, 10)
    assert {both.choose("s", 0, 1).slot, both.choose("s", 0, 1).slot} == {A, B}
    assert both.more("s", A, 0.03, 0.03) is None
    both.ended("s", B, "answered", 0.03, B, 0.01, True)
    assert both.more("s", A, 0.031, 0.031) == B


def test_a_busy_one_is_not_asked_for_a_late_answer():
    both = balanced(10, 10)
    both.ended("s", B, "busy", 0, B)
    assert both.more("s", A, 0.03, 0.03) is None


def test_late_answers_are_had_from_others_within_what_answers_earn():
    both = balanced(1, 1)

    def asked() -> int:
        count = 0
        while both.more("s", A, 10, 0) == B:
            both.ended("s", B, "dropped", 0)
            count += 1
        return count

    assert asked() == balance.SAVED_MAX
    for _ in range(200):
        both.ended("s", A, "answered", 0, A, 0.001, True)
    assert asked() == pytest.approx(200 * balance.EARNED, abs=1)
    for _ in range(10_000):
        both.ended("s", A, "answered", 0, A, 0.001, True)
    assert asked() == balance.SAVED_MAX


def test_what_is_larger_than_usual_may_take_longer_and_costs_more():
    both = balanced(10, 10)
    for _ in range(300):
        both.ended("s", both.choose("s", 0, 100).slot, "dropped", 0)
    large = both.choose("s", 0, 1_000)
    assert large.weight == pytest.approx(10, rel=0.01)
    assert large.late_s == pytest.approx(10 * balance.LATE * 0.01, rel=0.01)
    both.ended("s", large.slot, "dropped", 0)
    asked = [both.more("s", A, 10, 0, large.weight) for _ in range(4)]
    assert asked == [B, B, B, None]


def test_only_what_changes_nothing_may_be_asked_twice():
    said = {one.capability for one in (*ENDPOINTS, *RAW_ENDPOINTS) if one.idempotent}
    assert said == {
        "candle.model.infer", "candle.model.run", "candle.stats",
        "faces.detect", "faces.verify", "faces.search", "faces.sheet",
    }  # fmt: skip


# --- The timer ------------------------------------------------------------------------------------


class Waits:
    def __init__(self, *again_s: float | None) -> None:
        self.told = 0
        self._again = list(again_s)

    def is_late(self) -> float | None:
        self.told += 1
        return self._again.pop(0) if self._again else None


async def test_each_is_told_in_its_time_and_again_as_it_says():
    late = Late()
    soon, later, gone = Waits(0.001, 0.001), Waits(), Waits()
    late.watch(later, 60)
    late.watch(gone, 0.01)
    late.watch(soon, 0.01)
    late.forget(gone)
    await until(lambda: soon.told == 3)
    assert (later.told, gone.told) == (0, 0)
    late.close()


def test_nobody_is_late_before_what_came_while_this_process_was_held_up_is_read():
    async def answered_meanwhile() -> None:
        loop, late, waits = asyncio.get_running_loop(), Late(), Waits()
        here, there = socket.socketpair()
        read = []

        def on_readable() -> None:
            read.append((here.recv(1), waits.told))
            if len(read) == 1:
                # What comes next is there by the time that this is done.
                there.send(b"2")
                late.watch(waits, 0.01)
                time.sleep(0.02 + 10 * HELD_UP_S)
            else:
                late.forget(waits)

        with here, there:
            loop.add_reader(here, on_readable)
            there.send(b"1")
            await until(lambda: len(read) == 2)
            loop.remove_reader(here)
        assert read == [(b"1", 0), (b"2", 0)]
        late.close()

    # It looks at timers before it looks at sockets again.
    uvloop.run(answered_meanwhile())


# --- Over the bus ---------------------------------------------------------------------------------


@pytest.fixture
async def pair(client, connected, settings):
    async with two(client, connected, settings) as made:
        yield made
        for event in made.go_on:
            event.set()


async def test_nobody_waits_for_the_answer_to_a_copy(client, pair: Two):
    pair.expect(0.001, 1.0)
    pair.go_on[1].clear()
    assert (await client.relay(pair.subject, b"x", timeout_s=60)).body == b"0"
    await until(lambda: pair.counts == {0: 1, 1: 1})
    of_both = [call for _, call in pair.calls]
    assert [call.body for call in of_both] == [b"x", b"x"]
    assert len({call.headers["traceparent"] for call in of_both}) == 1
    assert pair.in_flight(1) == 1
    # What comes of it tells how fast that one is.
    pair.go_on[1].set()
    await until(lambda: pair.in_flight(1) == 0)
    assert pair.balance._subjects[pair.subject].slots[B].each_s < 0.5


async def test_copies_count_at_who_is_asked_and_fail_nowhere(client, pair: Two):
    pair.expect(0.001, 1.0)
    await pair.ask(5)
    await until(lambda: pair.counts == {0: 5, 1: 1})
    served = [one._asked.served[pair.subject] for one in pair.instances]
    await until(lambda: all(one.calls.in_flight == 0 for one in served))
    assert [(one.requests, one.errors) for one in served] == [(5, 0), (1, 0)]
    # Nothing is left of those that were answered in time.
    assert not client._asker.late._due


async def test_whoever_the_broker_picks_is_found_by_a_copy(client, pair: Two):
    pair.expect(0.001, 0.001)
    pair.go_on[1].clear()
    pair.balance.ended(pair.subject, B, "busy", time.perf_counter() + 600, B)
    # Each looks for others: half of the copies reach the one that is held, and hold nobody up.
    pair.balance._draw = lambda: 0.0
    async with asyncio.timeout(60):
        while pair.counts[1] < 5:
            await pair.ask()


async def test_what_does_not_say_so_is_never_asked_twice(client, connected, settings):
    async with two(client, connected, settings, ONCE) as made:
        await made.known()
        made.expect(0.001, 1.0, idempotent=False)
        made.counts.clear()
        made.go_on[1].clear()
        # It goes to the slow one itself.
        asked = asyncio.create_task(client.relay(made.subject, b"", timeout_s=60))
        await until(lambda: made.counts[1] == 1)
        await made.ask(5)
        assert not asked.done()
        assert made.counts == {0: 5, 1: 1}
        made.go_on[1].set()
        answer = await asked
        assert answer.body == b"1"
        assert IDEMPOTENT not in answer.headers


async def test_workers_say_that_they_may_be_asked_twice(client, pair: Two):
    answer = await client.relay(pair.subject, b"")
    assert answer.headers[IDEMPOTENT] == "1"


async def test_a_large_body_is_sent_once(client, pair: Two):
    pair.expect(0.001, 1.0)
    body = bytes(COPIED_MAX_BYTES + 1)
    assert (await client.relay(pair.subject, body, timeout_s=60)).body == b"1"
    assert pair.counts == {1: 1}


async def test_a_late_answer_is_had_from_somebody_else(client, pair: Two):
    pair.expect(0.001, 0.001, first=1)
    pair.go_on[1].clear()
    outcomes = []
    client.ask(pair.subject, b"", outcomes.append, timeout_s=60)
    await until(lambda: outcomes)
    assert pair.counts == {0: 1, 1: 1}
    # It comes all the same, and tells how slow that one is; whoever asked hears of one answer.
    assert pair.in_flight(1) == 1
    pair.go_on[1].set()
    await until(lambda: pair.in_flight(1) == 0)
    assert [one.body for one in outcomes] == [b"0"]
    served = pair.instances[1]._asked.served[pair.subject]
    assert (served.requests, served.errors) == (1, 0)


async def test_who_is_gone_by_the_time_its_answer_counts_for_nothing_is_not_replaced(
    client, pair: Two
):
    pair.expect(0.001, 0.001, first=1)
    pair.go_on[1].clear()
    outcomes = []
    asked = client.ask(pair.subject, b"", outcomes.append, timeout_s=60)
    await until(lambda: outcomes)
    client._replies.give(asked.inbox, Incoming(asked.inbox, "", b"", {"Status": "503"}))
    assert pair.balance.known(pair.subject) == {A}
    pair.go_on[1].set()
    await pair.ask()
    assert sum(pair.counts.values()) == 3
    assert len(outcomes) == 1


async def test_no_error_of_the_other_reaches_the_caller_while_the_first_may_answer(
    client, pair: Two
):
    for number, error in enumerate([Internal("it broke"), Overloaded("it is full")], 1):
        pair.expect(0.001, 0.001, first=1)
        pair.go_on[1].clear()
        pair.fails[0] = error
        asked = asyncio.create_task(client.relay(pair.subject, b"", timeout_s=60))
        failed = pair.instances[0]._asked.served[pair.subject]
        await until(lambda failed=failed, number=number: failed.errors == number)
        await until(lambda: pair.in_flight(0) == 0)
        assert not asked.done()
        pair.go_on[1].set()
        assert (await asked).body == b"1"
    # Nor is anybody asked for it in turn.
    assert pair.counts == {0: 2, 1: 2}


async def test_an_error_that_another_may_not_have_waits_for_the_other(client, pair: Two):
    pair.expect(0.001, 0.001, first=1)
    for event in pair.go_on:
        event.clear()
    pair.fails[1] = Overloaded("it is full")
    asked = asyncio.create_task(client.relay(pair.subject, b"", timeout_s=60))
    await until(lambda: pair.counts == {0: 1, 1: 1})
    pair.go_on[1].set()
    await until(lambda: pair.in_flight(1) == 0)
    assert not asked.done()
    pair.go_on[0].set()
    assert (await asked).body == b"0"
    assert pair.counts == {0: 1, 1: 1}


async def test_where_both_fail_the_first_error_counts(client, pair: Two):
    pair.expect(0.001, 0.001, first=1)
    for event in pair.go_on:
        event.clear()
    pair.fails |= {1: Internal("the first"), 0: InvalidRequest("the other")}
    asked = asyncio.create_task(client.relay(pair.subject, b"", timeout_s=60))
    await until(lambda: pair.counts == {0: 1, 1: 1})
    pair.go_on[1].set()
    await until(lambda: pair.in_flight(1) == 0)
    pair.go_on[0].set()
    with pytest.raises(Internal, match="the first"):
        await asked


async def test_what_is_wrong_with_the_request_is_said_at_once(client, pair: Two):
    pair.expect(0.001, 0.001, first=1)
    for event in pair.go_on:
        event.clear()
    pair.fails[1] = InvalidRequest("it is no tensor")
    asked = asyncio.create_task(client.relay(pair.subject, b"", timeout_s=60))
    await until(lambda: pair.counts == {0: 1, 1: 1})
    pair.go_on[1].set()
    with pytest.raises(InvalidRequest, match="it is no tensor"):
        await asked
    assert pair.in_flight(0) == 1


async def test_who_goes_away_ends_both(client, pair: Two):
    pair.expect(0.001, 0.001, first=1)
    for event in pair.go_on:
        event.clear()
    asked = client.ask(pair.subject, b"", pytest.fail, timeout_s=60)
    await until(lambda: pair.counts == {0: 1, 1: 1})
    asked.cancel()
    await until(lambda: pair.left == {0: 1, 1: 1})
    assert [pair.in_flight(number) for number in (0, 1)] == [0, 0]


async def test_who_goes_away_after_the_first_has_failed_ends_the_other(client, pair: Two):
    pair.expect(0.001, 0.001, first=1)
    for event in pair.go_on:
        event.clear()
    pair.fails[1] = Internal("it broke")
    asked = client.ask(pair.subject, b"", pytest.fail, timeout_s=60)
    await until(lambda: pair.counts == {0: 1, 1: 1})
    pair.go_on[1].set()
    await until(lambda: pair.in_flight(1) == 0)
    # It has another one by now.
    pair.balance._subjects[pair.subject].slots[B].sent(time.perf_counter())
    asked.cancel()
    await until(lambda: pair.left == {0: 1})
    assert [pair.in_flight(number) for number in (0, 1)] == [0, 1]


async def test_time_out_of_both_is_one_error_and_ends_the_work(client, pair: Two):
    pair.expect(0.001, 0.001, first=1)
    for event in pair.go_on:
        event.clear()
    with pytest.raises(DeadlineExceeded, match=r"no answer within 0\.5 s"):
        await client.relay(pair.subject, b"", timeout_s=0.5)
    await until(lambda: pair.left == {0: 1, 1: 1})
    assert not pair.balance.known(pair.subject)


async def test_a_wholly_stalled_fleet_is_asked_little_more_than_once_for_each_request(
    client, pair: Two
):
    pair.expect(0.001, 0.001)
    for event in pair.go_on:
        event.clear()
    asked = [asyncio.create_task(pair.ask()) for _ in range(200)]
    await until(lambda: pair.instances[0]._asked.oldest_s() > 0.5)
    assert 200 <= sum(pair.counts.values()) <= 200 + balance.SAVED_MAX
    for event in pair.go_on:
        event.set()
    await asyncio.gather(*asked)


async def test_one_instance_alone_is_never_asked_the_same_twice(client, connected, settings):
    made = Two(client, MODEL_INFER)
    async with (
        join(await connected(), settings, plugin="candle", description="a test") as one,
        one.serving_raw(MODEL_INFER, made.handler(0), "m"),
    ):
        await made.ask(600)
        assert made.counts[0] == 600
        made.go_on[0].clear()
        asked = asyncio.create_task(made.ask())
        await until(lambda: one._asked.oldest_s() > 0.3)
        assert made.counts[0] == 601
        made.go_on[0].set()
        await asked


async def test_a_copy_to_one_that_serves_it_no_longer_costs_nobody_anything(client, pair: Two):
    pair.expect(0.001, 1.0)
    await pair.leave()
    await pair.ask()
    await until(lambda: pair.balance.known(pair.subject) == {A})
    assert pair.counts == {0: 1}

"""Which instance is asked: the rule by table and property, and what a caller sees of it."""

import asyncio
import contextlib
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.msg import Msg

from bus import balance, serving
from bus import messages as m
from bus.balance import Balance
from bus.client import NOT_SERVED, SLOT, Client
from bus.errors import NobodyListens, Overloaded
from bus.instance import join
from bus.subjects import CANDLE_STATS, MODEL_INFER
from bus.testing import until
from tests.bus.pairs import Two, two

A, B, C = "candle.0", "candle.1", "candle.2"


def never() -> float:
    """Draw what never explores, and keeps the first of equals."""
    return 0.999


def balanced(now: float = 0.0, **latencies_ms: float) -> Balance:
    """Return a balance that knows slots by their number: `_0=1.5`."""
    made = Balance(draw=never)
    for name, latency_ms in latencies_ms.items():
        slot = f"candle.{name[1:]}"
        made.ended("s", None, "answered", now, by=slot, took_s=latency_ms / 1e3)
    return made


def asks(made: Balance, now: float, subject: str = "s", *, again: bool = False) -> str | None:
    """Return the slot that is asked; None: the group."""
    choice = made.choose(subject, now, again=again)
    return choice and choice.slot


def test_with_one_known_instance_the_broker_picks():
    assert Balance().choose("s", 0) is None
    assert balanced(_0=1).choose("s", 0) is None


def test_of_equal_instances_the_one_with_the_fewest_requests_is_asked():
    both = balanced(_0=10, _1=15)
    assert Counter(asks(both, 0.001) for _ in range(10)) == {A: 5, B: 5}
    both.ended("s", B, "answered", 0.002, by=B, took_s=0.015)
    assert asks(both, 0.002) == B


def test_equals_are_drawn_at_random():
    drawn = set()
    for draw in (0.1, 0.9):
        both = balanced(_0=10, _1=10)
        both._draw = lambda value=draw: value
        drawn.add(asks(both, 0))
    assert drawn == {A, B}


def test_a_slow_instance_gets_one_probe_a_second_and_no_second_one_while_that_lasts():
    both = balanced(_0=1, _1=50)
    asked = [asks(both, 0.5) for _ in range(3)]
    assert asked == [A, A, A]
    for _ in asked:
        both.ended("s", A, "answered", 0.501, by=A, took_s=0.001)
    assert asks(both, 1.1) == B
    assert asks(both, 2.2) == A
    both.ended("s", B, "answered", 2.3, by=B, took_s=0.05)
    both.ended("s", A, "answered", 2.3, by=A, took_s=0.001)
    assert asks(both, 2.3) == B
    both.ended("s", B, "answered", 2.35, by=B, took_s=0.05)
    assert asks(both, 2.4) == A


def test_an_instance_that_has_become_fast_is_found_by_its_probes():
    both = balanced(_0=10, _1=500)
    now = 0.0
    for _ in range(8):
        now += 1.1
        slot = asks(both, now)
        both.ended("s", slot, "answered", now, by=slot, took_s=0.01)
        slot = asks(both, now)
        both.ended("s", slot, "answered", now, by=slot, took_s=0.01)
    assert {asks(both, now), asks(both, now)} == {A, B}


def test_an_instance_that_hangs_gets_no_more_once_its_answer_is_late():
    both = balanced(_0=5, _1=5)
    assert {asks(both, 0.0), asks(both, 0.0)} == {A, B}
    both.ended("s", A, "answered", 0.005, by=A, took_s=0.005)
    for i in range(1, 200):
        assert asks(both, i / 10) == A
        both.ended("s", A, "answered", i / 10 + 0.005, by=A, took_s=0.005)


def test_differences_below_a_millisecond_count_for_nothing():
    both = balanced(_0=0.2, _1=0.9)
    assert {asks(both, 0), asks(both, 0)} == {A, B}


def test_a_busy_instance_is_passed_over_for_a_while():
    both = balanced(_0=1, _1=1)
    assert asks(both, 0) == A
    both.ended("s", A, "busy", 0, by=A)
    assert asks(both, 0.05, again=True) == B
    assert asks(both, 0.05) == B
    both.ended("s", B, "busy", 0.05, by=B)
    assert asks(both, 0.06) is None
    assert asks(both, 0.11) == A


def test_one_that_is_known_alone_is_asked_when_another_was_busy():
    one = balanced(_0=1)
    assert asks(one, 0, again=True) == A


def test_one_that_alone_has_answered_the_group_often_is_alone():
    made = Balance()
    for answers in range(1, balance.ALONE + 2):
        made.ended("s", None, "answered", 0, by=A, took_s=0.001)
        assert made.alone("s", A) == (answers > balance.ALONE)
    assert not made.alone("s", B)
    assert not made.alone("another", A)
    made.ended("s", None, "answered", 0, by=B, took_s=0.001)
    assert not made.alone("s", A)


def test_whether_one_is_alone_is_not_known_when_another_has_just_been_forgotten():
    """It may be back already, and idle."""
    made = balanced(_0=1, _1=1)
    for _ in range(balance.ALONE + 1):
        made.ended("s", A, "answered", 0, by=A, took_s=0.001)
    made.ended("s", B, "gone", 0)
    assert not made.alone("s", A)
    for _ in range(balance.ALONE):
        made.ended("s", None, "answered", 0, by=A, took_s=0.001)
    assert made.alone("s", A)


def test_an_instance_that_is_gone_is_forgotten():
    three = balanced(_0=1, _1=1, _2=1)
    assert asks(three, 0) == A
    three.ended("s", A, "gone", 0)
    assert three.known("s") == {B, C}


def test_one_request_in_many_looks_for_others():
    both = balanced(_0=1, _1=1)
    both._draw = lambda: 0.9 / balance.EXPLORE
    assert asks(both, 0) is None


def test_a_subject_that_somebody_without_a_slot_answers_is_left_to_the_broker():
    both = balanced(_0=1, _1=1)
    both.ended("s", None, "answered", 1, by=None, took_s=0.001)
    for slot in (A, B):
        both.ended("s", None, "answered", 2, by=slot, took_s=0.001)
    assert asks(both, 2) is None
    later = 1 + balance.FOREIGN_S
    for slot in (A, B):
        both.ended("s", None, "answered", later, by=slot, took_s=0.001)
    assert asks(both, later) in {A, B}


@pytest.mark.parametrize("name", ["", "x", "a.>", "a.*", "a b.1", "A.1", "a.1.2", "a.-1"])
def test_what_is_no_slot_is_not_learned(name):
    made = Balance()
    made.ended("s", None, "answered", 0, by=name, took_s=1)
    assert not made.known("s")


def test_subjects_and_slots_are_bounded_and_the_least_used_leaves():
    made = Balance(subjects_max=3, draw=never)
    for i in range(4):
        made.ended(f"s{i}", None, "answered", 0, by=A, took_s=1)
        made.choose("s0", 0)
    assert [s for s in ("s0", "s1", "s2", "s3") if made.known(s)] == ["s0", "s2", "s3"]
    for i in range(balance.SLOTS_MAX + 5):
        made.ended("s3", None, "answered", 0, by=f"candle.{i}", took_s=1)
    assert len(made.known("s3")) == balance.SLOTS_MAX


_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["s", "t"]),
        st.sampled_from(["answered", "failed", "busy", "gone", "dropped"]),
        st.sampled_from([A, B, C, None]),
        st.floats(0, 3),
        st.floats(0, 5),
        st.booleans(),
    ),
    max_size=60,
)


@given(_STEPS, st.randoms(use_true_random=False))
def test_whatever_happens_only_known_slots_are_asked_and_requests_are_counted(steps, chance):
    made = Balance(subjects_max=2, draw=chance.random)
    open_: list[tuple[str, str | None, str]] = []
    now = 0.0
    for subject, outcome, by, took_s, passed_s, end in steps:
        now += passed_s
        known = made.known(subject)
        slot = asks(made, now, subject, again=outcome == "busy")
        assert slot is None or slot in known
        if slot:
            assert made._subjects[subject].slots[slot].busy_until <= now
        open_.append((subject, slot, outcome))
        if end:
            at, asked, _ = open_.pop(0)
            made.ended(at, asked, outcome, now, by=by, took_s=took_s)
    for at, asked, _ in open_:
        made.ended(at, asked, "dropped", now)
    left = [s.in_flight for found in made._subjects.values() for s in found.slots.values()]
    assert all(count == 0 for count in left)


@given(st.lists(st.floats(0.0001, 10), min_size=2, max_size=8), st.integers(1, 50))
def test_of_those_that_are_about_as_fast_the_one_with_the_fewest_requests_is_asked(times, count):
    made = Balance(draw=never)
    for i, took_s in enumerate(times):
        made.ended("s", None, "answered", 0, by=f"p.{i}", took_s=took_s)
    slots = made._subjects["s"].slots
    for _ in range(count):
        expected = {name: slot.expected_s(0) for name, slot in slots.items()}
        best_s = min(expected.values())
        limit_s = max(balance.BAND * best_s, best_s + balance.FINE_S)
        inside = {n: slots[n].in_flight for n, one_s in expected.items() if one_s <= limit_s}
        chosen = asks(made, 0)
        assert chosen in inside
        assert inside[chosen] == min(inside.values())


@given(st.floats(1, 30), st.integers(2, 64))
def test_a_slow_instance_is_sent_what_it_can_answer_as_soon_as_the_fast_one(factor, callers):
    """Two servers that work on one request after the other, one slower, and a full house."""
    made = Balance(draw=never)
    service_s = {A: 0.01, B: 0.01 * factor}
    free_at = dict.fromkeys(service_s, 0.0)
    for slot, took_s in service_s.items():
        made.ended("s", None, "answered", 0, by=slot, took_s=took_s)
    flying: list[tuple[float, str, float]] = []
    now, slowest_s = 0.0, 0.0
    for i in range(callers + 600):
        if i >= callers:
            flying.sort()
            now, slot, sent = flying.pop(0)
            made.ended("s", slot, "answered", now, by=slot, took_s=now - sent)
            if i > callers + 300:
                slowest_s = max(slowest_s, now - sent)
        slot = asks(made, now)
        assert slot is not None
        free_at[slot] = max(now, free_at[slot]) + service_s[slot]
        flying.append((free_at[slot], slot, now))
    # All at the fast one: callers times its time. A probe of the slow one takes its own.
    assert slowest_s <= max(balance.BAND * callers * 0.01, service_s[B]) + 0.02 * factor


# --- Over the bus ---------------------------------------------------------------------------------


async def test_requests_go_round_an_instance_that_is_held(client, connected, settings):
    """By chance alone, half of them would wait with it."""
    async with two(client, connected, settings) as made:
        await made.known()
        made.go_on[1].clear()
        held = [asyncio.create_task(made.ask()) for _ in range(20)]
        await until(lambda: made.counts[1] > 0 and made.instances[0].in_flight == 0)
        await until(lambda: made.instances[1]._asked.oldest_s() > 0.1)
        before = made.counts.copy()
        # One in 256 looks for others by the group, and may find the one that is held.
        callers = [asyncio.create_task(made.ask(20)) for _ in range(10)]
        await until(lambda: made.counts[0] - before[0] > 100, timeout_s=60)
        assert made.counts[1] - before[1] <= 20
        made.go_on[1].set()
        await asyncio.gather(*held, *callers)


async def test_a_model_that_leaves_one_instance_costs_no_request(client, connected, settings):
    stop = False

    async with two(client, connected, settings) as made:

        async def keep_asking() -> None:
            while not stop:
                await made.ask()

        await made.known()
        callers = [asyncio.create_task(keep_asking()) for _ in range(20)]
        await until(lambda: made.counts[1] > 50, timeout_s=60)
        await made.leave()
        before = made.counts[0]
        await until(lambda: made.counts[0] > before + 200, timeout_s=60)
        stop = True
        await asyncio.gather(*callers)


async def test_an_instance_that_is_gone_costs_no_request(client, connected, settings):
    async with two(client, connected, settings) as made:
        await made.known()
    async with (
        join(client, settings, plugin="candle", description="a test") as a,
        a.serving_raw(MODEL_INFER, made.handler(0), "m"),
    ):
        async with asyncio.timeout(60):
            while client._asker.balance.known(made.subject) != {"candle.0"}:
                await made.ask()


async def test_a_busy_instance_is_not_seen_where_there_is_another(
    client, connected, settings, monkeypatch
):
    monkeypatch.setattr(serving, "MAX_IN_FLIGHT", 3)
    async with two(client, connected, settings) as made:
        await made.known()
        made.counts.clear()
        for event in made.go_on:
            event.clear()
        asked = [asyncio.create_task(made.ask()) for _ in range(6)]
        await until(lambda: sum(made.counts.values()) == 6)
        with pytest.raises(Overloaded):
            await made.ask()
        for event in made.go_on:
            event.set()
        await asyncio.gather(*asked)


async def test_whoever_finds_one_instance_busy_is_answered_by_the_other(
    client, connected, settings, monkeypatch
):
    """Only one of the two has ever answered this caller, so the broker picks, half of them wrong.

    That the second try goes to the one that is known to answer leaves nothing to chance.
    """
    monkeypatch.setattr(serving, "MAX_IN_FLIGHT", 1)
    async with two(client, connected, settings) as made:
        made.go_on[0].clear()
        direct = client._asker.to(made.subject, "candle.0")
        held = asyncio.create_task(client.relay(direct, b"", timeout_s=60))
        await until(lambda: made.counts[0] == 1)
        while not client._asker.balance.known(made.subject):
            with contextlib.suppress(Overloaded):
                await made.ask()
        await made.ask(60)
        busy = made.instances[0]._asked.served[made.subject]
        assert busy.errors > 5
        assert busy.last_error.startswith("overloaded")
        made.go_on[0].set()
        await held


async def test_a_lone_instance_that_is_busy_is_not_asked_again(client, settings, monkeypatch):
    made = Two(client, MODEL_INFER)
    async with (
        join(client, settings, plugin="candle", description="a test") as a,
        a.serving_raw(MODEL_INFER, made.handler(0), "m"),
    ):
        while not client._asker.balance.alone(made.subject, "candle.0"):
            await made.ask()
        monkeypatch.setattr(serving, "MAX_IN_FLIGHT", 1)
        made.counts.clear()
        made.go_on[0].clear()
        held = asyncio.create_task(made.ask())
        await until(lambda: made.counts[0] == 1)
        for _ in range(3):
            with pytest.raises(Overloaded):
                await made.ask()
        assert a._asked.served[made.subject].errors == 3
        made.go_on[0].set()
        await held


async def test_one_particular_instance_can_be_asked_by_anybody(client, connected, settings):
    async with two(client, connected, settings) as made:
        for slot in (0, 1):
            subject = f"{client.root}.inst.candle.{slot}.call.candle.model.infer.m"
            reply: Msg = await client._nc.request(subject, b"", timeout=10)
            assert reply.data == b"%d" % slot
            assert reply.headers[SLOT] == f"candle.{slot}"
            assert reply.headers["Bkg-Instance"] == made.instances[slot].id
        subject = f"{client.root}.inst.candle.1.call.candle.model.infer.other"
        reply = await client._nc.request(subject, b"", timeout=10)
        assert reply.headers[NOT_SERVED] == "1"
        with pytest.raises(NobodyListens, match="is not served by this"):
            await client.relay(subject, b"")


async def test_who_answers_without_a_slot_is_always_asked_by_the_group(client, connected):
    """A worker of a third party has no slot to be asked by, and gets its share all the same."""
    counts: Counter[int] = Counter()
    subject = f"{client.root}.call.raw.say"
    for number in (0, 1):
        other = await connected()

        async def on_message(message: Msg, who: int = number, at: Client = other) -> None:
            counts[who] += 1
            await at.answer(message.reply, b"{}", {})

        await other.listen(subject, "raw", on_message)
    for _ in range(60):
        await client.relay(subject, b"", timeout_s=60)
    assert not client._asker.balance.known(subject)
    assert counts[0] > 5
    assert counts[1] > 5


async def test_a_process_that_is_no_plugins_instance_has_no_slot_to_be_asked_by(client, settings):
    """Every supervisor has slot 0: all of them would answer."""

    async def stats(_request: m.Empty) -> m.CandleStats:
        return m.CandleStats(models=[])

    async with (
        join(client, settings, plugin="gateway", description="a test", listed=False) as one,
        one.serving(CANDLE_STATS, stats),
    ):
        answer = await client.relay(CANDLE_STATS.subject(client.root), b"")
        assert SLOT not in answer.headers
        with pytest.raises(NobodyListens):
            await client.relay(f"{client.root}.inst.gateway.0.call.candle.stats", b"")

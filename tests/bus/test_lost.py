"""Requests whose worker ends before it answers: which they are, and what their callers hear."""

import asyncio
import time

import msgspec
import pytest

from bus import balance
from bus import messages as m
from bus.answers import Ended
from bus.balance import Balance, Choice
from bus.errors import InstanceEnded
from bus.plugins import follow_plugins
from bus.subjects import CANDLE_STATS
from bus.testing import until
from tests.bus.pairs import Two, two

A, B = "candle.0", "candle.1"
INFERS = frozenset({"candle.model.infer"})


def ended(slot=0, *, alone=frozenset(), before=None) -> Ended:
    return Ended(
        plugin="candle",
        slot=str(slot),
        host="h",
        how="was ended by SIGKILL",
        before=time.perf_counter() if before is None else before,
        alone=alone,
    )


@pytest.fixture
async def pair(client, connected, settings):
    async with two(client, connected, settings) as made:
        yield made
        for event in made.go_on:
            event.set()


@pytest.fixture
def held(pair):
    for event in pair.go_on:
        event.clear()
    return pair


def waiting(client) -> int:
    return len(client._replies._waiting)


def relays(client, subject, count=1, body=b""):
    return [asyncio.create_task(client.relay(subject, body, timeout_s=60)) for _ in range(count)]


# --- Which they are -------------------------------------------------------------------------------


async def test_what_was_sent_to_the_slot_is_lost_and_what_is_with_another_is_not(client, held: Two):
    held.expect(10, 10)
    asked = relays(client, held.subject, 8)
    await until(lambda: held.counts == {0: 4, 1: 4})
    client.lost(ended(0))
    await until(lambda: sum(one.done() for one in asked) == 4)
    assert [held.in_flight(number) for number in (0, 1)] == [0, 4]
    # It is passed over for a moment.
    choice = held.balance.choose(held.subject, time.perf_counter(), 1)
    assert choice == Choice(B)
    held.balance.ended(held.subject, B, "dropped", time.perf_counter())
    said = next(one.exception() for one in asked if one.done())
    assert isinstance(said, InstanceEnded)
    assert (
        said.message == "candle.0 on h, which had it, was ended by SIGKILL; it may have been done"
    )
    assert said.retry_after_s == 2
    assert said.details == {"state": "ended", "host": "h", "reason": "was ended by SIGKILL"}
    held.go_on[1].set()
    outcomes = await asyncio.gather(*asked, return_exceptions=True)
    assert [one.body for one in outcomes if not isinstance(one, InstanceEnded)] == [b"1"] * 4
    assert not waiting(client)


async def test_what_was_asked_of_the_group_is_lost_where_nobody_else_could_have_it(
    client, held: Two
):
    [asked] = relays(client, held.subject)
    await until(lambda: held.counts.total() == 1)
    client.lost(ended(0))
    client.lost(ended(0, alone=frozenset({"candle.model.inf", "candle.stats"})))
    client.lost(ended(0, alone=INFERS, before=time.perf_counter() - 60))
    assert waiting(client) == 1
    client.lost(ended(0, alone=INFERS))
    with pytest.raises(InstanceEnded):
        await asked


async def test_it_is_lost_too_where_nobody_else_has_ever_answered(client, held: Two):
    for _ in range(balance.ALONE + 1):
        held.balance.ended(held.subject, None, "answered", 0, A, 0.001, True)
    [asked] = relays(client, held.subject)
    await until(lambda: held.counts.total() == 1)
    client.lost(ended(1))
    assert waiting(client) == 1
    client.lost(ended(0))
    with pytest.raises(InstanceEnded):
        await asked


async def test_what_was_asked_of_one_by_name_is_lost_with_it(client, settings):
    async def never(_message) -> None:
        await asyncio.sleep(0)

    # It hears, and says nothing.
    heard = await client._nc.subscribe(f"{client.root}.inst.candle.*.call.>", cb=never)
    slots = [("candle", 0), ("candle", 1)]
    asked = asyncio.create_task(client.call_each(CANDLE_STATS, m.Empty(), slots, timeout_s=60))
    await until(lambda: waiting(client) == 2)
    client.lost(ended(0))
    assert waiting(client) == 1
    client.lost(ended(1))
    assert await asked == []
    await heard.unsubscribe()


async def test_what_has_not_been_sent_as_a_whole_is_not_lost(client, held: Two, monkeypatch):
    held.expect(10, 10)
    taken, send = asyncio.Event(), client.send

    async def send_slowly(*message: object):
        await taken.wait()
        await send(*message)

    monkeypatch.setattr(client._wire, "send", lambda *_: False)
    monkeypatch.setattr(client, "send", send_slowly)
    [asked] = relays(client, held.subject)
    await until(lambda: waiting(client) == 1)
    client.lost(ended(0))
    client.lost(ended(1))
    assert waiting(client) == 1
    for event in (taken, *held.go_on):
        event.set()
    assert (await asked).body in {b"0", b"1"}


async def test_a_large_body_does_not_stay_behind(client, held: Two):
    held.expect(10, 10)
    body = bytes(client.max_payload + 1)
    [asked] = relays(client, held.subject, body=body)
    await until(lambda: held.counts.total() == 1)
    assert list(client.bodies._ours.values()) == [len(body)]
    client.lost(ended(0))
    client.lost(ended(1))
    with pytest.raises(InstanceEnded):
        await asked
    await until(lambda: not client.bodies._ours)


# --- What was asked twice -------------------------------------------------------------------------


async def test_where_the_other_was_asked_as_well_its_answer_counts(client, held: Two):
    held.expect(0.001, 0.001, first=1)
    [asked] = relays(client, held.subject)
    await until(lambda: held.counts == {0: 1, 1: 1})
    client.lost(ended(1))
    assert waiting(client) == 1
    held.go_on[0].set()
    assert (await asked).body == b"0"
    assert not waiting(client)


async def test_where_both_end_the_caller_hears_of_the_first(client, held: Two):
    held.expect(0.001, 0.001, first=1)
    [asked] = relays(client, held.subject)
    await until(lambda: held.counts == {0: 1, 1: 1})
    client.lost(ended(1))
    client.lost(ended(0))
    with pytest.raises(InstanceEnded, match=r"candle\.1 on h"):
        await asked
    assert [held.in_flight(number) for number in (0, 1)] == [0, 0]
    assert not client._asker.late._due


async def test_the_end_of_the_other_leaves_the_first_to_answer(client, held: Two):
    held.expect(0.001, 0.001, first=1)
    [asked] = relays(client, held.subject)
    await until(lambda: held.counts == {0: 1, 1: 1})
    client.lost(ended(0))
    held.go_on[1].set()
    assert (await asked).body == b"1"


def test_what_may_have_ended_one_is_not_asked_of_two_for_a_while():
    both = Balance(draw=lambda: 0.999)
    for slot in (A, B):
        both.ended("s", None, "answered", 0, slot, 0.01, True)
    assert both.choose("s", 0, 1).late_s
    both.ended("s", A, "ended", 1)
    assert both.choose("s", 1, 1) == Choice(B)
    assert both.more("s", A, 10, 1) is None
    # It is asked again when another process can be there, or has answered; known all the while.
    both.ended("s", B, "dropped", 1)
    both.ended("s", B, "ended", 1)
    # Where all are passed over it is still known who has it.
    assert both.choose("s", 1, 1) == Choice(A)
    both.ended("s", A, "dropped", 1)
    for slot in (A, B):
        both.ended("s", None, "answered", 1, slot, 0.01, True)
    assert both.choose("s", 1, 1) == Choice(A)
    both.ended("s", A, "ended", 1)
    later = 1 + balance.ENDED_S
    # Nor does it go by the group, to find others: nobody would know who has it.
    both._draw = lambda: 0.0
    assert both.choose("s", 1, 1) == Choice(B)
    both.ended("s", B, "dropped", 1)
    both._draw = lambda: 0.999
    assert both.choose("s", later, 1) == Choice(A)
    assert both.more("s", B, 10, later) is None
    assert both.choose("s", 1 + balance.ONCE_S, 1).late_s


# --- Which ends are heard of ----------------------------------------------------------------------


@pytest.fixture
async def ends(client):
    """Give the ends that were heard of, and the view that they are heard of from."""
    heard: list[Ended] = []
    async with follow_plugins(client.store, heard.append) as view:
        yield heard, view


async def put_process(client, slot=0, **changes):
    state = m.ProcessState(
        plugin="candle", slot=slot, host="h", status="running", generation=1, since=m.now()
    )
    await client.store.processes.put(msgspec.structs.replace(state, **changes), "candle", slot)


async def put_instance(client, slot=0, plugin="candle", **changes):
    told = m.Registration(
        id=f"{plugin}.{slot}",
        plugin=plugin,
        slot=slot,
        host="h",
        pid=1,
        version="1",
        capabilities=["candle.model.infer", "candle.stats"],
        status="running",
        since=m.now(),
        last_heartbeat=m.now(),
    )
    await client.store.instances.put(msgspec.structs.replace(told, **changes), plugin, slot)


async def is_told(view, pid, host="h") -> bool:
    state = view.get("candle")
    return state is not None and any((i.pid, i.host) == (pid, host) for i in state.instances)


async def test_an_end_is_heard_of_with_what_only_that_one_could_be_asked(client, ends):
    heard, view = ends
    await put_process(client, pid=1)
    await put_instance(client)
    await put_instance(client, 1, pid=2, status="starting")
    await put_instance(client, 0, "other", capabilities=["candle.stats"])
    await until(lambda: view.get("other") and len(view.get("candle").instances) == 2)
    # Its registration goes first.
    await client.store.instances.delete("candle", 0)
    await put_process(client, status="error", last_exit="was ended by SIGABRT")
    await until(lambda: heard)
    [one] = heard
    assert (one.plugin, one.slot, one.host) == ("candle", "0", "h")
    assert (one.how, one.alone) == ("was ended by SIGABRT", INFERS)
    assert time.perf_counter() - 60 < one.before < time.perf_counter()


async def test_what_was_sent_since_its_successor_came_is_not_with_the_dead_one(client, ends):
    heard, view = ends
    await put_process(client, pid=1)
    await put_instance(client)
    await until(lambda: is_told(view, 1))
    begun = time.perf_counter()
    await put_instance(client, id="next", pid=2)
    await until(lambda: view.registrations()[0].pid == 2)
    came = time.perf_counter()
    # It says again that it is there.
    await put_instance(client, id="next", pid=2, last_heartbeat=m.now())
    await put_process(client, status="starting", pid=2)
    await until(lambda: heard)
    assert begun < heard[0].before < came
    assert heard[0].how == "has ended"


async def test_a_place_that_another_host_has_taken_or_that_nobody_tells_of_is_no_end(client, ends):
    heard, view = ends
    await put_process(client, pid=1)
    await until(lambda: is_told(view, 1))
    await put_process(client, pid=1, mem_bytes=1)
    await put_process(client, pid=2, host="elsewhere")
    await until(lambda: is_told(view, 2, "elsewhere"))
    await client.store.processes.delete("candle", 0)
    await until(lambda: view.get("candle") is None)
    await put_process(client, status="starting", host="elsewhere")
    await until(lambda: view.get("candle"))
    await put_process(client, pid=3, host="elsewhere")
    await until(lambda: is_told(view, 3, "elsewhere"))
    assert heard == []
    assert view._came == {}


async def test_nothing_is_kept_of_places_that_are_no_more(client, ends):
    _, view = ends
    for first in ("process", "instance"):
        await put_process(client, pid=1)
        await put_instance(client)
        await until(lambda: view._came)
        if first == "process":
            await client.store.processes.delete("candle", 0)
            await client.store.instances.delete("candle", 0)
        else:
            await client.store.instances.delete("candle", 0)
            await client.store.processes.delete("candle", 0)
        await until(lambda: view.get("candle") is None)
        assert view._came == {}

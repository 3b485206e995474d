"""The rules of telling, without a bus: joining by sequence, budgets, sums."""

import json
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from bus.messages import Event, InstanceState, PluginState, Replicas, TelemetrySnapshot
from services.gateway.lines import Line, Tail, Tick
from services.gateway.listener import EVENTS_OWED_MAX, Listener
from services.gateway.telemetry import summed

START = datetime(2026, 1, 1, tzinfo=UTC)


class Plain:
    """Frames as lists, to read them in a test."""

    def event(self, kind, payload):
        return [(kind, payload)]

    def lines(self, lines, *, batch):  # noqa: ARG002
        return [(b"gap" if line.is_gap else b"log", line.seq) for line in lines]


class Connection:
    """What a listener writes to, with a buffer that a test can fill."""

    def __init__(self) -> None:
        self.sent = []
        self.waiting = 0
        self.aborted = False
        self.listener = Listener(
            write=self.sent.extend,
            waiting=lambda: self.waiting,
            abort=self.abort,
            framing=Plain(),
            budget_bytes=100,
        )

    def abort(self):
        self.aborted = True


def line(seq, plugin="echo", level="info"):
    return Line(seq, plugin, level, b"{}")


def joined(connection, plugin=None):
    tail = Tail((plugin, "debug"), batch=False, asked=None)
    connection.listener.start(tail)
    connection.listener.join(tail, [], 0)
    return tail


@given(
    total=st.integers(1, 60),
    subscribed=st.integers(0, 60),
    read=st.integers(0, 60),
    told=st.integers(0, 60),
    limit=st.integers(1, 60),
    tick=st.integers(1, 7),
)
def test_where_back_fill_meets_live_each_record_comes_once_and_in_order(
    total, subscribed, read, told, limit, tick
):
    # The stream has `total` records in the end. The live feed is heard from `subscribed` on, the
    # back-fill is read when there are `read`, and by then `told` have been told live.
    subscribed, read = sorted((min(subscribed, total), min(read, total)))
    told = min(max(told, subscribed), read)
    connection = Connection()
    tail = Tail((None, "debug"), batch=False, asked=None)
    connection.listener.start(tail)
    tell(connection, range(subscribed + 1, told + 1), tick)
    history = [line(seq) for seq in range(1, read + 1)][-limit:]
    cut = read > limit
    connection.listener.join(tail, history, told, cut=cut)
    tell(connection, range(told + 1, total + 1), tick)
    first = history[0].seq if history else subscribed + 1
    assert [seq for _, seq in connection.sent] == list(range(first, total + 1))


def test_what_one_back_fill_left_out_still_comes_for_another_wish():
    connection = Connection()
    joined(connection)
    tail = Tail(("echo", "debug"), batch=False, asked=None)
    connection.listener.start(tail)
    connection.listener.join(tail, [line(5)], 0, cut=True)
    tell(connection, range(3, 7), 10)
    assert connection.sent == [(b"log", 5), (b"log", 3), (b"log", 4), (b"log", 6)]


def event(seq, name="echo", kind="plugin"):
    return Event(kind=kind, name=name, verb="started", timestamp=START, seq=seq)


def events_of(connection):
    return [
        json.loads(payload)["seq"] for kind, payload in connection.sent if kind == b"events"
    ]  # fmt: skip


@given(
    total=st.integers(0, 40),
    read=st.integers(0, 40),
    told_before=st.integers(0, 40),
    told_while=st.integers(0, 40),
)
def test_where_back_fill_meets_new_events_each_comes_once_and_in_order(
    total, read, told_before, told_while
):
    # By the wish `told_before` events have been told live to others; while the back-fill is read,
    # which has the first `read`, up to `told_while`.
    read, told_before = min(read, total), min(told_before, total)
    told_while = min(max(told_while, told_before), total)
    read = max(read, told_before)
    connection = Connection()
    connection.listener.events.add(None)
    connection.listener.hold_events()
    for seq in range(told_before + 1, told_while + 1):
        connection.listener.tell_event(event(seq))
    assert connection.sent == []
    connection.listener.join_events([event(seq) for seq in range(1, read + 1)])
    for seq in range(told_while + 1, total + 1):
        connection.listener.tell_event(event(seq))
    assert events_of(connection) == list(range(1, total + 1))


def test_events_are_for_those_who_want_them():
    connection = Connection()
    connection.listener.events.add("echo")
    for one in (event(1), event(2, "ant"), event(3, "echo", "host"), event(4)):
        connection.listener.tell_event(one)
    assert events_of(connection) == [1, 4]


def test_a_slow_listener_gets_its_events_later_and_is_told_which_it_lost():
    connection = Connection()
    connection.listener.events.add(None)
    connection.waiting = 101
    for seq in range(1, EVENTS_OWED_MAX + 4):
        connection.listener.tell_event(event(seq))
    assert connection.sent == []
    assert connection.listener.behind
    connection.waiting = 0
    connection.listener.catch_up()
    assert connection.sent[0] == (b"gap", b'{"from":1,"to":3,"topic":"events"}')
    assert events_of(connection) == list(range(4, EVENTS_OWED_MAX + 4))
    assert not connection.listener.behind


def tell(connection, seqs, tick):
    seqs = list(seqs)
    for at in range(0, len(seqs), tick):
        connection.listener.tell_lines(Tick([line(seq) for seq in seqs[at : at + tick]]))


def test_a_slow_listener_loses_records_and_is_told_which_when_there_is_room():
    connection = Connection()
    joined(connection)
    connection.waiting = 101
    connection.listener.tell_lines(Tick([line(1), line(2)]))
    connection.listener.tell_lines(Tick([line(3)]))
    assert connection.sent == []
    connection.waiting = 0
    connection.listener.tell_lines(Tick([line(4)]))
    assert connection.sent == [(b"gap", b'{"from":1,"to":3}'), (b"log", 4)]


def test_a_slow_listener_gets_the_newest_state_later():
    connection = Connection()
    connection.waiting = 101
    connection.listener.tell(b"status", "echo", b"1")
    connection.listener.tell(b"status", "echo", b"2")
    assert connection.listener.behind
    connection.waiting = 0
    connection.listener.catch_up()
    assert connection.sent == [(b"status", b"2")]
    assert not connection.listener.behind


def test_a_listener_that_asks_without_reading_is_cut_off():
    connection = Connection()
    connection.waiting = 401
    connection.listener.send(b"ack", b"{}")
    assert connection.aborted
    assert connection.sent == []


def test_a_gap_reaches_every_reader_of_logs_whatever_they_filter():
    connection = Connection()
    joined(connection, "other")
    connection.listener.tell_lines(Tick([Line(7, "", "error", b"{}", is_gap=True), line(8)]))
    assert connection.sent == [(b"gap", 7)]


def test_listeners_with_the_same_wishes_share_one_encoding():
    made = []

    class Counting(Plain):
        def lines(self, lines, *, batch):
            made.append(1)
            return super().lines(lines, batch=batch)

    framing = Counting()
    tick = Tick([line(1)])
    for _ in range(10):
        tick.framed(frozenset([(None, "debug")]), framing, batch=False)
    assert made == [1]


# --- Telemetry ------------------------------------------------------------------------------------


def snapshot(slot, after_s=0, **more: object):
    given = {"cpu": 10.0, "mem_bytes": 100, **more}
    at = START + timedelta(seconds=after_s)
    return TelemetrySnapshot(plugin="echo", timestamp=at, slot=slot, **given)


def state(*slots: int):
    places = [
        InstanceState(slot=slot, host="h", status="running", since=START, restarts=0, pid=1 + slot)
        for slot in slots
    ]
    return PluginState(
        name="echo",
        status="running",
        capabilities=[],
        config=None,
        replicas=Replicas(desired=len(slots), ready=len(slots)),
        instances=places,
        generation=1,
        revision=1,
    )


def test_replicas_add_up_what_they_use_and_share_what_they_hold():
    whole = summed(
        [
            snapshot(0, entries=5, gauges={"requests": 2, "loop_lag_ms": 3}),
            snapshot(1, after_s=1, entries=6, gauges={"requests": 3, "loop_lag_ms": 1}),
        ],
        state(0, 1),
    )
    assert (whole.cpu, whole.mem_bytes, whole.entries) == (20.0, 200, 6)
    assert whole.gauges == {"requests": 5, "loop_lag_ms": 3}
    assert whole.timestamp == START + timedelta(seconds=1)
    assert whole.slot is None


def test_slots_that_nobody_fills_any_more_do_not_count():
    assert summed([snapshot(0), snapshot(7, after_s=9)], state(0)) == snapshot(0)


def test_of_a_plugin_that_is_stopped_the_last_snapshot_stays():
    assert summed([snapshot(0), snapshot(1, after_s=9)], state()) == snapshot(1, after_s=9)


def test_without_snapshots_there_is_no_sum():
    assert summed([], state(0)) is None

"""The short way through nats-py: it is taken, it is the same as the long one, and it is guarded."""

import asyncio
import contextlib
import os
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.client import Client as Nats
from structlog.testing import capture_logs

from bus import messages as m
from bus import wire
from bus.broker import running_broker
from bus.client import TIMEOUT_MS, Answer, connect
from bus.errors import (
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    NobodyListens,
    TooLarge,
    Unavailable,
)
from bus.instance import RawCall, join
from bus.subjects import CANCEL, CANDLE_STATS, MODEL_INFER
from bus.testing import until
from bus.wire import Incoming, Replies


@pytest.fixture(params=["short", "long"])
def way(request, monkeypatch):
    """Both ways: a nats-py that is not the one that is known is used by its public names."""
    if request.param == "long":
        monkeypatch.setattr(wire, "_is_as_known", lambda _nc: False)
    return request.param


async def echo(call: RawCall) -> Answer:
    return Answer(call.body, {"X-Said": call.headers.get("X-Said", "")})


async def test_the_short_way_is_taken_with_the_nats_py_that_is_installed(client):
    """If this fails, nats-py has changed inside: look at `bus/wire.py` anew."""
    assert client._wire.short


def test_another_nats_py_is_not_taken_for_the_known_one():
    class Other(Nats):
        async def _process_msg(self, sid, subject, data):
            """Take other arguments."""

    assert not wire._is_as_known(Other())
    assert not wire._is_as_known(object())


async def test_both_ways_carry_bodies_and_headers_of_any_size(way, broker, root, settings):
    async with connect(broker.url, name="test", root=root) as client:
        assert client._wire.short == (way == "short")
        await client.store.declare()
        async with (
            join(client, settings, plugin="candle", description="a test") as candle,
            candle.serving_raw(MODEL_INFER, echo, "m"),
        ):
            subject = MODEL_INFER.subject(root, "m")
            for size in (0, 1, 100, wire.LONG_BODY_BYTES, 300_000, client.max_payload):
                body = os.urandom(1) * size
                answer = await client.relay(subject, body, headers={"X-Said": f"ä {size}"})
                assert answer.body == body
                assert answer.headers["X-Said"] == f"ä {size}"
            many = (client.relay(subject, b"%d" % i, timeout_s=60) for i in range(500))
            assert [a.body for a in await asyncio.gather(*many)] == [b"%d" % i for i in range(500)]
            large = (client.relay(subject, b"x" * 4_000_000, timeout_s=60) for _ in range(10))
            assert {len(a.body) for a in await asyncio.gather(*large)} == {4_000_000}
        await client.store.delete_everything()


async def test_both_ways_say_at_once_that_nobody_listens(way, broker, root):
    async with connect(broker.url, name="test", root=root) as client:
        with pytest.raises(NobodyListens):
            await client.relay(f"{root}.call.nobody", b"", timeout_s=60)
        assert not client._replies._waiting


async def test_both_ways_stop_work_that_nobody_waits_for(way, broker, root, settings):
    """The caller is cancelled, or gives up; either way the handler is, soon after."""
    stopped = 0

    async def think(_call: RawCall | m.Empty) -> Answer:
        nonlocal stopped
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            stopped += 1
            raise
        raise AssertionError

    async with connect(broker.url, name="test", root=root) as client:
        await client.store.declare()
        async with (
            join(client, settings, plugin="candle", description="a test") as candle,
            candle.serving_raw(MODEL_INFER, think, "m"),
            candle.serving(CANDLE_STATS, think),
        ):
            for subject in (MODEL_INFER.subject(root, "m"), CANDLE_STATS.subject(root)):
                asked = asyncio.create_task(client.relay(subject, b"", timeout_s=600))
                await until(lambda: candle.in_flight == 1)
                asked.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asked
                await until(lambda: candle.in_flight == 0)
            assert stopped == 2
            with pytest.raises(DeadlineExceeded):
                await client.relay(MODEL_INFER.subject(root, "m"), b"", timeout_s=0.2)
            await until(lambda: stopped == 3)
            counted = candle._asked.served[MODEL_INFER.subject(root, "m")].stats
            assert counted["num_errors"] == 2
            assert counted["last_error"] == "cancelled: the caller has gone"
            assert not candle._asked._by_inbox
        await client.store.delete_everything()


async def test_a_cancellation_of_what_is_done_already_harms_nobody(client, settings):
    async with (
        join(client, settings, plugin="candle", description="a test") as candle,
        candle.serving_raw(MODEL_INFER, echo, "m"),
    ):
        await client.publish(CANCEL, m.CancelCall(inbox="_INBOX_gone.1"))
        await client.barrier()
        subject = MODEL_INFER.subject(client.root, "m")
        assert (await client.relay(subject, b"x")).body == b"x"


async def test_what_is_given_up_before_it_is_sent_is_worked_on_by_nobody(
    way, broker, root, settings
):
    begun, ended = [], []

    async def think(call: RawCall) -> Answer:
        begun.append(call.body)
        try:
            if call.body != b"last":
                await asyncio.Event().wait()
        finally:
            ended.append(call.body)
        return Answer(call.body, {})

    async with connect(broker.url, name="test", root=root) as client:
        await client.store.declare()
        async with (
            join(client, settings, plugin="candle", description="a test") as candle,
            candle.serving_raw(MODEL_INFER, think, "m"),
        ):
            subject = MODEL_INFER.subject(root, "m")
            client.ask(subject, b"x" * 1_000_000, pytest.fail, timeout_s=600).cancel()
            await client.relay(subject, b"last", timeout_s=60)
            await until(lambda: candle.in_flight == 0)
            assert sorted(begun) == sorted(ended)
            if way == "long":
                assert begun == [b"last"]
            assert not client._asker.working
        await client.store.delete_everything()


async def test_a_request_in_flight_while_the_broker_restarts_is_answered(tmp_path, way, settings):
    """Both sides keep what they had, and reach each other again within the time-out."""
    go_on = asyncio.Event()

    async def wait(call: RawCall) -> Answer:
        await go_on.wait()
        return Answer(call.body, {})

    async with contextlib.AsyncExitStack() as first:
        broker = await first.enter_async_context(running_broker(tmp_path, sync_interval="2m"))
        async with connect(broker.url, name="test", root="r") as client:
            await client.store.declare()
            async with (
                join(client, settings, plugin="candle", description="a test") as candle,
                candle.serving_raw(MODEL_INFER, wait, "m"),
            ):
                subject = MODEL_INFER.subject("r", "m")
                asked = asyncio.create_task(client.relay(subject, b"kept", timeout_s=120))
                lost = asyncio.create_task(client.relay("r.call.x", b"", timeout_s=1))
                await until(lambda: candle.in_flight == 1)
                with pytest.raises(NobodyListens):
                    await lost
                os.kill(broker.pid, signal.SIGKILL)
                await until(lambda: not client.connected)
                await first.aclose()
                go_on.set()
                async with running_broker(tmp_path, sync_interval="2m"):
                    await until(lambda: client.connected, timeout_s=60)
                    assert (await asked).body == b"kept"
                    assert (await client.relay(subject, b"again")).body == b"again"


async def test_headers_cannot_be_smuggled_in(client, settings):
    async with (
        join(client, settings, plugin="candle", description="a test") as candle,
        candle.serving_raw(MODEL_INFER, echo, "m"),
    ):
        subject = MODEL_INFER.subject(client.root, "m")
        said = {"X-Said": "a\r\nX-More: b"}
        answer = await client.relay(subject, b"", headers=said)
        assert "\n" not in answer.headers["X-Said"]
        assert "X-More" not in answer.headers
        with pytest.raises(InvalidRequest, match="cannot be asked"):
            await client.relay(subject, b"", headers={"X: Y\r\nZ": "a"})
        with pytest.raises(InvalidRequest, match="cannot be asked"):
            await client.relay(f"{subject} x\r\nPING", b"")


async def test_headers_that_make_a_body_too_large_are_refused_before_it_is_sent(client):
    """The broker would close the connection for good."""
    with pytest.raises(TooLarge, match="body and headers"):
        await client.relay("t.x", b"x" * client.max_payload, headers={"X": "y" * 20_000})
    await client.barrier()


async def test_a_taker_that_raises_does_not_end_the_reading(client):
    heard = []

    def take(message: Incoming) -> None:
        heard.append(message.data)
        raise RuntimeError("a mistake")

    taken = await client.take(f"{client.root}.x", "", take)
    for body in (b"1", b"2"):
        await client._nc.publish(f"{client.root}.x", body)
    await client.barrier()
    await until(lambda: heard == [b"1", b"2"])
    await client.stop_listening(taken)
    await client._nc.publish(f"{client.root}.x", b"3")
    await client.barrier()
    assert len(heard) == 2


async def test_an_empty_table_of_replies_wakes_nobody():
    replies = Replies("_I")
    inbox, reply = replies.expect(0.01)
    with pytest.raises(TimeoutError):
        await reply
    replies.forget(inbox)
    await until(lambda: replies._sweeping is None)
    replies.take(Incoming(inbox, "", b"late", {}))


async def test_nobody_waits_on_when_the_connection_is_closed():
    replies = Replies("_I")
    _, reply = replies.expect(600)
    replies.close()
    with pytest.raises(Unavailable):
        await reply


class Mistaken:
    """One who waits for a reply and raises when there is none."""

    deadline = 0.0

    def replied(self, _message: Incoming) -> None:
        raise AssertionError

    def ended(self, _error: Exception) -> None:
        raise RuntimeError("a mistake")


async def test_one_that_raises_when_it_is_told_keeps_nobody_else_waiting():
    replies = Replies("_I")
    replies.await_at("_I.a", Mistaken())
    _, late = replies.expect(0.01)
    with capture_logs() as said, pytest.raises(TimeoutError):
        await late
    replies.await_at("_I.a", Mistaken())
    _, kept = replies.expect(600)
    with capture_logs() as said_later:
        replies.close()
    with pytest.raises(Unavailable):
        await kept
    assert [one["event"] for one in said + said_later] == ["reply.lost"] * 2
    assert all(one["exc_info"] for one in said + said_later)


async def test_what_keeps_a_request_from_being_sent_is_in_the_log(client, monkeypatch):
    async def fail(*_given: object) -> None:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(client._wire, "short", False)
    monkeypatch.setattr(client, "send", fail)
    with capture_logs() as said, pytest.raises(Internal, match="could not be asked"):
        await client.relay(f"{client.root}.call.x", b"")
    assert [(one["event"], str(one["exc_info"])) for one in said] == [
        ("request.not_sent", "a mistake")
    ]
    assert not client._replies._waiting


_HEADER_TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)


@given(st.dictionaries(st.from_regex(r"[A-Za-z0-9_-]{1,20}", fullmatch=True), _HEADER_TEXT))
def test_headers_are_read_as_they_were_written(headers):
    block = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    read = wire._headers(f"NATS/1.0\r\n{block}\r\n".encode())
    assert read == {name: value.strip() for name, value in headers.items()}


@given(st.binary(max_size=60))
def test_headers_of_any_bytes_can_be_read(raw):
    wire._headers(b"NATS/1.0" + raw)


def test_a_status_of_the_broker_is_a_header():
    assert wire._headers(b"NATS/1.0 503\r\n\r\n") == {"Status": "503"}
    told = wire._headers(b"NATS/1.0 100 Idle Heartbeat\r\nA: b\r\n\r\n")
    assert told == {"Status": "100", "Description": "Idle Heartbeat", "A": "b"}
    assert TIMEOUT_MS not in told


async def test_the_largest_body_is_known_anew_after_a_reconnection(tmp_path):
    async with contextlib.AsyncExitStack() as first:
        broker = await first.enter_async_context(running_broker(tmp_path, sync_interval="2m"))
        async with connect(broker.url, name="test", root="r") as client:
            before = client.max_payload
            client._nc._max_payload = 1
            await first.aclose()
            await until(lambda: not client.connected)
            async with running_broker(tmp_path, sync_interval="2m"):
                await until(lambda: client.connected, timeout_s=60)
                assert client.max_payload == before


# --- Reading --------------------------------------------------------------------------------------


async def test_messages_are_read_in_their_order_however_the_stream_is_cut(client):
    """Some for a taker, some for nats-py, with headers and without, with PONGs between."""
    heard: list[bytes] = []
    slow: list[bytes] = []

    async def on_message(message) -> None:
        slow.append(message.data)

    quick = await client.take(f"{client.root}.quick", "", lambda one: heard.append(one.data))
    other = await client._nc.subscribe(f"{client.root}.slow", cb=on_message)
    await client.barrier()
    sids = {b"quick": quick._id, b"slow": other._id}

    def message(name: bytes, body: bytes, headers: bytes = b"", reply: bytes = b"") -> bytes:
        words = [b"HMSG" if headers else b"MSG", b"s." + name, b"%d" % sids[name]]
        words += [reply] if reply else []
        words += [b"%d" % len(headers)] if headers else []
        words.append(b"%d" % (len(headers) + len(body)))
        return b" ".join(words) + b"\r\n" + headers + body + b"\r\n"

    told = b"NATS/1.0\r\nA: b\r\n\r\n"
    stream = b"".join(
        [
            message(b"quick", b"1"), message(b"quick", b"2\r\n", told, b"r.1"),
            message(b"slow", b"a"), b"PONG\r\n", message(b"quick", b"3"), b"+OK\r\n",
            message(b"quick", b"", told), message(b"slow", b"b", told), message(b"quick", b"MSG "),
        ]
    )  # fmt: skip
    feed = client._nc._transport._io_reader.feed_data
    for size in (len(stream), 1, 2, 3, 7, 16, 31, 60):
        heard.clear()
        slow.clear()
        for at in range(0, len(stream), size):
            feed(stream[at : at + size])
        await until(lambda: len(heard) == 5 and len(slow) == 2)
        assert heard == [b"1", b"2\r\n", b"3", b"", b"MSG "]
        assert slow == [b"a", b"b"]
    await client.stop_listening(quick)


async def test_nothing_overtakes_what_nats_py_has_yet_to_read(client):
    heard: list[str] = []

    async def on_message(message) -> None:
        heard.append(message.data.decode())

    def take(message: Incoming) -> None:
        heard.append(message.data.decode())

    await client.take(f"{client.root}.quick", "", take)
    await client._nc.subscribe(f"{client.root}.slow", cb=on_message)
    for number in range(50):
        await client._nc.publish(f"{client.root}.slow", b"slow %d" % number)
        await client._nc.publish(f"{client.root}.quick", b"quick %d" % number)
    await client.barrier()
    # The barrier's own reply came last, and so everything before it has been read.
    assert [one for one in heard if "quick" in one] == [f"quick {n}" for n in range(50)]
    await until(lambda: len(heard) == 100)

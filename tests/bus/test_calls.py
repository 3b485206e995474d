"""Requests that are taken without a task: the same limits, counts and ends as those with one."""

import asyncio
import contextlib

import pytest
from nats.aio.msg import Msg

from bus import serving
from bus.client import Answer, trace
from bus.errors import Internal, NotFound, Overloaded
from bus.instance import Call, join
from bus.subjects import MODEL_INFER
from bus.testing import until


class Taker:
    """Keeps what it is asked until it is told to answer."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.dropped: list[bytes] = []
        self.traces: list[str | None] = []

    def take(self, call: Call) -> None:
        if call.body == b"raise":
            raise RuntimeError("the secret is 42")
        if call.body == b"missing":
            raise NotFound("there is no such thing")
        self.traces.append(trace.get())
        self.calls.append(call)
        call.on_cancel = lambda: (self.dropped.append(call.body), call.drop())
        if call.body == b"now":
            call.answer(b"at once", {})


@pytest.fixture
async def taker(client, settings):
    one = Taker()
    async with (
        join(client, settings, plugin="candle", description="a test") as one.instance,
        contextlib.AsyncExitStack() as leaving,
    ):
        await leaving.enter_async_context(one.instance.serving_calls(MODEL_INFER, one.take, "m"))
        one.leave = leaving.aclose
        one.subject = MODEL_INFER.subject(client.root, "m")
        one.stats = one.instance._asked.served[one.subject]
        yield one


async def test_a_call_is_answered_at_once_or_later(client, taker):
    assert (await client.relay(taker.subject, b"now")).body == b"at once"
    asked = asyncio.create_task(client.relay(taker.subject, b"later"))
    await until(lambda: len(taker.calls) == 2)
    assert taker.instance.in_flight == 1
    taker.calls[1].answer(b"done", {"X-Said": "a"})
    answer = await asked
    assert (answer.body, answer.headers["X-Said"]) == (b"done", "a")
    assert answer.headers["Bkg-Instance"] == taker.instance.id
    assert taker.instance.in_flight == 0
    assert (taker.stats.requests, taker.stats.errors) == (2, 0)


async def test_what_is_raised_is_the_callers_error_and_a_secret_stays_here(client, taker):
    with pytest.raises(NotFound, match="no such thing"):
        await client.relay(taker.subject, b"missing")
    with pytest.raises(Internal) as raised:
        await client.relay(taker.subject, b"raise")
    assert "42" not in str(raised.value)
    assert (taker.stats.requests, taker.stats.errors) == (2, 2)
    assert taker.instance.in_flight == 0


async def test_a_call_is_over_once(client, taker):
    asked = asyncio.create_task(client.relay(taker.subject, b"later"))
    await until(lambda: taker.calls)
    (call,) = taker.calls
    call.fail(NotFound("first"))
    call.answer(b"second", {})
    call.drop()
    with pytest.raises(NotFound, match="first"):
        await asked
    assert (taker.stats.requests, taker.stats.errors) == (1, 1)


async def test_its_caller_goes_away_and_it_is_dropped(client, taker):
    asked = asyncio.create_task(client.relay(taker.subject, b"later", timeout_s=60))
    await until(lambda: taker.calls)
    asked.cancel()
    await until(lambda: taker.dropped == [b"later"])
    assert taker.instance.in_flight == 0
    assert taker.stats.last_error == "cancelled: the caller has gone"


async def test_calls_are_bounded(client, taker, monkeypatch):
    monkeypatch.setattr(serving, "MAX_IN_FLIGHT", 2)
    asked = [asyncio.create_task(client.relay(taker.subject, b"later")) for _ in range(2)]
    await until(lambda: len(taker.calls) == 2)
    with pytest.raises(Overloaded, match="2 requests already"):
        await client.relay(taker.subject, b"later")
    for call in taker.calls:
        call.answer(b"", {})
    await asyncio.gather(*asked)


async def test_leaving_waits_for_what_is_in_flight(client, taker):
    asked = asyncio.create_task(client.relay(taker.subject, b"later"))
    await until(lambda: taker.calls)
    leaving = asyncio.create_task(taker.leave())
    await client.barrier()
    assert not leaving.done()
    taker.calls[0].answer(b"kept", {})
    await leaving
    assert (await asked).body == b"kept"


async def test_it_is_taken_within_its_callers_trace_and_the_next_is_not(client, taker):
    given = f"00-{'a' * 32}-{'b' * 16}-01"
    await client.relay(taker.subject, b"now", headers={"traceparent": given})
    await client._nc.request(taker.subject, b"now", timeout=10)
    assert taker.traces == [given, None]


async def test_an_answer_that_is_too_large_is_an_error_for_its_caller(client, taker):
    asked = asyncio.create_task(client.relay(taker.subject, b"later"))
    await until(lambda: taker.calls)
    taker.calls[0].answer(b"x" * (client.max_payload + 1), {})
    with pytest.raises(Exception, match="the broker takes"):
        await asked
    assert taker.stats.errors == 1


async def test_asking_without_waiting_is_the_same_as_asking(client, taker):
    outcomes: list[object] = []
    client.ask(taker.subject, b"now", outcomes.append)
    client.ask(taker.subject, b"missing", outcomes.append)
    client.ask(f"{client.root}.call.nobody", b"", outcomes.append)
    client.ask("x" * 5_000, b"", outcomes.append)
    await until(lambda: len(outcomes) == 4)
    codes = sorted(getattr(one, "code", "answered") for one in outcomes)
    assert codes == ["answered", "invalid-request", "not-found", "unavailable"]
    assert [one.body for one in outcomes if isinstance(one, Answer)] == [b"at once"]


async def test_who_does_not_wait_any_more_hears_nothing(client, taker):
    outcomes: list[object] = []
    asked = client.ask(taker.subject, b"later", outcomes.append, timeout_s=60)
    await until(lambda: taker.calls)
    asked.cancel()
    await until(lambda: taker.dropped)
    await client.barrier()
    assert not outcomes
    assert not client._replies._waiting


@pytest.mark.parametrize("number", ["²", "9" * 5_000, "-1", "soon"])
async def test_a_number_of_an_error_that_is_none_is_an_internal_error_at_once(
    client, connected, number
):
    """Whoever asked would wait for ever: its reply has come."""
    other, subject = await connected(), f"{client.root}.call.raw.fail"

    async def on_message(message: Msg) -> None:
        said = {"Nats-Service-Error-Code": number, "Nats-Service-Error": "it is broken"}
        await other.answer(message.reply, b"", said)

    await other.listen(subject, "raw", on_message)
    async with asyncio.timeout(10):
        with pytest.raises(Internal, match="it is broken"):
            await client.relay(subject, b"", timeout_s=60)

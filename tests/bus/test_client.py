"""The caller's side: calls, errors, feeds, and what happens when the broker goes away."""

import asyncio
import contextlib
import os
import signal

import pytest

from bus import codec
from bus import messages as m
from bus.broker import running_broker
from bus.client import Client, connect
from bus.errors import DeadlineExceeded, InvalidRequest, NotFound, TooLarge, Unavailable
from bus.instance import join
from bus.subjects import CANDLE_STATS, LOG, MODEL_RUN
from bus.testing import until


def output(request: m.RunModel) -> m.ModelOutput:
    return m.ModelOutput(id=request.id, outputs=request.inputs, execution_ms=0.0)


async def echo(request: m.RunModel) -> m.ModelOutput:
    return output(request)


async def test_a_call_is_answered_by_who_serves_the_endpoint(client, settings):
    async with (
        join(client, settings, plugin="candle", description="a test") as candle,
        candle.serving(MODEL_RUN, echo, "m"),
    ):
        reply = await client.call(MODEL_RUN, m.RunModel(id="m", inputs=[[1, 2]]))
    assert reply.outputs == [[1, 2]]


async def test_a_model_that_nobody_serves_is_answered_at_once(client):
    with pytest.raises(Unavailable, match="nobody answers"):
        await client.call(MODEL_RUN, m.RunModel(id="m", inputs=[[1]]), timeout_s=30)


async def test_an_error_arrives_as_it_was_raised(client, settings):
    async def refuse(_request: m.RunModel) -> m.ModelOutput:
        raise NotFound("there is no model m", field="id", retry_after_s=3)

    async with (
        join(client, settings, plugin="candle", description="a test") as candle,
        candle.serving(MODEL_RUN, refuse, "m"),
    ):
        with pytest.raises(NotFound) as raised:
            await client.call(MODEL_RUN, m.RunModel(id="m", inputs=[[1]]))
    assert raised.value.message == "there is no model m"
    assert raised.value.field == "id"
    assert raised.value.retry_after_s == 3


async def test_an_unexpected_error_keeps_its_text_to_the_log(client, settings):
    async def fail(_request: m.RunModel) -> m.ModelOutput:
        raise RuntimeError("the secret is 42")

    async with (
        join(client, settings, plugin="candle", description="a test") as candle,
        candle.serving(MODEL_RUN, fail, "m"),
    ):
        with pytest.raises(Exception, match="failed unexpectedly") as raised:
            await client.call(MODEL_RUN, m.RunModel(id="m", inputs=[[1]]))
        assert "42" not in str(raised.value)

        async def logged() -> bool:
            records = await client.store.logs("candle", limit=10, level="error")
            return any("42" in record.fields.get("exception", "") for record in records)

        await until(logged)


async def test_a_call_ends_with_the_callers_patience(client, settings):
    async def think(_request: m.RunModel) -> m.ModelOutput:
        await asyncio.Event().wait()
        raise AssertionError

    async with (
        join(client, settings, plugin="candle", description="a test") as candle,
        candle.serving(MODEL_RUN, think, "m"),
    ):
        with pytest.raises(DeadlineExceeded):
            await client.call(MODEL_RUN, m.RunModel(id="m", inputs=[[1]]), timeout_s=0.2)
        # The worker gave up as well: nobody waits for this answer any more.
        await until(lambda: candle.in_flight == 0)


async def test_a_message_over_the_brokers_limit_is_refused_before_it_is_sent(client):
    record = m.LogEvent(
        plugin="a", level="info", message="x" * 9_000_000, timestamp=m.now(), slot=0
    )
    with pytest.raises(TooLarge, match=r"9,000,\d+ bytes, the broker takes 8,3"):
        await client.publish(LOG, record, plugin="a", slot=0, level="info")


async def test_a_body_that_does_not_fit_names_the_field(client, settings):
    async with (
        join(client, settings, plugin="candle", description="a test") as candle,
        candle.serving(MODEL_RUN, echo, "m"),
    ):
        subject = MODEL_RUN.subject(client.root, "m")
        for body, field in [
            (b'{"id": "m"}', "inputs"),
            (b"", "id"),
            (b'{"id": "m", "inputs": [["x"]]}', "inputs[0][0]"),
        ]:
            with pytest.raises(InvalidRequest) as raised:
                await client.relay(subject, body)
            assert raised.value.field == field, raised.value.message


async def test_message_pack_is_answered_in_message_pack(client, settings):
    async with (
        join(client, settings, plugin="candle", description="a test") as candle,
        candle.serving(MODEL_RUN, echo, "m"),
    ):
        asked = codec.encode(m.RunModel(id="m", inputs=[[1.5]]), codec.MSGPACK)
        answer = await client.relay(
            MODEL_RUN.subject(client.root, "m"), asked, headers={codec.CONTENT_TYPE: codec.MSGPACK}
        )
    assert answer.headers[codec.CONTENT_TYPE] == codec.MSGPACK
    assert codec.decode(answer.body, m.ModelOutput, codec.MSGPACK).outputs == [[1.5]]


async def test_a_follower_hears_all_that_is_published_once_it_is_entered(client, connected):
    other = await connected()
    record = m.LogEvent(plugin="candle", level="info", message="x", timestamp=m.now())
    for _ in range(50):
        async with client.follow(LOG, plugin="candle") as followed:
            await other.publish(LOG, record, plugin="candle", slot=3, level="info")
            received = await asyncio.wait_for(anext(followed), 2)
        assert received.payload.message == "x"
        assert received.tokens == {"plugin": "candle", "slot": "3", "level": "info"}


async def test_what_is_no_message_of_a_feed_is_passed_over(client):
    record = m.LogEvent(plugin="candle", level="info", message="good", timestamp=m.now())
    async with client.follow(LOG) as followed:
        await client._nc.publish(LOG.subject(client.root, plugin="a", slot=0, level="info"), b"{")
        await client.publish(LOG, record, plugin="a", slot=0, level="info")
        received = await asyncio.wait_for(anext(followed), 2)
    assert received.payload.message == "good"


async def test_the_connection_outlives_a_restart_of_the_broker(tmp_path, settings):
    async with contextlib.AsyncExitStack() as first:
        broker = await first.enter_async_context(running_broker(tmp_path, sync_interval="2m"))
        async with connect(broker.url, name="test", root="r") as client:
            await client.store.declare()
            async with (
                join(client, settings, plugin="candle", description="a test") as candle,
                candle.serving(MODEL_RUN, echo, "m"),
            ):
                await candle.ready()
                await first.aclose()
                await until(lambda: not client.connected)
                with pytest.raises(Unavailable, match="cannot be reached"):
                    await client.call(MODEL_RUN, m.RunModel(id="m", inputs=[[1]]), timeout_s=1)
                async with running_broker(tmp_path, sync_interval="2m") as again:
                    assert again.url == broker.url
                    await until(lambda: client.connected)
                    reply = await client.call(MODEL_RUN, m.RunModel(id="m", inputs=[[7]]))
                    assert reply.outputs == [[7]]


async def test_nothing_is_waited_for_at_the_end_when_the_broker_goes(tmp_path):
    """Without that, each of the two would take its whole minute."""
    async with contextlib.AsyncExitStack() as first:
        broker = await first.enter_async_context(running_broker(tmp_path, sync_interval="2m"))
        async with connect(broker.url, name="test", root="r") as client, asyncio.timeout(30):
            done: list[str] = []

            async def last(word: str) -> None:
                done.append(word)

            await client.while_connected(last("while it is there"), 60)
            os.kill(broker.pid, signal.SIGSTOP)
            for_ever = asyncio.create_task(client.while_connected(asyncio.Event().wait(), 60))
            passing = asyncio.create_task(client.barrier(60, patient=False))
            await asyncio.sleep(0)
            os.kill(broker.pid, signal.SIGKILL)
            with pytest.raises(Unavailable):
                await passing
            await for_ever
            await client.while_connected(asyncio.Event().wait(), 60)
    assert done == ["while it is there"]


async def test_no_broker_is_one_clear_sentence():
    with pytest.raises(Unavailable, match=r"no broker can be used at 127\.0\.0\.1:1:"):
        async with connect("nats://u:geheim@127.0.0.1:1", name="test", patience_s=0.5):
            pass


async def test_wrong_credentials_are_one_clear_sentence_without_the_password(broker):
    url = broker.url.replace("nats://bkg:", "nats://bkg:wrong")
    with pytest.raises(Unavailable, match="no broker can be used") as raised:
        async with connect(url, name="test", patience_s=30):
            pass
    assert "uthorization" in raised.value.message
    assert "wrong" not in raised.value.message


async def test_a_plain_client_calls_with_an_empty_body(client: Client, settings):
    async def stats(_request: m.Empty) -> m.CandleStats:
        return m.CandleStats(models=[])

    async with (
        join(client, settings, plugin="candle", description="a test") as candle,
        candle.serving(CANDLE_STATS, stats),
    ):
        reply = await client._nc.request(CANDLE_STATS.subject(client.root), b"", timeout=2)
    assert reply.data == b'{"models":[]}'


async def test_a_subject_that_the_broker_would_hang_up_on_is_refused(client):
    with pytest.raises(InvalidRequest, match="a name in it is too long"):
        await client.relay(f"{client.root}.call.{'x' * 4_000}", b"")
    await client.barrier()
    assert client.connected

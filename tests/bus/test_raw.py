"""Raw endpoints: bodies and headers pass as they are, and all else is as for the others."""

import asyncio
import contextlib
import json

import pytest

from bus.client import Answer
from bus.errors import NobodyListens, NotFound, Unavailable
from bus.instance import RawCall, join
from bus.subjects import MODEL_INFER
from bus.testing import until
from bus.wire import Incoming


async def echo(call: RawCall) -> Answer:
    return Answer(call.body, {"X-Seen": call.headers.get("X-Asked", ""), "Content-Type": "x/y"})


async def test_body_and_headers_pass_as_they_are_both_ways(client, settings):
    body = bytes(range(256)) * 9
    async with (
        join(client, settings, plugin="candle", description="a test") as candle,
        candle.serving_raw(MODEL_INFER, echo, "m"),
    ):
        subject = MODEL_INFER.subject(client.root, "m")
        answer = await client.relay(subject, body, headers={"X-Asked": "a: b ü"})
        empty = await client.relay(subject, b"")
    assert answer.body == body
    assert answer.headers["X-Seen"] == "a: b ü"
    assert answer.headers["Content-Type"] == "x/y"
    assert answer.headers["Bkg-Instance"] == candle.id
    assert empty.body == b""


async def test_a_model_and_a_version_of_it_are_subjects_of_their_own(client, settings):
    async def version_2(_call: RawCall) -> Answer:
        return Answer(b"2", {})

    async with (
        join(client, settings, plugin="candle", description="a test") as candle,
        candle.serving_raw(MODEL_INFER, echo, "m.x"),
        candle.serving_raw(MODEL_INFER, version_2, "m.x", "2"),
    ):
        ask = MODEL_INFER.subject(client.root, "m.x")
        assert ask == f"{client.root}.call.candle.model.infer.m=2Ex"
        assert (await client.relay(ask, b"any")).body == b"any"
        assert (await client.relay(MODEL_INFER.subject(client.root, "m.x", "2"), b"")).body == b"2"
        with pytest.raises(NobodyListens):
            await client.relay(MODEL_INFER.subject(client.root, "m.x", "3"), b"")


async def test_a_reader_that_falls_behind_a_burst_of_large_requests_is_not_cut_off(
    client, connected, settings
):
    async def size(call: RawCall) -> Answer:
        return Answer(str(len(call.body)).encode(), {})

    behind = await connected()
    async with (
        join(behind, settings, plugin="candle", description="a test") as candle,
        candle.serving_raw(MODEL_INFER, size, "m"),
    ):
        socket = behind._nc._transport._io_writer.transport
        socket.pause_reading()
        subject, body = MODEL_INFER.subject(client.root, "m"), bytes(1024**2)
        asked = [asyncio.create_task(client.relay(subject, body, timeout_s=60)) for _ in range(96)]
        sending = client._nc
        await until(
            lambda: (
                sending.stats["out_msgs"] >= 96
                and not sending.pending_data_size
                and not sending._transport._io_writer.transport.get_write_buffer_size()
            )
        )
        socket.resume_reading()
        answers = await asyncio.gather(*asked)
    assert {answer.body for answer in answers} == {b"1048576"}
    assert behind._nc.stats["reconnects"] == 0


async def test_a_request_that_is_given_up_before_it_is_begun_leaves_nothing(client, settings):
    begun = []

    async def note(_call: RawCall) -> Answer:
        begun.append(1)
        return Answer(b"", {})

    async with (
        join(client, settings, plugin="candle", description="a test") as candle,
        candle.serving_raw(MODEL_INFER, note, "m"),
    ):
        subject = MODEL_INFER.subject(client.root, "m")
        asked = candle._asked
        asked.take(asked.served[subject], Incoming(subject, "inbox.of.somebody", b"", {}))
        assert candle.in_flight == 1
        # In the same turn of the event loop: the task that was made has not begun.
        asked.cancel("inbox.of.somebody")
        await until(lambda: candle.in_flight == 0)
        await asyncio.wait_for(asked.served[subject].drained(), 1)
    assert not begun


def test_more_values_than_keys_are_refused():
    with pytest.raises(ValueError, match="keyed by"):
        MODEL_INFER.subject("bkg", "m", "2", "3")


async def test_the_handler_is_given_the_callers_deadline_and_honours_it_itself(client, settings):
    left: list[float | None] = []

    async def note(call: RawCall) -> Answer:
        now = asyncio.get_running_loop().time()
        left.append(None if call.deadline is None else call.deadline - now)
        return Answer(b"", {})

    async with (
        join(client, settings, plugin="candle", description="a test") as candle,
        candle.serving_raw(MODEL_INFER, note, "m"),
    ):
        subject = MODEL_INFER.subject(client.root, "m")
        await client.relay(subject, b"", timeout_s=40)
        await client._nc.request(subject, b"", timeout=10)
    first, second = left
    assert first is not None
    assert 1 < first <= 40
    assert second is None


async def test_an_error_arrives_with_its_details(client, settings):
    async def refuse(_call: RawCall) -> Answer:
        raise Unavailable("m is loading", details={"state": "loading", "progress": 0.5})

    async with (
        join(client, settings, plugin="candle", description="a test") as candle,
        candle.serving_raw(MODEL_INFER, refuse, "m"),
    ):
        with pytest.raises(Unavailable) as raised:
            await client.relay(MODEL_INFER.subject(client.root, "m"), b"")
    assert raised.value.details == {"state": "loading", "progress": 0.5}


async def test_an_unexpected_error_keeps_its_text_to_the_log(client, settings):
    async def fail(_call: RawCall) -> Answer:
        raise RuntimeError("the secret is 42")

    async with (
        join(client, settings, plugin="candle", description="a test") as candle,
        candle.serving_raw(MODEL_INFER, fail, "m"),
    ):
        with pytest.raises(Exception, match="failed unexpectedly") as raised:
            await client.relay(MODEL_INFER.subject(client.root, "m"), b"")
        assert "42" not in str(raised.value)

        async def logged() -> bool:
            records = await client.store.logs("candle", limit=10, level="error")
            return any("42" in record.fields.get("exception", "") for record in records)

        await until(logged)


async def test_it_is_counted_and_discovered_as_others_are(client, settings):
    async def refuse(_call: RawCall) -> Answer:
        raise NotFound("there is no such tensor")

    async with (
        join(client, settings, plugin="candle", description="a test") as candle,
        candle.serving_raw(MODEL_INFER, echo, "m"),
        candle.serving_raw(MODEL_INFER, refuse, "n"),
    ):
        await client.relay(MODEL_INFER.subject(client.root, "m"), b"")
        with pytest.raises(NotFound):
            await client.relay(MODEL_INFER.subject(client.root, "n"), b"")

        async def say(verb: str) -> list[dict[str, object]]:
            said = await client._nc.request(f"$SRV.{verb}.candle.{candle.id}", timeout=10)
            return json.loads(said.data)["endpoints"]

        good, bad = await say("STATS")
        assert (good["num_requests"], good["num_errors"]) == (1, 0)
        assert (bad["num_errors"], bad["last_error"]) == (1, "not-found: there is no such tensor")
        assert (await say("INFO"))[0]["metadata"] == {"description": MODEL_INFER.description}


async def test_leaving_waits_for_what_is_in_flight(client, settings):
    go_on = asyncio.Event()

    async def wait(call: RawCall) -> Answer:
        await go_on.wait()
        return await echo(call)

    async with join(client, settings, plugin="candle", description="a test") as candle:
        async with contextlib.AsyncExitStack() as serving:
            await serving.enter_async_context(candle.serving_raw(MODEL_INFER, wait, "m"))
            subject = MODEL_INFER.subject(client.root, "m")
            asked = asyncio.create_task(client.relay(subject, b"5"))
            await until(lambda: candle.in_flight == 1)
            leaving = asyncio.create_task(serving.aclose())
            await client.barrier()
            assert not leaving.done()
            go_on.set()
            await leaving
        assert (await asked).body == b"5"

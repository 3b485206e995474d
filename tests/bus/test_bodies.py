"""Bodies that are too large for one message: they arrive whole, and nothing of them stays."""

import asyncio
import contextlib
import hashlib
import os
import signal
import subprocess
import sys

import pytest

from bus import codec
from bus import messages as m
from bus.assets import BODY_AGE_S
from bus.bodies import BODY, BODY_BYTES, BODY_SHA256
from bus.broker import running_broker
from bus.client import TIMEOUT_MS, Answer, connect
from bus.errors import (
    BusError,
    DeadlineExceeded,
    InvalidRequest,
    NobodyListens,
    NotFound,
)
from bus.instance import RawCall, join
from bus.streams import NS
from bus.subjects import FACES_DETECT, MODEL_INFER
from bus.testing import declared, until
from tests.bus.large_bodies import LARGE, SHA256, configured, nothing_left, stored

# --- It arrives -----------------------------------------------------------------------------------


async def test_a_body_over_the_brokers_limit_arrives_whole_and_nothing_of_it_stays(
    client, worker, subject
):
    assert len(LARGE) > client.max_payload
    answer = await client.relay(subject, LARGE, headers={"X-Said": "a"})
    assert answer.body.decode() == SHA256
    [call] = worker.calls
    assert call.body == LARGE
    assert call.headers["X-Said"] == "a"
    # For the handler it is a request as any other.
    assert not {BODY, BODY_BYTES, BODY_SHA256} & set(call.headers)
    await nothing_left(client)


async def test_a_typed_request_is_read_as_it_would_be_from_a_message(client, connected, settings):
    seen = []

    async def detect(request: m.DetectFaces) -> m.DetectedFaces:
        seen.append(request.image)
        return m.DetectedFaces(width=1, height=1, faces=[])

    async with (
        join(await connected(), settings, plugin="rustyface", description="a test") as instance,
        instance.serving(FACES_DETECT, detect),
    ):
        ask = m.DetectFaces(image=LARGE)
        for kind in (codec.MSGPACK, codec.JSON):
            told = await client.call(FACES_DETECT, ask, content_type=kind)
            assert told.faces == []
    assert seen == [LARGE, LARGE]
    await nothing_left(client)


async def test_several_at_a_time_do_not_meet(client, worker, subject):
    bodies = [bytes([i]) + LARGE for i in range(4)]
    # The same bytes twice: the end of one request takes nothing from the other.
    bodies.append(bodies[0])
    answers = await asyncio.gather(*(client.relay(subject, body) for body in bodies))
    assert [one.body.decode() for one in answers] == [
        hashlib.sha256(body).hexdigest() for body in bodies
    ]
    await nothing_left(client)


async def test_what_it_took_to_bring_the_body_is_taken_from_the_handlers_time(
    client, worker, subject
):
    given = f"00-{'a' * 32}-{'b' * 16}-01"
    await client.relay(subject, LARGE, timeout_s=40, headers={"traceparent": given})
    [call] = worker.calls
    assert 0 < int(call.headers[TIMEOUT_MS]) < 40_000
    assert worker.trace == given


async def test_a_plain_client_puts_a_body_with_its_own_means(client, worker, subject):
    """As docs/worker-protocol.md says, with nats-py alone."""
    nc = client._nc
    store = await nc.jetstream().object_store(f"{client.root}-bodies")
    info = await store.put("photo of mine.jpg", LARGE)
    headers = {BODY: "photo of mine.jpg", BODY_BYTES: str(info.size), BODY_SHA256: SHA256}
    reply = await nc.request(subject, b"", headers=headers, timeout=20)
    assert reply.data.decode() == SHA256
    # It is theirs to delete.
    assert await stored(client)
    await store.delete("photo of mine.jpg")


async def test_a_body_that_was_put_aside_before_is_asked_with_and_deleted(client, worker, subject):
    async def blocks():
        for at in range(0, len(LARGE), 70_000):
            yield LARGE[at : at + 70_000]

    reference = await client.bodies.put(blocks())
    assert reference[1:] == (len(LARGE), SHA256)
    assert (await client.relay(subject, reference)).body.decode() == SHA256
    await nothing_left(client)


async def test_a_worker_that_knows_no_references_cannot_take_one_for_an_empty_request(client):
    async def on_message(message):
        try:
            codec.decode(message.data, m.Empty, message.headers.get(codec.CONTENT_TYPE))
        except InvalidRequest as error:
            headers = {"Nats-Service-Error-Code": "400", "Nats-Service-Error": error.message}
            await client._nc.publish(message.reply, headers=headers)

    await client._nc.subscribe(f"{client.root}.call.foreign.ask", cb=on_message)
    foreign = f"{client.root}.call.foreign.ask"
    for kind in (codec.JSON, codec.MSGPACK):
        with pytest.raises(InvalidRequest, match="is not"):
            await client.relay(foreign, LARGE, headers={codec.CONTENT_TYPE: kind})
    await nothing_left(client)


# --- Nothing of it stays --------------------------------------------------------------------------


async def test_an_error_leaves_nothing(client, connected, settings, subject):
    async def refuse(_call: RawCall) -> Answer:
        raise NotFound("there is no such tensor")

    async with (
        join(await connected(), settings, plugin="candle", description="a test") as candle,
        candle.serving_raw(MODEL_INFER, refuse, "m"),
    ):
        with pytest.raises(NotFound, match="no such tensor"):
            await client.relay(subject, LARGE)
    await nothing_left(client)


async def test_nobody_who_listens_leaves_nothing(client, subject):
    with pytest.raises(NobodyListens):
        await client.relay(subject, LARGE)
    await nothing_left(client)


async def test_a_time_out_leaves_nothing_and_stops_the_work(client, worker, subject):
    worker.go_on.clear()
    with pytest.raises(DeadlineExceeded):
        await client.relay(subject, LARGE, timeout_s=1.5)
    await until(lambda: worker.cancelled == 1)
    await nothing_left(client)


async def test_a_caller_that_goes_leaves_nothing_and_stops_the_work(client, worker, subject):
    worker.go_on.clear()
    asked = asyncio.create_task(client.relay(subject, LARGE, timeout_s=60))
    await until(lambda: worker.calls)
    assert await stored(client)
    asked.cancel()
    await until(lambda: worker.cancelled == 1)
    await until(lambda: worker.instance.in_flight == 0)
    await nothing_left(client)


async def test_a_caller_that_goes_while_the_body_is_put_aside_leaves_nothing(
    client, worker, subject
):
    asked = asyncio.create_task(client.relay(subject, LARGE * 3, timeout_s=60))

    async def is_begun():
        return await stored(client)

    await until(is_begun)
    asked.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asked
    await until(lambda: not client._asker.working)
    await nothing_left(client)
    assert not worker.calls


async def test_too_little_time_to_put_it_aside_is_told_and_leaves_nothing(client, worker, subject):
    with pytest.raises(DeadlineExceeded, match="was not asked: its body of 60,000,000 bytes"):
        await client.relay(subject, LARGE * 3, timeout_s=0.005)
    await nothing_left(client)
    assert not worker.calls


async def test_a_client_that_closes_right_after_its_answer_leaves_nothing(
    broker, client, worker, subject
):
    async with connect(broker.url, name="test", root=client.root) as other:
        await other.relay(subject, LARGE)
    assert not await stored(client)


async def test_a_client_that_closes_in_the_middle_leaves_nothing(broker, client, worker, subject):
    worker.go_on.clear()
    async with connect(broker.url, name="test", root=client.root) as other:
        asked = asyncio.create_task(other.relay(subject, LARGE, timeout_s=60))
        await until(lambda: worker.calls)
    with pytest.raises(BusError, match="was closed"):
        await asked
    assert not await stored(client)
    worker.go_on.set()


ASK_AND_WAIT = """
import asyncio, sys
from bus.client import connect
async def main():
    async with connect(sys.argv[1], name="test", root=sys.argv[2]) as client:
        await client.relay(sys.argv[3], bytes(20_000_000), timeout_s=600)
asyncio.run(main())
"""


async def test_what_a_killed_asker_leaves_goes_by_its_age(broker, client, worker, subject):
    assert (await configured(client))["max_age"] == BODY_AGE_S * NS
    worker.go_on.clear()
    asker = await asyncio.create_subprocess_exec(
        sys.executable, "-c", ASK_AND_WAIT, broker.url, client.root, subject,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    await until(lambda: worker.calls)
    asker.send_signal(signal.SIGKILL)
    await asker.wait()
    assert await stored(client)
    await configured(client, max_age=NS // 5, duplicate_window=NS // 5)
    await nothing_left(client)
    worker.go_on.set()


@pytest.fixture
async def standing(tmp_path, root):
    """A client of a broker that stands still, and what has it go on."""
    async with (
        running_broker(tmp_path, sync_interval="2m") as broker,
        declared(broker.url, root) as client,
    ):
        os.kill(broker.pid, signal.SIGSTOP)
        try:
            yield client, lambda: os.kill(broker.pid, signal.SIGCONT)
        finally:
            os.kill(broker.pid, signal.SIGCONT)


async def test_a_caller_hears_in_time_that_a_broker_stands_still_and_its_body_goes_later(standing):
    client, go_on = standing
    began = asyncio.get_running_loop().time()
    with pytest.raises(DeadlineExceeded, match="was not stored within 1 s"):
        await client.relay(f"{client.root}.call.x", LARGE, timeout_s=1)
    assert asyncio.get_running_loop().time() - began < 5
    assert client.bodies._leaving
    go_on()
    await until(lambda: not client.bodies._leaving)
    assert not await stored(client)


async def test_a_body_that_comes_in_pieces_is_stored_in_time_or_not_at_all(standing):
    client, go_on = standing

    async def blocks():
        while True:
            await asyncio.sleep(0.1)
            yield LARGE[:2_000_000]

    began = asyncio.get_running_loop().time()
    # What the sender takes is the sender's: a second is full when the store took it.
    with pytest.raises(DeadlineExceeded, match="bytes or more was not stored within 1 s"):
        await client.bodies.put(blocks(), within_s=1)
    assert 1.2 < asyncio.get_running_loop().time() - began < 5
    go_on()
    await until(lambda: not client.bodies._leaving)
    assert not await stored(client)


async def test_a_client_that_closes_before_a_broker_that_stands_still_leaves_no_task(
    standing, root
):
    client, _ = standing
    before = asyncio.all_tasks()
    with pytest.raises(DeadlineExceeded):
        await client.relay(f"{root}.call.x", LARGE, timeout_s=0.2)
    assert client.bodies._leaving
    async with asyncio.timeout(6):
        await client._leave()
    assert asyncio.all_tasks() <= before

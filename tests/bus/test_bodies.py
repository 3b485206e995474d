"""Bodies that are too large for one message: they arrive whole, and nothing of them stays."""

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tracemalloc

import pytest

from bus import codec, serving
from bus import messages as m
from bus.assets import BODY_AGE_S
from bus.bodies import BODY, BODY_BYTES, BODY_SHA256, Reference
from bus.broker import running_broker
from bus.client import TIMEOUT_MS, Answer, connect, trace
from bus.errors import (
    BusError,
    Conflict,
    DeadlineExceeded,
    InvalidRequest,
    NobodyListens,
    NotFound,
    Overloaded,
    TooLarge,
    Unavailable,
    Unprocessable,
)
from bus.instance import RawCall, join
from bus.objects import chunks_subject, message, name_subject
from bus.settings import bodies_share_bytes, body_max_bytes
from bus.streams import NS, ask_jetstream
from bus.subjects import FACES_DETECT, MODEL_INFER
from bus.testing import declared, until

LARGE = bytes(range(250)) * 80_000
SHA256 = hashlib.sha256(LARGE).hexdigest()


class Worker:
    """Answers with the digest of what it is asked, when it may.

    Attributes:
        calls: What it was asked.
        go_on: It answers as long as that is set.
        cancelled: How many of its callers went.
    """

    def __init__(self) -> None:
        self.calls: list[RawCall] = []
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.cancelled = 0

    async def answer(self, call: RawCall) -> Answer:
        self.calls.append(call)
        self.trace = trace.get()
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return Answer(hashlib.sha256(call.body).hexdigest().encode(), {})


@pytest.fixture
async def worker(connected, settings):
    one = Worker()
    async with (
        join(await connected(), settings, plugin="candle", description="a test") as one.instance,
        one.instance.serving_raw(MODEL_INFER, one.answer, "m"),
    ):
        yield one


@pytest.fixture
def subject(client):
    return MODEL_INFER.subject(client.root, "m")


async def stored(client):
    """Return what is in the store, chunks and names, by subject."""
    return (await client.bodies._stream.occupied("$O.>")).subjects


def nothing_left(client):
    async def is_empty():
        return not await stored(client)

    return until(is_empty)


async def configured(client, **changes):
    """Change the store's configuration; return it as it was before."""
    stream = f"OBJ_{client.root}-bodies"
    before = (await ask_jetstream(client._nc, f"$JS.API.STREAM.INFO.{stream}", b""))["config"]
    if changes:
        await ask_jetstream(
            client._nc, f"$JS.API.STREAM.UPDATE.{stream}", json.dumps(before | changes).encode()
        )
    return before


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


async def test_a_body_that_the_broker_lost_is_no_fault_of_whoever_asked(client, worker, subject):
    async def blocks():
        yield LARGE

    lost = await client.bodies.put(blocks())
    await client.bodies._stream.purge(name_subject(client.bodies._bucket, lost.name))
    with pytest.raises(Unavailable, match="has lost the body of 20,000,000 bytes") as raised:
        await client.relay(subject, lost)
    assert (raised.value.field, raised.value.retry_after_s) == (None, 1.0)
    assert not worker.calls
    await nothing_left(client)


# --- It is not what was said ----------------------------------------------------------------------


@pytest.fixture
async def put(client):
    async def blocks():
        yield LARGE

    return await client.bodies.put(blocks())


@pytest.mark.parametrize(
    ("change", "error", "field", "says"),
    [
        ({"name": "gone"}, Conflict, BODY, "'gone' is not in .*-bodies, or no longer: put it"),
        ({"size": 19_999_999}, Unprocessable, BODY_BYTES, "has 20,000,000 bytes"),
        ({"size": 20_000_001}, Unprocessable, BODY_BYTES, "says 20,000,001"),
        ({"sha256": "0" * 64}, Unprocessable, BODY_SHA256, f"{SHA256}, but .* says 0000"),
        ({"sha256": "0" * 63}, InvalidRequest, BODY_SHA256, "SHA-256 in hex"),
        ({"size": "many"}, InvalidRequest, BODY_BYTES, "how many bytes the body has"),
        ({"size": 70_000_000}, TooLarge, None, "allowed are 67,108,864; BKG_BODY_MAX_BYTES"),
    ],
)
async def test_a_reference_to_another_body_is_refused_in_words(
    client, worker, subject, put, change, error, field, says
):
    headers = put._replace(**change).headers
    with pytest.raises(error, match=says) as raised:
        await client.relay(subject, b"", headers=headers)
    assert raised.value.field == field
    assert not worker.calls
    assert worker.instance._asked._held_bytes == 0
    # The short way goes on.
    await client.relay(subject, b"short")


async def test_a_header_that_is_missing_is_named(client, worker, subject, put):
    for name in (BODY_BYTES, BODY_SHA256):
        headers = {key: one for key, one in put.headers.items() if key != name}
        with pytest.raises(InvalidRequest, match=name):
            await client.relay(subject, b"", headers=headers)


async def test_a_body_of_which_a_chunk_is_missing_is_refused(client, worker, subject, put):
    [chunks] = [name for name in await stored(client) if ".C." in name]
    chunk = await client.bodies._stream.at_or_after(1, chunks)
    await client.bodies._stream.remove(chunk.seq)
    with pytest.raises(Unprocessable, match="put it there whole"):
        await client.relay(subject, b"", headers=put.headers)
    # Whoever had it put aside by us reads what is theirs.
    with pytest.raises(Unavailable, match="put it there whole.*; ask again"):
        await client.relay(subject, put)
    await nothing_left(client)


async def test_a_body_in_very_many_chunks_is_refused_before_all_of_them_are_taken(
    client, worker, subject
):
    body, bucket = LARGE[:20_000], client.bodies._bucket
    for at in range(0, len(body), 2):
        await client._nc.publish(chunks_subject(bucket, "x"), body[at : at + 2])
    said = {"name": "x", "nuid": "x", "size": len(body), "chunks": len(body) // 2}
    await client.bodies._stream.append(name_subject(bucket, "x"), message(said))
    reference = Reference("x", len(body), hashlib.sha256(body).hexdigest())
    with pytest.raises(Unprocessable, match="has more than 5 chunks: .* 4,096 bytes or more"):
        await client.relay(subject, b"", headers=reference.headers)
    assert not worker.calls


async def test_a_body_that_is_fetched_is_held_once(client, put):
    tracemalloc.start()
    try:
        assert await client.bodies.fetch(put) == LARGE
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1.6 * len(LARGE)


# --- Limits ---------------------------------------------------------------------------------------


async def test_a_body_over_the_limit_is_refused_before_anything_is_stored(client, subject):
    assert client.body_max_bytes == 64 * 1024**2
    with pytest.raises(
        TooLarge, match=r"80,000,000 bytes, allowed are 67,108,864; BKG_BODY_MAX_BYTES changes"
    ):
        await client.relay(subject, LARGE * 4)
    assert not await stored(client)


async def test_a_body_that_turns_out_too_large_on_its_way_leaves_nothing(client):
    async def blocks():
        while True:
            yield LARGE

    with pytest.raises(TooLarge, match=r"80,000,000 bytes or more"):
        await client.bodies.put(blocks())
    await nothing_left(client)


def test_the_limit_is_a_setting(monkeypatch):
    monkeypatch.setenv("BKG_BODY_MAX_BYTES", "100000000")
    assert body_max_bytes() == 100_000_000
    monkeypatch.setenv("BKG_BODY_MAX_BYTES", "1k")
    with pytest.raises(InvalidRequest, match="from 8,388,608 to 134,217,728"):
        body_max_bytes()


async def test_what_is_put_aside_leaves_others_their_share_of_the_store(client, worker, subject):
    client.bodies.share_bytes = 50_000_000
    worker.go_on.clear()
    asked = [asyncio.create_task(client.relay(subject, LARGE, timeout_s=60)) for _ in range(2)]
    await until(lambda: len(worker.calls) == 2)
    begun = []

    async def blocks():
        begun.append(True)
        yield LARGE

    says = (
        "this body has 20,000,000 bytes, and other large ones .* have 40,000,000 in "
        f"{client.root}-bodies; 50,000,000 are allowed together .BKG_BODIES_SHARE_BYTES"
    )
    for put in (client.relay(subject, LARGE), client.bodies.put(blocks(), len(LARGE))):
        with pytest.raises(Unavailable, match=says) as raised:
            await put
        assert raised.value.retry_after_s == 1.0
    assert not begun
    # One that does not say how long it will be hears it on its way.
    with pytest.raises(Unavailable, match="20,000,000 bytes or more"):
        await client.bodies.put(blocks())
    worker.go_on.set()
    await asyncio.gather(*asked)
    await nothing_left(client)
    await until(lambda: not client.bodies._ours)
    await client.relay(subject, LARGE)


def test_the_share_is_a_setting(monkeypatch):
    assert bodies_share_bytes() == 512 * 1024**2
    monkeypatch.setenv("BKG_BODIES_SHARE_BYTES", "100000000")
    assert bodies_share_bytes() == 100_000_000
    # The largest body has to fit.
    monkeypatch.setenv("BKG_BODY_MAX_BYTES", "100000001")
    with pytest.raises(InvalidRequest, match="from 100,000,001 to 1,073,741,824"):
        bodies_share_bytes()


async def test_an_instance_holds_no_more_than_some_of_the_largest(
    client, worker, subject, monkeypatch
):
    monkeypatch.setattr(serving, "BODIES_MAX", 1)
    worker.go_on.clear()
    asked = [asyncio.create_task(client.relay(subject, LARGE, timeout_s=60)) for _ in range(3)]
    await until(lambda: len(worker.calls) == 3)
    held = worker.instance._asked
    assert held._held_bytes == 60_000_000
    with pytest.raises(
        Overloaded, match=r"on 60,000,000 bytes of large bodies already, 67,108,864 are"
    ):
        await client.relay(subject, LARGE)
    worker.go_on.set()
    await asyncio.gather(*asked)
    assert held._held_bytes == 0
    await client.relay(subject, LARGE)
    await nothing_left(client)


async def test_a_full_store_is_told_and_leaves_nothing(client, subject):
    await configured(client, max_bytes=5_000_000)
    with pytest.raises(BusError, match="the store of large bodies, .*-bodies, was full") as raised:
        await client.relay(subject, LARGE)
    assert raised.value.code == "no-space"
    await nothing_left(client)


# --- While it is fetched --------------------------------------------------------------------------


@pytest.fixture
def hanging(worker, monkeypatch):
    """Lets no body arrive at the worker."""
    begun: list[Reference] = []

    async def fetch(reference):
        begun.append(reference)
        await asyncio.Event().wait()

    monkeypatch.setattr(worker.instance._client.bodies, "fetch", fetch)
    return begun


async def test_a_body_that_does_not_come_in_time_is_told(client, worker, subject, hanging):
    outcome = asyncio.create_task(client._nc.request(
        subject, b"", timeout=20,
        headers={BODY: "x", BODY_BYTES: "1000", BODY_SHA256: SHA256, TIMEOUT_MS: "200"},
    ))  # fmt: skip
    told = codec.decode((await outcome).data, dict)
    assert told["code"] == "deadline-exceeded"
    assert "the body of 1,000 bytes did not come" in told["message"]
    assert worker.instance.in_flight == worker.instance._asked._held_bytes == 0


async def test_a_caller_that_goes_while_it_is_fetched_stops_that(client, worker, subject, hanging):
    asked = asyncio.create_task(client.relay(subject, LARGE, timeout_s=60))
    await until(lambda: hanging)
    assert worker.instance.in_flight == 1
    asked.cancel()
    await until(lambda: worker.instance.in_flight == 0)
    assert worker.instance._asked._held_bytes == 0
    assert not worker.calls
    await nothing_left(client)

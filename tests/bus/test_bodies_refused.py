"""Bodies that are too large for one message: what is refused of them, and in which words."""

import asyncio
import hashlib
import tracemalloc

import pytest

from bus import codec, serving
from bus.bodies import BODY, BODY_BYTES, BODY_SHA256, Reference
from bus.client import TIMEOUT_MS
from bus.errors import (
    BusError,
    Conflict,
    InvalidRequest,
    Overloaded,
    TooLarge,
    Unavailable,
    Unprocessable,
)
from bus.objects import chunks_subject, message, name_subject
from bus.settings import bodies_share_bytes, body_max_bytes
from bus.testing import until
from tests.bus.large_bodies import LARGE, SHA256, configured, nothing_left, stored

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


@pytest.mark.parametrize("size", ["1e999", '"many"', "null"])
async def test_a_name_that_says_what_no_size_can_be_leads_nowhere(client, worker, subject, size):
    bucket = client.bodies._bucket
    said = f'{{"name": "x", "nuid": "x", "size": {size}, "chunks": 1}}'
    await client.bodies._stream.append(name_subject(bucket, "x"), said.encode())
    with pytest.raises(Conflict, match="'x' is not in"):
        await client.relay(subject, b"", headers=Reference("x", 1, SHA256).headers)
    assert not worker.calls


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

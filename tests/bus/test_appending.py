"""Many messages as one: all of them or none, whatever was lost or killed on the way."""

import asyncio
import contextlib
import itertools
import json
import os
import signal

import nats.errors
import pytest

from bus import streams
from bus.broker import running_broker
from bus.client import connect
from bus.errors import BusError, Conflict
from bus.jetstream import StoreFullError, ask_jetstream
from bus.streams import MESSAGE_ID, Outgoing, Stream
from bus.subjects import GALLERY_ENTRY, GALLERY_HEAD
from bus.tasks import beside
from bus.testing import until

COUNT = 700


@pytest.fixture
def outgoing(client):
    """Gives messages about entries, each with an id of its own."""

    def make(count: int, name: str = "e") -> list[Outgoing]:
        subjects = (
            GALLERY_ENTRY.subject(client.root, gallery="g", entry=f"{name}{i}")
            for i in range(count)
        )
        return [Outgoing(s, b"x", {MESSAGE_ID: f"{client.root}.{s}"}) for s in subjects]

    return make


@pytest.fixture
def configured(client):
    """Makes the stream of galleries anew, and other than it is declared."""

    async def make(**changes) -> Stream:
        stream = client.store.galleries
        found = await ask_jetstream(client._nc, f"$JS.API.STREAM.INFO.{stream.name}", b"")
        await ask_jetstream(client._nc, f"$JS.API.STREAM.DELETE.{stream.name}", b"")
        body = json.dumps(found["config"] | changes).encode()
        await ask_jetstream(client._nc, f"$JS.API.STREAM.CREATE.{stream.name}", body)
        return stream

    return make


async def stored(stream: Stream, root: str) -> list[streams.Stored]:
    return [one async for one in stream.read(f"{root}.gallery.>")]


def wholes(messages: list[streams.Stored]) -> list[int]:
    """Return how large each batch is that messages came in, having looked that none is broken."""
    found: dict[str, list[streams.Stored]] = {}
    for one in messages:
        if batch := one.headers.get("Nats-Batch-Id"):
            found.setdefault(batch, []).append(one)
    for batch in found.values():
        numbers = [int(one.headers["Nats-Batch-Sequence"]) for one in batch]
        assert numbers == list(range(1, len(batch) + 1))
        assert batch[-1].headers["Nats-Batch-Commit"] == "1"
    return [len(batch) for batch in found.values()]


async def test_many_messages_are_stored_in_their_order_as_few_batches(client, outgoing):
    sent = outgoing(COUNT)
    last = await client.store.galleries.append_all(sent)
    found = await stored(client.store.galleries, client.root)
    assert [one.subject for one in found] == [one.subject for one in sent]
    assert found[-1].seq == last == COUNT
    assert wholes(found) == [250, 250, 200]
    assert await client.store.galleries.append_all([]) == 0


async def test_large_messages_make_smaller_batches(client, outgoing):
    body = b"x" * (streams.AS_ONE_MAX_BYTES // 3)
    sent = [one._replace(body=body) for one in outgoing(7)]
    await client.store.galleries.append_all(sent)
    assert wholes(await stored(client.store.galleries, client.root)) == [3, 3]


async def test_where_another_subject_has_moved_on_nothing_of_a_batch_is_stored(client, outgoing):
    stream = client.store.galleries
    head = GALLERY_HEAD.subject(client.root, gallery="g")
    first = await stream.append(head, b"1")
    await stream.append_all(outgoing(3), expect=(head, first))
    await stream.append(head, b"2")
    before = await stream.last_seq()
    with pytest.raises(Conflict):
        await stream.append_all(outgoing(3, "f"), expect=(head, first))
    assert await stream.last_seq() == before


async def test_what_has_no_room_is_kept_out_as_a_whole(configured, outgoing):
    stream = await configured(max_bytes=50_000)
    sent = [one._replace(body=b"x" * 10_000) for one in outgoing(10)]
    with pytest.raises(StoreFullError):
        await stream.append_all(sent)
    assert await stream.last_seq() == 0


async def test_a_stream_that_takes_no_batches_gets_its_messages_one_by_one(
    client, configured, outgoing
):
    stream = await configured(allow_atomic=False)
    sent = outgoing(COUNT)
    last = await stream.append_all(sent)
    found = await stored(stream, client.root)
    assert {one.subject for one in found} == {one.subject for one in sent}
    assert (last, len(found), wholes(found)) == (COUNT, COUNT, [])


async def test_a_stream_from_before_takes_batches_once_it_was_declared(
    client, configured, outgoing
):
    stream = await configured(allow_atomic=False)
    await stream.append_all(outgoing(2))
    await client.store.declare()
    await stream.append_all(outgoing(2, "f"))
    assert wholes(await stored(stream, client.root)) == [2]


async def test_a_stream_that_takes_batches_no_more_gets_its_messages_one_by_one(
    client, configured, outgoing
):
    stream = client.store.galleries
    await stream.append_all(outgoing(2))
    await configured(allow_atomic=False)
    await stream.append_all(outgoing(2, "f"))
    found = await stored(stream, client.root)
    assert (len(found), wholes(found)) == (2, [])


@pytest.mark.parametrize("there", [range(COUNT), range(COUNT // 3), [COUNT - 1]])
async def test_what_is_stored_already_is_stored_once(client, outgoing, there):
    sent = outgoing(COUNT)
    stream = client.store.galleries
    for i in there:
        await stream.append(sent[i].subject, sent[i].body, headers=sent[i].headers)
    last = await stream.append_all(sent)
    found = await stored(stream, client.root)
    assert sorted(one.subject for one in found) == sorted(one.subject for one in sent)
    assert last <= COUNT


async def test_a_lost_answer_doubles_nothing(client, outgoing, monkeypatch):
    request, lost = client._nc.request, []

    async def losing(subject, body, *, headers=None, timeout):
        reply = await request(subject, body, headers=headers, timeout=timeout)
        if "Nats-Batch-Commit" in (headers or {}) and not lost:
            lost.append(json.loads(reply.data)["seq"])
            raise nats.errors.TimeoutError
        return reply

    monkeypatch.setattr(client._nc, "request", losing)
    assert await client.store.galleries.append_all(outgoing(100)) == 100
    assert lost == [100]
    assert len(await stored(client.store.galleries, client.root)) == 100


async def test_a_batch_of_which_a_part_was_lost_is_sent_again(client, outgoing, monkeypatch):
    publish, lost = client._nc.publish, []

    async def losing(subject, body=b"", *, headers=None, **more):
        if (headers or {}).get("Nats-Batch-Sequence") == "42" and not lost:
            lost.append(subject)
            return
        await publish(subject, body, headers=headers, **more)

    monkeypatch.setattr(client._nc, "publish", losing)
    assert await client.store.galleries.append_all(outgoing(100)) == 100
    assert lost
    assert wholes(await stored(client.store.galleries, client.root)) == [100]


async def test_more_at_once_than_the_broker_holds_open_are_all_stored(client, outgoing):
    stream = client.store.galleries
    await asyncio.gather(*(stream.append_all(outgoing(20, f"{i}-")) for i in range(120)))
    found = await stored(stream, client.root)
    assert len({one.subject for one in found}) == len(found) == 120 * 20


async def test_a_cancelled_caller_leaves_whole_batches(client, outgoing):
    stream = client.store.galleries
    appending = asyncio.create_task(stream.append_all(outgoing(5_000)))
    await until(stream.last_seq)
    appending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await appending
    await stream.append(GALLERY_HEAD.subject(client.root, gallery="g"), b"")
    found = await stored(stream, client.root)
    assert set(wholes(found)) == {250}
    assert len(found) < 5_000


async def test_a_broker_killed_again_and_again_has_what_it_acknowledged_and_no_half_batch(tmp_path):
    acknowledged: dict[int, int] = {}
    numbers = itertools.count()
    # In this order: nats-py never ends where it is closed while it looks for its broker.
    async with contextlib.AsyncExitStack() as brokers, contextlib.AsyncExitStack() as opened:
        broker = await brokers.enter_async_context(running_broker(tmp_path))
        client = await opened.enter_async_context(connect(broker.url, name="test", root="r"))
        await client.store.declare()
        stream = client.store.galleries

        async def keep_appending() -> None:
            while True:
                number = next(numbers)
                subjects = (f"r.gallery.g.entry.{number}-{i}" for i in range(100))
                sent = [Outgoing(subject, os.urandom(500)) for subject in subjects]
                with contextlib.suppress(BusError):
                    acknowledged[number] = await stream.append_all(sent)

        async with beside(*(keep_appending() for _ in range(3))):
            for _ in range(2):
                enough = len(acknowledged) + 40
                await until(lambda enough=enough: len(acknowledged) > enough)
                os.kill(broker.pid, signal.SIGKILL)
                await brokers.aclose()
                broker = await brokers.enter_async_context(running_broker(tmp_path))
            await until(lambda: len(acknowledged) > enough + 40)
        found = await stored(stream, "r")
    assert set(wholes(found)) == {100}
    seqs = {one.subject: one.seq for one in found}
    assert len(seqs) == len(found)
    for number, last in acknowledged.items():
        assert seqs[f"r.gallery.g.entry.{number}-99"] == last

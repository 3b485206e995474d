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

COUNT = streams.AS_ONE_MAX


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


async def test_many_messages_are_stored_in_their_order_as_one(client, outgoing):
    sent = outgoing(COUNT)
    last = await client.store.galleries.append_batch(sent)
    found = await stored(client.store.galleries, client.root)
    assert [one.subject for one in found] == [one.subject for one in sent]
    assert found[-1].seq == last == COUNT
    assert wholes(found) == [COUNT]


@pytest.mark.parametrize("at", [0, 1, 2])
async def test_where_one_expects_what_is_not_so_any_more_nothing_of_a_batch_is_stored(
    client, outgoing, at
):
    stream = client.store.galleries
    head = GALLERY_HEAD.subject(client.root, gallery="g")
    first = await stream.append(head, b"1")

    def expecting(name: str) -> list[Outgoing]:
        sent = outgoing(3, name)
        sent[at] = sent[at]._replace(expect=(head, first))
        return sent

    assert await stream.append_batch(expecting("e")) == first + 3
    await stream.append(head, b"2")
    before = await stream.last_seq()
    with pytest.raises(Conflict):
        await stream.append_batch(expecting("f"))
    assert await stream.last_seq() == before


async def test_each_message_of_a_batch_may_expect_something_of_its_own(client, outgoing):
    stream = client.store.galleries
    head, other = (GALLERY_HEAD.subject(client.root, gallery=name) for name in "gh")
    expected = [(head, await stream.append(head, b"1")), (other, 0)]
    sent = [one._replace(expect=(one.subject, 0)) for one in outgoing(3)]
    # Several of one subject, if none of them expects something of that.
    fence = outgoing(1, "fence")[0].subject
    fences = [Outgoing(fence, b"", {MESSAGE_ID: str(i)}, one) for i, one in enumerate(expected)]
    assert await stream.append_batch([*sent, *fences]) == 6
    with pytest.raises(Conflict):
        await stream.append_batch([sent[2]._replace(headers={}), *outgoing(3, "f")])


async def test_what_has_no_room_is_kept_out_as_a_whole(configured, outgoing):
    stream = await configured(max_bytes=50_000)
    sent = [one._replace(body=b"x" * 10_000) for one in outgoing(10)]
    with pytest.raises(StoreFullError):
        await stream.append_batch(sent)
    assert await stream.last_seq() == 0


async def test_a_stream_that_takes_no_batches_is_given_none(configured, outgoing):
    stream = await configured(allow_atomic=False)
    assert await stream.append_batch(outgoing(2)) is None
    assert await stream.last_seq() == 0


async def test_a_stream_from_before_takes_batches_once_it_was_declared(
    client, configured, outgoing
):
    stream = await configured(allow_atomic=False)
    assert await stream.append_batch(outgoing(2)) is None
    await client.store.declare()
    assert await stream.append_batch(outgoing(2)) == 2
    assert wholes(await stored(stream, client.root)) == [2]


async def test_a_stream_that_takes_batches_no_more_is_found_out(client, configured, outgoing):
    stream = client.store.galleries
    assert await stream.append_batch(outgoing(2)) == 2
    await configured(allow_atomic=False)
    assert await stream.append_batch(outgoing(2, "f")) is None
    assert await stream.last_seq() == 0


@pytest.mark.parametrize("there", [range(COUNT), range(COUNT // 3), [COUNT - 1]])
async def test_what_is_stored_already_is_stored_once(client, outgoing, there):
    sent = outgoing(COUNT)
    stream = client.store.galleries
    for i in there:
        await stream.append(sent[i].subject, sent[i].body, headers=sent[i].headers)
    assert await stream.append_batch(sent) is None
    seqs = await stream.append_each(sent)
    found = await stored(stream, client.root)
    assert sorted(one.subject for one in found) == sorted(one.subject for one in sent)
    assert {one.subject: one.seq for one in found} == {
        one.subject: seq for one, seq in zip(sent, seqs, strict=True)
    }


async def test_of_messages_one_by_one_those_are_left_out_that_somebody_is_ahead_of(
    client, outgoing
):
    stream = client.store.galleries
    sent = [one._replace(expect=(one.subject, 0)) for one in outgoing(COUNT)]
    ahead = await stream.append(sent[7].subject, b"theirs")
    seqs = await stream.append_each(sent)
    assert [i for i, seq in enumerate(seqs) if seq is None] == [7]
    [found] = [one async for one in stream.read(sent[7].subject)]
    assert (found.seq, found.body) == (ahead, b"theirs")


async def test_of_messages_one_by_one_none_is_tried_after_one_that_cannot_be_stored(
    configured, outgoing
):
    stream = await configured(max_bytes=50_000)
    with pytest.raises(StoreFullError):
        await stream.append_each([one._replace(body=b"x" * 10_000) for one in outgoing(10)])
    assert 0 < await stream.last_seq() < 10


async def test_a_lost_answer_doubles_nothing(client, outgoing, monkeypatch):
    request, lost = client._nc.request, []

    async def losing(subject, body, *, headers=None, timeout):
        reply = await request(subject, body, headers=headers, timeout=timeout)
        if "Nats-Batch-Commit" in (headers or {}) and not lost:
            lost.append(json.loads(reply.data)["seq"])
            raise nats.errors.TimeoutError
        return reply

    monkeypatch.setattr(client._nc, "request", losing)
    sent = outgoing(100)
    assert await client.store.galleries.append_batch(sent) is None
    assert lost == [100]
    assert await client.store.galleries.append_each(sent) == list(range(1, 101))
    assert len(await stored(client.store.galleries, client.root)) == 100


async def test_a_batch_of_which_a_part_was_lost_is_sent_again(client, outgoing, monkeypatch):
    publish, lost = client._nc.publish, []

    async def losing(subject, body=b"", *, headers=None, **more):
        if (headers or {}).get("Nats-Batch-Sequence") == "42" and not lost:
            lost.append(subject)
            return
        await publish(subject, body, headers=headers, **more)

    monkeypatch.setattr(client._nc, "publish", losing)
    assert await client.store.galleries.append_batch(outgoing(100)) == 100
    assert lost
    assert wholes(await stored(client.store.galleries, client.root)) == [100]


async def test_more_at_once_than_the_broker_holds_open_are_all_stored(client, outgoing):
    stream = client.store.galleries
    await asyncio.gather(*(stream.append_batch(outgoing(20, f"{i}-")) for i in range(120)))
    found = await stored(stream, client.root)
    assert len({one.subject for one in found}) == len(found) == 120 * 20


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
                    # None: it is stored, and its answer was lost.
                    if seq := await stream.append_batch(sent):
                        acknowledged[number] = seq

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

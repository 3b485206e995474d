"""What is deleted: gone, or said not to be; and what somebody needs again comes back."""

import json
import random
from datetime import timedelta

import pytest

from bus import messages as m
from bus.broker import running_broker
from bus.client import connect
from bus.errors import BusError, Conflict, Internal, Unavailable
from bus.streams import Stream
from bus.uploads import CHUNK_BYTES
from tests.bus.damage import damaged, denying

BODY = random.Random(5).randbytes(3 * CHUNK_BYTES)  # noqa: S311 - no secret


async def declared(client, name: str, **more) -> Stream:
    """Make a stream, or change it."""
    config = {"name": name, "subjects": [f"{name}.>"], "storage": "file", **more}
    for verb in ("CREATE", "UPDATE"):
        told = await client._nc.request(
            f"$JS.API.STREAM.{verb}.{name}", json.dumps(config).encode()
        )
    assert "error" not in json.loads(told.data)
    return Stream(client._nc, name)


async def filled(client, name: str, count: int = 10, **more) -> Stream:
    stream = await declared(client, name, **more)
    for i in range(count):
        await stream.append(f"{name}.{i}", f"body {i}".encode())
    return stream


@pytest.fixture
async def client(tmp_path):
    """Over a broker whose files lie in ``tmp_path``."""
    async with (
        running_broker(tmp_path) as broker,
        connect(broker.url, name="test", root="r") as one,
    ):
        await one.store.declare()
        yield one


# --- A message ------------------------------------------------------------------------------------


async def test_what_is_not_there_is_deleted_already_wherever_it_would_be(tmp_path):
    async with (
        running_broker(tmp_path) as broker,
        connect(broker.url, name="test", root="r") as client,
    ):
        empty = await declared(client, "empty")
        stream = await filled(client, "s")
        displaced = await declared(client, "d", max_msgs_per_subject=1)
        for _ in range(3):
            await displaced.append("d.a", b"")
        for erase in (True, False):
            await empty.remove(1, erase=erase)
            for seq in (3, 4):
                await stream.remove(seq, erase=erase)
                await stream.remove(seq, erase=not erase)
            await stream.purge("s.6")
            await stream.remove(7, erase=erase)
            await stream.remove(1_000, erase=erase)
            await stream.purge("s.>", keep_from=3)
            await stream.remove(2, erase=erase)
            await displaced.remove(2, erase=erase)
        assert len(await texts(stream)) == 5
        await stream.remove(10)
    async with (
        running_broker(tmp_path) as broker,
        connect(broker.url, name="test", root="r") as client,
    ):
        stream = Stream(client._nc, "s")
        for seq in (1, 2, 3, 4, 7, 10, 11):
            await stream.remove(seq, erase=True)
        assert len(await texts(stream)) == 4
        await stream.purge("s.>")
        await stream.remove(9, erase=True)
        await stream.remove(11, erase=True)


async def texts(stream: Stream) -> list[str]:
    return [stored.body.decode() async for stored in stream.read(f"{stream.name}.>")]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"deny_delete": True}, "message delete not permitted"),
        ({"sealed": True}, "invalid operation on sealed stream"),
    ],
)
async def test_a_deletion_that_the_broker_refuses_is_an_error(client, more, says):
    stream = await filled(client, "s")
    await declared(client, "s", **more)
    # Also of what is not there: it does not look.
    for seq in (1, 1_000):
        with pytest.raises(Internal, match=says):
            await stream.remove(seq, erase=True)
    assert len(await texts(stream)) == 10


async def test_where_there_is_no_stream_nothing_was_deleted(client):
    with pytest.raises(Unavailable, match="the stream is not there"):
        await Stream(client._nc, "not-there").remove(1)


async def test_a_message_that_the_broker_cannot_read_is_not_deleted(tmp_path):
    async with (
        running_broker(tmp_path) as broker,
        connect(broker.url, name="test", root="r") as client,
    ):
        await filled(client, "s")
    damaged(tmp_path, b"body 4")
    async with (
        running_broker(tmp_path) as broker,
        connect(broker.url, name="test", root="r") as client,
    ):
        stream = Stream(client._nc, "s")
        with pytest.raises(Internal, match="malformed or corrupt message"):
            await stream.remove(5, erase=True)
        # Nor does it tell of it. All others are erased.
        with pytest.raises(Internal, match="cannot read 1 messages of s.>"):
            await stream.erase("s.>")
        assert (await stream.occupied("s.>")).subjects == {"s.4": 1}


# --- An artefact ----------------------------------------------------------------------------------


@pytest.fixture
def store(client):
    return client.store.faces


async def stored(store, body: bytes = BODY) -> str:
    async with store.writing() as upload:
        await upload.write(body)
        return (await upload.commit()).digest


async def read(store, digest: str) -> bytes:
    return b"".join([block async for block in store.read(digest)])


async def messages(store) -> int:
    """Count all that is in the store's stream."""
    return sum((await store._stream.occupied(">")).subjects.values())


def saying(needed: bool, seen: list[object], store=None, digest: str = ""):
    """Say whether somebody needs an artefact, and look what others see of it meanwhile."""

    async def unless() -> bool:
        if store is not None:
            seen.append(await store.size(digest))
            seen.append([one.digest for one in await store.all()])
            seen.append(await store.unfinished())
        else:
            seen.append(None)
        return needed

    return unless


async def test_what_somebody_needs_comes_back_and_was_out_of_sight_meanwhile(store):
    digest = await stored(store)
    seen: list[object] = []
    assert not await store.delete(digest, unless=saying(True, seen, store, digest))
    assert seen == [None, [], []]
    assert await read(store, digest) == BODY
    assert await store.delete(digest, unless=saying(False, seen))
    assert await store.size(digest) is None
    assert await messages(store) == 0


@pytest.mark.parametrize("way", ["touched", "stored"])
async def test_what_is_brought_again_while_somebody_decides_stays(store, way):
    digest = await stored(store)

    async def unless() -> bool:
        if way == "touched":
            assert await store.touch(digest) == len(BODY)
        else:
            await stored(store)
        return False

    assert not await store.delete(digest, unless=unless)
    assert await read(store, digest) == BODY
    # One name, and the chunks that it leads to.
    assert await messages(store) == 1 + 3


async def test_what_is_stored_anew_while_it_is_erased_stays(store, monkeypatch):
    digest = await stored(store)
    drop = store.drop

    async def late(*args: object) -> None:
        monkeypatch.undo()
        assert await store.touch(digest) is None
        await stored(store)
        await drop(*args)

    monkeypatch.setattr(store, "drop", late)
    assert await store.delete(digest)
    assert await read(store, digest) == BODY
    assert await messages(store) == 1 + 3


async def test_a_deletion_that_was_cut_short_is_decided_by_the_next_one(store):
    digest = await stored(store)

    async def away() -> bool:
        raise Unavailable("the broker is away")

    for needed in (True, False):
        with pytest.raises(Unavailable):
            await store.delete(digest, unless=away)
        assert await store.size(digest) is None
        assert await store.half_deleted(m.now()) == [digest]
        assert await store.half_deleted(m.now() - timedelta(minutes=1)) == []
        # It is no upload that somebody may discard.
        assert await store.unfinished() == []
        with pytest.raises(Conflict):
            await store.discard((await store._objects.find(digest)).nuid)
        assert await store.delete(digest, unless=saying(needed, [])) is not needed
    assert await messages(store) == 0


async def test_two_who_delete_the_same_leave_nothing_of_it(store):
    digest = await stored(store)

    async def other_comes() -> bool:
        assert await store.delete(digest, unless=saying(False, []))
        return False

    await store.delete(digest, unless=other_comes)
    assert await messages(store) == 0


async def test_what_the_broker_refuses_to_erase_is_out_of_sight_and_stays_known(client, store):
    digest = await stored(store)
    await denying(client, "OBJ_r-faces")
    for _ in range(2):
        with pytest.raises(Internal, match="message delete not permitted"):
            await store.delete(digest)
        assert await store.size(digest) is None
        # Not purged: what is only deleted nobody could erase any more.
        assert await messages(store) == 1 + 3
        assert await store.half_deleted(m.now()) == [digest]
    # Whoever brings it has it, with chunks of its own.
    assert await stored(store) == digest
    assert await read(store, digest) == BODY


async def test_a_chunk_that_the_broker_cannot_read_is_not_taken_for_erased(tmp_path):
    async with (
        running_broker(tmp_path) as broker,
        connect(broker.url, name="test", root="r") as client,
    ):
        await client.store.declare()
        digest = await stored(client.store.faces)
    at = CHUNK_BYTES + 1_000
    repair = damaged(tmp_path, BODY[at : at + 64])
    async with (
        running_broker(tmp_path) as broker,
        connect(broker.url, name="test", root="r") as client,
    ):
        with pytest.raises(Internal, match="cannot read 1 messages"):
            await client.store.faces.delete(digest)
        assert await messages(client.store.faces) == 1 + 1
    repair()
    async with (
        running_broker(tmp_path) as broker,
        connect(broker.url, name="test", root="r") as client,
    ):
        assert await client.store.faces.delete(digest)
        assert await messages(client.store.faces) == 0


@pytest.mark.parametrize("needed", [True, False])
async def test_a_store_that_is_full_to_the_brim_can_be_emptied(client, store, needed):
    digest = await stored(store)
    held = await store._stream.occupied()
    told = await client._nc.request("$JS.API.STREAM.INFO.OBJ_r-faces", b"")
    config = json.loads(told.data)["config"] | {"max_bytes": held.size_bytes}
    await client._nc.request("$JS.API.STREAM.UPDATE.OBJ_r-faces", json.dumps(config).encode())
    with pytest.raises(BusError):
        await stored(store, BODY[::-1])
    assert await store.delete(digest, unless=saying(needed, [])) is not needed
    if needed:
        assert await read(store, digest) == BODY
    else:
        assert await messages(store) == 0
        await stored(store, BODY[: 2 * CHUNK_BYTES])

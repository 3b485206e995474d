"""The object store: what was sent is what is stored, once, or there is no name for it."""

import asyncio
import contextlib
import hashlib
import os
import random
import signal
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus import uploads
from bus.broker import running_broker
from bus.client import connect
from bus.errors import (
    BusError,
    Conflict,
    InvalidRequest,
    NoSpace,
    NotFound,
    TooLarge,
    Unavailable,
    Unprocessable,
)
from bus.testing import declared, until
from bus.uploads import CHUNK_BYTES, Upload


def chance(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - no secret


def some(size: int, seed: int = 0) -> bytes:
    return chance(seed).randbytes(size)


def digest_of(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


@pytest.fixture
def store(client):
    return client.store.artefacts


async def stored(store, body: bytes) -> str:
    async with store.writing() as upload:
        await upload.write(body)
        return (await upload.commit()).digest


async def read(store, digest: str, start: int = 0, stop: int | None = None) -> bytes:
    return b"".join([block async for block in store.read(digest, start, stop)])


async def chunks_of(store) -> int:
    held = await store._stream.occupied("$O.*.C.*")
    return sum(held.subjects.values())


async def with_limit(client, max_bytes: int) -> None:
    """Let the store hold no more than so many bytes."""
    await client._nc.jetstream().update_stream(
        name=f"OBJ_{client.root}-artefacts",
        subjects=[f"$O.{client.root}-artefacts.{kind}.>" for kind in "CM"],
        discard="new",
        allow_rollup_hdrs=True,
        allow_direct=True,
        max_bytes=max_bytes,
    )


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 5_000_000])
async def test_what_was_written_in_any_pieces_comes_back_under_its_digest(store, size):
    body = some(size)
    async with store.writing(size) as upload:
        at, pieces = 0, chance(1)
        while at < size:
            length = pieces.choice([1, 1000, CHUNK_BYTES, 1_000_000])
            await upload.write(memoryview(body)[at : at + length])
            at = min(size, at + length)
        assert upload.offset == size
        assert await upload.commit() == (digest_of(body), size)
    assert await store.size(digest_of(body)) == size
    assert await read(store, digest_of(body)) == body
    assert await store.unfinished() == []


async def test_the_client_of_nats_reads_what_we_write_and_we_what_it_writes(client, store):
    theirs = await client._nc.jetstream().object_store(f"{client.root}-artefacts")
    ours = some(300_000)
    digest = await stored(store, ours)
    assert (await theirs.get(digest)).data == ours
    info = await theirs.get_info(digest)
    assert (info.size, info.chunks) == (300_000, 3)
    foreign = some(400_000, 1)
    await theirs.put(digest_of(foreign), foreign)
    assert await read(store, digest_of(foreign)) == foreign
    assert await read(store, digest_of(foreign), 200_000, 300_001) == foreign[200_000:300_001]


async def test_any_part_of_an_artefact_is_the_slice_of_its_bytes(client, store):
    body = some(6 * CHUNK_BYTES + 17)
    # Two that came at once: the chunks of one stand between those of the other.
    other = some(len(body), 1)
    digest, _ = await asyncio.gather(stored(store, body), stored(store, other))
    loop = asyncio.get_running_loop()
    bound = st.none() | st.integers(-len(body) - 2, len(body) + 2)

    @settings(max_examples=60, deadline=None)
    @given(bound, bound)
    def any_part(start, stop):
        part = asyncio.run_coroutine_threadsafe(read(store, digest, start or 0, stop), loop)
        assert part.result(60) == body[start or 0 : stop]

    await asyncio.to_thread(any_part)


async def test_the_same_bytes_are_stored_once(store):
    body = some(3 * CHUNK_BYTES)
    first, second = await asyncio.gather(stored(store, body), stored(store, body))
    assert first == second == await stored(store, body)
    assert await chunks_of(store) == 3
    assert await read(store, first) == body


async def test_what_is_left_without_commit_leaves_nothing(store):
    with contextlib.suppress(ZeroDivisionError):
        async with store.writing() as upload:
            await upload.write(some(5 * CHUNK_BYTES))
            raise ZeroDivisionError
    assert await chunks_of(store) == 0
    with pytest.raises(InvalidRequest, match="has ended"):
        await upload.write(b"more")


async def test_an_upload_that_is_cancelled_leaves_nothing(store):
    begun = asyncio.Event()

    async def upload() -> None:
        async with store.writing() as upload:
            await upload.write(some(40 * CHUNK_BYTES))
            begun.set()
            await asyncio.Event().wait()

    uploading = asyncio.create_task(upload())
    await begun.wait()
    uploading.cancel()
    await asyncio.wait({uploading})
    assert uploading.cancelled()
    await until(lambda: _none(store))


async def _none(store) -> bool:
    return await chunks_of(store) == 0


async def test_bytes_of_another_digest_than_was_said_are_refused_and_leave_nothing(store):
    async with store.writing() as upload:
        await upload.write(some(CHUNK_BYTES + 1))
        with pytest.raises(Unprocessable, match="SHA-256"):
            await upload.commit("0" * 64)
    assert await chunks_of(store) == 0


async def test_what_was_kept_is_taken_up_by_another_client(store, connected):
    body = some(4 * CHUNK_BYTES + 100)
    async with store.writing() as upload:
        await upload.write(body[:300_000])
        await upload.keep()
    (left,) = await store.unfinished()
    assert (left.upload_id, left.bytes) == (upload.id, 300_000)
    elsewhere = (await connected()).store.artefacts
    async with elsewhere.resuming(upload.id) as again:
        assert again.offset == 300_000
        await again.write(body[300_000:400_000])
    async with elsewhere.resuming(upload.id) as again:
        assert again.offset == 400_000
        await again.write(body[400_000:])
        assert await again.commit(digest_of(body)) == (digest_of(body), len(body))
    assert await read(store, digest_of(body)) == body
    assert await read(store, digest_of(body), 350_000, 450_000) == body[350_000:450_000]
    assert await store.unfinished() == []
    with pytest.raises(NotFound, match=upload.id):
        async with store.resuming(upload.id):
            pass


async def test_what_was_discarded_is_gone_and_an_artefact_cannot_be(store):
    async with store.writing() as upload:
        await upload.keep()
        await upload.write(some(CHUNK_BYTES))
    await store.discard(upload.id)
    await store.discard(upload.id)
    assert await store.unfinished() == []
    with pytest.raises(NotFound):
        async with store.resuming(upload.id):
            pass
    async with store.writing() as upload:
        await upload.write(some(CHUNK_BYTES))
        digest, _ = await upload.commit()
    with pytest.raises(Conflict, match="has become an artefact"):
        await store.discard(upload.id)
    assert await read(store, digest) == some(CHUNK_BYTES)


async def test_an_upload_that_was_discarded_in_the_middle_gets_no_name(store):
    body = some(3 * CHUNK_BYTES)
    async with store.writing() as upload:
        await upload.write(body)
        await upload.keep()
        await store.discard(upload.id)
        with pytest.raises(Conflict, match="0 are there"):
            await upload.commit()
    assert await store.size(digest_of(body)) is None


async def test_two_that_take_up_the_same_upload_make_no_broken_artefact(store):
    body = some(8 * CHUNK_BYTES)
    async with store.writing() as upload:
        await upload.write(body[:CHUNK_BYTES])
        await upload.keep()

    async def go_on() -> str:
        async with store.resuming(upload.id) as mine:
            for at in range(CHUNK_BYTES, len(body), CHUNK_BYTES):
                await mine.write(body[at : at + CHUNK_BYTES])
                await asyncio.sleep(0)
            return (await mine.commit()).digest

    done = await asyncio.gather(go_on(), go_on(), return_exceptions=True)
    assert all(isinstance(one, str | BusError) for one in done)
    if await store.size(digest_of(body)) is not None:
        assert await read(store, digest_of(body)) == body


async def test_a_deleted_artefact_is_gone_and_can_come_back(store):
    body = some(2 * CHUNK_BYTES)
    digest = await stored(store, body)
    assert await store.delete(digest) is True
    assert await store.delete(digest) is False
    assert await store.size(digest) is None
    assert await chunks_of(store) == 0
    with pytest.raises(NotFound):
        await read(store, digest)
    assert await stored(store, body) == digest
    assert await read(store, digest) == body


async def test_an_artefact_that_was_brought_again_is_new_to_whoever_deletes_old_ones(store):
    digest = await stored(store, some(10))
    (old,) = await store.all()
    await stored(store, some(10))
    (new,) = await store.all()
    assert (new.digest, new.size) == (digest, 10)
    assert new.stored_at > old.stored_at
    assert await store.delete(digest, unless_since=new.stored_at) is False
    assert await read(store, digest) == some(10)


async def test_a_broken_artefact_is_told_of_and_mended_by_its_bytes(client, store, tmp_path):
    body = some(3 * CHUNK_BYTES)
    digest = await stored(store, body)
    second = await store._stream.at_or_after(2, "$O.*.C.*")
    await store._stream.remove(second.seq)
    with pytest.raises(Unprocessable, match=r"131,072 of 393,216 bytes.*load its file again"):
        await store.fetch(digest, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_bytes(body)
    await store.put(digest, tmp_path / "file")
    assert await read(store, digest) == body
    assert await chunks_of(store) == 3


async def test_a_file_of_another_digest_is_not_put(store, tmp_path):
    (tmp_path / "file").write_bytes(b"one thing")
    with pytest.raises(Unprocessable, match="SHA-256"):
        await store.put("0" * 64, tmp_path / "file")
    assert await store.all() == []


async def test_what_never_fits_and_what_does_not_fit_now_is_refused_with_the_numbers(client, store):
    await with_limit(client, 1_000_000)
    room = await store.room()
    assert 900_000 < room < 1_000_000
    with pytest.raises(TooLarge, match="1,000,001 bytes does not fit"):
        async with store.writing(1_000_001):
            pass
    await stored(store, some(500_000))
    left = await store.room()
    assert left < 500_000
    with pytest.raises(NoSpace, match=f"600,000 bytes: {left:,} bytes are free"):
        async with store.writing(600_000):
            pass
    # What is there already needs no room.
    await store.check_room(500_000, digest_of(some(500_000)))
    # What is said to have room has room.
    async with store.writing(left) as upload:
        await upload.write(some(left, 1))
        await upload.commit()


async def test_a_store_that_is_full_in_the_middle_says_so_and_loses_nothing_else(client, store):
    await with_limit(client, 2_000_000)
    small = await stored(store, some(1000))
    says = r"full after [\d,]+ bytes.*; [\d,]+ bytes are stored, [\d,]+ are free.*_MAX_BYTES"
    with pytest.raises(NoSpace, match=says):
        await stored(store, some(40 * CHUNK_BYTES))
    assert await chunks_of(store) == 1
    assert await read(store, small) == some(1000)


async def test_what_the_store_may_hold_is_what_the_environment_says_and_stays_so(
    client, store, monkeypatch
):
    monkeypatch.setenv("BKG_ARTEFACTS_MAX_BYTES", "3000000")
    await client.store.declare()
    monkeypatch.delenv("BKG_ARTEFACTS_MAX_BYTES")
    await client.store.declare()
    assert 2_900_000 < await store.room() < 3_000_000
    monkeypatch.setenv("BKG_ARTEFACTS_MAX_BYTES", str(200 * 1024**3))
    await client.store.declare()
    assert await store.room() > 199 * 1024**3
    monkeypatch.setenv("BKG_ARTEFACTS_MAX_BYTES", "many")
    with pytest.raises(InvalidRequest, match="BKG_ARTEFACTS_MAX_BYTES"):
        await client.store.declare()


async def test_an_upload_of_any_size_takes_little_memory(store):
    block = some(1_000_000)
    sha = hashlib.sha256()
    tracemalloc.start()
    try:
        async with store.writing() as upload:
            for _ in range(150):
                await upload.write(block)
                sha.update(block)
            await upload.commit(sha.hexdigest())
        peak_up = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        size = 0
        async for part in store.read(sha.hexdigest()):
            size += len(part)
        peak_down = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size == 150_000_000
    assert peak_up < 64 * 1024**2
    assert peak_down < 64 * 1024**2


@pytest.fixture
async def killable(tmp_path):
    """A broker to kill, and a client that is left before the broker that comes back ends."""
    async with contextlib.AsyncExitStack() as first, contextlib.AsyncExitStack() as open_client:
        broker = await first.enter_async_context(running_broker(tmp_path))
        client = await open_client.enter_async_context(connect(broker.url, name="test"))
        await client.store.declare()

        async def kill() -> None:
            os.kill(broker.pid, signal.SIGKILL)
            await first.aclose()

        @contextlib.asynccontextmanager
        async def back():
            async with running_broker(tmp_path):
                await until(lambda: client.connected, 60)
                yield
                # nats-py never ends where it is closed while it looks for its broker.
                await open_client.aclose()

        yield client.store.artefacts, kill, back


async def test_an_upload_goes_on_when_the_broker_is_killed_and_comes_back(killable):
    store, kill, back = killable
    body = some(200 * CHUNK_BYTES)
    async with store.writing(len(body)) as upload:
        await upload.write(body[: 100 * CHUNK_BYTES])
        # These are lost on the way, or are stored without our knowing it.
        rest = asyncio.create_task(upload.write(body[100 * CHUNK_BYTES :]))
        await kill()
        async with back():
            await rest
            digest, size = await upload.commit()
            assert (digest, size) == (digest_of(body), len(body))
            assert await read(store, digest) == body
            assert await chunks_of(store) == 200


async def test_an_upload_fails_when_the_broker_does_not_come_back(killable, monkeypatch):
    for name, seconds in (("RECOVER_S", 2.0), ("ACK_S", 1.0), ("LEAVE_S", 1.0)):
        monkeypatch.setattr(uploads, name, seconds)
    store, kill, back = killable
    body = some(60 * CHUNK_BYTES)

    async def upload() -> None:
        async with store.writing() as upload:
            await upload.write(body[: 10 * CHUNK_BYTES])
            await kill()
            await upload.write(body[10 * CHUNK_BYTES :])

    with pytest.raises(Unavailable, match="took nothing more of the upload"):
        await upload()
    async with back():
        assert await store.all() == []

        async def found_and_deleted() -> bool:
            # What the client still had to send comes in behind.
            for left in await store.unfinished():
                await store.discard(left.upload_id)
            return await chunks_of(store) == 0

        await until(found_and_deleted, 30)


async def test_chunks_whose_acknowledgements_are_lost_are_stored_once_and_in_order(
    store, monkeypatch
):
    body = some(100 * CHUNK_BYTES)
    really, lost = Upload._append, chance(3)

    async def lossy(self, at, chunk):
        if lost.random() < 0.1:
            # Half of them never reach the broker.
            if lost.random() < 0.5:
                await really(self, at, chunk)
            raise Unavailable("lost")
        return await really(self, at, chunk)

    monkeypatch.setattr(Upload, "_append", lossy)
    assert await stored(store, body) == digest_of(body)
    assert await read(store, digest_of(body)) == body
    assert await chunks_of(store) == 100


async def test_a_name_that_somebody_wrote_by_hand_spoils_nothing(client, store):
    await client._nc.publish(f"$O.{client.root}-artefacts.M.bad", b"no message of ours")
    digest = await stored(store, b"x")
    assert [one.digest for one in await store.all()] == [digest]
    assert await store.unfinished() == []


async def test_another_deployment_on_the_broker_has_a_store_of_its_own(store, broker):
    digest = await stored(store, b"mine")
    async with declared(broker.url, "elsewhere") as other:
        assert await other.store.artefacts.size(digest) is None

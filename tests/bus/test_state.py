"""Buckets, streams and artefacts: typed, raced over, and followed across a broker's restart."""

import asyncio
import contextlib
import hashlib

import pytest

from bus import consumers
from bus import messages as m
from bus.broker import running_broker
from bus.client import connect
from bus.errors import Conflict, NotFound
from bus.subjects import GALLERY_ENTRY, GALLERY_HEAD, LOG
from bus.testing import until


def spec(name: str, path: str = "x.json") -> m.ModelSpec:
    version = m.ModelVersion(
        version="1", path=path, checksum="0" * 64, format="linear", added_at=m.now()
    )
    return m.ModelSpec(id=name, versions=[version])


async def test_what_was_put_is_there_under_any_name(client):
    for name in ("plain", "with.dots and spaces", "Ümläut/../x", "*", ">"):
        revision = await client.store.models.put(spec("m", path=name), name)
        entry = await client.store.models.get(name)
        assert entry is not None
        assert (entry.names, entry.revision) == ((name,), revision)
        assert entry.value.versions[0].path == name
    assert len(await client.store.models.all()) == 5


async def test_one_of_many_that_create_the_same_key_wins(client):
    tries = [client.store.models.create(spec("m", str(i)), "m") for i in range(20)]
    done = await asyncio.gather(*tries, return_exceptions=True)
    assert sum(isinstance(result, int) for result in done) == 1
    assert sum(isinstance(result, Conflict) for result in done) == 19


async def test_a_writer_that_was_overtaken_gets_a_conflict(client):
    bucket = client.store.models
    revision = await bucket.put(spec("m"), "m")
    await bucket.update(spec("m", "second"), revision, "m")
    with pytest.raises(Conflict):
        await bucket.update(spec("m", "third"), revision, "m")
    assert (await bucket.get("m")).value.versions[0].path == "second"


async def test_a_deleted_key_is_gone_and_can_come_back(client):
    bucket = client.store.models
    await bucket.put(spec("m"), "m")
    await bucket.delete("m")
    assert await bucket.get("m") is None
    assert await bucket.all() == []
    await bucket.create(spec("m", "again"), "m")
    assert (await bucket.get("m")).value.versions[0].path == "again"


async def test_following_gives_what_is_there_then_every_change(client):
    bucket = client.store.models
    await bucket.put(spec("a"), "a")
    await bucket.put(spec("b"), "b")
    seen: dict[str, str | None] = {}
    caught_up = asyncio.Event()

    async def follow() -> None:
        async for changes in bucket.follow():
            for entry in changes.entries:
                seen[entry.names[0]] = entry.value.versions[0].path if entry.value else None
            if changes.caught_up:
                caught_up.set()

    async with asyncio.TaskGroup() as tasks:
        following = tasks.create_task(follow())
        await asyncio.wait_for(caught_up.wait(), 5)
        assert seen == {"a": "x.json", "b": "x.json"}
        await bucket.put(spec("a", "new"), "a")
        await bucket.delete("b")
        await until(lambda: seen == {"a": "new", "b": None})
        following.cancel()


async def test_following_an_empty_bucket_catches_up_at_once(client):
    async with asyncio.timeout(2):
        async for changes in client.store.models.follow():
            assert changes.entries == []
            assert changes.caught_up
            break


async def test_a_follower_goes_on_after_the_broker_was_restarted(tmp_path):
    heard: list[str] = []
    async with contextlib.AsyncExitStack() as first:
        broker = await first.enter_async_context(running_broker(tmp_path, sync_interval="2m"))
        async with connect(broker.url, name="test") as client:
            await client.store.declare()

            async def follow() -> None:
                async for changes in client.store.models.follow():
                    heard.extend(entry.value.versions[0].path for entry in changes.entries)

            async with asyncio.TaskGroup() as tasks:
                following = tasks.create_task(follow())
                await client.store.models.put(spec("m", "before"), "m")
                await until(lambda: heard == ["before"])
                await first.aclose()
                async with running_broker(tmp_path, sync_interval="2m"):
                    await until(lambda: client.connected)
                    await client.store.models.put(spec("m", "after"), "m")
                    await until(lambda: heard == ["before", "after"])
                    following.cancel()


async def test_ten_thousand_events_are_followed_in_order(client):
    galleries = client.store.galleries
    subject = client.root + ".gallery.{}.head"
    for first in range(0, 10_000, 500):
        await asyncio.gather(
            *(galleries.append(subject.format(i), b"{}") for i in range(first, first + 500))
        )
    seqs = [stored.seq async for stored in galleries.read(GALLERY_HEAD.subject(client.root))]
    assert seqs == list(range(1, 10_001))


async def test_an_append_is_refused_when_another_subject_has_moved_on(client):
    galleries = client.store.galleries
    head = GALLERY_HEAD.subject(client.root, gallery="g")
    seq = await galleries.append(head, b"{}")
    entry = f"{client.root}.gallery.g.entry.e"
    await galleries.append(entry, b"{}", expect=(head, seq))
    await galleries.append(head, b"{}")
    with pytest.raises(Conflict):
        await galleries.append(entry, b"{}", expect=(head, seq))


async def test_a_purge_removes_what_a_wildcard_names(client):
    galleries = client.store.galleries
    for i in range(5):
        await galleries.append(f"{client.root}.gallery.g.entry.{i}", b"x")
    await galleries.purge(f"{client.root}.gallery.g.entry.*")
    assert await galleries.last(f"{client.root}.gallery.g.entry.*") is None
    assert await galleries.last_seq() == 5


async def test_declaring_twice_changes_nothing(client):
    await client.store.models.put(spec("m"), "m")
    await client.store.declare()
    assert (await client.store.models.get("m")).value.versions[0].path == "x.json"


async def is_last(client, message: str) -> bool:
    """Tell whether a record is stored: nobody acknowledges it, and the broker may take a moment."""
    records = await client.store.logs("p", limit=1)
    return [one.message for one in records] == [message]


async def test_the_newest_records_come_oldest_first_with_their_sequence(client):
    for i in range(30):
        level: m.Level = "error" if i % 10 == 0 else "info"
        record = m.LogEvent(plugin="p", level=level, message=str(i), timestamp=m.now())
        await client.publish(LOG, record, plugin="p", slot=i % 2, level=level)
    await until(lambda: is_last(client, "29"))
    records = await client.store.logs("p", limit=5)
    assert [r.message for r in records] == ["25", "26", "27", "28", "29"]
    later = await client.store.logs("p", limit=100, after=records[-3].seq)
    assert [r.message for r in later] == ["28", "29"]
    errors = await client.store.logs("p", limit=100, level="error")
    assert [r.message for r in errors] == ["0", "10", "20"]
    assert await client.store.logs("nobody", limit=5) == []


async def test_what_somebody_wrote_by_hand_spoils_nothing(client):
    await client.store.models.put(spec("good"), "good")
    await client._nc.publish(f"$KV.{client.root}-models.bad", b"no message of ours")
    await client._nc.publish(LOG.subject(client.root, plugin="p", slot=0, level="info"), b"hello")
    record = m.LogEvent(plugin="p", level="info", message="x", timestamp=m.now())
    await client.publish(LOG, record, plugin="p", slot=0, level="info")
    await until(lambda: is_last(client, "x"))
    assert [entry.names for entry in await client.store.models.all()] == [("good",)]
    assert [r.message for r in await client.store.logs("p", limit=5)] == ["x"]
    async for changes in client.store.models.follow():
        assert [entry.names for entry in changes.entries] == [("good",)]
        break


async def test_an_artefact_comes_back_byte_for_byte(client, tmp_path):
    path = tmp_path / "m.bin"
    path.write_bytes(bytes(range(256)) * 4096)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert await client.store.artefacts.size(digest) is None
    await client.store.artefacts.put(digest, path)
    await client.store.artefacts.put(digest, path)
    assert await client.store.artefacts.size(digest) == 256 * 4096
    shares: list[float] = []
    await client.store.artefacts.fetch(digest, tmp_path / "back.bin", told=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert (tmp_path / "back.bin").read_bytes() == path.read_bytes()
    with pytest.raises(NotFound):
        await client.store.artefacts.fetch("f" * 64, tmp_path / "none.bin")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back.bin", "m.bin"]


async def test_a_cancellation_that_comes_with_the_answer_is_not_lost(client):
    wanted = m.HostDesired(draining=True, changed_by="test", changed_at=m.now())

    async def write_and_wait() -> None:
        await client.store.hosts_desired.put(wanted, "h")
        await asyncio.Event().wait()

    # About every third came in the same moment, and was lost, before it was looked after.
    for delay_s in [0.0, 0.001, 0.002] * 50:
        writing = asyncio.create_task(write_and_wait())
        await asyncio.sleep(delay_s)
        writing.cancel()
        await asyncio.wait([writing], timeout=30)
        assert writing.cancelled()


async def test_reading_ends_though_what_was_waiting_is_deleted_meanwhile(client, monkeypatch):
    """More waits than is sent ahead; nothing that comes then says that it was the last."""
    monkeypatch.setattr(consumers, "HEARTBEAT_S", 1)
    stream = client.store.galleries
    subject = GALLERY_ENTRY.subject(client.root, gallery="g")
    for i in range(200):
        entry = GALLERY_ENTRY.subject(client.root, gallery="g", entry=f"e{i}")
        await stream.append(entry, bytes(200_000))
    async with asyncio.timeout(20):
        async with contextlib.aclosing(stream.read(subject)) as reading:
            first = await anext(reading)
            await stream.purge(subject)
            rest = [stored async for stored in reading]
    assert first.seq == 1
    assert len(rest) < 199

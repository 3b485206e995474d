"""Galleries as events: what is stored is what every replica knows, and what a replay finds."""

import asyncio
import contextlib
import hashlib
import random
from datetime import UTC, datetime

import msgpack
import numpy as np
import pytest

from bus import codec
from bus import messages as m
from bus.errors import Conflict, DeadlineExceeded, InvalidRequest, NotFound, TooLarge, Unavailable
from bus.subjects import GALLERY_ENTRY, GALLERY_HEAD, gallery_events
from bus.testing import until
from services.rustyface.galleries.galleries import METADATA_MAX_BYTES, Galleries, NewEntry, Query

EAST, NORTH = np.array([1, 0], np.float32), np.array([0, 1], np.float32)


@contextlib.asynccontextmanager
async def replica(client, embedder="test", dimensions=2):
    """Galleries that are read from the beginning; what ends them comes out of here."""
    galleries = Galleries(client.store.galleries, client.root, embedder, dimensions)
    async with asyncio.timeout(30):
        reading = asyncio.create_task(galleries.run())
        try:
            await until(lambda: galleries.caught_up.is_set() or reading.done())
            yield galleries
        finally:
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading


async def enrol(galleries, gallery, entry, vector, metadata, **more) -> int:
    new = NewEntry(id=entry, vector=vector, metadata=metadata, **more)
    return await galleries.enrol(gallery, new)


def looking(vector, **more) -> Query:
    return Query(**{"vector": vector, "k": 1, "threshold": 0, "revision": None, **more})


def known(galleries: Galleries) -> dict[str, dict[str, list[float]]]:
    """Return all that a replica holds."""
    return {
        name: {
            entry: gallery.matrix.vector(entry).tolist() for entry in sorted(gallery.matrix.ids())
        }
        for name, gallery in sorted(galleries._galleries.items())
    }


async def stored(client) -> list[str]:
    """Return the subjects that carry a vector in the stream."""
    events = client.store.galleries.read(gallery_events(client.root))
    return [
        event.subject
        async for event in events
        if ".entry." in event.subject
        and codec.decode(event.body, m.GalleryEntry, codec.MSGPACK).embedding is not None
    ]


async def publish(client, event: m.GalleryHead | m.GalleryEntry, **tokens: str) -> int:
    """Store an event as somebody does who may publish, whatever it says."""
    feed = GALLERY_HEAD if isinstance(event, m.GalleryHead) else GALLERY_ENTRY
    return await client.store.galleries.append(
        feed.subject(client.root, **tokens),
        codec.encode(event, codec.MSGPACK if feed is GALLERY_ENTRY else codec.JSON),
        headers={codec.CONTENT_TYPE: codec.MSGPACK} if feed is GALLERY_ENTRY else None,
    )


async def test_after_any_changes_on_two_replicas_both_know_what_a_replay_finds(client, connected):
    """Acknowledged entries of a living gallery are found everywhere; of dead ones nowhere."""
    chance = random.Random(7)  # noqa: S311
    other = await connected()
    async with replica(client) as first, replica(other) as second:
        acked: dict[tuple[str, str], int] = {}

        async def change(galleries: Galleries, gallery: str, entry: str) -> None:
            # Each may find that another one came first; that is for its caller, not for us.
            with contextlib.suppress(NotFound, Conflict):
                match chance.randrange(20):
                    case 0 | 1:
                        await galleries.delete(gallery)
                    case 2 | 3 | 4:
                        await galleries.create(gallery)
                    case 5 | 6:
                        await galleries.remove(gallery, entry)
                    case _:
                        revision = await enrol(galleries, gallery, entry, EAST, None)
                        acked[gallery, entry] = max(revision, acked.get((gallery, entry), 0))

        for gallery in "ab":
            await first.create(gallery)
        for _ in range(15):
            changes = [
                change(chance.choice([first, second]), chance.choice("ab"), f"e{i}")
                for i in range(30)
            ]
            await asyncio.gather(*changes)
        newest = await first.newest()
        await asyncio.gather(first.wait(newest), second.wait(newest))
        created = {name: gallery.head_seq for name, gallery in first._galleries.items()}
        latest = {
            event.subject: event.seq
            async for event in client.store.galleries.read(gallery_events(client.root))
        }
        for (gallery, entry), revision in acked.items():
            subject = GALLERY_ENTRY.subject(client.root, gallery=gallery, entry=entry)
            if revision > created.get(gallery, 10**9) and latest.get(subject) == revision:
                assert entry in known(first)[gallery]
        assert known(first) == known(second)
        async with replica(client) as replayed:
            assert known(replayed) == known(first)
        subjects = [
            GALLERY_ENTRY.subject(client.root, gallery=gallery, entry=entry)
            for gallery, entries in known(first).items()
            for entry in entries
        ]
        assert sorted(await stored(client)) == sorted(subjects)


async def test_clearing_a_deleted_gallery_spares_the_one_that_took_its_name(
    client, connected, monkeypatch
):
    async with replica(client) as first, replica(await connected()) as second:
        await first.create("g")
        await enrol(first, "g", "old", EAST, None)
        read = first._ledger._stream.read

        async def late(subject, *, after):
            monkeypatch.undo()
            await second.create("g")
            await enrol(second, "g", "new", EAST, None)
            async for stored in read(subject, after=after):
                yield stored

        monkeypatch.setattr(first._ledger._stream, "read", late)
        await first.delete("g")
        assert await stored(client) == [
            GALLERY_ENTRY.subject(client.root, gallery="g", entry="new")
        ]
        await first.wait(await first.newest())
        assert known(first) == known(second) == {"g": {"new": [1, 0]}}


async def test_a_gallery_that_is_made_again_is_empty_even_where_old_entries_are_left(client):
    async with replica(client) as galleries:
        await galleries.create("g")
        await enrol(galleries, "g", "a", EAST, None)
        # A deletion that was killed before it cleared the stream.
        gone = m.GalleryHead(id="g", at=m.now(), embedder="test", dimensions=2, deleted=True)
        await publish(client, gone, gallery="g")
        assert await stored(client)
        await galleries.create("g")
        await enrol(galleries, "g", "b", EAST, None)
        await galleries.wait(await galleries.newest())
        assert list(known(galleries)["g"]) == ["b"]
    async with replica(client) as replayed:
        assert list(known(replayed)["g"]) == ["b"]
    assert await stored(client) == [GALLERY_ENTRY.subject(client.root, gallery="g", entry="b")]


async def test_the_vectors_of_a_deletion_that_was_cut_short_leave_at_the_next_start(client):
    async with replica(client) as galleries:
        for name in ("g", "kept"):
            await galleries.create(name)
            await enrol(galleries, name, "a", EAST, None)
    gone = m.GalleryHead(id="g", at=m.now(), embedder="test", dimensions=2, deleted=True)
    await publish(client, gone, gallery="g")
    async with replica(client) as galleries:
        assert list(known(galleries)) == ["kept"]
    assert await stored(client) == [GALLERY_ENTRY.subject(client.root, gallery="kept", entry="a")]


NEVER = m.now()
VECTOR = EAST.tobytes()


@pytest.mark.parametrize(
    "event",
    [
        m.GalleryEntry(id="a", at=NEVER, embedding=b"abc"),
        m.GalleryEntry(id="a", at=NEVER, embedding=b""),
        m.GalleryEntry(id="a", at=NEVER, embedding=VECTOR * 2),
        m.GalleryEntry(id="a", at=NEVER, embedding=np.array([np.nan, 1], "<f4").tobytes()),
        m.GalleryEntry(id="a", at=NEVER, embedding=bytes(8)),
        m.GalleryEntry(id="other", at=NEVER, embedding=VECTOR),
    ],
)
async def test_an_entry_that_cannot_be_read_is_passed_over_by_replicas_and_by_replays(
    client, event
):
    async with replica(client) as galleries:
        await galleries.create("g")
        await enrol(galleries, "g", "a", NORTH, None)
        await publish(client, event, gallery="g", entry="a")
        await enrol(galleries, "g", "b", EAST, None)
        await galleries.wait(await galleries.newest())
        # The readable one was replaced by it, so it has left the stream too.
        assert known(galleries) == {"g": {"b": [1, 0]}}
        async with replica(client) as replayed:
            assert known(replayed) == known(galleries)
            await enrol(replayed, "g", "a", NORTH, None)
            await replayed.wait(await replayed.newest())
            assert list(known(replayed)["g"]) == ["a", "b"]


@pytest.mark.parametrize("dimensions", [-1, 0, 10**14])
async def test_a_gallery_whose_own_event_cannot_be_read_is_left_alone(client, dimensions):
    async with replica(client) as galleries:
        await galleries.create("g")
        await enrol(galleries, "g", "a", NORTH, None)
        await galleries.create("fine")
    odd = m.GalleryHead(id="g", at=m.now(), embedder="newer", dimensions=dimensions)
    await publish(client, odd, gallery="g")
    async with replica(client) as galleries:
        assert list(known(galleries)) == ["fine"]
        for ask in (galleries.create("g"), enrol(galleries, "g", "a", EAST, None)):
            with pytest.raises(Conflict, match="'g', revision 4, cannot be read"):
                await ask
        await enrol(galleries, "fine", "a", EAST, None)
    # Its entries may be those of a newer version.
    assert len(await stored(client)) == 2


async def test_a_time_that_python_cannot_tell_is_passed_over(client):
    late = msgpack.packb({"id": "x", "at": msgpack.Timestamp(2**60)})
    async with replica(client) as galleries:
        await galleries.create("g")
        subject = GALLERY_ENTRY.subject(client.root, gallery="g", entry="x")
        await client.store.galleries.append(subject, late, headers={"Content-Type": codec.MSGPACK})
        await enrol(galleries, "g", "a", EAST, None)
        await galleries.wait(await galleries.newest())
        assert known(galleries) == {"g": {"a": [1, 0]}}


async def test_at_least_one_result_has_to_be_asked_for(client):
    async with replica(client) as galleries:
        await galleries.create("g")
        with pytest.raises(InvalidRequest, match="top_k is 0") as refused:
            await galleries.search("g", looking(EAST, k=0))
        assert refused.value.field == "top_k"


async def test_one_entry_is_looked_up_without_putting_all_in_order(client):
    async with replica(client) as galleries:
        await galleries.create("g")
        await enrol(galleries, "g", "a", EAST, None, subject="ann")
        await enrol(galleries, "g", "b", NORTH, None)
        for subject, entry, expected in (
            (None, "a", ["a"]), ("ann", "a", ["a"]), ("ann", "b", []), ("eve", "a", []),
            (None, "c", []),
        ):  # fmt: skip
            shown, following, total = await galleries.entries(
                "g", limit=1, entry=entry, subject=subject
            )
            assert [one.id for one in shown] == expected
            assert (following, total) == (None, len(expected))
        assert galleries._galleries["g"]._ordered is None


async def test_a_time_without_a_zone_is_in_utc(client):
    then = datetime(2020, 1, 2, 3, 4)  # noqa: DTZ001 - the point of it
    async with replica(client) as galleries:
        await galleries.create("g", at=then)
        await enrol(galleries, "g", "a", EAST, None, at=then)
        head = m.GalleryHead(id="h", at=then, embedder="test", dimensions=2)
        await publish(client, head, gallery="h")
        await enrol(galleries, "h", "a", EAST, None)
        await galleries.wait(await galleries.newest())
        listed = galleries.datasets()
        assert [d.created_at for d in listed] == [then.replace(tzinfo=UTC)] * 2
        [entry] = galleries.picked("g", ["a"])
        assert entry.last_seen == then.replace(tzinfo=UTC)


async def test_bytes_that_are_no_event_are_passed_over(client):
    async with replica(client) as galleries:
        await galleries.create("g")
        for body in (b"", b"\xff\xfe", b"{", b"[1]", b'{"id": 7}'):
            subject = GALLERY_ENTRY.subject(client.root, gallery="g", entry="x")
            await client.store.galleries.append(subject, body)
        await enrol(galleries, "g", "a", EAST, None)
        await galleries.wait(await galleries.newest())
        assert known(galleries) == {"g": {"a": [1, 0]}}


async def test_the_longest_ids_in_any_alphabet_are_entries_too(client):
    """256 characters of four bytes make a subject of 3,072; the broker's line ends at 4,096."""
    gallery, ids = "\U00010400" * 128, ["\U0001f600" * 256, "\U0001f601" * 256, "x"]
    # A short id that looks like what stands for a long one.
    ids.append(f"sha256-{hashlib.sha256(ids[0].encode()).hexdigest()}")
    async with replica(client) as galleries:
        await galleries.create(gallery)
        for entry in ids:
            await enrol(galleries, gallery, entry, EAST, None)
        await galleries.wait(await galleries.newest())
        assert list(known(galleries)[gallery]) == sorted(ids)
        await galleries.remove(gallery, ids[0])
        async with replica(client) as replayed:
            assert list(known(replayed)[gallery]) == sorted(ids[1:])
    assert client.connected


@pytest.mark.parametrize("asked", ["a revision", "nothing"])
async def test_a_replica_that_lags_answers_when_it_has_read_what_the_caller_has_written(
    client, connected, asked
):
    async with replica(client) as first, replica(await connected()) as second:
        await first.create("g")
        await second.wait(await first.newest())
        # Whoever reads tells it under this lock: the second comes one batch further at most.
        reading = second._ledger._moved
        await reading.acquire()
        before = await enrol(first, "g", "before", EAST, None)
        await until(lambda: second.revision == before)
        written = await enrol(first, "g", "mine", EAST, None)
        await first.wait(written)
        revision = written if asked == "a revision" else None
        searching = asyncio.create_task(second.search("g", looking(EAST, k=9, revision=revision)))
        # What it has read already it answers at once, for who asks for no more.
        behind = await second.search("g", looking(EAST, k=9, revision=before))
        assert [one.entry.id for one in behind.matches] == ["before"]
        assert (second.revision, searching.done()) == (before, False)
        reading.release()
        found = await searching
        assert [one.entry.id for one in found.matches] == ["before", "mine"]
        assert found.revision >= written


async def test_events_that_were_deleted_from_the_stream_by_hand_are_not_waited_for(
    client, monkeypatch
):
    monkeypatch.setattr("services.rustyface.galleries.ledger.WAIT_S", 1.5)
    async with replica(client) as galleries:
        await galleries.create("g")
        await enrol(galleries, "g", "a", EAST, None)
    await client.store.galleries.purge(gallery_events(client.root))
    async with replica(client) as galleries:
        assert known(galleries) == {}
        await galleries.create("g")
        assert known(galleries) == {"g": {}}
        with pytest.raises(DeadlineExceeded, match="up to revision 3, not yet to 99"):
            await galleries.wait(99)


async def test_a_replica_ends_when_the_stream_was_replaced(client):
    """It would answer with people who are not there, and see no new ones."""
    galleries = Galleries(client.store.galleries, client.root, "test", 2)
    reading = asyncio.create_task(galleries.run())
    await galleries.caught_up.wait()
    await galleries.create("g")
    await enrol(galleries, "g", "a", EAST, None)
    await galleries.wait(2)
    await client.store.delete_everything()
    await client.store.declare()
    with pytest.raises(Unavailable, match="ends at revision 0, read was 2"):
        await galleries.search("g", looking(EAST))
    with pytest.raises(Unavailable, match="was replaced; they are read anew"):
        await reading


async def test_two_replicas_that_create_the_same_gallery_make_one(client, connected):
    async with replica(client) as first, replica(await connected()) as second:
        await asyncio.gather(*[one.create("g") for one in (first, second, first, second)])
        heads = [one._ledger.projection.heads for one in (first, second)]
        assert heads == [{"g": 1}] * 2


async def test_a_gallery_belongs_to_one_embedder(client):
    async with replica(client) as galleries:
        await galleries.create("g")
    async with replica(client, "other", 2) as others:
        with pytest.raises(InvalidRequest, match="holds vectors of test, this worker .* other"):
            await enrol(others, "g", "a", EAST, None)
        with pytest.raises(InvalidRequest, match="holds vectors of test, this worker .* other"):
            await others.search("g", looking(EAST, by_embedder=True))


@pytest.mark.parametrize(
    ("metadata", "kind"),
    [
        (2**64, InvalidRequest),
        ({"a": [object()]}, InvalidRequest),
        ("x" * METADATA_MAX_BYTES, TooLarge),
    ],
)
async def test_metadata_that_cannot_be_kept_are_refused(client, metadata, kind):
    async with replica(client) as galleries:
        await galleries.create("g")
        with pytest.raises(kind, match="metadata: ") as refused:
            await enrol(galleries, "g", "a", EAST, metadata)
        assert refused.value.field == "metadata"


async def test_metadata_come_back_as_they_were(client):
    metadata = {"name": "Zoë", "n": [1, -2, 2**63, 1.5, None, True], "deep": {"a": {}}}
    async with replica(client) as galleries:
        await galleries.create("g")
        await enrol(galleries, "g", "a", EAST, metadata)
    async with replica(client) as replayed:
        [match] = (await replayed.search("g", looking(EAST))).matches
    assert (match.entry.id, match.entry.metadata) == ("a", metadata)

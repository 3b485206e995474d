"""Many entries at once, and imports: recorded, taken up again, undone."""

import asyncio

import numpy as np
import pytest

from bus import codec
from bus import messages as m
from bus.errors import Conflict, InvalidRequest, NotFound
from bus.subjects import GALLERY_IMPORT, gallery_events
from services.rustyface.galleries.galleries import NewEntry, Outcome, Query
from services.rustyface.galleries.ledger import Ledger

EAST, NORTH = np.array([1, 0], np.float32), np.array([0, 1], np.float32)


def new(name: str, vector=EAST, **more) -> NewEntry:
    return NewEntry(id=name, vector=vector, **more)


def record(name: str = "i1", **more) -> m.GalleryImport:
    return m.GalleryImport(**{"id": name, "at": m.now(), "source": "f", "format": "json", **more})


@pytest.fixture
async def galleries(replica):
    async with replica() as one:
        await one.create("g")
        yield one


async def ids(galleries) -> list[str]:
    await galleries.wait(await galleries.newest())
    return galleries.ids("g")


async def entry_subjects(client) -> list[str]:
    events = client.store.galleries.read(gallery_events(client.root))
    return sorted([e.subject.rpartition(".")[2] async for e in events if ".entry." in e.subject])


async def test_a_thousand_entries_are_all_acknowledged_when_it_returns(galleries, replica):
    entries = [new(f"e{i:04}", subject=f"p{i % 7}") for i in range(1_000)]
    outcome = await galleries.enrol_many("g", entries, existing="fail")
    assert outcome == Outcome(1_000, 0, 0, outcome.revision)
    async with replica() as replayed:
        assert replayed.ids("g") == [entry.id for entry in entries]
        assert replayed.revision == outcome.revision


@pytest.mark.parametrize(
    ("existing", "counted", "kept"),
    [("skip", (1, 0, 2), [1, 0]), ("replace", (1, 2, 0), [0, 1])],
)
async def test_what_is_there_already_is_left_or_replaced(galleries, existing, counted, kept):
    await galleries.enrol_many("g", [new("a"), new("b")], existing="fail")
    fresh = [new("a", NORTH), new("b", NORTH), new("c", NORTH)]
    outcome = await galleries.enrol_many("g", fresh, existing=existing)
    assert (outcome.added, outcome.replaced, outcome.skipped) == counted
    await galleries.wait(outcome.revision)
    told = galleries.picked("g", ["a", "b", "c"], embeddings=True)
    assert [one.embedding for one in told] == [kept, kept, [0, 1]]


async def test_where_nothing_may_be_there_nothing_is_stored(galleries):
    await galleries.enrol("g", new("b"))
    before = await galleries.newest()
    with pytest.raises(Conflict, match="'g' has entries 'b' already; existing says"):
        await galleries.enrol_many("g", [new("a"), new("b")], existing="fail")
    with pytest.raises(Conflict, match="'x'"):
        await galleries.enrol_many("g", [new("x"), new("x")], existing="fail")
    assert await galleries.newest() == before


async def test_one_entry_that_cannot_be_stored_keeps_all_from_being_stored(galleries):
    before = await galleries.newest()
    for bad in (new("b", np.zeros(2, np.float32)), new("b", metadata=2**64)):
        with pytest.raises(InvalidRequest):
            await galleries.enrol_many("g", [new("a"), bad], existing="skip")
    assert await galleries.newest() == before


async def test_an_undone_import_takes_what_it_added_and_nobody_has_replaced(
    galleries, replica, connected, client
):
    await galleries.enrol_many("g", [new("old"), new("other")], existing="fail")
    await galleries.begin_import("g", record())
    brought = [new(one, NORTH, subject="ann", imported="i1") for one in ("old", "a", "b", "c")]
    outcome = await galleries.enrol_many("g", brought, existing="replace")
    assert (outcome.added, outcome.replaced) == (3, 1)
    await galleries.end_import("g", record(state="done", added=3, replaced=1))
    await galleries.enrol("g", new("a", subject="bob"))
    await galleries.move_entry("g", "b", "bob")
    async with replica(await connected()) as other:
        assert (await galleries.undo_import("g", "i1", dry_run=True))[0] == 2
        affected, revision, _ = await galleries.undo_import("g", "i1")
        assert affected == 2
        await other.wait(revision)
        assert galleries.ids("g") == other.ids("g") == ["a", "old", "other"]
    assert await entry_subjects(client) == ["a", "old", "other"]
    [told] = await galleries.imports("g")
    assert (told.state, told.added, told.replaced) == ("undone", 3, 1)
    async with replica() as replayed:
        assert replayed.ids("g") == ["a", "old", "other"]
    # Again, it is done already.
    assert (await galleries.undo_import("g", "i1"))[0] == 0


async def test_nothing_more_comes_from_an_import_that_was_undone(galleries):
    await galleries.begin_import("g", record())
    await galleries.undo_import("g", "i1")
    for late in (
        galleries.enrol("g", new("a", imported="i1")),
        galleries.enrol_many("g", [new("a", imported="i1")], existing="skip"),
        galleries.begin_import("g", record()),
        galleries.end_import("g", record(state="done")),
    ):
        with pytest.raises(Conflict, match="the import 'i1' was undone"):
            await late
    assert await ids(galleries) == []
    with pytest.raises(NotFound, match="has no import 'i2'"):
        await galleries.undo_import("g", "i2")


async def test_an_import_that_ends_and_is_undone_at_the_same_moment_stays_undone(
    galleries, replica, connected
):
    async with replica(await connected()) as other:
        for i in range(30):
            name = f"i{i}"
            await galleries.begin_import("g", record(name))
            await asyncio.gather(
                other.undo_import("g", name),
                galleries.end_import("g", record(name, state="done")),
                return_exceptions=True,
            )
        imports = await galleries.imports("g")
        assert {one.state for one in imports} == {"undone"}


async def test_an_import_that_was_undone_between_the_look_and_its_end_stays_undone(
    galleries, monkeypatch
):
    await galleries.begin_import("g", record())
    last = Ledger.last

    async def late(self, *args: object):
        monkeypatch.undo()
        await galleries.undo_import("g", "i1")
        return await last(self, *args)

    monkeypatch.setattr(Ledger, "last", late)
    with pytest.raises(Conflict, match="the import 'i1' was undone"):
        await galleries.end_import("g", record(state="done"))
    assert [one.state for one in await galleries.imports("g")] == ["undone"]


async def test_an_import_taken_up_again_counts_what_it_had_brought_as_added(galleries):
    await galleries.begin_import("g", record())
    first = [new("a", imported="i1"), new("b", imported="i1")]
    await galleries.enrol_many("g", first, existing="fail")
    await galleries.begin_import("g", record())
    again = [*first, new("c", imported="i1")]
    for existing in ("fail", "skip", "replace"):
        outcome = await galleries.enrol_many("g", again, existing=existing)
        assert (outcome.added, outcome.replaced, outcome.skipped) == (3, 0, 0)
    assert (await galleries.undo_import("g", "i1"))[0] == 3


async def test_the_next_worker_clears_what_an_undoing_that_was_cut_short_has_left(
    galleries, replica, client
):
    await galleries.begin_import("g", record())
    brought = [new(f"e{i}", imported="i1", image=str(i) * 64) for i in range(3)]
    brought.append(new("kept", image="0" * 64))
    await galleries.enrol_many("g", brought, existing="fail")
    subject = GALLERY_IMPORT.subject(client.root, gallery="g", imported="i1")
    await client.store.galleries.append(subject, codec.encode(record(state="undone")))
    assert len(await entry_subjects(client)) == 4
    gone: set[str] = set()

    async def drop_image(digest, _named):
        gone.add(digest)

    async with replica(drop_image=drop_image) as restarted:
        assert restarted.ids("g") == ["kept"]
    assert gone == {"1" * 64, "2" * 64}
    assert await entry_subjects(client) == ["kept"]


async def test_an_image_is_given_up_with_the_last_entry_of_any_gallery_that_names_it(replica):
    told: list[set[str]] = []

    async def drop_image(digest, _named):
        told.append({digest})

    def kept(name: str, image: str) -> NewEntry:
        return new(name, image=image * 64, subject=name)

    async with replica(drop_image=drop_image) as galleries:
        for gallery in "gh":
            await galleries.create(gallery)
            await galleries.enrol(gallery, kept("a", "1"))
        await galleries.enrol("g", kept("b", "1"))
        await galleries.remove("g", "a")
        await galleries.remove_subject("g", "b")
        assert told == []
        assert galleries.images == {"1" * 64}
        await galleries.wait(await galleries.enrol("h", kept("a", "2")))
        await galleries._ledger.chores_done()
        assert told == [{"1" * 64}]
        await galleries.enrol("h", kept("b", "3"))
        await galleries.remove_subject("h", "a")
        await galleries.delete("h")
        assert told[1:] == [{"2" * 64}, {"3" * 64}]
        assert galleries.images == set()


async def test_what_a_gallery_is_set_to_is_known_everywhere_and_leaves_with_it(galleries, replica):
    wanted = m.DatasetSettings(
        threshold=0.6, scoring="best", quality=m.QualityBounds(below="reject", size_min_px=80)
    )
    await galleries.configure("g", wanted)
    async with replica() as replayed:
        assert await replayed.settings("g") == wanted
        found = await replayed.search("g", Query(vector=EAST, k=1, threshold=0, revision=None))
        assert found.settings == wanted
    await galleries.delete("g")
    await galleries.create("g")
    assert await galleries.settings("g") == m.DatasetSettings()
    await galleries.create("h", settings=wanted)
    assert await galleries.settings("h") == wanted


async def test_a_gallery_belongs_to_one_version_of_its_embedder(replica, client):
    async with replica(digest="1" * 64) as galleries:
        await galleries.create("g")
        await galleries.enrol("g", new("a"))
    query = Query(vector=EAST, k=1, threshold=0, revision=None, by_embedder=True)
    async with replica(digest="2" * 64) as newer:
        with pytest.raises(InvalidRequest, match="test 111111111111, this worker .* 222222222222"):
            await newer.enrol("g", new("b"))
        with pytest.raises(InvalidRequest, match="cannot be mixed: reembed"):
            await newer.search("g", query)
        # Of older galleries nobody knows.
        head = m.GalleryHead(id="h", at=m.now(), embedder="test", dimensions=2)
        await newer._ledger.append_head(head, 0)
        await newer.enrol("h", new("a"))

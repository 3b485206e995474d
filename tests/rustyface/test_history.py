"""The history of galleries: who did what, without a face in it, and gone with the person."""

import asyncio

import numpy as np
import pytest

from bus import codec
from bus import messages as m
from bus.subjects import GALLERY_CHANGE, GALLERY_SUBJECT
from services.rustyface.galleries import clearing, history
from services.rustyface.galleries.galleries import NewEntry
from services.rustyface.galleries.ledger import Ledger

EAST, NORTH = np.array([1, 0], np.float32), np.array([0, 1], np.float32)


def new(name: str, **more) -> NewEntry:
    return NewEntry(id=name, vector=EAST, **more)


@pytest.fixture
async def galleries(replica):
    async with replica() as one:
        await one.create("g", by="me")
        yield one


async def told(galleries, gallery: str = "g") -> list[tuple]:
    changes, _ = await galleries.history(gallery, limit=100)
    return [
        (one.action, one.subject or one.entry, one.into, one.count) for one in reversed(changes)
    ]


async def test_every_change_is_told_newest_first_with_who_made_it(galleries):
    await galleries.configure("g", m.DatasetSettings(threshold=0.5), by="me")
    await galleries.enrol("g", new("a", subject="ann"), by="me")
    await galleries.enrol("g", new("a", subject="ann"), by="me")
    await galleries.enrol_many("g", [new("b"), new("c")], existing="fail", by="me")
    await galleries.move_entry("g", "b", "ann", by="me")
    await galleries.move_entry("g", "b", "bob", by="me")
    rejection, _ = await galleries.reject("g", "bob", vector=NORTH, by="me")
    await galleries.withdraw("g", rejection, by="me")
    await galleries.move_subjects("g", ["bob"], "rob", fresh=True, by="me")
    await galleries.move_subjects("g", ["rob"], "ann", by="me")
    await galleries.remove("g", "c", by="me")
    record = m.GalleryImport(id="i1", at=m.now(), source="f", format="json", by="me")
    await galleries.begin_import("g", record)
    await galleries.end_import("g", record)
    await galleries.undo_import("g", "i1", by="me")
    assert await told(galleries) == [
        ("create", None, None, None),
        ("configure", None, None, None),
        ("enrolled", "ann", None, None),
        ("replaced", "ann", None, None),
        ("enrolled", None, None, 2),
        ("move-entry", "ann", None, None),
        ("move-entry", "ann", None, None),
        ("move-entry", "bob", None, None),
        ("reject-match", "bob", None, None),
        ("withdraw-rejection", "bob", None, None),
        ("rename-subject", "bob", "rob", 1),
        ("merge-subjects", "rob", "ann", 1),
        ("remove-entry", "c", None, None),
        ("import", None, None, 0),
        ("undo-import", None, None, 0),
    ]
    changes, _ = await galleries.history("g", limit=100)
    assert {one.by for one in changes} == {"me"}
    assert [one.seq for one in changes] == sorted((one.seq for one in changes), reverse=True)
    assert all(one.revision <= galleries.revision for one in changes)


async def test_of_a_removed_person_only_how_many_entries_they_had_is_told(galleries, client):
    await galleries.enrol("g", new("a", subject="ann"))
    await galleries.enrol("g", new("b", subject="bob"))
    await galleries.move_subjects("g", ["ann"], "anna")
    await galleries.move_entry("g", "b", "anna")
    await galleries.move_entry("g", "b", "bob")
    await galleries.remove_subject("g", "anna", by="me")
    assert await told(galleries) == [
        ("create", None, None, None),
        ("enrolled", "bob", None, None),
        ("move-entry", "bob", None, None),
        ("move-entry", "bob", None, None),
        ("remove-subject", None, None, 1),
    ]
    bodies = [stored.body async for stored in client.store.changes.read(f"{client.root}.>")]
    assert b"ann" not in b"".join(bodies)


async def names_reused(galleries) -> None:
    """A and ZZ, who both were called C once; and a third C."""
    await galleries.enrol("g", new("a1", subject="C"))
    await galleries.move_subjects("g", ["C"], "A", fresh=True)
    await galleries.enrol("g", new("z1", subject="ZZ"))
    await galleries.enrol("g", new("z2", subject="C"))
    await galleries.move_subjects("g", ["C"], "ZZ")
    await galleries.enrol("g", new("c1", subject="C"))
    await galleries._ledger.telling.all_told()


OF_OTHERS = [
    ("create", None, None, None),
    ("enrolled", "C", None, None),
    ("rename-subject", "C", "A", 1),
    ("enrolled", "C", None, None),
]


async def test_who_once_bore_a_name_that_a_removed_person_had_keeps_their_history(
    galleries, client
):
    await names_reused(galleries)
    await galleries.remove_subject("g", "ZZ")
    assert await told(galleries) == [*OF_OTHERS, ("remove-subject", None, None, 2)]
    bodies = [stored.body async for stored in client.store.changes.read(f"{client.root}.>")]
    assert not any(one in b"".join(bodies) for one in (b"ZZ", b"z1", b"z2"))


async def test_with_the_last_entry_of_all_names_that_somebody_bore_theirs_alone_is_forgotten(
    galleries,
):
    await names_reused(galleries)
    for entry in ("z1", "z2"):
        await galleries.remove("g", entry)
    gone = [("remove-entry", entry, None, None) for entry in ("z1", "z2")]
    left = [one for one in await told(galleries) if one not in gone]
    assert left == OF_OTHERS


@pytest.mark.parametrize("moved", ["ZZ", "C"])
async def test_the_next_worker_forgets_somebody_whose_removal_was_cut_short_and_nobody_else(
    galleries, replica, client, moved
):
    """Whichever of their names has the event by which a replay comes to the removal."""
    await names_reused(galleries)
    moves, stream = galleries._galleries["g"].moves, client.store.galleries
    await stream.append(
        GALLERY_SUBJECT.subject(client.root, gallery="g", subject="ZZ"),
        codec.encode(moves.next("ZZ", None)),
    )
    await galleries.wait(await galleries.newest())
    if moved == "C":
        await galleries.move_subjects("g", ["C"], "D", fresh=True)
    await galleries._ledger.telling.all_told()
    async with replica() as other:
        renamed = [("rename-subject", "C", "D", 1)] if moved == "C" else []
        assert await told(other) == OF_OTHERS + renamed


@pytest.mark.parametrize("change", ["withdraw", "remove", "move_entry"])
async def test_what_concerns_somebody_who_is_renamed_at_the_same_moment_goes_with_them(
    galleries, client, monkeypatch, change
):
    """It is told under the name that they had by then, though another was looked at."""
    await galleries.enrol_many(
        "g", [new("a", subject="ann"), new("b", subject="ann")], existing="fail"
    )
    rejection, _ = await galleries.reject("g", "ann", vector=NORTH)
    name = "append_after" if change == "move_entry" else "append"
    append = getattr(Ledger, name)

    async def late(self, *args: object, **kwargs):
        monkeypatch.undo()
        await galleries.move_subjects("g", ["ann"], "anna", fresh=True)
        # Somebody else by now.
        await galleries.enrol("g", new("x", subject="ann"))
        return await append(self, *args, **kwargs)

    monkeypatch.setattr(Ledger, name, late)
    asked = {"withdraw": [rejection], "remove": ["a"], "move_entry": ["a", None]}
    await getattr(galleries, change)("g", *asked[change])
    action = {
        "withdraw": "withdraw-rejection",
        "remove": "remove-entry",
        "move_entry": "move-entry",
    }
    changes, _ = await galleries.history("g", limit=100)
    [one] = [one for one in changes if one.action == action[change]]
    assert one.subject == "anna"
    await galleries.remove_subject("g", "anna")
    expected = [("create", None), ("enrolled", None), ("enrolled", "ann"), ("remove-subject", None)]
    assert [one[:2] for one in await told(galleries)] == expected


async def test_a_change_that_nobody_can_read_goes_with_whoever_it_may_be_about(galleries, client):
    await galleries.enrol("g", new("a", subject="ann"))
    await galleries.move_subjects("g", ["ann"], "anna", fresh=True)
    await galleries.enrol("g", new("b", subject="ann"))
    ring = GALLERY_CHANGE.subject(client.root, gallery="g", subject="ann")
    await client.store.changes.append(ring, b"{no change of anna")
    await galleries.remove_subject("g", "anna")
    bodies = [stored.body async for stored in client.store.changes.read(f"{client.root}.>")]
    assert b"anna" not in b"".join(bodies)
    assert ("enrolled", "ann", None, None) in await told(galleries)


async def test_with_their_last_entry_somebody_s_history_goes_too(galleries):
    await galleries.enrol("g", new("a", subject="ann"))
    await galleries.remove("g", "a")
    assert await told(galleries) == [
        ("create", None, None, None),
        ("remove-entry", "a", None, None),
    ]


@pytest.mark.parametrize("removal", ["person", "renamed person", "dataset"])
async def test_what_another_replica_tells_late_of_whom_or_what_was_removed_does_not_stay(
    galleries, replica, client, connected, monkeypatch, removal
):
    tell, held = history.History.tell, asyncio.Event()

    async def late(self, change):
        if change.action == "enrolled":
            await held.wait()
        return await tell(self, change)

    monkeypatch.setattr(history.History, "tell", late)
    async with replica(await connected()) as other:
        await galleries.wait(await other.enrol("g", new("a", subject="ann")))
        if removal == "dataset":
            await galleries.delete("g")
            await galleries.create("g")
        else:
            if removal == "renamed person":
                await galleries.move_subjects("g", ["ann"], "anna")
            await galleries.remove_subject("g", "ann" if removal == "person" else "anna")
        held.set()
        await other._ledger.telling.all_told()
    bodies = [stored.body async for stored in client.store.changes.read(f"{client.root}.>")]
    assert b"ann" not in b"".join(bodies)


async def test_what_is_told_late_of_those_who_are_there_stays(galleries):
    await galleries.enrol("g", new("a", subject="ann"))
    await galleries.remove_subject("g", "ann")
    await galleries.enrol("g", new("a", subject="ann"))
    await galleries.move_subjects("g", ["ann"], "anna")
    assert [one[:3] for one in await told(galleries)] == [
        ("create", None, None),
        ("remove-subject", None, None),
        ("enrolled", "ann", None),
        ("merge-subjects", "ann", "anna"),
    ]


async def test_somebody_called_like_nobody_has_a_ring_of_their_own(galleries):
    await galleries.enrol("g", new("a", subject="-"))
    await galleries.remove_subject("g", "-")
    assert await told(galleries) == [
        ("create", None, None, None),
        ("remove-subject", None, None, 1),
    ]


async def test_a_deleted_gallery_has_no_history(galleries, client):
    await galleries.enrol("g", new("a", subject="ann"))
    await galleries.create("h")
    await galleries.delete("g")
    await galleries.create("g")
    assert await told(galleries) == [("create", None, None, None)]
    assert await told(galleries, "h") == [("create", None, None, None)]


@pytest.mark.parametrize("window", [1, 3, 1_000])
async def test_it_is_read_page_by_page_whatever_stands_between(galleries, monkeypatch, window):
    monkeypatch.setattr(history, "_WINDOW", window)
    await galleries.create("other")
    for i in range(10):
        for gallery in ("g", *["other"] * (i % 4)):
            await galleries.enrol(gallery, new(f"e{i}"))
    pages, after = [], None
    while True:
        page, after = await galleries.history("g", limit=4, after=after)
        pages.append([one.entry for one in page])
        if after is None:
            break
    assert pages == [["e9", "e8", "e7", "e6"], ["e5", "e4", "e3", "e2"], ["e1", "e0", None]]


async def test_what_cannot_be_told_does_not_keep_a_change_from_being_made(
    galleries, client, monkeypatch
):
    monkeypatch.setattr(clearing, "PATIENT_S", 0.2)
    await client.store.changes.append(
        GALLERY_CHANGE.subject(client.root, gallery="g", subject="-"), b"{no change"
    )
    assert await told(galleries) == [("create", None, None, None)]
    await client._nc.request(f"$JS.API.STREAM.DELETE.{client.store.changes.name}", b"")
    revision = await galleries.enrol("g", new("a", subject="ann"))
    await galleries.wait(revision)
    await galleries.remove_subject("g", "ann")
    assert galleries.ids("g") == []


async def test_without_a_stream_for_it_there_is_none():
    none = history.History(None, "r")
    await none.tell(m.GalleryChange(dataset="g", at=m.now(), action="create"))
    await none.forget("g")
    assert await none.read("g", limit=1, before=None) == ([], None)


async def test_no_change_has_a_place_for_a_face():
    fields = codec.schema(m.GalleryChange)["$defs"]["GalleryChange"]["properties"]
    assert not {"embedding", "vector", "image"} & fields.keys()

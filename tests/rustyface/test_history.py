"""The history of galleries: who did what, without a face in it, and gone with the person."""

import asyncio

import numpy as np
import pytest

from bus import codec
from bus import messages as m
from bus.subjects import GALLERY_CHANGE
from services.rustyface.galleries import history
from services.rustyface.galleries.galleries import NewEntry

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


async def test_what_cannot_be_told_does_not_keep_a_change_from_being_made(galleries, client):
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

"""Many entries at once, while others store theirs: nobody's acknowledged entry is lost."""

import asyncio
import itertools
import json
import random
from contextlib import suppress

import msgspec
import nats.errors
import numpy as np
import pytest

from bus import codec
from bus import messages as m
from bus.errors import Conflict, NotFound
from bus.jetstream import ask_jetstream
from bus.subjects import GALLERY_HEAD, GALLERY_REJECTION, gallery_events
from services.rustyface.galleries import enrolment
from services.rustyface.galleries.galleries import NewEntry
from services.rustyface.galleries.ledger import Ledger

EAST, NORTH = np.array([1, 0], np.float32), np.array([0, 1], np.float32)


def new(name: str, vector=EAST, **more) -> NewEntry:
    return NewEntry(id=name, vector=vector, **more)


def brought(*names: str, imported: str | None = "i1") -> list[NewEntry]:
    return [new(one, imported=imported) for one in names]


def theirs(name: str = "a") -> NewEntry:
    return new(name, NORTH, subject="bob")


def record(name: str = "i1", **more) -> m.GalleryImport:
    return m.GalleryImport(**{"id": name, "at": m.now(), "source": "f", "format": "json", **more})


@pytest.fixture(params=["batches", "one by one"])
async def galleries(request, replica, client):
    """A replica, on a stream that takes batches, and on one from before."""
    if request.param == "one by one":
        name = client.store.galleries.name
        found = await ask_jetstream(client._nc, f"$JS.API.STREAM.INFO.{name}", b"")
        await ask_jetstream(client._nc, f"$JS.API.STREAM.DELETE.{name}", b"")
        body = json.dumps(found["config"] | {"allow_atomic": False}).encode()
        await ask_jetstream(client._nc, f"$JS.API.STREAM.CREATE.{name}", body)
    async with replica() as one:
        await one.create("g")
        await one.begin_import("g", record())
        yield one


@pytest.fixture
async def other(galleries, replica, connected):
    """Another replica of the same galleries."""
    async with replica(await connected()) as one:
        yield one


@pytest.fixture
def ahead(monkeypatch, galleries):
    """Has something done between the decision about a batch and its storing: before which one.

    None is before every one that has the entry `c`.
    """

    def stage(act, number=1) -> None:
        append, numbers = galleries._stream.append_batch, itertools.count(1)

        async def late(messages):
            hot = number is None and any(one.subject.endswith(".entry.c") for one in messages)
            if next(numbers) == number or hot:
                await act()
            return await append(messages)

        monkeypatch.setattr(galleries._stream, "append_batch", late)

    return stage


@pytest.fixture
def uncleared(monkeypatch):
    """Leaves in the stream what is taken away, as a worker does that is killed then."""

    async def nothing(*_: object, **__: object) -> None:
        return

    monkeypatch.setattr(Ledger, "clear", nothing)
    monkeypatch.setattr(Ledger, "settle", nothing)


async def told(galleries) -> dict[str, tuple[str | None, str | None]]:
    """Return who each entry shows, and which import it is from."""
    await galleries.wait(await galleries.newest())
    entries = galleries.picked("g", galleries.ids("g"))
    return {one.id: (one.subject, one.imported) for one in entries}


async def events_of(client, entry: str) -> int:
    """Return how many events of an entry are in the stream."""
    events = client.store.galleries.read(gallery_events(client.root, "g"))
    return sum([one.subject.endswith(f".entry.{entry}") async for one in events])


async def test_an_import_that_skips_leaves_what_another_has_enrolled_meanwhile(
    galleries, other, ahead, replica
):
    ahead(lambda: other.enrol("g", theirs()))
    outcome = await galleries.enrol_many("g", brought("a", "b"), existing="skip")
    assert (outcome.added, outcome.replaced, outcome.skipped) == (1, 0, 1)
    assert await told(galleries) == {"a": ("bob", None), "b": (None, "i1")}
    assert (await other.undo_import("g", "i1"))[0] == 1
    async with replica() as replayed:
        for one in (galleries, other, replayed):
            assert await told(one) == {"a": ("bob", None)}


async def test_an_import_that_replaces_what_came_meanwhile_does_not_own_it(
    galleries, other, ahead, replica
):
    ahead(lambda: other.enrol("g", theirs()))
    outcome = await galleries.enrol_many("g", brought("a", "b"), existing="replace")
    assert (outcome.added, outcome.replaced, outcome.skipped) == (1, 1, 0)
    assert await told(galleries) == {"a": (None, None), "b": (None, "i1")}
    await other.undo_import("g", "i1")
    async with replica() as replayed:
        for one in (galleries, other, replayed):
            assert await told(one) == {"a": (None, None)}


async def test_an_import_that_may_not_find_anything_stops_at_what_came_meanwhile(
    galleries, other, ahead
):
    ahead(lambda: other.enrol("g", theirs()))
    with pytest.raises(Conflict, match="'g' has entries 'a' already"):
        await galleries.enrol_many("g", brought("a", "b"), existing="fail")
    there = await told(galleries)
    assert there.pop("a") == ("bob", None)
    # One by one the others may be there: their import is undone as it was not done.
    assert there in ({}, {"b": (None, "i1")})


async def test_it_says_how_many_entries_were_stored_before_somebody_else_s_came(
    galleries, other, ahead, monkeypatch
):
    monkeypatch.setattr(enrolment, "AS_ONE_MAX", 2)
    ahead(lambda: other.enrol("g", theirs("d")), number=2)
    said = "entries 'd' already, stored by others after the first [23] of these entries; existing"
    with pytest.raises(Conflict, match=said):
        await galleries.enrol_many("g", brought("a", "b", "c", "d", "e"), existing="fail")
    there = await told(galleries)
    assert there["a"] == there["b"] == (None, "i1")
    assert there["d"] == ("bob", None)
    assert "e" not in there


@pytest.mark.parametrize("existing", ["skip", "replace", "fail", "renew"])
async def test_of_an_import_undone_meanwhile_nothing_is_there_and_all_that_others_enrolled(
    galleries, other, ahead, replica, existing
):
    async def undo() -> None:
        await other.undo_import("g", "i1")
        await other.enrol("g", theirs())

    ahead(undo)
    with pytest.raises(Conflict, match=r"was undone|'a' already"):
        await galleries.enrol_many("g", brought("a", "b"), existing=existing)
    async with replica() as replayed:
        for one in (galleries, other, replayed):
            assert await told(one) == {"a": ("bob", None)}


@pytest.mark.parametrize("galleries", ["batches"], indirect=True)
async def test_an_import_undone_meanwhile_replaces_nothing(galleries, other, ahead):
    await other.enrol("g", theirs())
    ahead(lambda: other.undo_import("g", "i1"))
    with pytest.raises(Conflict, match="the import 'i1' was undone"):
        await galleries.enrol_many("g", brought("a", "b"), existing="replace")
    assert await told(galleries) == {"a": ("bob", None)}


@pytest.mark.parametrize("anew", [False, True])
async def test_nothing_comes_into_a_gallery_deleted_meanwhile_nor_into_a_new_one(
    galleries, other, ahead, replica, client, anew
):
    async def delete() -> None:
        await other.delete("g")
        if anew:
            await other.create("g")
            await other.enrol("g", theirs())

    ahead(delete)
    with pytest.raises(NotFound, match="'g' was deleted at this moment"):
        await galleries.enrol_many("g", brought("a", "b"), existing="skip")
    assert await events_of(client, "a") == anew
    await galleries.wait(await galleries.newest())
    assert ("g" in galleries) is anew
    if anew:
        async with replica() as replayed:
            for one in (galleries, other, replayed):
                assert await told(one) == {"a": ("bob", None)}


async def test_nothing_comes_into_a_new_gallery_whose_predecessor_was_not_cleared_away(
    galleries, other, ahead, client
):
    await galleries.enrol_many("g", brought("a"), existing="skip")

    async def make_anew() -> None:
        head = m.GalleryHead(id="g", at=m.now(), embedder="test", dimensions=2)
        # By another replica, which has not come to clearing the old entries.
        subject, stream = GALLERY_HEAD.subject(client.root, gallery="g"), client.store.galleries
        await stream.append(subject, codec.encode(msgspec.structs.replace(head, deleted=True)))
        await stream.append(subject, codec.encode(head))

    ahead(make_anew)
    with pytest.raises(NotFound, match="'g' was deleted at this moment"):
        await galleries.enrol_many("g", brought("a", "b", "c"), existing="replace")
    assert await told(galleries) == await told(other) == {}


async def a_person_removed(other) -> None:
    await other.remove_subject("g", "bob")


async def an_entry_removed(other) -> None:
    await other.remove("g", "a")


async def an_import_undone(other) -> None:
    await other.begin_import("g", record("i0"))
    await other.enrol_many("g", [new("z", imported="i0")], existing="skip")
    await other.undo_import("g", "i0")


async def a_gallery_made_anew(other) -> None:
    await other.delete("g")
    await other.create("g")
    await other.begin_import("g", record())


@pytest.mark.parametrize(
    "take_away", [a_person_removed, an_entry_removed, an_import_undone, a_gallery_made_anew]
)
async def test_what_was_taken_away_and_not_erased_yet_is_in_nobody_s_way(
    galleries, other, replica, uncleared, take_away
):
    for name in ("a", "c"):
        await other.enrol("g", theirs(name))
    await take_away(other)
    before = (await told(galleries)).keys()
    outcome = await galleries.enrol_many("g", brought("a", "c", "z"), existing="skip")
    assert outcome.added == 3 - len(before)
    async with replica() as replayed:
        for one in (galleries, other, replayed):
            there = await told(one)
            assert there == {
                name: ("bob", None) if name in before else (None, "i1") for name in "acz"
            }


async def test_what_is_erased_between_the_look_and_the_next_try_is_looked_at_again(
    galleries, other, client, ahead, uncleared
):
    revision = await other.enrol("g", theirs())
    await other.remove_subject("g", "bob")
    assert await events_of(client, "a") == 1
    ahead(lambda: client.store.galleries.remove(revision, erase=True), number=2)
    outcome = await galleries.enrol_many("g", brought("a"), existing="skip")
    assert (outcome.added, outcome.skipped) == (1, 0)
    assert await told(galleries) == {"a": (None, "i1")}


async def test_an_import_taken_up_again_leaves_what_others_have_done_since(galleries, other, ahead):
    await galleries.enrol_many("g", brought("a", "b", "c"), existing="skip")
    await other.enrol("g", theirs("a"))
    ahead(lambda: other.enrol("g", theirs("b")))
    outcome = await galleries.enrol_many("g", brought("a", "b", "c", "d"), existing="renew")
    assert (outcome.added, outcome.replaced, outcome.skipped) == (2, 0, 2)
    mine = (None, "i1")
    assert await told(galleries) == {
        "a": ("bob", None), "b": ("bob", None), "c": mine, "d": mine,
    }  # fmt: skip


@pytest.mark.parametrize("imported", ["i1", None])
@pytest.mark.parametrize("existing", ["skip", "replace", "fail"])
async def test_entries_whose_answer_was_lost_are_stored_and_counted_once(
    galleries, client, monkeypatch, imported, existing
):
    await galleries.wait(await galleries.enrol("g", theirs("z")))
    request, lost = client._nc.request, []

    async def losing(subject, body, *, headers=None, timeout):
        reply = await request(subject, body, headers=headers, timeout=timeout)
        stores = ".entry.a" in subject or "Nats-Batch-Commit" in (headers or {})
        if stores and not lost:
            lost.append(subject)
            raise nats.errors.TimeoutError
        return reply

    monkeypatch.setattr(client._nc, "request", losing)
    names = ("a", "b", "z") if existing == "replace" else ("a", "b")
    outcome = await galleries.enrol_many("g", brought(*names, imported=imported), existing=existing)
    assert lost
    assert (outcome.added, outcome.replaced) == (2, existing == "replace")
    await galleries._ledger.chores_done()
    assert [await events_of(client, one) for one in ("a", "b", "z")] == [1, 1, 1]


async def test_the_others_need_not_wait_for_an_entry_that_somebody_keeps_changing(
    galleries, other, ahead
):
    ahead(lambda: other.enrol("g", theirs("c")), number=None)
    with pytest.raises(Conflict, match="others keep changing the same entries of 'g'"):
        await galleries.enrol_many("g", brought("a", "b", "c", "d"), existing="replace")
    mine = (None, "i1")
    assert await told(galleries) == {"a": mine, "b": mine, "c": ("bob", None), "d": mine}


async def test_a_single_enrolment_of_an_import_does_not_own_what_others_have_enrolled(
    galleries, other, ahead
):
    await other.enrol("g", theirs())
    ahead(lambda: other.enrol("g", theirs("b")))
    for name in ("a", "b", "c"):
        await galleries.enrol("g", new(name, imported="i1"))
    await other.undo_import("g", "i1")
    assert (await told(galleries)).keys() == {"a", "b"}


async def test_an_entry_is_removed_as_an_import_s_only_while_it_is(galleries, other, monkeypatch):
    await galleries.enrol_many("g", brought("a", "b"), existing="skip")
    append = Ledger.append_entry

    async def late(self, *args: object, **more):
        monkeypatch.undo()
        await other.enrol("g", theirs())
        return await append(self, *args, **more)

    monkeypatch.setattr(Ledger, "append_entry", late)
    with pytest.raises(NotFound, match="the entry 'a' of the dataset 'g' is not of import 'i1'"):
        await galleries.remove("g", "a", imported="i1")
    await galleries.remove("g", "b", imported="i1")
    assert await told(galleries) == {"a": ("bob", None)}


async def test_many_batches_leave_few_fences_and_they_say_nothing(
    galleries, replica, client, monkeypatch
):
    monkeypatch.setattr(enrolment, "AS_ONE_MAX", 2)
    await galleries.enrol_many("g", brought(*(f"e{i}" for i in range(80))), existing="skip")
    everyone = GALLERY_REJECTION.subject(client.root, gallery="g", rejection="*")
    left = (await client.store.galleries.occupied(everyone)).subjects
    assert sum(left.values()) <= 64
    async with replica() as replayed:
        assert replayed.rejections("g") == []
        assert len(replayed.ids("g")) == 80


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_two_replicas_do_at_once_every_acknowledged_entry_is_there(
    galleries, other, replica, monkeypatch, seed
):
    """Unless somebody has enrolled another one in its place, or removed it."""
    monkeypatch.setattr(enrolment, "AS_ONE_MAX", 3)
    chance, ids = random.Random(seed), [f"e{i}" for i in range(8)]  # noqa: S311
    # By entry, the last enrolment or removal that was acknowledged: its revision, and whose.
    last: dict[str, tuple[int, str | None]] = {}
    imports: dict[str, set[str]] = {}
    numbers = itertools.count()

    async def enrol(at) -> None:
        entry, name = chance.choice(ids), f"n{next(numbers)}"
        revision = await at.enrol("g", new(entry, subject=name))
        last[entry] = max(last.get(entry, (0, "")), (revision, name))

    async def remove(at) -> None:
        entry = chance.choice(ids)
        revision = (await at.remove("g", entry)).revision
        last[entry] = max(last.get(entry, (0, "")), (revision, None))

    async def import_some(at) -> None:
        name, some = f"i{next(numbers)}", chance.sample(ids, 6)
        await at.begin_import("g", record(name))
        imports[name] = set()
        fresh = [new(one, NORTH, imported=name) for one in some]
        existing = chance.choice(["skip", "skip", "replace", "fail"])
        outcome = await at.enrol_many("g", fresh, existing=existing)
        # What it has skipped may leave with the import that brought it.
        imports[name] = set(some) if outcome.added == len(some) else set()

    async def undo(at) -> None:
        if imports:
            await at.undo_import("g", chance.choice([*imports]))

    async def act(at, acts) -> None:
        # Others come first, or there is nothing to remove.
        with suppress(NotFound, Conflict):
            await chance.choice(acts)(at)

    def meddled_with(at, by) -> None:
        append = at._stream.append_batch

        async def late(messages):
            if chance.random() < 0.7:
                await act(by, [enrol, enrol, enrol, remove, undo])
            return await append(messages)

        monkeypatch.setattr(at._stream, "append_batch", late)

    meddled_with(galleries, other)
    meddled_with(other, galleries)

    async def keep_on(at) -> None:
        for _ in range(15):
            await act(at, [enrol, remove, import_some, import_some, import_some, undo])

    await asyncio.gather(*(keep_on(one) for one in (galleries, other)))
    newest = await galleries.newest()
    async with replica() as replayed:
        for one in (galleries, other, replayed):
            await one.wait(newest)
            found = {e.id: e for e in one.picked("g", one.ids("g"))}
            for entry, (revision, name) in last.items():
                if name is not None:
                    # What is there instead came later, with an import that does not own it.
                    there = found[entry]
                    later = there.revision > revision and there.imported is None
                    assert there.subject == name or later
            undone = {x.id for x in await one.imports("g") if x.state == "undone"}
            assert not undone & {x.imported for x in found.values()}
            for some in (imports[name] for name in imports.keys() - undone):
                assert all(last[entry][1] is None for entry in some - found.keys())

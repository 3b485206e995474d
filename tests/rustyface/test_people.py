"""Persons: renamed, merged, removed, told apart; on every replica at once, and for good."""

import asyncio
import itertools
import random
from contextlib import suppress

import msgspec
import numpy as np
import pytest

from bus import codec
from bus import messages as m
from bus.errors import Conflict, InvalidRequest, NotFound
from bus.subjects import (
    GALLERY_ENTRY,
    GALLERY_HEAD,
    GALLERY_REJECTION,
    GALLERY_SUBJECT,
    gallery_events,
)
from services.rustyface.galleries.galleries import Query
from services.rustyface.galleries.ledger import Ledger
from services.rustyface.galleries.persons import Moves
from tests.rustyface.persons import EAST, NEARLY_EAST, NORTH, found, new, persons, vectors_of


async def test_a_renaming_is_one_event_and_everybody_knows_it(people, replica, connected):
    async with replica(await connected()) as other:
        before = await people.newest()
        assert await people.move_subjects("g", ["ann"], "anna", fresh=True) == (3, before + 1)
        expected = {"anna": ["a0", "a1", "a2"], "bob": ["b"]}
        assert await persons(people, other) == expected
        async with replica() as replayed:
            assert await persons(replayed) == expected


async def test_whoever_is_given_a_name_that_was_left_is_somebody_else(people, replica):
    await people.move_subjects("g", ["ann"], "anna")
    await people.enrol("g", new("a9", subject="ann"))
    await people.move_subjects("g", ["anna"], "bob")
    async with replica() as replayed:
        expected = {"ann": ["a9"], "bob": ["a0", "a1", "a2", "b"]}
        assert await persons(people, replayed) == expected


async def test_a_renaming_takes_nobody_s_name_but_a_merge_does(people):
    with pytest.raises(Conflict, match="somebody called 'bob' already; merge-subjects"):
        await people.move_subjects("g", ["ann"], "bob", fresh=True)
    with pytest.raises(NotFound, match="nobody called 'eve'"):
        await people.move_subjects("g", ["ann", "eve"], "bob")
    with pytest.raises(InvalidRequest, match="'ann' is called so already"):
        await people.move_subjects("g", ["ann", "ann"], "ann")
    assert await persons(people) == {"ann": ["a0", "a1", "a2"], "bob": ["b"]}
    affected, _ = await people.move_subjects("g", ["ann", "bob"], "bob")
    assert affected == 3
    assert await persons(people) == {"bob": ["a0", "a1", "a2", "b"]}


async def test_of_many_moves_at_the_same_moment_none_is_lost(people, replica, connected):
    """Every one that was acknowledged has moved somebody, and nobody is in two places."""
    async with replica(await connected()) as other:

        async def move(galleries, name: str, into: str) -> int:
            with suppress(NotFound, Conflict):
                return (await galleries.move_subjects("g", [name], into))[1]
            return 0

        names = ["ann", "bob", "cat", "dan"]
        for i in range(6):
            pairs = [(names[(i + j) % 4], names[(i + 2 * j + 1) % 4]) for j in range(4)]
            revisions = await asyncio.gather(
                *(move(one, a, b) for one in (people, other) for a, b in pairs if a != b)
            )
            done = [one for one in revisions if one]
            assert len(set(done)) == len(done)
        told = await persons(people, other)
        assert sorted(itertools.chain(*told.values())) == ["a0", "a1", "a2", "b"]
        async with replica() as replayed:
            assert await persons(replayed) == told


async def test_of_two_who_move_somebody_at_the_same_moment_the_second_is_told(people, monkeypatch):
    append = Ledger.append_after

    async def late(self, *args: object, **kwargs):
        monkeypatch.undo()
        # Between the look and the move, and this replica has read it already.
        await people.move_subjects("g", ["ann"], "anna")
        return await append(self, *args, **kwargs)

    monkeypatch.setattr(Ledger, "append_after", late)
    with pytest.raises(NotFound, match="nobody called 'ann'"):
        await people.move_subjects("g", ["ann"], "zoe")
    assert "zoe" not in await persons(people)


async def test_a_removed_person_is_gone_everywhere_at_once_and_from_the_stream(
    people, replica, connected, client
):
    await people.reject("g", "ann", vector=NORTH)
    async with replica(await connected()) as other:
        assert (await people.remove_subject("g", "ann", dry_run=True))[0] == 3
        assert "ann" in await persons(people, other)
        affected, revision, _ = await people.remove_subject("g", "ann")
        assert affected == 3
        await other.wait(revision)
        for one in (people, other):
            assert one.ids("g") == ["b"]
            there = one._galleries["g"]
            # Not even where the rows were.
            assert np.count_nonzero(there.matrix._rows[1:4]) == 0
            assert not there.rejections
        assert await vectors_of(client) == ["b"]


async def test_the_next_worker_clears_what_a_removal_that_was_cut_short_has_left(
    people, replica, client
):
    rejection, _ = await people.reject("g", "ann", vector=NORTH)
    await people.enrol("g", new("a0", subject="ann", image="1" * 64))
    subject = GALLERY_SUBJECT.subject(client.root, gallery="g", subject="ann")
    await client.store.galleries.append(subject, codec.encode(Moves().next("ann", None)))
    assert await vectors_of(client) == sorted(["a0", "a1", "a2", "b", rejection])
    gone = []

    async def drop_image(digest, _named):
        gone.append(digest)

    async with replica(drop_image=drop_image) as galleries:
        assert await persons(galleries) == {"bob": ["b"]}
        assert gone == ["1" * 64]
        assert await vectors_of(client) == ["b"]
        changes, _ = await galleries.history("g", limit=100)
        assert "ann" not in str(changes)


async def test_a_moved_entry_keeps_all_that_it_had(people, replica):
    entry = new(
        "x", NEARLY_EAST, metadata={"n": 1}, subject="ann", image="2" * 64, quality={"size_px": 9}
    )
    await people.enrol("g", entry)
    [before], _, _ = await people.entries("g", limit=1, entry="x", embeddings=True)
    for into in ("bob", None, "eve"):
        await people.move_entry("g", "x", into)
        [now], _, _ = await people.entries("g", limit=1, entry="x", embeddings=True)
        assert now.subject == into
        assert now.embedding == pytest.approx(before.embedding)
        for name in ("metadata", "image", "quality", "last_seen"):
            assert getattr(now, name) == getattr(before, name)
    with pytest.raises(NotFound, match="has no entry 'y'"):
        await people.move_entry("g", "y", "bob")


async def test_moving_an_entry_never_brings_back_the_face_that_it_had(people, monkeypatch):
    """It was enrolled anew between the look and the move."""
    append = Ledger.append_after

    async def late(self, *args: object, **kwargs):
        monkeypatch.undo()
        await people.enrol("g", new("a0", NORTH, subject="ann"))
        return await append(self, *args, **kwargs)

    monkeypatch.setattr(Ledger, "append_after", late)
    await people.move_entry("g", "a0", "bob")
    [entry], _, _ = await people.entries("g", limit=1, entry="a0", embeddings=True)
    assert (entry.subject, entry.embedding) == ("bob", [0, 1])


@pytest.mark.parametrize("change", ["move_entry", "move_subjects"])
async def test_nothing_is_left_of_a_change_whose_gallery_is_deleted_meanwhile(
    people, monkeypatch, client, change
):
    append = Ledger.append_after

    async def late(self, *args: object, **kwargs):
        monkeypatch.undo()
        # Only its event, and by another worker: the clearing would make the move a conflict.
        await self.append_head(
            m.GalleryHead(id="g", at=m.now(), embedder="test", dimensions=2, deleted=True),
            1,
            "another's",
        )
        return await append(self, *args, **kwargs)

    monkeypatch.setattr(Ledger, "append_after", late)
    names = {"move_entry": "a0", "move_subjects": ["ann"]}
    before = await vectors_of(client)
    with pytest.raises(NotFound, match="'g' was deleted at this moment|no dataset 'g'"):
        await getattr(people, change)("g", names[change], "zoe")
    left = [s.subject async for s in client.store.galleries.read(gallery_events(client.root))]
    assert not [one for one in left if one.endswith(("subject.ann", "subject.zoe"))]
    assert set(await vectors_of(client)) <= set(before)


@pytest.mark.parametrize("name", ["ann", "anna"])
async def test_a_face_that_is_moved_while_its_person_is_removed_is_removed_too(
    people, replica, connected, monkeypatch, client, name
):
    """The other replica has read neither renaming nor removal when it decides."""
    async with replica(await connected()) as other:
        append = Ledger.append_after

        async def late(self, *args: object, **kwargs):
            monkeypatch.undo()
            if name == "anna":
                await people.move_subjects("g", ["ann"], "anna")
            await people.remove_subject("g", name)
            # The removal has cleared the entry away; a worker that was killed would not have.
            subject = GALLERY_ENTRY.subject(client.root, gallery="g", entry="a0")
            assert await client.store.galleries.last(subject) is None
            return await append(self, args[0], args[1], 0, *args[3:], **kwargs)

        monkeypatch.setattr(Ledger, "append_after", late)
        with pytest.raises(NotFound, match="'ann', whom the entry 'a0' showed, was removed"):
            await other.move_entry("g", "a0", "bob")
        assert await persons(people, other) == {"bob": ["b"]}
        assert await vectors_of(client) == ["b"]


async def test_a_face_that_was_moved_stays_when_the_person_is_removed_after_it(people, monkeypatch):
    append = Ledger.append_after

    async def before(self, *args: object, **kwargs):
        monkeypatch.undo()
        revision = await append(self, *args, **kwargs)
        await people.remove_subject("g", "ann")
        return revision

    monkeypatch.setattr(Ledger, "append_after", before)
    await people.move_entry("g", "a0", "bob")
    assert await persons(people) == {"bob": ["a0", "b"]}


async def test_a_face_that_is_moved_does_not_come_into_a_gallery_that_took_the_name(
    people, replica, monkeypatch, client
):
    """Deleted and made anew between the look and the move, before the old entries were cleared."""
    append = Ledger.append_after

    async def late(self, *args: object, **kwargs):
        monkeypatch.undo()
        head = m.GalleryHead(id="g", at=m.now(), embedder="test", dimensions=2)
        # By another replica, which has not come to clearing the old entries.
        subject, stream = GALLERY_HEAD.subject(client.root, gallery="g"), client.store.galleries
        await stream.append(subject, codec.encode(msgspec.structs.replace(head, deleted=True)))
        await stream.append(subject, codec.encode(head))
        return await append(self, *args, **kwargs)

    monkeypatch.setattr(Ledger, "append_after", late)
    with pytest.raises(NotFound, match="'g' was deleted at this moment"):
        await people.move_entry("g", "a0", "bob")
    assert await persons(people) == {}
    # Those of before are the other replica's to clear away, or the next one's.
    assert await vectors_of(client) == ["a0", "a1", "a2", "b"]
    async with replica() as replayed:
        assert await persons(replayed) == {}
        assert await vectors_of(client) == []


async def test_what_is_enrolled_over_such_a_face_in_the_new_gallery_stays(people, monkeypatch):
    append = Ledger.append_after

    async def late(self, *args: object, **kwargs):
        monkeypatch.undo()
        await people.delete("g")
        await people.create("g")
        revision = await append(self, args[0], args[1], 0, *args[3:], **kwargs)
        await people.enrol("g", new("a0", NORTH, subject="eve"))
        return revision

    monkeypatch.setattr(Ledger, "append_after", late)
    with pytest.raises(NotFound, match="'g' was deleted at this moment"):
        await people.move_entry("g", "a0", "bob")
    assert await persons(people) == {"eve": ["a0"]}


async def test_by_person_there_is_one_result_each_and_nobody_s_entries_stand_alone(people):
    await people.enrol_many("g", [new("x"), new("y", NEARLY_EAST)], existing="fail")
    matches = await found(people, group_by="subject")
    told = [(one.entry.id, one.subject, one.subject_entries) for one in matches]
    assert told == [("a0", "ann", 3), ("x", None, None), ("y", None, None), ("b", "bob", 1)]
    assert matches[0].subject_score == pytest.approx(1)
    assert matches[1].subject_score is None
    [ann, *_] = await found(people, group_by="entry")
    assert (ann.subject, ann.subject_score, ann.subject_entries) == ("ann", None, None)


async def test_a_person_s_score_is_the_cosine_to_the_mean_of_all_their_entries(people):
    """Also of those that a filter leaves out of the search."""
    await people.enrol("g", new("a9", NORTH, subject="ann", metadata={"in": 1}))
    [match] = await found(people, group_by="subject", filter={"in": 1})
    mean = np.mean([EAST, EAST, EAST, NORTH], axis=0)
    assert match.entry.id == "a9"
    assert match.subject_score == pytest.approx(mean[0] / np.linalg.norm(mean))
    assert match.subject_entries == 4


async def test_names_of_any_length_and_alphabet_are_moved_too(replica):
    names = ["-", "a.b *>", "\U0001f600" * 256, "sha256-x", " "]
    async with replica() as galleries:
        await galleries.create("g")
        for i, name in enumerate(names):
            await galleries.enrol("g", new(f"e{i}", subject=name))
        for name, into in itertools.pairwise(names):
            await galleries.move_subjects("g", [name], into)
        async with replica() as replayed:
            assert await persons(galleries, replayed) == {" ": [f"e{i}" for i in range(5)]}


async def test_after_any_changes_two_replicas_and_a_replay_answer_alike(
    people, replica, connected, client
):
    chance = random.Random(11)  # noqa: S311
    names, ids = ["ann", "bob", "cat"], [f"e{i}" for i in range(12)]

    async def change(galleries) -> None:
        name, other, entry = chance.choice(names), chance.choice(names), chance.choice(ids)
        vector = np.array([chance.choice([-1, 1, 2]), chance.choice([1, 3])], np.float32)
        match chance.randrange(12):
            case 0:
                await galleries.remove("g", entry)
            case 1:
                await galleries.move_subjects("g", [name], other)
            case 2:
                await galleries.move_entry("g", entry, chance.choice([None, name]))
            case 3:
                await galleries.reject("g", name, vector=vector)
            case 4:
                await galleries.reject("g", name, entry=entry)
            case 5:
                await galleries.remove_subject("g", name)
            case 6:
                await galleries.undo_import("g", "i1")
            case 7:
                await galleries.configure("g", m.DatasetSettings(threshold=chance.random()))
            case _:
                fresh = [new(e, vector, subject=name) for e in chance.sample(ids, 3)]
                await galleries.enrol_many("g", fresh, existing="replace")

    async def attempt(galleries) -> None:
        # Others come first, or there is nothing to change.
        with suppress(NotFound, Conflict, InvalidRequest):
            await change(galleries)

    record = m.GalleryImport(id="i1", at=m.now(), source="f", format="json")
    await people.begin_import("g", record)
    brought = [new(f"i{i}", NEARLY_EAST, subject="cat", imported="i1") for i in range(4)]
    await people.enrol_many("g", brought, existing="skip")
    async with replica(await connected()) as second:
        for _ in range(12):
            await asyncio.gather(*(attempt(chance.choice([people, second])) for _ in range(12)))
        newest = await people.newest()
        async with replica() as replayed:
            answers = []
            for one in (people, second, replayed):
                await one.wait(newest)
                listed = await one.entries("g", limit=1_000, embeddings=True)
                searches = [
                    await one.search(
                        "g",
                        Query(vector=q, k=9, threshold=-1, revision=newest, group_by=by),
                    )
                    for q in (EAST, NEARLY_EAST)
                    for by in ("entry", "subject")
                ]
                answers.append((listed, [s.matches for s in searches], searches[0].settings))
            assert answers[0] == answers[1] == answers[2]
        entries = {
            GALLERY_ENTRY.subject(client.root, gallery="g", entry=one) for one in people.ids("g")
        }
        rejections = {
            GALLERY_REJECTION.subject(client.root, gallery="g", rejection=one)
            for one in people._galleries["g"].rejections
        }
        tokens = sorted(one.rpartition(".")[2] for one in entries | rejections)
        assert await vectors_of(client) == tokens

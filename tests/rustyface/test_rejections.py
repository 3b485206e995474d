"""Rejections: a face is not a person, until somebody says that it is, or one of both leaves."""

import numpy as np
import pytest

from bus.errors import Conflict, InvalidRequest, NotFound
from bus.testing import until
from services.rustyface.galleries.ledger import Ledger
from tests.rustyface.persons import EAST, NEARLY_EAST, NORTH, found, new, vectors_of


async def test_who_was_rejected_for_a_face_is_not_named_for_it_again(people, replica):
    [best, *_] = await found(people, NEARLY_EAST, group_by="subject")
    assert (best.subject, best.rejected) == ("ann", False)
    rejection, revision = await people.reject("g", "ann", vector=NEARLY_EAST)
    async with replica() as replayed:
        for one in (people, replayed):
            for group_by in ("entry", "subject"):
                told = {
                    match.subject: match.rejected
                    for match in await found(one, NEARLY_EAST, group_by=group_by, revision=revision)
                }
                assert told == {"ann": True, "bob": False}
            # She herself still is.
            assert not (await found(one, EAST, group_by="subject"))[0].rejected
    await people.withdraw("g", rejection)
    assert not (await found(people, NEARLY_EAST))[0].rejected
    with pytest.raises(NotFound, match="has no rejection"):
        await people.withdraw("g", rejection)


async def test_a_rejection_goes_where_the_person_goes(people, replica, client):
    rejection, _ = await people.reject("g", "ann", vector=NEARLY_EAST)
    await people.move_subjects("g", ["ann"], "anna")
    assert (await found(people, NEARLY_EAST))[0].rejected
    await people.enrol("g", new("x", subject="ann"))
    subjects, _, _ = await people.subjects("g", limit=10)
    rejections = {one.id: one.rejections for one in subjects}
    assert rejections == {"ann": [], "anna": [rejection], "bob": []}
    await people.remove_subject("g", "anna")
    assert await vectors_of(client) == ["b", "x"]
    async with replica() as replayed:
        assert not replayed._galleries["g"].rejections


async def test_an_entry_can_be_rejected_and_takes_its_face_with_it(people, client):
    await people.enrol("g", new("x", NEARLY_EAST))
    rejection, _ = await people.reject("g", "ann", entry="x")
    assert (await found(people, NEARLY_EAST, group_by="subject"))[-1].rejected
    assert rejection in await vectors_of(client)
    await people.remove("g", "x")
    assert await vectors_of(client) == ["a0", "a1", "a2", "b"]


@pytest.mark.parametrize("how", ["one", "many"])
async def test_whoever_is_enrolled_anew_as_who_they_were_not_takes_a_rejection_back(
    people, replica, connected, client, how
):
    await people.enrol("g", new("x", NEARLY_EAST))
    theirs, _ = await people.reject("g", "ann", entry="x")
    kept, _ = await people.reject("g", "bob", entry="x")
    async with replica(await connected()) as other:
        if how == "one":
            await other.enrol("g", new("x", NEARLY_EAST, subject="ann"))
        else:
            anew = [new("x", NEARLY_EAST, subject="ann"), new("y")]
            await other.enrol_many("g", anew, existing="replace")
        await until(lambda: list(people._galleries["g"].rejections) == [kept])
        assert not (await found(people, NEARLY_EAST, group_by="subject"))[0].rejected
        # Its face is erased as well.
        await other.wait(people.revision)
        await other._ledger.chores_done()
        assert theirs not in await vectors_of(client)


async def test_a_rejection_leaves_with_the_last_entry_of_its_person_that_is_enrolled_anew(
    people, client
):
    await people.reject("g", "bob", vector=EAST)
    await people.enrol("g", new("b", NORTH, subject="eve"))
    await until(lambda: not people._galleries["g"].rejections)


@pytest.mark.parametrize("lost", ["person", "entry"])
async def test_a_rejection_whose_person_or_face_leaves_at_the_same_moment_is_refused(
    people, monkeypatch, client, lost
):
    """Somebody who is given that name later would not be named for the face."""
    await people.enrol("g", new("x", NEARLY_EAST))
    append = Ledger.append

    async def late(self, *args: object, **kwargs):
        monkeypatch.undo()
        if lost == "person":
            await people.move_subjects("g", ["ann"], "anna", fresh=True)
        else:
            await people.remove("g", "x")
        return await append(self, *args, **kwargs)

    monkeypatch.setattr(Ledger, "append", late)
    with pytest.raises(Conflict, match="'ann', or the face that they are not, has left"):
        await people.reject("g", "ann", entry="x")
    await people.enrol("g", new("a9", NEARLY_EAST, subject="ann"))
    assert not people._galleries["g"].rejections
    assert not (await found(people, NEARLY_EAST, group_by="subject"))[0].rejected


@pytest.mark.parametrize("how", ["move", "merge"])
async def test_whoever_says_that_it_is_them_after_all_takes_a_rejection_back(people, replica, how):
    await people.enrol("g", new("x", NEARLY_EAST, subject="eve"))
    await people.reject("g", "ann", entry="x")
    kept, _ = await people.reject("g", "ann", vector=NORTH)
    if how == "move":
        await people.move_entry("g", "x", "ann")
    else:
        await people.move_subjects("g", ["eve"], "ann")
    async with replica() as replayed:
        for one in (people, replayed):
            assert list(one._galleries["g"].rejections) == [kept]
            [best, *_] = await found(one, NEARLY_EAST, group_by="subject")
            assert (best.entry.id, best.subject, best.rejected) == ("x", "ann", False)


async def test_a_rejection_leaves_with_the_last_entry_of_its_person(people, client):
    await people.reject("g", "bob", vector=EAST)
    await people.remove("g", "b")
    assert await vectors_of(client) == ["a0", "a1", "a2"]
    await people.enrol("g", new("b", NORTH, subject="bob"))
    assert not (await found(people, EAST))[0].rejected


async def test_what_cannot_be_rejected_is_said(people):
    with pytest.raises(Conflict, match="'a0' is enrolled as 'ann'; move-entry"):
        await people.reject("g", "ann", entry="a0")
    with pytest.raises(NotFound, match="nobody called 'eve'"):
        await people.reject("g", "eve", entry="a0")
    with pytest.raises(InvalidRequest, match="has 3 dimensions, the gallery has 2"):
        await people.reject("g", "ann", vector=np.ones(3, np.float32))
    with pytest.raises(InvalidRequest, match="needs an entry_id or an embedding"):
        await people.reject("g", "ann")

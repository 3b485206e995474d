"""Renaming onto a free name: by several replicas at once, and while others enrol under it."""

import asyncio
import itertools
import random
from contextlib import suppress

import pytest

from bus.errors import Conflict, NotFound
from bus.testing import until
from services.rustyface.galleries.galleries import Galleries
from services.rustyface.galleries.ledger import Ledger
from tests.rustyface.persons import new, persons


@pytest.fixture
async def two(replica, connected):
    """Two replicas with a gallery of four persons, of whom each has an entry."""
    async with replica() as one, replica(await connected()) as other:
        await one.create("g")
        entries = [new(name, subject=name) for name in ("ann", "bob", "cat", "dan")]
        await one.enrol_many("g", entries, existing="fail")
        yield one, other


async def test_of_two_renamings_onto_one_free_name_one_is_refused(two):
    one, other = two
    for i in range(25):
        renamings = [
            one.move_subjects("g", ["ann"], f"free{i}", fresh=True),
            other.move_subjects("g", ["bob"], f"free{i}", fresh=True),
        ]
        ends = await asyncio.gather(*renamings, return_exceptions=True)
        [refused] = [end for end in ends if isinstance(end, BaseException)]
        assert isinstance(refused, Conflict)
        assert f"somebody called 'free{i}' already; merge-subjects" in refused.message
        told = await persons(one, other)
        assert sorted(map(tuple, told.values())) == [("ann",), ("bob",), ("cat",), ("dan",)]
        await one.move_subjects("g", [f"free{i}"], "bob" if "ann" in told else "ann", fresh=True)


@pytest.mark.parametrize("how", ["enrolled", "moved"])
async def test_a_renaming_is_refused_if_somebody_comes_to_the_name_at_the_same_moment(
    two, monkeypatch, how
):
    one, other = two
    append = Ledger.append_after

    async def late(self, *args: object, **kwargs):
        monkeypatch.undo()
        if how == "enrolled":
            await other.enrol("g", new("e", subject="eve"))
        else:
            await other.move_entry("g", "dan", "eve")
        return await append(self, *args, **kwargs)

    monkeypatch.setattr(Ledger, "append_after", late)
    with pytest.raises(Conflict, match="somebody called 'eve' already"):
        await one.move_subjects("g", ["ann"], "eve", fresh=True)
    assert (await persons(one, other))["ann"] == ["ann"]


async def test_whoever_is_moved_at_the_moment_of_their_renaming_is_not_moved_twice(
    two, monkeypatch
):
    one, other = two
    append = Ledger.append_after

    async def late(self, *args: object, **kwargs):
        monkeypatch.undo()
        await other.move_subjects("g", ["ann"], "anna")
        return await append(self, *args, **kwargs)

    monkeypatch.setattr(Ledger, "append_after", late)
    with pytest.raises(NotFound, match="nobody called 'ann'"):
        await one.move_subjects("g", ["ann"], "eve", fresh=True)
    assert (await persons(one, other))["anna"] == ["ann"]


async def test_a_renaming_succeeds_while_entries_come_without_a_pause(two):
    one, other = two
    ids = itertools.count()

    async def enrol() -> None:
        while True:
            await other.enrol("g", new(f"e{next(ids)}", subject=random.choice(["cat", "dan"])))  # noqa: S311

    async with asyncio.TaskGroup() as tasks:
        enrolling = [tasks.create_task(enrol()) for _ in range(32)]
        await until(lambda: one._galleries["g"].entries.keys() >= {"e100"})
        for old, fresh in itertools.pairwise(["ann", "anna", "anne", "annie", "ann"]):
            before = len(one._galleries["g"].entries)
            await one.move_subjects("g", [old], fresh, fresh=True)
            # They did not stand still for it.
            assert len(one._galleries["g"].entries) > before
        with pytest.raises(Conflict, match="somebody called 'bob' already"):
            await one.move_subjects("g", ["ann"], "bob", fresh=True)
        for task in enrolling:
            task.cancel()
    told = await persons(one, other)
    assert (told["ann"], told["bob"]) == (["ann"], ["bob"])


async def test_a_renaming_succeeds_though_an_entry_comes_before_each_of_its_tries(two, monkeypatch):
    one, other = two
    append, tries = Ledger.append_after, 0

    async def late(self, *args: object, **kwargs):
        nonlocal tries
        tries += 1
        await other.enrol("g", new(f"e{tries}", subject="cat"))
        return await append(self, *args, **kwargs)

    monkeypatch.setattr(Ledger, "append_after", late)
    await one.move_subjects("g", ["ann"], "anna", fresh=True)
    assert tries < 10
    assert (await persons(one, other))["anna"] == ["ann"]


async def test_many_renamings_at_once_all_come_to_an_end(two):
    """Onto names of their own, nobody is in anybody's way for long."""
    one, other = two
    await one.enrol_many("g", [new(f"e{i}", subject=f"p{i}") for i in range(24)], existing="fail")
    await asyncio.gather(
        *(
            replica.move_subjects("g", [f"p{i}"], f"q{i}", fresh=True)
            for i, replica in zip(range(24), itertools.cycle((one, other)))
        )
    )
    told = await persons(one, other)
    assert {f"q{i}": [f"e{i}"] for i in range(24)}.items() <= told.items()


@pytest.mark.parametrize("seed", range(4))
async def test_renamings_in_any_order_by_two_replicas_make_no_two_persons_one(two, replica, seed):
    """Chains, swaps and circles: a name may be free only because its bearer just left it."""
    chance = random.Random(seed)  # noqa: S311
    names = ["ann", "bob", "cat", "dan", "eve", "fay"]

    async def rename(galleries: Galleries) -> None:
        old, fresh = chance.sample(names, 2)
        with suppress(NotFound, Conflict):
            await galleries.move_subjects("g", [old], fresh, fresh=True)

    for _ in range(8):
        await asyncio.gather(*(rename(one) for one in two for _ in range(5)))
    async with replica() as replayed:
        told = await persons(*two, replayed)
    assert sorted(map(tuple, told.values())) == [("ann",), ("bob",), ("cat",), ("dan",)]


@pytest.mark.parametrize("seed", range(4))
async def test_merges_in_any_order_by_two_replicas_lose_nobody(two, replica, seed):
    """A into B while B goes into A, or into C: whoever was once merged stays together."""
    chance = random.Random(seed)  # noqa: S311
    names = ["ann", "bob", "cat", "dan", "eve", "fay", "gus"]

    async def move(galleries: Galleries) -> None:
        old, into = chance.sample(names, 2)
        with suppress(NotFound, Conflict):
            await galleries.move_subjects("g", [old], into, fresh=chance.random() < 0.5)

    one, other = two
    together: list[list[str]] = [["ann"], ["bob"], ["cat"], ["dan"]]
    for _ in range(4):
        await asyncio.gather(*(move(galleries) for galleries in two for _ in range(2)))
        async with replica() as replayed:
            told = await persons(one, other, replayed)
        assert sorted(itertools.chain(*told.values())) == ["ann", "bob", "cat", "dan"]
        assert all(any(set(was) <= set(now) for now in told.values()) for was in together)
        together = list(told.values())

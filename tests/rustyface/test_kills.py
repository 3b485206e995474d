"""Killed in the middle of enrolments or an import: what was acknowledged is there, and once."""

import asyncio
import contextlib
import itertools
import os
import re
import signal
import sys
from functools import partial

import numpy as np

from bus import messages as m
from bus.broker import running_broker
from bus.client import connect
from bus.errors import BusError
from bus.streams import AS_ONE_MAX
from bus.subjects import gallery_events
from bus.tasks import beside
from bus.testing import until
from tests.data.enrolling_replica import entry, part_of_import
from tests.rustyface import remains
from tests.rustyface.transfers import REPOSITORY

COUNT = 1_000
CALLERS = 16
# An import's: one call's entries are a batch for the broker, and a part of another one.
MANY = 12_000
PART = 400
reading = partial(remains.reading, dimensions=2)


@contextlib.asynccontextmanager
async def on_a_broker_that_dies(tmp_path):
    """Give a replica with a dataset, its client, and what kills the broker and brings it back."""
    async with (
        # In this order: nats-py never ends where it is closed while it looks for its broker.
        contextlib.AsyncExitStack() as again,
        contextlib.AsyncExitStack() as first,
        contextlib.AsyncExitStack() as opened,
    ):
        broker = await first.enter_async_context(running_broker(tmp_path))
        client = await opened.enter_async_context(connect(broker.url, name="test", root="r"))
        await client.store.declare()
        galleries = await opened.enter_async_context(reading(client))
        await galleries.create("g")

        async def die_and_come_back() -> None:
            os.kill(broker.pid, signal.SIGKILL)
            await first.aclose()
            await again.enter_async_context(running_broker(tmp_path))

        yield galleries, client, die_and_come_back


async def killed_after(lines_wanted: int, *told: str) -> list[list[int]]:
    """Run a replica, kill it once it has said so much, and return all that it said."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.data.enrolling_replica", *told,
        stdout=asyncio.subprocess.PIPE, cwd=REPOSITORY,
    )  # fmt: skip
    assert process.stdout is not None
    lines: list[bytes] = []
    while len(lines) < lines_wanted:
        lines.append(await process.stdout.readline())
        assert lines[-1], "it ended"
    process.kill()
    lines += (await process.stdout.read()).splitlines(keepends=True)
    assert await process.wait() == -signal.SIGKILL
    # Whole ones, and none of the log's.
    pairs = [re.fullmatch(rb"(\d+) (\d+)\n", one) for one in lines]
    return [[int(one[1]), int(one[2])] for one in pairs if one]


async def check(client, acknowledged: dict[str, int]) -> set[str]:
    """Look that every acknowledged entry is in the stream once, and in a replica that replays."""
    events: dict[str, list[int]] = {}
    async for stored in client.store.galleries.read(gallery_events(client.root)):
        if ".entry." in stored.subject:
            events.setdefault(stored.subject.rpartition(".")[2], []).append(stored.seq)
    assert all(len(seqs) == 1 for seqs in events.values())
    async with reading(client) as galleries:
        told = galleries.picked("g", galleries.ids("g"), embeddings=True)
    assert {one.id for one in told} == events.keys()
    numbers = np.array([int(one.id[1:]) for one in told])
    wanted = np.stack([np.ones(len(told)), numbers], axis=1) / np.hypot(1, numbers)[:, None]
    assert np.allclose([one.embedding for one in told], wanted, rtol=0, atol=1e-6)
    assert [one.subject for one in told] == [f"p{number % 9}" for number in numbers]
    revisions = {one.id: one.revision for one in told}
    assert acknowledged.keys() <= revisions.keys()
    return {one for one, revision in acknowledged.items() if revisions[one] != revision}


async def test_a_broker_killed_in_the_middle_of_enrolments_loses_none_and_doubles_none(tmp_path):
    acknowledged: dict[str, int] = {}
    async with on_a_broker_that_dies(tmp_path) as (galleries, client, die_and_come_back):
        left = iter(range(COUNT))

        async def enrol() -> None:
            for i in left:
                new = entry(i)
                # A caller that is told no tries again, as one does.
                while f"e{i}" not in acknowledged:
                    with contextlib.suppress(BusError):
                        acknowledged[f"e{i}"] = await galleries.enrol("g", new)

        async def kill_and_come_back() -> None:
            await until(lambda: len(acknowledged) > COUNT // 3)
            await die_and_come_back()

        async with asyncio.timeout(100):
            async with asyncio.TaskGroup() as tasks:
                killing = tasks.create_task(kill_and_come_back())
                for _ in range(CALLERS):
                    tasks.create_task(enrol())
        assert killing.done()
        assert len(acknowledged) == COUNT
        await galleries.wait(await galleries.newest())
        assert len(galleries.ids("g")) == COUNT
        # What was asked for again was stored again in the same place: once all the same.
        assert len(await check(client, acknowledged)) <= CALLERS


async def test_a_replica_killed_in_the_middle_of_enrolments_loses_none_and_doubles_none(
    client, broker
):
    async with reading(client) as galleries:
        await galleries.create("g")
        told = "enrol", broker.url, client.root, str(COUNT), str(CALLERS)
        pairs = await killed_after(COUNT // 3, *told)
        acknowledged = {f"e{i}": revision for i, revision in pairs}
        assert len(acknowledged) < COUNT
        await galleries.wait(await galleries.newest())
        # The one that lives on has all that was acknowledged to the other.
        assert acknowledged.keys() <= set(galleries.ids("g"))
    assert await check(client, acknowledged) == set()


async def test_a_broker_killed_in_the_middle_of_an_import_loses_none_and_doubles_none(tmp_path):
    acknowledged: dict[int, int] = {}
    added = 0
    async with on_a_broker_that_dies(tmp_path) as (galleries, client, die_and_come_back):
        parts = iter(range(0, MANY, PART))

        async def import_some() -> None:
            nonlocal added
            for start in parts:
                part = part_of_import(start, PART)
                # A job that is told no is taken up again.
                while start not in acknowledged:
                    with contextlib.suppress(BusError):
                        outcome = await galleries.enrol_many("g", part, existing="skip")
                        acknowledged[start] = outcome.revision
                        added += outcome.added

        async def kill_and_come_back() -> None:
            await until(lambda: len(acknowledged) > MANY // PART // 3)
            await die_and_come_back()

        async with asyncio.timeout(100), asyncio.TaskGroup() as tasks:
            killing = tasks.create_task(kill_and_come_back())
            for _ in range(3):
                tasks.create_task(import_some())
        assert killing.done()
        assert added == MANY
        await galleries.wait(await galleries.newest())
        assert len(galleries.ids("g")) == MANY
        await check_import(client, acknowledged)


async def test_a_replica_killed_in_the_middle_of_an_import_loses_none_and_doubles_none(
    client, broker
):
    async with reading(client) as galleries:
        await galleries.create("g")
        told = "import", broker.url, client.root, str(MANY), str(PART)
        pairs = await killed_after(MANY // PART // 3, *told)
        acknowledged = dict(pairs)
        assert len(acknowledged) < MANY // PART
        await check_import(client, acknowledged)
        # Taken up again by another one, it comes to its end, and counts all as its own.
        outcomes = [
            await galleries.enrol_many("g", part_of_import(start, PART), existing="skip")
            for start in range(0, MANY, PART)
        ]
        assert sum(one.added for one in outcomes) == MANY
        await galleries.wait(await galleries.newest())
        assert len(galleries.ids("g")) == MANY
    await check_import(client, acknowledged)


async def test_what_others_enrol_stays_theirs_though_an_import_is_killed_and_taken_up_again(
    client, connected, broker
):
    theirs: dict[str, int] = {}
    async with reading(client) as galleries, reading(await connected()) as other:
        await galleries.create("g")
        record = m.GalleryImport(id="i1", at=m.now(), source="f", format="npz")
        await galleries.begin_import("g", record)

        async def keep_enrolling(step: int) -> None:
            # What the import is about to store just now.
            for ahead in itertools.cycle(range(0, PART, step)):
                i = (len(other._galleries["g"].entries) + ahead) % MANY
                theirs[f"e{i}"] = await other.enrol("g", entry(i))

        async with beside(keep_enrolling(19), keep_enrolling(7)):
            told = "import", broker.url, client.root, str(MANY), str(PART)
            await killed_after(MANY // PART // 2, *told)
            added = skipped = 0
            for start in range(0, MANY, PART):
                outcome = await galleries.enrol_many(
                    "g", part_of_import(start, PART), existing="skip"
                )
                added += outcome.added
                skipped += outcome.skipped
            assert added + skipped == MANY
            assert skipped > 0
        await galleries.wait(await galleries.newest())
        found = {one.id: one for one in galleries.picked("g", galleries.ids("g"))}
        assert len(found) == MANY
        # Who was cut off between storing and its answer is not known here.
        late = {one.id for one in found.values() if one.imported is None} - theirs.keys()
        assert len(late) <= 2
        for one, revision in theirs.items():
            assert found[one].imported is None
            assert found[one].revision >= revision
        await galleries.undo_import("g", "i1")
        assert set(galleries.ids("g")) == theirs.keys() | late


async def check_import(client, acknowledged: dict[int, int]) -> None:
    """Look that what was acknowledged is there once, and that every batch is there as a whole."""
    batches: dict[str, list[int]] = {}
    async for stored in client.store.galleries.read(gallery_events(client.root)):
        if ".entry." in stored.subject:
            number = int(stored.headers["Nats-Batch-Sequence"])
            batches.setdefault(stored.headers["Nats-Batch-Id"], []).append(number)
    for numbers in batches.values():
        assert numbers == list(range(1, len(numbers) + 1))
    assert {len(numbers) for numbers in batches.values()} == {AS_ONE_MAX, PART - AS_ONE_MAX}
    async with reading(client) as galleries:
        revisions = {one.id: one.revision for one in galleries.picked("g", galleries.ids("g"))}
    for start, revision in acknowledged.items():
        # A part is acknowledged with the revision of its last one.
        assert revisions[f"e{start + PART - 1}"] <= revision
        assert all(f"e{i}" in revisions for i in range(start, start + PART))
    assert await check(client, {}) == set()

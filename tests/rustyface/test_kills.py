"""Killed in the middle of enrolments or an import: what was acknowledged is there, and once."""

import asyncio
import contextlib
import json
import os
import signal
import sys

import numpy as np

from bus.broker import running_broker
from bus.client import connect
from bus.errors import BusError
from bus.streams import AS_ONE_MAX
from bus.subjects import gallery_events
from bus.testing import until
from services.rustyface.galleries.galleries import Galleries, NewEntry
from tests.rustyface.transfers import REPOSITORY

COUNT = 1_000
CALLERS = 16
# An import's: one call's entries are a batch for the broker, and a part of another one.
MANY = 12_000
PART = 400

# A replica in a process of its own: enrols what it is told to, and says what was acknowledged.
REPLICA = """
import asyncio, sys
import numpy as np
from bus.client import connect
from bus.tasks import beside
from services.rustyface.galleries.galleries import Galleries, NewEntry

async def main(url, root, count, callers):
    async with connect(url, name="replica", root=root) as client:
        galleries = Galleries(client.store.galleries, root, "test", 2, changes=client.store.changes)
        async with beside(galleries.run()):
            await galleries.caught_up.wait()
            left = iter(range(count))
            async def enrol():
                for i in left:
                    vector = np.array([1, i], np.float32)
                    new = NewEntry(id=f"e{i}", vector=vector, subject=f"p{i % 9}")
                    revision = await galleries.enrol("g", new)
                    print(i, revision, flush=True)
            async with asyncio.TaskGroup() as tasks:
                for _ in range(callers):
                    tasks.create_task(enrol())

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
"""

# The same with an import: as many entries at a time as it is told.
IMPORTER = """
import asyncio, sys
from bus.client import connect
from bus.tasks import beside
from services.rustyface.galleries.galleries import Galleries
from tests.rustyface.test_kills import part_of_import

async def main(url, root, count, size):
    async with connect(url, name="replica", root=root) as client:
        galleries = Galleries(client.store.galleries, root, "test", 2, changes=client.store.changes)
        async with beside(galleries.run()):
            await galleries.caught_up.wait()
            for first in range(0, count, size):
                part = part_of_import(first, size)
                outcome = await galleries.enrol_many("g", part, existing="skip")
                print(first, outcome.revision, flush=True)

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
"""


def part_of_import(first: int, size: int) -> list[NewEntry]:
    return [
        NewEntry(
            id=f"e{i}", vector=np.array([1, i], np.float32), subject=f"p{i % 9}", imported="i1"
        )
        for i in range(first, first + size)
    ]


@contextlib.asynccontextmanager
async def reading(client):
    galleries = Galleries(client.store.galleries, client.root, "test", 2)
    following = asyncio.create_task(galleries.run())
    try:
        await until(lambda: galleries.caught_up.is_set() or following.done())
        yield galleries
    finally:
        following.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await following


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
        left = iter(range(COUNT))

        async def enrol() -> None:
            for i in left:
                new = NewEntry(id=f"e{i}", vector=np.array([1, i], np.float32), subject=f"p{i % 9}")
                # A caller that is told no tries again, as one does.
                while f"e{i}" not in acknowledged:
                    with contextlib.suppress(BusError):
                        acknowledged[f"e{i}"] = await galleries.enrol("g", new)

        async def kill_and_come_back() -> None:
            await until(lambda: len(acknowledged) > COUNT // 3)
            os.kill(broker.pid, signal.SIGKILL)
            await first.aclose()
            await again.enter_async_context(running_broker(tmp_path))

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
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", REPLICA, broker.url, client.root, str(COUNT), str(CALLERS),
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        lines: list[bytes] = []
        while len(lines) < COUNT // 3:
            lines.append(await process.stdout.readline())
            assert lines[-1], "it ended"
        process.kill()
        lines += (await process.stdout.read()).splitlines(keepends=True)
        assert await process.wait() == -signal.SIGKILL
        pairs = [json.loads(f"[{one.decode().replace(' ', ',')}]") for one in lines if b"\n" in one]
        acknowledged = {f"e{i}": revision for i, revision in pairs}
        assert len(acknowledged) < COUNT
        await galleries.wait(await galleries.newest())
        # The one that lives on has all that was acknowledged to the other.
        assert acknowledged.keys() <= set(galleries.ids("g"))
    assert await check(client, acknowledged) == set()


async def test_a_broker_killed_in_the_middle_of_an_import_loses_none_and_doubles_none(tmp_path):
    acknowledged: dict[int, int] = {}
    added = 0
    async with (
        contextlib.AsyncExitStack() as again,
        contextlib.AsyncExitStack() as first,
        contextlib.AsyncExitStack() as opened,
    ):
        broker = await first.enter_async_context(running_broker(tmp_path))
        client = await opened.enter_async_context(connect(broker.url, name="test", root="r"))
        await client.store.declare()
        galleries = await opened.enter_async_context(reading(client))
        await galleries.create("g")
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
            os.kill(broker.pid, signal.SIGKILL)
            await first.aclose()
            await again.enter_async_context(running_broker(tmp_path))

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
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", IMPORTER, broker.url, client.root, str(MANY), str(PART),
            stdout=asyncio.subprocess.PIPE, cwd=REPOSITORY,
        )  # fmt: skip
        assert process.stdout is not None
        lines: list[bytes] = []
        while len(lines) < MANY // PART // 3:
            lines.append(await process.stdout.readline())
            assert lines[-1], "it ended"
        process.kill()
        lines += (await process.stdout.read()).splitlines(keepends=True)
        assert await process.wait() == -signal.SIGKILL
        pairs = [json.loads(f"[{one.decode().replace(' ', ',')}]") for one in lines if b"\n" in one]
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

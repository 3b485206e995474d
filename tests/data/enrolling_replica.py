"""A replica in a process of its own: stores what it is told to, and prints what was acknowledged.

`python -m tests.data.enrolling_replica enrol|import URL ROOT COUNT EACH`: EACH is how many callers
there are, or how many entries an import stores at a time. `delete URL ROOT` deletes the dataset.
"""

import asyncio
import contextlib
import sys

import numpy as np

from bus.client import connect
from bus.tasks import beside
from services.rustyface.galleries.galleries import Galleries, NewEntry


def entry(i, **more) -> NewEntry:
    return NewEntry(id=f"e{i}", vector=np.array([1, i], np.float32), subject=f"p{i % 9}", **more)


def part_of_import(first: int, size: int) -> list[NewEntry]:
    return [entry(i, imported="i1") for i in range(first, first + size)]


@contextlib.asynccontextmanager
async def replica(url, root):
    async with connect(url, name="replica", root=root) as client:
        galleries = Galleries(client.store.galleries, root, "test", 2, changes=client.store.changes)
        async with beside(galleries.run()):
            await galleries.caught_up.wait()
            yield galleries


async def enrol(url, root, count, callers) -> None:
    """Enrol so many entries, each by itself, with so many callers at a time."""
    async with replica(url, root) as galleries, asyncio.TaskGroup() as tasks:
        left = iter(range(count))

        async def call() -> None:
            for i in left:
                print(i, await galleries.enrol("g", entry(i)), flush=True)  # noqa: T201

        for _ in range(callers):
            tasks.create_task(call())


async def import_(url, root, count, size) -> None:
    """Import so many entries, as many at a time as it is told."""
    async with replica(url, root) as galleries:
        for first in range(0, count, size):
            part = part_of_import(first, size)
            outcome = await galleries.enrol_many("g", part, existing="skip")
            print(first, outcome.revision, flush=True)  # noqa: T201


async def delete(url, root) -> None:
    """Delete the dataset."""
    async with replica(url, root) as galleries:
        print((await galleries.delete("g")).revision, flush=True)  # noqa: T201


if __name__ == "__main__":
    what, url, root, *numbers = sys.argv[1:]
    does = {"enrol": enrol, "import": import_, "delete": delete}[what]
    asyncio.run(does(url, root, *map(int, numbers)))

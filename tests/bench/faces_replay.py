"""Galleries on a real broker: written, replayed by a new replica, searched by many, enrolled."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final

import msgspec
import numpy as np

from bus.client import Client
from bus.tasks import beside
from services.rustyface.galleries.galleries import Galleries, NewEntry
from tests.bench import faces_search
from tests.bench.faces_platform import FOLDER, ask_child, empty_broker, plugin_env
from tests.bench.faces_search import DIMENSIONS, Floats

CALLERS: Final = (1, 16, 64)
GALLERY: Final = "bench"
_CHILD: Final = "tests.bench.peers.replay_galleries"
_EMBEDDER: Final = "sface"
# Entries that are handed over together, as an import does it.
_TOGETHER: Final = 5_000
_OF_ONE: Final = 10


class Joined(msgspec.Struct, frozen=True, kw_only=True):
    """Searches of one gallery, by callers that wait for one answer after the other.

    Attributes:
        callers: How many at a time.
        asks_broker: Whether each search asks the broker for the newest revision first, as a
            request does that names none.
        per_s: Searches per second.
        p50_ms: Half of them took no longer.
        p99_ms: 99 % of them.
    """

    callers: int
    asks_broker: bool
    per_s: float
    p50_ms: float
    p99_ms: float


class Replayed(msgspec.Struct, frozen=True, kw_only=True):
    """A gallery that a new replica has read from the broker.

    Attributes:
        entries: How many, each with a person and without metadata.
        replay_s: Until it was caught up.
        replay_cpu_s: Processor time that it took for that.
        bytes_per_entry: What the replica's memory grew by, for each.
        peak_bytes_per_entry: The same at its most; None where it was not measured.
        searches: Of that replica.
    """

    entries: int
    replay_s: float
    replay_cpu_s: float
    bytes_per_entry: float
    searches: list[Joined]
    peak_bytes_per_entry: float | None = None


class Enrolled(msgspec.Struct, frozen=True, kw_only=True):
    """Entries per second that the broker has acknowledged, each on the disk by then.

    Attributes:
        callers: How many enrol at a time; 0: one import.
        per_s: Entries per second.
        p50_ms: Of one entry; None for an import.
        p99_ms: Likewise.
    """

    callers: int
    per_s: float
    p50_ms: float | None = None
    p99_ms: float | None = None


def replay(sizes: Sequence[int], seconds: float, say: Callable[[str], None]) -> list[Replayed]:
    """Write so many entries, have a new process read them, and search them there.

    Raises:
        ServerFailed: The replica failed.
    """
    return asyncio.run(_replay(sorted(sizes), seconds, say))


def enrol(entries: int, seconds: float, say: Callable[[str], None]) -> list[Enrolled]:
    """Enrol one by one, by several callers, and as an import of so many entries."""
    return asyncio.run(_enrol(entries, seconds, say))


async def _replay(
    sizes: Sequence[int], seconds: float, say: Callable[[str], None]
) -> list[Replayed]:
    vectors, queries = faces_search.made(sizes[-1])
    FOLDER.mkdir(parents=True, exist_ok=True)
    queries_file = FOLDER / "replay-queries.npy"
    np.save(queries_file, queries)
    found, written = [], 0
    # Writing is not what is measured here: the disk is waited for at the end alone.
    async with empty_broker("replay", sync_interval="2m") as (broker, client):
        for size in sizes:
            async with _gallery(client) as galleries:
                began = time.perf_counter()
                await _write(galleries, vectors[written:size], written)
                say(f"replay: {size - written:,} entries written in {_since(began):.0f} s")
                written = size
            told = await asyncio.to_thread(
                ask_child,
                sys.executable,
                _CHILD,
                broker.url,
                GALLERY,
                queries_file,
                seconds,
                env=plugin_env(),
            )
            found.append(msgspec.convert(told, Replayed))
            say(f"replay: {size:,} entries read in {found[-1].replay_s:.1f} s")
    queries_file.unlink()
    return found


async def _enrol(entries: int, seconds: float, say: Callable[[str], None]) -> list[Enrolled]:
    vectors, _ = faces_search.made(entries)
    found = []
    async with empty_broker("enrol") as (_, client), _gallery(client) as galleries:
        for callers in CALLERS:
            found.append(await _by_callers(galleries, vectors, callers, seconds))
            say(f"enrol: {callers} at a time, {found[-1].per_s:,.0f} a second")
        began = time.perf_counter()
        await _write(galleries, vectors, 0)
        found.append(Enrolled(callers=0, per_s=len(vectors) / _since(began)))
        say(f"enrol: an import, {found[-1].per_s:,.0f} a second")
    return found


async def _by_callers(
    galleries: Galleries, vectors: Floats, callers: int, seconds: float
) -> Enrolled:
    took_ms: list[float] = []
    began, number = time.perf_counter(), 0

    async def keep_enrolling() -> None:
        nonlocal number
        while (before := time.perf_counter()) - began < seconds:
            entry = _entry(number % len(vectors), vectors, f"single-{callers}-")
            number += 1
            await galleries.enrol(GALLERY, entry)
            took_ms.append(1e3 * (time.perf_counter() - before))

    async with asyncio.TaskGroup() as tasks:
        for _ in range(callers):
            tasks.create_task(keep_enrolling())
    return Enrolled(
        callers=callers,
        per_s=len(took_ms) / _since(began),
        p50_ms=float(np.percentile(took_ms, 50)),
        p99_ms=float(np.percentile(took_ms, 99)),
    )


@asynccontextmanager
async def _gallery(client: Client) -> AsyncIterator[Galleries]:
    """Follow the galleries while inside, and make the one that is written to."""
    galleries = Galleries(client.store.galleries, client.root, _EMBEDDER, DIMENSIONS)
    async with beside(galleries.run()):
        await galleries.caught_up.wait()
        await galleries.create(GALLERY)
        yield galleries


async def _write(galleries: Galleries, vectors: Floats, first: int) -> None:
    for begin in range(0, len(vectors), _TOGETHER):
        together = range(begin, min(begin + _TOGETHER, len(vectors)))
        entries = [_entry(i, vectors, "", first) for i in together]
        await galleries.enrol_many(GALLERY, entries, existing="replace")


def _entry(row: int, vectors: Floats, prefix: str, first: int = 0) -> NewEntry:
    # As long as the UUID that an entry is given when it is enrolled without an id.
    number = first + row
    return NewEntry(
        id=f"{prefix}{number:036}", vector=vectors[row], subject=f"person {number // _OF_ONE}"
    )


def _since(began: float) -> float:
    return time.perf_counter() - began

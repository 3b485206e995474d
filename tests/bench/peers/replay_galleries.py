"""A replica that reads a gallery from the broker, and is then searched by many at once.

Called with the broker's URL, the gallery, a file of queries, and seconds for each window.
"""

import asyncio
import gc
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import psutil

from bus.client import connect
from bus.tasks import beside
from services.rustyface.galleries.galleries import Galleries, Query
from tests.bench.peers.search_loop import Floats, K, load

EMBEDDER: Final = "sface"
# Callers at a time, and whether each asks the broker first what the newest revision is.
WINDOWS: Final = ((1, False), (32, False), (1, True), (32, True))
_THRESHOLD: Final = 0.35
_KIB: Final = 1024
_STATUS: Final = Path("/proc/self/status")


@dataclass(frozen=True)
class _Window:
    """Searches of one gallery by so many callers at a time."""

    galleries: Galleries
    gallery: str
    queries: Floats
    callers: int
    asks: bool
    seconds: float

    async def measure(self) -> dict[str, object]:
        took_ms: list[float] = []
        began = time.perf_counter()

        async def keep_searching(number: int) -> None:
            while (before := time.perf_counter()) - began < self.seconds:
                query = Query(
                    vector=self.queries[(number + len(took_ms)) % len(self.queries)],
                    k=K,
                    threshold=_THRESHOLD,
                    revision=None if self.asks else self.galleries.revision,
                )
                await self.galleries.search(self.gallery, query)
                took_ms.append(1e3 * (time.perf_counter() - before))

        async with asyncio.TaskGroup() as tasks:
            for number in range(self.callers):
                tasks.create_task(keep_searching(number))
        return {
            "callers": self.callers,
            "asks_broker": self.asks,
            "per_s": len(took_ms) / (time.perf_counter() - began),
            "p50_ms": float(np.percentile(took_ms, 50)),
            "p99_ms": float(np.percentile(took_ms, 99)),
        }


async def _run(url: str, gallery: str, queries_file: str, seconds: str) -> None:
    queries = load(queries_file)
    gc.collect()
    process = psutil.Process()
    async with connect(url, name="bench-replica") as client:
        before, began = process.memory_info().rss, time.perf_counter()
        used_s = time.process_time()
        stream = client.store.galleries
        galleries = Galleries(stream, client.root, EMBEDDER, queries.shape[1])
        async with beside(galleries.run()):
            await galleries.caught_up.wait()
            replay_s, used_s = time.perf_counter() - began, time.process_time() - used_s
            gc.collect()
            after = process.memory_info().rss
            entries = sum(one.entries for one in galleries.datasets())
            told = {
                "entries": entries,
                "replay_s": replay_s,
                "replay_cpu_s": used_s,
                "bytes_per_entry": (after - before) / entries,
                "peak_bytes_per_entry": (_peak() - before) / entries,
                "searches": [
                    await _Window(
                        galleries, gallery, queries, callers, asks, float(seconds)
                    ).measure()
                    for callers, asks in WINDOWS
                ],
            }
    print(json.dumps(told))  # noqa: T201 - its answer


def _peak() -> int:
    """Return the most memory that this process has held, in bytes.

    Not `ru_maxrss`: Linux hands that of the parent on.
    """
    [line] = [one for one in _STATUS.read_text().splitlines() if one.startswith("VmHWM:")]
    return int(line.split()[1]) * _KIB


if __name__ == "__main__":
    asyncio.run(_run(*sys.argv[1:]))

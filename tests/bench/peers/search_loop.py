"""What every child that searches has in common: it is asked for windows, one JSON line each."""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
# Takes queries of shape ``[b, d]``, gives the rows of the nearest vectors for each, best first.
Search = Callable[[Floats], list[list[int]]]

K: Final = 10
# How many threads the run gives every engine.
THREADS: Final = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def load(path: str) -> Floats:
    """Return the vectors of a file, of length 1, shape ``[n, d]``."""
    vectors: Floats = np.load(Path(path))
    return vectors


def serve(engines: Mapping[str, Search], queries: Floats) -> None:
    """Answer until standard input ends.

    A line is ``{"engine", "batch", "seconds", "calls"}``; the answer is ``{"ms", "cpu_ms",
    "rows"}``: how long each call took, `calls` of them at least, the processor time of one, and
    what the first one found.
    """
    print(json.dumps({"engines": list(engines)}), flush=True)  # noqa: T201 - its answer
    for line in sys.stdin:
        asked = json.loads(line)
        engine, batch = engines[asked["engine"]], int(asked["batch"])
        batches = [queries[i : i + batch] for i in range(0, len(queries) - batch + 1, batch)]
        first = engine(batches[0])
        took_ms: list[float] = []
        began, used_s = time.perf_counter(), time.process_time()
        while time.perf_counter() - began < asked["seconds"] or len(took_ms) < asked["calls"]:
            before = time.perf_counter()
            engine(batches[len(took_ms) % len(batches)])
            took_ms.append(1e3 * (time.perf_counter() - before))
        cpu_ms = 1e3 * (time.process_time() - used_s) / len(took_ms)
        told = {"ms": took_ms, "cpu_ms": cpu_ms, "rows": first}
        print(json.dumps(told), flush=True)  # noqa: T201 - its answer

"""onnxruntime called in a loop: what no server on it can exceed with one thread."""

import json
import sys
import time

from tests.bench.models import example
from tests.bench.peers.sessions import open_session


def _run(model: str, rows: int, seconds: float) -> float:
    """Return rows per second."""
    session = open_session(model)
    feed = {"input": example(model, rows)}
    session.run(None, feed)
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        session.run(None, feed)
        done += rows
    return done / (time.perf_counter() - began)


if __name__ == "__main__":
    per_s = _run(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
    print(json.dumps({"per_s": per_s, "cpu_s": time.process_time()}))  # noqa: T201 - its answer

"""Two replicas of candle, one of them slow: does the slow one hold the latency?"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import msgspec
import psutil

from tests.bench.memory import name_of
from tests.bench.models import example, expected, make_models
from tests.bench.processes import Server
from tests.bench.roster import MODELS_DIR, Peer
from tests.bench.running import (
    START_S,
    ServerFailed,
    fresh_bkg,
    load_model,
    post,
    window,
    wrong,
)

# The slow one runs for a tenth of the time: for 5 ms, then it stands for 45 ms.
SLOWER: Final = 10
_PERIOD_S: Final = 0.05
_WARM_S: Final = 1


class Shared(msgspec.Struct, frozen=True, kw_only=True):
    """One window with so many replicas.

    Attributes:
        replicas: What served.
        connections: Requests under way at a time.
        per_s: Requests per second.
        p50_ms: Half of them took no longer.
        p99_ms: 99 % of them took no longer.
        others: Share of the machine that something else used.
        failure: What went wrong.
    """

    replicas: str
    connections: int
    per_s: float
    p50_ms: float
    p99_ms: float
    others: float
    failure: str | None


def balance(
    peer: Peer, model: str, connections: Sequence[int], seconds: int, say: Callable[[str], None]
) -> list[Shared]:
    """Measure one replica, two, and two of which one is slow.

    Raises:
        ServerFailed: Replicas did not come, or an answer was wrong.
    """
    make_models(MODELS_DIR)
    found: list[Shared] = []
    with fresh_bkg() as (server, port):
        load_model(port, model)
        body = peer.json(model, example(model))
        if why := wrong(peer, port, body, expected(MODELS_DIR, model)):
            raise ServerFailed(f"{peer.title}: {why}")

        def measure(replicas: str) -> None:
            say(replicas)
            window(server, port, body, connections=max(connections), seconds=_WARM_S)
            for c in connections:
                load, _, others = window(server, port, body, connections=c, seconds=seconds)
                found.append(
                    Shared(
                        replicas=replicas,
                        connections=c,
                        per_s=load.per_s,
                        p50_ms=load.p50_us / 1e3,
                        p99_ms=load.p99_us / 1e3,
                        others=others,
                        failure=load.failure,
                    )
                )

        measure("the fast one alone")
        post(port, "/api/plugins/candle/scale", {"replicas": 2})
        both = _workers(server, 2)
        measure("two fast ones")
        with slowed(both[1], SLOWER):
            measure(f"a fast one, and one {SLOWER} times slower")
    return found


@contextmanager
def slowed(process: psutil.Process, times: int) -> Iterator[None]:
    """Let a process run for only one part in so many while inside."""
    ended = threading.Event()

    def hold() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            while not ended.is_set():
                process.suspend()
                ended.wait(_PERIOD_S * (1 - 1 / times))
                process.resume()
                ended.wait(_PERIOD_S / times)

    holding = threading.Thread(target=hold, name="slowed")
    holding.start()
    try:
        yield
    finally:
        ended.set()
        holding.join()
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()


def _workers(server: Server, count: int) -> list[psutil.Process]:
    """Wait for so many processes of candle, and return them, the oldest first."""
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        found = [one for one in server.processes() if name_of(one) == "candle"]
        if len(found) == count:
            return sorted(found, key=lambda one: float(one.create_time()))
        time.sleep(0.1)
    raise ServerFailed(f"bkg did not run {count} replicas of candle after {START_S:g} s")

"""Two looks at bkg's memory: under load for long, and while models come and go."""

import contextlib
import http.client
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Final

import msgspec
import numpy as np
import psutil

from tests.bench import wrk
from tests.bench.bodies import Body
from tests.bench.models import BIG, example, expected, make_models
from tests.bench.processes import Server
from tests.bench.roster import BKG, CACHE, MODELS_DIR, Peer
from tests.bench.running import (
    ServerFailed,
    ask,
    call,
    fresh_bkg,
    load_into_bkg,
    load_model,
    settle,
    started,
    wrong,
)

# Growth below both is taken for flat: the noise of an allocator.
FLAT_MIB: Final = 2.0
FLAT_SHARE: Final = 0.02
# What an allocator may keep of models that have gone, as a share of the memory after the first.
_KEPT_SHARE: Final = 0.1
# The first part of a run is left out: caches and pools fill.
_WARM_SHARE: Final = 0.25
_SAMPLES: Final = 120
# Connections come and go.
_FILES_MORE: Final = 8
_ASKERS: Final = 4
# A load of the large model takes about so long.
_LOAD_S: Final = 0.5
_SMALL: Final = "tiny"


class Trend(msgspec.Struct, frozen=True, kw_only=True):
    """What a memory does over time, or over cycles.

    Attributes:
        name: Whose.
        first: MiB at the beginning of the part that counts, on the fitted line.
        last: MiB at its end.
        slope: MiB per hour, or per 100 cycles.
        samples: How many there are.
    """

    name: str
    first: float
    last: float
    slope: float
    samples: int

    @property
    def flat(self) -> bool:
        """Whether it does not grow by more than an allocator's noise."""
        return self.last - self.first <= max(FLAT_MIB, FLAT_SHARE * self.first)


class Soaked(msgspec.Struct, frozen=True, kw_only=True):
    """What a soak has shown."""

    seconds: int
    per_s: float
    p99_ms: float
    failure: str | None
    trends: list[Trend]


class Rested(msgspec.Struct, frozen=True, kw_only=True):
    """What bkg uses while nobody asks it.

    Attributes:
        name: Which process.
        mib: Its memory at the end.
        cpu: Its share of one processor.
    """

    name: str
    mib: float
    cpu: float


class Cycled(msgspec.Struct, frozen=True, kw_only=True):
    """What loading and unloading has shown; memory is that of the worker with nothing loaded.

    Attributes:
        cycles: How often.
        before_mib: Before the first cycle.
        first_mib: After the first.
        last_mib: Median over the later half of them.
        peak_mib: The most after any of them.
        loaded_mib: Median with the large model loaded.
        files_first: Files that were open after the first.
        files_last: After the last.
        trend: Over the cycles, the slope per 100.
    """

    cycles: int
    before_mib: float
    first_mib: float
    last_mib: float
    peak_mib: float
    loaded_mib: float
    files_first: int
    files_last: int
    trend: Trend

    @property
    def comes_back(self) -> bool:
        """Whether later cycles leave no more behind than the first one."""
        more_files = self.files_last - self.files_first
        flat = self.last_mib <= self.first_mib * (1 + _KEPT_SHARE) + FLAT_MIB
        return flat and more_files <= _FILES_MORE


def rest(seconds: int) -> list[Rested]:
    """Return what each process of a fresh bkg uses while nobody asks it, the largest first.

    Raises:
        ServerFailed: It did not start.
    """
    with fresh_bkg() as (server, _):
        settle(server)
        before, began = server.cpu_s(), time.monotonic()
        time.sleep(seconds)
        after, took_s = server.cpu_s(), time.monotonic() - began
        found = [
            Rested(
                name=name_of(one),
                mib=mib,
                cpu=(after.get(one, 0.0) - before.get(one, 0.0)) / took_s,
            )
            for one, mib in server.memory_mib().items()
        ]
    return sorted(found, key=lambda one: -one.mib)


def soak(peer: Peer, seconds: int, connections: int, say: Callable[[str], None]) -> Soaked:
    """Keep bkg at full load, and watch the memory of each of its processes.

    Raises:
        ServerFailed: It did not start, or answered wrongly, or a process of it was replaced.
    """
    make_models(MODELS_DIR)
    load_into_bkg([_SMALL])
    with started(peer) as (server, port, _):
        body = peer.json(_SMALL, example(_SMALL))
        line = wrk.command(
            body, port=port, connections=connections, seconds=seconds, folder=CACHE / "wrk"
        )
        names = {one: name_of(one) for one in server.processes()}
        seen: dict[psutil.Process, list[tuple[float, float]]] = {one: [] for one in names}
        with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as generator:
            began, every_s = time.monotonic(), max(1.0, seconds / _SAMPLES)
            while _runs(generator, every_s):
                now_s = time.monotonic() - began
                for one, mib in server.memory_mib().items():
                    seen.setdefault(one, []).append((now_s, mib))
                total = sum(points[-1][1] for points in seen.values() if points)
                say(f"{now_s:.0f} of {seconds} s, {total:.0f} MiB")
            told, _ = generator.communicate()
        load = wrk.parse(told)
        if gone := sorted(name for one, name in names.items() if not one.is_running()):
            raise ServerFailed(f"under load {', '.join(gone)} ended: {server.last_words()}")
        trends = [
            trend(names.get(one, name_of(one)), points, per=3600)
            for one, points in seen.items()
            if len(points) > 2
        ]
    return Soaked(
        seconds=seconds,
        per_s=load.per_s,
        p99_ms=load.p99_us / 1e3,
        failure=load.failure,
        trends=sorted(trends, key=lambda one: -one.last),
    )


def cycles(peer: Peer, count: int, say: Callable[[str], None], *, hostile: bool = False) -> Cycled:
    """Load and unload a large and a small model again and again, and watch the worker's memory.

    Args:
        peer: How bkg is asked.
        count: How often.
        say: Is told how far it is.
        hostile: Ask all the time, take another version each time, and call off a load of the large
            model in the middle.

    Raises:
        ServerFailed: A load, an answer or an unload failed.
    """
    make_models(MODELS_DIR)
    wanted = expected(MODELS_DIR, _SMALL)
    body = peer.json(_SMALL, example(_SMALL))
    loaded: list[float] = []
    unloaded: list[tuple[float, float]] = []
    files: list[int] = []
    with ExitStack() as stack:
        server, port = stack.enter_context(fresh_bkg())
        if hostile:
            stack.enter_context(_asking(port, body))
        worker = _worker(server)
        before = _mib(worker)
        for number in range(count):
            version = {"version": f"v{number}"} if hostile else {}
            load_model(port, BIG, **version)
            loaded.append(_mib(worker))
            load_model(port, _SMALL, **version)
            if why := wrong(peer, port, body, wanted):
                raise ServerFailed(f"in cycle {number}: {why}")
            call(port, "candle.model.unload", id=BIG)
            if hostile:
                _call_off(port, number / count)
            call(port, "candle.model.unload", id=_SMALL)
            unloaded.append((float(number), _mib(worker)))
            files.append(worker.num_fds())
            say(f"cycle {number + 1} of {count}: {unloaded[-1][1]:.0f} MiB, {files[-1]} files")
    return cycled(unloaded, before, loaded, files)


@contextmanager
def _asking(port: int, body: Body) -> Iterator[None]:
    """Ask without a break while inside, whatever the answer."""
    over = threading.Event()

    def keep_asking() -> None:
        while not over.is_set():
            with contextlib.suppress(OSError, http.client.HTTPException):
                ask(port, body)

    with ThreadPoolExecutor(_ASKERS) as askers:
        for _ in range(_ASKERS):
            askers.submit(keep_asking)
        try:
            yield
        finally:
            over.set()


def _call_off(port: int, when: float) -> None:
    """Load the large model anew, and unload it in the middle, at another moment each time."""
    with ThreadPoolExecutor(1) as loader:
        loading = loader.submit(call, port, "candle.model.load", id=BIG, path=f"{BIG}.onnx")
        time.sleep(when * _LOAD_S)
        while not loading.done():
            # Not yet loaded, or called off just now: both are refusals.
            with contextlib.suppress(ServerFailed):
                call(port, "candle.model.unload", id=BIG)
    with contextlib.suppress(ServerFailed):
        loading.result()
        call(port, "candle.model.unload", id=BIG)


def cycled(
    unloaded: Sequence[tuple[float, float]],
    before_mib: float,
    loaded: Sequence[float],
    files: Sequence[int],
) -> Cycled:
    """Return what the samples of cycles come to.

    Args:
        unloaded: Number of the cycle, and MiB with nothing loaded.
        before_mib: MiB before the first.
        loaded: MiB with the large model loaded.
        files: Open files with nothing loaded.
    """
    after = [mib for _, mib in unloaded]
    return Cycled(
        cycles=len(after),
        before_mib=before_mib,
        first_mib=after[0],
        last_mib=median(after[len(after) // 2 :]),
        peak_mib=max(after),
        loaded_mib=median(loaded),
        files_first=files[0],
        files_last=files[-1],
        trend=trend("candle", unloaded, per=100),
    )


def trend(name: str, points: Sequence[tuple[float, float]], per: float) -> Trend:
    """Fit a line through samples, their first quarter left out.

    Args:
        name: Whose memory.
        points: Time or number, and MiB.
        per: What the slope is told for.
    """
    first, last = points[0][0], points[-1][0]
    counted = [point for point in points if point[0] >= first + _WARM_SHARE * (last - first)]
    at, mib = (np.array(axis) for axis in zip(*counted, strict=True))
    if len(counted) < 2 or at[0] == at[-1]:
        return Trend(name=name, first=mib[0], last=mib[-1], slope=0.0, samples=len(counted))
    slope, start = np.polyfit(at - at[0], mib, 1)
    return Trend(
        name=name,
        first=float(start),
        last=float(start + slope * (at[-1] - at[0])),
        slope=float(slope * per),
        samples=len(counted),
    )


def name_of(process: psutil.Process) -> str:
    """Return which part of bkg a process is."""
    try:
        line = process.cmdline()
    except psutil.Error:
        return "?"
    for part in line:
        if part.startswith("services."):
            return "bkg up" if part == "services.cli" else part.removeprefix("services.")
    return "broker" if any("nats" in part for part in line[:1]) else " ".join(line[:2])


def _worker(server: Server) -> psutil.Process:
    found = [one for one in server.processes() if name_of(one) == "candle"]
    if len(found) != 1:
        raise ServerFailed(f"{BKG} runs {len(found)} processes of candle, not one")
    return found[0]


def _mib(process: psutil.Process) -> float:
    try:
        return float(process.memory_full_info().pss) / 1024**2
    except psutil.NoSuchProcess:
        raise ServerFailed("the worker candle ended") from None


def _runs(process: "subprocess.Popen[str]", seconds: float) -> bool:
    """Wait for the end of a process for a while; return whether it still runs."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return True
    return False

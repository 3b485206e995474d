"""Windows of load on one server after the other, in rounds."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from tests.bench.bodies import Body
from tests.bench.models import example, expected, make_models
from tests.bench.processes import REPOSITORY, Server, busy_s
from tests.bench.results import Results, Start, Window
from tests.bench.roster import BKG_MODULE, IN_PROCESS, MODELS_DIR, PEERS, Peer
from tests.bench.running import ServerFailed, load_into_bkg, started, window, wrong

KINDS: Final = ("json", "binary")
_WARM_S: Final = 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be measured.

    Attributes:
        peers: Names, `onnxruntime` and `door` among them.
        models: Names.
        kinds: `json`, `binary` or both.
        connections: How many requests are under way at a time.
        seconds: Length of a window.
        rounds: How often each cell is measured.
        repeats: How often a noisy window is measured again.
    """

    peers: Sequence[str]
    models: Sequence[str]
    kinds: Sequence[str]
    connections: Sequence[int]
    seconds: int
    rounds: int
    repeats: int


def measure(plan: Plan, results: Results, say: Callable[[str], None]) -> None:
    """Carry out a plan; results grow as it goes, so that a stopped run has what it has.

    In each round every server is started anew, measured alone and stopped, and each round begins
    with another one: servers that run on idly would take their share of the machine, and what
    changes with the hour of the day hits all of them.
    """
    peers = {peer.name: peer for peer in PEERS if peer.name in plan.peers}
    names = list(plan.peers)
    make_models(MODELS_DIR)
    if ours := [name for name, peer in peers.items() if peer.module == BKG_MODULE]:
        say("bkg is given the models once, as it remembers them")
        try:
            load_into_bkg(plan.models)
        except ServerFailed as failed:
            _fail(str(failed), results, say)
            names = [name for name in names if name not in ours]
    for number in range(plan.rounds):
        shift = number % max(1, len(names))
        for name in [*names[shift:], *names[:shift]]:
            say(f"round {number + 1} of {plan.rounds}: {name}")
            try:
                if name == IN_PROCESS:
                    _measure_in_process(plan, number, results)
                else:
                    _measure_peer(peers[name], plan, number, results, say)
            except ServerFailed as failed:
                _fail(str(failed), results, say)


def _measure_peer(
    peer: Peer, plan: Plan, number: int, results: Results, say: Callable[[str], None]
) -> None:
    with started(peer, plan.models[0]) as (server, port, ready_s):
        idle_mib = sum(server.memory_mib().values())
        for model in plan.models:
            wanted = expected(MODELS_DIR, model)
            for kind in plan.kinds:
                body = peer.request(kind, model, example(model))
                if body is None:
                    continue
                if why := wrong(peer, port, body, wanted):
                    _fail(f"{peer.title}, {model}, {kind}: {why}", results, say)
                    continue
                window(server, port, body, connections=max(plan.connections), seconds=_WARM_S)
                for connections in plan.connections:
                    cell = _Cell(server, port, body, peer.name, model, kind, connections, number)
                    results.windows += _until_quiet(plan, cell.measure)
        after = server.memory_mib()
        results.starts.append(
            Start(
                peer=peer.name,
                round=number,
                ready_s=ready_s,
                idle_mib=idle_mib,
                loaded_mib=sum(after.values()),
                processes=len(after),
            )
        )


@dataclass(frozen=True)
class _Cell:
    """A place in the tables, on a server that runs."""

    server: Server
    port: int
    body: Body
    peer: str
    model: str
    kind: str
    connections: int
    round: int

    def measure(self, seconds: int) -> Window:
        """Measure one window."""
        load, cpu_s, others = window(
            self.server, self.port, self.body, connections=self.connections, seconds=seconds
        )
        failure = load.failure
        if self.server.ended:
            failure = f"the server ended: {self.server.last_words()}"
        return Window(
            peer=self.peer,
            model=self.model,
            kind=self.kind,
            connections=self.connections,
            round=self.round,
            per_s=load.per_s,
            p50_ms=load.p50_us / 1e3,
            p99_ms=load.p99_us / 1e3,
            cpu_us=1e6 * cpu_s / max(1, load.requests),
            others=others,
            failure=failure,
        )


def _measure_in_process(plan: Plan, number: int, results: Results) -> None:
    """Call onnxruntime in a loop, in a process of its own, with batches as large as a cell's."""
    for model in plan.models:
        for rows in plan.connections:

            def one(seconds: int, model: str = model, rows: int = rows) -> Window:
                began, busy = time.monotonic(), busy_s()
                per_s, cpu_s = _loop(model, rows, seconds)
                took_s, busy = time.monotonic() - began, busy_s() - busy
                return Window(
                    peer=IN_PROCESS,
                    model=model,
                    kind="array",
                    connections=rows,
                    round=number,
                    per_s=per_s,
                    cpu_us=1e6 * seconds / per_s,
                    others=max(0.0, busy - cpu_s) / (took_s * (os.cpu_count() or 1)),
                )

            results.windows += _until_quiet(plan, one)


def _loop(model: str, rows: int, seconds: int) -> tuple[float, float]:
    """Return rows per second of onnxruntime alone, and the processor seconds of its process."""
    line = [sys.executable, "-m", "tests.bench.peers.loop", model, str(rows), str(seconds)]
    env = os.environ | {"BENCH_MODELS": str(MODELS_DIR), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(line, check=False, capture_output=True, text=True, env=env)
    if done.returncode:
        raise ServerFailed(f"onnxruntime in a loop failed: {done.stderr.strip()[-300:]}")
    told = json.loads(done.stdout)
    return float(told["per_s"]), float(told["cpu_s"])


def _until_quiet(plan: Plan, measure_once: Callable[[int], Window]) -> list[Window]:
    """Measure until nothing else used the machine, at most so often; return all that there was."""
    windows = [measure_once(plan.seconds)]
    while windows[-1].noisy and not windows[-1].failure and len(windows) <= plan.repeats:
        windows.append(measure_once(plan.seconds))
    return windows


def _fail(said: str, results: Results, say: Callable[[str], None]) -> None:
    results.failures.append(said)
    say(said)

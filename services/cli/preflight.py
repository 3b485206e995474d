"""What has to hold before the platform is started: each is refused in a sentence of its own."""

import contextlib
import fcntl
import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from bus.errors import Unavailable
from services.cli.running import is_ours, read_run_file, remove_run_file


@contextmanager
def only_one(data_dir: Path) -> Iterator[None]:
    """Hold the data directory's lock while inside.

    Raises:
        Unavailable: It cannot be written, or another one runs on it.
    """
    try:
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (data_dir / "run.lock").open("a")
    except OSError as error:
        raise Unavailable(
            f"the data directory {data_dir} cannot be written: {error.strerror}"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            run = read_run_file(data_dir)
            who = f", process {run.pid} at {run.url}" if run else ", and is just starting"
            raise Unavailable(f"bkg already runs with the data directory {data_dir}{who}") from None
        yield


def check_reach(host: str, *, no_auth: bool) -> None:
    """Let nobody but this host in without a key.

    Raises:
        Unavailable: Others would be let in.
    """
    if no_auth and not _is_loopback(host):
        raise Unavailable(
            f"--no-auth is for this host only: {host} can be reached from others; "
            "leave it out, or listen on 127.0.0.1"
        )


def wait_for_last_run(data_dir: Path) -> None:
    """Wait for the parts of a platform that was killed.

    They notice within moments; until then they hold their ports.
    """
    if stale := read_run_file(data_dir):
        left = [psutil.Process(pid) for pid in stale.pids.values() if is_ours(pid)]
        psutil.wait_procs(left, timeout=5)
        remove_run_file(data_dir)


def check_port(host: str, port: int) -> None:
    """See that the gateway can listen there.

    Raises:
        Unavailable: It cannot.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in found:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
    except OSError as error:
        raise Unavailable(
            f"the gateway cannot listen on {host} port {port}: "
            f"{error.strerror}; choose another one with --host and --port"
        ) from None


async def check_broker(url: str) -> None:
    """See that a broker answers.

    Raises:
        Unavailable: It does not.
    """
    # Only here: the client library costs start-up time and memory that we have no use for.
    from bus.client import connect  # noqa: PLC0415

    async with connect(url, name="bkg-up"):
        pass


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False

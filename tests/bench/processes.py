"""Servers as processes: start them, measure all that belongs to one, leave none behind."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import psutil

REPOSITORY: Final = Path(__file__).parents[2]
_PR_SET_CHILD_SUBREAPER: Final = 36
# A server that has not gone by then is killed.
_STOP_S: Final = 10.0
_MIB: Final = 1024**2


class Server:
    """A server that was started here, with everything that it started.

    Args:
        command: What to run.
        log: Takes what it prints.
        env: Added to the environment.
    """

    def __init__(self, command: Sequence[str], log: Path, env: Mapping[str, str]) -> None:
        # Some leave things behind where they stand.
        folder = log.with_suffix(".folder")
        folder.mkdir(parents=True, exist_ok=True)
        self.log = log
        self._seen: set[psutil.Process] = set()
        self.began = time.monotonic()
        # Settings of the caller's own platform must not reach the one that is measured.
        kept = {name: value for name, value in os.environ.items() if not name.startswith("BKG_")}
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=folder,
                env=kept | {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"} | dict(env),
                start_new_session=True,
            )

    @property
    def ended(self) -> bool:
        """Whether the process that was started has ended."""
        return self._process.poll() is not None

    def processes(self) -> list[psutil.Process]:
        """Return all processes of the server that live, those that have a new parent as well."""
        roots = {psutil.Process(self._process.pid)} if not self.ended else set()
        for one in roots | {seen for seen in self._seen if seen.is_running()}:
            with contextlib.suppress(psutil.Error):
                self._seen |= {one, *one.children(recursive=True)}
        return [one for one in self._seen if _lives(one)]

    def cpu_s(self) -> dict[psutil.Process, float]:
        """Return the processor seconds of each process so far."""
        used = {}
        for one in self.processes():
            with contextlib.suppress(psutil.Error):
                times = one.cpu_times()
                used[one] = times.user + times.system
        return used

    def memory_mib(self) -> dict[psutil.Process, float]:
        """Return the memory of each process (PSS: what is shared counts once), in MiB."""
        used = {}
        for one in self.processes():
            with contextlib.suppress(psutil.Error):
                used[one] = one.memory_full_info().pss / _MIB
        return used

    def stop(self) -> None:
        """Ask it to stop, and kill what is left then."""
        self.processes()
        if not self.ended:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_S)
        left = self.processes()
        for one in left:
            with contextlib.suppress(psutil.Error):
                one.kill()
        if not self.ended:
            self._process.kill()
        self._process.wait()
        psutil.wait_procs(left, timeout=_STOP_S)

    def last_words(self) -> str:
        """Return the end of what it printed, as one line."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines()]
        return " | ".join([line for line in lines if line][-3:])[-500:] or "it printed nothing"


@contextmanager
def nothing_left() -> Iterator[None]:
    """Inside, orphans become ours; left, for whatever reason, nothing that was started runs on."""
    there = set(psutil.Process().children(recursive=True))
    _adopt_orphans(adopt=True)
    asked = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        # A second Ctrl-C must not cut this short.
        interrupted = signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        left = set(psutil.Process().children(recursive=True)) - there
        for one in left:
            with contextlib.suppress(psutil.Error):
                one.kill()
        psutil.wait_procs(left, timeout=_STOP_S)
        _adopt_orphans(adopt=False)
        signal.signal(signal.SIGINT, interrupted)
        signal.signal(signal.SIGTERM, asked)


def free_ports(count: int) -> list[int]:
    """Return ports of this host that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def busy_s() -> float:
    """Return the processor seconds that processes and neighbours of this machine have used.

    Without interrupts: the kernel counts what the loopback network costs there, and that is ours.
    """
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + getattr(times, "steal", 0.0))


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def _adopt_orphans(*, adopt: bool) -> None:
    """Say whether processes whose parent has ended become children of this one; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(adopt))


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt

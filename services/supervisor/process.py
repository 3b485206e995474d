"""One child process: started, listened to, stopped, and its end put into words."""

import asyncio
import contextlib
import ctypes
import os
import re
import signal
import sys
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Final, Literal

import psutil

from bus.messages import Level, PluginConfig
from bus.process import in_words

LINE_MAX_BYTES: Final = 16_384
READ_BYTES: Final = 8_192
RECORDS_KEPT: Final = 20
# What of that is told with an unwanted end.
LAST_LINES: Final = 8
LAST_LINE_CHARS: Final = 300
# A traceback is one record up to here; what follows is lines again.
TRACEBACK_MAX_CHARS: Final = 65_536
_PR_SET_PDEATHSIG: Final = 1
_LIBC: Final = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
# Of ECMA-48 the control sequences (5.4), commands to the terminal as the one that sets its title
# (8.3.89), and the other escapes; then what is left of control characters.
_ESCAPES: Final = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]+[0-~]|.)"
    r"|[\x00-\x08\x0b-\x1f\x7f]"
)
_TRACEBACK: Final = "Traceback (most recent call last):"

# What tells a worker of ours from whatever else has its number by now.
_MARKS: Final = ("BKG_ROOT", "BKG_HOST_NAME", "BKG_SLOT", "BKG_GENERATION")

Output = Literal["stdout", "stderr"]
OnLine = Callable[[Output, Level, str], None]


class Child:
    """A process that was started; made by `start`.

    Attributes:
        pid: Its number.
    """

    def __init__(self, process: asyncio.subprocess.Process, on_line: OnLine) -> None:
        self.pid = process.pid
        self._process = process
        self._on_line = on_line
        self._said: deque[tuple[Output, str]] = deque(maxlen=RECORDS_KEPT)
        self._killed = False
        self._killed_by_kernel = _kills_for_memory()

    async def ended(self) -> str:
        """Wait for its end and its last words, and return the end in words."""
        assert self._process.stdout  # noqa: S101 - both are pipes
        assert self._process.stderr  # noqa: S101
        listening = [
            asyncio.create_task(self._listen("stdout", self._process.stdout)),
            asyncio.create_task(self._listen("stderr", self._process.stderr)),
        ]
        try:
            status = await self._process.wait()
            # Whatever it started in its group goes with it. What has left the group, and holds
            # the pipes open, must not hold us up.
            self._signal_group(signal.SIGKILL)
            await asyncio.wait(listening, timeout=1)
        finally:
            for task in listening:
                task.cancel()
            await asyncio.gather(*listening, return_exceptions=True)
        if status != -signal.SIGKILL or self._killed:
            return in_words(status)
        if _kills_for_memory() > self._killed_by_kernel:
            return f"{in_words(status)}: the system was out of memory"
        return f"{in_words(status)} (by hand?)"

    def stop(self) -> None:
        """Ask it to end."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def kill(self) -> None:
        """End it and everything in its process group."""
        self._killed = True
        self._signal_group(signal.SIGKILL)

    def why(self) -> str | None:
        """Return the last words that it said, on stderr if there were any."""
        words = {name: said for name, record in self._said if (said := _last_words(record))}
        return words.get("stderr") or words.get("stdout")

    def last_lines(self) -> list[str]:
        """Return the lines that it printed last, the oldest first."""
        lines = [line for _, record in self._said for line in record.splitlines()]
        return [line[:LAST_LINE_CHARS] for line in lines[-LAST_LINES:]]

    def mem_bytes(self) -> int:
        """Return the resident memory of it and of what it started; 0 when it is gone."""
        used = 0
        with contextlib.suppress(psutil.Error):
            family = [own := psutil.Process(self.pid), *own.children(recursive=True)]
            for one in family:
                with contextlib.suppress(psutil.Error):
                    used += int(one.memory_info().rss)
        return used

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    async def _listen(self, name: Output, stream: asyncio.StreamReader) -> None:
        level: Level = "info" if name == "stdout" else "warn"
        async for record in _records(stream):
            self._said.append((name, record))
            self._on_line(name, "error" if _TRACEBACK in record else level, record)


async def start(config: PluginConfig, env: Mapping[str, str], on_line: OnLine) -> Child:
    """Start a plugin's process, in a process group of its own.

    On Linux the kernel sends it SIGTERM when this process ends, however it ends: no orphan.

    Args:
        config: The entry point is a Python module, or the path of a program.
        env: Added to the environment, before the plugin's own.
        on_line: Told of every record that it prints: stream, level, text.

    Raises:
        OSError: It cannot be started.
    """
    is_program = os.sep in config.entrypoint
    # -P: a folder `services` or `bus` where the user stands must not be taken for ours.
    module = [sys.executable, "-P", "-m", config.entrypoint]
    command = [config.entrypoint] if is_program else module
    process = await asyncio.create_subprocess_exec(
        *command,
        *config.args,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **env, **config.env},
        start_new_session=True,
        preexec_fn=partial(_end_with_parent, os.getpid()),
    )
    return Child(process, on_line)


async def end_leftovers(left: Mapping[int, Mapping[str, str]], grace_s: float) -> list[int]:
    """End workers of a supervisor that was killed, and return those that had to be killed.

    The kernel has asked them to end when it died. One that hangs does not hear that, and would
    fill its place beside its successor.

    Args:
        left: The environment that each was started with, by process.
        grace_s: The time for what they have in hand.
    """
    ours = [found for pid, env in left.items() if (found := _if_ours(pid, env))]
    _, alive = await asyncio.to_thread(psutil.wait_procs, ours, timeout=grace_s)
    for one in alive:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(one.pid, signal.SIGKILL)
    return [one.pid for one in alive]


def exists(pid: int) -> bool:
    """Return whether there is a process of this number on this host."""
    return bool(psutil.pid_exists(pid))


def _if_ours(pid: int, env: Mapping[str, str]) -> psutil.Process | None:
    with contextlib.suppress(psutil.Error):
        found = psutil.Process(pid)
        there = found.environ()
        if all(there.get(mark) == env[mark] for mark in _MARKS):
            return found
    return None


def _kills_for_memory() -> int:
    """Return how often the kernel has killed a process for want of memory; 0 where it cannot say.

    In the group that we run in, or since the system started.
    """
    for file, name in (("/sys/fs/cgroup/memory.events", "oom_kill"), ("/proc/vmstat", "oom_kill")):
        with contextlib.suppress(OSError, ValueError):
            for line in Path(file).read_text().splitlines():
                if line.startswith(f"{name} "):
                    return int(line.split()[1])
    return 0


def _last_words(record: str) -> str | None:
    """Return the last line that has a word, without the frame around a group of exceptions."""
    lines = (line.strip(" |+-") for line in reversed(record.splitlines()))
    return next((line for line in lines if re.search(r"\w", line)), None)


def _end_with_parent(parent: int) -> None:
    # Runs between fork and exec: one call into a library that is loaded already.
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        # It ended before that was asked.
        if os.getppid() != parent:
            os._exit(1)


async def _records(stream: asyncio.StreamReader) -> AsyncGenerator[str]:
    """Give lines without terminal escapes; a Python traceback is one record of several lines."""
    traceback: list[str] = []
    chars = 0
    async for line in _lines(stream):
        text = _ESCAPES.sub("", line.decode(errors="replace")).rstrip()
        if _TRACEBACK in text:
            if traceback:
                yield "\n".join(traceback)
            traceback, chars = [text], len(text)
        elif traceback:
            traceback.append(text)
            chars += len(text)
            if (text and not text.startswith(" ")) or chars > TRACEBACK_MAX_CHARS:
                yield "\n".join(traceback)
                traceback = []
        elif text:
            yield text
    if traceback:
        yield "\n".join(traceback)


async def _lines(stream: asyncio.StreamReader) -> AsyncGenerator[bytes]:
    """Give lines, those over the limit in pieces."""
    rest = b""
    while chunk := await stream.read(READ_BYTES):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            for at in range(0, len(line) or 1, LINE_MAX_BYTES):
                yield line[at : at + LINE_MAX_BYTES]
        while len(rest) > LINE_MAX_BYTES:
            yield rest[:LINE_MAX_BYTES]
            rest = rest[LINE_MAX_BYTES:]
        # A reader that finds bytes goes on at once: one that floods would stop all else here.
        await asyncio.sleep(0)
    if rest:
        yield rest

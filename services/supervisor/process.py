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
from typing import Final, Literal

from bus.messages import Level, PluginConfig
from bus.process import in_words

LINE_MAX_BYTES: Final = 16_384
LINES_KEPT: Final = 20
_PR_SET_PDEATHSIG: Final = 1
_LIBC: Final = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
# CSI sequences (ECMA-48 5.4), and the single escapes before other characters.
_ESCAPES: Final = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|.)|[\x00-\x08\x0b-\x1f\x7f]")
_TRACEBACK: Final = "Traceback (most recent call last):"

OnLine = Callable[[Literal["stdout", "stderr"], Level, str], None]


class Child:
    """A process that was started; made by `start`.

    Attributes:
        pid: Its number.
        last_lines: What it said last, oldest first.
    """

    def __init__(self, process: asyncio.subprocess.Process, on_line: OnLine) -> None:
        self.pid = process.pid
        self.last_lines: deque[str] = deque(maxlen=LINES_KEPT)
        self._process = process
        self._on_line = on_line
        self._killed = False

    async def ended(self) -> str:
        """Wait for its end and its last words, and return the end in words."""
        assert self._process.stdout  # noqa: S101 - both are pipes
        assert self._process.stderr  # noqa: S101
        listening = asyncio.gather(
            self._listen("stdout", self._process.stdout),
            self._listen("stderr", self._process.stderr),
        )
        status = await self._process.wait()
        # A grandchild that holds the pipes open must not hold us up.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                await listening
        # Whatever it started in its group goes with it.
        self._signal_group(signal.SIGKILL)
        by_somebody = status == -signal.SIGKILL and not self._killed
        return in_words(status) + (" (by hand, or out of memory)" if by_somebody else "")

    def stop(self) -> None:
        """Ask it to end."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def kill(self) -> None:
        """End it and everything in its process group."""
        self._killed = True
        self._signal_group(signal.SIGKILL)

    def why(self) -> str | None:
        """Return the last thing that it said that looks like a reason."""
        return next((line for line in reversed(self.last_lines) if re.search(r"\w", line)), None)

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    async def _listen(
        self, name: Literal["stdout", "stderr"], stream: asyncio.StreamReader
    ) -> None:
        level: Level = "info" if name == "stdout" else "warn"
        async for record in _records(stream):
            self.last_lines.append(record.rpartition("\n")[2])
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
    command = [config.entrypoint] if is_program else [sys.executable, "-m", config.entrypoint]
    process = await asyncio.create_subprocess_exec(
        *command,
        *config.args,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **env, **config.env},
        start_new_session=True,
        preexec_fn=_end_with_parent,
    )
    return Child(process, on_line)


def _end_with_parent() -> None:
    # Runs between fork and exec: one call into a library that is loaded already.
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


async def _records(stream: asyncio.StreamReader) -> AsyncGenerator[str]:
    """Give lines without terminal escapes; a Python traceback is one record of several lines."""
    traceback: list[str] = []
    async for line in _lines(stream):
        text = _ESCAPES.sub("", line.decode(errors="replace")).rstrip()
        if _TRACEBACK in text:
            if traceback:
                yield "\n".join(traceback)
            traceback = [text]
        elif traceback:
            traceback.append(text)
            if text and not text.startswith(" "):
                yield "\n".join(traceback)
                traceback = []
        elif text:
            yield text
    if traceback:
        yield "\n".join(traceback)


async def _lines(stream: asyncio.StreamReader) -> AsyncGenerator[bytes]:
    """Give lines, those over the limit in pieces."""
    rest = b""
    while chunk := await stream.read(65_536):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            for at in range(0, len(line) or 1, LINE_MAX_BYTES):
                yield line[at : at + LINE_MAX_BYTES]
        while len(rest) > LINE_MAX_BYTES:
            yield rest[:LINE_MAX_BYTES]
            rest = rest[LINE_MAX_BYTES:]
    if rest:
        yield rest

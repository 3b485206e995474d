"""A service as a child process: started with a log file of its own, stopped, its end in words."""

import asyncio
import os
import subprocess
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from bus.process import in_words, stop_child

LOG_MAX_BYTES: Final = 1_000_000


@dataclass(frozen=True)
class Child:
    """A service's process.

    Attributes:
        name: The service.
        process: The process.
        log: What it prints goes there.
        log_start: Where this process's part of the file begins.
    """

    name: str
    process: Process
    log: Path
    log_start: int

    @property
    def pid(self) -> int:
        """Its number."""
        return self.process.pid

    async def ended(self) -> str:
        """Wait until it has ended; return how, with the last line that it left behind."""
        how = f"the {self.name} {in_words(await self.process.wait())}"
        with self.log.open("rb") as file:
            file.seek(self.log_start)
            lines = [line for line in file.read().decode(errors="replace").splitlines() if line]
        return f"{how}: {lines[-1].strip()}" if lines else how


@asynccontextmanager
async def child(
    name: str, env: Mapping[str, str], log: Path, stop_s: float, ready_fd: int | None = None
) -> AsyncIterator[Child]:
    """Run a service while inside.

    It is in a session of its own, so that a terminal's Ctrl-C does not reach it.

    Args:
        name: The service.
        env: Added to the environment.
        log: What it prints is added to this file.
        stop_s: How long it may take to stop before it is killed.
        ready_fd: The end of a pipe that it tells its port to; None if it has none to tell.
    """
    if ready_fd is not None:
        env = {**env, "BKG_READY_FD": str(ready_fd)}
    log_start = _prepare(log)
    with log.open("ab") as output:
        # -P: a folder `services` or `bus` where the user stands must not be taken for ours.
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", f"services.{name}"),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **env},
            start_new_session=True,
            pass_fds=() if ready_fd is None else (ready_fd,),
        )
    try:
        yield Child(name, process, log, log_start)
    finally:
        await stop_child(process, stop_s)


async def first_line(file: IO[bytes]) -> bytes:
    """Read a line from a pipe; empty when the other end closed without one."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), file)
    try:
        return await reader.readline()
    finally:
        transport.close()


def _prepare(log: Path) -> int:
    """Make room for a part's output; return where it begins in the file."""
    log.parent.mkdir(mode=0o700, exist_ok=True)
    log.touch(mode=0o600)
    if log.stat().st_size > LOG_MAX_BYTES:
        log.replace(log.with_suffix(".log.1"))
        log.touch(mode=0o600)
    return log.stat().st_size

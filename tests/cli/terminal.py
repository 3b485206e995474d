"""Commands run for somebody who sits at a terminal."""

import asyncio
import os
import pty
import subprocess
import sys
from collections.abc import Mapping

BKG = (sys.executable, "-m", "services.cli")


async def shown_at_terminal(env: Mapping[str, str], *args: str) -> str:
    """Run a command whose stderr is a terminal; return what was shown there."""
    ours, terminal = pty.openpty()
    try:
        process = await asyncio.create_subprocess_exec(
            *BKG, *args, stdout=subprocess.DEVNULL, stderr=terminal, env={**env, "TERM": "xterm"}
        )
        assert await asyncio.wait_for(process.wait(), 60) == 0
        return os.read(ours, 65_536).decode()
    finally:
        os.close(ours)
        os.close(terminal)


async def typed_at_terminal(env: Mapping[str, str], *args: str, typed: str) -> tuple[int, str]:
    """Run a command whose stdin is a terminal; return its exit status, and its stderr."""
    ours, terminal = pty.openpty()
    try:
        process = await asyncio.create_subprocess_exec(
            *BKG, *args, stdin=terminal, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, env=env,
        )  # fmt: skip
        os.write(ours, typed.encode())
        _, err = await asyncio.wait_for(process.communicate(), 60)
    finally:
        os.close(ours)
        os.close(terminal)
    assert process.returncode is not None
    return process.returncode, err.decode()

"""Every process below this one: adopted when orphaned, counted, and in the end none is left."""

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from typing import Final

import psutil

# What we started is waited for at once; a zombie that stays for this long is somebody else's.
ORPHAN_S: Final = 0.3
_PR_SET_CHILD_SUBREAPER: Final = 36


def adopt_orphans() -> None:
    """See that processes whose parent dies become children of this one: none gets out of sight."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


async def reap_orphans() -> None:
    """Wait for the ends of workers that became our children, for ever.

    Unwaited for, they stay as zombies, and a new supervisor takes them for workers that hang.
    """
    died = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, died.set)
    seen: set[int] = set()
    while True:
        if not seen:
            await died.wait()
        died.clear()
        await asyncio.sleep(ORPHAN_S)
        seen = _reap(seen)


def _reap(seen: set[int]) -> set[int]:
    """Wait for those zombies that were seen before, and return the others."""
    dead = set()
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error, ChildProcessError):
            if child.status() != psutil.STATUS_ZOMBIE:
                continue
            if child.pid in seen:
                os.waitpid(child.pid, os.WNOHANG)
            else:
                dead.add(child.pid)
    return dead


def kill_all() -> None:
    """Kill whatever is still there of what this process and its children started."""
    left = psutil.Process().children(recursive=True)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=1)


def memory() -> tuple[int, int]:
    """Return the memory of this process and all below it, and how many they are.

    Shared pages count once where the kernel tells (PSS), else in each process (RSS).
    """
    used = count = 0
    own = psutil.Process()
    for process in [own, *own.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            told = process.memory_full_info()
            used += getattr(told, "pss", told.rss)
            count += 1
    return used, count

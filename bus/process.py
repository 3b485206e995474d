"""The rim of a process: event loop, signals, exit status, and not outliving the parent."""

import asyncio
import contextlib
import ctypes
import gc
import os
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import Callable, Coroutine
from typing import Any, Final

import uvloop

from bus.errors import BusError

_PR_SET_PDEATHSIG: Final = 1
# Most of what a request makes is gone with it: the young are looked at less often than the 700
# objects that Python allows.
_THRESHOLDS: Final = (10_000, 20, 50)
# Only glibc has them, and only glibc needs them.
_TRIM: Final = getattr(ctypes.CDLL(None), "malloc_trim", None)
_MALLOPT: Final = getattr(ctypes.CDLL(None), "mallopt", None)
_M_ARENA_MAX: Final = -8
_ARENAS: Final = 2


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> int:
    """Run `main` until it ends or SIGTERM or SIGINT cancels it; return the exit status.

    0 after a clean stop, 1 with one sentence on stderr after a `BusError`. A second SIGINT ends
    the process at once with 130. Anything else that `main` raises keeps its traceback: the
    supervisor puts it into the worker's log.
    """
    end_with_parent()
    share_arenas()
    _Garbage.ours = True
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_until_signal(main))
    except (BusError, BaseExceptionGroup) as failure:
        expected = only_bus_error(failure)
        if expected is None:
            raise
        sys.stderr.write(f"{expected.message}\n")
        return 1
    return 0


def only_bus_error(error: BaseException) -> BusError | None:
    """Return the one expected error in a group of errors, if there is no other in it."""
    if isinstance(error, BusError):
        return error
    if isinstance(error, BaseExceptionGroup):
        found = [only_bus_error(inner) for inner in error.exceptions]
        return found[0] if all(found) else None
    return None


def end_with_parent() -> None:
    """Ask the kernel for SIGTERM when the process named by `BKG_PARENT_PID` ends.

    Linux only; elsewhere the worker notices when its supervisor's broker connection goes. The
    second look is for a parent that ended before the question was asked.
    """
    parent = os.environ.get("BKG_PARENT_PID")
    if not parent or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(parent):
        os.kill(os.getpid(), signal.SIGTERM)


class _Garbage:
    """Whether this process is one of ours, whose garbage is collected as `settle` says."""

    ours = False


def settle() -> None:
    """Take what is there now for what stays, once a process has started. Blocks.

    A full collection looks at every object: of a gateway or a worker some 70,000, most of them
    modules, which took 45 to 60 ms each time, three times in 8 s under load, and nobody was
    answered meanwhile. What is frozen is not looked at.
    """
    if _Garbage.ours:
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_THRESHOLDS)


def give_back() -> None:
    """Give the system back what freed objects leave behind in the allocator. Blocks.

    glibc keeps freed memory for itself: 245 MB stayed of a worker of 151 MB whose models were
    gone, and with this nothing of it (measured over 60 loads and unloads of three models).
    """
    # A model that was loaded before the start was over is among what was frozen.
    gc.unfreeze()
    gc.collect()
    if _Garbage.ours:
        gc.freeze()
    trim()


def share_arenas() -> None:
    """Let the threads of this process share two heaps, unless the environment says otherwise.

    glibc gives a thread a heap of its own, eight for each processor, and none gives back what
    lies below its last block: over 60 loads and unloads a worker grew from 65 to 75 MB until each
    of its threads had had its turn; with two heaps it stayed at 65.
    """
    if _MALLOPT is not None and "MALLOC_ARENA_MAX" not in os.environ:
        _MALLOPT(_M_ARENA_MAX, _ARENAS)


def trim() -> None:
    """Give the system back what the allocator keeps of what is free already. Blocks."""
    if _TRIM is not None:
        _TRIM(0)


def in_words(status: int) -> str:
    """Return how a process ended, by its exit status or, below zero, its signal."""
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"


async def stop_child(child: Process, patience_s: float) -> None:
    """Ask a child process to end, and kill it if it does not in time; an ended one is left."""
    if child.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        child.terminate()
    try:
        async with asyncio.timeout(patience_s):
            await child.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()


async def _until_signal(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    loop = asyncio.get_running_loop()
    working = asyncio.create_task(main())
    stopping = False

    def stop(number: int) -> None:
        nonlocal stopping
        if stopping and number == signal.SIGINT:
            os._exit(130)
        if not stopping:
            stopping = True
            working.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    try:
        await working
    except asyncio.CancelledError:
        if not stopping:
            raise

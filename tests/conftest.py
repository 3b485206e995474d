"""Fixtures for every folder: a real broker. And how a run goes, in one process or in several."""

import contextlib
import os
import time
import uuid
from collections.abc import Generator
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck
from hypothesis import settings as examples

pytest_plugins = ["bus.testing"]

# A busy machine is slow; that says nothing about what an example found.
examples.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
examples.load_profile("unhurried")

# Every process that a test starts inherits it, as far down as it goes.
MARK = "TEST_PROCESS_OF"
PROCESSES_MAX = 4
HERE = Path(__file__).parent
LONGEST_FIRST = ("journeys", "supervisor", "cli", "test_bench.py", "candle", "rustyface")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Say what `-n auto` means; each process has a broker, and starts whole platforms.

    One more than there are processors: tests often wait for a process to start or to end.
    """
    return min(processors() + 1, PROCESSES_MAX)


def processors() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of several processes none shall begin with the longest tests when the others are done."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: place(item.path))


def place(path: Path) -> int:
    part = path.relative_to(HERE).parts[0]
    return LONGEST_FIRST.index(part) if part in LONGEST_FIRST else len(LONGEST_FIRST)


@pytest.fixture(scope="session", autouse=True)
def nothing_left() -> Generator[None]:
    """Fail a run that leaves a process behind, whoever its parent is by then."""
    os.environ[MARK] = mark = uuid.uuid4().hex
    yield
    del os.environ[MARK]
    until = time.monotonic() + 20
    while (left := started_with(mark)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not left, left


def started_with(mark: str) -> list[str]:
    """Return the commands of the processes that carry a mark."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            command = " ".join(process.cmdline())
            # multiprocessing keeps this one for as long as the process that started it runs.
            if process.environ().get(MARK) == mark and "resource_tracker" not in command:
                found.append(f"{process.pid}: {command}")
    return found

"""What a process, a host and the broker use, and what they may use.

Inside a container the processors and the memory of the machine say nothing: what counts is the
quota of the control group (cgroup v2, or v1), and the least one on the way up to its root.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from bus.client import Client
from bus.errors import BusError
from bus.messages import BrokerTelemetry, HostTelemetry, now
from bus.subjects import BROKER_TELEMETRY, HOST_TELEMETRY

CGROUPS: Final = Path("/sys/fs/cgroup")
OWN_CGROUP: Final = Path("/proc/self/cgroup")
# cgroup v1 says "no limit" with the largest number of whole pages.
_NO_LIMIT: Final = 2**62


@dataclass(frozen=True)
class Cgroup:
    """What a control group may use, and uses; None where there is no limit or nothing is told.

    Attributes:
        processors: How many, as a quota: 1.5 is one and a half.
        cpu_s: Processor time that it has used.
        mem_limit_bytes: How much memory.
        mem_used_bytes: How much of it cannot be had back by dropping caches.
    """

    processors: float | None = None
    cpu_s: float | None = None
    mem_limit_bytes: int | None = None
    mem_used_bytes: int | None = None


def read_cgroup(root: Path = CGROUPS, own: Path = OWN_CGROUP) -> Cgroup:
    """Return the control group of this process; an empty one where there is none.

    Args:
        root: Where control groups are mounted.
        own: The file that says in which ones this process is.
    """
    paths = _own_paths(own)
    if (root / "cgroup.controllers").exists():
        return _read_v2(root, paths.get("", "/"))
    return _read_v1(root, paths)


def allowed() -> tuple[float, int]:
    """Return how many processors, and how many bytes of memory, this process may use."""
    processors, total_bytes, _ = _allowed(read_cgroup())
    return processors, total_bytes


def resident_bytes() -> int:
    """Return the memory that this process has in use."""
    return int(psutil.Process().memory_info().rss)


class Sampler:
    """Reads this process."""

    def __init__(self, root: Path = CGROUPS, own: Path = OWN_CGROUP) -> None:
        self._process = psutil.Process()
        self._process.cpu_percent()
        self._root = root
        self._own = own

    def sample(self) -> "ProcessSample":
        """Return what it uses; processor time since the last call."""
        processors, total_bytes, _ = _allowed(read_cgroup(self._root, self._own))
        with self._process.oneshot():
            return ProcessSample(
                cpu=self._process.cpu_percent(),
                mem_bytes=int(self._process.memory_info().rss),
                threads=self._process.num_threads(),
                open_files=_open_files(self._process),
                processors=processors,
                mem_total_bytes=total_bytes,
            )


@dataclass(frozen=True)
class ProcessSample:
    """What a process uses, beside what there is for it.

    Attributes:
        cpu: Percent of one core.
        mem_bytes: Resident memory.
        threads: How many it has.
        open_files: How many it holds open, sockets included.
        processors: How many it may use.
        mem_total_bytes: How much memory it may use.
    """

    cpu: float
    mem_bytes: int
    threads: int
    open_files: int
    processors: float
    mem_total_bytes: int

    @property
    def gauges(self) -> dict[str, float]:
        """The numbers that every instance reports, under names that stay."""
        return {
            "cpu_host_percent": round(self.cpu / self.processors, 2),
            "mem_host_percent": round(100 * self.mem_bytes / self.mem_total_bytes, 2),
            "threads": self.threads,
            "open_files": self.open_files,
        }


class HostSampler:
    """Reads this host, or the part of it that our control group may use.

    Args:
        host: Its name.
        folder: A folder on the disk that is watched; it need not be there yet.
        root: Where control groups are mounted.
        own: The file that says in which ones this process is.
    """

    def __init__(
        self, host: str, folder: Path, *, root: Path = CGROUPS, own: Path = OWN_CGROUP
    ) -> None:
        self.host = host
        self._folder = folder
        self._root = root
        self._own = own
        psutil.cpu_percent()
        self._last = (time.monotonic(), read_cgroup(root, own).cpu_s)

    def sample(self) -> HostTelemetry:
        """Return what there is and what is in use; processor time since the last call."""
        group = read_cgroup(self._root, self._own)
        processors, total_bytes, available_bytes = _allowed(group)
        disk = psutil.disk_usage(str(_there(self._folder)))
        return HostTelemetry(
            host=self.host,
            timestamp=now(),
            processors=round(processors, 3),
            cpu=round(self._cpu(group, processors), 1),
            load=[round(average, 2) for average in psutil.getloadavg()],
            mem_total_bytes=total_bytes,
            mem_available_bytes=available_bytes,
            disk_total_bytes=disk.total,
            disk_free_bytes=disk.free,
        )

    def _cpu(self, group: Cgroup, processors: float) -> float:
        """Return percent of what may be used: of the group's quota, or of the whole host."""
        (before, used_before), self._last = self._last, (time.monotonic(), group.cpu_s)
        of_host = psutil.cpu_percent()
        if group.processors is None or group.cpu_s is None or used_before is None:
            return float(of_host)
        passed = self._last[0] - before
        if passed <= 0:
            return 0.0
        # A group may use what it saved up before: for a moment more than its quota.
        return min(100.0, max(0.0, 100 * (group.cpu_s - used_before) / passed / processors))


async def measure_broker(client: Client, host: str) -> BrokerTelemetry:
    """Return what the broker keeps, and how fast it answers just now.

    Raises:
        Unavailable: It is away.
    """
    round_trip_s = await client.barrier()
    account = await client.store.account()
    limits = account.get("limits", {})
    return BrokerTelemetry(
        timestamp=now(),
        host=host,
        stored_bytes=account["storage"],
        # -1: no limit but the server's own.
        limit_bytes=limit if (limit := limits.get("max_storage", -1)) >= 0 else None,
        reserved_bytes=account.get("reserved_storage"),
        streams=account["streams"],
        consumers=account["consumers"],
        round_trip_ms=round(1e3 * round_trip_s, 3),
    )


async def publish_host(client: Client, sampler: HostSampler) -> HostTelemetry:
    """Measure this host, tell everybody, and return it.

    Raises:
        Unavailable: The broker is away, and the buffer for that time is full.
    """
    # Asking for the disk may take long on a network file system.
    measured = await asyncio.to_thread(sampler.sample)
    await client.publish(HOST_TELEMETRY, measured, host=measured.host)
    return measured


async def publish_broker(client: Client, host: str) -> BrokerTelemetry:
    """Measure the broker, tell everybody, and return it.

    Raises:
        Unavailable: It is away.
    """
    measured = await measure_broker(client, host)
    await client.publish(BROKER_TELEMETRY, measured)
    return measured


async def report_host(
    client: Client,
    sampler: HostSampler,
    *,
    period_s: float = 2.0,
    leads: Callable[[], bool] = lambda: True,
) -> None:
    """Publish a host's telemetry, and the broker's while this host `leads`, until cancelled.

    While the broker is away nothing is measured.
    """
    while True:
        await asyncio.sleep(period_s)
        if client.connected:
            with contextlib.suppress(BusError):
                await publish_host(client, sampler)
                if leads():
                    await publish_broker(client, sampler.host)


def _allowed(group: Cgroup) -> tuple[float, int, int]:
    """Return processors, memory, and memory that is free, as far as this process may use them."""
    memory = psutil.virtual_memory()
    processors = float(_processors_of_host())
    if group.processors is not None:
        processors = min(processors, group.processors)
    total, available = int(memory.total), int(memory.available)
    if group.mem_limit_bytes is not None and group.mem_limit_bytes < total:
        total = group.mem_limit_bytes
        available = min(available, max(0, total - (group.mem_used_bytes or 0)))
    return processors, total, available


def _processors_of_host() -> int:
    # Those that this process is bound to, where the system tells it.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1


def _open_files(process: psutil.Process) -> int:
    if hasattr(process, "num_fds"):
        return int(process.num_fds())
    return int(process.num_handles())


def _there(folder: Path) -> Path:
    """Return a folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


# --- Control groups -------------------------------------------------------------------------------


def _own_paths(own: Path) -> dict[str, str]:
    """Return our control group for each controller; the one of v2 stands under the empty name."""
    paths: dict[str, str] = {}
    for line in (_text(own) or "").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        for controller in controllers.split(","):
            paths[controller] = path
    return paths


def _upward(mount: Path, path: str) -> Iterator[Path]:
    """Give the folder of a control group and those above it, up to where they are mounted.

    A container sees its own group as the mount, under a path that only the host has: what is not
    there is left out, and the mount itself comes last.
    """
    parts = [part for part in path.split("/") if part and part != ".."]
    for length in range(len(parts), -1, -1):
        folder = mount.joinpath(*parts[:length])
        if folder.is_dir():
            yield folder


def _read_v2(root: Path, path: str) -> Cgroup:
    quotas, limits = [], []
    counted: Path | None = None
    for folder in _upward(root, path):
        counted = counted or folder
        quota, period = [*(_text(folder / "cpu.max") or "max").split(), "100000"][:2]
        if quota.isdecimal() and period.isdecimal() and int(quota) and int(period):
            quotas.append(int(quota) / int(period))
            # What is used is told by the group that the quota is of.
            counted = folder if quotas[-1] == min(quotas) else counted
        limit = _number(folder / "memory.max")
        if limit is not None:
            used = _number(folder / "memory.current") or 0
            idle = _stat(folder / "memory.stat").get("inactive_file", 0)
            limits.append((limit, max(0, used - idle)))
    spent = _stat(counted / "cpu.stat").get("usage_usec") if counted else None
    return _tightest(quotas, limits, spent / 1e6 if spent is not None else None)


def _read_v1(root: Path, paths: dict[str, str]) -> Cgroup:
    quotas, limits = [], []
    for folder in _upward(_mount(root, "cpu"), paths.get("cpu", "/")):
        quota = _number(folder / "cpu.cfs_quota_us")
        period = _number(folder / "cpu.cfs_period_us")
        if quota and period:
            quotas.append(quota / period)
    for folder in _upward(root / "memory", paths.get("memory", "/")):
        limit = _number(folder / "memory.limit_in_bytes")
        if limit is not None and limit < _NO_LIMIT:
            used = _number(folder / "memory.usage_in_bytes") or 0
            idle = _stat(folder / "memory.stat").get("total_inactive_file", 0)
            limits.append((limit, max(0, used - idle)))
    spent = None
    for folder in _upward(_mount(root, "cpuacct"), paths.get("cpuacct", "/")):
        spent = _number(folder / "cpuacct.usage")
        break
    return _tightest(quotas, limits, spent / 1e9 if spent is not None else None)


def _tightest(quotas: list[float], limits: list[tuple[int, int]], cpu_s: float | None) -> Cgroup:
    # Of several memory limits the one that leaves the least counts.
    limit, used = min(limits, key=lambda one: one[0] - one[1], default=(None, None))
    return Cgroup(min(quotas, default=None), cpu_s, limit, used)


def _mount(root: Path, controller: str) -> Path:
    """Return where a controller of v1 is mounted: alone, or together with its sister."""
    names = (controller, "cpu,cpuacct", "cpuacct,cpu")
    return next((root / name for name in names if (root / name).is_dir()), root / controller)


def _text(path: Path) -> str | None:
    # Which files there are depends on the kernel and on who mounted what; unreadable is absent.
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text and text.isascii() and text.isdecimal() else None


def _stat(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in (_text(path) or "").splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}

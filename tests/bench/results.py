"""What a run has measured, as it is kept in its file."""

import contextlib
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec

# Share of the machine that others may take before a window counts as noisy.
NOISE_MAX: Final = 0.04


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """One window of load on one server.

    Attributes:
        peer: Its name.
        model: What was asked.
        kind: `json` or `binary`; of `onnxruntime`, which has no bodies, `array`.
        connections: Requests under way at a time; of `onnxruntime` the rows of a batch.
        round: Counts from 0.
        per_s: Requests per second.
        p50_ms: Half of them took no longer.
        p99_ms: 99 % of them took no longer.
        cpu_us: Processor time per request, of all the server's processes.
        others: Share of the machine that neither server nor load generator used.
        failure: What went wrong; then the figures are worth nothing.
    """

    peer: str
    model: str
    kind: str
    connections: int
    round: int
    per_s: float
    p50_ms: float | None = None
    p99_ms: float | None = None
    cpu_us: float | None = None
    others: float = 0.0
    failure: str | None = None

    @property
    def noisy(self) -> bool:
        """Whether something else used the machine."""
        return self.others > NOISE_MAX


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """One start of a server.

    Attributes:
        peer: Its name.
        round: Counts from 0.
        ready_s: From its start to the first right answer.
        idle_mib: Memory (PSS) of all its processes then, with the models loaded.
        loaded_mib: The same after the last window.
        processes: How many there were then.
    """

    peer: str
    round: int
    ready_s: float
    idle_mib: float
    loaded_mib: float
    processes: int


class Results(msgspec.Struct, kw_only=True):
    """All that a run has measured.

    Attributes:
        made_at: When it began, UTC, RFC 3339.
        machine: What it ran on.
        options: How long and how often.
        versions: Of each server.
        windows: In the order in which they were measured.
        starts: The same.
        failures: What could not be measured, and why.
    """

    made_at: str
    machine: dict[str, str]
    options: dict[str, int]
    versions: dict[str, str]
    windows: list[Window] = msgspec.field(default_factory=list)
    starts: list[Start] = msgspec.field(default_factory=list)
    failures: list[str] = msgspec.field(default_factory=list)


def describe_machine() -> dict[str, str]:
    """Return what a reader must know of the machine."""
    model = ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3
    return {
        "processor": model or platform.machine(),
        "cores": str(os.cpu_count()),
        "memory": f"{memory:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def now() -> str:
    """Return the time, UTC, RFC 3339."""
    return datetime.now(UTC).isoformat(timespec="seconds")

"""The platform that runs on this host, as its run file tells."""

from contextlib import suppress
from datetime import datetime
from importlib import metadata
from pathlib import Path

import msgspec
import psutil

from bus import codec
from bus.errors import BusError, Unavailable


class RunFile(msgspec.Struct, frozen=True, kw_only=True):
    """`run.json` in the data directory: there while `bkg up` runs.

    Attributes:
        url: The gateway.
        nats_url: The broker, with its password: the file is for its owner alone.
        host: The host's name.
        pid: The process of `bkg up`.
        pids: Its parts, by name.
        started_at: When.
        version: Of bkg.
    """

    url: str
    nats_url: str
    host: str
    pid: int
    pids: dict[str, int]
    started_at: datetime
    version: str


def version() -> str:
    """Return the version of bkg."""
    return metadata.version("bkg")


def read_run_file(data_dir: Path) -> RunFile | None:
    """Return what the run file says, also when it is stale; None if there is none to be read."""
    with suppress(OSError, BusError):
        return codec.decode((data_dir / "run.json").read_bytes(), RunFile)
    return None


def write_run_file(data_dir: Path, run: RunFile) -> None:
    """Replace the run file in one step; nobody else may read it."""
    beside = data_dir / "run.json.part"
    beside.unlink(missing_ok=True)
    beside.touch(mode=0o600)
    beside.write_bytes(msgspec.json.format(codec.encode(run), indent=2) + b"\n")
    beside.replace(data_dir / "run.json")


def remove_run_file(data_dir: Path) -> None:
    """Remove the run file, if it is there."""
    with suppress(OSError):
        (data_dir / "run.json").unlink(missing_ok=True)


def is_ours(pid: int) -> bool:
    """Whether a process that a run file names is still one of ours.

    After a crash the number may have gone to somebody else.
    """
    try:
        command = " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return False
    return "bkg" in command or "services." in command or "nats-server" in command


def broker_url(nats: str | None, data_dir: Path) -> str:
    """Return the broker to talk to: the one that was named, or that of the running platform.

    Raises:
        Unavailable: None was named, and no platform runs on this data directory.
    """
    if nats:
        return nats
    run = read_run_file(data_dir)
    if run is None:
        raise Unavailable(
            f"no bkg runs with the data directory {data_dir}: "
            "start it with `bkg up`, or name its broker with --nats URL"
        )
    if not is_ours(run.pid):
        raise Unavailable(
            f"bkg does not run any more: its process {run.pid} has ended without a clean stop; "
            "start it with `bkg up`"
        )
    return run.nats_url

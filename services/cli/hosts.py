"""The commands about hosts: join, hosts, drain, undrain."""

import os
import sys
from pathlib import Path
from typing import Final

from bus import codec
from bus.messages import Empty, NameHost
from bus.settings import labels_in
from bus.subjects import HOSTS_DRAIN, HOSTS_LIST, HOSTS_UNDRAIN
from services.cli.console import show_hosts, show_json
from services.cli.plugins import WAY_S, connected

COMMANDS: Final = {"drain": HOSTS_DRAIN, "undrain": HOSTS_UNDRAIN}


def join(nats: str, data_dir: Path, name: str | None, labels: list[str]) -> None:
    """Become the supervisor of this host: this process joins, and never returns.

    Raises:
        InvalidRequest: A label is no `key=value`.
    """
    env = os.environ | {"BKG_NATS_URL": nats, "BKG_DATA_DIR": str(data_dir)}
    env.pop("BKG_PARENT_PID", None)
    if name is not None:
        env["BKG_HOST_NAME"] = name
    if labels:
        labels_in(",".join(labels))
        env["BKG_HOST_LABELS"] = ",".join(labels)
    sys.stdout.write(f"joining {nats.rpartition('@')[2]}; Ctrl-C leaves\n")
    sys.stdout.flush()
    # -P: a folder `services` or `bus` where the user stands must not be taken for ours.
    command = [sys.executable, "-P", "-m", "services.supervisor"]
    os.execve(command[0], command, env)  # noqa: S606 - no shell is wanted


async def show(nats: str | None, data_dir: Path, *, as_json: bool) -> None:
    """Print every host that is there."""
    async with connected(nats, data_dir) as client:
        found = (await client.call(HOSTS_LIST, Empty())).hosts
    if as_json:
        show_json(found)
    else:
        show_hosts(found)


async def command(
    verb: str, name: str, nats: str | None, data_dir: Path, *, timeout_s: float, as_json: bool
) -> None:
    """Drain a host or take it back, and wait until that is done."""
    ask = codec.convert({"name": name, "by": "cli", "timeoutS": timeout_s}, NameHost)
    async with connected(nats, data_dir) as client:
        info = await client.call(COMMANDS[verb], ask, timeout_s=timeout_s + WAY_S)
    if as_json:
        show_json(info)
    else:
        show_hosts([info])

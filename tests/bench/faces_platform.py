"""A broker, a rustyface worker on it, and children that measure: what the parts have in common."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

from bus import messages as m
from bus.broker import Broker, running_broker
from bus.client import Client, connect
from bus.errors import BusError
from bus.subjects import DATASET_MANAGE
from tests.bench.processes import REPOSITORY, Server
from tests.bench.roster import CACHE
from tests.bench.running import START_S, ServerFailed

FOLDER: Final = CACHE / "faces"
_POLL_S: Final = 0.05


@asynccontextmanager
async def empty_broker(
    name: str, *, sync_interval: str = "always"
) -> AsyncIterator[tuple[Broker, Client]]:
    """Run a broker that has nothing but declared streams while inside; gives it, and a client.

    Args:
        name: Its folder's.
        sync_interval: See `running_broker`. With `always`, as bkg itself starts it, whatever is
            acknowledged is on the disk.
    """
    home = FOLDER / name
    await asyncio.to_thread(shutil.rmtree, home, ignore_errors=True)
    try:
        async with (
            running_broker(home, sync_interval=sync_interval) as broker,
            connect(broker.url, name="bench") as client,
        ):
            await client.store.declare()
            yield broker, client
    finally:
        await asyncio.to_thread(shutil.rmtree, home, ignore_errors=True)


@asynccontextmanager
async def rustyface(broker: Broker, client: Client) -> AsyncIterator[Server]:
    """Run a rustyface worker while inside; entered when it answers.

    Raises:
        ServerFailed: It ended, or did not answer in time.
    """
    env = plugin_env() | {
        "BKG_NATS_URL": broker.url,
        "BKG_DATA_DIR": str(FOLDER / "worker"),
        "BKG_LOG_LEVEL": "warn",
    }
    log = CACHE / "logs" / "rustyface.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    server = Server([sys.executable, "-m", "services.rustyface"], log, env)
    try:
        until = time.monotonic() + START_S
        while not await _answers(client):
            if server.ended or time.monotonic() > until:
                raise ServerFailed(f"rustyface does not answer: {server.last_words()}")
            await asyncio.sleep(_POLL_S)
        yield server
    finally:
        await asyncio.to_thread(server.stop)


def ask_child(
    python: str, module: str, *arguments: object, env: Mapping[str, str] | None = None
) -> Any:
    """Run a module in a process of its own, and return the JSON in its last line.

    Args:
        python: The interpreter.
        module: What it runs.
        arguments: What that is told.
        env: Added to `child_env`.

    Raises:
        ServerFailed: It failed; says why.
    """
    line = [python, "-m", module, *map(str, arguments)]
    done = subprocess.run(
        line, check=False, capture_output=True, text=True, env=child_env() | dict(env or {})
    )
    if done.returncode:
        raise ServerFailed(f"{module} failed: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def plugin_env() -> dict[str, str]:
    """Return the environment that a supervisor adds for rustyface."""
    plugins = json.loads((REPOSITORY / "services" / "plugins.json").read_text())
    [env] = [plugin["env"] for plugin in plugins if plugin["name"] == "rustyface"]
    return dict(env)


def child_env() -> dict[str, str]:
    """Return the environment for a child that measures.

    Without a host's own choice of matrix kernels: where an old one is pinned numpy is slower than
    it is for others.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("BKG_", "OPENBLAS_"))
    }
    return kept | {"PYTHONPATH": str(REPOSITORY)}


async def _answers(client: Client) -> bool:
    try:
        await client.call(DATASET_MANAGE, m.ManageDataset(action="list"), timeout_s=2)
    except BusError:
        return False
    return True

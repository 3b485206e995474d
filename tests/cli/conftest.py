"""`bkg up` as a process, as its user has it."""

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from bus.broker import Broker
from bus.client import Client, connect
from bus.messages import ManageDataset
from bus.subjects import DATASET_MANAGE
from bus.testing import until
from tests.cli.terminal import BKG

CATALOGUE = [
    {
        "name": "candle",
        "description": "Models.",
        "entrypoint": "services.candle",
        "capabilities": ["candle.model.load", "candle.model.run", "candle.stats"],
        "autostart": True,
    }
]


@dataclass
class Ended:
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass
class Up:
    """A running `bkg up`."""

    process: Process
    data_dir: Path
    welcome: str = ""

    @property
    def run(self) -> dict[str, Any]:
        return json.loads((self.data_dir / "run.json").read_text())

    def everything(self) -> list[psutil.Process]:
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    async def read_until(self, text: str) -> str:
        assert self.process.stdout is not None
        said = ""
        while text not in said:
            line = await asyncio.wait_for(self.process.stdout.readline(), 40)
            if not line:
                err = await self.process.stderr.read() if self.process.stderr else b""
                raise AssertionError(f"it ended before {text!r}: {said}{err.decode()}")
            said += line.decode()
        return said


async def run_bkg(*args: str, env: dict[str, str] | None = None) -> Ended:
    """Run a command to its end."""
    process = await asyncio.create_subprocess_exec(
        *BKG, *args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return Ended(process.returncode, out.decode(), err.decode())


def with_hangup() -> None:
    """Let a hang-up count, though `nohup` may have started the tests."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


async def none_left(processes: list[psutil.Process], within_s: float) -> None:
    """Wait until none of the processes is there; fail when one still is."""
    _, alive = await asyncio.to_thread(psutil.wait_procs, processes, timeout=within_s)
    left = [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    assert not left, [process.cmdline() for process in left]


@pytest.fixture
def catalogue_file(tmp_path: Path) -> Path:
    path = tmp_path / "plugins.json"
    path.write_text(json.dumps(CATALOGUE))
    return path


@pytest.fixture
def env(catalogue_file: Path) -> dict[str, str]:
    """A clean environment with a catalogue of one plugin."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BKG_")}
    return kept | {"BKG_PLUGINS": str(catalogue_file), "COLUMNS": "200"}


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


StartUp = Callable[..., AbstractAsyncContextManager[Up]]


@pytest.fixture
def up(data_dir: Path, env: dict[str, str]) -> StartUp:
    """Start `bkg up` on a port of its own; inside, it is up; afterwards, nothing is left of it."""

    @asynccontextmanager
    async def started(*args: str) -> AsyncIterator[Up]:
        options = ["--data-dir", str(data_dir), *(args or ("--port", "0"))]
        process = await asyncio.create_subprocess_exec(
            *BKG, "up", *options,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, preexec_fn=with_hangup,
        )  # fmt: skip
        platform = Up(process, data_dir)
        try:
            platform.welcome = await platform.read_until("stop  ")
            yield platform
        finally:
            if process.returncode is None:
                everything = platform.everything()
                process.terminate()
                await none_left(everything, 8)
            await process.wait()

    return started


@pytest.fixture
def bkg(data_dir: Path, env: dict[str, str]) -> Callable[..., Awaitable[Ended]]:
    """Run a command on the data directory, to its end."""

    async def run(*args: str) -> Ended:
        return await run_bkg(*args, env=env | {"BKG_DATA_DIR": str(data_dir)})

    return run


@pytest.fixture
def all_gone() -> Callable[..., Awaitable[None]]:
    """Wait until processes have ended; fails when one has not in time."""
    return none_left


@pytest.fixture(scope="module")
def rustyface(
    broker: Broker, tmp_path_factory: pytest.TempPathFactory
) -> Generator[dict[str, str]]:
    """Run a worker for all tests of a file; gives the environment that leads the commands to it.

    No longer than that: what its streams may grow to is taken from the broker's room.
    """
    home = tmp_path_factory.mktemp("rustyface")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BKG_")}
    env = kept | {
        "BKG_NATS_URL": broker.url,
        "BKG_ROOT": f"t{secrets.token_hex(4)}",
        "BKG_DATA_DIR": str(home / "data"),
        "COLUMNS": "200",
        "XDG_CACHE_HOME": str(home / "user-cache"),
    }

    async def declare() -> None:
        async with connect(broker.url, name="test", root=env["BKG_ROOT"]) as client:
            await client.store.declare()

    async def answers() -> None:
        async with connect(broker.url, name="test", root=env["BKG_ROOT"]) as client:

            async def ready() -> bool:
                assert process.poll() is None, log.read_text()
                told = [entry.value for entry in await client.store.instances.all()]
                return any(one and one.status == "running" for one in told)

            await until(ready, 60)

    async def forget() -> None:
        async with connect(broker.url, name="test", root=env["BKG_ROOT"]) as client:
            await client.store.delete_everything()

    asyncio.run(declare())
    log = home / "worker.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "services.rustyface"], env=env, stdout=output, stderr=output
        )
    try:
        asyncio.run(answers())
        yield env
    finally:
        process.terminate()
        process.wait(20)
        asyncio.run(forget())


@pytest.fixture
def faces(
    rustyface: dict[str, str], bkg: Callable[..., Awaitable[Ended]], env: dict[str, str]
) -> Callable[..., Awaitable[Ended]]:
    """Run `bkg faces ...` to its end, which has to be well unless another status is awaited."""
    env.update(rustyface)

    async def run(*args: object, status: int = 0) -> Ended:
        ended = await bkg("faces", *map(str, args))
        assert ended.status == status, ended.err + ended.out
        return ended

    return run


@pytest_asyncio.fixture
async def worker(rustyface: dict[str, str]) -> AsyncIterator[Client]:
    """A client that the worker for faces answers."""
    where = rustyface["BKG_NATS_URL"]
    async with connect(where, name="test", root=rustyface["BKG_ROOT"]) as client:
        yield client


@pytest_asyncio.fixture
async def dataset(worker: Client) -> str:
    """A dataset of this test alone."""
    name = f"d{secrets.token_hex(4)}"
    await worker.call(DATASET_MANAGE, ManageDataset(action="create", dataset=name))
    return name

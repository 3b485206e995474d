"""The whole platform, as `bkg up` runs it, for whoever only has its address and a key."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import psutil
import pytest

from bus.testing import until

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Platform:
    """What its user knows of it."""

    url: str
    nats_url: str
    key: str
    data_dir: Path
    pid: int

    @asynccontextmanager
    async def session(self) -> AsyncGenerator[aiohttp.ClientSession]:
        """Ask it with the key while inside; left, every connection is closed."""
        headers = {"Authorization": f"Bearer {self.key}"}
        async with aiohttp.ClientSession(self.url, headers=headers) as one:
            yield one
        # A body that was refused before it was sent is still on its way out.
        await until(lambda: not self._connections())

    def _connections(self) -> list[Any]:
        ours = psutil.Process().net_connections("tcp")
        return [one for one in ours if one.raddr and one.raddr.port == urlsplit(self.url).port]


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Generator[Platform]:
    """A running platform; in the end nothing of it is left."""
    with running_platform(tmp_path_factory.mktemp("platform")) as one:
        yield one


@contextmanager
def running_platform(home: Path, **env: str) -> Generator[Platform]:
    """Run a platform while inside; left, nothing of it is there any more."""
    data_dir = home / "data"
    command = [sys.executable, "-m", "services.cli", "up", "--port", "0"]
    log = data_dir.parent / "up.log"
    with log.open("wb") as output:
        up = subprocess.Popen(
            [*command, "--data-dir", str(data_dir)],
            stdout=output, stderr=output, cwd=REPOSITORY, env=without_bkg(**env),
        )  # fmt: skip
    try:
        yield asyncio.run(up_and_running(up, data_dir, log))
    finally:
        family = [psutil.Process(up.pid), *psutil.Process(up.pid).children(recursive=True)]
        up.terminate()
        assert up.wait(10) == 0, log.read_text()
        _, left = psutil.wait_procs(family, 2)
        assert not left


def without_bkg(**more: str) -> dict[str, str]:
    """Return the environment without settings of ours."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BKG_")}
    return kept | more


async def up_and_running(up: "subprocess.Popen[bytes]", data_dir: Path, log: Path) -> Platform:
    """Return the platform once it says that it is up."""

    def is_up() -> bool:
        assert up.poll() is None, log.read_text()
        return "is up, after" in log.read_text()

    await until(is_up, 60)
    run = json.loads((data_dir / "run.json").read_text())
    key = (data_dir / "admin.key").read_text().strip()
    return Platform(run["url"], run["nats_url"], key, data_dir, up.pid)


async def ask(session: aiohttp.ClientSession, capability: str, **payload: Any) -> dict[str, Any]:
    """Ask a capability over HTTP, and return its answer."""
    async with session.post(f"/api/capabilities/{capability}", json=payload) as answer:
        body: dict[str, Any] = await answer.json(content_type=None)
        assert answer.status == 200, body
        return body

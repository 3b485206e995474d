"""A supervisor in the test's own process, with workers that are real processes."""

import asyncio
import sys
import textwrap
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import msgspec
import psutil
import pytest

from bus import messages as m
from bus.client import Client
from bus.instance import join
from bus.settings import Settings
from bus.testing import until
from services.supervisor import catalogue
from services.supervisor.service import Supervisor

# A worker as plain as can be. What it does beyond that stands in its test.
WORKER = """
import asyncio, os, sys
from bus.client import connect
from bus.instance import join
from bus.process import run
from bus.settings import Settings

async def main():
    settings = Settings.from_env()
    async with (
        connect(settings.nats_url, name="w", root=settings.root) as client,
        join(client, settings, plugin="w", description="a test", telemetry_s=60) as instance,
    ):
        {before}
        await instance.ready()
        {then}

sys.exit(run(main))
"""

Plugin = Callable[..., m.PluginConfig]
Supervise = Callable[..., AbstractAsyncContextManager[Supervisor]]


@pytest.fixture
def plugin(tmp_path: Path) -> Plugin:
    """Write a program, and return the configuration of the plugin `w` that runs it."""

    def write(
        program: str | None = None,
        *,
        before: str = "pass",
        then: str = "await asyncio.Event().wait()",
        **more: object,
    ):
        path = tmp_path / "w.py"
        worker = WORKER.replace("{before}", before).replace("{then}", then)
        path.write_text(worker if program is None else textwrap.dedent(program))
        return m.PluginConfig(
            name="w", description="a test", entrypoint=sys.executable, args=[str(path)],
            capabilities=[], **{"autostart": True, **more},
        )  # fmt: skip

    return write


@pytest.fixture
def supervise(client: Client, settings: Settings) -> Supervise:
    """Run a supervisor for a catalogue; in the end no process of it is left."""

    @asynccontextmanager
    async def start(*configs: m.PluginConfig, **changes: object) -> AsyncGenerator[Supervisor]:
        here = msgspec.structs.replace(settings, **changes)
        await catalogue.seed(client.store, configs)
        async with join(
            client, here, plugin="supervisor", description="a test", listed=False
        ) as instance:
            supervisor = Supervisor(client, instance, here)
            running = asyncio.create_task(supervisor.run())
            try:
                # Whoever asks it before has nobody to answer.
                await until(
                    lambda: running.done() or instance._registration.status == "running",
                    timeout_s=30,
                )
                yield supervisor
            finally:
                children = [r.child.pid for r in supervisor._replicas.here.values() if r.child]
                running.cancel()
                results = await asyncio.gather(running, return_exceptions=True)
                assert isinstance(results[0], asyncio.CancelledError), results
                assert not [pid for pid in children if psutil.pid_exists(pid)]

    return start

"""Imports by a worker in a process of its own: the broker dies; store or memory is too small."""

import asyncio
import hashlib
import json
import os
import re
import signal
import sys
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from bus import messages as m
from bus.broker import running_broker
from bus.client import connect
from bus.subjects import MODEL_IMPORT
from bus.testing import until

REPOSITORY = Path(__file__).parents[2]


def model(padding: int = 0, outputs: int = 1) -> bytes:
    """Return a linear model that takes two numbers, as large as wanted."""
    content = {"input_dim": 2, "output_dim": outputs}
    many = {"weights": [1] * 2 * outputs, "bias": [0] * outputs}
    return json.dumps({**content, **many, "metadata": {"padding": "x" * padding}}).encode()


LARGE = model(padding=2_000_000)


@pytest.fixture(autouse=True)
def as_it_is_outside(no_proxy_from_outside, source):
    source.name, source.content = "m.json", LARGE


@pytest.fixture
def working(tmp_path):
    """Run a worker that may import from this host."""

    @asynccontextmanager
    async def start(client, nats_url: str, **changes: object) -> AsyncGenerator[None]:
        config = m.PluginConfig(
            name="candle",
            description="",
            entrypoint="services.candle",
            capabilities=[],
            settings={"import_allow": ["127.0.0.0/8"], "watch_folder": False, **changes},
        )
        desired = m.DesiredState(
            config=config, enabled=True, generation=1, changed_by="t", changed_at=m.now()
        )
        await client.store.desired.put(desired, "candle")
        environment = {
            **os.environ,
            "BKG_NATS_URL": nats_url,
            "BKG_ROOT": client.root,
            "BKG_DATA_DIR": str(tmp_path / "data"),
            "BKG_HOST_NAME": "test-host",
            "BKG_SLOT": "0",
            "PYTHONPATH": str(REPOSITORY),
        }
        worker = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.candle", env=environment
        )
        try:

            async def is_ready() -> bool:
                entry = await client.store.instances.get("candle", 0)
                return entry is not None and entry.value.status == "running"

            await until(is_ready, 60)
            yield
        finally:
            worker.terminate()
            await worker.wait()

    return start


async def ask(client, source, **more: object) -> m.Job:
    return await client.call(MODEL_IMPORT, m.ImportModel(id="m", url=str(source.url), **more))


async def becomes(client, job: m.Job, condition, timeout_s: float = 60) -> m.Job:
    async def has_become() -> bool:
        return condition((await client.store.jobs.get(job.job)).value)

    await until(has_become, timeout_s)
    return (await client.store.jobs.get(job.job)).value


async def ended(client, job: m.Job) -> m.Job:
    return await becomes(client, job, lambda one: one.state in ("done", "failed", "cancelled"))


async def test_an_import_goes_on_once_when_the_broker_is_killed_and_comes_back(
    tmp_path, root, source, working
):
    home = tmp_path / "broker"
    source.slow_s = 0.1
    async with AsyncExitStack() as first, AsyncExitStack() as open_client:
        broker = await first.enter_async_context(running_broker(home))
        client = await open_client.enter_async_context(connect(broker.url, name="t", root=root))
        await client.store.declare()
        async with working(client, broker.url):
            job = await ask(client, source)
            await becomes(client, job, lambda one: one.state == "running" and one.bytes > 0)
            os.kill(broker.pid, signal.SIGKILL)
            await first.aclose()
            async with running_broker(home):
                await until(lambda: client.connected, 60)
                source.slow_s = 0
                done = await ended(client, job)
                spec = (await client.store.models.get("m")).value
                kept = await client.store.artefacts.all()
                unfinished = await client.store.artefacts.unfinished()
                # nats-py never ends where it is closed while it looks for its broker.
                await open_client.aclose()
    assert (done.state, done.tries) == ("done", 1)
    assert len(source.asked) == 1
    assert [one.checksum for one in spec.versions] == [hashlib.sha256(LARGE).hexdigest()]
    assert [one.digest for one in kept] == [spec.versions[0].checksum]
    assert unfinished == []


async def test_what_never_fits_into_the_store_is_not_fetched(
    client, settings, source, working, monkeypatch
):
    monkeypatch.setenv("BKG_ARTEFACTS_MAX_BYTES", "1500000")
    await client.store.declare()
    async with working(client, settings.nats_url):
        failed = await ended(client, await ask(client, source))
    assert (failed.state, failed.tries, failed.bytes) == ("failed", 1, 0)
    assert f"{len(LARGE):,} bytes does not fit into the store" in failed.error
    assert "BKG_ARTEFACTS_MAX_BYTES" in failed.error


async def test_what_the_store_has_no_room_for_now_waits_unfetched_unless_it_is_there_already(
    client, settings, source, working, monkeypatch
):
    monkeypatch.setenv("BKG_ARTEFACTS_MAX_BYTES", "3000000")
    await client.store.declare()
    other = model(padding=1_900_000)
    async with client.store.artefacts.writing() as upload:
        await upload.write(other)
        digest, _ = await upload.commit()
    async with working(client, settings.nats_url):
        waits = await becomes(client, await ask(client, source), lambda one: one.error is not None)
        source.content, source.etag = other, '"two"'
        known = await ended(client, await ask(client, source, sha256=digest))
    assert (waits.state, waits.bytes) == ("queued", 0)
    says = r"no room for an artefact of 2,000,\d\d\d bytes: [\d,]+ bytes are free.*_MAX_BYTES"
    assert re.search(says, waits.error)
    assert known.state == "done"


async def test_a_model_that_memory_has_no_room_for_fails_at_once_and_is_kept(
    client, settings, source, working
):
    source.content = model(outputs=1_000_000)
    async with working(client, settings.nats_url, memory_budget_mb=1):
        failed = await ended(client, await ask(client, source, load=True))
    assert (failed.state, failed.tries) == ("failed", 1)
    assert "memory_budget_mb" in failed.error
    assert failed.result.report.sound
    assert len((await client.store.models.get("m")).value.versions) == 1

"""Another machine joins, and replicas come, go and move under load without a lost request."""

import asyncio
import subprocess
import sys
from contextlib import asynccontextmanager

import pytest

from bus.testing import until
from tests.journeys.conftest import REPOSITORY, ask, without_bkg
from tests.journeys.test_replicas import steady_load

ROUNDS = 5


@pytest.fixture
async def session(platform):
    async with platform.session() as one:
        await ask(one, "candle.model.load", id="demo", path="linear-demo.json")
        yield one


@asynccontextmanager
async def joined(platform, *options: str):
    """Another host, as `bkg join` makes it."""
    data_dir = platform.data_dir.parent / "second"
    second = subprocess.Popen(
        [sys.executable, "-m", "services.cli", "join", platform.nats_url, "--name", "second",
         "--data-dir", str(data_dir), *options],
        cwd=REPOSITORY, env=without_bkg(),
    )  # fmt: skip
    try:
        yield second
    finally:
        if second.poll() is None:
            second.terminate()
        assert await asyncio.to_thread(second.wait, 20) in (0, -9)


async def candle(session) -> dict[str, object]:
    async with session.get("/api/plugins/candle") as answer:
        return await answer.json()


async def hosts_of(session) -> list[str]:
    state = await candle(session)
    return sorted(i["host"] for i in state["instances"] if i["status"] == "running")


async def scale(session, replicas: int) -> None:
    config = (await candle(session))["config"] | {"replicas": replicas}
    async with session.post("/api/plugins/candle/config", json=config) as answer:
        assert answer.status == 200, await answer.text()

    async def done() -> bool:
        state = await candle(session)
        running = [i for i in state["instances"] if i["status"] == "running"]
        return len(running) == len(state["instances"]) == replicas

    await until(done, 30)


# Twenty processes are started in it.
@pytest.mark.timeout(300)
async def test_restarts_and_scaling_under_load_lose_no_request(session):
    async with steady_load(session) as (answers, failures):
        for _ in range(ROUNDS):
            await scale(session, 2)
            async with session.post("/api/plugins/candle/restart?timeout=60") as answer:
                assert answer.status == 200, await answer.text()
            await scale(session, 1)
    assert failures == []
    assert len(answers) > 100


async def test_a_second_host_takes_its_share_and_gives_it_back(platform, session):
    await scale(session, 2)
    [first, _] = await hosts_of(session)
    async with steady_load(session) as (answers, failures):
        async with joined(platform):
            await until(lambda: _is(session, sorted([first, "second"])), 40)
            async with session.get("/api/hosts") as answer:
                listed = {one["name"]: one for one in await answer.json()}
            assert listed["second"]["status"] == "ready"
            assert "candle" in [r.partition("/")[0] for r in listed["second"]["replicas"]]

            async with session.post("/api/hosts/second/drain?timeout=40") as answer:
                assert answer.status == 200, await answer.text()
                assert (await answer.json())["status"] == "drained"
            assert await hosts_of(session) == [first, first]
            async with session.post("/api/hosts/second/undrain") as answer:
                assert answer.status == 200
            await until(lambda: _is(session, sorted([first, "second"])), 40)
        await until(lambda: _is(session, [first, first]), 40)
    assert failures == []
    assert len({one["instance"] for one in answers}) >= 3
    await scale(session, 1)


async def test_a_host_is_drained_at_once_when_asked_not_to_wait(platform, session):
    async with session.get("/api/hosts") as answer:
        [only] = await answer.json()
    path = f"/api/hosts/{only['name']}"
    async with session.post(f"{path}/drain", headers={"Prefer": "respond-async"}) as answer:
        assert answer.status == 202
        assert answer.headers["Preference-Applied"] == "respond-async"
    async with session.post(f"{path}/undrain") as answer:
        assert (await answer.json())["status"] == "ready"
    async with session.post("/api/hosts/nowhere/drain") as answer:
        assert answer.status == 404
        assert only["name"] in (await answer.json(content_type=None))["detail"]
    await until(lambda: _is(session, [only["name"]]), 30)


async def _is(session, hosts: list[str]) -> bool:
    return await hosts_of(session) == hosts

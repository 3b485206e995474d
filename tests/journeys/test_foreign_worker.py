"""A worker in another hand, written after docs/worker-protocol.md, is a plugin like ours."""

import ast
import asyncio
import io
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import nats
import pytest

from bus.testing import until
from tests.journeys.conftest import REPOSITORY, Platform, running_platform, without_bkg
from tests.journeys.test_plain_client import gather

WORKER = REPOSITORY / "tests" / "data" / "foreign_worker.py"
CATALOGUE = [
    {
        "name": "greet",
        "description": "Says hello",
        "entrypoint": sys.executable,
        "args": [str(WORKER)],
        "capabilities": ["greet.hello"],
        "autostart": True,
    }
]


@pytest.fixture(scope="module")
def platform(tmp_path_factory):
    home = tmp_path_factory.mktemp("foreign")
    (home / "plugins.json").write_text(json.dumps(CATALOGUE))
    with running_platform(home, BKG_PLUGINS=str(home / "plugins.json")) as one:
        yield one


@pytest.fixture
async def session(platform):
    async with platform.session() as one:
        yield one


def test_it_is_short_and_has_nothing_of_ours():
    source = WORKER.read_text()
    modules = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else
                     [alias.name for alias in node.names])
    }  # fmt: skip
    assert modules - set(sys.stdlib_module_names) == {"nats"}
    assert len(source.splitlines()) <= 60


async def test_started_by_the_supervisor_it_is_a_plugin_with_live_status(session):
    state = await greet(session)
    assert (state["status"], state["capabilities"]) == ("running", ["greet.hello"])
    (place,) = state["instances"]
    assert (place["slot"], place["status"], place["version"]) == (0, "running", "1.0.0")
    assert place["pid"] == state["pid"]
    told = place["lastHeartbeat"]

    async def told_again() -> bool:
        return (await greet(session))["lastHeartbeat"] > told

    await until(told_again, 30)


async def test_its_logs_and_its_telemetry_are_read_like_ours(session):
    async def said() -> bool:
        async with session.get("/api/plugins/greet/logs") as answer:
            return ("info", "ready") in [(e["level"], e["message"]) for e in await answer.json()]

    async def measured() -> bool:
        async with session.get("/api/plugins/greet/telemetry") as answer:
            return answer.status == 200 and (await answer.json())["memBytes"] > 1_000_000

    await until(said, 20)
    await until(measured, 20)


async def test_it_answers_its_capability(session):
    assert await hello(session, {"name": "Ada"}) == (200, {"greeting": "Hello, Ada"})


@pytest.mark.parametrize("body", [{}, {"name": 7}, [], "Ada", [[[[]]]]])
async def test_a_bad_request_is_the_callers_fault_and_says_why(session, body):
    status, said = await hello(session, body)
    assert (status, said["detail"]) == (400, "name must be text")
    assert said["type"] == "urn:bkg:problem:invalid-request"


async def test_a_body_that_it_cannot_fetch_is_no_empty_request_for_it(session):
    large = json.dumps({"name": "Ada" * 3_000_000}).encode()
    async with session.post("/api/capabilities/greet.hello", data=io.BytesIO(large)) as answer:
        assert answer.status == 400
        assert (await answer.json(content_type=None))["detail"] == "name must be text"


async def test_it_is_found_by_the_service_protocol(platform, session):
    await hello(session, {"name": "Ada"})
    plain = await nats.connect(platform.nats_url)
    try:
        (info,) = await gather(plain, "$SRV.INFO.greet")
        assert isinstance(info["description"], str)
        assert [e["subject"] for e in info["endpoints"]] == ["bkg.call.greet.hello"]
        (stats,) = await gather(plain, "$SRV.STATS.greet")
        assert stats["endpoints"][0]["num_requests"] >= 1
        assert [s["name"] for s in await gather(plain, "$SRV.PING.greet")] == ["greet"]
    finally:
        await plain.close()


async def test_it_outlives_a_broker_that_is_killed(platform, session):
    pid = (await greet(session))["pid"]
    run = json.loads((platform.data_dir / "run.json").read_text())
    os.kill(run["pids"]["broker"], signal.SIGKILL)

    async def answers() -> bool:
        return (await hello(session, {"name": "Ada"}, timeout_s=1))[0] == 200

    await until(answers, 30)
    assert (await greet(session))["pid"] == pid


async def test_by_hand_it_joins_shares_the_work_and_leaves_cleanly(platform, session):
    with by_hand(platform) as worker:

        async def joined() -> bool:
            return worker.pid in [i["pid"] for i in (await greet(session))["instances"]]

        await until(joined, 30)
        assert (await greet(session))["replicas"] == {"desired": 1, "ready": 2}
        assert await hello(session, {"name": "Ada"}) == (200, {"greeting": "Hello, Ada"})
        worker.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(worker.wait, 20) == 0

        async def left() -> bool:
            return len((await greet(session))["instances"]) == 1

        # Its key is deleted, not expired: that would take 30 s.
        await until(left, 10)


async def test_stopped_it_leaves_and_started_again_it_answers(session):
    async with session.post("/api/plugins/greet/stop") as answer:
        assert await answer.json() == {"status": "stopped"}
    assert (await greet(session))["instances"] == []
    status, said = await hello(session, {"name": "Ada"})
    assert (status, "which is stopped" in said["detail"]) == (503, True)
    async with session.post("/api/plugins/greet/start") as answer:
        assert (await answer.json())["status"] == "running"
    assert await hello(session, {"name": "Ada"}) == (200, {"greeting": "Hello, Ada"})


@contextmanager
def by_hand(platform: Platform):
    """Start it as somebody does in a shell, in a slot that no desired state asks for."""
    env = without_bkg(
        BKG_NATS_URL=platform.nats_url,
        BKG_ROOT="bkg",
        BKG_SLOT="100",
        BKG_GENERATION="0",
        BKG_HOST_NAME="by-hand",
    )
    worker = subprocess.Popen([sys.executable, str(WORKER)], env=env)
    try:
        yield worker
    finally:
        if worker.poll() is None:
            worker.kill()
        worker.wait()


async def greet(session) -> dict[str, object]:
    async with session.get("/api/plugins/greet") as answer:
        assert answer.status == 200
        return await answer.json()


async def hello(session, body, timeout_s: int = 10) -> tuple[int, dict[str, object]]:
    path = f"/api/capabilities/greet.hello?timeout={timeout_s}"
    async with session.post(path, json=body) as answer:
        return answer.status, await answer.json(content_type=None)

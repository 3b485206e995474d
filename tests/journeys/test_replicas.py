"""Replicas that come, share the load, leave and are killed, under steady load over HTTP."""

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from contextlib import asynccontextmanager

import pytest

from bus.testing import until
from tests.journeys.conftest import REPOSITORY, ask, without_bkg

CALLERS = 16
# Together some hundred requests a second: no moment without a replica passes unseen, and the
# processes that start meanwhile still find a processor.
PAUSE_S = 0.02


@asynccontextmanager
async def by_hand(platform):
    """A candle that somebody starts on the side, with no registration elsewhere."""
    worker = subprocess.Popen(
        [sys.executable, "-m", "services.cli", "worker", "candle", "--nats", platform.nats_url],
        cwd=REPOSITORY,
        env=without_bkg(BKG_DATA_DIR=str(platform.data_dir.parent / "elsewhere")),
    )
    try:
        yield worker
    finally:
        if worker.poll() is None:
            worker.kill()
        worker.wait()


@asynccontextmanager
async def steady_load(session):
    """Callers who ask again and again; gives what each was answered."""
    answers: list[dict[str, object]] = []
    failures: list[str] = []
    stop = False

    async def keep_asking() -> None:
        while not stop:
            async with session.post(
                "/api/capabilities/candle.model.run?timeout=3",
                json={"id": "demo", "inputs": [[1, 2, 3]]},
            ) as answer:
                body = await answer.json(content_type=None)
                if answer.status == 200:
                    assert body["outputs"] == [[6.0, -1.5]]
                    answers.append(body)
                else:
                    failures.append(str(body))
            await asyncio.sleep(PAUSE_S)

    callers = [asyncio.create_task(keep_asking()) for _ in range(CALLERS)]
    try:
        yield answers, failures
    finally:
        stop = True
        await asyncio.gather(*callers)


@pytest.fixture
async def session(platform):
    async with platform.session() as one:
        await ask(one, "candle.model.load", id="demo", path="linear-demo.json")
        yield one


async def candle(session) -> dict[str, object]:
    async with session.get("/api/plugins/candle") as answer:
        return await answer.json()


async def test_a_worker_started_by_hand_shares_the_load_and_leaves_without_a_lost_request(
    platform, session
):
    async with steady_load(session) as (answers, failures), by_hand(platform) as worker:
        await until(lambda: len({a["instance"] for a in answers[-200:]}) == 2, 20)
        state = await candle(session)
        assert [i["slot"] for i in state["instances"]] == [0, 100]
        assert state["replicas"] == {"desired": 1, "ready": 2}
        before = len(answers)

        def shares() -> Counter[object]:
            return Counter(a["instance"] for a in answers[before:])

        # The quicker one gets more, and with so little to do that may be nearly all.
        await until(lambda: len(shares()) == 2 and min(shares().values()) > 10)
        worker.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(worker.wait, 10) == 0
        after = len(answers)
        await until(lambda: len(answers) > after + 200)
    assert failures == []
    assert len((await candle(session))["instances"]) == 1


async def test_a_killed_worker_loses_only_what_it_held_and_is_brought_back(platform, session):
    async with by_hand(platform), steady_load(session) as (answers, failures):
        await until(lambda: len({a["instance"] for a in answers[-200:]}) == 2, 20)
        held_at_most = CALLERS
        pid = next(i["pid"] for i in (await candle(session))["instances"] if i["slot"] == 0)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: _brought_back(session, pid), 20)
        before = len(answers)
        await until(lambda: len(answers) > before + 200)
    # Each caller has one request under way.
    assert len(failures) <= held_at_most, failures
    place = next(i for i in (await candle(session))["instances"] if i["slot"] == 0)
    assert place["restarts"] == 1
    assert "SIGKILL" in place["lastExit"]


async def _brought_back(session, pid: int) -> bool:
    state = await candle(session)
    places = {i["slot"]: i for i in state["instances"]}
    return places[0]["status"] == "running" and places[0]["pid"] != pid

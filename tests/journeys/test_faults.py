"""What happens when a part of the whole platform is killed or stands still, under steady load.

Times are printed (`pytest -s`), for docs/operations.md; what is asserted leaves room for a loaded
machine.
"""

import asyncio
import base64
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import psutil
import pytest

from bus.testing import until
from services.supervisor.reconcile import SILENCE_S
from tests.journeys.conftest import REPOSITORY, ask, running_platform

CALLERS = 4
# So that the parts that start meanwhile find a processor.
PAUSE_S = 0.02
PHOTO = base64.b64encode(
    (REPOSITORY / "services" / "rustyface" / "samples" / "astronaut.jpg").read_bytes()
).decode()
WITHIN_S = 15.0
SLOTS = {("candle", "0"), ("rustyface", "0"), ("stubborn", "0")}


@pytest.fixture(scope="module")
def platform(tmp_path_factory):
    """Our own plugins, and one whose event loop can be made to stand still."""
    home = tmp_path_factory.mktemp("faults")
    catalogue = json.loads((REPOSITORY / "services" / "plugins.json").read_text())
    stubborn = {
        "name": "stubborn",
        "description": "Stands still when asked",
        "entrypoint": sys.executable,
        "args": [str(REPOSITORY / "tests" / "data" / "blocking_worker.py")],
        "env": {"PYTHONPATH": str(REPOSITORY)},
        "capabilities": ["stubborn.block"],
        "autostart": True,
    }
    (home / "plugins.json").write_text(json.dumps([*catalogue, stubborn]))
    with running_platform(home, BKG_PLUGINS=str(home / "plugins.json")) as one:
        yield one


@pytest.fixture
async def session(platform):
    async with platform.session() as one:
        await ask(one, "candle.model.load", id="demo", path="linear-demo.json")
        await until(lambda: is_ready(one), 60)
        yield one


# --- The broker -----------------------------------------------------------------------------------


async def test_a_broker_that_is_killed_loses_no_acknowledged_write_and_nothing_else_is_restarted(
    platform, session
):
    await ask(session, "dataset.manage", action="create", dataset="default")
    before = await pids(platform, session)
    written = Written()
    async with steady_load(session), writing(session, written):
        await until(lambda: written.all_have(3), 60)
        os.kill(before["broker"], signal.SIGKILL)
        away_at = time.monotonic()
        await until(lambda: not listens(platform.nats_url), 10)
        await until(lambda: listens(platform.nats_url), 30)
        back_at = time.monotonic()
        took_s = await until_all_answer(session)
        report("broker killed: away", back_at - away_at)
        for component, seconds in took_s.items():
            report(f"broker killed: {component} after its return", seconds)
        assert max(took_s.values()) < WITHIN_S
        counts = written.counts()
        await until(lambda: written.more_than(counts), 60)
    after = await pids(platform, session)
    assert {**before, "broker": None} == {**after, "broker": None}
    assert after["broker"] != before["broker"]
    # Not what the workers remember: what the broker kept.
    for plugin in ("candle", "rustyface"):
        async with session.post(f"/api/plugins/{plugin}/restart?timeout=60") as answer:
            assert answer.status == 200
    await written.check(session)


async def test_a_broker_that_stands_still_for_a_while_makes_nobody_end(platform, session):
    before = await pids(platform, session)
    async with steady_load(session) as load:
        await until(lambda: len(load.answers) > 50, 30)
        os.kill(before["broker"], signal.SIGSTOP)
        try:
            # Longer than a worker may be silent.
            await asyncio.sleep(SILENCE_S + 3)
            assert not await is_ready(session)
        finally:
            os.kill(before["broker"], signal.SIGCONT)
        again_at = time.monotonic()
        served = len(load.answers)
        await until(lambda: len(load.answers) > served + 100, 60)
        await until(lambda: is_ready(session), 60)
        report("broker stopped: ready after it goes on", time.monotonic() - again_at)
    assert await pids(platform, session) == before
    assert {status for status, _ in load.failures} <= {503, 504}, load.failures


# --- The supervisor -------------------------------------------------------------------------------


async def test_a_supervisor_that_is_killed_takes_its_workers_along_and_all_comes_back(
    platform, session
):
    before = await pids(platform, session)
    old = {name: psutil.Process(before[name]) for name in ("candle", "rustyface", "stubborn")}
    async with steady_load(session) as load, watched_slots(platform) as most:
        await until(lambda: len(load.answers) > 50, 30)
        os.kill(before["supervisor"], signal.SIGKILL)
        killed_at = time.monotonic()
        await until(lambda: not any(one.is_running() for one in old.values()), 20)
        report("supervisor killed: old workers gone", time.monotonic() - killed_at)
        await until(lambda: was_replaced(platform, session, before), 60)
        await until(lambda: is_ready(session), 60)
        report("supervisor killed: every replica ready", time.monotonic() - killed_at)
        served = len(load.answers)
        await until(lambda: len(load.answers) > served + 100, 30)
    after = await pids(platform, session)
    kept = ("broker", "gateway")
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert most == dict.fromkeys(SLOTS, 1), "a slot had two processes"
    report("supervisor killed: failed for", load.failing_s())
    # Never 404: the model is there, only nobody to run it.
    assert {status for status, _ in load.failures} <= {503, 504}, load.failures
    named = ("candle", "model 'demo'")
    assert all(any(one in detail for one in named) for _, detail in load.failures)


async def test_a_worker_that_hangs_when_its_supervisor_is_killed_is_gone_before_its_successor_comes(
    platform, session
):
    before = await pids(platform, session)
    async with session.post("/api/capabilities/stubborn.block?timeout=1") as answer:
        assert answer.status == 504
    async with watched_slots(platform) as most:
        os.kill(before["supervisor"], signal.SIGKILL)
        killed_at = time.monotonic()
        await until(lambda: was_replaced(platform, session, before), 60)
        await until(lambda: is_ready(session), 60)
        report("supervisor killed, a worker hangs: ready", time.monotonic() - killed_at)
    assert most == dict.fromkeys(SLOTS, 1), "a slot had two processes"


# --- The gateway ----------------------------------------------------------------------------------


async def test_a_gateway_that_is_killed_comes_back_at_its_address_and_workers_do_not_notice(
    platform, session
):
    before = await pids(platform, session)
    async with steady_load(session) as load:
        await until(lambda: len(load.answers) > 50, 30)
        os.kill(before["gateway"], signal.SIGKILL)
        killed_at = time.monotonic()
        await until(lambda: parts(platform).get("gateway") not in (None, before["gateway"]), 30)
        await until(lambda: is_ready(session), 30)
        took_s = time.monotonic() - killed_at
        report("gateway killed: ready again", took_s)
        assert took_s < WITHIN_S
        served = len(load.answers)
        await until(lambda: len(load.answers) > served + 100, 30)
    after = await pids(platform, session)
    assert {**before, "gateway": None} == {**after, "gateway": None}
    # The caller meets a closed connection; whoever is let in is answered.
    assert load.failures == []
    assert load.refused


# --- A worker that stands still -------------------------------------------------------------------


async def test_a_worker_whose_event_loop_stands_still_is_replaced_and_told_why(session):
    pid = (await place(session, "stubborn"))["pid"]
    began = time.monotonic()
    async with session.post("/api/capabilities/stubborn.block?timeout=1") as answer:
        assert answer.status == 504
        assert "stubborn.block" in (await answer.json(content_type=None))["detail"]

    async def replaced() -> bool:
        there = await place(session, "stubborn")
        return there.get("status") == "running" and there["pid"] != pid

    await until(replaced, 40)
    report("event loop blocked: replaced", time.monotonic() - began)
    there = await place(session, "stubborn")
    assert there["restarts"] == 1
    assert there["lastExit"].startswith("gave no sign of life for 10 s")

    async def told() -> bool:
        async with session.get("/api/plugins/stubborn/logs?level=error") as answer:
            records = await answer.json()
        return any("gave no sign of life" in str(record.get("fields")) for record in records)

    await until(told, 10)
    assert psutil.pid_exists(pid) is False


# --- Load -----------------------------------------------------------------------------------------


@dataclass
class Load:
    """What callers who ask again and again were answered."""

    answers: list[float] = field(default_factory=list)
    failures: list[tuple[int, str]] = field(default_factory=list)
    failed_at: list[float] = field(default_factory=list)
    refused: int = 0

    def failing_s(self) -> float:
        return max(self.failed_at) - min(self.failed_at) if self.failed_at else 0.0


@asynccontextmanager
async def steady_load(session):
    """Keep asking a model while inside."""
    load = Load()

    async def keep_asking() -> None:
        while True:
            await asyncio.sleep(PAUSE_S)
            try:
                status, body = await post(
                    session, "candle.model.run", id="demo", inputs=[[1, 2, 3]]
                )
            except aiohttp.ClientError:
                load.refused += 1
                continue
            if status == 200:
                assert body["outputs"] == [[6.0, -1.5]]
                load.answers.append(time.monotonic())
            else:
                load.failures.append((status, body["detail"]))
                load.failed_at.append(time.monotonic())

    async with kept_going(*(keep_asking() for _ in range(CALLERS))):
        yield load


@dataclass
class Written:
    """What was written: tried, and acknowledged."""

    entries: list[str] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    tried: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)

    def counts(self) -> list[int]:
        return [len(self.entries), len(self.models), len(self.changes)]

    def all_have(self, least: int) -> bool:
        return min(self.counts()) >= least

    def more_than(self, before: list[int]) -> bool:
        return all(now > then + 1 for now, then in zip(self.counts(), before, strict=True))

    async def check(self, session) -> None:
        """See that all that was acknowledged is there."""
        query = [1.0] + [0.0] * 127
        found = await ask(session, "faces.search", embedding=query, top_k=1000, threshold=-1)
        assert set(self.entries) <= {match["id"] for match in found["results"]}
        stats = await ask(session, "candle.stats")
        assert set(self.models) <= {model["id"] for model in stats["models"]}
        async with session.get("/api/plugins/stubborn") as answer:
            description = (await answer.json())["config"]["description"]
        # A change that failed for its caller may have been made all the same, later ones only.
        assert description in self.tried[self.tried.index(self.changes[-1]) :]
        report("writes acknowledged", sum(self.counts()))


@asynccontextmanager
async def writing(session, written: Written):
    """Enrol faces, load models and change desired state while inside; note what came through."""
    async with session.get("/api/plugins/stubborn") as answer:
        config = (await answer.json())["config"]

    async def enrol(number: int) -> None:
        name = f"entry-{number}"
        status, body = await post(session, "faces.encode", image_base64=PHOTO, entry_id=name)
        if status == 200:
            assert body["id"] == name
            written.entries.append(name)

    async def load(number: int) -> None:
        name = f"model-{number}"
        status, _ = await post(session, "candle.model.load", id=name, path="linear-demo.json")
        if status == 200:
            written.models.append(name)

    async def change(number: int) -> None:
        name = f"change {number}"
        written.tried.append(name)
        changed = {**config, "description": name}
        async with session.post("/api/plugins/stubborn/config?timeout=3", json=changed) as answer:
            if answer.status == 200:
                written.changes.append(name)

    async def again(step: Callable[[int], Awaitable[None]]) -> None:
        for number in range(100_000):
            await step(number)
            await asyncio.sleep(0.05)

    async with kept_going(again(enrol), again(load), again(change)):
        yield


@asynccontextmanager
async def kept_going(*work: Coroutine[Any, Any, None]):
    """Run work while inside; one that failed is heard of at the end."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        yield
        for task in tasks:
            if task.done():
                await task
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# --- What is seen ---------------------------------------------------------------------------------


@asynccontextmanager
async def watched_slots(platform):
    """Count, over and over, the processes of each slot; gives the most that were there at once."""
    most: dict[tuple[str, str], int] = {}

    async def watch() -> None:
        while True:
            now: dict[tuple[str, str], int] = {}
            for process in psutil.Process(platform.pid).children(recursive=True):
                if (slot := slot_of(process)) is not None:
                    now[slot] = now.get(slot, 0) + 1
            for slot, count in now.items():
                most[slot] = max(count, most.get(slot, 0))
            await asyncio.sleep(0.03)

    async with kept_going(watch()):
        yield most


def slot_of(process: psutil.Process) -> tuple[str, str] | None:
    """Return the place that a worker fills; None for what is no worker, or ends just now."""
    with contextlib.suppress(psutil.Error):
        command = " ".join(process.cmdline())
        for plugin, mark in (
            ("candle", "services.candle"),
            ("rustyface", "services.rustyface"),
            ("stubborn", "blocking_worker"),
        ):
            if mark in command:
                # Of a process that ends just now the environment is empty.
                slot = process.environ().get("BKG_SLOT")
                return None if slot is None else (plugin, slot)
    return None


async def until_all_answer(session) -> dict[str, float]:
    """Wait until every component answers, and return after how many seconds each did."""
    began = time.monotonic()

    async def probe(condition: Callable[[], Awaitable[bool]]) -> float:
        await until(condition, 60)
        return time.monotonic() - began

    async def candle() -> bool:
        return await answers(session, "candle.model.run", id="demo", inputs=[[1, 2, 3]])

    async def rustyface() -> bool:
        return await answers(session, "faces.encode", image_base64=PHOTO, persist=False)

    async def supervisor() -> bool:
        # The wrong revision is refused by the supervisor, and changes nothing.
        async with session.get("/api/plugins/candle") as answer:
            config = (await answer.json())["config"]
        path, headers = "/api/plugins/candle/config?timeout=1", {"If-Match": '"0"'}
        async with session.post(path, json=config, headers=headers) as answer:
            return answer.status == 409

    async def gateway() -> bool:
        return await is_ready(session)

    probes = (candle, rustyface, supervisor, gateway)
    took = await asyncio.gather(*(probe(one) for one in probes))
    return dict(zip((one.__name__ for one in probes), took, strict=True))


async def answers(session, capability: str, **payload: Any) -> bool:
    return (await post(session, capability, timeout_s=1, **payload))[0] == 200


async def post(session, capability: str, timeout_s: int = 3, **payload: Any):
    path = f"/api/capabilities/{capability}?timeout={timeout_s}"
    async with session.post(path, json=payload) as answer:
        return answer.status, await answer.json(content_type=None)


async def is_ready(session) -> bool:
    with contextlib.suppress(aiohttp.ClientError):
        async with session.get("/readyz") as answer:
            return answer.status == 200
    return False


def listens(nats_url: str) -> bool:
    """Whether the broker's port takes connections; it takes them when JetStream is there."""
    at = urlsplit(nats_url)
    found = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    return any(c.laddr.port == at.port for c in found)


def parts(platform) -> dict[str, int]:
    run: dict[str, Any] = json.loads((platform.data_dir / "run.json").read_text())
    return run["pids"]


async def pids(platform, session) -> dict[str, int | None]:
    """Return every process of the platform by name."""
    found: dict[str, int | None] = dict(parts(platform))
    async with session.get("/api/plugins") as answer:
        found |= {state["name"]: state.get("pid") for state in await answer.json()}
    return found


async def place(session, plugin: str) -> dict[str, Any]:
    async with session.get(f"/api/plugins/{plugin}") as answer:
        (there,) = (await answer.json())["instances"]
        return there


async def was_replaced(platform, session, before: dict[str, int]) -> bool:
    now = await pids(platform, session)
    names = ("supervisor", "candle", "rustyface", "stubborn")
    return all(now.get(name) not in (None, before[name]) for name in names)


def report(what: str, value: float) -> None:
    print(f"\n    {what}: {value:.2f}", end="", flush=True)  # noqa: T201 - for docs/operations.md

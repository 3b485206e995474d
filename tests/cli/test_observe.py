"""`bkg logs`, `events` and `plugins log-level` on a real broker, without a platform around it."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from bus.client import Client
from bus.instance import join
from bus.logs import publish_log
from bus.messages import Event, Level, LogEvent, now
from bus.testing import until

BKG = (sys.executable, "-m", "services.cli")


@pytest.fixture
def ours(env: dict[str, str], root: str, settings: Any) -> dict[str, str]:
    """The environment that leads the commands to the broker of this test."""
    return env | {"BKG_ROOT": root, "BKG_NATS_URL": settings.nats_url}


@pytest.fixture
def tell(bkg: Any, env: dict[str, str], ours: dict[str, str]) -> Any:
    env.update(ours)
    return bkg


async def speak(client: Client, *messages: str, level: Level = "info", slot: int = 0) -> None:
    for message in messages:
        record = LogEvent(
            plugin="echo", level=level, message=message, timestamp=now(), slot=slot,
            fields={"model": f"{message}.onnx"},
        )  # fmt: skip
        await publish_log(client, record)

    async def there() -> bool:
        last = await client.store.logs("echo", limit=1)
        return bool(last) and last[0].message == messages[-1]

    await until(there)


@asynccontextmanager
async def following(env: dict[str, str], *args: str) -> AsyncIterator[Any]:
    """Run a command that does not end by itself; gives what reads its next line."""
    process = await asyncio.create_subprocess_exec(*BKG, *args, stdout=subprocess.PIPE, env=env)

    async def line() -> str:
        assert process.stdout is not None
        return (await asyncio.wait_for(process.stdout.readline(), 30)).decode()

    try:
        yield line
    finally:
        process.terminate()
        await process.wait()


async def test_logs_are_searched_by_expression_slot_level_and_time(client: Client, tell: Any):
    await speak(client, "alpha", "beta")
    await speak(client, "gamma", level="error", slot=1)

    async def found(*args: str) -> list[str]:
        ended = await tell("logs", *args)
        assert ended.status == 0, ended.err
        return [line.split()[3] for line in ended.out.splitlines()]

    assert await found() == ["alpha", "beta", "gamma"]
    assert await found("--grep", "^(alpha|gamma)$") == ["alpha", "gamma"]
    assert await found("--grep", r"model=b\w+\.onnx") == ["beta"]
    assert await found("--slot", "1") == ["gamma"]
    assert await found("--level", "warn") == ["gamma"]
    assert await found("--since", "1h", "-n", "1") == ["gamma"]
    assert await found("--since", now().isoformat()) == []


async def test_logs_that_are_followed_are_searched_too(client: Client, ours: dict[str, str]):
    await speak(client, "one", "two")
    async with following(ours, "logs", "-f", "--grep", "one|three") as line:
        assert "one" in await line()
        await speak(client, "four", "three")
        assert "three" in await line()


async def test_events_are_shown_and_followed(client: Client, tell: Any, ours: dict[str, str]):
    async def happen(name: str, verb: str) -> None:
        event = Event(
            kind="plugin", name=name, verb=verb, timestamp=now(), slot=0, host="here",
            cause="ended with status 3", by="admin",
        )  # fmt: skip
        await client.store.tell(event)

    await happen("candle", "crashed")
    await happen("echo", "started")
    ended = await tell("events", "candle")
    assert ended.status == 0, ended.err
    assert ended.out.endswith("plugin candle/0 crashed on here by admin: ended with status 3\n")
    lines = (await tell("events", "--json")).out.splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["candle", "echo"]
    assert (await tell("events", "--since", now().isoformat())).out == ""
    async with following(ours, "events", "candle", "-f") as line:
        assert "crashed" in await line()
        await happen("echo", "ready")
        await happen("candle", "ready")
        assert "candle/0 ready" in await line()


async def test_the_log_level_is_told_to_every_instance(client: Client, settings: Any, tell: Any):
    async with join(client, settings, plugin="echo", description="A test.") as instance:
        await instance.ready()
        ended = await tell("plugins", "log-level", "echo", "warn", "--for", "90s")
        assert ended.status == 0, ended.err
        assert ended.out.startswith("echo/0 on test-host: warn and worse until ")
        ended = await tell("plugins", "log-level", "nobody", "warn")
        assert ended.status == 1
        assert "running are: echo" in ended.err


async def test_a_log_limit_that_there_cannot_be_is_said_at_the_start(bkg: Any, env: dict[str, str]):
    env["BKG_LOG_MAX_DAYS"] = "for ever"
    ended = await bkg("up", "--port", "0")
    assert ended.status == 1
    assert "BKG_LOG_MAX_DAYS is 'for ever'; allowed are whole numbers from 1" in ended.err

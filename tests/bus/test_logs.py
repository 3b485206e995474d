"""Log records: structlog in front, the stream behind, and the work never waits."""

import asyncio
import logging

import structlog

from bus import logs
from bus import messages as m
from bus.client import trace
from bus.instance import join
from bus.subjects import LIVE_LOG
from bus.testing import until

log = structlog.get_logger("tests.logs")


async def records(client, plugin: str = "candle", level: m.Level | None = None):
    return await client.store.logs(plugin, limit=100_000, level=level)


async def test_a_record_carries_who_where_and_why(client, settings):
    async with join(client, settings, plugin="candle", description="a test") as candle:
        trace.set("00-0123456789abcdef0123456789abcdef-0123456789abcdef-01")
        log.info("model.loaded", model="m", took_ms=3, path=settings.data_dir)
        trace.set(None)
        await until(lambda: _has(client, "model.loaded"))
        found = next(r for r in await records(client) if r.message == "model.loaded")
    assert (found.plugin, found.slot, found.instance) == ("candle", 0, candle.id)
    assert (found.host, found.logger, found.level) == ("test-host", "tests.logs", "info")
    assert found.fields == {"model": "m", "took_ms": 3, "path": str(settings.data_dir)}
    assert found.trace == "0123456789abcdef0123456789abcdef"
    assert found.seq is not None


async def test_a_traceback_is_one_record(client, settings):
    async with join(client, settings, plugin="candle", description="a test"):
        try:
            raise ValueError("why")  # noqa: TRY301
        except ValueError:
            log.exception("work.failed")
        await until(lambda: _has(client, "work.failed"))
    [found] = await records(client, level="error")
    assert "ValueError: why" in found.fields["exception"]


async def test_what_libraries_log_comes_too(client, settings):
    async with join(client, settings, plugin="candle", description="a test"):
        logging.getLogger("some.library").warning("it is %s", "late")
        logging.getLogger("some.library").info("chatter")
        await until(lambda: _has(client, "it is late"))
    assert [r.logger for r in await records(client, level="warn")] == ["some.library"]
    assert not await _has(client, "chatter")


async def test_the_live_tail_carries_the_streams_sequence(client, settings):
    async with (
        client.follow(LIVE_LOG, plugin="candle") as live,
        join(client, settings, plugin="candle", description="a test"),
    ):
        log.info("first")
        received = await asyncio.wait_for(anext(live), 5)
    assert received.payload.message == "first"
    assert received.seq == (await records(client))[0].seq


async def test_the_last_words_before_the_end_are_kept(client, settings):
    async with join(client, settings, plugin="candle", description="a test"):
        log.info("goodbye")
    assert await _has(client, "goodbye")


async def test_a_flood_is_shed_and_counted_and_the_work_goes_on(client, settings, monkeypatch):
    monkeypatch.setattr(logs, "QUEUE_RECORDS", 100)
    async with join(client, settings, plugin="candle", description="a test"):
        for i in range(1_000):
            log.info("flood", i=i)
        await until(lambda: _has(client, "logs.dropped"))
        found = await records(client)
    kept = [r.fields["i"] for r in found if r.message == "flood"]
    assert kept == list(range(100))
    assert sum(r.fields["dropped"] for r in found if r.message == "logs.dropped") == 900


async def _has(client, message: str) -> bool:
    return any(record.message == message for record in await records(client))

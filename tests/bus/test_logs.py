"""Log records: structlog in front, the stream behind, and the work never waits."""

import asyncio
import contextlib
import itertools
import logging
import threading

import msgspec
import pytest
import structlog

from bus import logs
from bus import messages as m
from bus.broker import running_broker
from bus.client import connect, trace
from bus.errors import InvalidRequest, NotFound
from bus.instance import join
from bus.log_search import LogQuery, matcher
from bus.settings import LogLimits
from bus.subjects import LIVE_LOG, LOG, Endpoint
from bus.testing import until


class Said(m.Message, frozen=True):
    text: str = ""


ECHO = Endpoint("echo.say", "candle", Said, Said, "Say it again.")

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
    assert [r.fields for r in found if r.message == "logs.dropped"] == [{"dropped": 900}]


async def test_a_flood_does_not_shed_errors(client, settings, monkeypatch):
    monkeypatch.setattr(logs, "QUEUE_RECORDS", 100)
    async with join(client, settings, plugin="candle", description="a test"):
        for i in range(1_000):
            log.debug("flood", i=i)
        log.error("what.matters")
        await until(lambda: _has(client, "logs.dropped"))
        assert await _has(client, "what.matters")


async def test_a_flood_of_debug_pushes_no_error_out_of_the_stream(client):
    await client.store.declare(LogLimits(max_records=50))
    await publish(client, "error", *(f"error {i}" for i in range(20)))
    await publish(client, "debug", *(f"debug {i}" for i in range(2_000)))
    assert len(await records(client, level="debug")) == 50
    assert [r.message for r in await records(client, level="error")] == [
        f"error {i}" for i in range(20)
    ]


async def test_a_flood_does_not_hold_up_the_answers_of_a_worker(client, connected, settings):
    caller = await connected()

    async def say(asked):
        return asked

    async def flood(until_set):
        # 20,000 lines a second, as far as this machine makes them.
        for i in itertools.count():
            for _ in range(200):
                log.info("flood", i=i, text="what somebody wants to know about a line")
            await asyncio.sleep(0.01)
            if until_set.is_set():
                return

    done = asyncio.Event()
    async with (
        join(client, settings, plugin="candle", description="a test") as candle,
        candle.serving(ECHO, say),
    ):
        flooding = asyncio.create_task(flood(done))
        try:
            for i in range(50):
                answer = await caller.call(ECHO, Said(text=str(i)), timeout_s=30)
                assert answer.text == str(i)
        finally:
            done.set()
            await flooding
    assert await _has(client, "flood")


async def test_ten_thousand_records_come_back_whole_in_order_and_after_a_restart(tmp_path):
    async with contextlib.AsyncExitStack() as first:
        broker = await first.enter_async_context(running_broker(tmp_path, sync_interval="2m"))
        async with connect(broker.url, name="test") as client:
            await client.store.declare(LogLimits(max_records=20_000))
            about = m.LogEvent(plugin="p", level="info", message="", timestamp=m.now(), slot=0)
            async with logs.shipping(client, about) as shipper:
                for i in range(10_000):
                    log.info("line", i=i)
                await until(lambda: not shipper._queue, timeout_s=60)
            assert shipper.dropped == 0
            wanted = [("line", i) for i in range(10_000)]
            query = LogQuery(limit=20_000, plugin="p")

            async def back():
                found = (await client.store.search_logs(query)).records
                return [(r.message, r.fields["i"]) for r in found]

            assert await back() == wanted
            await first.aclose()
            async with running_broker(tmp_path, sync_interval="2m"):
                await until(lambda: client.connected, timeout_s=30)
                assert await back() == wanted


async def test_what_is_logged_while_the_broker_is_away_comes_when_it_is_back(tmp_path):
    async with contextlib.AsyncExitStack() as first:
        broker = await first.enter_async_context(running_broker(tmp_path, sync_interval="2m"))
        async with connect(broker.url, name="test") as client:
            await client.store.declare()
            about = m.LogEvent(plugin="candle", level="info", message="", timestamp=m.now(), slot=0)
            async with logs.shipping(client, about):
                log.info("before")
                await until(lambda: _has(client, "before"))
                await first.aclose()
                await until(lambda: not client.connected)
                for i in range(1_000):
                    log.info("meanwhile", i=i)
                async with running_broker(tmp_path, sync_interval="2m"):
                    await until(lambda: client.connected, timeout_s=30)
                    log.info("after")
                    await until(lambda: _has(client, "after"), timeout_s=30)
                    found = await records(client)
                    kept = [r.fields["i"] for r in found if r.message == "meanwhile"]
                    assert kept == list(range(1_000))


async def test_records_from_threads_come_too(client, settings):
    async with join(client, settings, plugin="candle", description="a test"):
        threads = [
            threading.Thread(target=lambda: [log.info("threaded") for _ in range(100)])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            await asyncio.to_thread(thread.join)

        async def all_there():
            return [r.message for r in await records(client)].count("threaded") == 400

        await until(all_there)


async def test_secrets_and_escapes_do_not_leave_the_process(client, settings):
    async with join(client, settings, plugin="candle", description="a test"):
        log.info(
            "\x1b[31mconnected\x1b[0m to nats://bkg:s3cret@host:4222",
            password="s3cret", outer=[{"apiKey": "s3cret"}], url="nats://bkg:s3cret@host", key="k",
        )  # fmt: skip
        try:
            raise ValueError("nats://bkg:s3cret@host refused")  # noqa: TRY301
        except ValueError:
            log.exception("failed")
        await until(lambda: _has(client, "failed"))
    info = next(r for r in await records(client) if r.message.startswith("connected"))
    assert info.message == "connected to nats://bkg:***@host:4222"
    assert info.fields == {
        "password": "***", "outer": [{"apiKey": "***"}], "url": "nats://bkg:***@host", "key": "k",
    }  # fmt: skip
    async for stored in client.store._logs._stream.read(f"{client.root}.log.>"):
        assert b"s3cret" not in stored.body


async def test_secrets_in_lines_of_other_processes_are_masked_too(client):
    line = "\x1b[1mconnect\x1b[0m nats://bkg:s3cret@host with DB_PASSWORD=s3cret"
    record = m.LogEvent(plugin="candle", level="info", message=line, timestamp=m.now())
    await logs.publish_log(client, record)
    await until(lambda: _has(client, "connect nats://bkg:***@host with DB_PASSWORD=***"))


async def test_secrets_are_not_printed_either(capfd):
    logs.to_stderr()
    log.warning("started", password="s3cret", url="nats://bkg:s3cret@host")
    said = capfd.readouterr().err
    assert "started" in said
    assert "s3cret" not in said


async def test_a_record_never_fails_for_its_fields(client, settings):
    class Rude:
        def __str__(self) -> str:
            raise RuntimeError("no")

    cycle: list[object] = []
    cycle.append(cycle)
    async with join(client, settings, plugin="candle", description="a test"):
        log.info("odd", rude=Rude(), cycle=cycle, half="\ud800", huge=2**80, keys={(1, 2): 3})
        logging.getLogger("some.library").log(35, "of a level between")
        log.info("x" * 100_000)
        log.info("after")
        await until(lambda: _has(client, "after"))
        assert await _has(client, "odd")


# --- The level, changed live ----------------------------------------------------------------------


async def test_the_level_changes_live_and_falls_back_by_itself(client, connected, settings):
    operator = await connected()
    settings = msgspec.structs.replace(settings, log_level="info")
    async with join(client, settings, plugin="candle", description="a test") as candle:
        log.debug("too early")
        told = await logs.tell_log_level(
            operator, "candle", m.SetLogLevel(level="debug", seconds=2, by="somebody")
        )
        assert [(one.slot, one.id) for one in told.told] == [(0, candle.id)]
        await until(lambda: _has(client, "log_level.changed"))
        log.debug("in time")
        await until(lambda: _has(client, "in time"))
        await until(lambda: _has(client, "log_level.restored"))
        log.debug("too late")
        log.info("end")
        await until(lambda: _has(client, "end"))
    assert not await _has(client, "too early")
    assert not await _has(client, "too late")
    changed = next(r for r in await records(client) if r.message == "log_level.changed")
    assert changed.fields == {"least": "debug", "seconds": 2, "by": "somebody"}


async def test_a_second_change_replaces_the_first(client, settings):
    async with join(client, settings, plugin="candle", description="a test"):
        await logs.tell_log_level(client, "candle", m.SetLogLevel(level="error", seconds=600))
        await until(lambda: _has(client, "log_level.changed"))
        log.info("unheard")
        await logs.tell_log_level(client, "candle", m.SetLogLevel(level="debug", seconds=600))

        async def twice():
            return [r.message for r in await records(client)].count("log_level.changed") == 2

        await until(twice)
        log.debug("heard")
        await until(lambda: _has(client, "heard"))
    assert not await _has(client, "unheard")


async def test_what_is_no_plugin_can_be_told_too_and_what_is_nobody_cannot(client, settings):
    async with join(client, settings, plugin="gateway", description="a test", listed=False):
        told = await logs.tell_log_level(client, "gateway", m.SetLogLevel(level="warn"))
        assert [one.slot for one in told.told] == [0]
        await until(lambda: _has(client, "log_level.changed", plugin="gateway"))
    with pytest.raises(NotFound, match="nobody"):
        await logs.tell_log_level(client, "nobody", m.SetLogLevel(level="warn"))


# --- The limits of the stream ---------------------------------------------------------------------


async def test_limits_are_applied_to_a_stream_that_is_there_and_stay(client, monkeypatch):
    await publish(client, "info", *map(str, range(100)))
    monkeypatch.setenv("BKG_LOG_MAX_RECORDS", "20")
    monkeypatch.setenv("BKG_LOG_MAX_BYTES", str(8 * 1024 * 1024))
    monkeypatch.setenv("BKG_LOG_MAX_DAYS", "3")
    await client.store.declare()
    assert [r.message for r in await records(client)] == [str(i) for i in range(80, 100)]
    for variable in ("RECORDS", "BYTES", "DAYS"):
        monkeypatch.delenv(f"BKG_LOG_MAX_{variable}")
    # Another host that was not told of them does not take them back.
    await client.store.declare()
    config = await _log_stream(client)
    assert config["max_msgs_per_subject"] == 20
    assert config["max_bytes"] == 8 * 1024 * 1024
    assert config["max_age"] == 3 * 86_400 * 10**9


@pytest.mark.parametrize(
    ("variable", "value"),
    [("RECORDS", "0"), ("RECORDS", "many"), ("BYTES", "1"), ("BYTES", "5GB"), ("DAYS", "-1"),
     ("DAYS", "99999"), ("DAYS", "1.5"), ("RECORDS", "٣٠٠")],
)  # fmt: skip
def test_a_limit_that_there_cannot_be_is_named(monkeypatch, variable, value):
    monkeypatch.setenv(f"BKG_LOG_MAX_{variable}", value)
    with pytest.raises(InvalidRequest, match="allowed are whole numbers from") as refused:
        LogLimits.from_env()
    assert refused.value.field == f"BKG_LOG_MAX_{variable}"


# --- The search -----------------------------------------------------------------------------------


async def test_the_newest_are_found_piece_by_piece(client, monkeypatch):
    monkeypatch.setattr("bus.log_stream.PIECE_RECORDS", 7)
    await publish(client, "info", *(f"info {i}" for i in range(50)))
    await publish(client, "error", *(f"error {i}" for i in range(3)))
    await publish(client, "info", *(f"info {i}" for i in range(50, 200)))
    query = LogQuery(limit=5, plugin="candle", levels=("warn", "error"))
    page = await client.store.search_logs(query)
    assert [r.message for r in page.records] == ["error 0", "error 1", "error 2"]
    assert (page.next_after, page.next_before, page.complete) == (203, None, True)
    page = await client.store.search_logs(LogQuery(limit=5, plugin="candle"))
    assert [r.message for r in page.records] == [f"info {i}" for i in range(195, 200)]
    assert (page.next_before, page.complete) == (199, False)


async def test_what_is_old_is_found_across_the_holes_that_a_flood_has_left(client, monkeypatch):
    monkeypatch.setattr("bus.log_stream.PIECE_RECORDS", 7)
    await client.store.declare(LogLimits(max_records=10))
    await publish(client, "error", "old")
    await publish(client, "debug", *map(str, range(3_000)))
    page = await client.store.search_logs(LogQuery(limit=20, plugin="candle"))
    assert [r.message for r in page.records] == ["old", *map(str, range(2_990, 3_000))]
    assert page.complete
    page = await client.store.search_logs(LogQuery(limit=20, levels=("error",)))
    assert [r.message for r in page.records] == ["old"]


async def test_pages_backward_and_forward_together_are_everything(client):
    await publish(client, "info", *map(str, range(100)))
    seen, before = [], None
    while True:
        page = await client.store.search_logs(LogQuery(limit=30, before=before))
        seen = [r.message for r in page.records] + seen
        if (before := page.next_before) is None:
            break
    assert seen == [str(i) for i in range(100)]
    seen, after = [], 0
    while True:
        page = await client.store.search_logs(LogQuery(limit=30, after=after, oldest=True))
        seen += [r.message for r in page.records]
        after = page.next_after
        if page.complete:
            break
    assert seen == [str(i) for i in range(100)]
    assert after == 100


async def test_a_search_that_takes_too_long_says_where_to_go_on(client, monkeypatch):
    monkeypatch.setattr("bus.log_stream.SEARCH_S", 0)
    monkeypatch.setattr("bus.log_stream.PIECE_RECORDS", 10)
    monkeypatch.setattr("bus.log_stream.PIECE_MAX_RECORDS", 10)
    await publish(client, "info", *map(str, range(60)))
    rare = matcher(regex="^(3|33)$")
    seen, before, pages = [], None, 0
    while True:
        query = LogQuery(limit=5, before=before, matches=rare)
        page = await client.store.search_logs(query)
        seen = [r.message for r in page.records] + seen
        pages += 1
        if (before := page.next_before) is None:
            break
    assert seen == ["3", "33"]
    assert pages > 1
    seen, after = [], 0
    while True:
        query = LogQuery(limit=5, after=after, matches=rare, oldest=True)
        page = await client.store.search_logs(query)
        seen += [r.message for r in page.records]
        after = page.next_after
        if page.complete:
            break
    assert seen == ["3", "33"]


async def test_a_search_in_time_finds_what_was_stored_in_it(client):
    await publish(client, "info", "old")
    after_old = m.now()
    await publish(client, "info", "new")
    after_new = m.now()
    for oldest in (False, True):

        async def found(oldest=oldest, **when):
            query = LogQuery(limit=10, oldest=oldest, **when)
            return [r.message for r in (await client.store.search_logs(query)).records]

        assert await found(since=after_old) == ["new"]
        assert await found(until=after_old) == ["old"]
        assert await found(since=after_new) == []
        assert await found(since=after_old, until=after_new) == ["new"]


async def publish(client, level, *messages: str):
    for message in messages:
        record = m.LogEvent(plugin="candle", level=level, message=message, timestamp=m.now())
        await client.publish(LOG, record, plugin="candle", slot=0, level=level)
    await client.barrier()
    await until(lambda: _stored(client, messages[-1]))


async def _stored(client, message):
    last = await client.store.logs("candle", limit=1)
    return bool(last) and last[0].message == message


async def _log_stream(client):
    name = client.store._logs.name
    return (await client._nc.jetstream().stream_info(name)).config.as_dict()


async def _has(client, message: str, plugin: str = "candle") -> bool:
    return any(record.message == message for record in await records(client, plugin))

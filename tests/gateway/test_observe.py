"""What an operator leans on: search in logs, telemetry of before, events, the log level."""

import asyncio
import json
import os
import sys
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial

import msgspec
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from bus.logs import publish_log
from bus.messages import (
    BrokerTelemetry,
    Event,
    HostTelemetry,
    LogEvent,
    TelemetrySnapshot,
    now,
)
from bus.settings import LogLimits
from bus.subjects import BROKER_TELEMETRY, HOST_TELEMETRY
from bus.testing import until
from services.gateway.telemetry import Measured, downsampled, of_plugin

START = datetime(2026, 1, 1, tzinfo=UTC)
# A worker as somebody writes one: a process of its own that answers, and logs what it is told.
WORKER = """
import asyncio, sys
import structlog
from bus.client import connect
from bus.instance import join
from bus.messages import Message
from bus.process import run
from bus.settings import Settings
from bus.subjects import Endpoint

log = structlog.get_logger("echo")

class Said(Message, frozen=True):
    text: str = ""

async def say(asked):
    log.debug("echo.details", text=asked.text)
    log.info("echo.said", text=asked.text)
    return asked

async def main():
    settings = Settings.from_env()
    echo = Endpoint("echo.say", "echo", Said, Said, "Say it again.")
    async with (
        connect(settings.nats_url, name="echo", root=settings.root) as client,
        join(client, settings, plugin="echo", description="x", capabilities=["echo.say"]) as one,
        one.serving(echo, say),
    ):
        await one.ready()
        await asyncio.Event().wait()

sys.exit(run(main))
"""


async def stored(client, count, plugin):
    async def there():
        return len(await client.store.logs(plugin, limit=10_000)) >= count

    await until(there)


@pytest_asyncio.fixture
async def spoken(client, gate, wanted):
    """Two plugins: `echo` in two slots, 700 records, every tenth an error, and `ant` with one."""
    await wanted("echo")
    await wanted("ant")
    for n in range(700):
        level = "error" if n % 10 == 0 else "info"
        event = LogEvent(
            plugin="echo", level=level, message=f"Line {n}", timestamp=now(), slot=n % 2,
            fields={"n": n, "file": f"/models/{n}.onnx"},
        )  # fmt: skip
        await publish_log(client, event)
    await stored(client, 700, "echo")
    event = LogEvent(plugin="ant", level="warn", message="hello", timestamp=now(), slot=0)
    await publish_log(client, event)
    await stored(client, 1, "ant")
    await until(lambda: len(gate.parts.view.list()) == 2)


async def page(gate, path="/api/plugins/echo/logs", **query: object):
    """Return the messages of a page, and its headers."""
    asked = {name: str(value) for name, value in query.items()}
    async with gate.http.get(path, params=asked) as response:
        assert response.status == 200, await response.text()
        return [one["message"] for one in await response.json()], response.headers


# --- Logs -----------------------------------------------------------------------------------------


async def test_without_a_cursor_at_most_500_come_and_with_one_5000(gate, spoken):
    assert len((await page(gate, limit=5_000))[0]) == 500
    assert len((await page(gate, limit=5_000, after=0))[0]) == 700
    assert len((await page(gate, limit=5_000, before=10**9))[0]) == 700
    assert len((await page(gate, limit="many", after=0))[0]) == 200


async def test_pages_forward_follow_the_header_and_are_everything(gate, spoken):
    seen, after = [], "0"
    while True:
        found, headers = await page(gate, after=after, limit=300)
        seen += found
        after = headers["Bkg-Next-After"]
        if headers["Bkg-Complete"] == "true":
            break
    assert seen == [f"Line {n}" for n in range(700)]
    assert (await page(gate, after=after))[0] == []


async def test_ten_thousand_records_are_read_back_page_by_page(gate, client, wanted):
    await client.store.declare(LogLimits(max_records=20_000))
    await wanted("echo")
    event = LogEvent(plugin="echo", level="info", message="", timestamp=now(), slot=0)
    for n in range(10_000):
        await publish_log(client, msgspec.structs.replace(event, message=str(n)))
        if n % 500 == 0:
            await client.barrier()

    async def all_there():
        last = await client.store.logs("echo", limit=1)
        return bool(last) and last[0].message == "9999"

    await until(all_there, timeout_s=30)
    seen, after = [], "0"
    while True:
        found, headers = await page(gate, after=after, limit=5_000)
        seen += found
        after = headers["Bkg-Next-After"]
        if headers["Bkg-Complete"] == "true":
            break
    assert seen == [str(n) for n in range(10_000)]


async def test_pages_backward_follow_the_header_and_are_everything(gate, spoken):
    found, headers = await page(gate, limit=300)
    seen = found
    while before := headers.get("Bkg-Next-Before"):
        found, headers = await page(gate, before=before, limit=300)
        seen = found + seen
    assert seen == [f"Line {n}" for n in range(700)]


async def test_a_poller_that_follows_the_header_misses_nothing(gate, client, spoken):
    _, headers = await page(gate, limit=1)
    event = LogEvent(plugin="echo", level="info", message="new", timestamp=now(), slot=0)
    await publish_log(client, event)
    await stored(client, 701, "echo")
    assert (await page(gate, after=headers["Bkg-Next-After"]))[0] == ["new"]


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ({"q": "LINE 69"}, ["Line 69", *(f"Line {n}" for n in range(690, 700))]),
        ({"q": "/models/7.onnx"}, ["Line 7"]),
        ({"q": "n=42"}, ["Line 42", *(f"Line {n}" for n in range(420, 430))]),
        ({"regex": r"^Line \d$"}, [f"Line {n}" for n in range(10)]),
        ({"regex": r"file=/models/(3|5)\.onnx"}, ["Line 3", "Line 5"]),
        ({"regex": "line 5$"}, []),
        ({"q": "line 5", "regex": r"\D5$"}, ["Line 5"]),
        ({"slot": 1, "q": "line 1", "limit": 2}, ["Line 197", "Line 199"]),
        ({"level": "error", "limit": 2}, ["Line 680", "Line 690"]),
        ({"level": "error", "slot": 1}, []),
        ({"after": 0, "level": "error", "limit": 3}, ["Line 0", "Line 10", "Line 20"]),
        ({"since": "1h", "limit": 1}, ["Line 699"]),
        ({"until": "1h"}, []),
        ({"since": "2000-01-01T00:00:00Z", "until": "2000-01-02T00:00:00Z"}, []),
    ],
)
async def test_logs_are_searched_at_the_server(gate, spoken, query, found):
    assert (await page(gate, **query))[0] == found


async def test_logs_of_a_time_are_those_stored_in_it(gate, client, spoken):
    moment = now()
    event = LogEvent(plugin="echo", level="info", message="later", timestamp=now(), slot=0)
    await publish_log(client, event)
    await stored(client, 701, "echo")
    assert (await page(gate, since=moment.isoformat()))[0] == ["later"]
    assert (await page(gate, since=moment.isoformat(), after=0))[0] == ["later"]
    assert (await page(gate, until=moment.isoformat(), limit=1))[0] == ["Line 699"]


async def test_logs_of_all_plugins_are_together(gate, spoken):
    found, _ = await page(gate, "/api/logs", limit=2)
    assert found == ["Line 699", "hello"]
    assert (await page(gate, "/api/logs", level="warn", q="hell"))[0] == ["hello"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("since", "yesterday"), ("until", "soon"), ("after", "-1"), ("before", "x"), ("slot", "a"),
     ("level", "loud"), ("regex", "("), ("regex", "x" * 2_000), ("q", "x" * 2_000)],
)  # fmt: skip
async def test_a_filter_that_there_cannot_be_is_400_and_named(gate, spoken, name, value):
    for path in ("/api/plugins/echo/logs", "/api/logs"):
        problem = await gate.json(path, status=400, **{name: value})
        assert problem["field"] == name


async def test_an_expression_that_would_hang_others_is_answered(gate, client, wanted):
    await wanted("echo")
    event = LogEvent(plugin="echo", level="info", message="a" * 5_000, timestamp=now(), slot=0)
    await publish_log(client, event)
    await stored(client, 1, "echo")
    async with asyncio.timeout(30):
        assert (await page(gate, regex="(a+)+(a+)+(a+)+b"))[0] == []


# --- The worker's process -------------------------------------------------------------------------


@asynccontextmanager
async def worker_process(settings, level="info"):
    """A worker of the plugin `echo` as a process of its own, that logs what it is told."""
    env = {
        **os.environ, "BKG_NATS_URL": settings.nats_url, "BKG_ROOT": settings.root,
        "BKG_DATA_DIR": str(settings.data_dir), "BKG_SLOT": "0", "BKG_LOG_LEVEL": level,
    }  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WORKER, env=env, stderr=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()


async def test_a_requests_trace_is_in_the_log_of_the_worker_that_handled_it(gate, settings):
    trace_id = "0123456789abcdef0123456789abcdef"
    traceparent = {"traceparent": f"00-{trace_id}-0123456789abcdef-01"}
    async with worker_process(settings):
        await until(lambda: (s := gate.parts.view.get("echo")) and s.status == "running", 30)
        await gate.post("/api/capabilities/echo.say", {"text": "traced"}, headers=traceparent)
        await gate.post("/api/capabilities/echo.say", {"text": "other"})

        async def there():
            return len((await page(gate, q="echo.said"))[0]) == 2

        await until(there)
        found = await gate.json("/api/plugins/echo/logs", q=trace_id)
    assert [(one["fields"]["text"], one["trace"]) for one in found] == [("traced", trace_id)]


async def test_the_log_level_of_a_running_plugin_changes_live(gate, settings):
    async with worker_process(settings):
        await until(lambda: (s := gate.parts.view.get("echo")) and s.status == "running", 30)
        await gate.post("/api/capabilities/echo.say", {"text": "before"})
        told = await gate.post("/api/plugins/echo/log-level", {"level": "debug", "seconds": 3})
        assert [(one["slot"], one["host"]) for one in told["told"]] == [
            (0, gate.parts.view.get("echo").instances[0].host)
        ]
        assert told["level"] == "debug"

        async def said(what):
            return bool((await page(gate, q=what))[0])

        await until(lambda: said("log_level.changed"))
        await gate.post("/api/capabilities/echo.say", {"text": "during"})
        await until(lambda: said("echo.details"))
        await until(lambda: said("log_level.restored"))
        await gate.post("/api/capabilities/echo.say", {"text": "after"})
        await until(lambda: said("text=after"))
        found = await gate.json("/api/plugins/echo/logs", q="echo.details")
    assert [one["fields"]["text"] for one in found] == ["during"]


@pytest.mark.parametrize(
    ("body", "field"),
    [({"level": "loud"}, "level"), ({}, "level"), ({"level": "debug", "seconds": 0}, "seconds"),
     ({"level": "debug", "seconds": 86_401}, "seconds"), ({"level": "debug", "by": "me"}, "by")],
)  # fmt: skip
async def test_a_log_level_that_there_cannot_be_is_400(gate, worker, body, field):
    problem = await gate.post("/api/plugins/echo/log-level", body, status=400)
    assert problem["field"] == field


async def test_a_log_level_for_nobody_is_404_and_needs_the_key(gate, worker):
    problem = await gate.post("/api/plugins/nobody/log-level", {"level": "debug"}, status=404)
    assert "echo" in problem["detail"]
    async with gate.anonymous.post(
        "/api/plugins/echo/log-level", json={"level": "debug"}
    ) as response:
        assert response.status == 401


# --- Telemetry ------------------------------------------------------------------------------------


async def test_the_history_of_a_plugin_is_down_sampled_and_the_summary_goes_on(
    gate, client, worker
):
    await until(lambda: gate.parts.feeds.telemetry("echo"))

    async def several():
        told = await gate.json("/api/plugins/echo/telemetry/history", since="10m", points=10)
        return sum(one["samples"] for one in told["points"]) >= 3

    await until(several)
    told = await gate.json("/api/plugins/echo/telemetry/history", since="10m", points=10)
    assert told["plugin"] == "echo"
    assert told["bucketSeconds"] == 60
    last = told["points"][-1]
    assert 0 < last["memBytes"] <= last["memBytesMax"]
    assert last["cpu"] <= last["cpuMax"]
    assert last["gauges"]["threads"] >= 1
    of_slot = await gate.json("/api/plugins/echo/telemetry/history", slot="0")
    assert of_slot["points"]
    assert (await gate.json("/api/plugins/echo/telemetry/history", slot="7"))["points"] == []
    assert [one["plugin"] for one in await gate.json("/api/plugins/telemetry/summary")] == ["echo"]
    assert (await gate.json("/api/plugins/echo/telemetry"))["plugin"] == "echo"


@pytest.mark.parametrize(
    ("name", "value"),
    [("since", "x"), ("since", "2999-01-01T00:00:00Z"), ("points", "0"), ("points", "2001"),
     ("points", "many"), ("slot", "-1")],
)  # fmt: skip
async def test_a_history_that_there_cannot_be_is_400(gate, worker, name, value):
    await until(lambda: gate.parts.view.get("echo"))
    problem = await gate.json("/api/plugins/echo/telemetry/history", status=400, **{name: value})
    assert problem["field"] == name


async def test_a_history_of_nobody_is_404(gate):
    await gate.json("/api/plugins/nobody/telemetry/history", status=404)
    await gate.json("/api/hosts/nobody/telemetry/history", status=404)
    await gate.json("/api/broker/telemetry", status=404)


async def test_hosts_and_the_broker_have_a_history_too(gate, client):
    for n in range(3):
        host = HostTelemetry(
            host="h.1", timestamp=now(), processors=2, cpu=10.0 * n, load=[0.5, 0.4, 0.3],
            mem_total_bytes=100, mem_available_bytes=60 - n, disk_total_bytes=10,
            disk_free_bytes=9 - n,
        )  # fmt: skip
        await client.publish(HOST_TELEMETRY, host, host="h.1")
        broker = BrokerTelemetry(
            timestamp=now(), host="h.1", stored_bytes=n, streams=9, consumers=3, round_trip_ms=n
        )
        await client.publish(BROKER_TELEMETRY, broker)

    async def all_there():
        newest = await client.store.newest(BROKER_TELEMETRY)
        return newest is not None and newest.stored_bytes == 2

    await until(all_there)
    told = await gate.json("/api/hosts/h.1/telemetry/history", points=1)
    assert told["latest"]["diskFreeBytes"] == 7
    [bucket] = told["points"]
    assert (bucket["samples"], bucket["cpu"], bucket["cpuMax"]) == (3, 10, 20)
    assert (bucket["memUsedBytesMax"], bucket["diskFreeBytes"]) == (42, 7)
    told = await gate.json("/api/broker/telemetry", points=1)
    assert told["latest"]["roundTripMs"] == 2
    [bucket] = told["points"]
    assert (bucket["roundTripMs"], bucket["roundTripMsMax"], bucket["streams"]) == (1, 2, 9)


@given(
    st.lists(st.tuples(st.floats(-10, 110), st.floats(0, 1e12)), max_size=200),
    st.integers(1, 50),
)
def test_down_sampling_keeps_order_bounds_and_the_largest(samples, points):
    since, until_ = START, START + timedelta(seconds=100)
    measured = [
        Measured(START + timedelta(seconds=at), {"cpu": value}, partial(dict, n=i))
        for i, (at, value) in enumerate(samples)
    ]
    inside = [one for one in measured if since <= one.at <= until_]
    buckets = downsampled(measured, since, until_, points)
    assert len(buckets) <= points
    assert sum(bucket["samples"] for bucket in buckets) == len(inside)
    stamps = [bucket["timestamp"] for bucket in buckets]
    assert stamps == sorted(set(stamps))
    assert all(since <= stamp <= until_ for stamp in stamps)
    largest = max((one.numbers["cpu"] for one in inside), default=None)
    assert max((bucket["cpuMax"] for bucket in buckets), default=None) == largest
    least = min((one.numbers["cpu"] for one in inside), default=0)
    for bucket in buckets:
        assert least - 0.001 <= bucket["cpu"] <= bucket["cpuMax"]
    if inside:
        newest = max(one.at for one in inside)
        assert measured[buckets[-1]["n"]].at == newest


def snapshot(at, slot, cpu, entries=None):
    return TelemetrySnapshot(
        plugin="p", cpu=cpu, mem_bytes=int(cpu), timestamp=START + timedelta(seconds=at),
        slot=slot, entries=entries, gauges={"lag_ms": cpu, "requests": 1},
    )  # fmt: skip


def test_instances_are_added_up_until_they_are_silent():
    told = [snapshot(0, 0, 10, 5), snapshot(1, 1, 20, 4)]
    told += [snapshot(10 * n, 0, 10, 5) for n in range(1, 8)]
    sums = of_plugin(told)
    assert [one.numbers["cpu"] for one in sums] == [10, 30, 30, 30, 30, 10, 10, 10, 10]
    assert sums[1].last() == {
        "entries": 5, "instances": 2, "gauges": {"lag_ms": 20, "requests": 2},
    }  # fmt: skip


# --- Events ---------------------------------------------------------------------------------------


@pytest_asyncio.fixture
async def happened(client, gate):
    for n in range(6):
        kind, name = ("plugin", "echo") if n % 2 else ("host", "h.1")
        verb = "crashed" if n == 3 else "started"
        event = Event(kind=kind, name=name, verb=verb, timestamp=now(), cause=str(n))
        await client.store.tell(event)


@pytest.mark.parametrize(
    ("query", "causes"),
    [
        ({}, "012345"),
        ({"kind": "plugin"}, "135"),
        ({"kind": "host", "name": "h.1"}, "024"),
        ({"name": "echo", "verb": "crashed"}, "3"),
        ({"limit": 2}, "45"),
        ({"after": 2}, "2345"),
        ({"after": 0, "limit": 2}, "01"),
        ({"since": "1h", "limit": "nonsense"}, "012345"),
        ({"name": "nobody"}, ""),
    ],
)
async def test_events_are_found_by_kind_name_verb_and_sequence(gate, happened, query, causes):
    found = await gate.json("/api/events", **query)
    assert "".join(one["cause"] for one in found) == causes
    assert [one["seq"] for one in found] == sorted(one["seq"] for one in found)


async def test_events_are_read_on_after_the_header(gate, happened):
    async with gate.http.get("/api/events", params={"after": 0, "limit": 4}) as response:
        after = response.headers["Bkg-Next-After"]
    assert [one["cause"] for one in await gate.json("/api/events", after=after)] == ["4", "5"]


@pytest.mark.parametrize(("name", "value"), [("kind", "x"), ("since", "x"), ("after", "x")])
async def test_events_that_there_cannot_be_are_400(gate, name, value):
    problem = await gate.json("/api/events", status=400, **{name: value})
    assert problem["field"] == name


async def frame(ws, kind):
    async with asyncio.timeout(10):
        while True:
            told = json.loads((await ws.receive()).data)
            if told["type"] == kind:
                return told["payload"]


async def test_a_socket_tells_the_events_it_missed_and_then_each_new_one(gate, client, happened):
    async with gate.http.ws_connect("/ws/plugins") as ws:
        await ws.send_json({"action": "SUB", "topic": "events", "after": 4})
        assert [(await frame(ws, "events"))["seq"] for _ in range(2)] == [5, 6]
        event = Event(kind="host", name="h.1", verb="left", timestamp=now())
        await client.store.tell(event)
        told = await frame(ws, "events")
        assert (told["verb"], told["seq"]) == ("left", 7)


async def test_a_socket_tells_the_events_of_one_plugin_each_once(gate, client, happened):
    async with gate.http.ws_connect("/ws/plugins") as ws:
        await ws.send_json({"action": "SUB", "topic": "events", "pluginId": "echo", "after": 0})
        told = [await frame(ws, "events") for _ in range(3)]
        assert [one["cause"] for one in told] == ["1", "3", "5"]
        for n, (kind, name) in enumerate([("host", "echo"), ("plugin", "ant"), ("plugin", "echo")]):
            event = Event(kind=kind, name=name, verb="x", timestamp=now(), cause=f"new {n}")
            await client.store.tell(event)
        assert (await frame(ws, "events"))["cause"] == "new 2"
        await ws.send_json({"action": "UNSUB", "topic": "events", "id": 1})
        assert await frame(ws, "ack") == {"id": 1}
        assert not next(iter(gate.parts.feeds._listeners)).events

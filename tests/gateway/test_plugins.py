"""The routes for plugins, row by row of what clients rely on."""

import asyncio
import json
from contextlib import AsyncExitStack

import pytest
import pytest_asyncio

from bus.errors import Conflict, DeadlineExceeded, NotFound
from bus.instance import join
from bus.logs import publish_log
from bus.messages import LogEvent, PluginConfig, now
from bus.subjects import PLUGINS_CONFIGURE, PLUGINS_RESTART, PLUGINS_START, PLUGINS_STOP
from bus.testing import until


@pytest_asyncio.fixture
async def supervisor(client, settings, gate):
    """Something that answers commands as a supervisor does, and notes what it was asked."""
    asked = []

    def state_of(name):
        state = gate.parts.view.get(name)
        if state is None:
            raise NotFound(f"there is no plugin {name!r}")
        return state

    async def start(ask):
        asked.append(("start", ask))
        if state_of(ask.name).status == "running":
            raise Conflict(f"{ask.name} runs already")
        return state_of(ask.name)

    async def stop(ask):
        asked.append(("stop", ask))
        return state_of(ask.name)

    async def restart(ask):
        asked.append(("restart", ask))
        raise DeadlineExceeded(f"{ask.name}: slot 0 has not registered")

    async def configure(ask):
        asked.append(("configure", ask))
        if ask.revision not in (None, state_of(ask.name).revision):
            raise Conflict("another change came first")
        return state_of(ask.name)

    async with AsyncExitStack() as serving:
        instance = await serving.enter_async_context(
            join(client, settings, plugin="supervisor", description="For tests.", listed=False)
        )
        for endpoint, handler in (
            (PLUGINS_START, start),
            (PLUGINS_STOP, stop),
            (PLUGINS_RESTART, restart),
            (PLUGINS_CONFIGURE, configure),
        ):
            await serving.enter_async_context(instance.serving(endpoint, handler))
        yield asked


@pytest_asyncio.fixture
async def spoken(client, gate, wanted):
    """A plugin with 600 log records, of which every third is an error."""
    await wanted()
    for n in range(600):
        level = "error" if n % 3 == 0 else "debug"
        event = LogEvent(plugin="echo", level=level, message=f"line {n}", timestamp=now(), slot=0)
        await publish_log(client, event)
    await until(lambda: gate.parts.view.get("echo"))

    async def all_there():
        return len(await client.store.logs("echo", limit=1_000)) == 600

    await until(all_there)


async def test_the_list_has_every_plugin_by_name(gate, wanted):
    await wanted("zebra")
    await wanted("ant")
    await until(lambda: len(gate.parts.view.list()) == 2)
    assert [one["name"] for one in await gate.json("/api/plugins")] == ["ant", "zebra"]


async def test_a_state_has_the_fields_that_clients_know(gate, worker, wanted):
    await wanted(enabled=True)
    await until(lambda: (s := gate.parts.view.get("echo")) and s.config and s.pid)
    state = await gate.json("/api/plugins/echo")
    assert state["status"] == "running"
    assert state["port"] == worker._registration.port > 0
    assert state["capabilities"] == ["echo.say"]
    assert state["config"]["entrypoint"] == "tests.echo"
    assert state["configSchema"] == {"type": "object"}
    assert state["replicas"] == {"desired": 1, "ready": 1}
    assert state["lastHeartbeat"].endswith("Z")
    assert state["instances"][0]["slot"] == 0


async def test_a_plugin_that_nobody_knows_is_404_and_says_which_are_known(gate, wanted):
    await wanted()
    await until(lambda: gate.parts.view.get("echo"))
    for tail in ("", "/status", "/capabilities", "/telemetry", "/logs"):
        problem = await gate.json(f"/api/plugins/nobody{tail}", status=404)
        assert "nobody" in problem["detail"]
        assert "echo" in problem["detail"]


async def test_status_has_its_four_fields_even_when_nothing_runs(gate, wanted):
    await wanted()
    await until(lambda: gate.parts.view.get("echo"))
    told = await gate.json("/api/plugins/echo/status")
    assert told == {"name": "echo", "status": "stopped", "pid": None, "port": None}


async def test_capabilities_is_a_list_of_names(gate, worker):
    await until(lambda: gate.parts.view.get("echo"))
    assert await gate.json("/api/plugins/echo/capabilities") == ["echo.say"]


async def test_start_answers_with_the_state(gate, wanted, supervisor):
    await wanted()
    await until(lambda: gate.parts.view.get("echo"))
    assert (await gate.post("/api/plugins/echo/start"))["name"] == "echo"
    verb, ask = supervisor[-1]
    assert (verb, ask.name, ask.by, ask.timeout_s) == ("start", "echo", "admin", 30.0)


async def test_start_of_what_runs_is_409(gate, worker, supervisor):
    await until(lambda: (s := gate.parts.view.get("echo")) and s.status == "running")
    problem = await gate.post("/api/plugins/echo/start", status=409)
    assert "runs already" in problem["detail"]


async def test_stop_answers_stopped(gate, wanted, supervisor):
    await wanted()
    await until(lambda: gate.parts.view.get("echo"))
    assert await gate.post("/api/plugins/echo/stop") == {"status": "stopped"}


async def test_a_restart_that_takes_too_long_is_504_and_says_what_is_missing(
    gate, wanted, supervisor
):
    await wanted()
    await until(lambda: gate.parts.view.get("echo"))
    problem = await gate.post("/api/plugins/echo/restart?timeout=5", status=504)
    assert problem["detail"] == "echo: slot 0 has not registered"
    assert supervisor[-1][1].timeout_s == 5.0


@pytest.mark.parametrize("verb", ["start", "stop", "restart"])
async def test_a_command_for_nobody_is_404(gate, supervisor, verb):
    await gate.post(f"/api/plugins/nobody/{verb}", status=404)
    assert supervisor == []


async def test_a_command_without_a_supervisor_is_503_with_retry_after(gate, wanted):
    await wanted()
    await until(lambda: gate.parts.view.get("echo"))
    async with gate.http.post("/api/plugins/echo/start") as response:
        assert response.status == 503
        assert int(response.headers["Retry-After"]) >= 1


async def test_the_admin_routes_are_the_same_commands(gate, wanted, supervisor):
    await wanted()
    await until(lambda: gate.parts.view.get("echo"))
    assert [one["name"] for one in await gate.json("/admin/plugins")] == ["echo"]
    assert await gate.post("/admin/plugins/echo/stop") == {"status": "stopped"}
    assert (await gate.post("/admin/plugins/echo/start"))["name"] == "echo"
    await gate.post("/admin/plugins/echo/restart", status=504)
    await gate.post("/admin/plugins/echo/config", CONFIG)
    assert [verb for verb, _ in supervisor] == ["stop", "start", "restart", "configure"]


CONFIG = {
    "name": "echo",
    "description": "Says it again.",
    "entrypoint": "tests.echo",
    "capabilities": ["echo.say"],
}


async def test_a_configuration_is_handed_to_the_supervisor(gate, wanted, supervisor):
    await wanted()
    await until(lambda: gate.parts.view.get("echo"))
    state = await gate.post("/api/plugins/echo/config", {**CONFIG, "settings": {"loud": True}})
    assert state["name"] == "echo"
    ask = supervisor[-1][1]
    assert isinstance(ask.config, PluginConfig)
    assert ask.config.settings == {"loud": True}


async def test_a_configuration_for_another_plugin_is_400(gate, supervisor):
    problem = await gate.post("/api/plugins/other/config", CONFIG, status=400)
    assert problem["field"] == "name"
    assert supervisor == []


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"replicas": -1}, "replicas"),
        ({"replicas": "many"}, "replicas"),
        ({"colour": "blue"}, "colour"),
        ({"capabilities": None}, "capabilities"),
        ({"entrypoint": ""}, "entrypoint"),
    ],
)
async def test_a_configuration_that_does_not_fit_is_400_and_names_the_field(gate, change, field):
    problem = await gate.post("/api/plugins/echo/config", {**CONFIG, **change}, status=400)
    assert problem["field"] == field


async def test_an_empty_configuration_is_400(gate):
    assert (await gate.post("/api/plugins/echo/config", b"", status=400))["field"]


async def test_if_match_with_an_old_revision_is_409(gate, wanted, supervisor):
    await wanted()
    await until(lambda: gate.parts.view.get("echo"))
    await gate.post("/api/plugins/echo/config", CONFIG, status=409, headers={"If-Match": '"99999"'})


@pytest.mark.parametrize(
    ("limit", "count"),
    [("", 200), ("5", 5), ("500", 500), ("501", 500), ("0", 200), ("-3", 200), ("many", 200)],
)
async def test_logs_have_the_newest_records_oldest_first(gate, spoken, limit, count):
    logs = await gate.json("/api/plugins/echo/logs", limit=limit)
    assert [one["message"] for one in logs] == [f"line {n}" for n in range(600 - count, 600)]
    assert [one["seq"] for one in logs] == sorted(one["seq"] for one in logs)


async def test_logs_can_be_had_after_a_sequence_and_from_a_level_upward(gate, spoken):
    last = (await gate.json("/api/plugins/echo/logs", limit=10))[0]["seq"]
    later = await gate.json("/api/plugins/echo/logs", after=last)
    assert [one["message"] for one in later] == [f"line {n}" for n in range(591, 600)]
    bad = await gate.json("/api/plugins/echo/logs", level="warn", limit=2)
    assert [one["message"] for one in bad] == ["line 594", "line 597"]


@pytest.mark.parametrize(("name", "value"), [("after", "-1"), ("after", "x"), ("level", "loud")])
async def test_a_filter_that_there_cannot_be_is_400(gate, spoken, name, value):
    problem = await gate.json("/api/plugins/echo/logs", status=400, **{name: value})
    assert problem["field"] == name


async def test_telemetry_is_404_until_there_is_some(gate, wanted):
    await wanted()
    await until(lambda: gate.parts.view.get("echo"))
    await gate.json("/api/plugins/echo/telemetry", status=404)


async def test_telemetry_is_the_last_snapshot(gate, worker):
    await until(lambda: gate.parts.feeds.telemetry("echo"))
    snapshot = await gate.json("/api/plugins/echo/telemetry")
    assert snapshot["plugin"] == "echo"
    assert snapshot["memBytes"] > 1_000_000
    assert snapshot["cpu"] >= 0


async def test_the_telemetry_summary_has_one_snapshot_for_each_plugin_that_has_one(
    gate, worker, wanted
):
    await wanted("silent")
    await until(lambda: gate.parts.feeds.telemetry("echo"))
    summary = await gate.json("/api/plugins/telemetry/summary")
    assert [one["plugin"] for one in summary] == ["echo"]


async def test_telemetry_of_before_the_gateway_started_is_there(start, client, worker):
    async def stored():
        return await client.store.telemetry()

    await until(stored)
    gate = await start()
    await until(lambda: gate.parts.feeds.telemetry("echo"))


async def test_the_event_stream_has_the_back_fill_and_then_what_is_new(gate, client, spoken):
    async with gate.http.get("/admin/plugins/echo/logs") as response:
        assert response.headers["Content-Type"] == "text/event-stream"
        seen = [await event(response) for _ in range(100)]
        assert [one["message"] for one in seen] == [f"line {n}" for n in range(500, 600)]
        await publish_log(
            client, LogEvent(plugin="echo", level="info", message="new", timestamp=now(), slot=0)
        )
        assert (await event(response))["message"] == "new"


async def test_the_event_stream_resumes_after_the_last_event_that_came(gate, client, spoken):
    last = (await gate.json("/api/plugins/echo/logs", limit=3))[0]["seq"]
    headers = {"Last-Event-ID": str(last)}
    async with gate.http.get("/admin/plugins/echo/logs", headers=headers) as response:
        assert [(await event(response))["message"] for _ in range(2)] == ["line 598", "line 599"]


async def test_an_event_stream_ends_when_its_reader_goes(gate, spoken):
    async with gate.http.get("/admin/plugins/echo/logs") as response:
        await event(response)
        assert len(gate.parts.connections) == 1
    await until(lambda: len(gate.parts.connections) == 0)


async def event(response):
    """Return the next log record of an event stream."""
    async with asyncio.timeout(5):
        while True:
            line = await response.content.readline()
            if line.startswith(b"data: ") and b'"message"' in line:
                return json.loads(line.removeprefix(b"data: "))

"""Health, readiness, ports, and what HTTP itself can get wrong."""

import asyncio
from contextlib import AsyncExitStack

import pytest
from aiohttp import ClientSession
from yarl import URL

from bus.broker import running_broker
from bus.client import connect
from bus.instance import join
from bus.testing import until
from services.gateway.app import Options, gateway
from services.gateway.pages import Pages


async def test_health_lists_every_plugin_with_its_port(gate, worker, wanted):
    await wanted("silent")
    await until(lambda: len(gate.parts.view.list()) == 2)
    await until(lambda: gate.parts.view.get("echo").status == "running")
    told = await gate.json("/health")
    assert told["status"] == "ok"
    assert told["timestamp"].endswith("Z")
    assert told["plugins"] == [
        {"name": "echo", "status": "running", "port": worker._registration.port},
        {"name": "silent", "status": "stopped", "port": "n/a"},
    ]


async def test_ports_say_where_the_gateway_and_the_plugins_listen(gate, wanted):
    await wanted("silent")
    await until(gate.parts.view.list)
    assert await gate.json("/admin/ports") == [
        {"service": "gateway", "port": gate.parts.port, "status": "running"},
        {"service": "silent", "port": "n/a", "status": "stopped"},
    ]


async def test_ports_show_a_worker_s_own_and_it_answers(gate, worker):
    await until(lambda: (s := gate.parts.view.get("echo")) and s.status == "running")
    _ours, echo = await gate.json("/admin/ports")
    assert (echo["service"], echo["status"]) == ("echo", "running")
    async with ClientSession() as http, http.get(f"http://127.0.0.1:{echo['port']}/readyz") as said:
        assert said.status == 200


async def test_ready_when_every_wanted_replica_is(gate, worker, wanted):
    await wanted(enabled=True)
    await wanted("off", enabled=False)
    await until(lambda: len(gate.parts.view.list()) == 2)
    await until(lambda: gate.parts.view.get("echo").status == "running")
    assert await gate.json("/readyz") == {"status": "ready"}


async def test_not_ready_says_what_is_missing(gate, wanted):
    await wanted(enabled=True, replicas=2)
    await until(gate.parts.view.list)
    async with gate.anonymous.get("/readyz") as response:
        assert response.status == 503
        assert response.headers["Retry-After"]
        problem = await response.json(content_type=None)
    assert problem["reasons"] == ["echo has 0 of 2 replicas ready"]


async def test_not_ready_before_the_catalogue_is_there(gate):
    assert "catalogue" in (await gate.json("/readyz", status=503))["detail"]


async def test_reads_go_on_and_readiness_ends_fast_when_the_broker_goes(tmp_path, settings, pages):
    async with AsyncExitStack() as running:
        stack = await running.enter_async_context(AsyncExitStack())
        broker = await stack.enter_async_context(running_broker(tmp_path))
        client = await running.enter_async_context(connect(broker.url, name="test"))
        instance = await running.enter_async_context(
            join(client, settings, plugin="gateway", description="Under test.", listed=False)
        )
        parts = await running.enter_async_context(
            gateway(client, instance, Options(port=0, no_auth=True), "key", Pages(pages))
        )
        http = await running.enter_async_context(ClientSession(f"http://127.0.0.1:{parts.port}"))
        await stack.aclose()
        await until(lambda: not client.connected)
        began = asyncio.get_running_loop().time()
        for path, status in (
            ("/readyz", 503),
            ("/livez", 200),
            ("/health", 200),
            ("/api/plugins", 200),
            ("/api/plugins/echo/logs", 503),
        ):
            async with http.get(path) as response:
                assert response.status == status, path
        assert asyncio.get_running_loop().time() - began < 1


async def test_requests_are_counted(gate):
    before = gate.parts.instance.gauges["http_requests"]
    await gate.json("/livez")
    assert gate.parts.instance.gauges["http_requests"] == before + 1


# --- HTTP itself ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["/nothing", "/api", "/api/keys", "/admin/keys", "/auth/login", "/v3", "/api/model",
     "/api/plugins/", "/api/plugins/a/b"],
)  # fmt: skip
async def test_what_is_not_there_is_404_as_a_problem(gate, path):
    async with gate.http.get(path) as response:
        assert response.status == 404
        assert response.content_type == "application/problem+json"
        problem = await response.json(content_type=None)
    assert problem["title"] == "Not Found"
    assert path in problem["detail"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/api/plugins", {"GET", "HEAD"}),
        ("PUT", "/api/plugins/echo/start", {"POST"}),
        ("GET", "/api/capabilities/echo.say", {"POST"}),
        ("POST", "/livez", {"GET", "HEAD"}),
        ("PUT", "/auth/session", {"GET", "HEAD", "POST", "DELETE"}),
    ],
)
async def test_a_wrong_method_is_405_with_those_allowed(gate, method, path, allowed):
    async with gate.http.request(method, path) as response:
        assert response.status == 405
        assert response.content_type == "application/problem+json"
        assert set(response.headers["Allow"].split(",")) == allowed


@pytest.mark.parametrize(
    "name", ["..%2f..", "%2e%2e%2fetc", "%00", "a%0d%0ab", "%ff", "*", "%3E", "a" * 3_000, "' or 1"]
)
async def test_a_plugins_name_is_only_a_name(gate, name):
    for method, tail in (("GET", ""), ("GET", "/logs"), ("POST", "/start")):
        url = URL(f"{gate.url}/api/plugins/{name}{tail}".replace(" ", "%20"), encoded=True)
        async with gate.http.request(method, url) as response:
            assert response.status == 404, (method, tail)
            assert response.content_type == "application/problem+json"


async def test_a_configuration_over_the_limit_is_413(gate):
    body = b'{"name":"%b"}' % (b"x" * 1_100_000)
    problem = await gate.post("/api/plugins/echo/config", body, status=413)
    assert "1,048,576" in problem["detail"]


async def test_every_answer_is_protected_and_names_no_library(gate):
    for path in ("/livez", "/nothing", "/"):
        async with gate.http.get(path) as response:
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert "frame-ancestors 'none'" in response.headers["Content-Security-Policy"]
            assert response.headers["Referrer-Policy"] == "no-referrer"
            assert response.headers["Server"] == "bkg"
            assert "Access-Control-Allow-Origin" not in response.headers


async def test_what_nobody_expected_is_500_without_its_inside_and_stands_in_the_log(
    gate, client, monkeypatch
):
    def fail():
        raise RuntimeError("the secret is 1234")

    monkeypatch.setattr(gate.parts.view, "list", fail)
    problem = await gate.json("/api/plugins", status=500)
    assert problem == {
        "type": "urn:bkg:problem:internal",
        "title": "Internal Server Error",
        "status": 500,
        "detail": "it failed unexpectedly; the gateway's log has the cause",
    }

    async def logged():
        found = await client.store.logs("gateway", limit=10)
        return any("1234" in str(one.fields.get("exception")) for one in found)

    await until(logged)

"""The loopback port of an instance, over real HTTP and with a real broker behind it."""

import asyncio
import contextlib
import gzip
import io
import json
import re
import socket
from urllib.parse import urlsplit

import msgspec
import pytest
import pytest_asyncio
from aiohttp import ClientSession
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from bus import messages as m
from bus import probes
from bus.broker import running_broker
from bus.client import connect
from bus.errors import InvalidRequest, NotFound, Unprocessable
from bus.instance import join
from bus.metrics import Calls, Figures
from bus.plugins import follow_plugins
from bus.probes import Route, is_loopback
from bus.settings import Settings
from bus.subjects import MODEL_RUN
from bus.testing import until


async def echo(request: m.RunModel) -> m.ModelOutput:
    if request.inputs == [[13]]:
        raise Unprocessable("thirteen is not for us", field="inputs[0][0]")
    return m.ModelOutput(id=request.id, outputs=request.inputs, execution_ms=0.0)


@pytest_asyncio.fixture
async def instance(client, settings):
    async with join(client, settings, plugin="candle", description="a test") as one:
        yield one


@pytest_asyncio.fixture
async def http(instance):
    async with ClientSession(f"http://127.0.0.1:{instance._registration.port}") as session:
        yield session


async def get(http, path: str, status: int = 200, **more):
    async with http.get(path, **more) as response:
        assert response.status == status, await response.text()
        return await response.json(content_type=None)


async def post(http, path: str, body: object, status: int = 200, **headers: str):
    given = {"Content-Type": "application/json", **headers}
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with http.post(path, data=data, headers=given) as response:
        assert response.status == status, await response.text()
        return await response.json(content_type=None)


async def samples(http) -> dict[tuple[str, ...], float]:
    """Every sample of /metrics, by name and the one label that is not the instance's own."""
    async with http.get("/metrics") as response:
        assert response.status == 200
        assert response.content_type == "text/plain"
        text = await response.text()
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            labels = dict(sample.labels)
            assert (labels.pop("plugin"), labels.pop("slot")) == ("candle", "0")
            key = (sample.name, *labels.values()) if len(labels) < 2 else (sample.name,)
            found[key] = sample.value
    return found


# --- Probes ---------------------------------------------------------------------------------------


async def test_an_instance_is_alive_at_once_and_ready_when_it_says_so(instance, http):
    assert await get(http, "/livez") == {"status": "ok"}
    problem = await get(http, "/readyz", 503)
    assert problem["reasons"] == ["the instance is starting"]
    await instance.ready()
    assert await get(http, "/readyz") == {"status": "ready"}


async def test_health_says_who_answers(instance, http):
    await instance.ready()
    said = await get(http, "/health")
    assert said["status"] == "ok"
    assert (said["plugin"], said["slot"], said["instance"]) == ("candle", 0, instance.id)
    assert (said["state"], said["in_flight"], said["oldest_s"]) == ("running", 0, 0)


async def test_the_port_is_in_the_registration_from_the_first_moment(client, settings):
    async with follow_plugins(client.store) as view:
        async with join(client, settings, plugin="candle", description="a test") as one:
            await until(lambda: view.get("candle") and view.get("candle").instances)
            assert view.get("candle").instances[0].port == one._registration.port > 0


async def test_an_instance_that_is_not_listed_has_no_port(client, settings):
    async with join(client, settings, plugin="g", description="a test", listed=False) as one:
        assert one._registration.port is None


async def test_a_worker_started_by_hand_has_a_port_too(client, settings):
    by_hand = msgspec.structs.replace(settings, slot=None)
    async with join(client, by_hand, plugin="candle", description="a test") as one:
        entry = await client.store.instances.get("candle", one.slot)
        assert entry.value.port == one._registration.port > 0


async def test_not_ready_while_the_broker_is_away_and_ready_again_when_it_is_back(
    tmp_path, settings
):
    async with contextlib.AsyncExitStack() as first:
        broker = await first.enter_async_context(running_broker(tmp_path, sync_interval="2m"))
        async with connect(broker.url, name="test", root="r") as client:
            await client.store.declare()
            async with (
                join(client, settings, plugin="candle", description="a test") as one,
                ClientSession(f"http://127.0.0.1:{one._registration.port}") as http,
            ):
                await one.ready()
                await get(http, "/readyz")
                await first.aclose()
                await until(lambda: not client.connected)
                problem = await get(http, "/readyz", 503)
                assert problem["reasons"] == ["the broker is away"]
                # Nobody is to be replaced for that.
                await get(http, "/livez")
                await get(http, "/health")
                assert (await samples(http))["bkg_broker_connected",] == 0
                async with running_broker(tmp_path, sync_interval="2m"):
                    await until(lambda: client.connected)
                    await get(http, "/readyz")
                    assert (await samples(http))["bkg_ready",] == 1


async def test_a_wanted_port_is_taken(client, settings):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    wants = msgspec.structs.replace(settings, probe_port=port)
    async with join(client, wants, plugin="candle", description="a test") as one:
        assert one._registration.port == port


async def test_a_wanted_port_that_is_taken_is_a_warning_and_another_one_serves(client, settings):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        wants = msgspec.structs.replace(settings, probe_port=taken.getsockname()[1])
        async with join(client, wants, plugin="candle", description="a test") as one:
            assert one._registration.port != wants.probe_port
            async with ClientSession(f"http://127.0.0.1:{one._registration.port}") as http:
                await get(http, "/livez")

            async def warned() -> bool:
                said = await client.store.logs("candle", limit=100)
                return any(r.message == "probes.no_port" and r.level == "warn" for r in said)

            await until(warned)


async def test_a_worker_without_any_port_works_all_the_same(client, settings, monkeypatch):
    async def refuse(*_args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(probes.web.TCPSite, "start", refuse)
    async with (
        join(client, settings, plugin="candle", description="a test") as one,
        one.serving(MODEL_RUN, echo, "m"),
        one.local_routes(Route("GET", "/x", m.Empty, echo)),
    ):
        await one.ready()
        assert one._registration.port is None
        reply = await client.call(MODEL_RUN, m.RunModel(id="m", inputs=[[1]]))
        assert reply.outputs == [[1]]


@pytest.mark.parametrize(("text", "number"), [("", 0), ("0", 0), ("65535", 65535)])
def test_the_port_comes_from_the_environment(monkeypatch, text, number):
    monkeypatch.setenv("BKG_PROBE_PORT", text)
    assert Settings.from_env().probe_port == number


@pytest.mark.parametrize("text", ["65536", "-1", "http"])
def test_a_port_that_cannot_be_is_refused_by_name(monkeypatch, text):
    monkeypatch.setenv("BKG_PROBE_PORT", text)
    with pytest.raises(InvalidRequest, match="BKG_PROBE_PORT is"):
        Settings.from_env()


# --- Metrics --------------------------------------------------------------------------------------


async def test_metrics_count_requests_errors_and_time_by_capability(client, instance, http):
    go_on = asyncio.Event()

    async def wait(request: m.RunModel) -> m.ModelOutput:
        await go_on.wait()
        return await echo(request)

    def key(name: str) -> tuple[str, str]:
        return f"bkg_{name}", "candle.model.run"

    async with instance.serving(MODEL_RUN, wait, "m"):
        asked = [
            asyncio.create_task(client.call(MODEL_RUN, m.RunModel(id="m", inputs=[[n]])))
            for n in (1, 2, 13)
        ]
        await until(lambda: instance.in_flight == 3)
        found = await samples(http)
        assert found[key("requests_in_flight")] == 3
        assert found["bkg_oldest_request_seconds",] >= 0
        go_on.set()
        await asyncio.gather(*asked, return_exceptions=True)
    # Gone from the bus, and still counted: a counter never goes back.
    found = await samples(http)
    assert found[key("requests_total")] == 3
    assert found[key("request_errors_total")] == 1
    assert found[key("request_seconds_total")] > 0
    assert found[key("requests_in_flight")] == 0


async def test_metrics_tell_of_the_process_and_what_the_instance_holds(instance, http):
    instance.counts["models_loaded"] = 3
    instance.gauges['images "waiting"\n'] = 2.5
    found = await samples(http)
    assert found["bkg_process_resident_memory_bytes",] > 1_000_000
    assert found["bkg_process_cpu_seconds_total",] > 0
    assert found["bkg_process_start_time_seconds",] > 1e9
    assert found["bkg_process_threads",] >= 1
    assert found["bkg_instance_info",] == 1
    assert (found["bkg_ready",], found["bkg_broker_connected",]) == (0, 1)
    assert found["bkg_count", "models_loaded"] == 3
    assert found["bkg_gauge", 'images "waiting"\n'] == 2.5


numbers = st.floats(allow_nan=False)


@given(st.dictionaries(st.text(max_size=20), numbers, max_size=5), st.text(max_size=20))
def test_whatever_an_instance_calls_its_numbers_they_are_read_as_they_were_told(told, name):
    figures = Figures(
        labels={"plugin": name, "slot": "0"}, identity={"version": name}, ready=True,
        connected=True, lag_s=0, oldest_s=0, counts=told, gauges=told,
        calls={name: Calls(requests=3)},
    )  # fmt: skip
    families = {f.name: f for f in text_string_to_metric_families(figures.text().decode())}
    for kind in ("bkg_count", "bkg_gauge"):
        read = {sample.labels["name"]: sample.value for sample in families[kind].samples}
        assert read == told
    [requests] = families["bkg_requests"].samples
    assert requests.labels == {"plugin": name, "slot": "0", "capability": name}
    assert requests.value == 3


# --- Further routes -------------------------------------------------------------------------------


@pytest_asyncio.fixture
async def routed(instance):
    """An instance that runs models, over the bus and here."""

    async def run(request: m.RunModel) -> m.ModelOutput:
        return await instance.answer_here(MODEL_RUN, request)

    async def fail(_request: m.Empty) -> m.Empty:
        raise RuntimeError("the secret is 42")

    async def nothing(_request: m.Empty) -> m.Empty:
        raise NotFound("there is nothing", field="id")

    async with (
        instance.serving(MODEL_RUN, echo, "m"),
        instance.local_routes(
            Route("POST", "/models/{id}/run", m.RunModel, run),
            Route("GET", "/fail", m.Empty, fail),
            Route("GET", "/nothing", m.Empty, nothing),
        ),
    ):
        yield instance


async def test_path_and_body_make_one_request_that_is_counted_as_on_the_bus(routed, http):
    assert (await post(http, "/models/m/run", {"inputs": [[1, 2]]}))["outputs"] == [[1, 2]]
    # A body may repeat what the path says, and not contradict it.
    await post(http, "/models/m/run", {"id": "m", "inputs": [[1]]})
    problem = await post(http, "/models/m/run", {"id": "n", "inputs": [[1]]}, 400)
    assert problem["field"] == "id"
    found = await samples(http)
    assert found["bkg_requests_total", "candle.model.run"] == 2


async def test_an_error_is_a_problem_with_its_number_and_its_sentence(routed, http):
    assert await post(http, "/models/m/run", {"inputs": [[13]]}, 422) == {
        "type": "urn:bkg:problem:unprocessable",
        "title": "Unprocessable Entity",
        "status": 422,
        "detail": "thirteen is not for us",
        "field": "inputs[0][0]",
    }
    assert (await get(http, "/nothing", 404))["detail"] == "there is nothing"
    async with http.get("/nothing") as response:
        assert response.content_type == "application/problem+json"


async def test_what_the_instance_does_not_serve_just_now_is_503_with_a_time(routed, http):
    headers = {"Content-Type": "application/json"}
    async with http.post("/models/n/run", data=b'{"inputs": [[1]]}', headers=headers) as response:
        assert response.status == 503
        assert int(response.headers["Retry-After"]) >= 1


async def test_an_unexpected_failure_says_nothing_of_its_cause(routed, http):
    async with http.get("/fail") as response:
        assert response.status == 500
        text = await response.text()
    assert "secret" not in text
    assert "Traceback" not in text
    assert "the cause is in the log" in text


async def test_a_route_leaves_and_the_instance_takes_its_own_health_back(instance, http):
    async def fine(_request: m.Empty) -> dict[str, str]:
        return {"status": "fine"}

    async with instance.local_routes(Route("GET", "/health", m.Empty, fine)):
        assert await get(http, "/health") == {"status": "fine"}
    assert (await get(http, "/health"))["plugin"] == "candle"


async def test_leaving_waits_for_what_is_in_hand(instance, http):
    entered, go_on = asyncio.Event(), asyncio.Event()

    async def wait(_request: m.Empty) -> dict[str, bool]:
        entered.set()
        await go_on.wait()
        return {"done": True}

    async with contextlib.AsyncExitStack() as routed:
        await routed.enter_async_context(
            instance.local_routes(Route("GET", "/wait", m.Empty, wait))
        )
        asked = asyncio.create_task(get(http, "/wait"))
        await entered.wait()
        leaving = asyncio.create_task(routed.aclose())
        await until(lambda: not instance._probes._added)
        assert not leaving.done()
        go_on.set()
        await leaving
    assert await asked == {"done": True}


async def test_one_request_too_many_is_refused_and_probes_go_on(instance, http, monkeypatch):
    monkeypatch.setattr(probes, "WORKING_MAX", 1)
    entered, go_on = asyncio.Event(), asyncio.Event()

    async def wait(_request: m.Empty) -> dict[str, bool]:
        entered.set()
        await go_on.wait()
        return {"done": True}

    async with instance.local_routes(Route("GET", "/wait", m.Empty, wait)):
        asked = asyncio.create_task(get(http, "/wait"))
        await entered.wait()
        assert "works on 1 requests already" in (await get(http, "/wait", 429))["detail"]
        await get(http, "/livez")
        go_on.set()
        await asked


# --- Hostile input --------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "10.0.0.1", "", "["])
@pytest.mark.parametrize("path", ["/livez", "/health", "/metrics", "/nothing"])
async def test_a_name_that_is_not_loopback_is_refused_everywhere(routed, http, host, path):
    problem = await get(http, path, 403, headers={"Host": host})
    assert "127.0.0.1 and localhost alone" in problem["detail"]


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:80", "127.0.0.1:1", "127.8.8.8", "[::1]:9"]
)
async def test_a_loopback_name_is_answered(http, host):
    await get(http, "/livez", headers={"Host": host})


near_misses = st.builds(
    "{}{}{}".format,
    st.text("a.@[:/\\ 1", max_size=2),
    st.sampled_from(["localhost", "127.0.0.1", "127.1", "[::1]", "[127.0.0.1]", "::1", "[::]"]),
    st.text("a.@]:/\\ 1", max_size=4),
)


@given(near_misses | st.text(max_size=30))
def test_what_is_taken_for_a_loopback_name_is_one_to_every_parser_of_urls(text):
    if is_loopback(text):
        host = urlsplit(f"http://{text}/").hostname
        assert host
        assert host in {"localhost", "::1"} or re.fullmatch(r"127(\.\d{1,3}){3}", host)


@pytest.mark.parametrize(
    "kind",
    ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
     "text/plain; application/json", "application/jsonp", "application/msgpack"],
)  # fmt: skip
async def test_what_a_page_can_send_unasked_is_no_request(routed, http, kind):
    """A browser sends these types to other origins without asking first."""
    problem = await post(http, "/models/m/run", {"inputs": [[1]]}, 400, **{"Content-Type": kind})
    assert problem["field"] == "Content-Type"


async def test_a_page_that_asks_first_is_not_allowed(routed, http):
    asks = {
        "Origin": "https://evil.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
    }
    async with http.options("/models/m/run", headers=asks) as response:
        assert response.status == 405
        assert response.headers["Allow"] == "POST"
        assert not any(name.startswith("Access-Control") for name in response.headers)


async def test_every_answer_forbids_being_taken_into_other_pages(routed, http):
    for path in ("/livez", "/metrics", "/none", "/fail"):
        async with http.get(path) as response:
            assert response.headers["Cross-Origin-Resource-Policy"] == "same-origin"
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert response.headers["Cache-Control"] == "no-store"
            assert response.headers["Server"] == "bkg"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "the body is not JSON"),
        (b"\xff\xfe", "the body is not JSON"),
        (b'{"inputs": ' + b"[" * 100_000, "the body is not JSON"),
        (b"[]", "Expected `object`"),
        (b"null", "Expected `object`"),
        (b"{}", "missing required field `inputs`"),
        (b'{"inputs": 3}', "inputs: Expected `array`"),
        (b'{"inputs": [["x"]]}', "inputs[0][0]"),
        (b'{"inputs": [[NaN]]}', "the body is not JSON"),
    ],
)
async def test_a_body_that_does_not_fit_is_400_and_says_where(routed, http, body, says):
    problem = await post(http, "/models/m/run", body, 400)
    assert says in problem["detail"]
    assert "Traceback" not in json.dumps(problem)


async def test_a_body_over_the_limit_of_the_bus_is_refused(client, routed, http, monkeypatch):
    async def chunks():
        for _ in range(client.max_payload // 65_536 + 2):
            yield b" " * 65_536

    headers = {"Content-Type": "application/json"}
    for data in (io.BytesIO(b" " * (client.max_payload + 1)), chunks()):
        with contextlib.suppress(ConnectionError):
            async with http.post("/models/m/run", data=data, headers=headers) as response:
                assert response.status == 413
    await get(http, "/livez")


async def test_a_small_body_that_unpacks_to_a_large_one_is_refused(client, routed, http):
    packed = gzip.compress(b" " * (client.max_payload + 1))
    assert len(packed) < client.max_payload / 100
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    async with http.post("/models/m/run", data=packed, headers=headers) as response:
        assert response.status == 413
    whole = gzip.compress(b'{"inputs": [[1]]}')
    async with http.post("/models/m/run", data=whole, headers=headers) as response:
        assert response.status == 200


async def test_a_body_that_is_not_packed_as_it_says_is_400(routed, http):
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    async with http.post("/models/m/run", data=b"no gzip", headers=headers) as response:
        assert response.status == 400
    await get(http, "/livez")


async def test_a_body_that_does_not_come_is_given_up(routed, http, monkeypatch):
    monkeypatch.setattr(probes, "BODY_PATIENCE_S", 0.1)
    port = routed._registration.port
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /models/m/run HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 100\r\n\r\n{"
    )
    async with asyncio.timeout(30):
        assert b" 504 " in await reader.readline()
    writer.close()


async def test_leaving_does_not_wait_for_a_body_that_does_not_come(instance, http):
    port = instance._registration.port
    async with instance.local_routes(Route("POST", "/x", m.Empty, echo)):
        _reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            b"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        await until(lambda: instance._probes._taken == 1)
        assert not instance._probes._working
    writer.close()
    await until(lambda: instance._probes._taken == 0)


@pytest.mark.parametrize(
    "said",
    [
        b"GET /livez HTTP/1.1\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"GET /livez HTTP/1.0\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
    ],
    ids=["no host", "two hosts", "no host in HTTP/1.0", "TLS", "a long path", "a long header"],
)
async def test_nonsense_is_refused_and_fills_no_log(instance, http, said, caplog):
    port = instance._registration.port
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(said)
    async with asyncio.timeout(30):
        answer = await reader.readuntil(b"\r\n\r\n")
        answer += await reader.read(65_536)
    writer.close()
    assert answer.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4"))
    assert b"Traceback" not in answer
    await get(http, "/livez")
    assert not caplog.records


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/none", 404), ("GET", "/livez/", 404), ("POST", "/livez", 405), ("PUT", "/x", 404),
     ("DELETE", "/models/m/run", 405), ("GET", "/models/m/run", 405), ("HEAD", "/livez", 200),
     ("GET", "/models/a%2Fb/run", 405)],
)  # fmt: skip
async def test_what_is_not_there_is_told_in_http_s_own_numbers(routed, http, method, path, status):
    async with http.request(method, path) as response:
        assert response.status == status

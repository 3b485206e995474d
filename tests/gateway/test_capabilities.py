"""Capabilities over HTTP: bytes through, and a sentence for each way that it can fail."""

import asyncio
import io

import msgspec
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as runs
from hypothesis import strategies as st

from bus.errors import NotFound, Overloaded, Unavailable, Unprocessable
from bus.instance import join
from bus.messages import ModelSpec, ModelVersion, ProcessState, now
from bus.subjects import CANDLE_STATS, FACES_ENCODE, MODEL_RUN
from bus.testing import until


async def test_a_third_partys_capability_is_relayed_by_name(gate, worker):
    assert await gate.post("/api/capabilities/echo.say", {"text": "hi"}) == {"text": "hi"}


async def test_the_bodys_bytes_and_its_type_pass_through_undecoded(gate, worker):
    body = msgspec.msgpack.encode({"text": "hi"})
    headers = {"Content-Type": "application/msgpack"}
    url = "/api/capabilities/echo.say"
    async with gate.http.post(url, data=body, headers=headers) as response:
        assert response.headers["Content-Type"] == "application/msgpack"
        assert await response.read() == body


async def test_an_empty_body_is_an_empty_object(gate, worker):
    assert await gate.post("/api/capabilities/echo.say", b"") == {}


async def test_the_trace_reaches_the_worker_and_the_request_id_comes_back(gate, client):
    heard = []

    async def on_message(message):
        heard.append(message.headers)
        await client.answer(message.reply, b"{}", {})

    await client.listen(f"{client.root}.call.raw.say", "raw", on_message)
    trace = f"00-{'ab' * 16}-{'cd' * 8}-01"
    headers = {"traceparent": trace, "X-Request-Id": "mine-1"}
    async with gate.http.post("/api/capabilities/raw.say", headers=headers) as response:
        assert response.status == 200
        assert response.headers["X-Request-Id"] == "mine-1"
        assert response.headers["Content-Type"].startswith("application/json")
    assert heard[0]["traceparent"] == trace
    assert heard[0]["X-Request-Id"] == "mine-1"


@pytest.mark.parametrize("given", ["", "x" * 200, "two words", "<script>"])
async def test_a_request_id_that_is_none_is_replaced(gate, given):
    async with gate.http.get("/livez", headers={"X-Request-Id": given}) as response:
        assert response.headers["X-Request-Id"] not in ("", given)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (NotFound("dataset 'x' does not exist"), 404),
        (Unprocessable("there is no face in the image"), 422),
        (Overloaded("the queue is full: 64 of 64", retry_after_s=2.5), 429),
        (Unavailable("the galleries are being read", retry_after_s=7), 503),
    ],
)
async def test_a_workers_error_becomes_a_problem(gate, client, settings, error, status):
    async def refuse(_request):
        raise error

    async with (
        join(client, settings, plugin="rustyface", description="Refuses.") as worker,
        worker.serving(FACES_ENCODE, refuse),
    ):
        url = "/api/capabilities/faces.encode"
        async with gate.http.post(url, json={"image_base64": ""}) as response:
            assert response.status == status
            assert response.content_type == "application/problem+json"
            assert await response.json(content_type=None) == {
                "type": f"urn:bkg:problem:{error.code}",
                "title": response.reason,
                "status": status,
                "detail": error.message,
            }
            if error.retry_after_s:
                assert int(response.headers["Retry-After"]) >= error.retry_after_s


async def test_a_workers_unexpected_failure_says_nothing_of_its_inside(gate, client, settings):
    async def fail(_request):
        raise RuntimeError("the secret is 1234")

    async with (
        join(client, settings, plugin="candle", description="Fails.") as worker,
        worker.serving(CANDLE_STATS, fail),
    ):
        problem = await gate.post("/api/capabilities/candle.stats", {}, status=500)
    assert "1234" not in str(problem)
    assert "candle.stats" in problem["detail"]


async def test_a_stack_trace_of_a_third_party_is_not_passed_on(gate, client):
    async def on_message(message):
        said = "boom Traceback (most recent call last): File secret.py"
        headers = {"Nats-Service-Error": said, "Nats-Service-Error-Code": "400"}
        await client.answer(message.reply, b"", headers)

    await client.listen(f"{client.root}.call.raw.say", "raw", on_message)
    problem = await gate.post("/api/capabilities/raw.say", {}, status=400)
    assert problem["detail"] == "boom"


async def test_a_model_that_nobody_has_loaded_is_404_while_candle_runs(gate, client, settings):
    async with join(
        client, settings, plugin="candle", description="Empty.", capabilities=["candle.model.run"]
    ) as worker:
        await worker.ready()
        await until(lambda: (s := gate.parts.view.get("candle")) and s.status == "running")
        problem = await gate.post(
            "/api/capabilities/candle.model.run", {"id": "nope", "inputs": [[1]]}, status=404
        )
    assert "loaded" in problem["detail"]
    assert problem["field"] == "id"


async def test_a_model_that_is_wanted_but_not_served_just_now_is_503(gate, client, settings):
    version = ModelVersion(
        version="1", path="m.json", checksum="0", format="linear", added_at=now()
    )
    await client.store.models.put(ModelSpec(id="m 1", versions=[version]), "m 1")
    async with join(
        client, settings, plugin="candle", description="Empty.", capabilities=["candle.model.run"]
    ) as worker:
        await worker.ready()
        await until(lambda: (s := gate.parts.view.get("candle")) and s.status == "running")
        problem = await gate.post(
            "/api/capabilities/candle.model.run", {"id": "m 1", "inputs": [[1]]}, status=503
        )
    assert "'m 1' version '1' should be served, but no instance" in problem["detail"]


async def test_a_plugin_of_which_only_its_supervisor_speaks_is_503(gate, client, wanted):
    await wanted(enabled=True)
    alone = ProcessState(
        plugin="echo", slot=0, host="h", status="running", generation=1, since=now(), pid=1
    )
    await client.store.processes.put(alone, "echo", 0)
    await until(lambda: (s := gate.parts.view.get("echo")) and s.instances)
    problem = await gate.post("/api/capabilities/echo.say", {}, status=503)
    assert "echo" in problem["detail"]
    assert "runs" not in problem["detail"]


async def test_a_model_is_found_by_the_id_in_the_body(gate, client, settings):
    ran = []

    async def run(request):
        ran.append(request.id)
        raise Unprocessable("as far as this")

    async with (
        join(client, settings, plugin="candle", description="One model.") as worker,
        worker.serving(MODEL_RUN, run, "m 1"),
    ):
        body = {"id": "m 1", "inputs": [[1.0]]}
        await gate.post("/api/capabilities/candle.model.run", body, status=422)
    assert ran == ["m 1"]


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b"{", b'{"id": 3}', b'{"id": ""}', b"\xff"])
async def test_a_keyed_capability_without_its_key_is_400(gate, body):
    await gate.post("/api/capabilities/candle.model.run", body, status=400)


async def test_a_capability_whose_plugin_is_stopped_is_503_and_names_it(gate, wanted):
    await wanted()
    await until(lambda: gate.parts.view.get("echo"))
    async with gate.http.post("/api/capabilities/echo.say") as response:
        assert response.status == 503
        assert int(response.headers["Retry-After"]) >= 1
        problem = await response.json(content_type=None)
    assert "echo, which is stopped" in problem["detail"]


async def test_a_capability_of_ours_that_is_not_installed_is_503(gate):
    problem = await gate.post("/api/capabilities/faces.search", {}, status=503)
    assert "rustyface" in problem["detail"]


async def test_an_unknown_capability_is_404_and_lists_the_known(gate, worker):
    await until(lambda: gate.parts.view.get("echo"))
    problem = await gate.post("/api/capabilities/no.such", {}, status=404)
    assert "echo.say" in problem["detail"]
    assert "candle.stats" in problem["detail"]
    assert "plugins." not in problem["detail"]


async def test_a_key_in_the_path_does_not_reach_a_worker(gate, client, settings):
    async def run(_request):
        raise AssertionError

    async with (
        join(client, settings, plugin="candle", description="One model.") as worker,
        worker.serving(MODEL_RUN, run, "m"),
    ):
        await gate.post("/api/capabilities/candle.model.run.m", {"id": "m"}, status=404)


@pytest.mark.parametrize("name", ["plugins.start", "plugins.configure", "plugins.evil"])
async def test_commands_for_the_supervisor_are_not_capabilities(gate, name):
    assert "route" in (await gate.post(f"/api/capabilities/{name}", {}, status=403))["detail"]


@pytest.mark.parametrize(
    "name",
    ["nodots", "a..b", ".a.b", "a.b.", "A.B", "a.*", "a.%3E", "a.b%20c", "a.b%0d%0aPUB", "a.b" * 60,
     "..%2f..", "%24SRV.PING", "é.b"],
)  # fmt: skip
async def test_a_malformed_name_is_400(gate, name):
    from yarl import URL  # noqa: PLC0415

    url = URL(f"{gate.url}/api/capabilities/{name}", encoded=name.isascii())
    async with gate.http.post(url) as response:
        assert response.status == 400
        assert (await response.json(content_type=None))["field"] == "capability"


async def test_a_body_over_the_limit_is_413_with_the_numbers(gate, worker):
    limit = gate.parts.client.body_max_bytes
    problem = await gate.post("/api/capabilities/echo.say", b"x" * (limit + 1), status=413)
    assert f"{limit:,}" in problem["detail"]
    assert f"{limit + 1:,}" in problem["detail"]
    assert "BKG_BODY_MAX_BYTES" in problem["detail"]


async def test_a_body_of_just_what_the_broker_takes_passes(gate, worker):
    frame = len(b'{"text":""}')
    text = "x" * (gate.parts.client.max_payload - frame)
    async with gate.http.post(
        "/api/capabilities/echo.say", data=io.BytesIO(b'{"text":"%b"}' % text.encode())
    ) as response:
        assert response.status == 200
        assert len(await response.read()) == gate.parts.client.max_payload


async def test_a_body_that_is_not_compressed_as_it_says_is_400(gate, worker):
    headers = {"Content-Encoding": "gzip"}
    await gate.post("/api/capabilities/echo.say", b"not gzip", status=400, headers=headers)


@pytest.mark.parametrize("how", ["query", "header"])
async def test_the_callers_time_out_counts(gate, client, how):
    async def on_message(message):
        heard.append(message.headers["Bkg-Timeout-Ms"])

    heard = []
    await client.listen(f"{client.root}.call.raw.say", "raw", on_message)
    url = "/api/capabilities/raw.say"
    if how == "query":
        await gate.post(f"{url}?timeout=0.2", {}, status=504)
    else:
        await gate.post(url, {}, status=504, headers={"X-Timeout-Seconds": "0.2"})
    assert heard == ["200"]


@pytest.mark.parametrize("text", ["0", "-1", "301", "inf", "nan", "soon", "1e9"])
async def test_a_time_out_that_there_cannot_be_is_400(gate, text):
    problem = await gate.post(f"/api/capabilities/echo.say?timeout={text}", {}, status=400)
    assert problem["field"] == "timeout"


async def test_too_many_calls_at_once_are_429(gate, worker):
    gate.parts.relaying = 10_000
    problem = await gate.post("/api/capabilities/echo.say", {}, status=429)
    assert "256" in problem["detail"]
    gate.parts.relaying = 0
    await gate.post("/api/capabilities/echo.say", {})
    assert gate.parts.relaying == 0


async def test_a_caller_who_goes_away_is_not_waited_for(gate, client):
    arrived = asyncio.Event()

    async def on_message(_message):
        arrived.set()

    await client.listen(f"{client.root}.call.raw.say", "raw", on_message)
    calling = asyncio.create_task(gate.post("/api/capabilities/raw.say", {}))
    await arrived.wait()
    calling.cancel()
    await until(lambda: gate.parts.relaying == 0)


async def test_whatever_the_body_is_the_answer_is_no_500(gate, worker):
    @runs(max_examples=50, suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=200))
    def bodies(body):
        tried.append(body)

    tried = []
    bodies()
    for body in tried:
        async with gate.http.post("/api/capabilities/echo.say", data=body) as response:
            assert response.status in (200, 400)

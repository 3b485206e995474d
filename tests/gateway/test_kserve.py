"""Models over HTTP while they load, leave, are busy or are gone; two instances of candle behind."""

import asyncio
import base64
import gzip
import io
import json
from dataclasses import replace
from urllib.parse import quote

import msgspec
import pytest
from yarl import URL

from bus.testing import until
from services.gateway import inference
from services.gateway.routes import models
from tests.gateway.inferring import ONES, held, post, put, version_of

INDEX = "/v2/repository/index"
NAMES = ["1", "default", "latest"]


async def load(gate, name="m", status=200, **parameters):
    path = f"/v2/repository/models/{quote(name, safe='')}/load"
    return await post(gate, path, {"parameters": parameters}, status)


async def infer(gate, name="m", status=200, timeout=30):
    path = f"/v2/models/{quote(name, safe='')}/infer?timeout={timeout}"
    return await post(gate, path, ONES, status)


# --- On its way -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["fetching", "queued"])
async def test_while_a_model_loads_a_caller_hears_at_once_how_far_it_is(
    gate, client, candle, linear, monkeypatch, stage
):
    let_go = asyncio.Event()
    store = type(client.store.artefacts)
    fetch = store.fetch

    async def slow(self, digest, path, *, told=lambda _share: None):
        told(0.25)
        await let_go.wait()
        await fetch(self, digest, path, told=told)

    worker = await candle()
    if stage == "fetching":
        monkeypatch.setattr(store, "fetch", slow)
    else:
        await worker._memory._loading.acquire()
    loading = asyncio.create_task(put(gate, linear()))
    try:
        await until(lambda: _served(gate, "m", stage))
        for method, path, body in (
            ("POST", "/v2/models/m/infer", ONES),
            ("POST", "/v2/models/m/versions/1/infer", ONES),
            ("GET", "/v2/models/m/ready", None),
            ("GET", "/v2/models/m/versions/1/ready", None),
            ("POST", "/api/capabilities/candle.model.run", {"id": "m", "inputs": [[1, 1]]}),
        ):
            async with gate.http.request(method, path, json=body) as response:
                problem = await response.json(content_type=None)
            assert response.status == 503, problem
            assert int(response.headers["Retry-After"]) >= 1
            assert (problem["state"], problem["host"]) == (stage, "test-host")
            assert problem.get("progress") == (0.25 if stage == "fetching" else None)
        (told,) = await post(gate, "/v2/repository/index", {})
        assert (told["state"], told["reason"]) == ("LOADING", stage)
        assert not loading.done()
    finally:
        let_go.set()
        if stage == "queued":
            worker._memory._loading.release()
    assert (await loading)["version"] == "1"
    assert (await infer(gate))["outputs"][0]["data"] == [2]


def _served(gate, name, state):
    found = gate.parts.models.served(name, "1")
    return any(one.state == state and one.progress in {None, 0.25} for _, one in found)


async def test_what_was_loaded_is_ready_at_once_also_right_after_an_unloading(
    gate, candle, linear, monkeypatch
):
    """What was written down before it left, or before all names lead to it, is too little."""
    worker = await candle()
    await put(gate, linear())
    await load(gate, "m")
    bucket = worker._telling._bucket
    write, half, let_go = bucket.put, asyncio.Event(), asyncio.Event()

    async def late(_told, plugin, slot):
        await half.wait()
        told = worker._as_served()
        if not let_go.is_set():
            one = msgspec.structs.replace(told.models[0], names=["1"])
            await write(msgspec.structs.replace(told, models=[one]), plugin, slot)
            await let_go.wait()
        await write(told, plugin, slot)

    monkeypatch.setattr(bucket, "put", late)
    monkeypatch.setattr(models, "SEEN_S", 30.0)
    await post(gate, "/v2/repository/models/m/unload", {})
    loading = asyncio.create_task(load(gate, "m"))
    await until(lambda: [worker._models["m"].names(v) for v in worker._versions()] == [NAMES])
    assert (await infer(gate))["outputs"][0]["data"] == [2]
    assert not loading.done()
    half.set()
    await until(lambda: not gate.parts.models.answers("m", "default"))
    await gate.json("/v2/models/m/ready", 503)
    assert not loading.done()
    let_go.set()
    assert (await loading)["version"] == "1"
    assert (await gate.json("/v2/models/m/ready"))["ready"]


async def test_what_the_capability_has_loaded_is_ready_for_whoever_asks_the_protocol(
    gate, candle, linear
):
    await candle()
    await put(gate, linear())
    for _ in range(12):
        await gate.post("/api/capabilities/candle.model.unload", {"id": "m"})
        await gate.json("/v2/models/m/ready", 404)
        await gate.post("/api/capabilities/candle.model.load", {"id": "m"})
        assert (await gate.json("/v2/models/m/ready"))["ready"]


async def test_other_bytes_for_a_version_are_409_and_what_to_do_instead_works(gate, candle):
    def file(path, bias):
        content = json.dumps({"input_dim": 2, "output_dim": 1, "weights": [1, 1], "bias": [bias]})
        return {f"file:{path}": base64.b64encode(content.encode()).decode(), "config": "{}"}

    await candle()
    await load(gate, **file("1/model.json", 0))
    problem = await load(gate, status=409, **file("1/model.json", 1))
    assert problem["error"].endswith("give these another version: the next free number is 2")
    assert (await load(gate, **file("2/model.json", 1)))["version"] == "2"
    # Without a version it takes the place of what is served, as a file does in Triton.
    assert (await load(gate, **file("model.json", 2)))["version"] == "3"
    assert [one["version"] for one in await post(gate, INDEX, {"ready": True})] == ["3"]


async def test_no_rows_in_are_no_rows_out(gate, candle, linear):
    await candle()
    await put(gate, linear())
    nothing = {"name": "inputs", "datatype": "FP32", "shape": [0, 2], "data": []}
    (output,) = (await post(gate, "/v2/models/m/infer", {"inputs": [nothing]}))["outputs"]
    assert (output["shape"], output["data"]) == ([0, 1], [])


async def test_the_configuration_says_how_many_runs_go_on_at_the_same_time(gate, candle, linear):
    worker = await candle(threads=1)
    worker._around = replace(worker._around, processors=4.0)
    await put(gate, linear())
    (told,) = (await gate.json("/v2/models/m/stats"))["model_stats"]
    (group,) = (await gate.json("/v2/models/m/config"))["instance_group"]
    assert group["count"] == told["instances"] == 4


async def test_a_model_is_not_ready_whose_only_instance_was_killed(gate, client, candle, linear):
    worker = await candle()
    await put(gate, linear())
    assert (await gate.json("/v2/models/m/ready"))["ready"]
    # As the supervisor does; what the instance wrote down of its models expires later.
    await client.store.instances.delete("candle", 0)
    await until(lambda: not gate.parts.view.registrations())
    problem = await gate.json("/v2/models/m/ready", 503)
    assert (problem["state"], problem["host"]) == ("unreachable", worker._instance.host)


async def test_a_version_that_cannot_be_loaded_leaves_the_model_ready(gate, client, candle, linear):
    await candle()
    await put(gate, linear())
    await until(lambda: gate.parts.models.answers("m", "default"))
    spec = (await client.store.models.get("m")).value
    old = msgspec.structs.replace(spec.versions[0], wanted=False)
    new = msgspec.structs.replace(spec.versions[0], version="2", checksum="0" * 64)
    await client.store.models.put(msgspec.structs.replace(spec, versions=[old, new]), "m")
    await until(lambda: any(o.state == "failed" for _, o in gate.parts.models.served("m", "2")))
    # The old one answers, and so the model is ready; the new version itself is not.
    assert (await infer(gate))["model_version"] == "1"
    assert (await gate.json("/v2/models/m/ready"))["ready"]
    problem = await gate.json("/v2/models/m/versions/2/ready", 503)
    assert (problem["state"], "000000" in problem["detail"]) == ("failed", True)
    told = await post(gate, "/v2/repository/index", {})
    assert ("2", "UNAVAILABLE") in {(one["version"], one["state"]) for one in told}


# --- Not there ------------------------------------------------------------------------------------

ODD = ["a b", "a.b", "a/b", "a=b", "ö", "日本", "a=20b", "..", ".", "*", ">", "a*b", "%00", "\x00",
       "\n", "a?b", "a#b", "x" * 129, "x" * 5_000, "ö" * 1_300]  # fmt: skip


@pytest.mark.parametrize("name", ODD, ids=range(len(ODD)))
async def test_a_model_that_is_not_there_is_404_at_once_whatever_it_is_called(gate, candle, name):
    await candle()
    quoted = quote(name, safe="").replace(".", "%2E")
    for path in (f"/v2/models/{quoted}/infer", f"/v2/models/m/versions/{quoted}/infer"):
        problem = await post(gate, path, ONES, 404)
        assert "loaded or not; there are: none" in problem["error"]
    for path in ("", "/ready", "/config", "/stats", "/versions/1/ready"):
        async with gate.http.get(URL(f"/v2/models/{quoted}{path}", encoded=True)) as response:
            assert response.status == 404
    # And the gateway goes on.
    assert (await gate.json("/v2/health/ready"))["ready"]


@pytest.mark.parametrize("name", ["a b", "a.b", "ö", "日本", "a:b@c+d-e", "x" * 128])
async def test_a_model_is_served_whatever_it_may_be_called(gate, candle, linear, name):
    await candle()
    await put(gate, linear(), name)
    assert (await infer(gate, name))["model_name"] == name
    quoted = quote(name, safe="")
    async with gate.http.get(URL(f"/v2/models/{quoted}", encoded=True)) as response:
        assert (await response.json())["name"] == name
    await post(gate, f"/v2/repository/models/{quoted}/unload", {})
    problem = await infer(gate, name, 404)
    assert f"POST /v2/repository/models/{quoted}/load" in problem["error"]
    await load(gate, name)
    assert (await infer(gate, name))["model_name"] == name


@pytest.mark.parametrize("name", ["a/b", "a=b", "", "x" * 129, "\x00"])
async def test_a_name_that_no_model_can_have_is_refused_in_words(gate, candle, name):
    await candle()
    if name:
        problem = await load(gate, name, 400)
        assert "must be a name: letters, digits" in problem["error"]
    else:
        await load(gate, name, 404)


async def test_what_is_not_there_says_what_is_and_what_to_do(gate, candle, linear):
    await candle()
    await put(gate, linear())
    problem = await post(gate, "/v2/models/m/versions/9/infer", ONES, 404)
    assert problem["error"] == "model 'm' has no version '9'; it has: 1"
    await post(gate, "/v2/repository/models/m/unload", {})
    for path, body in (
        ("/v2/models/m/infer", ONES),
        ("/v2/models/m/versions/1/infer", ONES),
        ("/api/capabilities/candle.model.run", {"id": "m", "inputs": [[1, 1]]}),
    ):
        problem = await post(gate, path, body, 404)
        assert "POST /v2/repository/models/m/load loads it" in problem["detail"]


# --- Two instances --------------------------------------------------------------------------------


async def test_two_instances_are_one_model_and_their_statistics_one_sum(gate, candle, linear):
    first = await candle(0)
    await put(gate, linear())
    second = await candle(1)
    await until(lambda: len(list(gate.parts.models.served("m", "1"))) == 2)
    await asyncio.gather(*(infer(gate) for _ in range(60)))
    await post(gate, "/v2/models/m/infer", b"nonsense", 400)
    own = [version_of(one).counted() for one in (first, second)]
    (told,) = (await gate.json("/v2/models/m/stats"))["model_stats"]
    assert told["inference_count"] == sum(one.inference_count for one in own) == 60
    assert told["inference_stats"]["success"]["count"] == 60
    assert told["inference_stats"]["fail"]["count"] == 1
    assert told["failures"] == {"invalid-request": 1}
    assert told["threads"] == sum(one.threads for one in own) >= 2
    runs = sum(batch["compute_infer"]["count"] for batch in told["batch_stats"])
    assert runs == told["execution_count"]
    (everything,) = (await gate.json("/v2/models/stats"))["model_stats"]
    assert everything["inference_count"] == 60


async def test_a_model_is_ready_while_one_instance_serves_it(gate, candle, linear):
    await candle(0)
    await put(gate, linear())
    second = await candle(1, ready=False)
    await until(lambda: len(list(gate.parts.models.served("m", "1"))) == 2)
    await until(lambda: second._models["m"].settled)
    second._models["m"].cool(version_of(second), "for the test")
    await until(lambda: version_of(second).state == "cold")
    told = await post(gate, "/v2/repository/index", {"ready": True})
    assert told == [{"name": "m", "version": "1", "state": "READY"}]
    assert {(await infer(gate))["outputs"][0]["data"][0] for _ in range(20)} == {2}


async def test_a_full_queue_is_429_with_the_setting_and_another_instance_is_asked_first(
    gate, candle, linear
):
    first = await candle(0, max_waiting_rows=1)
    await put(gate, linear())
    async with held(first) as ran:
        asked = [asyncio.create_task(infer(gate))]
        await until(lambda: ran)
        asked.append(asyncio.create_task(infer(gate)))
        await until(lambda: version_of(first).rows_waiting == 1)
        async with gate.http.post("/v2/models/m/infer", json=ONES) as response:
            problem = await response.json(content_type=None)
        assert response.status == 429
        assert int(response.headers["Retry-After"]) >= 1
        assert "the queue of model 'm' version '1' is full" in problem["error"]
        assert "max_waiting_rows allows 1" in problem["error"]
        # With room elsewhere the caller does not hear of it.
        second = await candle(1)
        await until(lambda: second._models["m"].settled)
        found = []
        for _ in range(20):
            async with gate.http.post("/v2/models/m/infer", json=ONES) as response:
                found.append(response.status)
        # Until the other one has answered once it is found by chance; then by everybody.
        assert 200 in found
        assert set(found[found.index(200) :]) == {200}
        assert version_of(first).counted().failures["overloaded"] > 2
    await asyncio.gather(*asked)


# --- Callers that leave, are late, or send too much -----------------------------------------------


async def test_a_caller_that_hangs_up_is_not_run_and_counted_so(gate, candle, linear):
    worker = await candle()
    await put(gate, linear())
    async with held(worker) as ran:
        first = asyncio.create_task(infer(gate))
        await until(lambda: ran)
        gone = asyncio.create_task(infer(gate))
        await until(lambda: version_of(worker).rows_waiting == 1)
        gone.cancel()
        await until(lambda: version_of(worker).rows_waiting == 0)
        (told,) = (await gate.json("/v2/models/m/stats"))["model_stats"]
        assert told["failures"] == {"cancelled": 1}
    await first
    assert (len(ran), version_of(worker).counted().inference_count) == (1, 1)
    assert (gate.parts.relaying, gate.parts.relaying_bytes) == (0, 0)


@pytest.mark.parametrize("how", ["query", "header"])
@pytest.mark.parametrize("path", ["/v2/models/m/infer", "/api/capabilities/candle.model.run"])
async def test_a_deadline_is_kept_and_what_is_late_never_runs(gate, candle, linear, path, how):
    worker = await candle()
    await put(gate, linear())
    body = ONES if path.startswith("/v2") else {"id": "m", "inputs": [[1, 1]]}
    async with held(worker) as ran:
        first = asyncio.create_task(infer(gate))
        await until(lambda: ran)
        late, headers = f"{path}?timeout=0.2", {}
        if how == "header":
            late, headers = path, {"X-Timeout-Seconds": "0.2"}
        await post(gate, late, body, 504, headers)
        await until(lambda: version_of(worker).rows_waiting == 0)
    await first
    assert (len(ran), version_of(worker).counted().inference_count) == (1, 1)


@pytest.mark.parametrize(
    "path", ["/v2/models/m/infer", "/v2/repository/models/m/load", "/v2/repository/index"]
)
async def test_a_small_body_that_inflates_beyond_the_limit_is_413(gate, path):
    bomb = gzip.compress(bytes(100_000_000), 9)
    headers = {"Content-Encoding": "gzip"}
    async with gate.http.post(path, data=io.BytesIO(bomb), headers=headers) as response:
        assert response.status == 413, await response.text()
        # The rest is not even inflated: what is not read to its end ends the connection.
        assert response.headers["Connection"] == "close"
    headers["Connection"] = "close"
    async with gate.http.post(path, data=io.BytesIO(b"no gzip"), headers=headers) as response:
        assert response.status == 400, await response.text()
    assert (gate.parts.relaying, gate.parts.relaying_bytes) == (0, 0)


@pytest.mark.parametrize(
    ("method", "path", "expect", "status"),
    [
        ("POST", "/nowhere", "", 404),
        ("GET", "/livez", "", 200),
        ("POST", "/v2/models/m/infer", "", 401),
        ("POST", "/nowhere", "a miracle", 417),
    ],
)
async def test_what_nobody_reads_is_not_inflated_either(gate, method, path, expect, status):
    """Three such bodies held up everybody for seconds, and needed no key."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gate.parts.port)
    bomb = gzip.compress(bytes(100_000_000), 9)
    head = [f"{method} {path} HTTP/1.1", "Host: localhost", "Content-Encoding: gzip"]
    head += [f"Content-Length: {len(bomb) + 1}", *([f"Expect: {expect}"] if expect else [])]
    writer.write("\r\n".join([*head, "", ""]).encode() + bomb[:1_000])
    async with asyncio.timeout(5):
        answer = (await reader.readuntil(b"\r\n\r\n")).decode()
        # No sooner than the whole of it had come, or after ten seconds.
        await reader.read()
    assert f" {status} " in answer.splitlines()[0]
    assert "connection: close" in answer.lower()
    writer.close()


@pytest.mark.parametrize("encoding", ["x-gzip", "gzip, gzip", "compress"])
async def test_a_body_that_is_compressed_in_another_way_is_refused_in_words(
    gate, candle, linear, encoding
):
    await candle()
    await put(gate, linear())
    problem = await post(gate, "/v2/models/m/infer", b"x", 400, {"Content-Encoding": encoding})
    assert problem["error"].startswith(f"Content-Encoding is '{encoding}'; gzip, deflate")
    assert problem["error"].endswith(" are taken, one of them")
    assert problem["field"] == "Content-Encoding"


async def test_bodies_that_come_in_pieces_count_as_large_as_they_turn_out_to_be(
    gate, candle, linear, monkeypatch
):
    worker = await candle()
    await put(gate, linear())
    size = len(json.dumps(ONES))
    monkeypatch.setattr(inference, "RELAYING_MAX_BYTES", 2 * size + 10)

    async def pieces():
        yield json.dumps(ONES).encode()

    async with held(worker) as ran:
        asked = [asyncio.create_task(_send(gate, pieces())) for _ in range(2)]
        await until(lambda: ran and gate.parts.relaying_bytes == 2 * size)
        assert await _send(gate, pieces()) == 429
        assert gate.parts.relaying_bytes == 2 * size
    assert await asyncio.gather(*asked) == [200, 200]
    assert (gate.parts.relaying, gate.parts.relaying_bytes) == (0, 0)


async def _send(gate, body):
    async with gate.http.post("/v2/models/m/infer", data=body) as response:
        return response.status


@pytest.mark.parametrize("path", ["/v2/repository/models/m/load", "/v2/repository/index"])
async def test_whatever_the_body_is_it_is_read_or_refused(gate, path):
    for body in (b"[", b"[]", b"{", b"\xff", b'{"parameters": 1, "ready": 1}',
                 b'{"parameters": {"a": ' + b"[" * 100_000, b"null"):  # fmt: skip
        problem = await post(gate, path, body, 400)
        assert "the body cannot be read" in problem["error"]


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v2/models/m/infer"), ("PUT", "/v2/models/m"), ("GET", "/v2/repository/index"),
     ("DELETE", "/v2/repository/models/m/load"), ("POST", "/v2/models/m/ready")],
)  # fmt: skip
async def test_a_wrong_method_is_405_and_says_which_is_right(gate, method, path):
    async with gate.http.request(method, path) as response:
        problem = await response.json(content_type=None)
    assert response.status == 405
    assert problem["error"].endswith(response.headers["Allow"])


async def test_head_answers_as_get_without_a_body(gate, candle, linear):
    await candle()
    await put(gate, linear())
    for path, status in (("/v2/models/m", 200), ("/v2/models/nobody", 404), ("/v2", 200)):
        async with gate.http.head(path) as response:
            assert response.status == status
            assert int(response.headers["Content-Length"]) > 0
            assert await response.read() == b""

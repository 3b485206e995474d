"""candle's own HTTP on the loopback interface: the contract's rows, and what it refuses."""

import asyncio
import io
import json

import pytest
import pytest_asyncio
from aiohttp import ClientSession

from bus import messages as m
from bus.subjects import CANDLE_STATS, MODEL_LOAD, MODEL_RUN
from bus.testing import until

JSON = {"Content-Type": "application/json"}


@pytest_asyncio.fixture
async def candle(client, worker, linear):
    """A worker that serves the model `m`, the sum of two numbers."""
    async with worker() as one:
        await client.call(MODEL_LOAD, m.LoadModel(id="m", path=linear()))
        yield one


@pytest_asyncio.fixture
async def http(candle):
    port = candle._instance._registration.port
    async with ClientSession(f"http://127.0.0.1:{port}") as session:
        yield session


async def get(http, path: str, status: int = 200):
    async with http.get(path) as response:
        assert response.status == status, await response.text()
        return await response.json(content_type=None)


async def run(http, body: object, status: int = 200, name: str = "m"):
    data = io.BytesIO(body if isinstance(body, bytes) else json.dumps(body).encode())
    async with http.post(f"/models/{name}/run", data=data, headers=JSON) as response:
        assert response.status == status, await response.text()
        return await response.json(content_type=None)


async def test_health_counts_the_loaded_models(client, http, linear):
    assert await get(http, "/health") == {"status": "ok", "loaded_models": 1}
    await client.call(MODEL_LOAD, m.LoadModel(id="n", path=linear()))
    assert await get(http, "/health") == {"status": "ok", "loaded_models": 2}


async def test_models_are_told_as_by_stats(client, http):
    told = await get(http, "/models")
    assert [model["id"] for model in told["models"]] == ["m"]
    assert (told["models"][0]["input_dim"], told["models"][0]["output_dim"]) == (2, 1)
    over_the_bus = await client.relay(CANDLE_STATS.subject(client.root), b"")
    assert told == json.loads(over_the_bus.body)


async def test_a_run_answers_as_over_the_bus(client, http):
    here = await run(http, {"inputs": [[1, 2], [3, 4]]})
    there = await client.call(MODEL_RUN, m.RunModel(id="m", inputs=[[1, 2], [3, 4]]))
    assert here["outputs"] == there.outputs == [[3], [7]]
    assert (here["id"], here["checksum"]) == ("m", there.checksum)
    assert here["execution_ms"] > 0
    # Both were one request to the model.
    assert (await get(http, "/models"))["models"][0]["requests"] == 2


async def test_a_model_whose_name_needs_escaping_is_run(client, http, linear):
    await client.call(MODEL_LOAD, m.LoadModel(id="a b@1", path=linear()))
    assert (await run(http, {"inputs": [[1, 2]]}, name="a%20b@1"))["id"] == "a b@1"


@pytest.mark.parametrize(
    ("name", "body", "says"),
    [
        ("nobody", {"inputs": [[1, 2]]}, "there is no model 'nobody' here; loaded are: m"),
        ("m", {"inputs": []}, "there is no row"),
        ("m", {}, "inputs"),
        ("m", {"inputs": [[1, 2], [1]]}, "dimension mismatch: expected 2 columns, got 1"),
        ("m", {"inputs": [[1, 1e39]]}, "inputs[0][1]"),
        ("m", {"inputs": [[3e38, 3e38]]}, "not finite"),
        ("m", {"inputs": "x"}, "inputs"),
        ("m", {"id": "other", "inputs": [[1, 2]]}, "id: the path says 'm'"),
        ("m", b"no JSON", "the body is not JSON"),
        ("%7F", {"inputs": [[1, 2]]}, "id: must be a name"),
    ],
)
async def test_whatever_the_caller_could_mend_is_400_with_a_sentence(http, name, body, says):
    problem = await run(http, body, 400, name)
    assert says in problem["detail"]
    assert problem["status"] == 400


async def test_a_model_that_was_replaced_is_run_by_its_successor(client, http, linear, candle):
    await client.call(MODEL_LOAD, m.LoadModel(id="m", path=linear(weights=[10, 10])))
    assert (await run(http, {"inputs": [[1, 2]]}))["outputs"] == [[30]]
    # And it is still found by whoever asks the service protocol.
    said = await client._nc.request(f"$SRV.STATS.candle.{candle._instance.id}", timeout=5)
    subjects = [endpoint["subject"] for endpoint in json.loads(said.data)["endpoints"]]
    assert MODEL_RUN.subject(client.root, "m") in subjects


async def test_many_at_once_get_their_own_answers(http):
    replies = await asyncio.gather(*(run(http, {"inputs": [[n, 1]]}) for n in range(40)))
    assert [reply["outputs"] for reply in replies] == [[[n + 1]] for n in range(40)]


async def test_nothing_but_a_run_is_taken(http):
    for method, path, status in (
        ("GET", "/models/m/run", 405),
        ("POST", "/models", 405),
        ("GET", "/models/m", 404),
        ("DELETE", "/models/m/run", 405),
    ):
        async with http.request(method, path, headers=JSON) as response:
            assert response.status == status


async def test_paths_leave_with_the_service(client, worker):
    async with worker() as candle:
        probes = candle._instance._probes
        assert len(probes._added) == 3
    await until(lambda: not probes._added)

"""What Prometheus reads of models on the loopback port."""

import asyncio
import json

import msgspec
import pytest
from aiohttp import ClientSession
from prometheus_client.parser import text_string_to_metric_families

from bus import messages as m
from bus.errors import BusError
from bus.subjects import MODEL_INFER, MODEL_LOAD, MODEL_RUN
from bus.testing import until

Samples = dict[tuple[str, ...], float]


async def scraped(candle) -> Samples:
    """Return every sample of models, by name and labels; each set of labels may be there once."""
    url = f"http://127.0.0.1:{candle._instance._registration.port}/metrics"
    async with ClientSession() as http, http.get(url) as response:
        assert response.status == 200
        text = await response.text()
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("bkg_model_"):
                labels = {k: v for k, v in sample.labels.items() if k not in {"plugin", "slot"}}
                key = (sample.name.removeprefix("bkg_model_"), *labels.values())
                assert key not in found, key
                found[key] = sample.value
    return found


async def load(client, path=None, version=None, name="m", **config) -> None:
    wanted = m.ModelConfig(**config) if config else None
    ask = m.LoadModel(id=name, path=path, version=version, config=wanted)
    await client.call(MODEL_LOAD, ask, timeout_s=30)


async def test_requests_rows_runs_and_failures_of_each_version_are_counted(client, worker, linear):
    async with worker() as candle:
        await load(client, linear("a.json"), "1", max_batch_rows=1, threads=2)
        await load(client, linear("b.json"), "2")
        rows = [[1, 1]] * 3
        for _ in range(4):
            await client.call(MODEL_RUN, m.RunModel(id="m", inputs=rows))
        body = {"inputs": [{"name": "inputs", "datatype": "FP32", "shape": [1, 2], "data": [1, 1]}]}
        subject = MODEL_INFER.subject(client.root, "m", "1")
        await client.relay(subject, json.dumps(body).encode())
        with pytest.raises(BusError):
            await client.relay(subject, b"nonsense")
        found = await scraped(candle)
    assert (found["requests_total", "m", "2"], found["rows_total", "m", "2"]) == (4, 12)
    assert found["runs_total", "m", "2"] == 4
    assert (found["requests_total", "m", "1"], found["rows_total", "m", "1"]) == (1, 1)
    assert found["failures_total", "invalid-request", "m", "1"] == 1
    assert ("failures_total", "invalid-request", "m", "2") not in found
    assert (found["ready", "m", "1"], found["ready", "m", "2"]) == (1, 1)
    assert found["threads", "m", "1"] == 2
    assert found["rows_waiting", "m", "1"] == 0
    assert found["memory_bytes", "m", "1"] > 0
    assert found["compute_seconds_total", "m", "2"] > 0
    assert found["queue_seconds_total", "m", "2"] > 0


@pytest.mark.parametrize("name", ["a b", "ö.x", "a:b@c+d", "日本"])
async def test_names_that_are_no_plain_words_are_labels_as_they_are(client, worker, linear, name):
    async with worker() as candle:
        await load(client, linear(), "v-1.0", name)
        await client.call(MODEL_RUN, m.RunModel(id=name, inputs=[[1, 1]]))
        assert (await scraped(candle))["requests_total", name, "v-1.0"] == 1


async def test_a_version_that_is_here_twice_has_one_line_of_each(client, worker, linear):
    async with worker() as candle:
        await load(client, linear())
        await client.call(MODEL_RUN, m.RunModel(id="m", inputs=[[1, 1]]))
        # Wanted by somebody whose host has a provider that this one lacks: the old one serves on.
        spec = (await client.store.models.get("m")).value
        other = msgspec.structs.replace(
            spec.versions[0], config=m.ModelConfig(provider="cuda"), wanted_at=m.now()
        )
        await client.store.models.put(msgspec.structs.replace(spec, versions=[other]), "m")
        await until(lambda: {"ready", "failed"} == {v.state for v in candle._versions()})
        found = await scraped(candle)
        assert (found["requests_total", "m", "1"], found["ready", "m", "1"]) == (1, 1)


async def test_it_can_be_read_at_any_moment_while_models_come_and_go(client, worker, linear):
    async with worker() as candle:
        await load(client, linear())

        async def change() -> None:
            for number in range(8):
                await load(client, threads=1 + number % 2)

        changing = asyncio.create_task(change())
        while not changing.done():
            assert ("ready", "m", "1") in await scraped(candle)
        await changing

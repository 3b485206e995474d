"""candle as callers see it: load, run, stats, unload, on one replica and on several."""

import asyncio
import hashlib

import pytest
from onnx import TensorProto, helper, save

from bus import codec
from bus import messages as m
from bus.errors import (
    BusError,
    InvalidRequest,
    NotFound,
    Unavailable,
    Unprocessable,
)
from bus.subjects import CANDLE_STATS, MODEL_LOAD, MODEL_RUN, MODEL_UNLOAD
from bus.testing import until
from services.candle import service
from services.candle.settings import CandleSettings


async def load(client, path: str, name: str = "m") -> m.LoadedModel:
    return await client.call(MODEL_LOAD, m.LoadModel(id=name, path=path))


async def run(client, inputs, name: str = "m") -> m.ModelOutput:
    return await client.call(MODEL_RUN, m.RunModel(id=name, inputs=inputs))


async def test_a_linear_model_is_loaded_and_gives_the_right_numbers(client, worker, models_dir):
    async with worker():
        loaded = await load(client, "linear-demo.json")
        assert (loaded.input_dim, loaded.output_dim, loaded.format) == (3, 2, "linear")
        content = (models_dir / "linear-demo.json").read_bytes()
        assert loaded.checksum == hashlib.sha256(content).hexdigest()
        assert loaded.path == "linear-demo.json"
        assert loaded.metadata["name"] == "linear-demo"
        reply = await run(client, [[1, 2, 3], [0, 0, 0]])
    assert reply.outputs == [[6, -1.5], [0, 0.5]]
    assert reply.execution_ms > 0


async def test_the_iris_classifier_names_flowers(client, worker):
    async with worker():
        loaded = await load(client, "iris.onnx")
        assert (loaded.input_dim, loaded.output_dim, loaded.format) == (4, 3, "onnx")
        reply = await run(client, [[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3]])
    assert reply.named["species"] == [0, 2]
    assert reply.outputs[0][0] == pytest.approx(0.998, abs=2e-3)
    assert reply.outputs[1][2] == pytest.approx(0.998, abs=2e-3)


async def test_outputs_that_are_no_rows_of_numbers_come_by_name(client, worker, models_dir):
    """One model that gives the sum of all values, a scalar, and the input again as text."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])
    outputs = [
        helper.make_tensor_value_info("text", TensorProto.STRING, ["n", 2]),
        helper.make_tensor_value_info("total", TensorProto.FLOAT, []),
    ]
    nodes = [
        helper.make_node("Cast", ["x"], ["text"], to=TensorProto.STRING),
        helper.make_node("ReduceSum", ["x"], ["total"], keepdims=0),
    ]
    graph = helper.make_graph(nodes, "g", [x], outputs)
    opsets = [helper.make_opsetid("", 17)]
    save(helper.make_model(graph, opset_imports=opsets, ir_version=8), models_dir / "t.onnx")
    async with worker():
        await load(client, "t.onnx")
        reply = await run(client, [[1, 2], [3, 4]])
    assert reply.outputs == [[10]]
    assert reply.named == {"text": [["1", "2"], ["3", "4"]], "total": 10}


@pytest.mark.parametrize("length", [1, 2])
async def test_a_model_that_takes_a_fixed_number_of_rows_takes_more_in_steps(
    client, worker, models_dir, length
):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [length, 2])
    outputs = [
        helper.make_tensor_value_info("double", TensorProto.FLOAT, [length, 2]),
        helper.make_tensor_value_info("total", TensorProto.FLOAT, []),
    ]
    nodes = [
        helper.make_node("Add", ["x", "x"], ["double"]),
        helper.make_node("ReduceSum", ["x"], ["total"], keepdims=0),
    ]
    graph = helper.make_graph(nodes, "g", [x], outputs)
    opsets = [helper.make_opsetid("", 17)]
    save(helper.make_model(graph, opset_imports=opsets, ir_version=8), models_dir / "fixed.onnx")
    async with worker():
        await load(client, "fixed.onnx")
        reply = await run(client, [[1, 2], [3, 4], [5, 6], [7, 8]])
        assert reply.outputs == [[2, 4], [6, 8], [10, 12], [14, 16]]
        assert reply.named["total"] == ([3, 7, 11, 15] if length == 1 else [10, 26])
        if length == 2:
            with pytest.raises(InvalidRequest, match=r"shape \[1, 2\], the model takes \[2, 2\]"):
                await run(client, [[1, 2], [3, 4], [5, 6]])


async def test_stats_list_what_is_loaded(client, worker, linear):
    async with worker():
        assert (await client.call(CANDLE_STATS, m.Empty())).models == []
        await load(client, linear(), "b")
        await load(client, linear(), "a")
        await run(client, [[1, 2], [3, 4]], "a")
        stats = await client.call(CANDLE_STATS, m.Empty())
    assert [(s.id, s.requests, s.rows) for s in stats.models] == [("a", 1, 2), ("b", 0, 0)]


async def test_stats_tell_threads_and_failures_and_threads_are_a_share_of_the_processors(
    client, worker, linear, monkeypatch
):
    monkeypatch.setattr(service, "allowed", lambda: (6.0, 1 << 30))
    async with worker():
        ask = m.LoadModel(id="own", path=linear(), config=m.ModelConfig(threads=5))
        await client.call(MODEL_LOAD, ask)
        assert (await load(client, linear(), "second")).threads == 3
        assert (await load(client, linear(), "third")).threads == 2
        for _ in range(2):
            with pytest.raises(InvalidRequest):
                await run(client, [[1, 2, 3]], "third")
        await run(client, [[1, 2]], "third")
        stats = await client.call(CANDLE_STATS, m.Empty())
    assert {one.id: one.threads for one in stats.models} == {"own": 5, "second": 3, "third": 2}
    counted = {one.name: one for one in stats.model_stats}
    assert {name: one.threads for name, one in counted.items()} == {
        "own": 5, "second": 3, "third": 2,
    }  # fmt: skip
    third = counted["third"]
    assert third.failures == {"invalid-request": 2}
    told = third.inference_stats
    assert (told.success.count, told.fail.count, told.queue.count) == (1, 2, 1)
    assert told.compute_infer.ns > 0
    assert [one.batch_size for one in third.batch_stats] == [1]


async def test_telemetry_tells_how_large_batches_are_and_what_waits(client, worker, linear):
    async with worker() as candle:
        await load(client, linear())
        gauges = candle._instance.gauges
        await run(client, [[1, 2], [3, 4], [5, 6]])
        await until(lambda: "batch_rows" in gauges)
        assert (gauges["batch_rows"], gauges["rows_waiting"]) == (3, 0)
        assert candle._instance.counts["models_loaded"] == 1
        assert (gauges["model.m.requests"], gauges["model.m.batch_rows"]) == (1, 3)
        await client.call(MODEL_UNLOAD, m.UnloadModel(id="m"))
        await until(lambda: "model.m.requests" not in gauges)


async def test_a_new_file_under_the_same_name_takes_over(client, worker, linear):
    async with worker():
        await load(client, linear())
        assert (await run(client, [[1, 2]])).outputs == [[3]]
        await load(client, linear(weights=[10, 10]))
        assert (await run(client, [[1, 2]])).outputs == [[30]]
        assert len((await client.call(CANDLE_STATS, m.Empty())).models) == 1


async def test_no_request_is_lost_while_a_model_is_replaced(client, worker, linear):
    async with worker():
        await load(client, linear())
        stop = False
        sums: set[float] = set()

        async def keep_asking() -> None:
            while not stop:
                sums.add((await run(client, [[1, 2]])).outputs[0][0])

        callers = [asyncio.create_task(keep_asking()) for _ in range(8)]
        for factor in range(2, 7):
            await load(client, linear(weights=[factor, factor]))
        sums.add((await run(client, [[1, 2]])).outputs[0][0])
        stop = True
        await asyncio.gather(*callers)
    assert {3, 18} <= sums


async def test_every_replica_serves_what_one_was_asked_to_load(client, worker, linear):
    async with worker(0) as first, worker(1) as second:
        await load(client, linear())
        await until(lambda: "m" in first._models and "m" in second._models)
        await until(lambda: all(w._models["m"].settled for w in (first, second)))
        replies = await asyncio.gather(*(run(client, [[i, i]]) for i in range(60)))
    assert [reply.outputs for reply in replies] == [[[2 * i]] for i in range(60)]
    assert len({reply.instance for reply in replies}) == 2


async def test_a_replica_that_comes_later_serves_the_same_from_its_own_cache(
    client, worker, linear, models_dir
):
    async with worker(0):
        await load(client, linear())
    # Its host has no such file: the artefact comes from the broker.
    (models_dir / "m.json").unlink()
    async with worker(1):
        assert (await run(client, [[1, 2]])).outputs == [[3]]


async def test_an_unloaded_model_is_gone(client, worker, linear):
    async with worker():
        await load(client, linear())
        await client.call(MODEL_UNLOAD, m.UnloadModel(id="m"))
        with pytest.raises(Unavailable, match="nobody answers"):
            await run(client, [[1, 2]])
        with pytest.raises(NotFound, match="no model 'm'"):
            await client.call(MODEL_UNLOAD, m.UnloadModel(id="m"))


async def test_the_default_model_is_there_from_the_start(client, worker):
    async with worker(default_model="linear-demo.json"):
        await until(lambda: _served(client, "default"))
        assert (await run(client, [[1, 1, 1]], "default")).outputs == [[3, 0.5]]


async def _served(client, name: str) -> bool:
    return any(s.id == name for s in (await client.call(CANDLE_STATS, m.Empty())).models)


@pytest.mark.parametrize(
    ("inputs", "field", "says"),
    [
        ([], "inputs", "no row"),
        ([[1, 2], [1]], "inputs[1]", "expected 2 columns, got 1 in row 1"),
        ([[1, 2, 3]], "inputs[0]", "expected 2 columns, got 3"),
        ([[1, 1e300]], "inputs[0][1]", "no FP32"),
    ],
)
async def test_rows_that_do_not_fit_are_named(client, worker, linear, inputs, field, says):
    async with worker():
        await load(client, linear())
        with pytest.raises(InvalidRequest, match=says.replace("[", r"\[")) as raised:
            await run(client, inputs)
    assert raised.value.field == field


@pytest.mark.parametrize(
    ("path", "kind", "says"),
    [
        ("none.json", NotFound, "no file 'none.json'.*linear-demo.json"),
        ("../secret.json", InvalidRequest, "leaves the models folder"),
        ("/etc/passwd", InvalidRequest, "leaves the models folder"),
        ("link.json", InvalidRequest, "leaves the models folder"),
        ("a\0b", InvalidRequest, "cannot be the path"),
        ("x" * 500, InvalidRequest, "cannot be the path"),
        ("notes.txt", InvalidRequest, "served are .json, .onnx"),
        ("text.onnx", Unprocessable, "text.onnx is no ONNX model"),
        ("cut.onnx", Unprocessable, "cut.onnx is no ONNX model"),
        ("empty.onnx", Unprocessable, "empty.onnx is no ONNX model"),
        ("text.json", Unprocessable, "text.json is no linear model: .*not JSON"),
        ("list.json", Unprocessable, "Expected `object`"),
        ("short.json", Unprocessable, "weights length 1 does not match shape 1x2"),
        ("bias.json", Unprocessable, "bias length 2 does not match output dim 1"),
    ],
)
async def test_a_file_that_cannot_be_served_is_refused_with_a_reason(
    client, worker, linear, models_dir, path, kind, says
):
    (models_dir.parent / "secret.json").write_text("{}")
    (models_dir / "link.json").symlink_to(models_dir.parent / "secret.json")
    (models_dir / "notes.txt").write_text("hello")
    (models_dir / "text.onnx").write_text("I am not a model, I only say so. " * 40)
    (models_dir / "cut.onnx").write_bytes((models_dir / "iris.onnx").read_bytes()[:300])
    (models_dir / "empty.onnx").write_bytes(b"")
    (models_dir / "text.json").write_text("hello")
    (models_dir / "list.json").write_text("[]")
    linear("short.json", weights=[1])
    linear("bias.json", bias=[0, 0])
    async with worker():
        with pytest.raises(kind, match=says):
            await load(client, path)
        # Nothing of it is left behind, and the worker goes on.
        assert await client.store.models.all() == []
        assert (await load(client, linear("good.json"))).input_dim == 2


async def test_hostile_bodies_are_refused_and_the_worker_goes_on(client, worker, linear):
    async with worker():
        await load(client, linear())
        subject = MODEL_RUN.subject(client.root, "m")
        for body in (b"", b"{", b"[]", b'{"id":"m","inputs":3}', b"\xff" * 100, b"null"):
            with pytest.raises(InvalidRequest):
                await client.relay(subject, body)
        assert (await run(client, [[1, 2]])).outputs == [[3]]


def test_settings_name_what_is_unknown():
    with pytest.raises(InvalidRequest, match="unknown field `modelspath`"):
        codec.convert({"modelspath": "x"}, CandleSettings)


async def test_a_failed_default_model_does_not_stop_the_worker(client, worker):
    async with worker(default_model="none.json"):
        assert (await client.call(CANDLE_STATS, m.Empty())).models == []
        with pytest.raises(BusError):
            await run(client, [[1]], "default")

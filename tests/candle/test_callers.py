"""Callers that leave, that are late, that ask what cannot be, and that are too many."""

import asyncio
import json

import pytest
from onnx import TensorProto, helper, save

from bus import messages as m
from bus.errors import BusError, DeadlineExceeded, Overloaded
from bus.subjects import MODEL_INFER, MODEL_RUN
from bus.testing import until
from tests.candle.asking import ONES, held, infer, load, version_of


async def test_what_its_caller_gave_up_is_not_run_and_counted_so(client, worker, linear):
    async with worker() as candle:
        await load(client, linear())
        async with held(client, candle) as model:
            waiting = model.ask()
            await until(lambda: version_of(candle).rows_waiting == 1)
            waiting.cancel()
            await until(lambda: version_of(candle).rows_waiting == 0)
        counted = version_of(candle).counted()
        assert counted.failures == {"cancelled": 1}
        assert (model.ran, counted.inference_count) == ([1], 1)


@pytest.mark.parametrize("way", ["infer", "run"])
async def test_what_is_late_is_refused_in_time_and_never_run(client, worker, linear, way):
    async with worker() as candle:
        await load(client, linear())
        async with held(client, candle) as model:
            ask = m.RunModel(id="m", inputs=[[1, 1]])
            late = (
                infer(client, timeout_s=0.3)
                if way == "infer"
                else client.call(MODEL_RUN, ask, timeout_s=0.3)
            )
            with pytest.raises(DeadlineExceeded):
                await late
            await until(lambda: version_of(candle).rows_waiting == 0)
        counted = version_of(candle).counted()
        assert (model.ran, counted.inference_count) == ([1], 1)
        assert sum(counted.failures.values()) == 1


@pytest.mark.parametrize("fault", ["not finite", "not finite, rows", "too large"])
async def test_outputs_that_nobody_gets_are_a_failure_and_no_success(client, worker, linear, fault):
    subject = MODEL_INFER.subject(client.root, "m")
    width = 1_000
    path = linear(input_dim=1, output_dim=width, weights=[3e38] * width, bias=[0] * width)

    async def ask(value: float, rows: int = 1) -> None:
        if fault.endswith("rows"):
            await client.call(MODEL_RUN, m.RunModel(id="m", inputs=[[value]] * rows))
            return
        tensor = {"name": "inputs", "datatype": "FP32", "shape": [rows, 1], "data": [value] * rows}
        await client.relay(subject, json.dumps({"inputs": [tensor]}).encode(), timeout_s=30)

    async with worker() as candle:
        await load(client, path)
        await ask(0)
        with pytest.raises(BusError) as refused:
            await (ask(0, 10_000) if fault == "too large" else ask(10))
        counted = version_of(candle).counted()
    assert counted.failures == {refused.value.code: 1}
    assert refused.value.code == ("too-large" if fault == "too large" else "unprocessable")
    done = counted.inference_stats
    assert (done.success.count, done.queue.count, done.fail.count) == (1, 1, 1)
    assert done.fail.ns > 0
    assert counted.execution_count == 2


async def test_the_time_that_a_body_allows_is_kept_for_a_plain_client_too(client, worker, linear):
    subject = MODEL_INFER.subject(client.root, "m")
    late = json.dumps({**ONES, "parameters": {"timeout": 200_000}}).encode()
    async with worker() as candle:
        await load(client, linear())
        async with held(client, candle) as model:
            reply = await client._nc.request(subject, late, timeout=30)
            assert reply.headers["Nats-Service-Error-Code"] == "504"
            assert json.loads(reply.data)["code"] == "deadline-exceeded"
            # Held up all the time, it was not run; the one that runs goes on.
            assert (model.ran, version_of(candle).rows_waiting) == ([1], 0)
        in_time = json.dumps({**ONES, "parameters": {"timeout": 20_000_000}}).encode()
        reply = await client._nc.request(subject, in_time, timeout=30)
        assert json.loads(reply.data)["outputs"][0]["data"] == [2]
        assert version_of(candle).counted().failures == {"deadline-exceeded": 1}


async def test_a_bad_request_fails_alone_among_those_that_it_was_joined_with(
    client, worker, models_dir
):
    """Of a table with three rows some ask for others, in the same run as their neighbours."""
    table = helper.make_tensor("table", TensorProto.FLOAT, [3], [10, 20, 30])
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["inputs"], ["at"], to=TensorProto.INT64),
            helper.make_node("Gather", ["table", "at"], ["outputs"]),
        ],
        "g",
        [helper.make_tensor_value_info("inputs", TensorProto.FLOAT, ["n", 2])],
        [helper.make_tensor_value_info("outputs", TensorProto.FLOAT, ["n", 2])],
        [table],
    )
    opsets = [helper.make_opsetid("", 17)]
    save(helper.make_model(graph, opset_imports=opsets, ir_version=8), models_dir / "table.onnx")
    subject = MODEL_INFER.subject(client.root, "m")

    async def look_up(row: int) -> list[float] | str:
        body = json.dumps({"inputs": [{**ONES["inputs"][0], "data": [row, row]}]}).encode()
        try:
            reply = await client.relay(subject, body, timeout_s=60)
        except BusError as error:
            return error.code
        return json.loads(reply.body)["outputs"][0]["data"]

    rows = [0, 7, 1, 2, -9, 1, 99, 0]
    async with worker() as candle:
        await load(client, "table.onnx")
        async with held(client, candle) as model:
            asked = [asyncio.create_task(look_up(row)) for row in rows]
            await until(lambda: version_of(candle).rows_waiting == len(rows))
            model.gate.set()
            given = await asyncio.gather(*asked)
        assert model.ran[:2] == [1, len(rows)]
    expected = {0: [10, 10], 1: [20, 20], 2: [30, 30]}
    assert given == [expected.get(row, "unprocessable") for row in rows]


async def test_a_full_queue_names_itself_its_limit_and_the_setting(client, worker, linear):
    async with worker() as candle:
        await load(client, linear(), max_waiting_rows=2)
        async with held(client, candle) as model:
            model.ask()
            model.ask()
            await until(lambda: version_of(candle).rows_waiting == 2)
            says = r"model 'm' version '1' is full.*max_waiting_rows allows 2"
            with pytest.raises(Overloaded, match=says) as refused:
                await infer(client)
        assert refused.value.retry_after_s >= 1
        assert [await one for one in model.asked] == [2, 2, 2]

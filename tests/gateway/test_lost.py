"""Callers whose request is with a process that dies, with a real supervisor and real workers."""

import asyncio
import io
import json
import os
import signal
import time
from contextlib import AsyncExitStack, asynccontextmanager

import msgspec
import onnx
import psutil
import pytest
from onnx import TensorProto, helper

from bus import messages as m
from bus.instance import join
from bus.subjects import MODEL_INFER, MODEL_RUN, PLUGINS_RESTART
from bus.testing import until
from services.supervisor import catalogue
from services.supervisor.service import Supervisor
from tests.gateway.inferring import ONES, put

INFER, RUN = "/v2/models/m/infer", "/api/capabilities/candle.model.run"
DIVIDE = "/v2/models/divide/infer"
ASKED = 8
WITHIN_S = 2.0


def divided(one: int, by: int) -> dict[str, object]:
    numbers = {"a": one, "b": by}
    return {
        "inputs": [
            {"name": name, "datatype": "INT32", "shape": [1], "data": [value]}
            for name, value in numbers.items()
        ]
    }


BODIES = {INFER: ONES, RUN: {"id": "m", "inputs": [[1, 1]]}, DIVIDE: divided(4, 2)}


@pytest.fixture
async def fleet(gate, connected, settings):
    """Start processes of candle that serve `m`; a supervisor starts another for one that dies."""
    shipped = {one.name: one for one in catalogue.load(catalogue.SHIPPED)}
    models = settings.data_dir / "models"
    models.mkdir(parents=True)
    linear = {"input_dim": 2, "output_dim": 1, "weights": [1, 1], "bias": [0]}
    (models / "m.json").write_text(json.dumps(linear))

    @asynccontextmanager
    async def start(replicas):
        own = await connected()
        config = msgspec.structs.replace(shipped["candle"], replicas=replicas)
        await catalogue.seed(own.store, [config])
        joining = join(own, settings, plugin="supervisor", description="a test", listed=False)
        async with joining as instance:
            supervising = asyncio.create_task(Supervisor(own, instance, settings).run())
            try:
                await until(lambda: all_run(gate), 60)
                await put(gate, "m.json")
                await until(lambda: ready(gate) == replicas, 30)
                yield
            finally:
                supervising.cancel()
                await asyncio.gather(supervising, return_exceptions=True)

    async with AsyncExitStack() as running:

        async def fleet(replicas=1):
            await running.enter_async_context(start(replicas))

        yield fleet


def all_run(gate) -> bool:
    state = gate.parts.view.get("candle")
    return state is not None and state.status == "running"


def ready(gate, model="m") -> int:
    return sum(one.state == "ready" for _, one in gate.parts.models.served(model, "1"))


def pid_of(gate, slot=0) -> int:
    [place] = [one for one in gate.parts.view.get("candle").instances if one.slot == slot]
    return place.pid


async def ask(gate, path=INFER, body=None):
    """Return status, headers, body, and when they came."""
    body = body or BODIES[path]
    async with gate.http.post(path, data=io.BytesIO(json.dumps(body).encode())) as answer:
        return answer.status, answer.headers, await answer.json(content_type=None), time.monotonic()


def asking(gate, count, path=INFER):
    return [asyncio.create_task(ask(gate, path)) for _ in range(count)]


def waiting(gate) -> int:
    return len(gate.parts.client._replies._waiting)


def in_flight(gate, endpoint=MODEL_INFER, model="m") -> dict[str, int]:
    balance = gate.parts.client._asker.balance
    found = balance._subjects.get(endpoint.subject(gate.parts.client.root, model))
    return {name: slot.in_flight for name, slot in found.slots.items()} if found else {}


async def both_known(gate, path=INFER) -> None:
    async with asyncio.timeout(30):
        while len(in_flight(gate, model=path.split("/")[3])) < 2:
            await ask(gate, path)


def nothing_is_left(gate) -> bool:
    parts, asker = gate.parts, gate.parts.client._asker
    left = [*in_flight(gate).values(), *in_flight(gate, MODEL_RUN).values()]
    return not (waiting(gate) or any(left) or asker.late._due or asker.working or parts.relaying)


@asynccontextmanager
async def stopped(*pids: int):
    """Have processes stand still while inside, so that they keep what they are asked."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGCONT)


def check_lost(outcomes, killed_at, slot=0):
    for status, headers, body, at in outcomes:
        assert status == 503, body
        assert headers["Retry-After"] == "2"
        assert (body["state"], body["host"]) == ("ended", "test-host")
        assert "SIGKILL" in body["reason"]
        assert body["detail"].startswith(f"candle.{slot} on test-host, which had it, was ended by")
        assert at - killed_at < WITHIN_S


async def test_callers_of_the_only_worker_hear_at_once_that_it_was_killed(gate, fleet):
    await fleet()
    # Nobody has asked it before: what it serves is known of its registration alone.
    pid = pid_of(gate)
    async with stopped(pid):
        asked = asking(gate, ASKED) + asking(gate, ASKED, RUN)
        await until(lambda: waiting(gate) == 2 * ASKED)
        killed_at = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        outcomes = await asyncio.gather(*asked)
    check_lost(outcomes, killed_at)
    assert all(body["error"] == body["detail"] for _, _, body, _ in outcomes[:ASKED])
    assert nothing_is_left(gate)
    # The others were not tried on its successor, which is asked as ever.
    await until(lambda: all_run(gate) and pid_of(gate) not in {None, pid}, 30)
    await until(lambda: answers(gate), 30)
    assert nothing_is_left(gate)


async def answers(gate) -> bool:
    return (await ask(gate))[0] == 200


async def test_only_what_was_with_the_killed_one_of_two_is_lost(gate, fleet):
    await fleet(2)
    await both_known(gate)
    async with stopped(pid_of(gate, 0), pid_of(gate, 1)):
        asked = asking(gate, 2 * ASKED)
        await until(lambda: waiting(gate) >= 2 * ASKED)
        held = in_flight(gate)
        assert min(held.values()) > 0
        killed_at = time.monotonic()
        os.kill(pid_of(gate, 0), signal.SIGKILL)
        await until(lambda: in_flight(gate)["candle.0"] == 0, WITHIN_S)
        lost = [one for one in asked if one.done()]
        assert not [one for one in lost if one.result()[0] == 200]
    outcomes = await asyncio.gather(*asked)
    check_lost([one.result() for one in lost], killed_at)
    # One that was asked for as well of the other had its answer there.
    assert len(lost) <= held["candle.0"]
    assert [status for status, *_ in outcomes].count(200) == 2 * ASKED - len(lost)
    await until(lambda: nothing_is_left(gate))
    # What the dead one held may have killed it: nothing is asked twice for a while.
    assert await answers(gate)
    assert all(one.late_s is None for one in choices(gate))


def choices(gate):
    client = gate.parts.client
    balance, subject = client._asker.balance, MODEL_INFER.subject(client.root, "m")
    for _ in range(8):
        if choice := balance.choose(subject, time.perf_counter(), 1):
            balance.ended(subject, choice.slot, "dropped", time.perf_counter())
            yield choice


async def test_what_was_asked_of_the_other_as_well_is_answered_though_the_first_is_killed(
    gate, fleet
):
    await fleet(2)
    await both_known(gate)
    pid = pid_of(gate, 0)
    async with stopped(pid):
        outcomes = await asyncio.gather(*asking(gate, ASKED))
        assert {status for status, *_ in outcomes} == {200}
        await until(lambda: in_flight(gate)["candle.0"] == waiting(gate) > 0)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: nothing_is_left(gate), WITHIN_S)


async def test_a_request_that_has_killed_a_worker_is_not_asked_of_two(gate, fleet, settings):
    await fleet(2)
    values = [helper.make_tensor_value_info(name, TensorProto.INT32, ["n"]) for name in "abc"]
    node = helper.make_node("Div", ["a", "b"], ["c"])
    graph = helper.make_graph([node], "divide", values[:2], values[2:])
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=9)
    onnx.save(model, settings.data_dir / "models" / "divide.onnx")
    await put(gate, "divide.onnx", "divide")
    await until(lambda: ready(gate, "divide") == 2, 30)
    # The first time the other one may have been asked before the end of the first was known.
    for killed_at_most in (2, 1):
        await both_known(gate, DIVIDE)
        pids = {pid_of(gate, 0), pid_of(gate, 1)}
        status, _, body, _ = await ask(gate, DIVIDE, divided(-(2**31), -1))
        assert (status, body["state"]) == (503, "ended"), body
        assert "SIGFPE" in body["reason"]
        await until(lambda: not all_run(gate))
        await until(lambda: all_run(gate), 30)
        killed = pids - {pid_of(gate, 0), pid_of(gate, 1)}
        assert 1 <= len(killed) <= killed_at_most


async def test_a_restart_loses_nothing(gate, fleet, client):
    await fleet(2)
    await both_known(gate)
    before, statuses, stop = {pid_of(gate, 0), pid_of(gate, 1)}, [], False

    async def keep_asking():
        while not stop:
            statuses.append((await ask(gate))[0])
            await asyncio.sleep(0.01)

    callers = [asyncio.create_task(keep_asking()) for _ in range(4)]
    wish = m.NamePlugin(name="candle", by="test", timeout_s=60)
    await client.call(PLUGINS_RESTART, wish, timeout_s=60)
    stop = True
    await asyncio.gather(*callers)
    assert before.isdisjoint({pid_of(gate, 0), pid_of(gate, 1)})
    assert set(statuses) == {200}
    await until(lambda: nothing_is_left(gate))
    # No end was taken for one that lost something.
    client = gate.parts.client
    subject = MODEL_INFER.subject(client.root, "m")
    assert client._asker.balance._subjects[subject].once_until == 0

"""An instance: it registers, beats, is discovered, serves in parallel, and leaves nobody behind."""

import asyncio
import contextlib
import json

import msgspec
import pytest

from bus import codec, registration, serving
from bus import messages as m
from bus.client import connect
from bus.errors import Conflict, InvalidRequest, Overloaded
from bus.instance import join
from bus.plugins import follow_plugins
from bus.subjects import CANDLE_STATS, HEALTH, MODEL_RUN, TELEMETRY
from bus.testing import until


async def echo(request: m.RunModel) -> m.ModelOutput:
    return m.ModelOutput(id=request.id, outputs=request.inputs, execution_ms=0.0)


def ask(value: float = 1) -> m.RunModel:
    return m.RunModel(id="m", inputs=[[value]])


async def test_an_instance_is_seen_when_it_comes_when_it_is_ready_and_when_it_leaves(
    client, settings
):
    async with follow_plugins(client.store) as view:
        async with join(client, settings, plugin="candle", description="a test") as candle:
            await until(lambda: view.get("candle") and view.get("candle").instances)
            assert view.get("candle").instances[0].status == "starting"
            await candle.ready()
            await until(lambda: view.get("candle").instances[0].status == "running")
            assert view.get("candle").instances[0].id == candle.id
            assert view.get("candle").port == candle._registration.port > 0
        await until(lambda: view.get("candle") is None)


async def test_it_beats_every_second_and_tells_what_it_uses(client, settings):
    async with (
        client.follow(HEALTH, plugin="candle") as beats,
        client.follow(TELEMETRY, plugin="candle") as snapshots,
        join(client, settings, plugin="candle", description="a test", telemetry_s=0.1) as candle,
    ):
        candle.counts["models_loaded"] = 3
        candle.gauges["queue"] = 7
        beat = (await asyncio.wait_for(anext(beats), 3)).payload
        assert (beat.id, beat.slot, beat.status) == (candle.id, 0, "starting")
        await until(lambda: snapshots._waiting)
        snapshot = (await anext(snapshots)).payload
        assert snapshot.mem_bytes > 1_000_000
        assert snapshot.models_loaded == 3
        assert snapshot.gauges["queue"] == 7


async def test_requests_run_at_the_same_time(client, settings):
    together = asyncio.Barrier(10)

    async def meet(request: m.RunModel) -> m.ModelOutput:
        await together.wait()
        return await echo(request)

    async with (
        join(client, settings, plugin="candle", description="a test") as candle,
        candle.serving(MODEL_RUN, meet, "m"),
    ):
        async with asyncio.timeout(5):
            replies = await asyncio.gather(*(client.call(MODEL_RUN, ask(i)) for i in range(10)))
    assert sorted(reply.outputs[0][0] for reply in replies) == list(range(10))


@contextlib.asynccontextmanager
async def held_up(client, settings):
    """Serve a model that answers nobody before `go_on` is set; gives the instance and `go_on`."""
    go_on = asyncio.Event()

    async def wait(request: m.RunModel) -> m.ModelOutput:
        await go_on.wait()
        return await echo(request)

    async with (
        join(client, settings, plugin="candle", description="a test") as candle,
        candle.serving(MODEL_RUN, wait, "m"),
    ):
        yield candle, go_on


async def test_one_request_too_many_is_refused_at_once(client, settings, monkeypatch):
    monkeypatch.setattr(serving, "MAX_IN_FLIGHT", 2)
    async with held_up(client, settings) as (candle, go_on):
        taken = [asyncio.create_task(client.call(MODEL_RUN, ask(i))) for i in range(2)]
        await until(lambda: candle.in_flight == 2)
        with pytest.raises(Overloaded, match="works on 2 requests already"):
            await client.call(MODEL_RUN, ask())
        go_on.set()
        await asyncio.gather(*taken)


async def test_of_a_burst_as_many_are_taken_as_there_is_room_for(client, settings, monkeypatch):
    monkeypatch.setattr(serving, "MAX_IN_FLIGHT", 3)
    async with held_up(client, settings) as (candle, go_on):
        asked = [asyncio.create_task(client.call(MODEL_RUN, ask(i))) for i in range(20)]
        await until(lambda: sum(one.done() for one in asked) == 17)
        assert candle.in_flight == 3
        go_on.set()
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert sum(isinstance(one, Overloaded) for one in found) == 17


async def test_nobody_is_lost_when_instances_come_and_go_under_load(client, settings, connected):
    """Twenty callers without pause, while one of two replicas leaves and returns, five times."""
    answered = 0
    stop = False

    async def keep_asking() -> None:
        nonlocal answered
        while not stop:
            await client.call(MODEL_RUN, ask(), timeout_s=5)
            answered += 1

    first, second = await connected(), await connected()
    other = msgspec.structs.replace(settings, slot=1)
    async with (
        join(first, settings, plugin="candle", description="a test") as steady,
        steady.serving(MODEL_RUN, echo, "m"),
    ):
        callers = [asyncio.create_task(keep_asking()) for _ in range(20)]
        for _ in range(5):
            async with (
                join(second, other, plugin="candle", description="a test") as fleeting,
                fleeting.serving(MODEL_RUN, echo, "m"),
            ):
                before = answered
                await until(lambda at=before: answered > at + 200)
        stop = True
        await asyncio.gather(*callers)
    assert answered > 1_000


async def test_leaving_waits_for_what_is_in_flight(client, settings):
    go_on = asyncio.Event()

    async def wait(request: m.RunModel) -> m.ModelOutput:
        await go_on.wait()
        return await echo(request)

    async with join(client, settings, plugin="candle", description="a test") as candle:
        async with contextlib.AsyncExitStack() as serving:
            await serving.enter_async_context(candle.serving(MODEL_RUN, wait, "m"))
            asked = asyncio.create_task(client.call(MODEL_RUN, ask(5)))
            await until(lambda: candle.in_flight == 1)
            leaving = asyncio.create_task(serving.aclose())
            await client.barrier()
            assert not leaving.done()
            go_on.set()
            await leaving
        assert (await asked).outputs == [[5]]


async def test_a_plain_client_discovers_it(client, settings):
    async def stats(_request: m.Empty) -> m.CandleStats:
        return m.CandleStats(models=[])

    async with (
        join(client, settings, plugin="candle", description="a test") as candle,
        candle.serving(CANDLE_STATS, stats),
        candle.serving(MODEL_RUN, echo, "m"),
    ):
        await client.call(CANDLE_STATS, m.Empty())

        async def say(verb: str, tail: str = f".candle.{candle.id}") -> dict[str, object]:
            return json.loads((await client._nc.request(f"$SRV.{verb}{tail}", timeout=2)).data)

        ping = await say("PING")
        assert ping["type"] == "io.nats.micro.v1.ping_response"
        assert (ping["name"], ping["id"]) == ("candle", candle.id)
        info = await say("INFO", ".candle")
        assert info["description"] == "a test"
        assert [e["subject"] for e in info["endpoints"]] == [
            f"{client.root}.call.candle.stats",
            f"{client.root}.call.candle.model.run.m",
        ]
        schema = json.loads(info["endpoints"][1]["metadata"]["request"])
        assert "inputs" in json.dumps(schema)
        counted = (await say("STATS"))["endpoints"][0]
        assert (counted["num_requests"], counted["num_errors"]) == (1, 0)
        assert counted["processing_time"] > 0


async def test_a_worker_started_by_hand_takes_the_lowest_free_slot(client, settings, connected):
    by_hand = msgspec.structs.replace(settings, slot=None)
    second = await connected()
    async with (
        join(client, by_hand, plugin="candle", description="a test") as first,
        join(second, by_hand, plugin="candle", description="a test") as other,
    ):
        assert (first.slot, other.slot) == (100, 101)
    async with join(client, by_hand, plugin="candle", description="a test") as third:
        assert third.slot == 100


async def test_an_instance_whose_slot_was_taken_ends(client, settings, monkeypatch, connected):
    monkeypatch.setattr(registration, "REGISTER_AGAIN_S", 0.1)
    second = await connected()
    heir = join(second, settings, plugin="candle", description="a test")

    async def lose_the_slot() -> None:
        async with join(client, settings, plugin="candle", description="a test"), heir:
            await asyncio.Event().wait()

    with pytest.raises(Conflict, match="slot 0 of candle was taken"):
        await lose_the_slot()


async def test_settings_that_do_not_fit_name_the_setting(client, settings):
    class Wanted(m.Message, frozen=True, forbid_unknown_fields=True):
        models_path: str

    config = m.PluginConfig(
        name="candle", description="", entrypoint="x", capabilities=[], settings={"models_path": 3}
    )
    desired = m.DesiredState(
        config=config, enabled=True, generation=1, changed_by="t", changed_at=m.now()
    )
    await client.store.desired.put(desired, "candle")
    async with join(client, settings, plugin="candle", description="a test") as candle:
        with pytest.raises(InvalidRequest) as raised:
            candle.settings(Wanted)
    assert raised.value.field == "models_path"


async def test_a_request_without_a_reply_subject_is_not_worked_on(client, settings):
    worked = 0

    async def count(request: m.RunModel) -> m.ModelOutput:
        nonlocal worked
        worked += 1
        return await echo(request)

    async with (
        join(client, settings, plugin="candle", description="a test") as candle,
        candle.serving(MODEL_RUN, count, "m"),
    ):
        subject = MODEL_RUN.subject(client.root, "m")
        await client._nc.publish(subject, codec.encode(ask()))
        await client.call(MODEL_RUN, ask())
    assert worked == 1


async def test_the_registration_stays_when_the_successor_has_the_slot(broker, root, settings):
    async with (
        connect(broker.url, name="a", root=root) as a,
        connect(broker.url, name="b", root=root) as b,
    ):
        await a.store.declare()
        async with contextlib.AsyncExitStack() as successor:
            async with join(a, settings, plugin="candle", description="a test"):
                heir = await successor.enter_async_context(
                    join(b, settings, plugin="candle", description="a test")
                )
            entry = await b.store.instances.get("candle", 0)
            assert entry is not None
            assert entry.value.id == heir.id
        await a.store.delete_everything()

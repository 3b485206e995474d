"""Versions side by side, aliases that move, memory that is shared, and what others see of it."""

import asyncio
import json

import msgspec
import pytest

from bus import messages as m
from bus.errors import Conflict, InvalidRequest, NobodyListens, NotFound, Unprocessable
from bus.subjects import (
    CANDLE_STATS,
    MODEL_ALIAS,
    MODEL_INFER,
    MODEL_LOAD,
    MODEL_RUN,
    MODEL_UNLOAD,
    MODEL_WAKE,
)
from bus.testing import until
from services.candle.repository import specs


async def load(client, path=None, version=None, name="m", **config) -> m.LoadedModel:
    wanted = m.ModelConfig(**config) if config else None
    ask = m.LoadModel(id=name, path=path, version=version, config=wanted)
    return await client.call(MODEL_LOAD, ask, timeout_s=30)


async def alias(client, name: str, version: str | None) -> dict[str, str]:
    ask = m.AliasModel(id="m", alias=name, version=version)
    return (await client.call(MODEL_ALIAS, ask)).aliases


async def infer(client, *name: str, model: str = "m") -> tuple[float, str]:
    """Return what one and one are for a version, and which version said so."""
    tensor = {"name": "inputs", "datatype": "FP32", "shape": [1, 2], "data": [1, 1]}
    body = json.dumps({"inputs": [tensor]}).encode()
    reply = await client.relay(MODEL_INFER.subject(client.root, model, *name), body)
    said = json.loads(reply.body)
    assert said["model_version"] == reply.headers["Bkg-Model-Version"]
    return said["outputs"][0]["data"][0], said["model_version"]


async def run(client) -> float:
    return (await client.call(MODEL_RUN, m.RunModel(id="m", inputs=[[1, 1]]))).outputs[0][0]


async def states(client, slot: int = 0) -> dict[tuple[str, str], m.ServedModel]:
    entry = await client.store.served.get("candle", slot)
    return {(one.id, one.version): one for one in entry.value.models} if entry else {}


async def state(client, version: str = "1", name: str = "m") -> str | None:
    found = (await states(client)).get((name, version))
    return found.state if found else None


async def test_a_version_that_is_loaded_by_path_never_changes_its_bytes(client, worker, linear):
    async with worker():
        await load(client, linear(), "7")
        again = await load(client, linear(), "7", max_batch_rows=3)
        assert (again.version, again.config.max_batch_rows) == ("7", 3)
        await alias(client, "stable", "7")
        other = linear("other.json", weights=[10, 10])
        with pytest.raises(Conflict, match=r"'7' of 'm' has other bytes.*next free number is 8"):
            await load(client, other, "7")
        with pytest.raises(Conflict, match=r"'stable' is an alias"):
            await load(client, other, "stable")
        assert await infer(client) == (2, "7")
        # Nothing of it was stored, and without a version it is the next one.
        assert len(await client.store.artefacts.all()) == 1
        assert (await load(client, other)).version == "8"


async def test_versions_are_served_side_by_side_under_their_own_names(client, worker, linear):
    async with worker():
        await load(client, linear("a.json"), "1")
        loaded = await load(client, linear("b.json", weights=[10, 10]), "2")
        assert (loaded.version, loaded.names) == ("2", ["2", "default", "latest"])
        assert await infer(client, "1") == (2, "1")
        assert await infer(client, "2") == (20, "2")
        assert await infer(client, "latest") == (20, "2")
        assert await infer(client) == (20, "2")
        assert await run(client) == 20


async def test_an_answer_says_which_version_artefact_and_instance_gave_it(client, worker, linear):
    async with worker() as candle:
        loaded = await load(client, linear())
        tensor = {"name": "inputs", "datatype": "FP32", "shape": [1, 2], "data": [1, 1]}
        subject = MODEL_INFER.subject(client.root, "m")
        reply = await client.relay(subject, json.dumps({"inputs": [tensor]}).encode())
        ran = await client.call(MODEL_RUN, m.RunModel(id="m", inputs=[[1, 1]]))
        here = candle._instance.id
    assert reply.headers["Bkg-Model-Version"] == ran.version == "1"
    assert reply.headers["Bkg-Model-Digest"] == ran.checksum == loaded.checksum
    assert reply.headers["Bkg-Instance"] == ran.instance == here


async def test_an_alias_holds_a_version_and_moves_without_a_failed_request(client, worker, linear):
    async with worker(0), worker(1):
        await load(client, linear("a.json"), "1")
        await load(client, linear("b.json", weights=[10, 10]), "2")
        assert await alias(client, "default", "1") == {"default": "1"}
        seen: list[str] = []
        stop = False

        async def keep_asking() -> None:
            while not stop:
                seen.append((await infer(client))[1])

        callers = [asyncio.create_task(keep_asking()) for _ in range(8)]
        for number in range(10):
            await alias(client, "default", "1" if number % 2 else "2")
        await alias(client, "default", "2")
        # Both instances have moved once each has said so.
        await until(lambda: _leads(client, 0, "2", "default"))
        await until(lambda: _leads(client, 1, "2", "default"))
        stop = True
        await asyncio.gather(*callers)
        assert {"1", "2"} <= set(seen)
        assert {(await infer(client))[1] for _ in range(20)} == {"2"}


async def _leads(client, slot: int, version: str, name: str) -> bool:
    found = (await states(client, slot)).get(("m", version))
    return found is not None and name in found.names


async def test_a_name_of_ones_own_leads_to_a_version_until_it_is_taken_away(client, worker, linear):
    async with worker():
        await load(client, linear("a.json"), "1")
        await load(client, linear("b.json", weights=[10, 10]), "2")
        await alias(client, "stable", "1")
        assert await infer(client, "stable") == (2, "1")
        await alias(client, "stable", None)
        await until(lambda: _nobody(client, "stable"))


async def _nobody(client, *name: str, model: str = "m") -> bool:
    try:
        await infer(client, *name, model=model)
    except NobodyListens:
        return True
    return False


@pytest.mark.parametrize(
    ("name", "version", "kind", "says"),
    [
        ("default", "9", NotFound, "no version '9' of 'm'; there are: 1, 2"),
        ("latest", "1", InvalidRequest, "'latest' goes with the versions"),
        ("1", "2", InvalidRequest, "'1' is a version's own name"),
        ("default", "2", Conflict, "version '2' of 'm' is not loaded"),
    ],
)
async def test_an_alias_that_cannot_be_is_refused(
    client, worker, linear, name, version, kind, says
):
    async with worker():
        await load(client, linear("a.json"), "1")
        await load(client, linear("b.json", weights=[10, 10]), "2")
        await client.call(MODEL_UNLOAD, m.UnloadModel(id="m", version="2"))
        with pytest.raises(kind, match=says):
            await alias(client, name, version)


async def test_a_file_without_a_version_takes_the_place_of_what_is_served(client, worker, linear):
    async with worker():
        await load(client, linear("a.json"))
        loaded = await load(client, linear("b.json", weights=[10, 10]))
        assert loaded.version == "2"
        assert await infer(client) == (20, "2")
        assert await _nobody(client, "1")
        # The older one is still in the repository, and comes back.
        assert (await load(client, version="1")).version == "1"
        assert await infer(client, "1") == (2, "1")


async def test_the_same_file_again_is_the_same_version(client, worker, linear):
    async with worker():
        assert (await load(client, linear())).version == "1"
        assert (await load(client, linear())).version == "1"
        again = await load(client, linear(), threads=2)
        assert (again.version, again.threads, again.config.threads) == ("1", 2, 2)
        assert (await load(client)).config.threads == 2


async def test_one_version_is_unloaded_and_the_others_stay(client, worker, linear):
    async with worker():
        await load(client, linear("a.json"), "1")
        await load(client, linear("b.json", weights=[10, 10]), "2")
        await client.call(MODEL_UNLOAD, m.UnloadModel(id="m", version="2"))
        assert await infer(client) == (2, "1")
        assert await _nobody(client, "2")
        with pytest.raises(NotFound, match="no model 'm' in version '2' loaded"):
            await client.call(MODEL_UNLOAD, m.UnloadModel(id="m", version="2"))


async def test_an_unloaded_model_is_loaded_again_by_its_name(client, worker, linear):
    async with worker():
        await load(client, linear())
        await client.call(MODEL_UNLOAD, m.UnloadModel(id="m"))
        assert await _nobody(client)
        assert (await load(client)).version == "1"
        assert await infer(client) == (2, "1")


@pytest.mark.parametrize("path", ["found.json", "found/1/model.json"])
async def test_a_model_that_is_not_known_is_found_by_its_name(
    client, worker, linear, models_dir, path
):
    (models_dir / path).parent.mkdir(parents=True, exist_ok=True)
    linear(path)
    async with worker():
        assert (await load(client, name="found")).path == path
        with pytest.raises(NotFound, match=r"no file nowhere.onnx or nowhere.json"):
            await load(client, name="nowhere")


async def test_a_file_can_come_with_the_request(client, worker):
    content = b'{"input_dim": 2, "output_dim": 1, "weights": [3, 3], "bias": [0]}'
    async with worker():
        ask = m.LoadModel(id="m", path="sent.json", content=content)
        assert (await client.call(MODEL_LOAD, ask)).path == "sent.json"
        assert await infer(client) == (6, "1")
        ask = m.LoadModel(id="m", path="sent.json", content=b"{}")
        with pytest.raises(Unprocessable, match="sent.json is no linear model"):
            await client.call(MODEL_LOAD, ask)


@pytest.mark.parametrize("path", [None, "..", "a\0.json", f"{'x' * 300}.json"])
async def test_a_file_that_comes_with_a_request_needs_a_name(client, worker, path):
    body = json.dumps({"id": "m", "path": path, "content": "e30="}).encode()
    async with worker():
        with pytest.raises(InvalidRequest, match="path|not valid"):
            await client.relay(MODEL_LOAD.subject(client.root), body)
        assert await client.store.models.all() == []


async def test_an_alias_is_no_name_for_a_version(client, worker, linear):
    async with worker():
        with pytest.raises(InvalidRequest, match="'latest' is an alias"):
            await load(client, linear(), "latest")


@pytest.mark.parametrize(
    ("config", "says"),
    [({"provider": "cuda"}, "computed by the cpu"), ({"threads": 0}, "threads")],
)
async def test_a_configuration_that_cannot_be_is_an_error_and_never_something_else(
    client, worker, linear, config, says
):
    async with worker():
        body = json.dumps({"id": "m", "path": linear(), "config": config}).encode()
        with pytest.raises((Unprocessable, InvalidRequest), match=says):
            await client.relay(MODEL_LOAD.subject(client.root), body)


async def test_a_provider_that_is_not_here_is_named_with_those_that_are(client, worker):
    async with worker():
        with pytest.raises(Unprocessable, match=r"'cuda' is not here; onnxruntime has .*cpu"):
            await load(client, "iris.onnx", provider="cuda")


async def test_a_version_that_cannot_be_loaded_here_leaves_the_old_one_serving(
    client, worker, linear
):
    async with worker():
        await load(client, linear())
        # Wanted by somebody whose host has a provider that this one lacks.
        spec = (await client.store.models.get("m")).value
        other = msgspec.structs.replace(
            spec.versions[0], config=m.ModelConfig(provider="cuda"), wanted_at=m.now()
        )
        await client.store.models.put(msgspec.structs.replace(spec, versions=[other]), "m")
        await until(lambda: _failed(client))
        assert await infer(client) == (2, "1")


async def _failed(client) -> bool:
    entry = await client.store.served.get("candle", 0)
    return any(one.state == "failed" and "cpu" in one.reason for one in entry.value.models)


async def test_what_an_instance_serves_is_written_down_for_all(client, worker, linear):
    async with worker() as candle:
        await load(client, linear(), pinned=True)
        await until(lambda: state_is(client, "ready"))
        served = (await client.store.served.get("candle", 0)).value
        one = served.models[0]
        assert (served.instance, served.host) == (candle._instance.id, candle._instance.host)
        assert (one.names, one.kept) == (["1", "default", "latest"], "pinned")
        assert one.memory_bytes > 0
    assert await client.store.served.get("candle", 0) is None


async def state_is(client, wanted: str | None, name: str = "m") -> bool:
    return await state(client, name=name) == wanted


async def test_a_model_that_nobody_asks_leaves_memory_and_comes_back(client, worker, linear):
    async with worker():
        await load(client, linear(), keep_alive_s=0.1)
        assert await infer(client) == (2, "1")
        await until(lambda: state_is(client, "cold"))
        told = await client.call(CANDLE_STATS, m.Empty())
        assert told.models == []
        # What it has done is not forgotten.
        assert [(one.name, one.inference_count) for one in told.model_stats] == [("m", 1)]
        assert await _nobody(client)
        told = await client.call(MODEL_WAKE, m.WakeModel(id="m"))
        assert told.state != "cold"
        await until(lambda: _answers(client))


async def _answers(client, model: str = "m") -> bool:
    return not await _nobody(client, model=model)


async def test_beyond_the_budget_the_least_recently_used_model_leaves(
    client, worker, linear, models_dir
):
    size = {"input_dim": 2, "output_dim": 250_000, "weights": [1] * 500_000, "bias": [0] * 250_000}
    async with worker(memory_budget_mb=19) as candle:
        for name in ("a", "b"):
            (models_dir / f"{name}.json").write_text(json.dumps(size))
        await load(client, "a.json", name="a")
        for one in candle._models["a"].versions:
            one.memory_bytes = 9_000_000
        await load(client, linear("p.json"), name="p", pinned=True)
        await client.call(MODEL_RUN, m.RunModel(id="p", inputs=[[1, 1]]))
        for one in candle._models["p"].versions:
            one.memory_bytes = 9_000_000
        await load(client, "b.json", name="b")
        await until(lambda: state_is(client, "cold", "a"))
        assert await state(client, name="p") == "ready"
        assert "made room" in (await states(client))["a", "1"].reason


async def test_without_room_a_model_is_refused_with_the_setting_to_turn(client, worker, linear):
    async with worker(memory_budget_mb=1) as candle:
        await load(client, linear(), pinned=True)
        for one in candle._models["m"].versions:
            one.memory_bytes = 1_048_576
        with pytest.raises(Unprocessable, match=r"memory_budget_mb.*held by model 'm'"):
            await load(client, linear("n.json"), name="n")
        await until(lambda: state_is(client, "failed", "n"))
        assert await state(client) == "ready"


async def test_a_replica_that_comes_later_serves_the_same_versions_and_aliases(
    client, worker, linear
):
    config = {
        "max_batch_rows": 3, "max_delay_ms": 1.5, "instances": 2, "threads": 1, "provider": "cpu",
        "pinned": True, "keep_alive_s": 900.0,
    }  # fmt: skip
    async with worker(0):
        await load(client, linear("a.json"), "1", **config)
        await load(client, linear("b.json", weights=[10, 10]), "2")
        await alias(client, "default", "1")
    async with worker(1) as later:
        assert await infer(client) == (2, "1")
        assert await infer(client, "2") == (20, "2")
        first, second = (await client.call(CANDLE_STATS, m.Empty())).models
        assert (first.config, second.config) == (m.ModelConfig(**config), m.ModelConfig())
        assert (first.names, second.names) == (["1", "default"], ["2", "latest"])
        limits = later._models["m"].versions[0]._loaded.batcher._limits
        assert (limits.max_rows, limits.max_delay_s, limits.instances) == (3, 0.0015, 2)


async def test_versions_that_nobody_wants_do_not_stay_for_ever(client, worker, linear, monkeypatch):
    monkeypatch.setattr(specs, "VERSIONS_KEPT", 4)
    async with worker():
        for factor in range(7):
            await load(client, linear(weights=[factor, 1]))
        spec = (await client.store.models.get("m")).value
    assert [version.version for version in spec.versions] == ["4", "5", "6", "7"]

"""Models that come, go and come back while they are asked, and wishes that nobody should write."""

import asyncio
import contextlib
import random
import threading

import msgspec
import pytest

from bus import messages as m
from bus.errors import BusError, DeadlineExceeded, Unavailable
from bus.models import names_of
from bus.subjects import (
    CANDLE_STATS,
    MODEL_ALIAS,
    MODEL_WAKE,
)
from bus.testing import until
from services.candle.runtimes.linear import Linear
from services.candle.serving import version
from services.candle.serving.model import Model
from tests.candle.asking import (
    answers,
    held,
    infer,
    load,
    state,
    state_is,
    unload,
    version_of,
)


async def write(client, key: str, body: bytes) -> None:
    """Write a wish by hand, as `nats kv put` does."""
    await client._nc.request(f"$KV.{client.root}-models.{key}", body, timeout=5)


# --- Coming back ----------------------------------------------------------------------------------


async def test_a_model_that_is_asked_for_while_it_leaves_comes_back(
    client, worker, linear, monkeypatch
):
    gate = threading.Event()
    monkeypatch.setattr(version, "give_back", lambda: gate.wait(60))
    async with worker() as candle:
        await load(client, linear())
        leaving = asyncio.create_task(unload(client))
        await until(lambda: version_of(candle).state == "leaving")
        loading = asyncio.create_task(load(client, threads=None, max_batch_rows=5))
        # Both wishes are known, and its memory is not free yet.
        await until(lambda: candle._models["m"].spec.versions[0].wanted)
        gate.set()
        assert (await asyncio.wait_for(loading, 20)).config.max_batch_rows == 5
        # Who had it unloaded does not wait until it is unloaded the next time.
        await asyncio.wait_for(leaving, 20)
        assert await infer(client) == 2


async def test_an_unload_is_answered_though_others_load_the_model_again(client, worker, linear):
    async with worker():
        await load(client, linear())

        async def again(number: int) -> None:
            with contextlib.suppress(BusError):
                await (unload(client) if number % 2 else load(client))

        await asyncio.wait_for(asyncio.gather(*(again(n) for n in range(40))), 60)
        await load(client)
        assert await infer(client) == 2


async def test_a_model_that_is_asked_for_while_it_makes_room_stays_and_nothing_is_stuck(
    client, worker, linear
):
    async with worker(memory_budget_mb=10) as candle:
        await load(client, linear())
        version_of(candle).memory_bytes = 10 * 1024**2
        async with held(client, candle):
            other = asyncio.create_task(load(client, linear("n.json"), name="n"))
            await until(lambda: candle._models["m"]._evicted)
            await client.call(MODEL_WAKE, m.WakeModel(id="m"))
            assert not candle._models["m"]._evicted
        with contextlib.suppress(Unavailable):
            await asyncio.wait_for(other, 30)
        # Nobody holds the one place for loading: whoever is asked for comes.
        await unload(client)
        await until(lambda: state_is(client, "ready", "n"), 30)
        assert await infer(client, model="n") == 2


async def test_a_wish_that_comes_just_as_a_model_ends_is_kept(client, worker, linear, monkeypatch):
    run = Model.run

    async def run_and_be_wanted_again(self) -> None:
        await run(self)
        if self.model == "m":
            monkeypatch.setattr(Model, "run", run)
            await client.store.models.put(spec, "m")
            await until(lambda: self.spec is not None)

    monkeypatch.setattr(Model, "run", run_and_be_wanted_again)
    async with worker() as candle:
        await load(client, linear())
        spec = (await client.store.models.get("m")).value
        ended = candle._models["m"]
        await client.store.models.delete("m")
        await until(lambda: candle._models.get("m") not in {None, ended})
        await until(lambda: answers(client), 20)
        assert candle._models["m"].spec == spec


async def test_a_model_that_is_deleted_from_the_bucket_is_unloaded(client, worker, linear):
    async with worker() as candle:
        await load(client, linear())
        await client.store.models.delete("m")
        await until(lambda: not candle._models)
        assert not await answers(client)
        assert (await client.call(CANDLE_STATS, m.Empty())).models == []
        # The name is free again.
        assert (await load(client, linear())).version == "1"


# --- Warm before it is asked ----------------------------------------------------------------------


async def test_nobody_is_asked_before_a_version_is_warm_and_the_old_one_answers_until_then(
    client, worker, linear, monkeypatch
):
    warming, gate = threading.Event(), threading.Event()
    warm_up = Linear.warm_up

    def wait_and_warm_up(self) -> None:
        warming.set()
        assert gate.wait(60)
        warm_up(self)

    monkeypatch.setattr(Linear, "warm_up", wait_and_warm_up)
    async with worker() as candle:
        loading = asyncio.create_task(load(client, linear()))
        await until(warming.is_set)
        assert not await answers(client)
        assert not loading.done()
        gate.set()
        assert (await loading).version == "1"
        assert await infer(client) == 2
        warming.clear()
        gate.clear()
        loading = asyncio.create_task(load(client, linear(weights=[10, 10])))
        await until(warming.is_set)
        # For as long as that takes, and there is nobody else.
        assert {await infer(client) for _ in range(50)} == {2}
        assert [one.state for one in candle._versions()] == ["ready", "loading"]
        gate.set()
        assert (await loading).version == "2"
        assert await infer(client) == 20


# --- Wishes that nobody should write --------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [b"", b"nonsense", b"[]", b'{"id": "m"}', b"\xff\x00", b'{"id": "m", "versions": [{}]}',
     b'{"a":' * 50_000],
)  # fmt: skip
async def test_a_wish_that_cannot_be_read_is_passed_over(client, worker, linear, body):
    await write(client, "odd", body)
    async with worker():
        await load(client, linear())
        await write(client, "m", body)
        await write(client, "other", body)
        assert (await load(client, linear("n.json"), name="n")).version == "1"
        assert await infer(client) == 2
        assert await state(client, "odd") is None


async def wish(client, name: str, **changes: object) -> m.ModelSpec:
    """Write a wish that only looks as if it could be served."""
    version = {"version": "1", "path": "a.json", "checksum": "0" * 64, "format": "linear",
               "added_at": m.now(), "size_bytes": 10, **changes}  # fmt: skip
    spec = msgspec.convert({"id": name, "versions": [version]}, m.ModelSpec)
    await client.store.models.put(spec, name)
    return spec


async def test_a_model_whose_artefact_is_missing_fails_and_the_others_are_served(
    client, worker, linear
):
    async with worker():
        await load(client, linear())
    await wish(client, "lost")
    async with worker(1) as candle:
        # It is ready all the same.
        assert candle._instance._registration.status == "running"
        assert await infer(client) == 2
        (lost,) = candle._models["lost"].versions
        assert lost.state == "failed"
        assert "000000" in lost.reason
        await until(lambda: serves(client, 1, "lost", "failed"))
        with pytest.raises(BusError, match="000000"):
            await load(client, name="lost")


@pytest.mark.parametrize("digest", ["../../precious", "/etc/passwd", "", "AB" * 32, "a" * 63])
async def test_a_digest_that_is_none_touches_no_file(client, worker, models_dir, digest):
    precious = models_dir.parent / "precious.json"
    precious.write_text("dear to me")
    await wish(client, "odd", checksum=digest)
    async with worker() as candle:
        assert version_of(candle, "odd").state == "failed"
        assert "no SHA-256" in version_of(candle, "odd").reason
    assert precious.read_text() == "dear to me"


async def test_what_takes_long_at_the_start_does_not_hold_up_other_wishes(
    client, worker, linear, monkeypatch
):
    async with worker():
        await load(client, linear())
        spec = (await client.store.models.get("m")).value
    gate = asyncio.Event()
    fetch = type(client.store.artefacts).fetch

    async def slow(self, digest, path, *, told=lambda _share: None):
        if digest == spec.versions[0].checksum:
            told(0.25)
            await gate.wait()
        await fetch(self, digest, path, told=told)

    monkeypatch.setattr(type(client.store.artefacts), "fetch", slow)
    starting = worker(1)
    entering = asyncio.create_task(starting.__aenter__())
    try:
        await until(lambda: serves(client, 1, "m", "fetching"))
        entry = await client.store.served.get("candle", 1)
        assert entry.value.models[0].progress == 0.25
        # It is not ready yet, but it can be told what to do, even to give that model up.
        assert (await load(client, linear("n.json", weights=[2, 2]), name="n")).version == "1"
        assert await infer(client, model="n") == 4
        assert not entering.done()
        await unload(client)
        await asyncio.wait_for(asyncio.shield(entering), 20)
    finally:
        gate.set()
        await entering
        await starting.__aexit__(None, None, None)


async def serves(client, slot: int, name: str, wanted: str) -> bool:
    return await state(client, name, slot) == wanted


# --- Settings -------------------------------------------------------------------------------------


async def test_a_smaller_budget_puts_out_whoever_was_not_asked_for_longest(
    client, worker, linear, set_to
):
    await set_to()
    async with worker() as candle:
        for name in ("a", "b", "c"):
            await load(client, linear(f"{name}.json"), name=name, pinned=name == "c")
            version_of(candle, name).memory_bytes = 4 * 1024**2
        await infer(client, model="a")
        await set_to(memory_budget_mb=9)
        await until(lambda: state_is(client, "cold", "b"))
        assert await state(client, "a") == await state(client, "c") == "ready"
        assert "memory_budget_mb" in version_of(candle, "b").reason
        await set_to(memory_budget_mb=100)
        await client.call(MODEL_WAKE, m.WakeModel(id="b"))
        await until(lambda: answers(client, model="b"))


async def test_threads_the_cache_and_the_delay_follow_the_settings(client, worker, linear, set_to):
    await set_to()
    async with worker() as candle:
        await load(client, linear())
        await set_to(threads=3, cache_max_mb=7, max_delay_ms=1.5)
        await until(lambda: candle._repository.cache.max_bytes == 7 * 1024**2)
        assert version_of(candle)._loaded.batcher._limits.max_delay_s == 0.0015
        assert (await load(client, linear("n.json"), name="n")).threads == 3
        await set_to()
        await until(lambda: version_of(candle)._loaded.batcher._limits.max_delay_s == 0)


# --- Two replicas ---------------------------------------------------------------------------------


async def test_a_replica_that_dies_loses_no_request_sent_after_and_its_entry_goes(
    client, worker, linear
):
    async with worker(0):
        await load(client, linear())
        async with worker(1):
            await until(lambda: serves(client, 1, "m", "ready"))
            assert {await infer(client) for _ in range(20)} == {2}
        assert await client.store.served.get("candle", 1) is None
        assert {await infer(client) for _ in range(20)} == {2}


def served_by(candle) -> dict[tuple[str, str], str]:
    """Return which version each name leads to."""
    return {
        (model.model, name): door.version.spec.version
        for model in candle._models.values()
        for name, door in model._doors.items()
    }


@pytest.mark.timeout(240)
async def test_after_any_commands_at_once_replicas_serve_what_is_wanted_and_nothing_is_stuck(
    client, worker, linear
):
    draw = random.Random(1)  # noqa: S311
    paths = [linear(f"{n}.json", weights=[n, n]) for n in range(1, 4)]
    names, versions = ["m", "n"], ["1", "2", "3", None]
    tasks_before = len(asyncio.all_tasks())

    async def command() -> None:
        name, version = draw.choice(names), draw.choice(versions)
        match draw.randrange(5):
            case 0 | 1:
                await load(client, draw.choice([*paths, None]), version, name)
            case 2:
                await unload(client, version, name)
            case 3:
                ask = m.AliasModel(
                    id=name, alias=draw.choice(["default", "stable"]), version=version
                )
                await client.call(MODEL_ALIAS, ask, timeout_s=30)
            case _:
                await infer(client, model=name)

    async def several() -> list[str]:
        odd = []
        for _ in range(14):
            try:
                await command()
            except DeadlineExceeded as error:
                odd.append(error.message)
            except BusError:
                pass
        return odd

    async with worker(0) as first, worker(1) as second:
        late = await asyncio.wait_for(asyncio.gather(*(several() for _ in range(8))), 200)
        assert not any(late), late
        wanted = {}
        for name in names:
            entry = await client.store.models.get(name)
            for alias, version in names_of(entry.value).items() if entry else ():
                wanted[name, alias] = version.version
        await until(lambda: served_by(first) == served_by(second) == wanted, 30)
        for candle in (first, second):
            await until(lambda c=candle: all(one.settled for one in c._models.values()), 30)
            await until(lambda c=candle: not any(one._leaving for one in c._models.values()), 30)
            assert {v.state for v in candle._versions()} <= {"ready"}
    await until(lambda: len(asyncio.all_tasks()) <= tasks_before)

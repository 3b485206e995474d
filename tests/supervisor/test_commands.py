"""The commands on real workers: what they change, what they wait for, what they refuse."""

import asyncio
import contextlib
import json
from contextlib import asynccontextmanager

import msgspec
import pytest

from bus import codec
from bus import messages as m
from bus.errors import BusError, Conflict, DeadlineExceeded, InvalidRequest, NotFound
from bus.masking import MASK
from bus.plugins import follow_plugins
from bus.subjects import (
    PLUGINS_CHECK,
    PLUGINS_CONFIGURE,
    PLUGINS_GET,
    PLUGINS_HISTORY,
    PLUGINS_LIST,
    PLUGINS_RESTART,
    PLUGINS_ROLLBACK,
    PLUGINS_SCALE,
    PLUGINS_START,
    PLUGINS_STOP,
)
from bus.testing import until

SECRET = "hunter2-never-to-be-shown"

# Takes `threshold` live and everything else at its start; writes down what it was given.
PROGRAM = """
import asyncio, json, sys
from typing import Annotated
import msgspec
from msgspec import Meta
from bus import codec
from bus.client import connect
from bus.instance import join
from bus.process import run
from bus.settings import Settings

class Wanted(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    threshold: Annotated[float, Meta(ge=0, le=1)] = 0.5
    mode: str = "fast"
    telemetry_interval: float = 10
    password: Annotated[str, Meta(extra_json_schema={"format": "password"})] | None = None

async def main():
    settings = Settings.from_env()
    async with (
        connect(settings.nats_url, name="w", root=settings.root) as client,
        join(client, settings, plugin="w", description="a test",
             config_schema=codec.schema(Wanted)) as instance,
    ):
        def take():
            with open(f"{sys.argv[0]}.{instance.slot}.json", "wb") as file:
                file.write(codec.encode(instance.settings(Wanted)))
        take()
        instance.on_config(["threshold"], take)
        await instance.ready()
        await asyncio.Event().wait()

sys.exit(run(main))
"""
NEVER_READY = "import signal; signal.pause()"


def named(kind=m.NamePlugin, **more):
    return kind(name="w", **{"by": "test", "timeout_s": 20.0, **more})


async def ask(client, endpoint, request=None) -> m.PluginState:
    return await client.call(endpoint, request or named(), timeout_s=25)


async def configure(client, config, **more) -> m.PluginState:
    request = named(m.ConfigurePlugin, config=config, **more)
    return await ask(client, PLUGINS_CONFIGURE, request)


async def check(client, config, **more) -> m.ConfigCheck:
    return await client.call(PLUGINS_CHECK, named(m.ConfigurePlugin, config=config, **more))


async def history(client, limit: int = 20) -> list[m.PluginRevision]:
    asked = m.HistoryOfPlugin(name="w", limit=limit)
    return (await client.call(PLUGINS_HISTORY, asked)).revisions


def having(config: m.PluginConfig, **settings: object) -> m.PluginConfig:
    return msgspec.structs.replace(config, settings={**config.settings, **settings})


@pytest.fixture
def supervise(supervise, client):
    """Run a supervisor as ever; entered, it answers."""

    @asynccontextmanager
    async def start(*configs: m.PluginConfig):
        async def answers() -> bool:
            with contextlib.suppress(BusError):
                return bool(await client.call(PLUGINS_LIST, m.Empty(), timeout_s=1))
            return False

        async with supervise(*configs) as supervisor:
            await until(answers, timeout_s=30)
            yield supervisor

    return start


@pytest.fixture
def configurable(plugin):
    """The plugin `w` with a schema, and a setting that it takes live."""

    def make(**more: object) -> m.PluginConfig:
        return plugin(PROGRAM, **more)

    return make


@pytest.fixture
def taken(tmp_path):
    """What a worker has been given last."""
    return lambda slot=0: json.loads((tmp_path / f"w.py.{slot}.json").read_text())


async def running(client, count: int = 1) -> None:
    async with follow_plugins(client.store) as view:
        await until(
            lambda: (s := view.get("w")) and s.status == "running" and s.replicas.ready == count,
            timeout_s=30,
        )

    async def kept() -> object:
        return await client.store.schemas.get("w")

    await until(kept, timeout_s=30)


def pids(state: m.PluginState) -> list[int]:
    return [place.pid for place in state.instances]


async def test_a_command_that_does_not_wait_answers_with_the_state_as_it_is(
    client, supervise, plugin
):
    async with supervise(plugin(NEVER_READY, autostart=False)):
        before = await ask(client, PLUGINS_GET)
        state = await ask(client, PLUGINS_START, named(wait=False))
        assert state.revision > before.revision
        assert state.status != "running"
        with pytest.raises(DeadlineExceeded, match=r"revision \d+ is stored, .*replica 0 is"):
            await ask(client, PLUGINS_RESTART, named(timeout_s=0.5))
        for endpoint, kind, more in (
            (PLUGINS_RESTART, m.NamePlugin, {}),
            (PLUGINS_SCALE, m.ScalePlugin, {"replicas": 2}),
            (PLUGINS_CONFIGURE, m.ConfigurePlugin, {"config": plugin(NEVER_READY, env={"A": "1"})}),
            (PLUGINS_STOP, m.NamePlugin, {}),
        ):
            later = await ask(client, endpoint, named(kind, wait=False, **more))
            assert later.revision > state.revision
            state = later


async def test_scaling_restarts_nobody_and_answers_when_the_number_is_there(
    client, supervise, configurable
):
    async with supervise(configurable()):
        await running(client)
        before = await ask(client, PLUGINS_GET)
        more = await ask(client, PLUGINS_SCALE, named(m.ScalePlugin, replicas=3))
        assert (more.replicas.desired, more.replicas.ready) == (3, 3)
        assert more.generation == before.generation
        assert pids(more)[0] == before.pid
        less = await ask(client, PLUGINS_SCALE, named(m.ScalePlugin, replicas=1))
        assert pids(less) == [before.pid]
        assert less.config.replicas == 1
        none = await ask(client, PLUGINS_SCALE, named(m.ScalePlugin, replicas=0))
        assert (none.status, none.instances) == ("stopped", [])


async def test_a_conflict_names_the_present_revision(client, supervise, configurable):
    config = configurable(autostart=False)
    async with supervise(config):
        present = (await ask(client, PLUGINS_GET)).revision
        old = present + 1_000
        for endpoint, request in (
            (PLUGINS_SCALE, named(m.ScalePlugin, replicas=2, revision=old)),
            (PLUGINS_CONFIGURE, named(m.ConfigurePlugin, config=config, revision=old)),
            (PLUGINS_ROLLBACK, named(m.RollbackPlugin, revision=present, at_revision=old)),
        ):
            with pytest.raises(Conflict, match=f"w is at revision {present}, not {old}") as raised:
                await ask(client, endpoint, request)
            assert raised.value.revision == present


async def test_a_configuration_is_checked_by_the_plugins_schema_even_when_no_worker_runs(
    client, supervise, configurable
):
    config = configurable()
    async with supervise(config):
        await running(client)
        await ask(client, PLUGINS_STOP)
        state = await ask(client, PLUGINS_GET)
        assert state.instances == []
        assert "properties" in json.dumps(state.config_schema)
        with pytest.raises(InvalidRequest) as raised:
            await configure(client, having(config, threshold=7, moed="exact"))
        assert raised.value.reasons == [
            "settings has no 'moed'; did you mean 'mode'?",
            "settings.threshold is 7; allowed is a number from 0 to 1",
        ]
        assert raised.value.field == "settings.moed"
        assert (await ask(client, PLUGINS_GET)).revision == state.revision


async def test_a_check_says_what_would_change_and_stores_nothing(client, supervise, configurable):
    config = configurable()
    async with supervise(config):
        await running(client)
        before = await ask(client, PLUGINS_GET)
        live = await check(client, having(config, threshold=0.7))
        assert (live.valid, live.errors, live.restarts) == (True, [], False)
        assert [(c.field, c.before, c.after) for c in live.changes] == [
            ("settings.threshold", None, 0.7)
        ]
        assert (await check(client, having(config, mode="exact"))).restarts
        assert not (await check(client, config)).changes
        wrong = await check(client, having(config, threshold="high"))
        assert not wrong.valid
        assert [error.field for error in wrong.errors] == ["settings.threshold"]
        with pytest.raises(InvalidRequest, match="for 'other', not for 'w'"):
            await check(client, msgspec.structs.replace(config, name="other"))
        assert (await ask(client, PLUGINS_GET)).revision == before.revision


async def test_what_all_instances_take_live_restarts_none(client, supervise, configurable, taken):
    config = configurable(replicas=2)
    async with supervise(config):
        await running(client, 2)
        before = await ask(client, PLUGINS_GET)
        after = await configure(client, having(config, threshold=0.7, telemetry_interval=1))
        assert pids(after) == pids(before)
        assert after.generation == before.generation
        # All have it when the answer comes.
        assert {place.config_revision for place in after.instances} == {after.revision}
        assert [taken(slot)["threshold"] for slot in (0, 1)] == [0.7, 0.7]


@pytest.mark.parametrize(
    "change",
    [{"settings": {"mode": "exact", "threshold": 0.1}}, {"env": {"A": "1"}}],
    ids=["setting", "env"],
)
async def test_anything_else_replaces_one_instance_after_the_other(
    client, supervise, configurable, taken, change
):
    config = configurable(replicas=2)
    async with supervise(config):
        await running(client, 2)
        before = await ask(client, PLUGINS_GET)
        after = await configure(client, msgspec.structs.replace(config, **change))
        assert after.generation == before.generation + 1
        assert {place.generation for place in after.instances} == {after.generation}
        assert after.replicas.ready == 2
        assert not set(pids(after)) & set(pids(before))
        assert taken(1).items() >= change.get("settings", {}).items()


async def test_what_concerns_no_process_restarts_none(client, supervise, configurable):
    config = configurable()
    async with supervise(config):
        await running(client)
        before = await ask(client, PLUGINS_GET)
        new = msgspec.structs.replace(
            config,
            description="other",
            capabilities=["w.do"],
            memory_max_bytes=2**33,
            healthcheck=m.Healthcheck(interval_seconds=5),
        )
        after = await configure(client, new)
        assert after.config == new
        assert (after.pid, after.generation) == (before.pid, before.generation)


async def test_the_same_configuration_again_is_no_new_revision(client, supervise, configurable):
    config = configurable(autostart=False)
    async with supervise(config):
        before = await ask(client, PLUGINS_GET)
        assert (await configure(client, config)).revision == before.revision


async def test_a_plugin_that_is_stopped_stays_so_when_it_is_configured(
    client, supervise, configurable
):
    config = configurable(autostart=False)
    async with supervise(config):
        state = await configure(client, having(config, mode="exact"))
        assert (state.status, state.config.settings) == ("stopped", {"mode": "exact"})


async def test_history_says_who_changed_what_and_when_newest_first(client, supervise, configurable):
    config = configurable()
    async with supervise(config):
        await running(client)
        await configure(client, having(config, threshold=0.7))
        await ask(client, PLUGINS_SCALE, named(m.ScalePlugin, replicas=2, by="somebody"))
        await ask(client, PLUGINS_STOP)
        found = await history(client)
        assert [one.revision for one in found] == sorted(
            (one.revision for one in found), reverse=True
        )
        assert [[(c.field, c.before, c.after) for c in one.changes] for one in found] == [
            [("enabled", True, False)],
            [("replicas", 1, 2)],
            [("settings.threshold", None, 0.7)],
            [],
        ]
        assert [one.changed_by for one in found] == ["test", "somebody", "test", "catalogue"]
        assert [one.enabled for one in found] == [False, True, True, True]
        assert found[0].revision == (await ask(client, PLUGINS_GET)).revision
        assert found[2].config.settings == {"threshold": 0.7}
        assert [one.revision for one in await history(client, 1)] == [found[0].revision]
        with pytest.raises(NotFound, match="there are: w"):
            await client.call(PLUGINS_HISTORY, m.HistoryOfPlugin(name="nobody"))


async def test_sixty_four_revisions_are_kept(client, supervise, configurable):
    config = configurable(autostart=False)
    async with supervise(config):
        for n in range(70):
            await configure(client, msgspec.structs.replace(config, description=f"{n}"))
        assert len(await history(client, 64)) == 64


async def test_a_rollback_stores_the_older_configuration_as_a_new_revision(
    client, supervise, configurable, taken
):
    config = configurable()
    async with supervise(config):
        await running(client)
        first = await ask(client, PLUGINS_GET)
        second = await configure(client, having(config, mode="exact"))
        back = await ask(client, PLUGINS_ROLLBACK, named(m.RollbackPlugin, revision=first.revision))
        assert back.config == first.config
        assert back.revision > second.revision
        assert back.generation > second.generation
        assert taken()["mode"] == "fast"
        assert len(await history(client)) == 3
        with pytest.raises(NotFound, match=f"has no revision 999; kept are {first.revision}, "):
            await ask(client, PLUGINS_ROLLBACK, named(m.RollbackPlugin, revision=999))


async def test_a_rollback_to_what_is_no_longer_allowed_is_refused(client, supervise, configurable):
    config = configurable(settings={"mode": 5}, autostart=False)
    async with supervise(config):
        first = (await ask(client, PLUGINS_GET)).revision
        await configure(client, msgspec.structs.replace(config, settings={}))
        await ask(client, PLUGINS_START)
        await running(client)
        with pytest.raises(InvalidRequest, match=r"settings\.mode is 5; allowed is a text"):
            await ask(client, PLUGINS_ROLLBACK, named(m.RollbackPlugin, revision=first))


async def test_a_secret_appears_nowhere_but_in_the_worker(client, supervise, configurable, taken):
    config = configurable(settings={"password": SECRET})
    async with supervise(config):
        await running(client)
        assert taken()["password"] == SECRET
        new = having(config, password=f"{SECRET}-2")
        said = [
            await ask(client, PLUGINS_GET),
            await client.call(PLUGINS_LIST, m.Empty()),
            await check(client, new),
            await check(client, having(config, password=[SECRET])),
            await configure(client, new),
            await ask(client, PLUGINS_STOP),
            await history(client, 64),
            await client.store.events(limit=100),
            await client.store.logs(None, limit=1_000),
        ]
        assert "password" in codec.encode(said[2]).decode()
        assert SECRET.encode() not in codec.encode(said)
        with pytest.raises(InvalidRequest) as raised:
            await configure(client, having(config, password=[SECRET]))
        assert SECRET not in raised.value.message


async def test_a_mask_that_is_sent_back_keeps_the_secret(client, supervise, configurable, taken):
    config = configurable(settings={"password": SECRET})
    async with supervise(config):
        await running(client)
        shown = (await ask(client, PLUGINS_GET)).config
        assert shown.settings == {"password": MASK}
        after = await configure(client, having(shown, mode="exact"))
        assert after.config.settings == {"password": MASK, "mode": "exact"}
        assert taken() == {**taken(), "password": SECRET, "mode": "exact"}
        await configure(client, msgspec.structs.replace(config, settings={}))
        with pytest.raises(InvalidRequest, match="keeps the stored value, and none is stored"):
            await configure(client, shown)


async def test_every_command_is_an_event_with_who_and_why(client, supervise, configurable):
    config = configurable()
    async with supervise(config):
        await running(client)
        first = (await ask(client, PLUGINS_GET)).revision
        await configure(client, having(config, threshold=0.7))
        await ask(client, PLUGINS_ROLLBACK, named(m.RollbackPlugin, revision=first))
        await ask(client, PLUGINS_SCALE, named(m.ScalePlugin, replicas=2))
        await ask(client, PLUGINS_RESTART)
        await ask(client, PLUGINS_STOP)
        # What changes nothing is none.
        await ask(client, PLUGINS_STOP)
        await ask(client, PLUGINS_START)
        asked = [e for e in await client.store.events(limit=100, kind="plugin") if e.by]
        assert [(e.name, e.verb, e.by, e.cause) for e in asked] == [
            ("w", "configured", "test", "settings.threshold"),
            ("w", "rolled-back", "test", f"to revision {first}"),
            ("w", "scaled", "test", "from 1 to 2 replicas"),
            ("w", "restart-requested", "test", None),
            ("w", "stop-requested", "test", None),
            ("w", "start-requested", "test", None),
        ]


async def test_the_schema_of_the_newest_instances_is_the_one_that_is_kept(
    client, supervise, configurable, plugin
):
    async with supervise(configurable()):
        await running(client)
        other = PROGRAM.replace("mode: str", "manner: str")
        plugin(other)
        await ask(client, PLUGINS_RESTART)

        async def newest() -> bool:
            kept = await client.store.schemas.get("w")
            return "manner" in json.dumps(kept.value.config_schema)

        await until(newest, timeout_s=30)
        # And the old one does not come back when it is said again.
        revision = (await client.store.schemas.get("w")).revision
        await ask(client, PLUGINS_RESTART)
        assert (await client.store.schemas.get("w")).revision == revision


async def test_of_changes_at_the_same_time_none_is_lost(client, supervise, configurable):
    config = configurable(autostart=False)
    async with supervise(config):
        await ask(client, PLUGINS_GET)
        await asyncio.gather(
            configure(client, msgspec.structs.replace(config, description="other")),
            ask(client, PLUGINS_START, named(wait=False)),
        )
        state = await ask(client, PLUGINS_GET)
        assert state.config.description == "other"
        assert state.replicas.desired == 1


async def test_a_roll_out_that_halts_says_so_and_the_old_generation_goes_on(
    client, supervise, plugin
):
    sound_at_first = plugin(
        before="sys.exit('it is broken') if os.environ['BKG_GENERATION'] == '2' else None",
        replicas=2,
    )
    async with follow_plugins(client.store) as view, supervise(sound_at_first):
        await until(lambda: view.get("w") and view.get("w").replicas.ready == 2, 20)
        pids = {i.pid for i in view.get("w").instances}
        request = m.NamePlugin(name="w", by="test", timeout_s=4)
        with pytest.raises(DeadlineExceeded) as raised:
            await client.call(PLUGINS_RESTART, request, timeout_s=20)
        assert "the roll-out halts, because a replica of generation 2" in raised.value.message
        assert "it is broken" in raised.value.message
        assert "replica 0 runs generation 1 still" in raised.value.message
        state = view.get("w")
        assert {i.pid for i in state.instances if i.status == "running"} == pids
        assert "it is broken" in (state.error or "")
        # The next one is sound, and goes through.
        request = m.NamePlugin(name="w", by="test", timeout_s=30)
        renewed = await client.call(PLUGINS_RESTART, request, timeout_s=40)
        assert {i.generation for i in renewed.instances if i.slot < 2} == {3}

"""An instance takes changes of its configuration live, all of one or nothing."""

from typing import Annotated

import msgspec
import pytest
from msgspec import Meta

from bus import messages as m
from bus.errors import InvalidRequest
from bus.instance import Instance, join
from bus.subjects import TELEMETRY
from bus.testing import until


class Wanted(msgspec.Struct, kw_only=True):
    threshold: Annotated[float, Meta(le=1)] = 0.5
    mode: str = "fast"


@pytest.fixture
def want(client):
    """Write the plugin's desired state, and return its revision."""

    async def write(*, generation: int = 1, args: list[str] | None = None, **settings: object):
        config = m.PluginConfig(
            name="w", description="", entrypoint="x", capabilities=[], settings=settings,
            args=args or [],
        )  # fmt: skip
        desired = m.DesiredState(
            config=config, enabled=True, generation=generation, changed_by="t", changed_at=m.now()
        )
        return await client.store.desired.put(desired, "w")

    return write


def joined(client, settings, **more):
    return join(client, settings, plugin="w", description="a test", **more)


async def registered(client) -> m.Registration:
    entry = await client.store.instances.get("w", 0)
    return entry.value


async def has_revision(client, revision: int) -> bool:
    return (await registered(client)).config_revision == revision


def taking(instance: Instance, *names: str) -> list[Wanted]:
    """Note what an instance takes live."""
    seen: list[Wanted] = []
    instance.on_config(names, lambda: seen.append(instance.settings(Wanted)))
    return seen


async def test_a_live_setting_is_taken_and_told(client, settings, want):
    first = await want(threshold=0.1)
    async with joined(client, settings) as instance:
        seen = taking(instance, "threshold")
        await instance.ready()
        told = await registered(client)
        assert told.live_settings == ["telemetry_interval", "threshold"]
        assert told.config_revision == first
        revision = await want(threshold=0.2)
        await until(lambda: has_revision(client, revision))
        assert [one.threshold for one in seen] == [0.2]
        assert instance.config.settings == {"threshold": 0.2}


@pytest.mark.parametrize(
    "change", [{"threshold": 0.2, "mode": "exact"}, {"threshold": 0.2, "args": ["-v"]}]
)
async def test_of_a_change_that_needs_a_restart_nothing_is_taken(client, settings, want, change):
    first = await want(threshold=0.1)
    async with joined(client, settings) as instance:
        seen = taking(instance, "threshold")
        await instance.ready()
        await want(**change)
        # What comes after it, and can be taken, shows that it was seen.
        last = await want(threshold=0.3)
        await until(lambda: has_revision(client, last))
        assert [one.threshold for one in seen] == [0.3]
        assert first < last


async def test_one_that_is_about_to_be_replaced_takes_nothing(client, settings, want):
    await want(threshold=0.1)
    async with joined(client, settings) as instance:
        seen = taking(instance, "threshold")
        await instance.ready()
        await want(threshold=0.2, generation=2)
        last = await want(threshold=0.3)
        await until(lambda: has_revision(client, last))
        assert [one.threshold for one in seen] == [0.3]


async def test_a_change_that_the_plugin_refuses_leaves_it_as_it_was(client, settings, want):
    await want(threshold=0.1)
    async with joined(client, settings) as instance:
        taking(instance, "threshold")
        await instance.ready()
        await want(threshold=7)

        async def said() -> bool:
            records = await client.store.logs("w", limit=100, level="error")
            return any(one.message == "config.refused" for one in records)

        await until(said)
        assert instance.config.settings == {"threshold": 0.1}


async def test_a_change_between_joining_and_listening_is_not_missed(client, settings, want):
    await want(threshold=0.1)
    async with joined(client, settings) as instance:
        revision = await want(threshold=0.2)
        await until(lambda: instance._live._waiting)
        seen = taking(instance, "threshold")
        assert [one.threshold for one in seen] == [0.2]
        await instance.ready()
        assert await has_revision(client, revision)


async def test_what_concerns_no_process_counts_as_taken(client, settings, want):
    await want(threshold=0.1)
    async with joined(client, settings) as instance:
        seen = taking(instance, "threshold")
        revision = await want(threshold=0.1)
        await until(lambda: has_revision(client, revision))
        assert seen == []


async def test_every_plugin_takes_its_telemetry_interval_live(client, settings, want):
    await want(telemetry_interval=3_600)
    async with client.follow(TELEMETRY, plugin="w") as snapshots, joined(client, settings):
        await want(telemetry_interval=0.1)
        # A second period: it goes on in the new one.
        await until(lambda: len(snapshots._waiting) >= 2, timeout_s=30)


async def test_a_plugin_without_desired_state_takes_it_when_it_comes(client, settings, want):
    async with joined(client, settings) as instance:
        taking(instance, "threshold")
        await instance.ready()
        revision = await want(threshold=0.2)
        await until(lambda: has_revision(client, revision))


async def test_settings_that_do_not_fit_still_name_the_setting(client, settings, want):
    await want(threshold="high")
    async with joined(client, settings) as instance:
        with pytest.raises(InvalidRequest, match="threshold"):
            instance.settings(Wanted)

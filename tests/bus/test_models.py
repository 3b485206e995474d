"""Which version answers to which name, by one rule for everybody."""

from datetime import timedelta

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus import messages as m
from bus.models import follow_models, latest, names_of, next_version, version_of
from bus.testing import until

BEGAN = m.now()


def version(name: str, *, wanted: bool = True, after: int = 0) -> m.ModelVersion:
    return m.ModelVersion(
        version=name, path="m.json", checksum=name * 4, format="linear",
        added_at=BEGAN + timedelta(seconds=after), wanted=wanted,
    )  # fmt: skip


def spec(*versions: m.ModelVersion, **aliases: str) -> m.ModelSpec:
    return m.ModelSpec(id="m", versions=list(versions), aliases=aliases)


def named(found: m.ModelVersion | None) -> str | None:
    return found.version if found else None


def test_a_request_that_names_no_version_gets_the_highest_number():
    assert named(version_of(spec(version("9"), version("10"), version("2")))) == "10"


def test_a_version_that_is_not_wanted_is_not_the_latest_while_another_one_is():
    assert named(latest(spec(version("1"), version("2", wanted=False)))) == "1"
    assert named(latest(spec(version("1", wanted=False), version("2", wanted=False)))) == "2"


def test_versions_without_numbers_go_by_when_they_came():
    assert named(latest(spec(version("blue", after=2), version("green", after=1)))) == "blue"
    assert named(latest(spec(version("blue", after=2), version("1")))) == "1"


def test_default_can_be_held_on_an_older_version():
    two = spec(version("1"), version("2"), default="1", canary="2")
    assert named(version_of(two)) == "1"
    assert named(version_of(two, "latest")) == "2"
    assert named(version_of(two, "canary")) == "2"
    assert version_of(two, "nobody") is None


def test_a_model_answers_to_its_wanted_versions_and_what_leads_to_them():
    two = spec(version("1", wanted=False), version("2"), old="1", stable="2")
    assert {name: v.version for name, v in names_of(two).items()} == dict.fromkeys(
        ("2", "default", "latest", "stable"), "2"
    )


def test_the_next_version_is_one_more_than_the_highest():
    assert next_version(None) == "1"
    assert next_version(spec(version("blue"))) == "1"
    assert next_version(spec(version("3"), version("10"))) == "11"


@given(
    st.lists(st.tuples(st.from_regex(r"[a-z0-9]{1,3}", fullmatch=True), st.booleans())),
    st.dictionaries(st.sampled_from(["default", "a", "b"]), st.sampled_from(["1", "2", "x"])),
)
def test_every_name_leads_to_a_wanted_version_of_the_model(versions, aliases):
    one = m.ModelSpec(id="m", versions=[version(n, wanted=w) for n, w in versions], aliases=aliases)
    for found in names_of(one).values():
        assert found.wanted
        assert found in one.versions


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "-", "x" * 65, "a b"])
def test_a_name_that_is_no_version_is_refused(name):
    with pytest.raises(msgspec.ValidationError, match="version"):
        msgspec.convert({"id": "m", "version": name}, m.LoadModel)


async def test_a_view_that_has_caught_up_shows_what_was_written_before_it_was_asked(client):
    async with follow_models(client.store) as view:
        assert await view.catch_up(5.0)
        for i in range(20):
            here = m.ServedModels(plugin="candle", slot=i, instance="i", host="h", models=[])
            await client.store.served.put(here, "candle", i)
            await client.store.models.put(spec(version(str(i))), "m")
            # What lies in the same bucket and is not followed, or cannot be read, is no obstacle.
            await client.store.removed.put(m.RemovedFile(removed_at=m.now()), "m", "digest")
            await client._nc.publish(f"$KV.{client.root}-models.broken", b"no JSON")
            assert await view.catch_up(5.0)
            assert len(view.instances()) == i + 1
            assert version_of(view.spec("m")).version == str(i)


async def test_the_view_follows_what_is_wanted_and_what_is_served(client):
    async with follow_models(client.store) as view:
        await client.store.models.put(spec(version("1")), "m")
        await until(lambda: view.spec("m"))
        assert not view.ready("m", "1")
        served = m.ServedModel(id="m", version="1", state="loading", since=m.now())
        for slot, state in enumerate(("cold", "loading", "ready")):
            here = m.ServedModels(
                plugin="candle", slot=slot, instance="i", host="h",
                models=[msgspec.structs.replace(served, state=state)],
            )  # fmt: skip
            await client.store.served.put(here, "candle", slot)
        await until(lambda: view.ready("m", "1"))
        assert [one.state for _, one in view.served("m", "1")] == ["ready", "loading", "cold"]
        await client.store.served.delete("candle", 2)
        await until(lambda: not view.ready("m", "1"))
        await client.store.models.delete("m")
        await until(lambda: view.spec("m") is None)

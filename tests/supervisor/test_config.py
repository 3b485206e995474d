"""Configurations: checked in sentences, compared, and judged by what a change takes."""

from typing import Annotated, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

from bus import codec
from bus.masking import MASK
from bus.messages import Healthcheck, PluginConfig, Registration, now
from services.supervisor import config as rules

SECRET = "hunter2-never-to-be-shown"


class Inner(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    host: str
    port: Annotated[int, Meta(ge=1, le=65_535)] = 1


class Wanted(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    threshold: Annotated[float, Meta(ge=-1, le=1)] | None = None
    max_waiting: Annotated[int, Meta(ge=1, le=100)] = 64
    period: Annotated[float, Meta(gt=0, le=3600)] = 10
    mode: Literal["fast", "exact"] = "fast"
    label: Annotated[str, Meta(min_length=1, max_length=5)] = "x"
    name: Annotated[str, Meta(pattern="^[a-z]+$", description="must be small letters")] = "x"
    loud: bool = False
    tags: list[str] = []
    target: Inner | None = None
    password: Annotated[str, Meta(extra_json_schema={"format": "password"})] | None = None


SCHEMA = codec.schema(Wanted)


def config(**more: object) -> PluginConfig:
    given_fields = {"name": "w", "description": "", "entrypoint": "x", "capabilities": [], **more}
    return msgspec.convert(given_fields, PluginConfig)


def said(schema: object = None, /, **settings: object) -> dict[str, str]:
    found = rules.errors(config(settings=settings), SCHEMA if schema is None else schema)
    return {one.field: one.message for one in found}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_waiting": 0}, "max_waiting is 0; allowed is a whole number from 1 to 100"),
        ({"max_waiting": "many"}, 'max_waiting is "many"; allowed is a whole number from 1 to 100'),
        ({"threshold": 2}, "threshold is 2; allowed is a number from -1 to 1 or null"),
        ({"period": 0}, "period is 0; allowed is a number above 0 up to 3600"),
        ({"mode": "slow"}, 'mode is "slow"; allowed is one of "exact", "fast"'),
        ({"label": ""}, 'label is ""; allowed is a text of 1 to 5 characters'),
        ({"name": "A1"}, 'name is "A1"; allowed is a text (must be small letters)'),
        ({"loud": "yes"}, 'loud is "yes"; allowed is true or false'),
        ({"tags": {"a": 1}}, "tags is an object; allowed is a list"),
        ({"tags": [1]}, "tags[0] is 1; allowed is a text"),
        ({"target": {"host": "h", "port": 0}},
         "target.port is 0; allowed is a whole number from 1 to 65535"),
        ({"target": {}}, "settings.target.host is missing; needed is a text"),
        ({"target": 5}, "target is 5; allowed is an object or null"),
    ],
)  # fmt: skip
def test_an_error_names_the_path_the_value_and_what_is_allowed(settings, message):
    [(field, told)] = said(**settings).items()
    assert told == (message if message.startswith("settings") else f"settings.{message}")
    assert told.startswith(field)


def test_an_unknown_setting_names_the_nearest_known_one():
    assert said(treshold=1) == {
        "settings.treshold": "settings has no 'treshold'; did you mean 'threshold'?"
    }
    assert "there are label, loud, max_waiting" in said(zzz=1)["settings.zzz"]
    assert "did you mean 'port'?" in said(target={"host": "h", "prt": 1})["settings.target.prt"]


def test_all_errors_are_listed():
    wrong = {"max_waiting": 0, "mode": "slow", "colour": 1, "target": {"port": "x"}}
    assert list(said(**wrong)) == [
        "settings.colour",
        "settings.max_waiting",
        "settings.mode",
        "settings.target.host",
        "settings.target.port",
    ]


def test_what_fits_has_no_errors():
    assert said(threshold=None, target={"host": "h"}, password="p") == {}
    assert said(None) == {}
    assert rules.errors(config(settings={"any": 1}), None) == []


@pytest.mark.parametrize(
    "schema",
    [
        {"type": 5},
        {"$ref": "http://127.0.0.1:9/schema.json"},
        {"$ref": "#/nowhere"},
        {"$ref": "#"},
    ],
)
def test_an_unsound_schema_checks_nothing_and_fetches_nothing(schema):
    assert rules.errors(config(settings={"a": 1}), schema) == []


def test_a_wrong_secret_is_not_told_in_its_error():
    [(field, told)] = said(password=[SECRET]).items()
    assert field == "settings.password"
    assert SECRET not in told
    assert MASK in told


def test_a_mask_that_stands_for_nothing_is_an_error():
    assert "none is stored" in said(password=MASK)["settings.password"]
    # A setting that is no secret may be anything.
    assert said({"type": "object"}, label=MASK) == {}


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text("abcmax_-", max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abcmax_-", max_size=8), inner)
    ),
    max_leaves=8,
)
known = st.sampled_from([field.name for field in msgspec.structs.fields(Wanted)])


@given(st.dictionaries(known | st.text("abcmax_-", max_size=8), values, max_size=5))
def test_the_check_agrees_with_what_the_worker_itself_would_say(settings):
    try:
        msgspec.convert(settings, Wanted)
        fits = True
    except msgspec.ValidationError:
        fits = False
    found = rules.errors(config(settings=settings), SCHEMA)
    # JSON Schema takes 1.0 for a whole number, as JSON does.
    if fits or not any(isinstance(one, float) for one in settings.values()):
        assert (found == []) == fits, found
    assert all(one.message.startswith(("settings.", "settings has no ")) for one in found)


wrong_secrets = values.map(lambda value: [SECRET, value]) | st.just({"x": SECRET})


@given(wrong_secrets, wrong_secrets)
def test_a_secret_never_appears_in_errors_or_changes(before, after):
    was, new = (config(settings={"password": one, "label": 5}) for one in (before, after))
    told = [*rules.errors(new, SCHEMA), *rules.changes(was, new, [SCHEMA])]
    assert SECRET.encode() not in codec.encode(told)


def test_changes_name_each_field_with_before_and_after():
    was = config(settings={"a": {"b": 1, "c": 2}, "d": 1}, env={"X": "1"})
    new = config(settings={"a": {"b": 1, "c": 3}, "e": None}, env={}, replicas=2)
    found = [(c.field, c.before, c.after) for c in rules.changes(was, new, [])]
    assert found == [
        ("env.X", "1", None),
        ("replicas", 1, 2),
        ("settings.a.c", 2, 3),
        ("settings.d", 1, None),
        ("settings.e", None, None),
    ]


def test_a_changed_secret_shows_that_it_changed_and_nothing_else():
    was, new = config(settings={"password": "a"}), config(settings={"password": "b"})
    assert [(c.field, c.before, c.after) for c in rules.changes(was, new, [SCHEMA])] == [
        ("settings.password", MASK, MASK)
    ]


@pytest.mark.parametrize(
    ("change", "restarts"),
    [
        ({"replicas": 3}, False),
        ({"description": "other"}, False),
        ({"capabilities": ["a.b"]}, False),
        ({"requires": {"gpu": "yes"}}, False),
        ({"memory_max_bytes": 2**30}, False),
        ({"healthcheck": Healthcheck(interval_seconds=5)}, False),
        ({"settings": {"threshold": 0.2, "max_waiting": 1}}, False),
        ({"settings": {"threshold": 0.2, "mode": "exact"}}, True),
        ({"settings": {"max_waiting": True}}, False),
        ({"settings": {"mode": None}}, True),
        ({"entrypoint": "y"}, True),
        ({"args": ["-v"]}, True),
        ({"env": {"A": "1"}}, True),
        ({"replicas": 3, "env": {"A": "1"}}, True),
        ({}, False),
    ],
)
def test_what_changed_decides_whether_instances_are_replaced(change, restarts):
    was = config(settings={"max_waiting": 1})
    new = msgspec.structs.replace(was, **change)
    live = frozenset({"threshold", "max_waiting"})
    assert rules.needs_restart(was, new, live) == restarts


def test_true_is_not_one():
    assert not rules.same(config(settings={"a": 1}), config(settings={"a": True}))
    assert rules.same(config(settings={"a": 1}), config(settings={"a": 1}))


def test_live_is_what_all_instances_take_live():
    def one(*live: str) -> Registration:
        return Registration(
            id="i", plugin="w", slot=0, host="h", pid=1, version="1", capabilities=[],
            status="running", since=now(), last_heartbeat=now(), live_settings=list(live),
        )  # fmt: skip

    assert rules.live_settings([one("a", "b"), one("b", "c")]) == {"b"}
    assert rules.live_settings([]) == frozenset()

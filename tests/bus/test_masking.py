"""Secrets in settings: hidden wherever they are shown, and kept when the mask comes back."""

from typing import Annotated

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

from bus import codec
from bus.masking import MASK, masked, masked_settings, unmasked
from bus.messages import DesiredState, PluginConfig, Registration, now
from bus.plugins import plugin_state
from bus.state import Entry

SECRET = "hunter2-never-to-be-shown"
PASSWORD = {"type": "string", "format": "password"}
DEFS = {"$defs": {"x/y": PASSWORD}}


class Inner(msgspec.Struct, kw_only=True):
    token: Annotated[str, Meta(extra_json_schema={"writeOnly": True})]


class Wanted(msgspec.Struct, kw_only=True):
    password: Annotated[str, Meta(extra_json_schema={"format": "password"})] | None = None
    inner: Inner | None = None
    each: list[Inner] = []
    by_name: dict[str, Inner] = {}


def config(**settings: object) -> PluginConfig:
    return PluginConfig(
        name="w", description="", entrypoint="x", capabilities=[], settings=settings
    )


@pytest.mark.parametrize(
    ("schema", "settings"),
    [
        ({"properties": {"a": PASSWORD}}, {"a": SECRET}),
        ({"properties": {"a": {"writeOnly": True}}}, {"a": {"any": [SECRET]}}),
        ({"properties": {"a": {"writeOnly": True}}}, {"a": 5}),
        (
            {"properties": {"a": {"$ref": "#/$defs/x~1y"}}, "$defs": {"x/y": PASSWORD}},
            {"a": SECRET},
        ),
        ({"properties": {"a": {"anyOf": [{"type": "null"}, PASSWORD]}}}, {"a": SECRET}),
        ({"allOf": [{"properties": {"a": PASSWORD}}]}, {"a": SECRET}),
        ({"if": {}, "then": {"properties": {"a": PASSWORD}}}, {"a": SECRET}),
        ({"dependentSchemas": {"b": {"properties": {"a": PASSWORD}}}}, {"a": SECRET}),
        ({"patternProperties": {"^a": PASSWORD}}, {"a": SECRET}),
        ({"patternProperties": {"(": PASSWORD}}, {"a": SECRET}),
        ({"additionalProperties": PASSWORD}, {"a": SECRET}),
        ({"properties": {"a": {"items": PASSWORD}}}, {"a": [SECRET]}),
        ({"properties": {"a": {"prefixItems": [{}, PASSWORD]}}}, {"a": ["b", SECRET]}),
        ({"properties": {"a": {"items": [PASSWORD]}}}, {"a": [SECRET]}),
        (PASSWORD, {"a": SECRET}),
        (codec.schema(Wanted), {"password": SECRET}),
        (codec.schema(Wanted), {"inner": {"token": SECRET}}),
        (codec.schema(Wanted), {"each": [{"token": SECRET}]}),
        (codec.schema(Wanted), {"by_name": {"x": {"token": SECRET}}}),
    ],
)
def test_a_secret_is_hidden_wherever_a_schema_can_say_that_it_is_one(schema, settings):
    shown = codec.encode(masked_settings(settings, schema)).decode()
    assert SECRET not in shown
    assert MASK in shown


def test_what_is_no_secret_is_shown_and_a_secret_without_value_is_null():
    given_settings = {"password": None, "by_name": {}, "other": [1, "x", True]}
    assert masked_settings(given_settings, codec.schema(Wanted)) == given_settings
    assert masked(config(a=1), None) == config(a=1)


def test_a_schema_that_refers_to_itself_ends():
    schema = {"$ref": "#", "properties": {"a": {"$ref": "#"}, "b": PASSWORD}}
    assert masked_settings({"a": {"a": {"b": SECRET}}}, schema) == {"a": {"a": {"b": MASK}}}


def test_the_mask_sent_back_keeps_what_is_stored():
    stored = config(password=SECRET, each=[{"token": "1"}, {"token": "2"}], plain="x")
    sent = config(password=MASK, each=[{"token": MASK}, {"token": "new"}], plain="y")
    assert unmasked(sent, stored).settings == {
        "password": SECRET,
        "each": [{"token": "1"}, {"token": "new"}],
        "plain": "y",
    }
    # Nothing is stored there: whoever checks it sees that it is the mask.
    assert unmasked(config(password=MASK), config()).settings == {"password": MASK}


names = st.sampled_from(["a", "b", "c"])
leaves = st.none() | st.booleans() | st.integers(-9, 9) | st.text("abc", max_size=5)
# A schema and settings that fit together: pairs of (schema, value), with secrets in them.
secrets = st.tuples(
    st.sampled_from([{"format": "password"}, {"writeOnly": True, "type": "string"}]),
    st.just(SECRET),
)
pairs = st.recursive(
    secrets | leaves.map(lambda value: ({}, value)),
    lambda inner: (
        st.dictionaries(names, inner, max_size=3).map(
            lambda d: (
                {"properties": {key: schema for key, (schema, _) in d.items()}},
                {key: value for key, (_, value) in d.items()},
            )
        )
        | inner.map(lambda p: ({"items": p[0]}, [p[1], p[1]]))
        | inner.map(lambda p: ({"anyOf": [{"type": "null"}, p[0]]}, p[1]))
        | inner.map(lambda p: ({"additionalProperties": p[0]}, {"k": p[1]}))
    ),
    max_leaves=12,
)
documents = st.dictionaries(names, pairs, max_size=3)


@given(documents)
def test_a_secret_never_appears_in_an_encoded_state(found):
    schema = {"properties": {key: one for key, (one, _) in found.items()}}
    wanted = config(**{key: value for key, (_, value) in found.items()})
    desired = DesiredState(
        config=wanted, enabled=True, generation=1, changed_by="t", changed_at=now()
    )
    told = Registration(
        id="i", plugin="w", slot=0, host="h", pid=1, version="1", capabilities=[],
        status="running", since=now(), last_heartbeat=now(), config_schema=schema,
    )  # fmt: skip
    entry = Entry(("w",), desired, 1)
    for instances, kept in (([], schema), ([told], None), ([told], {"properties": {}})):
        state = plugin_state("w", entry, [], instances, kept)
        for content_type in (codec.JSON, codec.MSGPACK):
            assert SECRET.encode() not in codec.encode(state, content_type)


@given(documents)
def test_what_was_shown_and_sent_back_is_what_is_stored(found):
    schema = {"properties": {key: one for key, (one, _) in found.items()}}
    stored = config(**{key: value for key, (_, value) in found.items()})
    assert unmasked(masked(stored, schema), stored) == stored

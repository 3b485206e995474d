"""The catalogue: read with clear errors, and seeded once."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.errors import InvalidRequest
from services.supervisor import catalogue

GOOD = {"name": "a", "description": "d", "entrypoint": "x", "capabilities": []}


def test_the_shipped_catalogue_has_both_plugins_and_starts_them():
    configs = {config.name: config for config in catalogue.load(catalogue.SHIPPED)}
    assert set(configs) == {"candle", "rustyface"}
    assert all(config.autostart for config in configs.values())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "Expected `array`"),
        ("[{", "not JSON"),
        ("{}", "Expected `array`"),
        (json.dumps([{**GOOD, "autostrat": True}]), "did you mean `autostart`"),
        (json.dumps([{**GOOD, "zzz": 1}]), "known are name, description"),
        # The plugin is named, not only its place in the list.
        (json.dumps([GOOD, {**GOOD, "name": "b", "env": {"x": 1}}]), "plugin 'b': [1].env"),
        (json.dumps([{**GOOD, "replicas": 1000}]), "replicas"),
        (json.dumps([{**GOOD, "name": "Not A Name"}]), "must be a plugin's name"),
        (json.dumps([GOOD, GOOD]), "has a more than once"),
        (json.dumps([{"name": "a"}]), "missing required field `description`"),
    ],
)
def test_a_broken_catalogue_says_where_it_is_wrong(tmp_path, content, says):
    path = tmp_path / "plugins.json"
    path.write_text(content)
    with pytest.raises(InvalidRequest) as raised:
        catalogue.load(path)
    assert str(path) in raised.value.message
    assert says in raised.value.message


def test_a_missing_catalogue_is_named(tmp_path):
    with pytest.raises(InvalidRequest, match=r"none\.json cannot be read: No such file"):
        catalogue.load(tmp_path / "none.json")


@given(st.binary(max_size=200))
def test_any_bytes_are_a_catalogue_or_a_clear_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("catalogue") / "plugins.json"
    path.write_bytes(content)
    try:
        assert catalogue.load(path) == []
    except InvalidRequest as error:
        said = error.message
        assert str(path) in said


async def test_seeding_leaves_what_is_there(client, tmp_path):
    path = tmp_path / "plugins.json"
    path.write_text(json.dumps([{**GOOD, "autostart": True}]))
    await catalogue.seed(client.store, catalogue.load(path))
    path.write_text(json.dumps([{**GOOD, "description": "changed"}, {**GOOD, "name": "b"}]))
    await catalogue.seed(client.store, catalogue.load(path))
    entries = {entry.names[0]: entry.value for entry in await client.store.desired.all()}
    assert entries["a"].config.description == "d"
    assert entries["a"].enabled
    assert not entries["b"].enabled

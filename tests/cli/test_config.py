"""A plugin's configuration from the command line, on a running platform."""

import json
from typing import Any

import pytest

from bus.messages import PluginConfig
from services.cli.config import _assignment, _with


@pytest.mark.parametrize("args", [["config"], ["config", "candle", "--set", "x"],
                                  ["config", "candle", "--set", "=1"],
                                  ["config", "candle", "/no/such/file"], ["scale", "candle"],
                                  ["scale", "candle", "101"], ["history"], ["rollback", "candle"],
                                  ["rollback", "candle", "x"]])  # fmt: skip
async def test_wrong_usage_has_status_2_and_a_reason(args: list[str], bkg: Any):
    ended = await bkg("plugins", *args)
    assert ended.status == 2
    assert "Error" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a=1", (["a"], 1)),
        ("a=true", (["a"], True)),
        ("a=text", (["a"], "text")),
        ('a="1"', (["a"], "1")),
        ("a.b=null", (["a", "b"], None)),
        ("a=b=c", (["a"], "b=c")),
        ("a=", (["a"], "")),
    ],
)
def test_a_value_is_json_or_else_text(text: str, found: object):
    assert _assignment(text) == found


def test_set_changes_one_setting_and_leaves_the_others():
    config = PluginConfig(
        name="w", description="", entrypoint="x", capabilities=[], settings={"a": {"b": 1, "c": 2}}
    )
    changed = _with(config, [(["a", "b"], 5), (["d", "e"], "x")])
    assert changed.settings == {"a": {"b": 5, "c": 2}, "d": {"e": "x"}}
    assert config.settings == {"a": {"b": 1, "c": 2}}


async def test_a_configuration_is_shown_checked_changed_and_taken_back(
    up: Any, bkg: Any, tmp_path: Any
):
    async with up():
        shown = await bkg("plugins", "config", "candle")
        assert shown.json["name"] == "candle"
        [state] = (await bkg("status", "--json")).json
        first, pid = state["revision"], state["pid"]

        checked = await bkg("plugins", "config", "candle", "--set", "max_batch_rows=8", "--check")
        assert (checked.status, checked.out.splitlines()) == (
            0,
            ["settings.max_batch_rows  - -> 8", "allowed; no instance restarts"],
        )
        wrong = await bkg(
            "plugins", "config", "candle", "--set", "max_batch_row=0", "--set", "threads=0",
            "--check",
        )  # fmt: skip
        assert wrong.status == 1
        assert "error  settings has no 'max_batch_row'; did you mean 'max_batch_rows'?" in wrong.out
        assert "settings.threads is 0; allowed is a whole number from 1 to 256" in wrong.out
        refused = await bkg("plugins", "config", "candle", "--set", "threads=0")
        assert refused.status == 1
        assert "allowed is a whole number from 1 to 256" in refused.err

        changed = await bkg("plugins", "config", "candle", "--set", "max_batch_rows=8", "--json")
        assert changed.json["config"]["settings"] == {"max_batch_rows": 8}
        assert changed.json["pid"] == pid

        file = tmp_path / "candle.json"
        file.write_text(json.dumps({**shown.json, "settings": {"threads": 2}}))
        again = await bkg("plugins", "config", "candle", str(file))
        assert "settings.threads  - -> 2" in again.out
        assert "settings.max_batch_rows  8 -> -" in again.out

        history = await bkg("plugins", "history", "candle")
        lines = history.out.splitlines()
        assert lines[0].split() == ["revision", "when", "who", "generation", "state", "changes"]
        assert "cli" in lines[1]
        assert "catalogue" in lines[-1]
        told = (await bkg("plugins", "history", "candle", "--limit", "2", "--json")).json
        assert [one["changedBy"] for one in told] == ["cli", "cli"]

        back = await bkg("plugins", "rollback", "candle", str(first))
        assert "settings.threads  2 -> -" in back.out
        unknown = await bkg("plugins", "rollback", "candle", "999999")
        assert unknown.status == 1
        assert "kept are" in unknown.err

        more = await bkg("plugins", "scale", "candle", "2", "--json")
        assert more.json["replicas"] == {"desired": 2, "ready": 2}
        less = await bkg("plugins", "scale", "candle", "1")
        assert "1/1" in less.out

"""What the commands read and write as text: names, progress, examples."""

import ast
import json
import math
import shlex
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from rich.text import Text

from bus.messages import ModelVersion, TensorInfo, now
from services.cli.console import out, plain_table
from services.cli.examples import WRITTEN_MAX, examples_of
from services.cli.options import named, pairs
from services.cli.progress import line_of

versions = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True)
names = st.text(st.characters(categories=["L", "N"], include_characters=" :.-"), min_size=1)
tensors = st.builds(
    TensorInfo,
    name=st.from_regex(r"[a-z'\"]{1,6}", fullmatch=True),
    datatype=st.sampled_from(["FP32", "INT64", "UINT8", "BOOL", "BYTES"]),
    shape=st.lists(st.sampled_from([-1, 1, 2, 3, 40]), max_size=3),
)


def test_no_name_is_a_command_to_the_terminal():
    table = plain_table("person")
    table.add_row(Text("\x1b[31mred\x9b2J\u202e, Jos\u00e9", "red"))
    with out.capture() as captured:
        out.print(Text("\x1b]0;title\x07 anna\nb"))
        out.print(table, soft_wrap=False)
    shown = captured.get()
    assert shown.splitlines()[:2] == ["]0;title anna", "b"]
    assert "[31mred2J, Jos\u00e9" in shown
    assert not set(shown) & set("\x1b\x07\x9b\u202e")


@given(names.filter(lambda name: ":" not in name), versions)
def test_a_name_and_a_version_are_split_at_the_colon(name: str, version: str):
    assert named(f"{name}:{version}") == (name, version)
    assert named(name) == (name, None)
    assert named(name, version) == (name, version)


@given(names, versions)
def test_a_name_with_colons_ends_in_one(name: str, version: str):
    assert named(f"{name}:", version) == (name, version)
    assert named(f"{name}:") == (name, None)


@given(st.dictionaries(st.from_regex(r"[a-z]{1,5}", fullmatch=True), st.text(), min_size=1))
def test_labels_keep_every_character_of_their_values(labels: dict[str, str]):
    texts = [f"{key}={value}" for key, value in labels.items()]
    assert pairs(texts, "--label") == labels


def test_no_labels_are_none_and_a_word_is_no_label():
    assert pairs([], "--label") is None
    with pytest.raises(typer.BadParameter, match="'vision' is no KEY=VALUE"):
        pairs(["vision"], "--label")


@pytest.mark.parametrize(("done", "total", "before", "spent_s", "line"), [
    (0, 10_000, 0, 0.0, "x: 0 bytes of 10.0 kB"),
    (5_000, 10_000, 0, 5.0, "x: 5.0 kB of 10.0 kB, 1.0 kB/s, 5 s left"),
    (5_000, 10_000, 4_000, 1.0, "x: 5.0 kB of 10.0 kB, 1.0 kB/s, 5 s left"),
    (10_000, 10_000, 0, 2.0, "x: 10.0 kB of 10.0 kB, 5.0 kB/s"),
    (5_000_000, None, 0, 1.0, "x: 5.0 MB, 5.0 MB/s"),
])  # fmt: skip
def test_progress_is_a_line_with_rate_and_time_left(
    done: int, total: int | None, before: int, spent_s: float, line: str
):
    assert line_of("x", done, total, before, spent_s) == line


@given(st.lists(tensors, min_size=1, max_size=3))
def test_an_example_has_as_many_values_as_its_shapes_say(inputs: list[TensorInfo]):
    version = ModelVersion(
        version="2", path="m.onnx", checksum="00", format="onnx", added_at=now(), inputs=inputs
    )
    told = examples_of("a b", version, url="http://x", key_file=Path("/a key"), root="bkg")
    assignment = next(n for n in ast.parse(told.python).body if _names(n) == "body")
    namespace: dict[str, dict[str, list[dict[str, object]]]] = {}
    exec(ast.unparse(assignment), namespace)  # noqa: S102 - text of our own
    body = namespace["body"]["inputs"]
    assert [one["name"] for one in body] == [one.name for one in inputs]
    for one in body:
        assert len(one["data"]) == math.prod(one["shape"])  # type: ignore[arg-type]
    if sum(len(one["data"]) for one in body) <= WRITTEN_MAX:  # type: ignore[arg-type]
        words = shlex.split(told.nats.replace("\\\n", " "))
        assert words[:3] == ["nats", "req", "bkg.call.candle.model.infer.a=20b.2"]
        assert json.loads(words[3]) == {"inputs": body}
        assert json.loads(shlex.split(told.curl.replace("\\\n", " "))[-1]) == {"inputs": body}
    else:
        assert told.nats.startswith("python3 -c ")


def _names(node: ast.stmt) -> str:
    target = node.targets[0] if isinstance(node, ast.Assign) else None
    return target.id if isinstance(target, ast.Name) else ""

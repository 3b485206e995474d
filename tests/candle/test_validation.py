"""Validation: what a file is, found without trusting it, and told in words."""

import asyncio
import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from bus import codec
from bus import messages as m
from bus.errors import BusError, InvalidRequest, Unavailable, Unprocessable
from bus.subjects import MODEL_LOAD
from bus.telemetry import resident_bytes
from services.candle import models
from services.candle.repository.validation import Limits, validate
from services.candle.runtimes.linear import Linear, faults_of
from services.candle.runtimes.onnx_file import read_file

FLOAT, INT64, STRING, DOUBLE = (
    TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING, TensorProto.DOUBLE,
)  # fmt: skip
IRIS = Path(models.__file__).parent / "iris.onnx"
DEMO = Path(models.__file__).parent / "linear-demo.json"
MIB = 1 << 20


def model(
    nodes: Sequence, takes: Sequence, gives: Sequence, *, weights=(), opset=17, **more: Any
) -> bytes:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(*spec) for spec in takes],
        [helper.make_tensor_value_info(*spec) for spec in gives],
        list(weights),
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("mine", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, **more).SerializeToString()


def op(kind: str, takes: str = "x", gives: str = "y", **attributes: Any):
    return helper.make_node(kind, takes.split(), gives.split(), **attributes)


ROWS = [("x", FLOAT, ["n", 2])]
OUT = [("y", FLOAT, ["n", 2])]


def outside(place: str) -> TensorProto:
    tensor = TensorProto(name="w", data_type=FLOAT, dims=[2])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=place)
    return tensor


def adds(weight: TensorProto) -> bytes:
    return model([op("Add", "x w")], ROWS, OUT, weights=[weight])


def gathers() -> bytes:
    """Look rows up in a table that has none for 0: zeros are an index into nothing."""
    start = numpy_helper.from_array(np.array([-5], np.int64), "five")
    table = numpy_helper.from_array(np.arange(4, dtype=np.float32), "t")
    nodes = [op("Add", "x five", "i"), op("Gather", "t i")]
    return model(nodes, [("x", INT64, ["n"])], [("y", FLOAT, ["n"])], weights=[start, table])


def nested(depth: int) -> bytes:
    """Branches in branches, which no library would write so deep."""

    def field(number: int, content: bytes) -> bytes:
        length, left = b"", len(content)
        while left > 127:
            length, left = length + bytes([left & 127 | 128]), left >> 7
        return bytes([number << 3 | 2]) + length + bytes([left]) + content

    graph = b""
    for _ in range(depth):
        graph = field(1, field(5, field(6, graph)))
    return b"\x08\x08" + field(7, graph)


@pytest.fixture
def validated(tmp_path):
    async def validate_content(content: bytes, name="m.onnx", **more: Any) -> m.ModelReport:
        path = tmp_path / name
        path.write_bytes(content)
        return await validate(path, name=name, **more)

    return validate_content


def said(report: m.ModelReport) -> str:
    return "\n".join(problem.what for problem in report.problems)


# --- What is sound --------------------------------------------------------------------------------


async def test_a_sound_model_is_described_as_a_whole():
    report = await validate(IRIS, name="iris.onnx", checksum="0" * 64)
    assert (report.sound, report.problems, report.advice) == (True, [], [])
    assert report.checksum == "0" * 64
    assert report.size_bytes == IRIS.stat().st_size
    assert report.inputs == [m.TensorInfo("flower", "FP32", [-1, 4])]
    assert [tensor.name for tensor in report.outputs] == ["probabilities", "species"]
    assert (report.format, report.opset, report.batched) == ("onnx", 17, True)
    assert report.producer == "bkg"
    assert report.operators == {"Gemm": 2, "Tanh": 1, "Softmax": 1, "ArgMax": 1}
    assert report.parameters == 67
    assert report.sample_shapes == {"flower": [1, 4]}
    assert report.runtime.startswith("onnxruntime ")
    assert report.load_ms > 0
    assert report.run_ms > 0
    assert report.peak_memory_bytes > 0


async def test_a_linear_model_needs_no_onnxruntime():
    report = await validate(DEMO, name="linear-demo.json")
    assert report.sound
    assert len(report.checksum) == 64
    assert (report.format, report.parameters, report.batched) == ("linear", 8, True)
    assert report.runtime.startswith("numpy ")


async def test_texts_are_run_too(validated):
    report = await validated(
        model([op("Identity")], [("x", STRING, ["n"])], [("y", STRING, ["n"])])
    )
    assert report.sound
    assert report.run_ms is not None
    assert report.inputs[0].datatype == "BYTES"


async def test_the_peak_of_memory_is_the_models_own_and_the_worker_stays_flat(validated):
    weights = numpy_helper.from_array(np.ones((4 * MIB, 2), np.float32), "w")
    content = model([op("ReduceSum", "w", "s", keepdims=0), op("Add", "x s")], ROWS, OUT,
                    weights=[weights])  # fmt: skip
    del weights
    before = resident_bytes()
    report = await validated(content)
    assert report.sound
    assert report.parameters == 8 * MIB
    assert 32 * MIB < report.peak_memory_bytes < 512 * MIB
    assert resident_bytes() - before < 16 * MIB


# --- What is not ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not in the ONNX format, or is cut short"),
        (b"I only say that I am a model. " * 40, "not in the ONNX format, or is cut short"),
        (IRIS.read_bytes()[:300], "not in the ONNX format, or is cut short"),
        (nested(200), "not in the ONNX format, or is cut short"),
        (b"PK\x03\x04" + bytes(60), "ZIP archive, as PyTorch saves models"),
        (b"\x80\x04\x95" + bytes(60), "looks like a Python pickle"),
        (b"\x89HDF\r\n\x1a\n" + bytes(60), "HDF5 file, as Keras saves models"),
        (b"\x1f\x8b\x08" + bytes(60), "compressed with gzip"),
        (b"<!doctype html><title>Not found</title>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "pointer of Git LFS"),
        (b'{"input_dim": 2}', "it is JSON; a linear model is called .json"),
    ],
)
def test_what_is_no_onnx_file_is_said_to_be_what_it_is(content, says):
    (fault,) = read_file(content).faults
    assert says in fault.what


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"not a model", "m.onnx is no ONNX model that can be run: it is not in the ONNX format"),
        (adds(outside("weights.bin")), "'w' lies in another file.*must stand in the .onnx file"),
        (adds(outside("../../etc/passwd")), "outside the model's folder: '../../etc/passwd'"),
        (model([op("Foo", domain="mine")], ROWS, OUT), "does not bring: mine.Foo; taken are"),
        (model([op("Nope")], ROWS, OUT), "No Op registered for Nope"),
        (
            model([op("Relu")], ROWS, OUT, opset=99),
            r"opset 99 of ai.onnx is newer than onnxruntime here takes; export it with opset \d+",
        ),
        (model([op("Relu"), op("Relu")], ROWS, OUT), "Duplicate definition.*\n.*checker says"),
        (
            model([op("Identity")], [("x", TensorProto.BFLOAT16, [1])],
                  [("y", TensorProto.BFLOAT16, [1])]),
            r"tensor\(bfloat16\); tensors of BOOL, ",
        ),
    ],
    ids=["text", "external", "traversal", "custom", "unknown", "opset", "duplicate", "type"],
)  # fmt: skip
async def test_an_onnx_file_that_is_not_sound_says_why(validated, content, says):
    report = await validated(content)
    assert not report.sound
    assert report.format == "onnx"
    with pytest.raises(AssertionError, match=f"(?s){says}"):
        raise AssertionError(said(report))


@pytest.mark.parametrize(
    "place", ["/etc/passwd", "../w", "a/../../w", "C:\\w", "\\\\host\\w", "..\\w"]
)
def test_a_path_out_of_the_folder_is_one_on_any_system(place):
    (fault,) = read_file(adds(outside(place))).faults
    assert "outside the model's folder" in fault.what


def test_all_files_outside_are_counted_in_one_sentence():
    weights = [outside("w.bin"), outside("w.bin")]
    weights[1].name = "v"
    (fault,) = read_file(model([op("Add", "x w")], ROWS, OUT, weights=weights)).faults
    assert "(external data), and 1 more do" in fault.what


def test_a_function_that_the_file_defines_is_no_custom_operator():
    opset = [helper.make_opsetid("", 17)]
    function = helper.make_function("mine", "F", ["a"], ["b"], [op("Relu", "a", "b")], opset)
    content = model([op("F", domain="mine")], ROWS, OUT, functions=[function])
    assert read_file(content).faults == ()
    other = model([op("G", domain="mine")], ROWS, OUT, functions=[function])
    assert "mine.G" in read_file(other).faults[0].what


async def test_what_onnxruntime_runs_is_sound_though_the_checker_objects(validated):
    unsorted = [op("Relu", "z"), op("Relu", "x", "z")]
    report = await validated(model(unsorted, ROWS, OUT))
    assert report.sound
    assert any("checker says: Nodes in a graph must be topologically" in a for a in report.advice)


async def test_another_suffix_is_a_problem_that_lists_the_formats(validated):
    report = await validated(b"x", name="model.pt")
    assert not report.sound
    assert "'model.pt': the format is told by the suffix; served are .json, .onnx" in said(report)


async def test_names_in_a_file_cannot_speak_to_a_terminal(validated):
    report = await validated(model([op("Bad\x1b[31m", domain="mine")], ROWS, OUT))
    assert "\x1b" not in codec.encode(report).decode() + said(report)


async def test_a_file_that_is_not_there_says_nothing_about_the_model(tmp_path):
    with pytest.raises(Unavailable, match="m.onnx cannot be read: No such file"):
        await validate(tmp_path / "m.onnx", name="m.onnx")


# --- Linear models --------------------------------------------------------------------------------


def linear(**changes: object) -> bytes:
    content = {"input_dim": 2, "output_dim": 1, "weights": [1, 1], "bias": [0], **changes}
    return json.dumps({key: value for key, value in content.items() if value != "gone"}).encode()


async def test_every_wrong_field_of_a_linear_file_is_named(validated):
    content = linear(input_dim="2", output_dim=0, weights=[1, None], bias={}, metadata=[])
    report = await validated(content, name="m.json")
    assert [problem.where for problem in report.problems] == [
        "input_dim", "output_dim", "weights[1]", "bias", "metadata",
    ]  # fmt: skip
    assert all(p.what.startswith("m.json is no linear model: ") for p in report.problems)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            linear(weights=[1, 2, 3], bias=[]),
            {
                "weights": "weights length 3 does not match shape 1x2",
                "bias": "bias length 0 does not match output dim 1",
            },
        ),
        (linear(weights="gone", bias="gone"), {"weights": "required field", "bias": "required"}),
        (
            linear(weights=[1, 1e39], bias=[-1e39]),
            {"weights[1]": "beyond float32", "bias[0]": "beyond float32"},
        ),
        (linear(weights=[1, math.nan]), {"weights": "weights has NaN, and JSON has numbers only"}),
        (linear(bias=[-math.inf]), {"bias": "bias has -Infinity"}),
        (linear(weights=[1, 0]).replace(b"0]", b"1e999]", 1), {"weights[1]": "out of range"}),
        (b"", {"": "the file is empty"}),
        (b"[]", {"": "Expected `object`"}),
        (b"hello", {"": "not JSON"}),
        (b"[" * 5000, {"": ""}),
    ],
)
def test_a_linear_file_says_what_is_wrong_and_where(content, expected):
    faults, _ = faults_of(content, "m.json")
    assert [fault.where for fault in faults] == list(expected)
    for fault in faults:
        assert expected[fault.where] in fault.what


def test_fields_that_mean_nothing_are_advice():
    faults, advice = faults_of(linear(wieghts=[1], metadata={"by": "me"}), "m.json")
    assert faults == []
    (said,) = advice
    assert said == (
        "the field 'wieghts' means nothing here and is passed over; known are input_dim, "
        "output_dim, weights, bias, metadata"
    )
    assert "metadata" in faults_of(linear(), "m.json")[1][0]


values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@settings(deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "input_dim": st.integers(1, 2) | values,
            "output_dim": st.integers(1, 2) | values,
            "weights": st.lists(st.floats(width=32), max_size=4) | values,
            "bias": st.lists(st.floats(width=32), max_size=2) | values,
            "metadata": values,
        },
    )
)
def test_a_linear_file_has_faults_just_when_it_cannot_be_loaded(content):
    body = json.dumps(content).encode()
    faults, _ = faults_of(body, "m.json")
    try:
        Linear.load(body)
    except BusError:
        assert faults
    else:
        assert not faults


# --- The dry run ----------------------------------------------------------------------------------


def sample(name: str, datatype: str, shape: list[int], *data: object) -> dict[str, Any]:
    return {"inputs": [{"name": name, "datatype": datatype, "shape": shape, "data": list(data)}]}


async def test_a_model_that_refuses_zeros_is_sound_and_asks_for_a_sample(validated):
    report = await validated(gathers())
    assert report.sound
    assert report.run_ms is None
    assert any(a.startswith("zeros do not run: indices element out") for a in report.advice)


async def test_a_sample_is_run_instead_of_zeros(validated):
    report = await validated(gathers(), sample=sample("x", "INT64", [2], 5, 6))
    assert report.sound
    assert report.run_ms is not None
    assert report.sample_shapes == {"x": [2]}
    assert not any("zeros" in a for a in report.advice)


async def test_a_sample_that_fails_is_a_problem(validated):
    report = await validated(gathers(), sample=sample("x", "INT64", [1], 99))
    assert not report.sound
    assert report.problems[0].where == "sample"
    assert "the sample does not run: indices element out of data bounds" in said(report)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (sample("y", "INT64", [1], 5), "sample.inputs[0].name"),
        (sample("x", "FP32", [1], 5), "sample.inputs[0].datatype"),
        ({}, "sample.inputs"),
    ],
)
async def test_a_sample_that_the_model_does_not_take_is_the_callers_mistake(
    validated, wrong, field
):
    with pytest.raises(InvalidRequest, match="the sample does not fit: ") as raised:
        await validated(gathers(), sample=wrong)
    assert raised.value.field == field


async def test_inputs_too_large_for_zeros_are_left_for_a_sample(validated):
    huge = model([op("Relu")], [("x", FLOAT, [1, 10**9])], [("y", FLOAT, [1, 10**9])])
    report = await validated(huge)
    assert report.sound
    assert any("more than 16,777,216 values" in a for a in report.advice)


async def test_what_answers_in_json_cannot_carry_is_told(validated):
    report = await validated(
        model([op("Log")], ROWS, OUT), sample=sample("x", "FP32", [1, 2], 0, -1)
    )
    assert report.sound
    assert "on the sample, output 'y' has NaN or infinity" in "".join(report.advice)


# --- Advice ---------------------------------------------------------------------------------------


async def test_what_would_make_a_model_better_is_told(validated):
    big = np.arange(200_000, dtype=np.float64)
    weights = [numpy_helper.from_array(big, name) for name in ("a", "b")]
    nodes = [op("Add", "a b", "s"), op("ReduceMax", "s", "t", keepdims=0), op("Add", "x t")]
    takes, gives = [("x", DOUBLE, [1, 2])], [("y", DOUBLE, [1, 2])]
    report = await validated(model(nodes, takes, gives, weights=weights, opset=9))
    assert report.sound
    expected = (
        "opset 9 is old",
        "400,000 of its numbers are float64",
        "does not say what it is",
        "1,600,000 bytes of weights are there more than once ('a' and 'b' hold the same)",
        "axis 0 of input 'x' is fixed to 1: requests cannot be batched; export it with a free",
        "input 'x' takes FP64",
    )
    for sentence in expected:
        assert any(sentence in advice for advice in report.advice), report.advice


async def test_an_input_without_a_shape_is_told_as_any_and_one_with_axes_is_advised(validated):
    report = await validated(
        model([op("Relu")], [("x", FLOAT, None)], [("y", FLOAT, None)]),
        sample=sample("x", "FP32", [2, 2, 1], 1, 2, 3, 4),
    )
    assert report.sound
    assert [one.shape for one in (*report.inputs, *report.outputs)] == [[-1], [-1]]
    assert not report.batched
    assert report.sample_shapes == {"x": [2, 2, 1]}
    assert any("input 'x' has no shape in the file: it takes any" in a for a in report.advice)


# --- Anything -------------------------------------------------------------------------------------


@st.composite
def mutated(draw):
    content = bytearray(IRIS.read_bytes())
    for _ in range(draw(st.integers(1, 8))):
        at = draw(st.integers(0, len(content) - 1))
        content[at] = draw(st.integers(0, 255))
    start = draw(st.integers(0, len(content)))
    cut = draw(st.sampled_from([0, 0, 0, 1, 5, 50]))
    return bytes(content[:start] + content[start + cut :])


@settings(deadline=None)
@given(mutated() | st.binary(max_size=200))
def test_reading_any_bytes_gives_faults_or_facts(content):
    file = read_file(content)
    assert file.faults or file.operators is not None


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(mutated())
def test_a_damaged_file_always_gets_a_report(tmp_path, content):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    report = asyncio.run(validate(path, name="m.onnx", limits=Limits(cpu_s=20)))
    assert report.sound == (not report.problems)


# --- On the command line --------------------------------------------------------------------------


def said_of(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "services.candle.repository.validation", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)


def test_a_file_can_be_validated_without_a_worker(tmp_path):
    told = said_of(IRIS, "--json")
    report = codec.decode(told.stdout.encode(), m.ModelReport)
    assert (told.returncode, report.sound, told.stderr) == (0, True, "")
    assert report.checksum == hashlib.sha256(IRIS.read_bytes()).hexdigest()
    bad = tmp_path / "bad.json"
    bad.write_bytes(linear(weights=[1]))
    told = said_of(bad)
    assert told.returncode == 1
    assert told.stdout == "not sound\nproblem: weights length 1 does not match shape 1x2\n"
    wrong = tmp_path / "sample.json"
    wrong.write_text(json.dumps(sample("petal", "FP32", [1, 4], 1, 2, 3, 4)))
    told = said_of(IRIS, "--sample", wrong)
    assert (told.returncode, told.stdout) == (1, "")
    assert "the sample does not fit: inputs[0].name" in told.stderr


# --- In a worker ----------------------------------------------------------------------------------


async def test_what_is_not_sound_is_refused_and_leaves_nothing_behind(
    client, worker, models_dir, linear
):
    (models_dir / "bad.onnx").write_bytes(adds(outside("../secret")))
    async with worker():
        ask = m.LoadModel(id="bad", path="bad.onnx")
        with pytest.raises(Unprocessable, match="outside the model's folder"):
            await client.call(MODEL_LOAD, ask)
        ask = m.LoadModel(id="bad", path=linear("bad.json", weights=[1], bias=[]))
        with pytest.raises(Unprocessable, match="weights length 1 does not") as raised:
            await client.call(MODEL_LOAD, ask)
        assert raised.value.field == "weights"
        assert raised.value.reasons == [
            "weights length 1 does not match shape 1x2",
            "bias length 0 does not match output dim 1",
        ]
        assert await client.store.models.get("bad") is None


async def test_what_is_loaded_has_a_report(client, worker):
    async with worker():
        loaded = await client.call(MODEL_LOAD, m.LoadModel(id="iris", path="iris.onnx"))
        entry = await client.store.reports.get(loaded.checksum)
    assert entry.value.sound
    assert entry.value.checksum == loaded.checksum

"""ONNX models: what a file may not reach, and what callers are told."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import AttributeProto, TensorProto, helper, numpy_helper
from onnx.defs import onnx_opset_version

from bus.errors import BusError, InvalidRequest, Unprocessable
from bus.process import give_back, trim
from bus.telemetry import resident_bytes
from services.candle import models
from services.candle.runtimes.onnx import Onnx

FLOAT, INT64, STRING = TensorProto.FLOAT, TensorProto.INT64, TensorProto.STRING
BOOL = TensorProto.BOOL
OPSET = [helper.make_opsetid("", 17)]
MODEL_OPSETS = [*OPSET, helper.make_opsetid("mine", 1)]
IRIS = Path(models.__file__).parent / "iris.onnx"


def model(nodes, takes: Sequence = (), gives: Sequence = (), *, weights=(), **more: Any) -> bytes:
    """Return an ONNX file; what it takes and gives are triples of name, type and shape."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(*spec) for spec in takes],
        [helper.make_tensor_value_info(*spec) for spec in gives],
        list(weights),
    )
    made = helper.make_model(graph, opset_imports=MODEL_OPSETS, ir_version=8, **more)
    return made.SerializeToString()


def op(kind: str, takes: str = "x", gives: str = "y", **attributes: Any):
    return helper.make_node(kind, takes.split(), gives.split(), **attributes)


@pytest.fixture
def secret(tmp_path, monkeypatch) -> TensorProto:
    """A tensor whose values lie in a file of the working directory, where onnxruntime looks."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.bin").write_bytes(np.array([41, 42], np.float32).tobytes())
    tensor = TensorProto(name="w", data_type=FLOAT, dims=[2])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="secret.bin")
    return tensor


def in_weights(secret):
    return model([op("Identity", "w")], (), [("y", FLOAT, [2])], weights=[secret])


def in_a_constant(secret):
    return model([op("Constant", "", value=secret)], (), [("y", FLOAT, [2])])


def in_a_branch(secret):
    gives = [helper.make_tensor_value_info("z", FLOAT, [2])]
    branch = helper.make_graph([op("Constant", "", "z", value=secret)], "b", [], gives)
    node = op("If", then_branch=branch, else_branch=branch)
    return model([node], [("x", TensorProto.BOOL, [])], [("y", FLOAT, [2])])


def in_a_function(secret):
    body = [op("Constant", "", "z", value=secret)]
    function = helper.make_function("mine", "F", [], ["z"], body, OPSET)
    node = helper.make_node("F", [], ["y"], domain="mine")
    return model([node], (), [("y", FLOAT, [2])], functions=[function])


def in_a_list(secret):
    attribute = AttributeProto(name="values", type=AttributeProto.TENSORS, tensors=[secret])
    node = op("Identity")
    node.attribute.append(attribute)
    return model([node], [("x", FLOAT, [2])], [("y", FLOAT, [2])])


@pytest.mark.parametrize(
    "hidden", [in_weights, in_a_constant, in_a_branch, in_a_function, in_a_list]
)
def test_a_model_reads_no_other_file(secret, hidden):
    with pytest.raises(Unprocessable, match=r"tensor 'w' lies in another file \(external data\)"):
        Onnx.load(hidden(secret))


def test_a_file_cut_anywhere_is_a_model_or_an_error_of_ours():
    whole = IRIS.read_bytes()
    told = set()
    for length in range(0, len(whole), 7):
        try:
            Onnx.load(whole[:length])
        except BusError as error:
            told.add(error.message)
    assert told
    assert not [said for said in told if "\n" in said or "onnxruntime" in said]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"I only say that I am a model. " * 40, "not in the ONNX format, or is cut short"),
        (b"", "not in the ONNX format, or is cut short"),
        (
            model([op("Nope")], [("x", FLOAT, ["n"])], [("y", FLOAT, ["n"])]),
            "No Op registered for Nope",
        ),
    ],
)
def test_a_file_that_cannot_be_run_is_refused_with_the_cause(content, says):
    with pytest.raises(Unprocessable, match=says):
        Onnx.load(content)


def test_a_tensor_type_that_is_not_served_is_named():
    tensors = [(name, TensorProto.BFLOAT16, ["n"]) for name in ("x", "y")]
    with pytest.raises(Unprocessable, match=r"'x' is a tensor\(bfloat16\); tensors of BOOL, "):
        Onnx.load(model([op("Identity")], tensors[:1], tensors[1:]))


def test_a_pass_that_fails_says_why_in_one_sentence():
    table = helper.make_tensor("t", FLOAT, [3], [1, 2, 3])
    gather = Onnx.load(
        model([op("Gather", "t x")], [("x", INT64, ["n"])], [("y", FLOAT, ["n"])], weights=[table])
    )
    with pytest.raises(Unprocessable, match=r"inputs: indices element out of data bounds, idx=7"):
        gather.run({"x": np.array([7])})
    two = helper.make_tensor("t", INT64, [2], [2, 2])
    reshape = Onnx.load(
        model([op("Reshape", "x t")], [("x", FLOAT, ["n"])], [("y", FLOAT, [2, 2])], weights=[two])
    )
    with pytest.raises(Unprocessable, match="inputs: The input tensor cannot be reshaped"):
        reshape.run({"x": np.ones(3, np.float32)})


@pytest.fixture(scope="module")
def echo() -> Onnx:
    return Onnx.load(model([op("Identity")], [("x", STRING, ["n"])], [("y", STRING, ["n"])]))


def objects(*values: object):
    array = np.empty(len(values), np.object_)
    array[:] = values
    return array


def test_strings_may_come_as_bytes_of_utf_8(echo):
    given = echo.run({"x": objects("ä", "ö".encode(), b"", "a\0b")})
    assert given["y"].tolist() == ["ä", "ö", "", "a\0b"]


@pytest.mark.parametrize("wrong", [1, None, 2.5, ["a"]])
def test_what_is_no_string_is_not_made_one(echo, wrong):
    with pytest.raises(InvalidRequest, match=r"x\[1\] is of type .* take str or bytes") as raised:
        echo.run({"x": objects("a", wrong)})
    assert raised.value.field == "x[1]"


def test_bytes_that_are_no_utf_8_are_named(echo):
    with pytest.raises(InvalidRequest, match=r"x\[0\] is not UTF-8"):
        echo.run({"x": objects(b"\xff")})


# From the first one that onnxruntime promises to take; some that it knows are under development.
@pytest.mark.parametrize("opset", range(7, onnx_opset_version() + 1))
def test_every_operator_set_that_onnxruntime_takes_is_taken(opset):
    made = helper.make_model(
        helper.make_graph(
            [op("MatMul", "x w", "h"), op("Relu", "h")],
            "g",
            [helper.make_tensor_value_info("x", FLOAT, ["n", 2])],
            [helper.make_tensor_value_info("y", FLOAT, ["n", 2])],
            [helper.make_tensor("w", FLOAT, [2, 2], [1, -1, 1, -1])],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=8,
    ).SerializeToString()
    x = np.array([[1, 2]], np.float32)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        theirs = onnxruntime.InferenceSession(made, options, providers=["CPUExecutionProvider"])
    except Exception:  # noqa: BLE001 - whatever it says, so do we
        with pytest.raises(Unprocessable, match=f"opset {opset} .* is newer than onnxruntime here"):
            Onnx.load(made)
        assert opset > 20
        return
    ours = Onnx.load(made)
    ours.warm_up()
    assert ours.run({"x": x})["y"].tolist() == theirs.run(None, {"x": x})[0].tolist() == [[3, 0]]


@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider'")
def test_a_provider_that_is_known_and_does_not_start_is_an_error_and_never_the_processor(
    monkeypatch,
):
    """As onnxruntime does on a host without the libraries: it warns, and computes on the CPU."""
    monkeypatch.setattr(
        onnxruntime,
        "get_available_providers",
        lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
    )
    with pytest.raises(Unprocessable, match="'cuda' is known to onnxruntime here, but does not"):
        Onnx.load(IRIS, provider="cuda")
    assert Onnx.load(IRIS).provider == "cpu"


@pytest.mark.parametrize("listed", [True, False])
def test_a_provider_that_computes_elsewhere_is_refused_and_not_offered(monkeypatch, listed):
    there = ["AzureExecutionProvider"] * listed + ["CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: there)
    with pytest.raises(Unprocessable, match="'azure' computes nothing here.* has cpu on this host"):
        Onnx.load(IRIS, provider="azure")
    with pytest.raises(Unprocessable, match="'tpu' is not here; onnxruntime has cpu on this host"):
        Onnx.load(IRIS, provider="tpu")


def test_what_has_no_shape_in_the_file_takes_any_and_is_not_put_together():
    loaded = Onnx.load(model([op("Relu")], [("x", FLOAT, None)], [("y", FLOAT, None)]))
    for spec in (*loaded.signature.inputs, *loaded.signature.outputs):
        assert (spec.shape, spec.any_rank) == ((-1,), True)
    assert not loaded.signature.batched
    loaded.warm_up()
    for shape in ((), (0,), (3,), (2, 3, 4)):
        assert loaded.run({"x": np.ones(shape, np.float32)})["y"].shape == shape


def test_a_scalar_is_a_scalar():
    loaded = Onnx.load(model([op("Relu")], [("x", FLOAT, [])], [("y", FLOAT, [])]))
    assert loaded.signature.inputs[0].shape == ()
    assert loaded.run({"x": np.ones((), np.float32)})["y"].shape == ()
    with pytest.raises(InvalidRequest, match=r"has the shape \[3\], the model takes \[\]"):
        loaded.run({"x": np.ones(3, np.float32)})


def test_a_shape_that_onnxruntime_finds_out_itself_is_told():
    loaded = Onnx.load(model([op("Relu")], [("x", FLOAT, ["n", 2])], [("y", FLOAT, None)]))
    assert loaded.signature.outputs[0].shape == (-1, 2)
    assert loaded.signature.batched


@pytest.mark.parametrize("shape", [(3, 0, 4), (0, 2, 4)])
@pytest.mark.parametrize(("kind", "gates"), [("LSTM", 4), ("GRU", 3)])
def test_what_would_end_the_process_on_no_values_refuses_them(kind, gates, shape):
    weights = [
        numpy_helper.from_array(np.ones((1, gates * 2, size), np.float32), name)
        for name, size in (("w", 4), ("r", 2))
    ]
    loaded = Onnx.load(
        model(
            [op(kind, "x w r", "y", hidden_size=2)],
            [("x", FLOAT, ["t", "n", 4])],
            [("y", FLOAT, None)],
            weights=weights,
        )
    )
    assert loaded.run({"x": np.ones((3, 1, 4), np.float32)})["y"].shape == (3, 1, 1, 2)
    with pytest.raises(InvalidRequest, match=rf"no values; the model has the operator {kind}"):
        loaded.run({"x": np.ones(shape, np.float32)})


def test_dynamic_axes_take_any_length():
    takes, gives = ("x", FLOAT, ["n", "width"]), ("y", FLOAT, ["n", "width"])
    any_size = Onnx.load(model([op("Relu")], [takes], [gives]))
    assert any_size.signature.inputs[0].shape == (-1, -1)
    for shape in ((1, 1), (3, 5), (0, 2)):
        assert any_size.run({"x": np.ones(shape, np.float32)})["y"].shape == shape


def test_rows_are_put_together_only_where_they_come_out_as_they_went_in():
    takes = [("x", FLOAT, ["n", 3])]
    same_name = model([op("Relu")], takes, [("y", FLOAT, ["n", 3])])
    # Its outputs' first axis has a name of its own, but is the inputs'.
    other_name = model([op("Cast", to=INT64)], takes, [("y", INT64, ["m", 3])])
    # As many rows come out as there are values that are not zero.
    places = [op("NonZero", gives="at"), op("Transpose", "at", perm=[1, 0])]
    other_axis = model(places, takes, [("y", INT64, ["m", 2])])
    signatures = [Onnx.load(content).signature for content in (same_name, other_name, other_axis)]
    assert [signature.outputs[0].shape[0] for signature in signatures] == [-1, -1, -1]
    assert [signature.batched for signature in signatures] == [True, True, False]


def sums(kind: int) -> bytes:
    """Rows that each have those before them added."""
    axis = helper.make_tensor("axis", INT64, [], [0])
    shape = ["n", 2]
    node = op("CumSum", "x axis")
    return model([node], [("x", kind, shape)], [("y", kind, shape)], weights=[axis])


def steps() -> bytes:
    """An LSTM whose first axis is time."""
    weights = [
        helper.make_tensor(name, FLOAT, shape, np.full(shape, 0.1, np.float32))
        for name, shape in (("w", (1, 16, 3)), ("r", (1, 16, 4)))
    ]
    nodes = [op("LSTM", "x w r", "all", hidden_size=4), op("Squeeze", "all axis")]
    axis = helper.make_tensor("axis", INT64, [1], [1])
    takes, gives = [("x", FLOAT, ["n", 1, 3])], [("y", FLOAT, ["n", 1, 4])]
    return model(nodes, takes, gives, weights=[*weights, axis])


def shares() -> bytes:
    """A softmax over all rows."""
    takes, gives = [("x", FLOAT, ["n", 2])], [("y", FLOAT, ["n", 2])]
    return model([op("Softmax", axis=0)], takes, gives)


def from_the_mean(kind: int) -> bytes:
    """The mean of all rows, taken from each."""
    takes, gives = [("x", kind, ["n", 2])], [("y", FLOAT, ["n", 2])]
    nodes = [
        op("Cast", gives="f", to=FLOAT),
        op("ReduceMean", "f", "mean", axes=[0]),
        op("Sub", "f mean"),
    ]
    return model(nodes, takes, gives)


def backwards(kind: int) -> bytes:
    """The rows from the last one to the first."""
    given = {"begin": [-1], "end": [-(2**31)], "axis": [0], "step": [-1]}
    weights = [helper.make_tensor(name, INT64, [1], one) for name, one in given.items()]
    takes, gives = [("x", kind, ["n"])], [("y", kind, ["n"])]
    return model([op("Slice", "x begin end axis step")], takes, gives, weights=weights)


def from_one_on() -> bytes:
    """Rows that are added up, of whole numbers that may not be nought."""
    weights = [
        helper.make_tensor("one", INT64, [], [1]),
        helper.make_tensor("axis", INT64, [], [0]),
        helper.make_tensor("t", FLOAT, [1], [1.0]),
    ]
    nodes = [op("Sub", "one x", "at"), op("Gather", "t at", "each"), op("CumSum", "each axis")]
    return model(nodes, [("x", INT64, ["n"])], [("y", FLOAT, ["n"])], weights=weights)


@pytest.mark.parametrize(
    "content",
    [
        sums(FLOAT), sums(INT64), from_one_on(), steps(), shares(), from_the_mean(FLOAT),
        from_the_mean(INT64), from_the_mean(BOOL), backwards(FLOAT), backwards(INT64),
        backwards(STRING),
    ],
)  # fmt: skip
def test_rows_that_depend_on_those_beside_them_are_not_put_together(content):
    """Else each caller's answer would be made of what others sent at the same moment."""
    assert not Onnx.load(content).signature.batched


def test_a_model_that_cannot_be_tried_is_taken_at_its_word():
    nothing = helper.make_tensor("t", FLOAT, [0], [])
    takes = [("x", INT64, ["n"])]
    same, other = (
        model([op("Gather", "t x")], takes, [("y", FLOAT, [name])], weights=[nothing])
        for name in ("n", "m")
    )
    assert Onnx.load(same).signature.batched
    assert not Onnx.load(other).signature.batched


def test_warming_up_a_model_that_refuses_zeros_or_is_huge_is_no_error():
    ids = helper.make_tensor("t", FLOAT, [0], [])
    refuses = model(
        [op("Gather", "t x")], [("x", INT64, ["n"])], [("y", FLOAT, ["n"])], weights=[ids]
    )
    huge = model([op("Relu")], [("x", FLOAT, [1, 10**9])], [("y", FLOAT, [1, 10**9])])
    for content in (refuses, huge, IRIS.read_bytes()):
        Onnx.load(content).warm_up()


def test_the_runtimes_are_imported_without_onnxruntime():
    check = (
        "import sys, services.candle.runtimes, services.candle.serving.batcher;"
        "sys.exit(bool({'onnx', 'onnxruntime'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_a_model_takes_its_weights_once(tmp_path):
    values = 16 * 1024**2
    weights = helper.make_tensor("w", FLOAT, [values], bytes(4 * values), raw=True)
    path = tmp_path / "big.onnx"
    path.write_bytes(
        model([op("Gather", "w x")], [("x", INT64, ["n"])], [("y", FLOAT, ["n"])],
              weights=[weights])
    )  # fmt: skip
    del weights
    Onnx.load(IRIS)
    give_back()
    before = resident_bytes()
    loaded = Onnx.load(path)
    trim()
    took = resident_bytes() - before
    assert loaded.signature.batched
    assert took < 1.5 * path.stat().st_size


def test_an_error_does_not_say_where_the_file_lies(tmp_path):
    path = tmp_path / "failed: a b.onnx"
    path.write_bytes(model([op("Nope")], [("x", FLOAT, ["n"])], [("y", FLOAT, ["n"])]))
    with pytest.raises(Unprocessable, match="No Op registered for Nope") as refused:
        Onnx.load(path)
    assert str(tmp_path) not in refused.value.message

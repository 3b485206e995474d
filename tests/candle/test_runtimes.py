"""The formats: what they take, what they give, and what they refuse."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, save

from bus.errors import BusError, InvalidRequest, Unprocessable
from services.candle.models import make
from services.candle.runtimes import open_model
from services.candle.runtimes.base import DTYPES
from services.candle.runtimes.linear import Linear, LinearFile

finite = st.floats(-1e3, 1e3, width=32)


@given(st.data(), st.integers(1, 6), st.integers(1, 5), st.integers(1, 7))
def test_a_linear_model_is_x_w_transposed_plus_b(data, inputs, outputs, n):
    w = data.draw(hnp.arrays(np.float32, (outputs, inputs), elements=finite))
    b = data.draw(hnp.arrays(np.float32, outputs, elements=finite))
    x = data.draw(hnp.arrays(np.float32, (n, inputs), elements=finite))
    model = Linear(
        LinearFile(
            input_dim=inputs, output_dim=outputs, weights=w.ravel().tolist(), bias=b.tolist()
        )
    )
    y = model.run({"inputs": x})["outputs"]
    assert y.dtype == np.float32
    expected = x.astype(np.float64) @ w.T.astype(np.float64) + b
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=10)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"weights": [1]}, "weights length 1 does not match shape 1x2"),
        ({"bias": []}, "bias length 0 does not match output dim 1"),
        ({"input_dim": 0}, "input_dim"),
        ({"input_dim": 10**9}, "input_dim"),
        ({"weights": [1, 1e300]}, r"weights\[1\] is beyond float32"),
        ({"weights": "x"}, "weights: Expected `array`"),
        ({"bias": None}, "bias: Expected `array`"),
    ],
)
def test_a_linear_file_that_is_not_sound_names_the_field(tmp_path, changes, says):
    content = {"input_dim": 2, "output_dim": 1, "weights": [1, 1], "bias": [0], **changes}
    (tmp_path / "m.json").write_text(json.dumps(content))
    with pytest.raises(Unprocessable, match=says):
        open_model(tmp_path / "m.json")


@given(st.binary(max_size=300))
def test_any_bytes_are_a_model_or_an_error_of_ours(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("models")
    for name in ("m.json", "m.onnx"):
        (folder / name).write_bytes(content)
        with pytest.raises(BusError):
            open_model(folder / name)


def identity(path: Path, datatype: int, shape: list[object]) -> Path:
    """Write an ONNX model that gives back what it takes."""
    tensors = [helper.make_tensor_value_info(name, datatype, shape) for name in ("x", "y")]
    node = helper.make_node("Identity", ["x"], ["y"])
    graph = helper.make_graph([node], "g", tensors[:1], tensors[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    save(model, path)
    return path


@pytest.mark.parametrize("datatype", DTYPES)
def test_every_type_of_the_protocol_passes_through_onnx(tmp_path, datatype):
    code = {
        "BOOL": "BOOL", "FP16": "FLOAT16", "FP32": "FLOAT", "FP64": "DOUBLE", "BYTES": "STRING",
    }.get(datatype, datatype)  # fmt: skip
    path = identity(tmp_path / "m.onnx", getattr(TensorProto, code), ["n", 2])
    model = open_model(path)
    assert model.signature.inputs[0].datatype == datatype
    values = [["a", "b"]] if datatype == "BYTES" else [[1, 0]]
    x = np.array(values, DTYPES[datatype])
    assert model.run({"x": x})["y"].tolist() == x.tolist()


def test_an_onnx_model_says_what_does_not_fit(tmp_path):
    model = open_model(identity(tmp_path / "m.onnx", TensorProto.FLOAT, ["n", 2]))
    good = np.zeros((1, 2), np.float32)
    for tensors, says in [
        ({}, "the input 'x' is missing"),
        ({"x": good, "z": good}, "no input 'z'; it takes x"),
        ({"x": good.astype(np.int64)}, "int64, the model takes float32"),
        ({"x": np.zeros((1, 3), np.float32)}, r"shape \[1, 3\], the model takes \[-1, 2\]"),
        ({"x": np.zeros(2, np.float32)}, r"shape \[2\]"),
    ]:
        with pytest.raises(InvalidRequest, match=says):
            model.run(tensors)


def test_a_model_with_a_fixed_first_axis_is_not_batched(tmp_path):
    free = open_model(identity(tmp_path / "free.onnx", TensorProto.FLOAT, ["n", 2]))
    fixed = open_model(identity(tmp_path / "fixed.onnx", TensorProto.FLOAT, [1, 2]))
    assert free.signature.batched
    assert not fixed.signature.batched


def test_external_data_is_not_read(tmp_path):
    (tmp_path / "secret.bin").write_bytes(np.ones(2, np.float32).tobytes())
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="secret.bin")
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    node = helper.make_node("Identity", ["w"], ["y"])
    graph = helper.make_graph([node], "g", [], [y], [tensor])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(Unprocessable, match="no ONNX model that can be run"):
        open_model(tmp_path / "m.onnx")


def test_the_samples_are_what_the_script_makes(tmp_path):
    accuracy = make.make(tmp_path)
    assert accuracy >= 0.9
    shipped = Path(make.__file__).parent
    assert (tmp_path / "linear-demo.json").read_bytes() == (
        shipped / "linear-demo.json"
    ).read_bytes()
    flowers, species = make.iris()
    said = [
        open_model(folder / "iris.onnx").run({"flower": flowers.astype(np.float32)})
        for folder in (tmp_path, shipped)
    ]
    np.testing.assert_allclose(said[0]["probabilities"], said[1]["probabilities"], atol=1e-3)
    assert (said[1]["species"] == species).mean() > 0.95

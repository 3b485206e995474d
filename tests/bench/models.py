"""The models that are served, made the same on every machine, and what goes into them."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort  # type: ignore[import-untyped]
from onnx import TensorProto, helper, numpy_helper

Floats = npt.NDArray[np.float32]

SEED: Final = 20_260_101
# What one request carries, the first axis left out.
SHAPES: Final[Mapping[str, tuple[int, ...]]] = {
    "tiny": (16,),
    "mlp": (784,),
    "conv": (3, 112, 112),
}
# For the part that loads and unloads: its weights have 41 MB.
BIG: Final = "big"
_BIG_DIM: Final = 3_200
# As onnxruntime of the oldest peer reads it.
_OPSET: Final = 17
_IR_VERSION: Final = 9


def make_models(folder: Path) -> None:
    """Write the models to a folder, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    made: dict[str, Callable[[], onnx.ModelProto]] = {
        "tiny": lambda: _dense([16, 4]),
        "mlp": lambda: _dense([784, 512, 512, 10]),
        "conv": _convolutions,
        BIG: lambda: _dense([_BIG_DIM, _BIG_DIM]),
    }
    for name, make in made.items():
        path = folder / f"{name}.onnx"
        if not path.exists():
            # Written whole or not at all: a stopped run leaves no half of a model.
            part = path.with_suffix(".part")
            part.write_bytes(make().SerializeToString())
            part.replace(path)


def example(model: str, rows: int = 1) -> Floats:
    """Return inputs of a model, always the same ones, of shape ``[rows, *SHAPES[model]]``."""
    random = np.random.default_rng(SEED)
    return random.standard_normal((rows, *SHAPES[model]), dtype=np.float32)


def expected(folder: Path, model: str) -> Floats:
    """Return what onnxruntime itself makes of the example, of shape ``[1, n]``."""
    session = ort.InferenceSession(folder / f"{model}.onnx", providers=["CPUExecutionProvider"])
    outputs: Floats = session.run(None, {"input": example(model)})[0]
    return outputs


def _dense(widths: list[int]) -> onnx.ModelProto:
    """Return layers of these widths, with ReLU between."""
    random = np.random.default_rng(SEED)
    nodes, weights, x = [], [], "input"
    for i, (n, m) in enumerate(pairwise(widths)):
        last = i == len(widths) - 2
        weights.append(_weights(random, f"w{i}", (n, m), n))
        weights.append(_weights(random, f"b{i}", (m,), n))
        y = "output" if last else f"y{i}"
        nodes.append(helper.make_node("Gemm", [x, f"w{i}", f"b{i}"], [y]))
        if not last:
            nodes.append(helper.make_node("Relu", [y], [f"r{i}"]))
        x = f"r{i}"
    return _model(nodes, weights, (widths[0],), widths[-1])


def _convolutions() -> onnx.ModelProto:
    """Return four convolutions, a mean over the image and a dense layer: 210 million products."""
    random = np.random.default_rng(SEED)
    nodes, weights, x = [], [], "input"
    channels, strides = [3, 32, 32, 64, 64], [1, 1, 2, 2]
    for i, stride in enumerate(strides):
        n, m = channels[i], channels[i + 1]
        weights.append(_weights(random, f"w{i}", (m, n, 3, 3), 9 * n))
        nodes.append(
            helper.make_node(
                "Conv", [x, f"w{i}"], [f"y{i}"], strides=[stride] * 2, pads=[1, 1, 1, 1]
            )
        )
        nodes.append(helper.make_node("Relu", [f"y{i}"], [f"r{i}"]))
        x = f"r{i}"
    weights.append(_weights(random, "w", (channels[-1], 10), channels[-1]))
    nodes.append(helper.make_node("GlobalAveragePool", [x], ["mean"]))
    nodes.append(helper.make_node("Flatten", ["mean"], ["flat"]))
    nodes.append(helper.make_node("Gemm", ["flat", "w"], ["output"]))
    return _model(nodes, weights, SHAPES["conv"], 10)


def _weights(
    random: np.random.Generator, name: str, shape: tuple[int, ...], fan_in: int
) -> onnx.TensorProto:
    # Scaled (He et al. 2015, section 2.2), so that activations keep their size.
    values = random.standard_normal(shape, dtype=np.float32) * np.float32(np.sqrt(2 / fan_in))
    return numpy_helper.from_array(values.astype(np.float32), name)


def _model(
    nodes: list[Any], weights: list[onnx.TensorProto], shape: tuple[int, ...], width: int
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "bench",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", *shape])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["n", width])],
        weights,
    )
    opsets = [helper.make_opsetid("", _OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)
    onnx.checker.check_model(model)
    return model

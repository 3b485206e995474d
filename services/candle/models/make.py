"""Makes the sample models: `python -m services.candle.models.make [FOLDER]`.

`linear-demo.json` is small enough to be checked by hand. `iris.onnx` is a real classifier: one
hidden layer, trained here with numpy on 120 of Fisher's 150 flowers, measured on the other 30.
The same numbers come out every time on the same machine.
"""

import csv
import json
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, checker, helper, numpy_helper, save

Floats = npt.NDArray[np.float64]

SPECIES: Final = ("setosa", "versicolor", "virginica")
HIDDEN: Final = 8
STEPS: Final = 2_000
RATE: Final = 0.1
HERE: Final = Path(__file__).parent


def linear_demo() -> dict[str, Any]:
    """Return a model of two outputs over three inputs: their sum, and the first less the last."""
    return {
        "input_dim": 3,
        "output_dim": 2,
        "weights": [1.0, 1.0, 1.0, 1.0, 0.0, -1.0],
        "bias": [0.0, 0.5],
        "metadata": {"name": "linear-demo", "outputs": ["a + b + c", "a - c + 0.5"]},
    }


def iris() -> tuple[Floats, npt.NDArray[np.int64]]:
    """Return Fisher's measurements, shape ``[150, 4]`` in cm, and the species by number."""
    with (HERE / "iris.csv").open() as file:
        rows = list(csv.reader(file))[1:]
    values = np.array([[float(value) for value in row[:4]] for row in rows])
    return values, np.array([SPECIES.index(row[4]) for row in rows])


def train(values: Floats, species: npt.NDArray[np.int64]) -> tuple[dict[str, Floats], float]:
    """Return the weights of a 4-8-3 network, and its accuracy on the 30 flowers held back."""
    chance = np.random.default_rng(1936)
    order = chance.permutation(len(values))
    seen, held = order[:120], order[120:]
    mean, spread = values[seen].mean(axis=0), values[seen].std(axis=0)
    x, y = (values[seen] - mean) / spread, np.eye(3)[species[seen]]
    w1, b1 = chance.normal(0, 0.5, (4, HIDDEN)), np.zeros(HIDDEN)
    w2, b2 = chance.normal(0, 0.5, (HIDDEN, 3)), np.zeros(3)
    for _ in range(STEPS):
        # Full-batch gradient descent on the cross-entropy.
        hidden = np.tanh(x @ w1 + b1)
        error = (_softmax(hidden @ w2 + b2) - y) / len(x)
        back = (error @ w2.T) * (1 - hidden**2)
        w2 -= RATE * hidden.T @ error
        b2 -= RATE * error.sum(axis=0)
        w1 -= RATE * x.T @ back
        b1 -= RATE * back.sum(axis=0)
    # The scaling goes into the first layer, so that the model takes centimetres.
    weights = {"w1": w1 / spread[:, None], "b1": b1 - (mean / spread) @ w1, "w2": w2, "b2": b2}
    hidden = np.tanh(values[held] @ weights["w1"] + weights["b1"])
    said = (hidden @ w2 + b2).argmax(axis=1)
    return weights, float((said == species[held]).mean())


def as_onnx(weights: dict[str, Floats], accuracy: float) -> Any:
    """Return the network as an ONNX model: rows of any number in, probabilities and label out."""
    nodes = [
        helper.make_node("Gemm", ["flower", "w1", "b1"], ["sum1"]),
        helper.make_node("Tanh", ["sum1"], ["hidden"]),
        helper.make_node("Gemm", ["hidden", "w2", "b2"], ["sum2"]),
        helper.make_node("Softmax", ["sum2"], ["probabilities"], axis=1),
        helper.make_node("ArgMax", ["sum2"], ["species"], axis=1, keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "iris",
        [helper.make_tensor_value_info("flower", TensorProto.FLOAT, ["n", 4])],
        [
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", 3]),
            helper.make_tensor_value_info("species", TensorProto.INT64, ["n"]),
        ],
        [numpy_helper.from_array(v.astype(np.float32), name) for name, v in weights.items()],
    )
    # Old enough for every onnxruntime that bkg allows.
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
        producer_name="bkg",
        model_version=1,
        doc_string="Iris species from sepal length and width, petal length and width in cm.",
    )
    said = {"labels": ",".join(SPECIES), "accuracy_on_30_held_back": f"{accuracy:.3f}"}
    helper.set_model_props(model, said)
    checker.check_model(model, full_check=True)
    return model


def make(folder: Path) -> float:
    """Write both models into a folder, and return the classifier's accuracy."""
    (folder / "linear-demo.json").write_text(json.dumps(linear_demo(), indent=2) + "\n")
    weights, accuracy = train(*iris())
    save(as_onnx(weights, accuracy), folder / "iris.onnx")
    return accuracy


def _softmax(z: Floats) -> Floats:
    powers: Floats = np.exp(z - z.max(axis=1, keepdims=True))
    sums: Floats = powers.sum(axis=1, keepdims=True)
    return powers / sums


if __name__ == "__main__":
    made_in = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    sys.stdout.write(f"accuracy on the flowers held back: {make(made_in):.3f}\n")

"""Small ONNX nets for tests: what an ArcFace looks like from outside."""

import numpy as np
from onnx import TensorProto, helper, numpy_helper


def arcface(
    dimensions: int = 8,
    *,
    shape: tuple[int | str, ...] = ("batch", 3, 112, 112),
    kind: int = TensorProto.FLOAT,
    outputs: int = 1,
    flat: bool = True,
) -> bytes:
    """Return a net that averages 8 x 8 blocks and projects them: near pictures, near vectors.

    Not `flat`, it gives the blocks as they are, of pictures of any shape.
    """
    weight = np.random.default_rng(5).normal(size=(3 * 14 * 14, dimensions)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["picture"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("AveragePool", ["real"], ["small"], kernel_shape=[8, 8], strides=[8, 8]),
    ]
    if flat:
        nodes += [
            helper.make_node("Flatten", ["small"], ["row"]),
            helper.make_node("MatMul", ["row", "weight"], ["made"]),
        ]
    last = "made" if flat else "small"
    nodes += [helper.make_node("Identity", [last], [f"vector{i}"]) for i in range(outputs)]
    graph = helper.make_graph(
        nodes,
        "arcface",
        [helper.make_tensor_value_info("picture", kind, shape)],
        [
            helper.make_tensor_value_info(f"vector{i}", TensorProto.FLOAT, None)
            for i in range(outputs)
        ],
        [numpy_helper.from_array(weight, "weight")] if flat else [],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return made.SerializeToString()

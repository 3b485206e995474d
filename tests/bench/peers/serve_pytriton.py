"""PyTriton: the Triton server in C++, the models as Python functions with dynamic batches."""

from typing import Any

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from tests.bench.peers.sessions import HOST, MAX_BATCH, open_session, port, spare_port

SHAPES: dict[str, tuple[int, ...]] = {"tiny": (16,), "mlp": (784,), "conv": (3, 112, 112)}
WIDTHS = {"tiny": 4, "mlp": 10, "conv": 10}


def _function(model: str) -> Any:
    session = open_session(model)

    @batch
    def run(**inputs: Any) -> dict[str, Any]:
        return {"output": session.run(None, inputs)[0]}

    return run


if __name__ == "__main__":
    config = TritonConfig(
        http_address=HOST, http_port=port(), grpc_port=spare_port(), allow_metrics=False
    )
    with Triton(config=config) as triton:
        for name, shape in SHAPES.items():
            triton.bind(
                model_name=name,
                infer_func=_function(name),
                inputs=[Tensor(name="input", dtype=np.float32, shape=shape)],
                outputs=[Tensor(name="output", dtype=np.float32, shape=(WIDTHS[name],))],
                config=ModelConfig(max_batch_size=MAX_BATCH, batcher=DynamicBatcher()),
            )
        triton.serve()

"""FastAPI with onnxruntime as most tutorials have it: typed lists, a plain function, no batches."""

from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from tests.bench.peers.sessions import HOST, MODELS, open_session, port


class Tensor(BaseModel):
    """A tensor of the Open Inference Protocol."""

    name: str
    shape: list[int]
    datatype: str
    data: list[float]


class Request(BaseModel):
    """An inference request."""

    inputs: list[Tensor]


app = FastAPI()
sessions = {model: open_session(model) for model in MODELS}


@app.post("/v2/models/{model}/infer")
def infer(model: str, request: Request) -> dict[str, Any]:
    """Answer one request, in a thread of the framework's pool."""
    tensor = request.inputs[0]
    array = np.array(tensor.data, dtype=np.float32).reshape(tensor.shape)
    output = sessions[model].run(None, {tensor.name: array})[0]
    return {
        "model_name": model,
        "outputs": [
            {
                "name": "output",
                "shape": list(output.shape),
                "datatype": "FP32",
                "data": output.ravel().tolist(),
            }
        ],
    }


if __name__ == "__main__":
    uvicorn.run(app, host=HOST, port=port(), log_level="warning")

"""FastAPI with onnxruntime, made by somebody who measured: one process, nothing in the way.

The body is read as bytes, by orjson or as raw tensors; uvloop and httptools below, no access log.
Small models run on the event loop, as handing them to a thread costs more than they do; the
convolutions run in one thread beside it. Both ways were measured.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import orjson
import uvicorn
from fastapi import FastAPI, Request, Response

from tests.bench.peers.sessions import HOST, MODELS, open_session, port

HEADER = "inference-header-content-length"
IN_A_THREAD = {"conv"}

app = FastAPI()
sessions = {model: open_session(model) for model in MODELS}
thread = ThreadPoolExecutor(1)


@app.post("/v2/models/{model}/infer")
async def infer(model: str, request: Request) -> Response:
    """Answer one request."""
    body = await request.body()
    length = request.headers.get(HEADER)
    head = orjson.loads(body if length is None else body[: int(length)])
    tensor = head["inputs"][0]
    if length is None:
        array = np.array(tensor["data"], dtype=np.float32)
    else:
        array = np.frombuffer(body, np.float32, offset=int(length))
    array = array.reshape(tensor["shape"])
    if model in IN_A_THREAD:
        output = await asyncio.get_running_loop().run_in_executor(thread, _run, model, array)
    else:
        output = _run(model, array)
    described: dict[str, Any] = {"name": "output", "shape": output.shape, "datatype": "FP32"}
    if length is None:
        described["data"] = output.ravel()
        answer = orjson.dumps(
            {"model_name": model, "outputs": [described]}, option=orjson.OPT_SERIALIZE_NUMPY
        )
        return Response(answer, media_type="application/json")
    described["parameters"] = {"binary_data_size": output.nbytes}
    start = orjson.dumps({"model_name": model, "outputs": [described]})
    return Response(
        start + output.tobytes(),
        media_type="application/octet-stream",
        headers={HEADER: str(len(start))},
    )


def _run(model: str, array: Any) -> Any:
    return sessions[model].run(None, {"input": array})[0]


if __name__ == "__main__":
    uvicorn.run(
        app, host=HOST, port=port(), log_level="warning", access_log=False,
        loop="uvloop", http="httptools",
    )  # fmt: skip

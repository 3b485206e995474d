"""Models over HTTP, as tests ask for them, and what steers the worker behind."""

import io
import json
import threading
from contextlib import asynccontextmanager

from yarl import URL

ONES = {"inputs": [{"name": "inputs", "datatype": "FP32", "shape": [1, 2], "data": [1, 1]}]}


async def put(gate, path, name="m", **more):
    """Have a file served, as `candle.model.load` does."""
    body = {"id": name, "path": path, **more}
    return await gate.post("/api/capabilities/candle.model.load", body)


async def post(gate, path, body, status=200, headers=None):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    url = URL(path, encoded=True)
    async with gate.http.post(url, data=io.BytesIO(raw), headers=headers) as response:
        assert response.status == status, await response.text()
        return await response.json(content_type=None)


def version_of(worker, model="m"):
    return worker._models[model].versions[0]


@asynccontextmanager
async def held(worker, model="m"):
    """Hold the runs of a model's first version while inside; gives one entry for each."""
    batcher = version_of(worker, model)._loaded.batcher
    let_go, ran, run = threading.Event(), [], batcher._run

    def wait_and_run(tensors):
        ran.append(tensors)
        let_go.wait(60)
        return run(tensors)

    batcher._run = wait_and_run
    try:
        yield ran
    finally:
        let_go.set()

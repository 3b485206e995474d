"""Datasets over HTTP, as tests ask for them."""

import io
import json

import numpy as np
from aiohttp import FormData

from bus.testing import until

PEOPLE = "/api/datasets/people"


async def ask(gate, method, path, body=None, status=200, **headers):
    """Ask, and return the answer and its headers."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    data = body if body is None or isinstance(body, (bytes, FormData)) else json.dumps(body)
    data = io.BytesIO(data) if isinstance(data, bytes) else data
    async with gate.http.request(method, path, data=data, headers=named) as response:
        told = await response.read()
        assert response.status == status, told
        is_json = response.content_type in {"application/json", "application/problem+json"}
        return (json.loads(told) if told and is_json else told), response.headers


async def enrol(gate, data, dataset="people", **query):
    said = {"dataset": dataset, **query}
    async with gate.http.post("/api/faces/encode", data=data, params=said) as response:
        told = await response.json(content_type=None)
        assert response.status == 200, told
        return told


def vectors(count, seed=1):
    """So many unit vectors, the same each time."""
    rows = np.random.default_rng(seed).normal(size=(count, 128))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def dataset_file(count, name="people", **more):
    entries = [
        {
            "id": f"e{i:05}",
            "embedding": row.tolist(),
            "metadata": {"n": i},
            "last_seen": "2024-05-01T00:00:00Z",
        }
        for i, row in enumerate(vectors(count))
    ]
    told = {
        "id": name,
        "created_at": "2024-05-01T00:00:00Z",
        "updated_at": "2024-05-01T00:00:00Z",
        "entries": entries,
        **more,
    }
    return json.dumps(told).encode()


async def ended(gate, job):
    """Wait until a job has ended, and return it."""
    found = {}

    async def is_over():
        found.update(await gate.json(f"/api/jobs/{job}"))
        return found["state"] in {"done", "failed", "cancelled"}

    await until(is_over, 60)
    return found

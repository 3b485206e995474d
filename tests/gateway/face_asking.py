"""Faces over HTTP, as tests ask for them."""

import io

import msgpack
from aiohttp import FormData


async def post(gate, path, body, status=200, query=None, **headers):
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    data = io.BytesIO(body) if isinstance(body, bytes) else body
    async with gate.http.post(path, data=data, params=query, headers=named) as response:
        told = await response.read()
        assert response.status == status, told
        if response.content_type == "application/msgpack":
            return msgpack.unpackb(told, timestamp=3)
        return await response.json(content_type=None)


def form(**parts):
    """A form: bytes are files, everything else is text."""
    made = FormData()
    for name, value in parts.items():
        if isinstance(value, bytes):
            file = io.BytesIO(value)
            made.add_field(name, file, filename=f"{name}.jpg", content_type="image/jpeg")
        else:
            made.add_field(name, value)
    return made

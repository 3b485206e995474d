"""Uploads, as the tests of them make them."""

import asyncio
import hashlib
import io
import json
from base64 import b64encode
from contextlib import suppress

from bus.testing import until

MIB = 1024 * 1024
LINEAR = json.dumps({"input_dim": 1, "output_dim": 1, "weights": [1], "bias": [0]}).encode()
PLACE = "/api/models/iris/versions/1"
UPLOAD = f"{PLACE}/upload"


def blob(size, seed=1):
    """Bytes that are the same each time, and nowhere alike."""
    return hashlib.shake_256(bytes([seed])).digest(size)


def sha256(body):
    return hashlib.sha256(body).hexdigest()


async def put(gate, body, status=201, path=PLACE, **headers):
    """Upload, and return the answer and its headers."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    sent = io.BytesIO(body) if isinstance(body, bytes) else body
    async with gate.http.put(path, data=sent, headers=named) as response:
        told = await response.text()
        assert response.status == status, told
        return (json.loads(told) if told else None), response.headers


async def offset_of(gate, path=UPLOAD):
    """Return how much of an upload is here, or None."""
    async with gate.http.head(path) as response:
        if response.status == 404:
            return None
        assert response.status == 204
        return int(response.headers["Upload-Offset"])


async def stored(client, body):
    return await client.store.artefacts.size(sha256(body)) is not None


async def break_off(gate, body, sent, path=PLACE, **headers):
    """Begin to upload, send some of it, and hang up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gate.parts.port)
    said = {
        "Host": "127.0.0.1",
        "Authorization": gate.http.headers["Authorization"],
        "Content-Length": str(len(body)),
        **headers,
    }
    lines = [f"PUT {path} HTTP/1.1", *(f"{name}: {value}" for name, value in said.items())]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    for at in range(0, sent, 64 * 1024):
        writer.write(body[at : min(sent, at + 64 * 1024)])
        await writer.drain()
    begins = int(headers.get("Upload-Offset", 0))
    await until(lambda: is_here(gate, begins + sent), 30)
    writer.transport.abort()
    with suppress(ConnectionError):
        await writer.wait_closed()
    await until(lambda: not gate.parts.uploads._live, 30)
    del reader


async def is_here(gate, size):
    return (await offset_of(gate) or 0) >= size


def rfc9530(body):
    return f"sha-256=:{b64encode(hashlib.sha256(body).digest()).decode()}:"

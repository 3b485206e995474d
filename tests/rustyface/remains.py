"""What there is of a face in a broker's files, and replicas that should have erased it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np

from bus.client import Client, connect
from bus.testing import until
from services.rustyface.galleries.cosines import Floats
from services.rustyface.galleries.galleries import Galleries
from services.rustyface.galleries.projection import LITTLE_ENDIAN

D = 16
# Of length 1 already, so that a moved entry and a rejection have the very same bytes.
FACE: Floats = np.eye(D, dtype=np.float32)[3] * np.float32(0.6) - np.eye(D, dtype=np.float32)[7] * (
    np.float32(0.8)
)
OTHER: Floats = np.eye(D, dtype=np.float32)[5]


@contextlib.asynccontextmanager
async def declared(url: str) -> AsyncIterator[Client]:
    """Give a client of a broker that has all streams."""
    async with connect(url, name="test", root="r") as client:
        await client.store.declare()
        yield client


@contextlib.asynccontextmanager
async def reading(client: Client, dimensions: int = D, **more) -> AsyncIterator[Galleries]:
    """Give a replica that has read all."""
    stream = more.pop("stream", client.store.galleries)
    galleries = Galleries(stream, client.root, "test", dimensions, **more)
    following = asyncio.create_task(galleries.run())
    try:
        await until(lambda: galleries.caught_up.is_set() or following.done())
        yield galleries
    finally:
        following.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await following


def remains(home: Path, needle: bytes = FACE.astype(LITTLE_ENDIAN).tobytes()) -> int:
    """Count some bytes, those of the face if not told, in all files of a broker that runs."""
    count = 0
    for path in home.rglob("*"):
        # The broker moves what it has written anew into its place: it was listed, and is gone.
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            count += path.read_bytes().count(needle)
    return count

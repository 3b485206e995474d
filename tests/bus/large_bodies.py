"""Bodies that are too large for one message, and a worker that is asked with them."""

import asyncio
import hashlib
import json

from bus.client import Answer, trace
from bus.instance import RawCall
from bus.streams import ask_jetstream
from bus.testing import until

LARGE = bytes(range(250)) * 80_000
SHA256 = hashlib.sha256(LARGE).hexdigest()


class Worker:
    """Answers with the digest of what it is asked, when it may.

    Attributes:
        calls: What it was asked.
        go_on: It answers as long as that is set.
        cancelled: How many of its callers went.
    """

    def __init__(self) -> None:
        self.calls: list[RawCall] = []
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.cancelled = 0

    async def answer(self, call: RawCall) -> Answer:
        self.calls.append(call)
        self.trace = trace.get()
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return Answer(hashlib.sha256(call.body).hexdigest().encode(), {})


async def stored(client):
    """Return what is in the store, chunks and names, by subject."""
    return (await client.bodies._stream.occupied("$O.>")).subjects


def nothing_left(client):
    async def is_empty():
        return not await stored(client)

    return until(is_empty)


async def configured(client, **changes):
    """Change the store's configuration; return it as it was before."""
    stream = f"OBJ_{client.root}-bodies"
    before = (await ask_jetstream(client._nc, f"$JS.API.STREAM.INFO.{stream}", b""))["config"]
    if changes:
        await ask_jetstream(
            client._nc, f"$JS.API.STREAM.UPDATE.{stream}", json.dumps(before | changes).encode()
        )
    return before

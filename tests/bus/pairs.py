"""Two instances that serve the same, and a caller that knows both."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncGenerator

import msgspec

from bus.client import Answer, Client
from bus.errors import BusError
from bus.instance import RawCall, join
from bus.settings import Settings
from bus.subjects import MODEL_INFER, RawEndpoint
from bus.testing import Connected


class Two:
    """Two instances that serve the same, each of which can be held, and can fail.

    Attributes:
        counts: How often each was asked.
        calls: What each was asked, in that order.
        go_on: Whether each answers.
        fails: What each answers instead.
        left: What each was told that nobody waits for.
    """

    def __init__(self, client: Client, endpoint: RawEndpoint) -> None:
        self.subject = endpoint.subject(client.root, "m")
        self.counts: Counter[int] = Counter()
        self.calls: list[tuple[int, RawCall]] = []
        self.go_on = [asyncio.Event(), asyncio.Event()]
        self.fails: dict[int, BusError] = {}
        self.left: Counter[int] = Counter()
        self.balance = client._asker.balance
        self._client = client
        for event in self.go_on:
            event.set()

    def handler(self, number: int):
        async def handle(call: RawCall) -> Answer:
            self.counts[number] += 1
            self.calls.append((number, call))
            try:
                await self.go_on[number].wait()
            except asyncio.CancelledError:
                self.left[number] += 1
                raise
            if number in self.fails:
                raise self.fails[number]
            return Answer(b"%d" % number, {})

        return handle

    async def ask(self, count: int = 1) -> None:
        for _ in range(count):
            await self._client.relay(self.subject, b"", timeout_s=60)

    async def known(self) -> None:
        """Have the caller know both."""
        async with asyncio.timeout(60):
            while len(self.balance.known(self.subject)) < 2:
                await self.ask()

    def expect(self, *each_s: float, idempotent: bool = True, first: int = 0) -> None:
        """Have the caller believe that each takes so long, and draw nothing at random.

        Args:
            each_s: For each of them.
            idempotent: Whether they said that they may be asked twice.
            first: Who is asked first where both are as good.
        """
        self.balance._draw = lambda: 0.999
        self.balance._subjects.pop(self.subject, None)
        long_ago = time.perf_counter() - 10
        for number in (first, 1 - first):
            slot, took_s = f"candle.{number}", each_s[number]
            self.balance.ended(self.subject, None, "answered", long_ago, slot, took_s, idempotent)

    def in_flight(self, number: int) -> int:
        """Return how many requests a slot has, as the caller sees it."""
        return self.balance._subjects[self.subject].slots[f"candle.{number}"].in_flight


@contextlib.asynccontextmanager
async def two(
    client: Client,
    connected: Connected,
    settings: Settings,
    endpoint: RawEndpoint = MODEL_INFER,
) -> AsyncGenerator[Two]:
    made = Two(client, endpoint)
    first, second = await connected(), await connected()
    other = msgspec.structs.replace(settings, slot=1)
    async with (
        join(first, settings, plugin="candle", description="a test") as a,
        join(second, other, plugin="candle", description="a test") as b,
        a.serving_raw(endpoint, made.handler(0), "m"),
        contextlib.AsyncExitStack() as leaving,
    ):
        await leaving.enter_async_context(b.serving_raw(endpoint, made.handler(1), "m"))
        made.leave = leaving.aclose
        made.instances = [a, b]
        yield made

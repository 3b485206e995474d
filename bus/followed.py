"""A feed as its reader sees it: typed messages, and a count of those that were lost."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

import structlog

from bus import codec
from bus.errors import InvalidRequest
from bus.messages import Message
from bus.subjects import name_of

FOLLOW_BUFFER: Final = 10_000

log = structlog.get_logger("bus.followed")

Req = TypeVar("Req", bound=Message)


@dataclass(frozen=True)
class Received(Generic[Req]):
    """A message of a feed.

    Attributes:
        payload: What it says.
        tokens: What stood in the subject where the feed's template varies.
        seq: The stream's number for it, when the broker republished it from a stream.
    """

    payload: Req
    tokens: Mapping[str, str]
    seq: int | None


@dataclass
class Followed(Generic[Req]):
    """A subscription to a feed, read with `async for`.

    Attributes:
        dropped: How many messages a reader that was too slow has lost, the oldest first.
    """

    _template: list[str]
    _payload: type[Req]
    _waiting: deque[Any] = field(default_factory=lambda: deque(maxlen=FOLLOW_BUFFER))
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)
    dropped: int = 0

    def __aiter__(self) -> AsyncIterator[Received[Req]]:
        return self

    async def __anext__(self) -> Received[Req]:
        while True:
            while not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
            message = self._waiting.popleft()
            try:
                return self._read(message)
            except InvalidRequest as error:
                log.warning("feed.unreadable", subject=message.subject, cause=error.message)

    async def take(self, message: Any) -> None:
        """Keep a message for the reader; for `bus.client`."""
        if len(self._waiting) == self._waiting.maxlen:
            self.dropped += 1
        self._waiting.append(message)
        self._arrived.set()

    def _read(self, message: Any) -> Received[Req]:
        headers = message.headers or {}
        payload = codec.decode(message.data, self._payload, headers.get(codec.CONTENT_TYPE))
        tokens = zip(self._template, message.subject.split(".")[1:], strict=False)
        seq = headers.get("Nats-Sequence")
        return Received(
            payload=payload,
            tokens={t[1:-1]: name_of(value) for t, value in tokens if t.startswith("{")},
            seq=int(seq) if seq else None,
        )

"""One endpoint that is being served: how it is asked, and what came of it."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from bus import codec
from bus.metrics import Calls
from bus.subjects import Endpoint, RawEndpoint

DRAIN_S: Final = 10.0


class Served:
    """One endpoint that is being served, with its statistics.

    Args:
        endpoint: The endpoint.
        subject: Where it is asked.
        take: Takes a request, a `bus.serving.Call`; must not wait. What it raises fails it.
        handler: For requests that do not come over the bus; None if there can be none.

    Attributes:
        said: Headers that its answers have beside their own.
    """

    def __init__(
        self,
        endpoint: Endpoint[Any, Any] | RawEndpoint,
        subject: str,
        take: Callable[[Any], None],
        handler: Callable[[Any], Awaitable[Any]] | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.subject = subject
        self.take = take
        self.handler = handler
        self.said: Mapping[str, str] = {}
        self.calls = Calls()
        self.requests = 0
        self.errors = 0
        self.last_error = ""
        self.busy_ns = 0
        self._open = 0
        self._emptied: asyncio.Future[None] | None = None

    def began(self) -> None:
        """Count a request."""
        self.requests += 1
        self.calls.requests += 1
        self.calls.in_flight += 1
        self._open += 1

    def ended(self, began_ns: int, cause: str | None) -> None:
        """Count the end of a request, and why it failed, if it did."""
        took_ns = time.perf_counter_ns() - began_ns
        self.busy_ns += took_ns
        self.calls.busy_ns += took_ns
        self.calls.in_flight -= 1
        if cause is not None:
            self.errors += 1
            self.calls.errors += 1
            self.last_error = cause

    def left(self) -> None:
        """Let go of a request: nothing of it is left to be sent."""
        self._open -= 1
        if not self._open and self._emptied and not self._emptied.done():
            self._emptied.set_result(None)

    async def drained(self) -> None:
        """Wait until every request is answered, for `DRAIN_S` at most."""
        if self._open:
            self._emptied = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._emptied], timeout=DRAIN_S)

    @property
    def info(self) -> dict[str, Any]:
        """What the service protocol's INFO says."""
        metadata = {"description": self.endpoint.description}
        if isinstance(self.endpoint, Endpoint):
            metadata["request"] = json.dumps(codec.schema(self.endpoint.request))
        return {
            "name": self.endpoint.capability.replace(".", "-"),
            "subject": self.subject,
            "queue_group": self.endpoint.queue,
            "metadata": metadata,
        }

    @property
    def stats(self) -> dict[str, Any]:
        """What the service protocol's STATS says."""
        return {
            "name": self.endpoint.capability.replace(".", "-"),
            "subject": self.subject,
            "queue_group": self.endpoint.queue,
            "num_requests": self.requests,
            "num_errors": self.errors,
            "last_error": self.last_error,
            "processing_time": self.busy_ns,
            "average_processing_time": self.busy_ns // self.requests if self.requests else 0,
        }

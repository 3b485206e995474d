"""Requests that an instance is asked: taken, bounded, counted, stopped when nobody waits, answered.

A request is a `Call`. Who takes it ends it, now or later, by `answer` or `fail`; a task for each
is only there for handlers that are coroutines.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import structlog

from bus import codec
from bus.client import (
    ERROR,
    ERROR_CODE,
    NOT_SERVED,
    TIMEOUT_MS,
    TRACEPARENT,
    Answer,
    Client,
    trace,
)
from bus.errors import (
    BusError,
    Internal,
    NobodyListens,
    Overloaded,
    body_of,
)
from bus.metrics import Calls
from bus.subjects import Endpoint, RawEndpoint
from bus.wire import Incoming

DRAIN_S: Final = 10.0
MAX_IN_FLIGHT: Final = 1_024

log = structlog.get_logger("bus.serving")


class Served:
    """One endpoint that is being served, with its statistics.

    Args:
        endpoint: The endpoint.
        subject: Where it is asked.
        take: Takes a request; must not wait. What it raises fails the request.
        handler: For requests that do not come over the bus; None if there can be none.
    """

    def __init__(
        self,
        endpoint: Endpoint[Any, Any] | RawEndpoint,
        subject: str,
        take: "Callable[[Call], None]",
        handler: Callable[[Any], Awaitable[Any]] | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.subject = subject
        self.take = take
        self.handler = handler
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


class Call:
    """A request that is being worked on.

    Attributes:
        body: As it came.
        headers: As they came.
        on_cancel: Is called when nobody waits for the answer any more; whoever sets it ends the
            call by `drop` then, or answers all the same.
    """

    __slots__ = (
        "_asked", "_began_ns", "_message", "_over", "_served", "body", "headers", "on_cancel",
    )  # fmt: skip

    def __init__(self, asked: "Serving", served: Served, message: Incoming) -> None:
        self.body = message.data
        self.headers = message.headers
        self.on_cancel: Callable[[], object] | None = None
        self._asked = asked
        self._served = served
        self._message = message
        self._over = False
        self._began_ns = time.perf_counter_ns()
        served.began()

    @property
    def allowed_s(self) -> float | None:
        """How long the caller waits; None if it did not say."""
        allowed = self.headers.get(TIMEOUT_MS, "")
        return int(allowed) / 1e3 if allowed.isdecimal() else None

    @property
    def waited_s(self) -> float:
        """How long it has been worked on."""
        return (time.perf_counter_ns() - self._began_ns) / 1e9

    @property
    def inbox(self) -> str:
        """Where its answer goes; no other call has that."""
        return self._message.reply

    def answer(self, body: bytes, headers: Mapping[str, str]) -> None:
        """Answer the caller."""
        if self._over:
            return
        try:
            sent = self._asked.reply_now(self._message, body, headers)
        except BusError as error:
            # It is too large.
            self.fail(error)
            return
        self._end(None)
        if sent:
            self._served.left()
        else:
            self._asked.reply_later(self._message, body, headers, self._served.left)

    def fail(self, error: BaseException) -> None:
        """Tell the caller why there is no answer; what it must not read is told to the log."""
        if self._over:
            return
        known = self._asked.known(error, self._served)
        self._end(f"{known.code}: {known.message}")
        self._asked.refuse(self._message, known, left=self._served.left)

    def drop(self) -> None:
        """End without an answer: nobody waits for it."""
        if not self._over:
            self._end("cancelled: the caller has gone")
            self._served.left()

    def _end(self, cause: str | None) -> None:
        self._over = True
        # It leads back here: a circle would wait for the garbage collector.
        self.on_cancel = None
        self._served.ended(self._began_ns, cause)
        self._asked.forget(self)


@dataclass
class Serving:
    """What one instance serves, and the requests that it works on.

    Attributes:
        client: The connection.
        plugin: What it is an instance of.
        who: Headers of every answer.
        served: By subject.
        calls: By capability: unlike what is served just now, these only ever grow.
    """

    client: Client
    plugin: str
    who: Mapping[str, str]
    served: dict[str, Served] = field(default_factory=dict)
    calls: dict[str, Calls] = field(default_factory=dict)
    # The oldest first.
    _working: dict[Call, None] = field(default_factory=dict)
    _by_inbox: dict[str, Call] = field(default_factory=dict)
    # What did not come over the bus, and since when.
    _local: dict[object, float] = field(default_factory=dict)
    _posting: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def in_flight(self) -> int:
        """Requests being worked on."""
        return len(self._working) + len(self._local)

    def oldest_s(self) -> float:
        """Return how long the oldest of them has been worked on."""
        for call in self._working:
            return round(call.waited_s, 3)
        for since in self._local.values():
            return round(time.monotonic() - since, 3)
        return 0.0

    def add(self, served: Served) -> None:
        """Count what is served with what was counted for the same capability before."""
        served.calls = self.calls.setdefault(served.endpoint.capability, served.calls)

    def take(self, served: Served, message: Incoming) -> None:
        """Take a request, or refuse it."""
        # No reply subject: nobody asked.
        if not message.reply:
            return
        call = Call(self, served, message)
        if full := self._full():
            call.fail(full)
            return
        self._working[call] = None
        self._by_inbox[message.reply] = call
        told = trace.set(message.headers.get(TRACEPARENT))
        try:
            served.take(call)
        except Exception as error:  # noqa: BLE001 - whatever it is belongs to who asked
            call.fail(error)
        finally:
            trace.reset(told)

    def take_direct(self, subject: str, message: Incoming) -> None:
        """Take what this very instance is asked, or say that it does not serve that."""
        served = self.served.get(subject)
        if served is not None:
            self.take(served, message)
        elif message.reply:
            error = NobodyListens(f"{subject} is not served by this instance", retry_after_s=2)
            self.refuse(message, error, {NOT_SERVED: "1"})

    async def here(self, served: Served, request: Any) -> Any:
        """Answer a request that did not come over the bus as if it had: same limits, same counts.

        Raises:
            BusError: What the handler raised.
        """
        assert served.handler is not None  # noqa: S101 - who calls has looked
        handler, full = served.handler, self._full()
        began_ns, local = time.perf_counter_ns(), object()
        served.began()
        self._local[local] = time.monotonic()
        cause = None
        try:
            return await (_raised(full) if full else handler(request))
        except asyncio.CancelledError:
            cause = "cancelled: the caller has gone"
            raise
        except Exception as error:
            known = self.known(error, served)
            cause = f"{known.code}: {known.message}"
            if known is error:
                raise
            raise known from None
        finally:
            del self._local[local]
            served.ended(began_ns, cause)
            served.left()

    def cancel(self, inbox: str) -> None:
        """Stop working on a request that nobody waits for any more."""
        call = self._by_inbox.get(inbox)
        if call and call.on_cancel:
            call.on_cancel()

    def forget(self, call: Call) -> None:
        """Work on a request no longer; for `Call`."""
        self._working.pop(call, None)
        if self._by_inbox.get(call.inbox) is call:
            del self._by_inbox[call.inbox]

    def known(self, error: BaseException, served: Served) -> BusError:
        """Return an error as it may cross the bus; what nobody expected goes to the log."""
        if isinstance(error, BusError):
            return error
        capability = served.endpoint.capability
        log.error("request.failed", capability=capability, exc_info=error)
        return Internal(
            f"{capability} failed unexpectedly; the cause is in the log of {self.plugin}"
        )

    def reply_now(self, message: Incoming, body: bytes, headers: Mapping[str, str]) -> bool:
        """Answer if it can be done at once; return whether it is.

        Raises:
            TooLarge: It is over the broker's limit.
        """
        return self.client.answer_now(message.reply, body, {**headers, **self.who})

    def reply_later(
        self,
        message: Incoming,
        body: bytes,
        headers: Mapping[str, str],
        left: Callable[[], None] | None,
    ) -> None:
        """Answer as soon as it can be done, and call `left` then."""

        async def post() -> None:
            # The broker is away: the caller's own time-out tells it.
            with contextlib.suppress(BusError):
                await self.client.answer(message.reply, body, {**headers, **self.who})

        def posted(task: asyncio.Task[None]) -> None:
            self._posting.discard(task)
            if left:
                left()

        task = asyncio.create_task(post())
        self._posting.add(task)
        task.add_done_callback(posted)

    def refuse(
        self,
        message: Incoming,
        error: BusError,
        more: Mapping[str, str] | None = None,
        left: Callable[[], None] | None = None,
    ) -> None:
        """Answer with an error."""
        headers = {
            codec.CONTENT_TYPE: codec.JSON,
            # A header is one line.
            ERROR: " ".join(error.message.split())[:500],
            ERROR_CODE: str(error.number),
            **(more or {}),
        }
        body = codec.encode(body_of(error))
        try:
            sent = self.reply_now(message, body, headers)
        except BusError:
            # Too large even so: the caller's own time-out tells it.
            sent = True
        if not sent:
            self.reply_later(message, body, headers, left)
        elif left:
            left()

    async def posted(self) -> None:
        """Wait until what could not be sent at once is, for `DRAIN_S` at most."""
        if self._posting:
            await asyncio.wait(self._posting, timeout=DRAIN_S)

    def _full(self) -> Overloaded | None:
        """Return why nothing more can be taken, if it is so."""
        if self.in_flight < MAX_IN_FLIGHT:
            return None
        return Overloaded(
            f"this {self.plugin} instance works on {MAX_IN_FLIGHT} requests already",
            retry_after_s=1,
        )


async def _raised(error: BusError) -> Any:
    raise error


def in_task(work: Callable[[Call], Awaitable[Answer]]) -> Callable[[Call], None]:
    """Return what does this for each call, in a task of its own."""

    async def do(call: Call) -> None:
        try:
            answer = await work(call)
        except asyncio.CancelledError:
            call.drop()
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is belongs to who asked
            call.fail(error)
        else:
            call.answer(answer.body, answer.headers)

    # Held by its call, and so by the table of those that are worked on.
    def take(call: Call) -> None:
        call.on_cancel = asyncio.create_task(do(call)).cancel

    return take

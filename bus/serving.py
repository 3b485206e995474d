"""Requests that an instance is asked: taken, bounded, counted, stopped when nobody waits, answered.

A request is a `Call`. Who takes it ends it, now or later, by `answer` or `fail`; a task for each
is only there for handlers that are coroutines. One whose body is put aside (`bus.bodies`) is taken
when that has been fetched.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import structlog

from bus import codec
from bus.bodies import BODY, REFERENCE, reference_in
from bus.client import (
    ERROR,
    ERROR_CODE,
    IDEMPOTENT,
    NOT_SERVED,
    TIMEOUT_MS,
    TRACEPARENT,
    Answer,
    Client,
    trace,
)
from bus.errors import (
    BusError,
    DeadlineExceeded,
    Internal,
    NobodyListens,
    Overloaded,
    body_of,
)
from bus.metrics import Calls
from bus.served import DRAIN_S, Served
from bus.wire import Incoming

MAX_IN_FLIGHT: Final = 1_024
# So many of the largest may be here: bodies that were fetched, as long as they are worked on.
BODIES_MAX: Final = 4
# How long a body may take to be fetched for a caller that did not say how long it waits.
FETCH_S: Final = 30.0

log = structlog.get_logger("bus.serving")


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

    def answer(self, body: bytes, headers: Mapping[str, str]) -> BusError | None:
        """Answer the caller; return what it is told instead, where the answer is too large."""
        if self._over:
            return None
        headers = {**headers, **self._served.said}
        try:
            sent = self._asked.reply_now(self._message, body, headers)
        except BusError as error:
            self.fail(error)
            return error
        self._end(None)
        if sent:
            self._served.left()
        else:
            self._asked.reply_later(self._message, body, headers, self._served.left)
        return None

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


class FetchedCall(Call):
    """A request whose body is put aside: fetched first, and then as any other.

    Args:
        asked: Whose request it is.
        served: What is asked.
        message: The request as it came.
    """

    __slots__ = ("_held_bytes",)

    def __init__(self, asked: "Serving", served: Served, message: Incoming) -> None:
        super().__init__(asked, served, message)
        self._held_bytes = 0

    async def take(self) -> None:
        """Fetch the body, and have the request taken."""
        try:
            await self._fetch()
            self.on_cancel = None
            self._served.take(self)
        except asyncio.CancelledError:
            self.drop()
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is belongs to who asked
            self.fail(error)

    async def _fetch(self) -> None:
        reference, allowed_s = reference_in(self.headers), self.allowed_s
        bodies = self._asked.client.bodies
        bodies.check_size(reference.size)
        self._asked.hold(reference.size)
        self._held_bytes = reference.size
        try:
            async with asyncio.timeout(FETCH_S if allowed_s is None else allowed_s):
                self.body = await bodies.fetch(reference)
        except TimeoutError:
            raise DeadlineExceeded(
                f"the body of {reference.size:,} bytes did not come within the caller's time"
            ) from None
        headers = {name: one for name, one in self.headers.items() if name not in REFERENCE}
        if allowed_s is not None:
            headers[TIMEOUT_MS] = str(int(1e3 * max(0.0, allowed_s - self.waited_s)))
        self.headers = headers

    def _end(self, cause: str | None) -> None:
        super()._end(cause)
        self.body = b""
        self._asked.let_go(self._held_bytes)


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
    _held_bytes: int = 0
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
        """Take what is served; it is counted with the same capability as before."""
        served.said = {**self.who, IDEMPOTENT: "1"} if served.endpoint.idempotent else self.who
        served.calls = self.calls.setdefault(served.endpoint.capability, served.calls)

    def take(self, served: Served, message: Incoming) -> None:
        """Take a request, or refuse it."""
        # No reply subject: nobody asked.
        if not message.reply:
            return
        call: Call
        take: Callable[[Any], None]
        if BODY in message.headers:
            call, take = FetchedCall(self, served, message), _fetched
        else:
            call, take = Call(self, served, message), served.take
        if full := self._full():
            call.fail(full)
            return
        self._working[call] = None
        self._by_inbox[message.reply] = call
        told = trace.set(message.headers.get(TRACEPARENT))
        try:
            take(call)
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

    def hold(self, size: int) -> None:
        """Make room for a body that is fetched.

        Raises:
            Overloaded: There is none.
        """
        most = BODIES_MAX * self.client.bodies.max_bytes
        if self._held_bytes + size > most:
            raise Overloaded(
                f"this {self.plugin} instance works on {self._held_bytes:,} bytes of large bodies "
                f"already, {most:,} are allowed",
                retry_after_s=1,
            )
        self._held_bytes += size

    def let_go(self, size: int) -> None:
        """Give back the room of a body."""
        self._held_bytes -= size

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
        return self.client.answer_now(message.reply, body, headers)

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
                await self.client.answer(message.reply, body, headers)

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
            **self.who,
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


def _fetched(call: Any) -> None:
    """Take a request when its body is here; held by its call as in `in_task`."""
    _held_by(call, call.take())


def _held_by(call: Call, work: Coroutine[Any, Any, None]) -> None:
    """Do this in a task that the call holds, and so the table of those that are worked on."""
    task = asyncio.create_task(work)
    # Cancelled before its first step it never runs, and could not end the call itself.
    task.add_done_callback(lambda done: call.drop() if done.cancelled() else None)
    call.on_cancel = task.cancel


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

    def take(call: Call) -> None:
        _held_by(call, do(call))

    return take

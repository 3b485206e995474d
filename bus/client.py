"""The caller's side of the bus: connect, call, relay, publish, follow.

nats-py 2.16 has traps that this file and `bus/state.py` keep from everybody else: its read loop
dies silently when a callback raises or a late PONG meets a cancelled `flush`, so nothing here
raises in a callback or calls `flush`; its `flush` and `drain` are no barriers, so `barrier` is a
round trip of our own; it checks a payload's size without the headers, and the broker then closes
the connection for good, so sizes are checked here.
"""

import asyncio
import contextlib
import random
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

import nats.errors
import structlog
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from bus import codec
from bus.errors import (
    BusError,
    DeadlineExceeded,
    ErrorBody,
    InvalidRequest,
    NobodyListens,
    Overloaded,
    TooLarge,
    Unavailable,
    error_from,
    error_from_number,
)
from bus.messages import Message
from bus.state import Store
from bus.subjects import DEFAULT_ROOT, Endpoint, Feed, name_of
from bus.tasks import beside, keeping_cancellation

ERROR: Final = "Nats-Service-Error"
ERROR_CODE: Final = "Nats-Service-Error-Code"
TIMEOUT_MS: Final = "Bkg-Timeout-Ms"
TRACEPARENT: Final = "traceparent"
# Room that a message's headers may need beside its body.
HEADER_ROOM_BYTES: Final = 16 * 1024
FOLLOW_BUFFER: Final = 10_000

# The W3C trace context of the request that is being worked on; log records carry its trace id.
trace: ContextVar[str | None] = ContextVar("trace", default=None)

# A message as it came in; named here, so that nobody above imports nats.
Incoming = Msg

log = structlog.get_logger("bus.client")

Req = TypeVar("Req", bound=Message)
Rep = TypeVar("Rep", bound=Message)


@dataclass(frozen=True)
class Answer:
    """A reply whose body was not decoded."""

    body: bytes
    headers: Mapping[str, str]


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
    _waiting: deque[Msg] = field(default_factory=lambda: deque(maxlen=FOLLOW_BUFFER))
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

    async def _take(self, message: Msg) -> None:
        if len(self._waiting) == self._waiting.maxlen:
            self.dropped += 1
        self._waiting.append(message)
        self._arrived.set()

    def _read(self, message: Msg) -> Received[Req]:
        headers = message.headers or {}
        payload = codec.decode(message.data, self._payload, headers.get(codec.CONTENT_TYPE))
        tokens = zip(self._template, message.subject.split(".")[1:], strict=False)
        seq = headers.get("Nats-Sequence")
        return Received(
            payload=payload,
            tokens={t[1:-1]: name_of(value) for t, value in tokens if t.startswith("{")},
            seq=int(seq) if seq else None,
        )


class Client:
    """A connection to the broker; made by `connect`.

    Attributes:
        root: The first token of every subject.
        store: Buckets and streams.
    """

    def __init__(self, nc: Nats, root: str) -> None:
        self.root = root
        self.store = Store(nc, root)
        self._nc = nc
        self._online = asyncio.Event()
        # Done while the connection is lost.
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._barriers: dict[str, asyncio.Future[None]] = {}
        self._barrier_inbox = nc.new_inbox()

    @property
    def connected(self) -> bool:
        """Whether the broker can be reached just now."""
        return self._online.is_set()

    async def online(self) -> None:
        """Wait until the broker can be reached."""
        await self._online.wait()

    @property
    def max_payload(self) -> int:
        """The largest body that can be sent, in bytes: the broker's limit less our headers."""
        return int(self._nc.max_payload) - HEADER_ROOM_BYTES

    @property
    def url(self) -> str:
        """The broker that is connected, without credentials."""
        return self._nc.connected_url.netloc.rpartition("@")[2] if self._nc.connected_url else ""

    async def call(
        self, endpoint: Endpoint[Req, Rep], request: Req, *, timeout_s: float = 10.0
    ) -> Rep:
        """Ask whoever serves an endpoint, and return the answer.

        Raises:
            BusError: What the far side raised; `Unavailable` when nobody listens or the broker
                is away; `DeadlineExceeded` after `timeout_s`.
        """
        answer = await self.relay(
            endpoint.subject_of(self.root, request),
            codec.encode(request),
            headers={codec.CONTENT_TYPE: codec.JSON},
            timeout_s=timeout_s,
        )
        return codec.decode(answer.body, endpoint.reply, answer.headers.get(codec.CONTENT_TYPE))

    async def relay(
        self,
        subject: str,
        body: bytes,
        *,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 10.0,
    ) -> Answer:
        """Send a body as it is and return the answer as it is; raises as `call` does.

        A busy instance answers so at once; queue groups pick at random, so one more try is
        likely to find another one.
        """
        try:
            return await self._relay_once(subject, body, headers or {}, timeout_s)
        except Overloaded:
            return await self._relay_once(subject, body, headers or {}, timeout_s)

    async def publish(
        self, feed: Feed[Req], payload: Req, content_type: str = codec.JSON, **tokens: str | int
    ) -> None:
        """Send a one-way message.

        Raises:
            TooLarge: It is over the broker's limit.
            Unavailable: The broker is away and the buffer for that time is full.
        """
        body = codec.encode(payload, content_type)
        self._check_size(body)
        with _named_errors(feed.template, 0):
            await self._nc.publish(
                feed.subject(self.root, **tokens),
                body,
                headers={codec.CONTENT_TYPE: content_type},
            )

    @asynccontextmanager
    async def follow(self, feed: Feed[Req], **tokens: str | int) -> AsyncGenerator[Followed[Req]]:
        """Listen to a feed while inside; a token that is not given is a wildcard.

        Entered, it hears all that is published from then on.
        """
        followed = Followed(feed.template.split("."), feed.payload)
        heard = await self._nc.subscribe(feed.subject(self.root, **tokens), cb=followed._take)  # noqa: SLF001
        try:
            await self.barrier()
            yield followed
        finally:
            await self._forget(heard)

    async def barrier(self, timeout_s: float = 5.0, *, patient: bool = True) -> float:
        """Wait until the broker has worked on all that was sent before; return the seconds.

        Args:
            timeout_s: How long.
            patient: Whether to wait on when the connection is lost meanwhile; at the end of a
                process there is nothing to wait for then.

        Raises:
            Unavailable: It did not answer in time.
        """
        # Not the event loop's time: uvloop's has steps of a millisecond.
        began, mark = time.perf_counter(), secrets.token_hex(8)
        passed = self._barriers[mark] = asyncio.get_running_loop().create_future()
        try:
            with _named_errors("the broker", timeout_s):
                await self._nc.publish(f"{self._barrier_inbox}.{mark}", b"")
            awaited = {passed} if patient else {passed, self._lost}
            await asyncio.wait(awaited, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if not passed.done():
                raise Unavailable(f"the broker did not answer within {timeout_s:g} s")
        finally:
            del self._barriers[mark]
        return time.perf_counter() - began

    async def while_connected(self, work: Coroutine[Any, Any, None], timeout_s: float) -> None:
        """Do a last thing: as long as the broker is there, and no longer than `timeout_s`.

        An error that crosses the bus is passed over: at the end nobody is left to mend it.
        """
        doing = asyncio.create_task(work)
        try:
            awaited = {doing, self._lost}
            await asyncio.wait(awaited, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # More than once: see `bus.tasks.beside`.
            while not doing.done():
                doing.cancel()
                await asyncio.wait({doing}, timeout=1)
        if not doing.cancelled() and (error := doing.exception()):
            if not isinstance(error, BusError):
                raise error
            log.debug("last.not_done", cause=error.message)

    async def answer(self, inbox: str, body: bytes, headers: Mapping[str, str]) -> None:
        """Answer a request; for `bus.instance`. Raises as `publish` does."""
        self._check_size(body)
        with _named_errors(inbox, 0):
            await self._nc.publish(inbox, body, headers=dict(headers))

    async def listen(self, subject: str, queue: str, on_message: Any) -> Subscription:
        """Subscribe a callback that must not raise; for `bus.instance`."""
        heard = await self._nc.subscribe(
            subject, queue=queue, cb=on_message, pending_bytes_limit=512 * 1024 * 1024
        )
        await self.barrier()
        return heard

    async def stop_listening(self, heard: Subscription) -> None:
        """Leave a subject so that nothing which the broker already sent here is lost.

        UNSUB, then the barrier, then the local queue: `Subscription.drain` uses a flush that
        overtakes the UNSUB and loses about one request in a thousand under load.
        """
        if self._nc.is_connected:
            with contextlib.suppress(Unavailable):
                await self._nc._send_unsubscribe(heard._id)  # noqa: SLF001
                await self.barrier(patient=False)
        if heard._pending_queue is not None:  # noqa: SLF001
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5):
                    await heard._pending_queue.join()  # noqa: SLF001
        await self._forget(heard)

    async def _relay_once(
        self, subject: str, body: bytes, headers: Mapping[str, str], timeout_s: float
    ) -> Answer:
        self._check_size(body)
        if not self._online.is_set():
            await self._come_online(min(timeout_s, 2.0))
        sent = {TIMEOUT_MS: str(int(timeout_s * 1000)), **headers}
        sent.setdefault(TRACEPARENT, trace.get() or new_traceparent())
        with _named_errors(subject, timeout_s), keeping_cancellation():
            reply = await self._nc.request(subject, body, timeout=timeout_s, headers=sent)
        received = reply.headers or {}
        if ERROR_CODE in received:
            raise _error_in(reply.data, received)
        return Answer(reply.data, received)

    async def _come_online(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._online.wait()
        except TimeoutError:
            raise Unavailable("the broker cannot be reached just now", retry_after_s=2) from None

    def _check_size(self, body: bytes) -> None:
        if len(body) > self.max_payload:
            raise TooLarge(
                f"the body has {len(body):,} bytes, the broker takes {self.max_payload:,} at most"
            )

    async def _forget(self, heard: Subscription) -> None:
        # Closed already, or closing: then there is nothing left to forget.
        with contextlib.suppress(nats.errors.Error):
            await heard.unsubscribe()

    async def _on_barrier(self, message: Msg) -> None:
        passed = self._barriers.get(message.subject.rpartition(".")[2])
        if passed is not None and not passed.done():
            passed.set_result(None)

    async def _watch(self) -> None:
        """Raise once the connection is dead while nats-py believes it alive."""
        failures = 0
        while failures < 3:
            await asyncio.sleep(5)
            if not self._nc.is_connected:
                failures = 0
                continue
            try:
                await self.barrier()
                failures = 0
            except Unavailable:
                failures += self._nc.is_connected
        raise Unavailable("the connection to the broker hangs; ending, to begin anew")


@asynccontextmanager
async def connect(
    url: str, *, name: str, root: str = DEFAULT_ROOT, patience_s: float = 5.0
) -> AsyncGenerator[Client]:
    """Be connected while inside; reconnects for ever, and ends the body if that is refused.

    Args:
        url: `nats://[user:password@]host:port`, several with commas between.
        name: Who connects, as the broker's operator sees it.
        root: The first token of every subject.
        patience_s: How long a broker may take to answer for the first time.

    Raises:
        Unavailable: No broker answers there, it refuses us, or it has no JetStream.
    """
    nc = Nats()
    lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    refused: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    cause = "no answer"
    client: Client | None = None

    async def on_error(error: Exception) -> None:
        nonlocal cause
        cause = str(error) or type(error).__name__
        if "authorization" in cause.lower() and not refused.done():
            refused.set_result(cause)
        if client is not None and client.connected:
            log.warning("broker.error", cause=cause)

    async def on_disconnect() -> None:
        if client is not None and client.connected:
            client._online.clear()  # noqa: SLF001
            client._lost.set_result(None)  # noqa: SLF001
            log.warning("broker.lost")

    async def on_reconnect() -> None:
        if client is not None:
            client._online.set()  # noqa: SLF001
            client._lost = asyncio.get_running_loop().create_future()  # noqa: SLF001
            log.info("broker.found_again")

    async def on_close() -> None:
        # Also called by our own close, when nobody waits for it any more.
        if not lost.done():
            lost.set_result(None)

    try:
        async with asyncio.timeout(patience_s), beside(_raise_when_refused(refused)):
            await nc.connect(
                servers=url.split(","),
                name=name,
                error_cb=on_error,
                disconnected_cb=on_disconnect,
                reconnected_cb=on_reconnect,
                closed_cb=on_close,
                max_reconnect_attempts=-1,
                # Apart from each other, so that a broker that returns is not stormed.
                reconnect_time_wait=0.2 + random.random() * 0.2,  # type: ignore[arg-type] # noqa: S311
                connect_timeout=2,
                ping_interval=5,
                max_outstanding_pings=2,
                pending_size=8 * 1024 * 1024,
                inbox_prefix=f"_INBOX_{name}",
            )
    except (TimeoutError, OSError, ValueError, nats.errors.Error) as error:
        await _close(nc)
        if refused.done():
            cause = refused.result()
        elif str(error):
            cause = str(error)
        raise Unavailable(f"no broker can be used at {_shown(url)}: {cause}") from None

    client = Client(nc, root)
    client._online.set()  # noqa: SLF001
    try:
        await nc.subscribe(f"{client._barrier_inbox}.*", cb=client._on_barrier)  # noqa: SLF001
        await client.barrier()
        await client.store.check()
        async with beside(client._watch(), _raise_when(lost)):  # noqa: SLF001
            yield client
    finally:
        with contextlib.suppress(Unavailable):
            if nc.is_connected:
                await client.barrier(2, patient=False)
        client._online.clear()  # noqa: SLF001
        await _close(nc)


def new_traceparent() -> str:
    """Return a W3C trace context that begins here."""
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"


async def _close(nc: Nats) -> None:
    """Close a connection; what is then raised about one that is broken is no news."""
    # RuntimeError: uvloop's, of a transport that is closed already.
    with contextlib.suppress(OSError, RuntimeError, nats.errors.Error, TimeoutError):
        async with asyncio.timeout(5):
            await nc.close()


async def _raise_when_refused(refused: asyncio.Future[str]) -> None:
    """Give up at the first refusal. nats-py would ask again for as long as it may.

    It may take several tries to hear of it: the broker hangs up at once, and what it said before
    is lost when our next word arrives after that.
    """
    # Not awaited itself: cancelled with this task, it could no longer be asked.
    await asyncio.wait([refused])
    raise nats.errors.Error(refused.result())


async def _raise_when(lost: asyncio.Future[None]) -> None:
    await lost
    raise Unavailable("the broker closed the connection for good")


def _shown(url: str) -> str:
    """Return a URL without its password."""
    return ",".join(part.rpartition("@")[2].removeprefix("nats://") for part in url.split(","))


def _error_in(body: bytes, headers: Mapping[str, str]) -> BusError:
    try:
        return error_from(codec.decode(body, ErrorBody))
    except InvalidRequest:
        number = headers[ERROR_CODE]
        said = headers.get(ERROR) or "the service gave no reason"
        return error_from_number(int(number) if number.isdigit() else 500, said)


@contextlib.contextmanager
def _named_errors(subject: str, timeout_s: float) -> Any:
    """Turn what nats-py raises into ours."""
    try:
        yield
    except nats.errors.NoRespondersError:
        raise NobodyListens(f"nobody answers {subject} just now", retry_after_s=2) from None
    except nats.errors.TimeoutError:
        raise DeadlineExceeded(f"{subject} gave no answer within {timeout_s:g} s") from None
    except nats.errors.MaxPayloadError as error:
        raise TooLarge(str(error)) from None
    except (nats.errors.Error, OSError) as error:
        raise Unavailable(f"the broker cannot be reached: {error}", retry_after_s=2) from None

"""The caller's side of the bus: connect, call, relay, publish, follow.

nats-py 2.16 has traps that this file and `bus/streams.py` keep from everybody else: its read loop
dies silently when a callback raises or a late PONG meets a cancelled `flush`, so nothing here
raises in a callback or calls `flush`; its `flush` and `drain` are no barriers, so `barrier` is a
round trip of our own; it checks a payload's size without the headers, and the broker then closes
the connection for good, so sizes are checked here.
"""

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Generator, Iterable, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

import msgspec
import nats.errors
import structlog
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from bus import codec
from bus.balance import Balance, Outcome
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
from bus.messages import CancelCall, Message
from bus.packs import Answering, Asking, NotSentError
from bus.state import Store
from bus.subjects import CANCEL, DEFAULT_ROOT, Endpoint, Feed, name_of, token
from bus.tasks import beside
from bus.wire import PENDING_MAX_BYTES, Incoming, Replies, Taker, Wire

ERROR: Final = "Nats-Service-Error"
ERROR_CODE: Final = "Nats-Service-Error-Code"
TIMEOUT_MS: Final = "Bkg-Timeout-Ms"
TRACEPARENT: Final = "traceparent"
# On an answer: the plugin and slot that can be asked for the same, `<plugin>.<slot>`.
SLOT: Final = "Bkg-Slot"
# Beside it: that it takes packs of requests, too.
PACKS: Final = "Bkg-Packs"
# On a refusal: this instance does not serve that, or no longer; whoever does may be asked.
NOT_SERVED: Final = "Bkg-Not-Served"
# Room that a message's headers may need beside its body.
HEADER_ROOM_BYTES: Final = 16 * 1024
FOLLOW_BUFFER: Final = 10_000
# The broker ends a connection that sends a longer control line than 4 KiB; the inbox stands there
# beside the subject.
SUBJECT_MAX_CHARS: Final = 3_072

# The W3C trace context of the request that is being worked on; log records carry its trace id.
trace: ContextVar[str | None] = ContextVar("trace", default=None)

log = structlog.get_logger("bus.client")

Req = TypeVar("Req", bound=Message)
Rep = TypeVar("Rep", bound=Message)


class _NotThereError(Exception):
    """The slot that was asked is gone, or does not serve this any more."""


class Answer(msgspec.Struct, frozen=True):
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
        self._wire = Wire(nc)
        self._replies = Replies(nc.new_inbox())
        self._asking = Asking(self._wire, self._replies)
        self._calls = f"{root}.call."
        self._balance = Balance()
        # Only where the short way cannot be gone.
        self._last_words: set[asyncio.Task[None]] = set()

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
        self,
        endpoint: Endpoint[Req, Rep],
        request: Req,
        *,
        timeout_s: float = 10.0,
        content_type: str = codec.JSON,
    ) -> Rep:
        """Ask whoever serves an endpoint, and return the answer.

        Args:
            endpoint: What is asked.
            request: The question.
            timeout_s: How long the answer may take.
            content_type: How question and answer travel; bytes are a third shorter in MessagePack.

        Raises:
            BusError: What the far side raised; `Unavailable` when nobody listens or the broker
                is away; `DeadlineExceeded` after `timeout_s`.
        """
        answer = await self.relay(
            endpoint.subject_of(self.root, request),
            codec.encode(request, content_type),
            headers={codec.CONTENT_TYPE: content_type},
            timeout_s=timeout_s,
        )
        return codec.decode(answer.body, endpoint.reply, answer.headers.get(codec.CONTENT_TYPE))

    async def call_each(
        self,
        endpoint: Endpoint[Req, Rep],
        request: Req,
        slots: Iterable[tuple[str, int]],
        *,
        timeout_s: float = 10.0,
    ) -> list[Rep]:
        """Ask each of these instances, and return the answers of those that gave one in time.

        Args:
            endpoint: What is asked.
            request: The question.
            slots: Plugin and slot of each.
            timeout_s: How long all of them have.
        """
        subject = endpoint.subject_of(self.root, request)
        body, headers = codec.encode(request), {codec.CONTENT_TYPE: codec.JSON}
        asked = (
            self.relay(
                self._to(subject, f"{token(plugin)}.{slot}"),
                body, headers=headers, timeout_s=timeout_s,
            )
            for plugin, slot in slots
        )  # fmt: skip
        answers = await asyncio.gather(*asked, return_exceptions=True)
        replies = []
        for answer in answers:
            if isinstance(answer, Answer):
                kind = answer.headers.get(codec.CONTENT_TYPE)
                replies.append(codec.decode(answer.body, endpoint.reply, kind))
            elif not isinstance(answer, BusError):
                raise answer
        return replies

    async def relay(
        self,
        subject: str,
        body: bytes,
        *,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 10.0,
    ) -> Answer:
        """Send a body as it is and return the answer as it is; raises as `call` does.

        Where several instances are known to answer a subject, the one that is likely to be the
        quickest is asked (`bus.balance`), else the broker picks one. One that does not serve it
        any more says so, and the broker picks then. A busy one answers so at once; then one more
        is asked. What is sent to one instance in the same turn of the event loop shares a message
        (`bus.packs`).
        """
        deadline = time.perf_counter() + timeout_s
        balanced = subject.startswith(self._calls)
        asked = self._balance.choose(subject, time.perf_counter()) if balanced else None
        again = False
        while True:
            try:
                return await self._relay_once(subject, asked, body, headers or {}, timeout_s)
            except _NotThereError:
                asked = None
            except Overloaded:
                if again:
                    raise
                again = True
                now = time.perf_counter()
                asked = self._balance.choose(subject, now, again=True) if balanced else None
            timeout_s = max(0.001, deadline - time.perf_counter())

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
        subject = feed.subject(self.root, **tokens)
        await self._send(feed.template, subject, "", body, {codec.CONTENT_TYPE: content_type})

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
        began = time.perf_counter()
        inbox, passed = self._replies.expect(timeout_s)
        try:
            await self._send("the broker", inbox, "", b"", {})
            awaited: set[asyncio.Future[Any]] = {passed} if patient else {passed, self._lost}
            await asyncio.wait(awaited, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if not passed.done() or passed.exception():
                raise Unavailable(f"the broker did not answer within {timeout_s:g} s")
        finally:
            self._replies.forget(inbox)
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
        await self._send(inbox, inbox, "", body, headers)

    @property
    def packs(self) -> bool:
        """Whether packs can be taken: only the short way (`bus.wire`) has them."""
        return self._wire.short

    def answering(self, shared: Mapping[str, str]) -> Answering:
        """Return what answers packs with these headers; for `bus.instance`."""
        return Answering(self._wire, shared, self._post)

    def answer_now(self, inbox: str, body: bytes, headers: Mapping[str, str]) -> bool:
        """Answer a request if it can be done at once; return whether it is.

        Raises:
            TooLarge: It is over the broker's limit.
        """
        self._check_size(body)
        return self._wire.send(inbox, "", body, headers)

    async def listen(self, subject: str, queue: str, on_message: Any) -> Subscription:
        """Subscribe a callback that must not raise, called for one message after the other."""
        heard = await self._nc.subscribe(
            subject, queue=queue, cb=on_message, pending_bytes_limit=PENDING_MAX_BYTES
        )
        await self.barrier()
        return heard

    async def take(self, subject: str, queue: str, taker: Taker) -> Subscription:
        """Subscribe a function that is called as soon as a message is read; it must not wait."""
        heard: Subscription = await self._wire.take(subject, queue, taker)
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
        self,
        subject: str,
        asked: str | None,
        body: bytes,
        headers: Mapping[str, str],
        timeout_s: float,
    ) -> Answer:
        """Ask one slot, or the group, and let the balance know what became of it."""
        outcome: Outcome = "dropped"
        by: str | None = None
        packs = False
        began = time.perf_counter()
        try:
            received = await self._exchange(subject, asked, body, headers, timeout_s)
            found = received.headers
            by = found.get(SLOT)
            packs = PACKS in found
            if ERROR_CODE in found:
                error = _error_in(received.data, found)
                if NOT_SERVED in found:
                    outcome = "gone"
                    raise _NotThereError if asked else NobodyListens(error.message)
                outcome = "busy" if isinstance(error, Overloaded) else "failed"
                raise error
            if not received.data and found.get("Status") == "503":
                outcome = "gone"
                if asked:
                    raise _NotThereError
                raise NobodyListens(f"nobody answers {subject} just now", retry_after_s=2)
            outcome = "answered"
            return Answer(received.data, found)
        except TimeoutError:
            outcome = "gone"
            raise DeadlineExceeded(f"{subject} gave no answer within {timeout_s:g} s") from None
        finally:
            if subject.startswith(self._calls):
                now = time.perf_counter()
                self._balance.ended(
                    subject, asked, outcome, now, by=by, took_s=now - began, packs=packs
                )

    def _to(self, subject: str, asked: str | None) -> str:
        """Return where one slot hears what a subject means."""
        return f"{self.root}.inst.{asked}.call.{subject[len(self._calls) :]}" if asked else subject

    async def _exchange(
        self,
        subject: str,
        asked: str | None,
        body: bytes,
        headers: Mapping[str, str],
        timeout_s: float,
    ) -> Incoming:
        """Send a request and return whatever comes back; TimeoutError if nothing does."""
        if len(subject) > SUBJECT_MAX_CHARS:
            raise InvalidRequest(
                f"the subject has {len(subject):,} characters, at most {SUBJECT_MAX_CHARS:,} are "
                "taken; a name in it is too long"
            )
        self._check_size(body)
        if not self._online.is_set():
            await self._come_online(min(timeout_s, 2.0))
        sent = {TIMEOUT_MS: str(int(timeout_s * 1000)), **headers}
        if TRACEPARENT not in sent:
            sent[TRACEPARENT] = trace.get() or new_traceparent()
        to = self._to(subject, asked)
        if asked is not None and self._balance.packs(subject, asked):
            if self._balance.only(subject):
                # Alone, it may as well find another one.
                to = subject
            packs, call = f"{self.root}.inst.{asked}.pack", subject[len(self._calls) :]
            if packed := self._asking.ask(packs, to, call, sent, body, timeout_s):
                try:
                    return await packed.reply
                except NotSentError:
                    pass
                except (TimeoutError, asyncio.CancelledError):
                    if packed.inbox:
                        self._give_up(packed.inbox)
                    raise
                finally:
                    self._replies.forget(packed.inbox)
        inbox, reply = self._replies.expect(timeout_s)
        try:
            await self._send(subject, to, inbox, body, sent)
            return await reply
        except (TimeoutError, asyncio.CancelledError):
            self._give_up(inbox)
            raise
        finally:
            self._replies.forget(inbox)

    async def _send(
        self, named: str, subject: str, inbox: str, body: bytes, headers: Mapping[str, str]
    ) -> None:
        if not self._wire.send(subject, inbox, body, headers):
            with _named_errors(named):
                await self._nc.publish(subject, body, inbox, headers=dict(headers) or None)

    def _give_up(self, inbox: str) -> None:
        """Tell who works on a request that nobody waits for its reply; does not wait."""
        if not self._nc.is_connected:
            return
        feed, body = CANCEL.subject(self.root), codec.encode(CancelCall(inbox=inbox))
        self._post(feed, body, {codec.CONTENT_TYPE: codec.JSON})

    def _post(self, subject: str, body: bytes, headers: Mapping[str, str]) -> None:
        """Send a message, at once or in a task; raises TooLarge as `Wire.send` does."""
        if not self._wire.send(subject, "", body, headers):
            posting = asyncio.create_task(self._posted(subject, body, headers))
            self._last_words.add(posting)
            posting.add_done_callback(self._last_words.discard)

    async def _posted(self, subject: str, body: bytes, headers: Mapping[str, str]) -> None:
        with contextlib.suppress(nats.errors.Error, OSError, TimeoutError):
            async with asyncio.timeout(5):
                await self._nc.publish(subject, body, headers=dict(headers))

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
        self._wire.forget(heard)
        # Closed already, or closing: then there is nothing left to forget.
        with contextlib.suppress(nats.errors.Error):
            await heard.unsubscribe()

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
        await client._wire.take(client._replies.subject, "", client._asking.take)  # noqa: SLF001
        await client.barrier()
        await client.store.check()
        async with beside(client._watch(), _raise_when(lost)):  # noqa: SLF001
            yield client
    finally:
        with contextlib.suppress(Unavailable):
            if nc.is_connected:
                await client.barrier(2, patient=False)
        client._online.clear()  # noqa: SLF001
        client._replies.close()  # noqa: SLF001
        for telling in client._last_words:  # noqa: SLF001
            telling.cancel()
        await _close(nc)


def new_traceparent() -> str:
    """Return a W3C trace context that begins here."""
    # Random enough to tell requests apart; never zero, which the standard forbids.
    trace_id, span_id = random.getrandbits(128) | 1, random.getrandbits(64) | 1
    return f"00-{trace_id:032x}-{span_id:016x}-01"


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
def _named_errors(subject: str) -> Generator[None]:
    """Turn what nats-py raises into ours."""
    try:
        yield
    except nats.errors.MaxPayloadError as error:
        raise TooLarge(str(error)) from None
    except (nats.errors.BadSubjectError, nats.errors.BadHeaderError) as error:
        raise InvalidRequest(f"{subject} cannot be asked: {error}") from None
    except (nats.errors.Error, OSError) as error:
        raise Unavailable(f"the broker cannot be reached: {error}", retry_after_s=2) from None

"""A connection to the broker: made, watched, and left so that nothing is lost.

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
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

import nats.errors
import structlog
from nats.aio.client import Client as Nats
from nats.aio.subscription import Subscription

from bus import codec
from bus.errors import BusError, InvalidRequest, TooLarge, Unavailable
from bus.messages import CancelCall
from bus.subjects import CANCEL
from bus.tasks import beside
from bus.wire import PENDING_MAX_BYTES, Replies, Taker, Wire

# Room that a message's headers may need beside its body.
HEADER_ROOM_BYTES: Final = 16 * 1024

log = structlog.get_logger("bus.client")


class Connection:
    """A connection to the broker; made by `connected`.

    Args:
        nc: nats-py's client, connected.
        root: The first token of every subject.

    Attributes:
        root: The same.
    """

    def __init__(self, nc: Nats, root: str) -> None:
        self.root = root
        self._nc = nc
        self._online = asyncio.Event()
        # Done while the connection is lost.
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._wire = Wire(nc)
        self._replies = Replies(nc.new_inbox())
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
        """The largest body of one message, in bytes: the broker's limit less our headers."""
        return int(self._nc.max_payload) - HEADER_ROOM_BYTES

    @property
    def url(self) -> str:
        """The broker that is connected, without credentials."""
        return self._nc.connected_url.netloc.rpartition("@")[2] if self._nc.connected_url else ""

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
            await self.send("the broker", inbox, "", b"", {})
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

    # --- Listening --------------------------------------------------------------------------------

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

    async def _forget(self, heard: Subscription) -> None:
        self._wire.forget(heard)
        # Closed already, or closing: then there is nothing left to forget.
        with contextlib.suppress(nats.errors.Error):
            await heard.unsubscribe()

    # --- Sending ----------------------------------------------------------------------------------

    async def send(
        self, named: str, subject: str, inbox: str, body: bytes, headers: Mapping[str, str]
    ) -> None:
        """Send a message, whichever way it takes.

        Raises:
            BusError: It cannot be sent; names `named`.
        """
        if not self._wire.send(subject, inbox, body, headers):
            with _named_errors(named):
                await self._nc.publish(subject, body, inbox, headers=dict(headers) or None)

    async def answer(self, inbox: str, body: bytes, headers: Mapping[str, str]) -> None:
        """Answer a request; for `bus.serving`.

        Raises:
            TooLarge: It is over the broker's limit.
            Unavailable: The broker is away and the buffer for that time is full.
        """
        self.check_size(body, "answer, one message,")
        await self.send(inbox, inbox, "", body, headers)

    def answer_now(self, inbox: str, body: bytes, headers: Mapping[str, str]) -> bool:
        """Answer a request if it can be done at once; return whether it is.

        Raises:
            TooLarge: It is over the broker's limit.
        """
        self.check_size(body, "answer, one message,")
        return self._wire.send(inbox, "", body, headers)

    def give_up(self, inbox: str) -> None:
        """Tell who works on a request that nobody waits for its reply; for `bus.relay`."""
        if not self._nc.is_connected:
            return
        feed, body = CANCEL.subject(self.root), codec.encode(CancelCall(inbox=inbox))
        headers = {codec.CONTENT_TYPE: codec.JSON}
        if self._wire.send(feed, "", body, headers):
            return

        async def post() -> None:
            with contextlib.suppress(nats.errors.Error, OSError, TimeoutError):
                async with asyncio.timeout(5):
                    await self._nc.publish(feed, body, headers=headers)

        posting = asyncio.create_task(post())
        self._last_words.add(posting)
        posting.add_done_callback(self._last_words.discard)

    async def come_online(self, timeout_s: float) -> None:
        """Wait until the broker can be reached, or raise Unavailable; for `bus.relay`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._online.wait()
        except TimeoutError:
            raise Unavailable("the broker cannot be reached just now", retry_after_s=2) from None

    def check_size(self, body: bytes, what: str = "body") -> None:
        """Raise TooLarge if a body is over the broker's limit for one message."""
        if len(body) > self.max_payload:
            raise TooLarge(
                f"the {what} has {len(body):,} bytes, the broker takes {self.max_payload:,} at most"
            )

    # --- How the connection is --------------------------------------------------------------------

    def went(self) -> None:
        """Take note that the connection is lost."""
        self._online.clear()
        self._lost.set_result(None)
        log.warning("broker.lost")

    def returned(self) -> None:
        """Take note that there is another connection."""
        self._wire.connected()
        self._online.set()
        self._lost = asyncio.get_running_loop().create_future()
        log.info("broker.found_again")

    async def watch(self) -> None:
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

    async def open(self) -> None:
        """Hear replies, and be online."""
        self._online.set()
        await self._wire.take(self._replies.subject, "", self._replies.take)
        await self.barrier()

    async def close(self) -> None:
        """See that what was said is heard, and end."""
        with contextlib.suppress(Unavailable):
            if self._nc.is_connected:
                await self.barrier(2, patient=False)
        self._online.clear()
        self._replies.close()
        for telling in self._last_words:
            telling.cancel()
        await _close(self._nc)


C = TypeVar("C", bound=Connection)


@asynccontextmanager
async def connected(
    url: str, *, name: str, patience_s: float, made: Callable[[Nats], C]
) -> AsyncGenerator[C]:
    """Be connected while inside; reconnects for ever, and ends the body if that is refused.

    Args:
        url: `nats://[user:password@]host:port`, several with commas between.
        name: Who connects, as the broker's operator sees it.
        patience_s: How long a broker may take to answer for the first time.
        made: Makes the connection.

    Raises:
        Unavailable: No broker answers there, or it refuses us.
    """
    nc = Nats()
    lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    refused: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    cause = "no answer"
    connection: C | None = None

    async def on_error(error: Exception) -> None:
        nonlocal cause
        cause = str(error) or type(error).__name__
        if "authorization" in cause.lower() and not refused.done():
            refused.set_result(cause)
        if connection is not None and connection.connected:
            log.warning("broker.error", cause=cause)

    async def on_disconnect() -> None:
        if connection is not None and connection.connected:
            connection.went()

    async def on_reconnect() -> None:
        if connection is not None:
            connection.returned()

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

    connection = made(nc)
    try:
        await connection.open()
        async with beside(connection.watch(), _raise_when(lost)):
            yield connection
    finally:
        await connection.close()


async def _close(nc: Nats) -> None:
    """Close a connection; what is then raised about one that is broken is no news."""
    # RuntimeError: uvloop's, of a transport that is closed already.
    with contextlib.suppress(OSError, RuntimeError, nats.errors.Error, TimeoutError):
        async with asyncio.timeout(5):
            await nc.close()
    # More than once: see `bus.tasks.beside`. It would go on trying to reconnect, and the event loop
    # would wait for it at its end.
    reconnecting = nc._reconnection_task  # noqa: SLF001
    for _ in range(10):
        if reconnecting is None or reconnecting.done():
            break
        reconnecting.cancel()
        await asyncio.wait({reconnecting}, timeout=0.5)


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

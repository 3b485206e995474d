"""The short way through nats-py for requests and replies, and the table of who waits for which.

nats-py 2.16 reads in a task, hands every message through a queue to a task of its subscription,
and every publish through another queue to a task that writes; `Client.request` adds
`asyncio.wait_for`. All this costs more than the work that most requests ask for. Here a message is
given to its taker where the socket is read, and what is sent within one turn of the event loop is
written at its end. Figures are in `docs/decisions/0008-balance-by-latency.md` and
`docs/decisions/0016-requests-without-tasks.md`.

All need private names of nats-py. They are looked for when a connection is made; if one is not
there as it is known, everything goes the public way, and only costs more.
"""

import asyncio
import inspect
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final, Protocol

import msgspec
import structlog

from bus.errors import TooLarge, Unavailable

TRACEPARENT: Final = "traceparent"
# How late a time-out may be noticed.
SWEEP_S: Final = 0.05
# What the socket has not taken yet, from which on nats-py's own task writes and waits for it.
BACKLOG_BYTES: Final = 256 * 1024
# What is written in one piece.
JOINED_MAX_BYTES: Final = 64 * 1024
# From here on a body is not copied into one piece with its headers.
LONG_BODY_BYTES: Final = 16 * 1024
PENDING_MAX_BYTES: Final = 512 * 1024 * 1024
# Blocks of headers up to here are remembered: answers of one model have all the same.
REMEMBERED_MAX_BYTES: Final = 1024

log = structlog.get_logger("bus.wire")


class Incoming(msgspec.Struct, frozen=True):
    """A message as it came in."""

    subject: str
    reply: str
    data: bytes
    headers: Mapping[str, str]


# Must not wait; should it raise, that is logged and the message is gone.
Taker = Callable[[Incoming], object]


class Wire:
    """Sends and takes messages the short way, where nats-py is as it is known.

    Args:
        nc: A connected client of nats-py.

    Attributes:
        short: Whether it is.
    """

    def __init__(self, nc: Any) -> None:
        self.short = _is_as_known(nc)
        self._nc = nc
        self._takers: dict[int, Taker] = {}
        self._writing = False
        self._loop = asyncio.get_running_loop()
        if self.short:
            self._process: Callable[..., Awaitable[None]] = nc._process_msg  # noqa: SLF001
            # The parser asks the client for it by name at every message.
            nc._process_msg = self._on_message  # noqa: SLF001
            self.connected()
        else:
            log.warning("wire.long_way", cause="this nats-py is not the one that is known")

    def connected(self) -> None:
        """Read from the connection that was just made; each reconnection makes another one."""
        reader = self._nc._transport._io_reader if self.short else None  # noqa: SLF001
        if reader is None:
            return
        feed, parser = reader.feed_data, self._nc._ps  # noqa: SLF001

        def feed_data(data: bytes) -> None:
            # As long as nats-py has something of the stream, all that comes goes to it: nothing
            # is overtaken.
            waiter = reader._waiter  # noqa: SLF001
            if waiter is None or waiter.done() or parser.buf or parser.state != _CONTROL_LINE:
                feed(data)
            elif (end := self._read(data)) < len(data):
                feed(data[end:] if end else data)

        reader.feed_data = feed_data

    async def take(self, subject: str, queue: str, taker: Taker) -> Any:
        """Subscribe a function, and return the subscription."""

        async def on_message(message: Any) -> None:
            headers = message.headers or {}
            self._give(taker, Incoming(message.subject, message.reply, message.data, headers))

        heard = await self._nc.subscribe(
            subject, queue=queue, cb=on_message, pending_bytes_limit=PENDING_MAX_BYTES
        )
        if self.short:
            self._takers[heard._id] = taker  # noqa: SLF001
        return heard

    def forget(self, heard: Any) -> None:
        """Give nothing more to the taker of a subscription."""
        self._takers.pop(heard._id, None)  # noqa: SLF001

    def send(self, subject: str, reply: str, body: bytes, headers: Mapping[str, str]) -> bool:
        """Send a message; return whether that is done.

        If not, it has to go the public way, which says what is wrong, or waits.

        Raises:
            TooLarge: With its headers it is over the broker's limit. The broker would close the
                connection for good.
        """
        nc = self._nc
        if not self.short or not nc.is_connected:
            return False
        block = _block(headers)
        if block is None:
            return False
        if not _SUBJECT.fullmatch(subject) or (reply and not _SUBJECT.fullmatch(reply)):
            return False
        size = len(block) + len(body)
        if size > nc._max_payload:  # noqa: SLF001
            raise TooLarge(
                f"body and headers have {size:,} bytes, the broker takes {nc._max_payload:,}"  # noqa: SLF001
            )
        if nc._pending_data_size + size > nc._max_pending_size:  # noqa: SLF001
            return False
        head = f"HPUB {subject} {reply} {len(block)} {size}\r\n".encode() + block
        pending = nc._pending  # noqa: SLF001
        if len(body) < LONG_BODY_BYTES:
            pending.append(head + body + b"\r\n")
        else:
            pending += (head, body, b"\r\n")
        nc._pending_data_size += len(head) + len(body) + 2  # noqa: SLF001
        if not self._writing:
            self._writing = True
            self._loop.call_soon(self._write)
        return True

    def _write(self) -> None:
        """Write what waits; leave it where the connection is lost, nats-py sends it later."""
        self._writing = False
        nc = self._nc
        if not self.short or not nc._pending or not nc.is_connected:  # noqa: SLF001
            return
        transport = nc._transport._io_writer.transport  # noqa: SLF001
        if transport.is_closing():
            return
        if transport.get_write_buffer_size() > BACKLOG_BYTES:
            # Its task waits until the socket has taken what is there. A full queue: it does so.
            if not nc._flush_queue.full():  # noqa: SLF001
                nc._flush_queue.put_nowait(self._loop.create_future())  # noqa: SLF001
            return
        lines, size = nc._pending, nc._pending_data_size  # noqa: SLF001
        nc._pending, nc._pending_data_size = [], 0  # noqa: SLF001
        # Many pieces cost uvloop more than one that is put together; long ones are not copied.
        if size < JOINED_MAX_BYTES:
            transport.write(b"".join(lines))
        else:
            transport.writelines(lines)

    def _read(self, data: bytes) -> int:
        """Give the messages that data begins with to their takers; return where they end.

        That is before the first thing which is no whole message for a taker.
        """
        at, size, takers = 0, len(data), self._takers
        while at < size:
            if data.startswith(b"HMSG ", at):
                has_headers = True
            elif data.startswith(b"MSG ", at):
                has_headers = False
            else:
                break
            line_end = data.find(b"\r\n", at, at + _LINE_MAX_BYTES)
            words = data[at:line_end].split() if line_end > 0 else []
            # HMSG subject sid [reply] headers total, MSG subject sid [reply] total
            if len(words) - has_headers not in {4, 5}:
                break
            taker = takers.get(int(words[2]))
            begin = line_end + 2
            end = begin + int(words[-1])
            if taker is None or end + 2 > size:
                break
            reply = words[3].decode() if len(words) - has_headers == 5 else ""
            headers: Mapping[str, str] = {}
            if has_headers:
                body = begin + int(words[-2])
                headers, begin = _headers(data[begin:body]), body
            at = end + 2
            self._give(taker, Incoming(words[1].decode(), reply, data[begin:end], headers))
        return at

    async def _on_message(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None
    ) -> None:
        taker = self._takers.get(sid)
        if taker is None:
            await self._process(sid, subject, reply, data, headers)
            return
        read = _headers(headers) if headers else {}
        self._give(taker, Incoming(subject.decode(), reply.decode(), data, read))

    def _give(self, taker: Taker, message: Incoming) -> None:
        try:
            taker(message)
        except Exception:
            # The read loop would die of it in silence.
            log.exception("message.lost", subject=message.subject)


class Waiting(Protocol):
    """Who waits for a reply; is told once what became of it, by one of the two.

    Attributes:
        deadline: Until when, in the event loop's time.
    """

    deadline: float

    def replied(self, message: Incoming) -> None:
        """Take the reply."""

    def ended(self, error: TimeoutError | Unavailable) -> None:
        """Take note that there will be none."""


class _Awaited:
    """A future that waits for a reply."""

    __slots__ = ("deadline", "reply")

    def __init__(self, reply: asyncio.Future[Incoming], deadline: float) -> None:
        self.reply = reply
        self.deadline = deadline

    def replied(self, message: Incoming) -> None:
        if not self.reply.done():
            self.reply.set_result(message)

    def ended(self, error: TimeoutError | Unavailable) -> None:
        if not self.reply.done():
            self.reply.set_exception(error)


class Replies:
    """Who waits for which reply, with one look in a while at who has waited too long.

    Bounded by those who wait, whose number somebody else bounds.

    Args:
        inbox: The subject below which replies come.

    Attributes:
        prefix: What every inbox begins with, the last dot included.
    """

    def __init__(self, inbox: str) -> None:
        self.prefix = f"{inbox}."
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[str, Waiting] = {}
        self._number = 0
        self._sweeping: asyncio.TimerHandle | None = None

    @property
    def subject(self) -> str:
        """What to subscribe to."""
        return f"{self.prefix}*"

    def expect(self, timeout_s: float) -> tuple[str, asyncio.Future[Incoming]]:
        """Return an inbox, and what will have its reply, or TimeoutError; `forget` it then."""
        inbox = self.inbox(self.reserve(1))
        reply: asyncio.Future[Incoming] = self._loop.create_future()
        self.await_at(inbox, _Awaited(reply, self._loop.time() + timeout_s))
        return inbox, reply

    def reserve(self, count: int) -> int:
        """Return the first of so many numbers that no other inbox has."""
        first = self._number + 1
        self._number += count
        return first

    def inbox(self, number: int) -> str:
        """Return the inbox with a number."""
        return f"{self.prefix}{number:x}"

    def await_at(self, inbox: str, waiting: Waiting) -> None:
        """Have somebody get what comes to an inbox first."""
        self._waiting[inbox] = waiting
        if self._sweeping is None:
            self._sweeping = self._loop.call_later(SWEEP_S, self._sweep)

    def take(self, message: Incoming) -> bool:
        """Give a reply to who waits for it; return whether anybody does."""
        return self.give(message.subject, message)

    def give(self, inbox: str, message: Incoming) -> bool:
        """Give a message to who waits at an inbox; return whether anybody does."""
        waiting = self._waiting.pop(inbox, None)
        if waiting is None:
            return False
        waiting.replied(message)
        return True

    def forget(self, inbox: str) -> None:
        """Wait for a reply no longer."""
        self._waiting.pop(inbox, None)

    def end_where(self, true: Callable[[Waiting], bool], error: Unavailable) -> None:
        """Let those wait no longer of whom something is true."""
        for inbox in [inbox for inbox, one in self._waiting.items() if true(one)]:
            self._end(inbox, error)

    def close(self) -> None:
        """Let nobody wait any more."""
        if self._sweeping is not None:
            self._sweeping.cancel()
        for inbox in list(self._waiting):
            self._end(inbox, Unavailable("the connection to the broker was closed"))

    def _sweep(self) -> None:
        self._sweeping = None
        now = self._loop.time()
        for inbox in [inbox for inbox, one in self._waiting.items() if one.deadline <= now]:
            self._end(inbox, TimeoutError())
        # An idle process is not woken for nothing.
        if self._waiting:
            self._sweeping = self._loop.call_later(SWEEP_S, self._sweep)

    def _end(self, inbox: str, error: TimeoutError | Unavailable) -> None:
        # Another one that was told before may have had it forgotten.
        if waiting := self._waiting.pop(inbox, None):
            try:
                waiting.ended(error)
            except Exception:
                # The others must hear of theirs.
                log.exception("reply.lost", inbox=inbox)


_SUBJECT = re.compile(r"[^\s]+")
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_TRACEPARENT: Final = TRACEPARENT.encode()
_PRIVATE: Final = (
    "_pending", "_pending_data_size", "_max_pending_size", "_max_payload", "_flush_queue",
    "_process_msg", "_transport",
)  # fmt: skip
_OF_A_READER: Final = ("feed_data", "_waiter")
# What nats-py's parser calls being between two messages.
_CONTROL_LINE: Final = 1
# nats-py looks at the line itself when it is longer than the broker's limit.
_LINE_MAX_BYTES: Final = 4_096
_OF_A_MESSAGE: Final = ["sid", "subject", "reply", "data", "headers"]


def _is_as_known(nc: Any) -> bool:
    """Tell whether nats-py has the inside that is used here."""
    if not all(hasattr(nc, name) for name in _PRIVATE):
        return False
    return (
        isinstance(nc._pending, list)  # noqa: SLF001
        # A WebSocket has none.
        and hasattr(nc._transport, "_io_writer")  # noqa: SLF001
        and all(hasattr(nc._transport._io_reader, name) for name in _OF_A_READER)  # noqa: SLF001
        and getattr(nc._ps, "state", None) in {1, 2}  # noqa: SLF001
        and isinstance(nc._ps.buf, bytearray)  # noqa: SLF001
        and list(inspect.signature(nc._process_msg).parameters) == _OF_A_MESSAGE  # noqa: SLF001
        and inspect.getattr_static(getattr(nc, "_ps", None), "nc", None) is nc
    )


def _block(headers: Mapping[str, str]) -> bytes | None:
    """Return headers as they are written; None if one is not one line, or has no plain name."""
    if TRACEPARENT in headers:
        # It is another one each time.
        return _write_block(headers.items())
    return _remembered_block(tuple(headers.items()))


@lru_cache(256)
def _remembered_block(headers: tuple[tuple[str, str], ...]) -> bytes | None:
    return _write_block(headers)


def _write_block(headers: Iterable[tuple[str, str]]) -> bytes | None:
    lines = ["NATS/1.0"]
    for name, value in headers:
        if "\n" in value or "\r" in value or not _is_plain(name):
            return None
        lines.append(f"{name}: {value}")
    return "\r\n".join([*lines, "", ""]).encode()


@lru_cache(256)
def _is_plain(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def _headers(raw: bytes) -> Mapping[str, str]:
    """Read a block of headers, as nats-py does: a status of the broker is the header `Status`."""
    if len(raw) > REMEMBERED_MAX_BYTES or _TRACEPARENT in raw:
        return _read_headers(raw)
    return _remembered_headers(raw)


@lru_cache(256)
def _remembered_headers(raw: bytes) -> Mapping[str, str]:
    return MappingProxyType(_read_headers(raw))


def _read_headers(raw: bytes) -> dict[str, str]:
    first, *lines = raw.decode("utf-8", "replace").split("\r\n")
    found: dict[str, str] = {}
    if len(first) > len("NATS/1.0"):
        status, _, description = first[len("NATS/1.0") :].strip().partition(" ")
        if status.isdigit():
            found["Status"] = status
        if description:
            found["Description"] = description
    for line in lines:
        name, colon, value = line.partition(":")
        if colon:
            found[name.strip()] = value.strip()
    return found

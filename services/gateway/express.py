"""Connections of HTTP with a short way for inference.

What aiohttp does for any request costs more than all else that we do for one of inference. So
where a plain one comes in whole on a connection that is idle, it is asked for at once, without a
task, and its answer is written in one piece. All else is aiohttp's: other requests, unusual heads,
and answers that need more (an error, compression, a body that the client takes slowly) go to the
same handlers, the latter with the outcome in hand.
"""

import asyncio
import random
from typing import Any, Final

from aiohttp import web

from bus.client import TRACEPARENT, Answer, Asked, new_traceparent
from bus.errors import BusError
from services.gateway.heads import HEAD_MAX_BYTES, Head, Infer, read_head
from services.gateway.inference import (
    COMPRESS_MIN_BYTES,
    LENGTH,
    shown,
    subject_of,
    too_many,
)
from services.gateway.parts import Parts
from services.gateway.patience import PATIENCE_S
from services.gateway.translate import (
    OUTCOME,
    TIMEOUT_DEFAULT_S,
    TRACED,
    is_request_id,
    is_traceparent,
    unreadable,
)
from services.gateway.written import WHOLE_MAX_BYTES, whole, would_inflate

# Larger bodies are gathered by aiohttp, which tells their client to wait when it has to.
GATHERED_MAX_BYTES: Final = 64 * 1024
# What may wait here while a request is being answered, before the client has to wait.
LATER_MAX_BYTES: Final = 64 * 1024


class Express(web.RequestHandler):
    """One connection.

    Args:
        parts: The gateway's.
        manager: aiohttp's server.
        loop: The event loop.
    """

    __slots__ = (
        "_asked", "_asking", "_closing", "_gathered", "_gathering", "_head", "_head_read", "_idle",
        "_later", "_left", "_make", "_outcome", "_parts", "_raw", "_request_id", "_theirs",
        "_to_gather", "_traceparent",
    )  # fmt: skip

    def __init__(self, parts: Parts, manager: web.Server, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(manager, loop=loop, access_log=None)  # type: ignore[arg-type]
        self._parts = parts
        # How many bytes of the present request aiohttp has not had yet; below zero: nobody but
        # aiohttp knows where the next one begins.
        self._left = 0
        # Whether aiohttp has a request, or a part of one.
        self._theirs = False
        # The head that came last: a client sends nearly always the same.
        self._head = b""
        self._head_read: Head | None = None
        # A request whose body has not come whole.
        self._gathered = bytearray()
        self._to_gather = 0
        self._gathering: asyncio.TimerHandle | None = None
        # A request that is asked for, and what came behind it.
        self._asking = False
        self._asked: Asked | None = None
        self._raw = b""
        self._request_id = ""
        self._traceparent = ""
        self._later = bytearray()
        # What aiohttp's next request has in hand.
        self._outcome: Answer | BusError | None = None
        self._make = self._request_factory
        self._request_factory = self._make_request
        self._closing = False
        self._idle: asyncio.Future[None] | None = None

    # --- What comes in ----------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Take what the client sent."""
        if not data:
            # aiohttp's own call: it looks again at what it has.
            super().data_received(data)
        elif self._asking:
            self._take_later(data)
        elif self._to_gather:
            self._gather(data)
        elif self._left:
            self._pass(data)
        else:
            self._begin(data)

    def _begin(self, data: bytes) -> None:
        """Take a request from its beginning."""
        head = self._look(data)
        if head is None:
            self._left = -1
            self._pass(data)
            return
        infer, size = head.infer, head.size + head.body_size
        if infer is None or not self._may_ask(infer, head.body_size):
            self._left = size
            self._pass(data)
        elif size > len(data):
            self._to_gather = size
            self._gathering = self._loop.call_later(PATIENCE_S, self._gather_no_more)
            self._gather(data)
        else:
            self._take_later(data[size:])
            self._ask(infer, data[:size], data[head.size : size])

    def _look(self, data: bytes | bytearray) -> Head | None:
        """Return the head that data begins with, if it is whole and plain."""
        if not self._head or not data.startswith(self._head):
            head = self._head_read = read_head(bytes(data[:HEAD_MAX_BYTES]))
            self._head = bytes(data[: head.size]) if head else b""
        return self._head_read

    def _may_ask(self, infer: Infer, size: int) -> bool:
        """Tell whether a request can go the short way."""
        parts = self._parts
        return not (self._theirs or self._paused or self._close) and (
            size <= GATHERED_MAX_BYTES
            and parts.gate.passes(infer.host, infer.authorization)
            and too_many(parts, size) is None
        )

    def _gather(self, data: bytes) -> None:
        self._gathered += data
        if len(self._gathered) >= self._to_gather:
            self._gather_no_more()

    def _gather_no_more(self) -> None:
        """Go on with what is gathered: as a whole, or, when it takes too long, with aiohttp."""
        if self._gathering:
            self._gathering.cancel()
        data, size, head = bytes(self._gathered), self._to_gather, self._head_read
        self._gathered, self._to_gather, self._gathering = bytearray(), 0, None
        if head and head.infer and len(data) >= size and self._may_ask(head.infer, head.body_size):
            self._take_later(data[size:])
            self._ask(head.infer, data[:size], data[head.size : size])
        else:
            self._left = size
            self._pass(data)
            self._tell_idle()
            self._close_if_asked()

    def _pass(self, data: bytes) -> None:
        """Give data to aiohttp."""
        self._theirs = True
        if self._left > 0:
            self._left -= len(data)
        super().data_received(data)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Take note of the end of a request that was aiohttp's; end what must not be read on."""
        finished = await super().finish_response(request, resp, start_time)
        if would_inflate(request) and self.transport is not None:
            self.transport.close()
        # Where it has more, or a part of more, it goes on.
        self._theirs = bool(self._messages) or self._left != 0
        return finished

    def _take_later(self, data: bytes) -> None:
        self._later += data
        if len(self._later) > LATER_MAX_BYTES and not self._buffer_paused:
            self._pause_reading_for_buffer()

    def _go_on(self) -> None:
        """Take what came while a request was being answered, up to the next one to be answered."""
        later = self._later
        while later and not (self._asking or self._to_gather):
            # Only the next request is taken out: many small ones are not copied over and over.
            # aiohttp would do so itself with what it keeps for later, and is given all at once.
            head = None if self._theirs else self._look(later)
            size = head.size + head.body_size if head else len(later)
            data = bytes(later[:size])
            del later[:size]
            self.data_received(data)

    # --- The short way ----------------------------------------------------------------------------

    def _ask(self, infer: Infer, raw: bytes, body: bytes) -> None:
        parts = self._parts
        parts.relaying += 1
        parts.relaying_bytes += len(body)
        parts.instance.gauges["http_requests"] += 1
        self._asking, self._raw = True, raw
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        given = infer.traceparent
        self._traceparent = given if is_traceparent(given) else new_traceparent()
        given = infer.request_id
        self._request_id = given if is_request_id(given) else f"{random.getrandbits(64):016x}"
        headers = {TRACEPARENT: self._traceparent}
        if infer.tensors_at:
            headers[LENGTH] = infer.tensors_at
        asked = parts.client.ask(
            subject_of(parts.client.root, infer.model, infer.version),
            body,
            self._answer,
            headers=headers,
            timeout_s=TIMEOUT_DEFAULT_S,
        )
        if self._asking and not asked.over:
            self._asked = asked

    def _answer(self, outcome: Answer | BusError) -> None:
        """Write an answer, or have aiohttp do it."""
        raw = self._raw
        self._no_longer_ask()
        if self.transport is None or self._force_close:
            return
        if not self._write(outcome):
            self._outcome, self._theirs = outcome, True
            super().data_received(raw)
        if not self._closing:
            self._go_on()
        if self._buffer_paused and not self._messages and len(self._later) <= LATER_MAX_BYTES:
            self._resume_reading_for_buffer()
        self._close_if_asked()

    def _write(self, outcome: Answer | BusError) -> bool:
        """Write an answer if it can be done in one piece; return whether it is."""
        if isinstance(outcome, BusError) or self.transport is None or self._paused:
            return False
        size, head = len(outcome.body), self._head_read
        if size > WHOLE_MAX_BYTES or (
            size >= COMPRESS_MIN_BYTES and not (head and head.infer and not head.infer.compressible)
        ):
            return False
        answer = whole(outcome.body, shown(outcome.headers), self._request_id)
        if answer is None:
            return False
        self.transport.write(answer)
        return True

    def _no_longer_ask(self) -> None:
        head = self._head_read
        self._parts.relaying -= 1
        self._parts.relaying_bytes -= head.body_size if head else 0
        self._asking, self._asked, self._raw = False, None, b""
        self._tell_idle()

    def _tell_idle(self) -> None:
        """Let a clean stop go on."""
        if self._idle and not self._idle.done():
            self._idle.set_result(None)

    def _make_request(self, *args: Any) -> web.BaseRequest:
        """Make aiohttp's request, with the outcome and its trace if there is one already."""
        assert self._make is not None  # noqa: S101 - aiohttp has looked
        request = self._make(*args)
        if self._outcome is not None:
            request[OUTCOME], self._outcome = self._outcome, None
            request[TRACED] = self._traceparent
        return request

    # --- The end ----------------------------------------------------------------------------------

    def connection_lost(self, exc: BaseException | None) -> None:
        """Stop what nobody waits for any more."""
        if self._gathering:
            self._gathering.cancel()
        if self._asked:
            self._asked.cancel()
        if self._asking:
            self._no_longer_ask()
        self._tell_idle()
        super().connection_lost(exc)

    def close(self) -> None:
        """Take no more requests, and end when the present one is answered."""
        if self._asking or self._to_gather:
            self._closing = True
        else:
            super().close()

    async def shutdown(self, timeout: float | None = 15.0) -> None:
        """End, when the present request is answered or the time is up."""
        if self._asking or self._to_gather:
            self._idle = self._loop.create_future()
            await asyncio.wait([self._idle], timeout=timeout)
            # aiohttp waits as long once more for a request that it has not got.
            super().close()
        await super().shutdown(timeout)

    def _close_if_asked(self) -> None:
        if self._closing and not self._asking:
            super().close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Return the answer to what never became a request, in our words."""
        # It also logs, and raises if an answer has begun.
        said = super().handle_error(request, status, exc, message)
        return unreadable(status, message) if status < 500 else said

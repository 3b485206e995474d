"""`/ws/plugins`, and the event stream of a plugin's log: what happens, as it happens.

Frames are written to the connection's transport as they are, beside aiohttp's own writer: so one
encoded block serves every browser, and no browser that reads slowly holds up another. The two
never mix inside a frame, because both write whole frames without waiting in between.
"""

import contextlib
from collections.abc import Iterable
from typing import Annotated, Any, Final, Literal

import msgspec
import structlog
from aiohttp import HttpVersion11, WSCloseCode, WSMsgType, hdrs, web
from msgspec import Meta

from bus import codec
from bus.errors import BusError, InvalidRequest, Unavailable
from bus.log_search import LEVELS
from bus.messages import Level, PluginName, State
from services.gateway.feeds import Feeds
from services.gateway.lines import Framing, Line, Tail
from services.gateway.listener import Listener
from services.gateway.parts import PARTS

PROTOCOL: Final = "bkg.v1"
BACKFILL: Final = 100
BACKFILL_MAX: Final = 1_000
FRAME_MAX_BYTES: Final = 16 * 1024
HEARTBEAT_S: Final = 20.0
CLOSE_PATIENCE_S: Final = 2.0

log = structlog.get_logger("services.gateway.live")


class Ask(State, frozen=True):
    """A frame of the client.

    Attributes:
        action: Whether to begin or to end.
        topic: What.
        plugin_id: Of which plugin; all of them if absent. Jobs are no plugin's.
        after: For logs and events: everything since this sequence is the back-fill.
        backfill: For logs and events: how many at most; 100, or 0 for the logs of all.
        level: For logs: the least level.
        batch: For logs: whether a frame's payload may be a list of records.
        id: Given back in an `ack` frame once the wish is fulfilled, or in the `error` frame.
    """

    action: Literal["SUB", "UNSUB"]
    topic: Literal["status", "logs", "telemetry", "events", "jobs"]
    plugin_id: PluginName | None = None
    after: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    backfill: Annotated[int, Meta(ge=0, le=BACKFILL_MAX)] | None = None
    level: Level | None = None
    batch: bool = False
    id: Annotated[str, Meta(max_length=128)] | int | None = None


class WebSocketFraming:
    """Text frames of `{"type": ..., "payload": ...}`, unmasked and whole (RFC 6455, 5.2)."""

    def event(self, kind: bytes, payload: bytes) -> bytes:
        """Return one frame."""
        return _text_frame(b'{"type":"%b","payload":%b}' % (kind, payload))

    def lines(self, lines: Iterable[Line], *, batch: bool) -> bytes:
        """Return a frame each; with `batch` one for all records up to the next gap."""
        if not batch:
            return b"".join(self._one(line) for line in lines)
        frames: list[bytes] = []
        together: list[bytes] = []
        for line in lines:
            if line.is_gap:
                self._end(together, frames)
                frames.append(self._one(line))
            else:
                together.append(line.json)
        self._end(together, frames)
        return b"".join(frames)

    def _one(self, line: Line) -> bytes:
        return self.event(b"gap" if line.is_gap else b"logs", line.json)

    def _end(self, together: list[bytes], frames: list[bytes]) -> None:
        if together:
            frames.append(self.event(b"logs", b"[%b]" % b",".join(together)))
            together.clear()


class EventStreamFraming:
    """Server-Sent Events: a log record is a plain message, everything else has its name."""

    def event(self, kind: bytes, payload: bytes) -> bytes:
        """Return one event."""
        return b"event: %b\ndata: %b\n\n" % (kind, payload)

    def lines(self, lines: Iterable[Line], *, batch: bool) -> bytes:  # noqa: ARG002
        """Return one event for each."""
        return b"".join(
            self.event(b"gap", line.json)
            if line.is_gap
            else b"id: %d\ndata: %b\n\n" % (line.seq, line.json)
            for line in lines
        )


_WEB_SOCKET: Final[Framing] = WebSocketFraming()
_EVENT_STREAM: Final[Framing] = EventStreamFraming()


async def socket(request: web.Request) -> web.StreamResponse:
    """Speak `/ws/plugins`: a bootstrap, then what the client subscribes to.

    400 it is no WebSocket request, or offers sub-protocols without `bkg.v1`; 401; 403 it comes
    from another site's page; 429 too many connections.
    """
    at = request.app[PARTS]
    offered = request.headers.get(hdrs.SEC_WEBSOCKET_PROTOCOL)
    if offered is not None and PROTOCOL not in [name.strip() for name in offered.split(",")]:
        # Not left to aiohttp: its warning would write the offered key into the log.
        raise InvalidRequest(f"offer the sub-protocol {PROTOCOL} beside the key", field="protocol")
    ws = web.WebSocketResponse(
        protocols=(PROTOCOL,) if offered is not None else (),
        heartbeat=HEARTBEAT_S,
        timeout=CLOSE_PATIENCE_S,
        max_msg_size=FRAME_MAX_BYTES,
        compress=False,
    )
    listener = _listener(request, _WEB_SOCKET, at.listener_budget_bytes)
    with at.feeds.listening(listener):
        await ws.prepare(request)
        bootstrap = {"plugins": at.feeds.states(), "telemetry": at.feeds.telemetry_of_all()}
        listener.send(b"bootstrap", codec.encode(bootstrap))
        with at.connections.holding(ws):
            try:
                async for message in ws:
                    await _obey(at.feeds, listener, message.type, message.data)
            except Exception:
                # The connection is no longer HTTP: an error response would be garbage in it.
                log.exception("socket.failed")
                await ws.close(code=WSCloseCode.INTERNAL_ERROR)
    return ws


async def log_stream(request: web.Request) -> web.StreamResponse:
    """Send a plugin's log as Server-Sent Events: the last 100 records, then each new one.

    `Last-Event-ID`, which browsers send when they come back, resumes after that record. 401; 404
    no such plugin; 429 too many connections; 503 the broker is away.
    """
    at = request.app[PARTS]
    plugin = at.state_of(request).name
    resumed = request.headers.get("Last-Event-ID", "")
    after = int(resumed) if resumed.isascii() and resumed.isdecimal() else None
    response = web.StreamResponse(
        headers={hdrs.CONTENT_TYPE: "text/event-stream", hdrs.CACHE_CONTROL: "no-store"}
    )
    if chunked := request.version >= HttpVersion11:
        response.enable_chunked_encoding()
    listener = _listener(request, _EVENT_STREAM, at.listener_budget_bytes, chunked=chunked)
    tail = Tail((plugin, "debug"), batch=False, asked=None)
    with at.feeds.listening(listener), at.connections.holding(response):
        await response.prepare(request)
        try:
            await at.feeds.follow_logs(
                listener, tail, backfill=BACKFILL if after is None else BACKFILL_MAX, after=after
            )
        except BusError as error:
            # The response has begun; what is new comes nevertheless.
            listener.send(b"error", _told(error, None))
        await at.connections.stopping(response)
    return response


async def _obey(feeds: Feeds, listener: Listener, kind: WSMsgType, body: Any) -> None:
    """Do what a frame asks; what is wrong with it is said in an `error` frame."""
    asked_id: object = None
    try:
        if kind is not WSMsgType.TEXT:
            raise InvalidRequest("frames are JSON as text, not binary")
        raw = body.encode()
        asked_id = _id_in(raw)
        ask = codec.decode(raw, Ask)
        if ask.action == "SUB":
            await _subscribe(feeds, listener, ask)
        else:
            _unsubscribe(feeds, listener, ask)
        if ask.id is not None:
            listener.send(b"ack", codec.encode({"id": ask.id}))
    except BusError as error:
        if isinstance(error, InvalidRequest):
            log.warning("frame.invalid", cause=error.message)
        listener.send(b"error", _told(error, asked_id))


async def _subscribe(feeds: Feeds, listener: Listener, ask: Ask) -> None:
    plugin = ask.plugin_id
    if ask.topic == "status":
        if plugin not in listener.states:
            feeds.follow_states(listener, plugin)
    elif ask.topic == "telemetry":
        if plugin not in listener.telemetry:
            feeds.follow_telemetry(listener, plugin)
    elif ask.topic == "jobs":
        if not listener.jobs:
            feeds.follow_jobs(listener)
    elif ask.topic == "events":
        if plugin not in listener.events:
            await feeds.follow_events(listener, plugin, backfill=_backfill(ask), after=ask.after)
    else:
        asked = msgspec.structs.replace(ask, id=None)
        present = listener.tails.get(plugin)
        if present is not None and present.asked == asked:
            return
        wanted = (plugin, ask.level or LEVELS[0])
        await feeds.follow_logs(
            listener, Tail(wanted, ask.batch, asked), backfill=_backfill(ask), after=ask.after
        )


def _unsubscribe(feeds: Feeds, listener: Listener, ask: Ask) -> None:
    """End a wish; without a plugin, the topic as a whole."""
    if ask.topic == "logs":
        feeds.stop_logs(listener, ask.plugin_id)
        return
    if ask.topic == "jobs":
        listener.jobs = False
        return
    followed = {
        "status": listener.states, "telemetry": listener.telemetry, "events": listener.events,
    }[ask.topic]  # fmt: skip
    if ask.plugin_id is None:
        followed.clear()
    else:
        followed.discard(ask.plugin_id)


def _backfill(ask: Ask) -> int:
    if ask.backfill is not None:
        return ask.backfill
    if ask.after is not None:
        return BACKFILL_MAX
    return BACKFILL if ask.plugin_id is not None or ask.topic == "events" else 0


def _listener(
    request: web.Request, framing: Framing, budget_bytes: int, *, chunked: bool = False
) -> Listener:
    transport = request.transport
    if transport is None:
        raise Unavailable("the connection is closed already")

    def write(frames: bytes) -> None:
        if transport.is_closing():
            return
        transport.write(b"%x\r\n%b\r\n" % (len(frames), frames) if chunked else frames)

    return Listener(
        write=write,
        waiting=transport.get_write_buffer_size,
        abort=transport.abort,
        framing=framing,
        budget_bytes=budget_bytes,
    )


def _text_frame(payload: bytes) -> bytes:
    size = len(payload)
    if size < 126:
        return b"\x81%c%b" % (size, payload)
    if size < 2**16:
        return b"\x81\x7e%b%b" % (size.to_bytes(2, "big"), payload)
    return b"\x81\x7f%b%b" % (size.to_bytes(8, "big"), payload)


class _Id(msgspec.Struct):
    id: str | int | None = None


def _id_in(raw: bytes) -> object:
    """Return a frame's id even when the rest of it is wrong, so that the client can match it."""
    with contextlib.suppress(BusError):
        found = codec.decode(raw, _Id).id
        return found[:128] if isinstance(found, str) else found
    return None


def _told(error: BusError, asked_id: object) -> bytes:
    said = {"message": error.message, "code": error.code, "field": error.field, "id": asked_id}
    return codec.encode({key: value for key, value in said.items() if value is not None})

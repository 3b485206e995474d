"""Log records onto the bus: structlog in front, a bounded queue behind, the work never waits.

Until a process is on the bus its records go to stderr, where the supervisor reads them. From then
on they go to the log stream; what the queue cannot hold is shed and counted in one record.
"""

import asyncio
import contextlib
import logging
import sys
import traceback
from collections import deque
from collections.abc import AsyncGenerator, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any, Final

import msgspec
import structlog

from bus.client import Client, trace
from bus.errors import BusError
from bus.messages import Level, LogEvent, now
from bus.subjects import LOG

QUEUE_RECORDS: Final = 10_000
MESSAGE_MAX_CHARS: Final = 16_384
_LEVELS: Final[dict[str, Level]] = {
    "debug": "debug", "info": "info", "warning": "warn", "warn": "warn",
    "error": "error", "exception": "error", "critical": "error",
}  # fmt: skip
_NUMBERS: Final = {"debug": 10, "info": 20, "warn": 30, "error": 40}


class Shipper:
    """The queue between structlog and the bus.

    Attributes:
        dropped: Records shed since the last one that said so.
    """

    def __init__(self, about: LogEvent) -> None:
        self._about = about
        self._queue: deque[LogEvent] = deque()
        self._waiting = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.dropped = 0

    def take(self, logger: Any, method: str, event: MutableMapping[str, Any]) -> str:
        """Queue a record: structlog's last processor, called from any thread."""
        event.setdefault("logger", logger.name)
        self.put(self._record(method, event))
        raise structlog.DropEvent

    def put(self, record: LogEvent) -> None:
        """Queue a record that is ready; the newest leaves when there is no room."""
        if len(self._queue) >= QUEUE_RECORDS:
            self.dropped += 1
            return
        self._queue.append(record)
        self._loop.call_soon_threadsafe(self._waiting.set)

    async def run(self, client: Client) -> None:
        """Publish what comes, in order, until cancelled."""
        while True:
            await self._waiting.wait()
            self._waiting.clear()
            await self.flush(client)

    async def flush(self, client: Client) -> None:
        """Publish what waits; what the broker cannot take now is shed."""
        while self._queue:
            record = self._queue.popleft()
            try:
                await publish_log(client, record)
            except BusError:
                self.dropped += 1
                continue
            if self.dropped and len(self._queue) < QUEUE_RECORDS // 2:
                dropped, self.dropped = self.dropped, 0
                self._queue.append(
                    self._record("warning", {"event": "logs.dropped", "dropped": dropped})
                )

    def _record(self, method: str, event: MutableMapping[str, Any]) -> LogEvent:
        fields = {k: _plain(v) for k, v in event.items() if k not in _NOT_FIELDS}
        if error := event.get("exc_info"):
            fields["exception"] = _traceback(error)
        context = trace.get()
        return msgspec.structs.replace(
            self._about,
            level=_LEVELS.get(method, "info"),
            message=str(event.get("event", ""))[:MESSAGE_MAX_CHARS],
            timestamp=now(),
            logger=event.get("logger"),
            fields=fields,
            trace=context.split("-")[1] if context else None,
        )


async def publish_log(client: Client, record: LogEvent) -> None:
    """Publish one record, for example a line that another process printed."""
    await client.publish(
        LOG,
        record,
        plugin=record.plugin,
        slot=record.slot if record.slot is not None else 0,
        level=record.level,
    )


@asynccontextmanager
async def shipping(client: Client, about: LogEvent, level: str = "info") -> AsyncGenerator[Shipper]:
    """Send structlog's records to the bus while inside.

    Args:
        client: The connection.
        about: Who speaks: plugin, slot, instance and host are taken from it.
        level: The least level that is sent.
    """
    shipper = Shipper(about)
    _configure(level, [shipper.take])
    bridge = _Bridge()
    logging.getLogger().addHandler(bridge)
    sending = asyncio.create_task(shipper.run(client))
    try:
        yield shipper
    finally:
        sending.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sending
        logging.getLogger().removeHandler(bridge)
        to_stderr(level)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                await shipper.flush(client)


def to_stderr(level: str = "info") -> None:
    """Write records to stderr, one JSON object a line, as before and after the bus is there."""
    _configure(
        level,
        [
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(default=str),
        ],
    )


class _Bridge(logging.Handler):
    """Hands on what libraries log the standard way, from warning upward."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        log = structlog.get_logger(record.name)
        log.log(record.levelno, record.getMessage(), exc_info=record.exc_info or None)


_NOT_FIELDS: Final = {"event", "logger", "exc_info", "level"}


def _configure(level: str, last: list[Callable[..., Any]]) -> None:
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, *last],
        wrapper_class=structlog.make_filtering_bound_logger(_NUMBERS[level]),
        logger_factory=_Logger,
        cache_logger_on_first_use=False,
    )


class _Logger(structlog.PrintLogger):
    """Writes to stderr, and knows the name that it was asked for by."""

    def __init__(self, name: str | None = None) -> None:
        super().__init__(sys.stderr)
        self.name = name


def _plain(value: object) -> Any:
    """Return a value as JSON can carry it; a record never fails for its fields."""
    try:
        return msgspec.to_builtins(value)
    except (TypeError, ValueError):
        return str(value)


def _traceback(error: object) -> str:
    if isinstance(error, BaseException):
        lines = traceback.format_exception(error)
    elif isinstance(error, tuple):
        lines = traceback.format_exception(*error)
    else:
        lines = traceback.format_exception(sys.exception()) if sys.exception() else []
    return "".join(lines)[-MESSAGE_MAX_CHARS:]

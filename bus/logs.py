"""Log records onto the bus: structlog in front, a bounded queue behind, the work never waits.

Until a process is on the bus its records go to stderr, where the supervisor reads them. From then
on they go to the log stream, in slices: the event loop has its turn between two of them, and the
last record of each is acknowledged by the broker, so that a flood is held back here and not there.
What the queue cannot hold is shed and counted in one record; errors have room of their own in it.
"""

import asyncio
import contextlib
import logging
import secrets
import sys
import traceback
from collections import deque
from collections.abc import AsyncGenerator, Callable, MutableMapping
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, Final

import msgspec
import structlog

from bus.client import Client, trace
from bus.errors import BusError, NotFound, Unavailable
from bus.messages import Level, LogEvent, LogLevelSet, SetLogLevel, ToldInstance, now
from bus.redaction import TEXT_MAX_CHARS, clean_text, redacted_fields
from bus.subjects import LOG, LOG_LEVEL
from bus.tasks import beside

QUEUE_RECORDS: Final = 10_000
# Beside those, for warnings and errors only: a flood of lesser records does not shed them.
QUEUE_RESERVE: Final = 1_000
SLICE_RECORDS: Final = 256
# The event loop is held no longer than this for records that are sent.
TURN_S: Final = 0.002
# While a flood lasts, what was shed is told this often.
TELL_DROPPED_S: Final = 10.0
CLOSE_PATIENCE_S: Final = 1.0
# These are on the bus without being any plugin's; all of a kind share the slot 0.
UNLISTED: Final = ("gateway", "supervisor")
_LEVELS: Final[dict[str, Level]] = {
    "debug": "debug", "info": "info", "warning": "warn", "warn": "warn",
    "error": "error", "exception": "error", "critical": "error",
}  # fmt: skip
_NUMBERS: Final = {"debug": 10, "info": 20, "warn": 30, "error": 40}


class Shipper:
    """The queue between structlog and the bus.

    Args:
        about: Who speaks: plugin, slot, instance and host are taken from it.
        level: The least level that is sent.

    Attributes:
        dropped: Records shed since the last one that said so.
        level: The least level that is sent just now.
    """

    def __init__(self, about: LogEvent, level: str = "info") -> None:
        self._about = about
        self._usual = level
        self.level = level
        self._falls_back: asyncio.TimerHandle | None = None
        self._queue: deque[LogEvent] = deque()
        self._waiting = asyncio.Event()
        self._woken = False
        self._closing = False
        self._ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._name = secrets.token_hex(6)
        self._sent = 0
        self._in_doubt = False
        self.dropped = 0
        self._dropped_since = 0.0

    def take(self, logger: Any, method: str, event: MutableMapping[str, Any]) -> str:
        """Queue a record: structlog's last processor, called from any thread."""
        # A flood pays for what is shed no more than for this look.
        if self._has_room(_LEVELS.get(method, "info")):
            event.setdefault("logger", logger.name)
            self.put(self._record(method, event))
        raise structlog.DropEvent

    def put(self, record: LogEvent) -> None:
        """Queue a record that is ready; the newest leaves when there is no room."""
        if not self._has_room(record.level):
            return
        self._queue.append(record)
        # Once until it is heard: the loop's own queue would grow with a flood.
        if not self._woken:
            self._woken = True
            self._loop.call_soon_threadsafe(self._waiting.set)

    def set_level(self, level: Level, seconds: float, by: str) -> None:
        """Send records from another level upward for a while; then it falls back by itself."""
        if self._falls_back is not None:
            self._falls_back.cancel()
        self._falls_back = self._loop.call_later(seconds, self._fall_back)
        self._apply(level)
        self._tell("log_level.changed", least=level, seconds=seconds, by=by)

    async def run(self, client: Client) -> None:
        """Publish what comes, in order, until `close`."""
        try:
            while not (self._closing and not self._queue):
                await self._waiting.wait()
                self._waiting.clear()
                self._woken = False
                while self._queue:
                    await client.online()
                    await self._send_slice(client)
                    self._tell_dropped()
        finally:
            self._ended.set()

    async def close(self, patience_s: float) -> None:
        """Let `run` end, and wait until all is sent that waits, but no longer than `patience_s`."""
        if self._falls_back is not None:
            self._falls_back.cancel()
        self._closing = True
        self._waiting.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await self._ended.wait()

    def _has_room(self, level: Level) -> bool:
        reserve = QUEUE_RESERVE if level in {"warn", "error"} else 0
        if len(self._queue) < QUEUE_RECORDS + reserve:
            return True
        if not self.dropped:
            self._dropped_since = self._loop.time()
        self.dropped += 1
        return False

    async def _send_slice(self, client: Client) -> None:
        """Publish the records that are next, and wait until the broker has stored them."""
        turn_ends = self._loop.time() + TURN_S
        # One whose storing is in doubt goes first, alone, under its old name.
        ahead = 0 if self._in_doubt else min(len(self._queue), SLICE_RECORDS) - 1
        for _ in range(ahead):
            record = self._queue.popleft()
            try:
                await publish_log(client, record)
            except (BusError, *_CANNOT_TRAVEL):
                self.dropped += 1
            if self._loop.time() > turn_ends:
                await asyncio.sleep(0)
                turn_ends = self._loop.time() + TURN_S
        # It leaves the queue only when it is stored: an outage finds it still here.
        self._in_doubt = True
        try:
            await client.store.store_log(cleaned(self._queue[0]), once=f"{self._name}-{self._sent}")
        except Unavailable:
            return
        except (BusError, *_CANNOT_TRAVEL):
            self.dropped += 1
        self._in_doubt = False
        self._sent += 1
        self._queue.popleft()

    def _tell_dropped(self) -> None:
        if not self.dropped:
            return
        is_over = len(self._queue) < QUEUE_RECORDS // 2
        if is_over or self._loop.time() > self._dropped_since + TELL_DROPPED_S:
            dropped, self.dropped = self.dropped, 0
            self._queue.append(
                self._record("warning", {"event": "logs.dropped", "dropped": dropped})
            )

    def _fall_back(self) -> None:
        self._falls_back = None
        self._apply(self._usual)
        self._tell("log_level.restored", least=self._usual)

    def _apply(self, level: str) -> None:
        self.level = level
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(_NUMBERS[level]))

    def _tell(self, what: str, **fields: object) -> None:
        """Queue a record whatever the level: who reads the log must know what is missing in it."""
        self.put(self._record("info", {"event": what, "logger": "bus.logs", **fields}))

    def _record(self, method: str, event: MutableMapping[str, Any]) -> LogEvent:
        fields = {k: _plain(v) for k, v in event.items() if k not in _NOT_FIELDS}
        if error := event.get("exc_info"):
            fields["exception"] = _traceback(error)
        context = trace.get()
        return msgspec.structs.replace(
            self._about,
            level=_LEVELS.get(method, "info"),
            message=str(event.get("event", ""))[:TEXT_MAX_CHARS],
            timestamp=now(),
            logger=event.get("logger"),
            fields=fields,
            trace=context.split("-")[1] if context else None,
        )


def cleaned(record: LogEvent) -> LogEvent:
    """Return a record as it may leave the process: without escapes and secrets."""
    return msgspec.structs.replace(
        record, message=clean_text(record.message), fields=redacted_fields(record.fields)
    )


async def publish_log(client: Client, record: LogEvent) -> None:
    """Publish one record, for example a line that another process printed; it is cleaned first."""
    await client.publish(
        LOG,
        cleaned(record),
        plugin=record.plugin,
        slot=record.slot if record.slot is not None else 0,
        level=record.level,
    )


async def tell_log_level(client: Client, plugin: str, wish: SetLogLevel) -> LogLevelSet:
    """Tell every instance of a plugin to change its log level for a while.

    Raises:
        NotFound: It has no instance; names those that have one.
        Unavailable: The broker is away.
    """
    instances = [
        entry.value for entry in await client.store.instances.all() if entry.value is not None
    ]
    told = [
        ToldInstance(slot=one.slot, id=one.id, host=one.host)
        for one in sorted(instances, key=lambda one: one.slot)
        if one.plugin == plugin
    ]
    if plugin in UNLISTED:
        told = [ToldInstance(slot=0)]
    if not told:
        known = ", ".join(sorted({one.plugin for one in instances} | set(UNLISTED)))
        raise NotFound(f"{plugin[:100]!r} has no instance that could be told; running are: {known}")
    for slot in sorted({one.slot for one in told}):
        await client.publish(LOG_LEVEL, wish, plugin=plugin, slot=slot)
    await client.barrier()
    return LogLevelSet(
        name=plugin, level=wish.level, until=now() + timedelta(seconds=wish.seconds), told=told
    )


@asynccontextmanager
async def shipping(client: Client, about: LogEvent, level: str = "info") -> AsyncGenerator[Shipper]:
    """Send structlog's records to the bus while inside, and heed changes of the level.

    Args:
        client: The connection.
        about: Who speaks: plugin, slot, instance and host are taken from it.
        level: The least level that is sent.
    """
    shipper = Shipper(about, level)
    _configure(level, [shipper.take])
    bridge = _Bridge()
    logging.getLogger().addHandler(bridge)
    async with beside(shipper.run(client)):
        try:
            async with _heeding(client, shipper, about):
                yield shipper
        finally:
            logging.getLogger().removeHandler(bridge)
            to_stderr(level)
            # What cannot be sent by then is lost: a broker that is away must not hold up the end.
            await client.while_connected(shipper.close(CLOSE_PATIENCE_S), 2 * CLOSE_PATIENCE_S)


@asynccontextmanager
async def _heeding(client: Client, shipper: Shipper, about: LogEvent) -> AsyncGenerator[None]:
    async with client.follow(LOG_LEVEL, plugin=about.plugin, slot=about.slot or 0) as wishes:

        async def heed() -> None:
            async for wish in wishes:
                shipper.set_level(wish.payload.level, wish.payload.seconds, wish.payload.by)

        async with beside(heed()):
            yield


def to_stderr(level: str = "info") -> None:
    """Write records to stderr, one JSON object a line, as before and after the bus is there."""
    _configure(
        level,
        [
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,
            _without_secrets,
            structlog.processors.JSONRenderer(default=str),
        ],
    )


class _Bridge(logging.Handler):
    """Hands on what libraries log the standard way, from warning upward."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        log = structlog.get_logger(record.name)
        level = max(number for number in _NUMBERS.values() if number <= record.levelno)
        try:
            said = record.getMessage()
        except (TypeError, ValueError):
            said = str(record.msg)
        log.log(level, said, exc_info=record.exc_info or None)


_NOT_FIELDS: Final = {"event", "logger", "exc_info", "level"}
# What an encoder raises about a value that no codec has a form for.
_CANNOT_TRAVEL: Final = (TypeError, ValueError, OverflowError, RecursionError)


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
        return msgspec.to_builtins(value, str_keys=True)
    except _CANNOT_TRAVEL:
        return _shown(value)


def _shown(value: object) -> str:
    try:
        return str(value)
    except Exception as error:  # noqa: BLE001 - what somebody's own __str__ raises
        return f"<{type(value).__name__} that cannot be shown: {type(error).__name__}>"


def _without_secrets(
    _logger: Any, _method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    return redacted_fields({name: _plain(value) for name, value in event.items()})


def _traceback(error: object) -> str:
    if isinstance(error, BaseException):
        lines = traceback.format_exception(error)
    elif isinstance(error, tuple):
        lines = traceback.format_exception(*error)
    else:
        lines = traceback.format_exception(sys.exception()) if sys.exception() else []
    return "".join(lines)[-TEXT_MAX_CHARS:]

"""What every instance publishes, and what can be told to it."""

from datetime import datetime
from typing import Annotated, Any, Literal

from msgspec import Meta

from bus.messages.base import Level, State, Status


class LogEvent(State, frozen=True):
    """One log record.

    Attributes:
        plugin: Who speaks.
        level: How bad.
        message: What happened, `noun.verb`, or a captured line.
        timestamp: When, by the speaker's clock.
        slot: Which of the plugin's instances.
        instance: Its id.
        host: Where.
        logger: The part that speaks; `stdout` or `stderr` for captured lines.
        fields: The values.
        trace: The trace id of the request that it belongs to.
        seq: The number that the stream gave it; set when it is read.
    """

    plugin: str
    level: Level
    message: str
    timestamp: datetime
    slot: int | None = None
    instance: str | None = None
    host: str | None = None
    logger: str | None = None
    fields: dict[str, Any] = {}
    trace: str | None = None
    seq: int | None = None


class TelemetrySnapshot(State, frozen=True):
    """What an instance uses and holds.

    Attributes:
        plugin: The plugin.
        cpu: Percent of one core since the last snapshot.
        mem_bytes: Resident memory.
        timestamp: When.
        models_loaded: candle only.
        datasets: rustyface only.
        entries: rustyface only.
        slot: Which instance; absent in a sum over instances.
        instance: Its id.
        host: Where.
        gauges: Further numbers by name.
    """

    plugin: str
    cpu: float
    mem_bytes: int
    timestamp: datetime
    models_loaded: int | None = None
    datasets: int | None = None
    entries: int | None = None
    slot: int | None = None
    instance: str | None = None
    host: str | None = None
    gauges: dict[str, float] = {}


class HostTelemetry(State, frozen=True):
    """What a host has, and what of it is in use.

    Attributes:
        host: Its name.
        timestamp: When.
        processors: How many it may use: what is there, or the quota of its control group.
        cpu: Percent of them in use since the last snapshot: 100 is all of them.
        load: Processes that run or wait to: the averages over 1, 5 and 15 minutes.
        mem_total_bytes: Its memory, or the limit of its control group.
        mem_available_bytes: What of it is free for more.
        disk_total_bytes: Size of the disk that has the data directory.
        disk_free_bytes: What of it is free for us.
    """

    host: str
    timestamp: datetime
    processors: float
    cpu: float
    load: list[float]
    mem_total_bytes: int
    mem_available_bytes: int
    disk_total_bytes: int
    disk_free_bytes: int


class BrokerTelemetry(State, frozen=True):
    """What the broker keeps, and how fast it answers.

    Attributes:
        timestamp: When.
        host: From where it was measured.
        stored_bytes: What its streams hold on disk.
        limit_bytes: What they may hold; absent without a limit for the account.
        reserved_bytes: What they were promised.
        streams: How many, buckets included.
        consumers: How many readers.
        round_trip_ms: From here to the broker and back.
    """

    timestamp: datetime
    host: str
    stored_bytes: int
    streams: int
    consumers: int
    round_trip_ms: float
    limit_bytes: int | None = None
    reserved_bytes: int | None = None


class SetLogLevel(State, frozen=True):
    """Changes from which level an instance publishes its log records, for a while.

    Attributes:
        level: The least level.
        seconds: After this time it falls back by itself.
        by: Who asks.
    """

    level: Level
    seconds: Annotated[float, Meta(gt=0, le=86_400)] = 600.0
    by: str = "nats"


class ToldInstance(State, frozen=True):
    """An instance that was told something; one that is no plugin's has no id here."""

    slot: int
    id: str | None = None
    host: str | None = None


class LogLevelSet(State, frozen=True):
    """Who was told to change its log level, and until when.

    Attributes:
        name: The plugin.
        level: The least level that it publishes from now on.
        until: When that ends.
        told: Its instances.
    """

    name: str
    level: Level
    until: datetime
    told: list[ToldInstance]


class Event(State, frozen=True):
    """Something that happened, kept for 30 days.

    Attributes:
        kind: What it happened to.
        name: Which plugin or host.
        verb: What happened, in the past: `started`, `ready`, `crashed`, `configured`, `joined`.
        timestamp: When.
        slot: Which of a plugin's places.
        host: Where.
        cause: Why, in words.
        by: Who asked for it.
        seq: The number that the stream gave it; set when it is read.
    """

    kind: Literal["plugin", "host"]
    name: str
    verb: str
    timestamp: datetime
    slot: int | None = None
    host: str | None = None
    cause: str | None = None
    by: str | None = None
    seq: int | None = None


class CancelCall(State, frozen=True):
    """Nobody waits for a reply any more: who works on it may stop.

    Attributes:
        inbox: The reply subject of the request.
    """

    inbox: str


class Heartbeat(State, frozen=True):
    """A sign of life, once a second.

    Attributes:
        plugin: The plugin.
        slot: Which instance.
        id: Its id.
        host: Where.
        pid: Its process.
        status: As in its registration.
        in_flight: Requests being worked on.
        oldest_s: Age of the oldest of them; one that grows is a hung worker.
        lag_ms: How late the event loop was.
        generation: The generation that it was started for.
        timestamp: When.
    """

    plugin: str
    slot: int
    id: str
    host: str
    pid: int
    status: Status
    in_flight: int
    oldest_s: float
    lag_ms: float
    generation: int
    timestamp: datetime

"""What must survive: buckets, streams and the object store, declared once, with typed views."""

import contextlib
import json
from collections import deque
from collections.abc import AsyncIterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, TypeVar

import msgspec
import structlog
from nats.aio.client import Client as Nats

from bus import codec
from bus import messages as m
from bus.artefacts import Artefacts
from bus.assets import LOG_LIMITS, declared, limits_of
from bus.errors import Conflict, Internal, InvalidRequest, Unavailable
from bus.jetstream import ask_jetstream
from bus.log_search import LEVELS, LogPage, LogQuery
from bus.log_stream import LogStream
from bus.settings import ARTEFACTS_MAX_BYTES, LogLimits, artefacts_max_bytes
from bus.streams import Stored, Stream, nanoseconds
from bus.subjects import EVENT, TELEMETRY, Feed, name_of, token

log = structlog.get_logger("bus.state")

T = TypeVar("T", bound=m.Message)


@dataclass(frozen=True)
class Entry(Generic[T]):
    """A key of a bucket as it is, or as it was when it left (then without value)."""

    names: tuple[str, ...]
    value: T | None
    revision: int


@dataclass(frozen=True)
class Changes(Generic[T]):
    """Some entries of a bucket that is followed.

    Attributes:
        entries: In the order of their revisions.
        caught_up: Whether nothing more was waiting behind the last one.
        revision: Of the last one, also if it could not be read; 0 without any.
    """

    entries: list[Entry[T]]
    caught_up: bool
    revision: int = 0


class Bucket(Generic[T]):
    """A typed view of a key-value bucket, or of those of its keys that end in `suffix`.

    A key is made of names, each escaped as a token of a subject: `plugin.slot.suffix`.
    """

    def __init__(self, nc: Nats, bucket: str, kind: type[T], width: int, suffix: str = "") -> None:
        self._stream = Stream(nc, f"KV_{bucket}")
        self._prefix = f"$KV.{bucket}."
        self._kind = kind
        self._width = width
        self._suffix = f".{suffix}" if suffix else ""

    async def get(self, *names: object) -> Entry[T] | None:
        """Return an entry, or None when there is none."""
        entry = await self.last(*names)
        return entry if entry and entry.value is not None else None

    async def last(self, *names: object) -> Entry[T] | None:
        """Return an entry, or the mark that a deleted or expired one left; None without either."""
        message = await self._stream.last(self._subject(names))
        return self._entry(message) if message else None

    async def put(self, value: T, *names: object) -> int:
        """Write a value, whatever was there, and return its revision."""
        return await self._stream.append(self._subject(names), *self._body(value))

    async def create(self, value: T, *names: object) -> int:
        """Write a value where there is none, and return its revision.

        Raises:
            Conflict: There is one.
        """
        subject = self._subject(names)
        last = await self._stream.last(subject)
        if last is not None and self._entry(last).value is not None:
            raise Conflict(f"{'.'.join(map(str, names))} is there already")
        # The mark of a deleted or expired key is no value, but has a sequence.
        return await self._write(value, last.seq if last else 0, subject)

    async def update(self, value: T, revision: int, *names: object) -> int:
        """Write a value where `revision` is still the newest, and return the new revision.

        Raises:
            Conflict: Another writer came first.
        """
        return await self._write(value, revision, self._subject(names))

    async def delete(self, *names: object, revision: int | None = None) -> int:
        """Remove a key and return the revision of that; one that is not there is no error.

        Raises:
            Conflict: `revision` is given and no longer the newest.
        """
        subject = self._subject(names)
        expect = None if revision is None else (subject, revision)
        headers = {"KV-Operation": "DEL"}
        return await self._stream.append(subject, b"", headers=headers, expect=expect)

    async def all(self) -> list[Entry[T]]:
        """Return every entry that is there now, and can be read."""
        latest = self._stream.read(self._all(), latest_only=True)
        entries = self._readable([message async for message in latest])
        return [entry for entry in entries if entry.value is not None]

    async def revision(self) -> int:
        """Return the revision of the newest change of any key; 0 when there never was one."""
        newest = await self._stream.last(self._all())
        return newest.seq if newest else 0

    async def history(self, *names: object) -> list[Entry[T]]:
        """Return the kept values of a key, oldest first."""
        kept = self._stream.read(self._subject(names))
        entries = self._readable([message async for message in kept])
        return [entry for entry in entries if entry.value is not None]

    async def follow(self, *names: object) -> AsyncIterator[Changes[T]]:
        """Give every entry that is there, or only that of one key, and then every change.

        What somebody wrote by hand and cannot be read is passed over: the last readable value
        stands.
        """
        which = self._subject(names) if names else self._all()
        async for batch in self._stream.follow(which, latest_only=True):
            revision = batch.messages[-1].seq if batch.messages else 0
            yield Changes(self._readable(batch.messages), batch.caught_up, revision)

    async def _write(self, value: T, revision: int, subject: str) -> int:
        return await self._stream.append(subject, *self._body(value), expect=(subject, revision))

    def _body(self, value: T) -> tuple[bytes]:
        return (codec.encode(value),)

    def _subject(self, names: Sequence[object]) -> str:
        if len(names) != self._width:
            raise ValueError(f"a key here has {self._width} names, got {names}")
        return self._prefix + ".".join(token(str(name)) for name in names) + self._suffix

    def _all(self) -> str:
        return self._prefix + ".".join("*" * self._width) + self._suffix

    def _readable(self, messages: Sequence[Stored]) -> list[Entry[T]]:
        entries = []
        for message in messages:
            try:
                entries.append(self._entry(message))
            except InvalidRequest as error:
                log.warning("entry.unreadable", subject=message.subject, cause=error.message)
        return entries

    def _entry(self, message: Stored) -> Entry[T]:
        key = message.subject.removeprefix(self._prefix).removesuffix(self._suffix)
        names = tuple(name_of(part) for part in key.split("."))
        gone = "KV-Operation" in message.headers or "Nats-Marker-Reason" in message.headers
        value = None if gone else codec.decode(message.body, self._kind)
        return Entry(names, value, message.seq)


class Store:
    """Everything of one deployment that survives in the broker.

    Attributes:
        desired: What each plugin should be, by plugin.
        schemas: The last known schema of each plugin's settings, by plugin.
        processes: Replicas as their supervisor sees them, by plugin and slot.
        instances: Instances as they tell of themselves, by plugin and slot.
        hosts: Hosts as their supervisors tell of them, by name.
        hosts_desired: What each host should be, by name; without an entry, one that takes replicas.
        models: The repository's models, and what of them should be served, by model id.
        reports: What validation found, by artefact.
        removed: Which files were removed, by model id and digest.
        jobs: Work that outlives its request, by id; they leave a week after their end.
        uploads: Uploads that go on or broke off, by model and version.
        answers: What uploads were answered, by idempotency key.
        served: What each instance of candle serves, by plugin and slot.
        galleries: The events of all galleries.
        changes: What was done to galleries: their history.
        faces: Images of galleries that keep them, and files that are imported or exported.
        artefacts: Model files by digest.
    """

    def __init__(self, nc: Nats, root: str) -> None:
        self._nc = nc
        self._root = root
        self.desired = Bucket(nc, f"{root}-desired", m.DesiredState, 1)
        self.schemas = Bucket(nc, f"{root}-desired", m.PluginSchema, 1, "schema")
        self.processes = Bucket(nc, f"{root}-observed", m.ProcessState, 2, "process")
        self.instances = Bucket(nc, f"{root}-observed", m.Registration, 2, "instance")
        self.hosts = Bucket(nc, f"{root}-hosts", m.HostState, 1)
        self.hosts_desired = Bucket(nc, f"{root}-desired", m.HostDesired, 1, "host")
        self.models = Bucket(nc, f"{root}-models", m.ModelSpec, 1)
        self.reports = Bucket(nc, f"{root}-models", m.ModelReport, 1, "report")
        self.removed = Bucket(nc, f"{root}-models", m.RemovedFile, 2, "removed")
        self.jobs = Bucket(nc, f"{root}-jobs", m.Job, 1)
        self.uploads = Bucket(nc, f"{root}-uploads", m.UnfinishedUpload, 2, "upload")
        self.answers = Bucket(nc, f"{root}-uploads", m.KeptAnswer, 1, "answer")
        self.served = Bucket(nc, f"{root}-observed", m.ServedModels, 2, "models")
        self.galleries = Stream(nc, f"{root}-galleries")
        self.changes = Stream(nc, f"{root}-gallery-history")
        self.faces = Artefacts(Stream(nc, f"OBJ_{root}-faces"), f"{root}-faces", erases=True)
        self._objects = Stream(nc, f"OBJ_{root}-artefacts")
        self.artefacts = Artefacts(self._objects, f"{root}-artefacts", ARTEFACTS_MAX_BYTES)
        self._logs = LogStream(Stream(nc, f"{root}-logs"), root)
        self._telemetry = Stream(nc, f"{root}-telemetry")
        self._events = Stream(nc, f"{root}-events")

    async def check(self) -> None:
        """Raise Unavailable when the broker has no JetStream."""
        reply = await ask_jetstream(self._nc, "$JS.API.INFO", b"", patience_s=5.0)
        if "error" in reply:
            raise Unavailable(f"the broker's JetStream cannot be used: {reply['error']}")

    async def declare(self, logs: LogLimits | None = None) -> None:
        """Make every bucket and stream that is missing, and bring the others up to date.

        Args:
            logs: How much the log stream keeps; the environment says it if None.

        Raises:
            InvalidRequest: The environment has a limit that there cannot be.
        """
        limits = limits_of(LogLimits.from_env() if logs is None else logs)
        artefacts = artefacts_max_bytes()
        room = {} if artefacts is None else {"max_bytes": artefacts}
        for config in declared(self._root):
            if config["name"] == self._logs.name:
                await self._declare(config | limits, kept=LOG_LIMITS.keys() - limits.keys())
            elif config["name"] == self._objects.name:
                await self._declare(config | room, kept={"max_bytes"} - room.keys())
            else:
                await self._declare(config)

    async def delete_everything(self) -> None:
        """Delete every bucket and stream of this deployment, with all that they hold."""
        for config in declared(self._root):
            await ask_jetstream(
                self._nc, f"$JS.API.STREAM.DELETE.{config['name']}", b"", error_is_reply=True
            )

    async def logs(
        self,
        plugin: str | None,
        *,
        limit: int,
        after: int | None = None,
        level: m.Level | None = None,
    ) -> list[m.LogEvent]:
        """Return the newest records, oldest first, with their sequence.

        Args:
            plugin: Whose; None for all.
            limit: How many at most.
            after: Only those with a greater sequence.
            level: Only those of this level.
        """
        levels = LEVELS if level is None else (level,)
        query = LogQuery(limit=limit, plugin=plugin, after=after, levels=levels)
        return (await self.search_logs(query)).records

    async def search_logs(self, query: LogQuery) -> LogPage:
        """Return the records that somebody looks for: the newest or the oldest of them.

        A search that has taken `SEARCH_S` of `bus/log_stream.py` ends with what it has found, and
        says where to go on.
        """
        return await self._logs.search(query)

    async def store_log(self, record: m.LogEvent, *, once: str) -> None:
        """Store a record and wait until it is; all that was published before it is stored then.

        Args:
            record: The record.
            once: Its own name: stored again under it, it is there once.

        Raises:
            Unavailable: The broker did not store it in time.
        """
        await self._logs.append(record, once=once)

    async def history(self, feed: Feed[T], since: datetime, **tokens: str | int) -> list[T]:
        """Return what of a feed of telemetry was stored since a moment, oldest first."""
        kept: list[T] = []
        subject = feed.subject(self._root, **tokens)
        async for stored in self._telemetry.read(subject, since=since):
            with contextlib.suppress(InvalidRequest):
                kept.append(codec.decode(stored.body, feed.payload))
        return kept

    async def newest(self, feed: Feed[T], **tokens: str | int) -> T | None:
        """Return the last message of a feed of telemetry, or None when there is none."""
        stored = await self._telemetry.last(feed.subject(self._root, **tokens))
        return codec.decode(stored.body, feed.payload) if stored else None

    async def account(self) -> dict[str, Any]:
        """Return what the broker tells of its JetStream: storage, streams, consumers, limits."""
        return await ask_jetstream(self._nc, "$JS.API.INFO", b"", patience_s=5.0)

    async def telemetry(self) -> list[m.TelemetrySnapshot]:
        """Return the last snapshot of every instance."""
        latest = self._telemetry.read(TELEMETRY.subject(self._root), latest_only=True)
        snapshots = []
        async for stored in latest:
            with contextlib.suppress(InvalidRequest):
                snapshots.append(codec.decode(stored.body, m.TelemetrySnapshot))
        return snapshots

    async def tell(self, event: m.Event, *, once: str | None = None) -> None:
        """Store an event; what several may tell of is stored once if they give it the same name.

        Raises:
            Unavailable: The broker did not store it in time.
        """
        subject = EVENT.subject(self._root, kind=event.kind, name=event.name, verb=event.verb)
        headers = {"Nats-Msg-Id": once} if once else None
        await self._events.append(subject, codec.encode(event), headers=headers)

    async def events(
        self,
        *,
        limit: int,
        kind: str | None = None,
        name: str | None = None,
        verb: str | None = None,
        after: int | None = None,
        since: datetime | None = None,
        oldest: bool = False,
    ) -> list[m.Event]:
        """Return the newest events, oldest first, with their sequence.

        Args:
            limit: How many at most.
            kind: Only those of plugins, or of hosts.
            name: Only those of this plugin or host.
            verb: Only those of this verb.
            after: Only those with a greater sequence.
            since: Only those stored from this moment on.
            oldest: The first of them instead of the newest.
        """
        which = {"kind": kind, "name": name, "verb": verb}
        subject = EVENT.subject(self._root, **{k: v for k, v in which.items() if v is not None})
        found: deque[m.Event] = deque(maxlen=None if oldest else limit)
        first = nanoseconds(since)
        reading = self._events.read(subject, after=after or 0, since=since)
        async with contextlib.aclosing(reading) as messages:  # type: ignore[type-var]
            async for stored in messages:
                event = _event(stored)
                if event is not None and (first is None or stored.at >= first):
                    found.append(event)
                if oldest and len(found) == limit:
                    break
        return list(found)

    async def follow_events(
        self, *, after: int = 0, since: datetime | None = None
    ) -> AsyncIterator[m.Event]:
        """Give every event behind a sequence, or since a moment, and every new one, without end."""
        subject = EVENT.subject(self._root)
        async for batch in self._events.follow(subject, after=after, since=since):
            for stored in batch.messages:
                if (event := _event(stored)) is not None:
                    yield event

    async def _declare(self, config: dict[str, Any], kept: AbstractSet[str] = frozenset()) -> None:
        """Make a stream, or bring it up to date but for what is `kept` as it has it."""
        name = config["name"]
        reply = await ask_jetstream(
            self._nc, f"$JS.API.STREAM.INFO.{name}", b"", error_is_reply=True
        )
        if "error" not in reply:
            config = config | {key: reply["config"][key] for key in kept}
        body = json.dumps(config).encode()
        if "error" in reply:
            # Another process may make it at this moment: the same one twice is no error.
            reply = await ask_jetstream(
                self._nc, f"$JS.API.STREAM.CREATE.{name}", body, error_is_reply=True
            )
        elif _comparable(reply["config"], config) != config:
            # Only then: an update counts the stream's size limit once more against the broker's.
            reply = await ask_jetstream(
                self._nc, f"$JS.API.STREAM.UPDATE.{name}", body, error_is_reply=True
            )
        if "error" in reply:
            raise Internal(f"stream {name} cannot be made: {reply['error'].get('description')}")


def _event(stored: Stored) -> m.Event | None:
    try:
        event = codec.decode(stored.body, m.Event)
    except InvalidRequest:
        return None
    return msgspec.structs.replace(event, seq=stored.seq)


def _comparable(found: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return what a stream has of a configuration; absent means off."""
    return {key: found.get(key, False) for key in config}

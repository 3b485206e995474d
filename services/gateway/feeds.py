"""What happens on the bus, for everyone who watches: one subscription each, encoded once.

Events are gathered for 20 ms and then handed to every listener in one write. A frame for each
event and listener was the bottleneck at 100,000 lines a second; gathered, the same machine moves a
million. A listener has a budget of bytes that wait in its connection: above it, log records are
dropped and named in a `gap`, and of states and telemetry only the newest is sent later.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar

import msgspec
import structlog

from bus import codec
from bus.client import Client
from bus.errors import Overloaded, Unavailable
from bus.log_search import LEVELS, LogPage, LogQuery, at_least
from bus.masking import without_query
from bus.messages import (
    Event,
    Job,
    Level,
    LogEvent,
    PluginState,
    Replicas,
    TelemetrySnapshot,
    now,
)
from bus.plugins import PluginsView
from bus.subjects import LIVE_LOG, TELEMETRY
from bus.tasks import heed_cancellation
from services.gateway.telemetry import summed

TICK_S: Final = 0.02
TICK_BYTES: Final = 64 * 1024
CLOCK_S: Final = 5.0
LISTENERS_MAX: Final = 1_000
BUDGET_BYTES: Final = 4 * 1024 * 1024
# A listener that asks without reading is cut off when this many budgets wait for it.
BUDGETS_MAX: Final = 4
PENDING_MAX: Final = 20_000
HISTORY_PATIENCE_S: Final = 10.0
EVENTS_PENDING_MAX: Final = 1_000
EVENTS_OWED_MAX: Final = 200

log = structlog.get_logger("services.gateway.feeds")

T = TypeVar("T")

# Whose records (None: everybody's), and the least level.
Wanted = tuple[str | None, Level]


@dataclass(frozen=True, slots=True)
class Line:
    """A log record, encoded; or a hole in the sequence, which concerns every listener.

    Attributes:
        seq: The stream's number.
        plugin: Who speaks.
        level: How bad.
        json: The `LogEvent`, or the `Gap`.
        is_gap: Which of the two.
    """

    seq: int
    plugin: str
    level: Level
    json: bytes
    is_gap: bool = False

    def fits(self, wanted: Iterable[Wanted]) -> bool:
        """Tell whether one of several wishes is for this record."""
        return self.is_gap or any(
            plugin in (None, self.plugin) and LEVELS.index(self.level) >= LEVELS.index(level)
            for plugin, level in wanted
        )


class Gap(msgspec.Struct, frozen=True, omit_defaults=True):
    """Records from one sequence to another, both included, may be missing; of logs if not said."""

    first: int = msgspec.field(name="from")
    last: int = msgspec.field(name="to")
    topic: str | None = None


class Framing(Protocol):
    """How events become the bytes of a connection."""

    def event(self, kind: bytes, payload: bytes) -> bytes:
        """Return one event."""

    def lines(self, lines: Iterable[Line], *, batch: bool) -> bytes:
        """Return log records and gaps; with `batch` records may share a frame."""


@dataclass
class Tick:
    """The log records of one tick, and what was already made of them."""

    lines: list[Line]
    _selected: dict[frozenset[Wanted], list[Line]] = field(default_factory=dict)
    _framed: dict[tuple[frozenset[Wanted], Framing, bool], bytes] = field(default_factory=dict)

    def select(self, wanted: frozenset[Wanted]) -> list[Line]:
        """Return the records that a listener wants."""
        if wanted not in self._selected:
            self._selected[wanted] = [line for line in self.lines if line.fits(wanted)]
        return self._selected[wanted]

    def framed(self, wanted: frozenset[Wanted], framing: Framing, *, batch: bool) -> bytes:
        """Return them as bytes, the same object for all listeners that want the same."""
        key = (wanted, framing, batch)
        if key not in self._framed:
            self._framed[key] = framing.lines(self.select(wanted), batch=batch)
        return self._framed[key]


@dataclass
class Tail:
    """A listener's wish for log records.

    Attributes:
        wanted: Whose, and from which level.
        batch: Whether several may come in one frame.
        asked: The wish as it was said, to recognise it when it is said again.
        pending: What came while the back-fill is read; None once the two are joined.
    """

    wanted: Wanted
    batch: bool
    asked: object
    pending: list[Line] | None = field(default_factory=list)


class Listener:
    """A connection that follows feeds.

    Args:
        write: Puts bytes into the connection's buffer.
        waiting: Tells how many bytes wait there.
        abort: Cuts the connection.
        framing: How events become bytes.
        budget_bytes: How many may wait before it counts as too slow.

    Attributes:
        states: Plugins whose states it wants; None in it: all.
        telemetry: The same for telemetry.
        tails: Its wishes for log records, by plugin.
        events: Plugins whose events it wants; None in it: all, those of hosts too.
        jobs: Whether it wants jobs.
    """

    def __init__(
        self,
        *,
        write: Callable[[bytes], None],
        waiting: Callable[[], int],
        abort: Callable[[], None],
        framing: Framing,
        budget_bytes: int = BUDGET_BYTES,
    ) -> None:
        self.states: set[str | None] = set()
        self.telemetry: set[str | None] = set()
        self.tails: dict[str | None, Tail] = {}
        self.events: set[str | None] = set()
        self.jobs = False
        self._write = write
        self._waiting = waiting
        self._abort = abort
        self._framing = framing
        self._budget_bytes = budget_bytes
        self._live: frozenset[Wanted] = frozenset()
        self._batch = False
        # Sequences that a back-fill brought before the live feed did, and where a back-fill that
        # was cut to its limit begins: what is older was not asked for.
        self._seen: set[int] = set()
        self._cut: dict[Wanted, int] = {}
        self._lost: tuple[int, int] | None = None
        self._owed: dict[tuple[bytes, str], bytes] = {}
        # Events that wait: while a back-fill is read, and while it is too slow.
        self._events_pending: deque[Event] | None = None
        self._events_owed: deque[Event] = deque()
        self._events_lost: tuple[int, int] | None = None
        self._events_told: set[int] = set()

    @property
    def slow(self) -> bool:
        """Whether more bytes wait than it may have."""
        return self._waiting() > self._budget_bytes

    @property
    def behind(self) -> bool:
        """Whether it has not been told everything, because it was slow."""
        return self._lost is not None or bool(self._owed or self._events_owed)

    @property
    def listens(self) -> bool:
        """Whether it asked for anything."""
        return bool(self.states or self.telemetry or self.tails or self.events or self.jobs)

    def send(self, kind: bytes, payload: bytes) -> None:
        """Send one event, however much waits."""
        self._put(self._framing.event(kind, payload))

    def tell(self, kind: bytes, name: str, payload: bytes) -> None:
        """Send the newest of a plugin's state or telemetry, or of a job, now or when there is room.

        Of what is owed only the newest is kept: as much as there are plugins and jobs.
        """
        if self.slow:
            self._owed[kind, name] = payload
        else:
            self._owed.pop((kind, name), None)
            self.send(kind, payload)

    def tell_lines(self, tick: Tick) -> None:
        """Send a tick's log records as far as they are wanted, or remember that they are lost."""
        for tail in self.tails.values():
            if tail.pending is not None:
                tail.pending += [
                    line for line in tick.select(frozenset([tail.wanted]))
                    if line.is_gap or not line.fits(self._live)
                ]  # fmt: skip
                if len(tail.pending) > PENDING_MAX:
                    self._lose(tail.pending[0].seq, tail.pending[-PENDING_MAX].seq)
                    del tail.pending[:-PENDING_MAX]
        if not self._live:
            return
        lines = tick.select(self._live)
        if self._seen:
            lines = [line for line in lines if line.is_gap or not self._is_told(line)]
            if tick.lines[-1].seq >= max(self._seen):
                self._seen.clear()
                self._cut.clear()
        if not lines:
            return
        if self.slow:
            self._lose(lines[0].seq, lines[-1].seq)
            return
        self.catch_up()
        if len(lines) == len(tick.select(self._live)):
            self._put(tick.framed(self._live, self._framing, batch=self._batch))
        else:
            self._put(self._framing.lines(lines, batch=self._batch))

    def tell_event(self, event: Event) -> None:
        """Send an event, if it is wanted: now, or when the back-fill is there, or there is room."""
        if not wants_event(self.events, event):
            return
        seq = event.seq or 0
        if self._events_pending is not None:
            self._events_pending.append(event)
        elif seq in self._events_told:
            self._events_told.discard(seq)
        elif self.slow:
            self._events_owed.append(event)
            if len(self._events_owed) > EVENTS_OWED_MAX:
                lost = self._events_owed.popleft().seq or 0
                self._events_lost = (self._events_lost[0] if self._events_lost else lost, lost)
        else:
            self.catch_up()
            self.send(b"events", codec.encode(event))

    def hold_events(self) -> None:
        """Let events wait until `join_events`."""
        self._events_pending = deque(maxlen=EVENTS_PENDING_MAX)

    def join_events(self, history: list[Event]) -> None:
        """Send a back-fill of events, and what came meanwhile, each once and in order."""
        pending, self._events_pending = self._events_pending or (), None
        joined = {event.seq or 0: event for event in (*history, *pending)}
        for seq in sorted(joined):
            self.send(b"events", codec.encode(joined[seq]))
        # The feed may bring some of them yet: the stream was read faster than it is followed.
        self._events_told = {e.seq or 0 for e in history} - {e.seq or 0 for e in pending}

    def catch_up(self) -> None:
        """Say what it was too slow for, when there is room again."""
        if self.slow or not self.behind:
            return
        if self._lost is not None:
            self.send(b"gap", codec.encode(Gap(*self._lost)))
            self._lost = None
        owed, self._owed = self._owed, {}
        for (kind, _), payload in owed.items():
            self.send(kind, payload)
        if self._events_lost is not None:
            self.send(b"gap", codec.encode(Gap(*self._events_lost, topic="events")))
            self._events_lost = None
        events, self._events_owed = self._events_owed, deque()
        for event in events:
            self.send(b"events", codec.encode(event))

    def start(self, tail: Tail) -> None:
        """Take up a wish; what comes from now on waits for `join`."""
        self.tails[tail.wanted[0]] = tail
        self._rework()

    def join(self, tail: Tail, history: list[Line], told: int, *, cut: bool = False) -> None:
        """Send a wish's back-fill and what came meanwhile, each record once, in order.

        Args:
            tail: The wish.
            history: The back-fill.
            told: The last sequence that the live feed has brought to listeners.
            cut: Whether there was more than the back-fill may have.
        """
        pending, tail.pending = tail.pending or [], None
        self._rework()
        if cut:
            first = next(line.seq for line in history if not line.is_gap)
            self._cut[tail.wanted] = first
            pending = [line for line in pending if line.seq >= first]
        # A gap stands before the record that follows it.
        joined = {(line.seq, not line.is_gap): line for line in (*history, *pending)}
        self._seen.update(line.seq for line in history if line.seq > told)
        lines = [joined[place] for place in sorted(joined)]
        self._put(self._framing.lines(lines, batch=tail.batch))

    def stop(self, plugin: str | None) -> None:
        """Give up a wish for a plugin's log records; for None, all of them."""
        if plugin is None:
            self.tails.clear()
        else:
            self.tails.pop(plugin, None)
        self._rework()

    def _is_told(self, line: Line) -> bool:
        if line.seq in self._seen:
            return True
        cut = {wanted for wanted, first in self._cut.items() if line.seq < first}
        return bool(cut) and not line.fits(self._live - cut)

    def _rework(self) -> None:
        live = [tail for tail in self.tails.values() if tail.pending is None]
        self._live = frozenset(tail.wanted for tail in live)
        self._batch = any(tail.batch for tail in live)

    def _lose(self, first: int, last: int) -> None:
        self._lost = (self._lost[0] if self._lost else first, last)

    def _put(self, frames: bytes) -> None:
        if not frames:
            return
        if self._waiting() > BUDGETS_MAX * self._budget_bytes:
            self._abort()
        else:
            self._write(frames)


class Feeds:
    """The bus as listeners see it.

    Args:
        client: The connection.
        view: All plugins.
    """

    def __init__(self, client: Client, view: PluginsView) -> None:
        self._client = client
        self._view = view
        self._listeners: set[Listener] = set()
        self._states = {state.name: state for state in view.list()}
        self._version = view.version
        self._snapshots: dict[str, dict[int | None, TelemetrySnapshot]] = {}
        self._changed: set[str] = set()
        self._measured: set[str] = set()
        # Jobs that have not ended, and what was heard of jobs since listeners were last told.
        self._jobs: dict[str, Job] = {}
        self._jobs_changed: dict[str, Job] = {}
        self._lines: list[Line] = []
        self._lines_bytes = 0
        self._taken = 0
        self._told = 0
        self._wanted = asyncio.Event()
        self._tailing = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        """Follow the bus until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._follow_states())
                tasks.create_task(self._follow_telemetry())
                tasks.create_task(self._follow_logs())
                tasks.create_task(self._follow_events())
                tasks.create_task(self._follow_jobs())
                tasks.create_task(self._tell_time())
        finally:
            if self._timer is not None:
                self._timer.cancel()

    # --- What is there now ------------------------------------------------------------------------

    def states(self) -> list[PluginState]:
        """Return every plugin, as listeners were last told."""
        return [self._states[name] for name in sorted(self._states)]

    def telemetry(self, plugin: str) -> TelemetrySnapshot | None:
        """Return a plugin's last snapshot, summed over its instances."""
        return summed(list(self._snapshots.get(plugin, {}).values()), self._view.get(plugin))

    def telemetry_of_all(self) -> list[TelemetrySnapshot]:
        """Return the last snapshot of every plugin that has one, by name."""
        found = [self.telemetry(state.name) for state in self.states()]
        return [snapshot for snapshot in found if snapshot is not None]

    async def history(
        self, plugin: str | None, *, limit: int, after: int | None = None, level: Level = "debug"
    ) -> list[LogEvent]:
        """Return the newest log records from a level upward, oldest first.

        Raises:
            Unavailable: The broker is away, or did not bring them in time.
        """
        query = LogQuery(limit=limit, plugin=plugin, after=after, levels=at_least(level))
        return (await self.search(query)).records

    async def search(self, query: LogQuery) -> LogPage:
        """Return the log records that somebody looks for, oldest first.

        Raises:
            Unavailable: The broker is away, or did not bring them in time.
        """
        return await self.ask_store(self._client.store.search_logs(query), "logs")

    async def ask_store(self, asked: Coroutine[Any, Any, T], what: str) -> T:
        """Return what the broker keeps, soon or not at all.

        Raises:
            Unavailable: The broker is away, or did not bring it in time.
        """
        if not self._client.connected:
            asked.close()
            raise Unavailable(f"the broker is away, and the {what} with it", retry_after_s=2)
        try:
            async with asyncio.timeout(HISTORY_PATIENCE_S):
                return await asked
        except TimeoutError:
            raise Unavailable(
                f"the broker did not bring the {what} within {HISTORY_PATIENCE_S:g} s",
                retry_after_s=2,
            ) from None

    # --- Listeners --------------------------------------------------------------------------------

    @contextmanager
    def listening(self, listener: Listener) -> Iterator[None]:
        """Tell a listener what it asks for while inside.

        Raises:
            Overloaded: There are `LISTENERS_MAX` already.
        """
        if len(self._listeners) >= LISTENERS_MAX:
            raise Overloaded(f"{LISTENERS_MAX} live connections are open already", retry_after_s=10)
        self._listeners.add(listener)
        try:
            yield
        finally:
            self._listeners.discard(listener)
            self._look_for_readers()

    def follow_states(self, listener: Listener, plugin: str | None) -> None:
        """Tell a listener the present states at once, then each change."""
        listener.states.add(plugin)
        for state in self.states():
            if plugin in (None, state.name):
                listener.tell(b"status", state.name, codec.encode(state))

    def follow_telemetry(self, listener: Listener, plugin: str | None) -> None:
        """Tell a listener the last snapshots at once, then each new one."""
        listener.telemetry.add(plugin)
        found = self.telemetry_of_all() if plugin is None else [self.telemetry(plugin)]
        for snapshot in found:
            if snapshot is not None:
                listener.tell(b"telemetry", snapshot.plugin, codec.encode(snapshot))

    def follow_jobs(self, listener: Listener) -> None:
        """Tell a listener the jobs that have not ended, then each change."""
        # What waits for the next tick is in what is told now.
        self._tell_jobs()
        listener.jobs = True
        for name in sorted(self._jobs):
            listener.tell(b"jobs", name, codec.encode(self._jobs[name]))

    async def follow_logs(
        self, listener: Listener, tail: Tail, *, backfill: int, after: int | None
    ) -> None:
        """Tell a listener the newest records, and then every new one: none missed, none twice.

        The live feed is on before the back-fill is read; what it brings meanwhile waits, and the
        two are joined by sequence. A back-fill that could not reach back to `after` is announced
        by a gap.

        Raises:
            Unavailable: There is no back-fill just now; the wish stands, for what is new.
        """
        listener.start(tail)
        self._wanted.set()
        lines: list[Line] = []
        cut = False
        try:
            async with asyncio.timeout(HISTORY_PATIENCE_S):
                await self._tailing.wait()
            if backfill:
                plugin, level = tail.wanted
                lines = [
                    _line(event, event.seq or 0)
                    for event in await self.history(
                        plugin, limit=backfill + 1, after=after, level=level
                    )
                ]
                if cut := len(lines) > backfill:
                    lines = lines[-backfill:]
                    if after is not None:
                        lines.insert(0, _hole(after + 1, lines[0].seq - 1))
        except TimeoutError:
            raise Unavailable("the live log feed cannot be had just now", retry_after_s=2) from None
        finally:
            if listener.tails.get(tail.wanted[0]) is tail:
                listener.join(tail, lines, self._told, cut=cut)

    def stop_logs(self, listener: Listener, plugin: str | None) -> None:
        """Give up a listener's wish for log records."""
        listener.stop(plugin)
        self._look_for_readers()

    async def follow_events(
        self, listener: Listener, plugin: str | None, *, backfill: int, after: int | None
    ) -> None:
        """Tell a listener events: those that it missed, or the newest, and then every new one.

        Raises:
            Unavailable: There is no back-fill just now; the wish stands, for what is new.
        """
        listener.events.add(plugin)
        if not backfill:
            return
        listener.hold_events()
        history: list[Event] = []
        kind = None if plugin is None else "plugin"
        try:
            history = await self.ask_store(
                self._client.store.events(limit=backfill, after=after, kind=kind, name=plugin),
                "events",
            )
        finally:
            listener.join_events(history)

    def _look_for_readers(self) -> None:
        if not any(listener.tails for listener in self._listeners):
            self._wanted.clear()

    # --- The bus ----------------------------------------------------------------------------------

    async def _follow_states(self) -> None:
        while True:
            self._version = await self._view.wait(self._version)
            present = {state.name: state for state in self._view.list()}
            for name in self._states.keys() | present.keys():
                if present.get(name) != self._states.get(name):
                    self._changed.add(name)
            self._soon()

    async def _follow_telemetry(self) -> None:
        async with self._client.follow(TELEMETRY) as live:
            for snapshot in await self._client.store.telemetry():
                self._snapshots.setdefault(snapshot.plugin, {})[snapshot.slot] = snapshot
            heed_cancellation()
            async for received in live:
                # Who speaks is what the broker let them write on, not what they say.
                plugin, slot = received.tokens["plugin"], received.tokens["slot"]
                if slot.isdecimal() and received.payload.plugin == plugin:
                    self._snapshots.setdefault(plugin, {})[int(slot)] = received.payload
                    self._measured.add(plugin)
                    self._soon()

    async def _follow_logs(self) -> None:
        """Follow the live log, only while somebody reads it."""
        while True:
            await self._wanted.wait()
            async with self._client.follow(LIVE_LOG) as live:
                heed_cancellation()
                self._taken = 0
                self._tailing.set()
                async for received in live:
                    if not self._wanted.is_set():
                        self._tailing.clear()
                        break
                    if received.seq is not None:
                        self._take(received.seq, received.payload)

    async def _follow_events(self) -> None:
        async for event in self._client.store.follow_events(since=now()):
            for listener in list(self._listeners):
                listener.tell_event(event)
            self._soon()

    async def _follow_jobs(self) -> None:
        """Follow the bucket, not the feed: it misses nothing while the connection is away."""
        caught_up = False
        async for changes in self._client.store.jobs.follow():
            for entry in changes.entries:
                name, job = entry.names[0], entry.value
                known = self._jobs.pop(name, None)
                if job is None:
                    continue
                job = without_query(job)
                if job.ended_at is None and job.state in {"queued", "running"}:
                    self._jobs[name] = job
                if caught_up or known is not None or name in self._jobs:
                    self._jobs_changed[name] = job
            caught_up = caught_up or changes.caught_up
            self._soon()

    async def _tell_time(self) -> None:
        """Give listeners a sign of life."""
        while True:
            await asyncio.sleep(CLOCK_S)
            time = codec.encode({"time": now()})
            for listener in list(self._listeners):
                if listener.listens and not listener.slow:
                    listener.send(b"tick", time)
            self._soon()

    def _take(self, seq: int, event: LogEvent) -> None:
        # The stream numbers without holes: one means that the broker or the buffer of the
        # subscription dropped something, or that the connection was away.
        if self._taken and seq > self._taken + 1:
            self._lines.append(_hole(self._taken + 1, seq - 1))
        self._taken = seq
        line = _line(event, seq)
        self._lines.append(line)
        self._lines_bytes += len(line.json)
        if self._lines_bytes > TICK_BYTES:
            self._flush()
        else:
            self._soon()

    # --- Telling ----------------------------------------------------------------------------------

    def _soon(self, delay_s: float = TICK_S) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._flush()

    def _flush(self) -> None:
        self._tell_states()
        self._tell_telemetry()
        self._tell_jobs()
        self._tell_lines()
        for listener in self._listeners:
            listener.catch_up()
        if any(listener.behind for listener in self._listeners):
            self._soon(5 * TICK_S)

    def _tell_states(self) -> None:
        changed, self._changed = self._changed, set()
        for name in sorted(changed):
            state = self._view.get(name)
            if state is not None:
                self._states[name] = state
            elif (gone := self._states.pop(name, None)) is not None:
                state = _vanished(gone)
            else:
                continue
            payload = codec.encode(state)
            for listener in self._listeners:
                if not listener.states.isdisjoint((None, name)):
                    listener.tell(b"status", name, payload)

    def _tell_telemetry(self) -> None:
        measured, self._measured = self._measured, set()
        for name in sorted(measured):
            snapshot = self.telemetry(name)
            # The gateway and the supervisor measure themselves too, but are no plugins: they are
            # told to those who ask for them by name.
            asked = {name, None} if name in self._states else {name}
            payload = codec.encode(snapshot)
            for listener in self._listeners:
                if not listener.telemetry.isdisjoint(asked):
                    listener.tell(b"telemetry", name, payload)

    def _tell_jobs(self) -> None:
        changed, self._jobs_changed = self._jobs_changed, {}
        for name, job in changed.items():
            payload = codec.encode(job)
            for listener in self._listeners:
                if listener.jobs:
                    listener.tell(b"jobs", name, payload)

    def _tell_lines(self) -> None:
        if not self._lines:
            return
        tick = Tick(self._lines)
        self._lines, self._lines_bytes = [], 0
        self._told = tick.lines[-1].seq
        for listener in self._listeners:
            if listener.tails:
                listener.tell_lines(tick)


def wants_event(wanted: set[str | None], event: Event) -> bool:
    """Tell whether somebody who wants the events of these plugins (None: all) wants this one."""
    return None in wanted or (event.kind == "plugin" and event.name in wanted)


def _line(event: LogEvent, seq: int) -> Line:
    if event.seq != seq:
        event = msgspec.structs.replace(event, seq=seq)
    return Line(seq, event.plugin, event.level, codec.encode(event))


def _hole(first: int, last: int) -> Line:
    return Line(last, "", "error", codec.encode(Gap(first, last)), is_gap=True)


def _vanished(state: PluginState) -> PluginState:
    """Return the last thing to say about a plugin that nobody knows any more."""
    return msgspec.structs.replace(
        state,
        status="stopped",
        replicas=Replicas(desired=0, ready=0),
        instances=[],
        pid=None,
        port=None,
        last_heartbeat=None,
        error=None,
    )

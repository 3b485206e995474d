"""What happens on the bus, for everyone who watches: one subscription each, encoded once.

Events are gathered for 20 ms and then handed to every listener in one write. A frame for each
event and listener was the bottleneck at 100,000 lines a second; gathered, the same machine moves a
million.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import msgspec

from bus import codec
from bus.client import Client
from bus.errors import Overloaded, Unavailable
from bus.log_search import LogQuery, at_least
from bus.masking import without_query
from bus.messages import Event, Job, LogEvent, PluginState, Replicas, TelemetrySnapshot, now
from bus.plugins import PluginsView
from bus.subjects import LIVE_LOG, TELEMETRY
from bus.tasks import heed_cancellation
from services.gateway.lines import Line, Tail, Tick, hole, line_of
from services.gateway.listener import Listener
from services.gateway.stored import PATIENCE_S, stored
from services.gateway.telemetry import summed

TICK_S: Final = 0.02
TICK_BYTES: Final = 64 * 1024
CLOCK_S: Final = 5.0
LISTENERS_MAX: Final = 1_000


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
        plugin, level = tail.wanted
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self._tailing.wait()
            if backfill:
                # One more than is told: it says whether there is more.
                query = LogQuery(
                    limit=backfill + 1, plugin=plugin, after=after, levels=at_least(level)
                )
                page = await stored(self._client, self._client.store.search_logs(query), "logs")
                lines = [line_of(event, event.seq or 0) for event in page.records]
                if cut := len(lines) > backfill:
                    lines = lines[-backfill:]
                    if after is not None:
                        lines.insert(0, hole(after + 1, lines[0].seq - 1))
        except TimeoutError:
            raise Unavailable("the live log feed cannot be had just now", retry_after_s=2) from None
        finally:
            if listener.tails.get(plugin) is tail:
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
            events = self._client.store.events(limit=backfill, after=after, kind=kind, name=plugin)
            history = await stored(self._client, events, "events")
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
            self._lines.append(hole(self._taken + 1, seq - 1))
        self._taken = seq
        line = line_of(event, seq)
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

"""Makes desired state true on this host, beside the supervisors of others."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime

import msgspec
import structlog

from bus import messages as m
from bus.assets import OBSERVED_TTL_S
from bus.client import Client
from bus.errors import BusError, Conflict
from bus.instance import Instance
from bus.logs import publish_log
from bus.plugins import PluginsView, follow_plugins, place
from bus.settings import Settings
from bus.subjects import HEALTH, STATUS
from bus.tasks import beside
from services.supervisor import process
from services.supervisor.commands import answering
from services.supervisor.hosts import Hosts
from services.supervisor.placement import Host, placed, why_unplaced
from services.supervisor.process import Child
from services.supervisor.reconcile import (
    HEALTHY_S,
    Action,
    Forget,
    Key,
    Kill,
    Phase,
    Seen,
    Start,
    Stop,
    Wanted,
    backoff_s,
    reconcile,
)

TICK_S = 0.5
# Our own heartbeat comes back to us every second. While it does not, we hear nobody.
DEAF_S = 3.0
STOP_ALL_S = 3.0
TELL_LAST_S = 0.5
WRITE_AGAIN_S = OBSERVED_TTL_S / 3
LINES_WAITING = 10_000
MEASURE_S = 5.0
LOOK_S = 1.0
UNTOLD_MAX = 1_000
# What a replica more may need beyond what the largest one uses, for a roll-out with one more.
ROOM_FACTOR = 1.25
# Of a place for which no host fits.
NOWHERE = ""

log = structlog.get_logger("supervisor.service")


def _future() -> asyncio.Future[int]:
    return asyncio.get_running_loop().create_future()


@dataclass
class _Replica:
    """A place on this host, and the process that fills it."""

    key: Key
    generation: int
    phase: Phase = "starting"
    since: float = 0.0
    since_utc: datetime = field(default_factory=m.now)
    started_at: float = 0.0
    child: Child | None = None
    task: asyncio.Task[None] | None = None
    port: asyncio.Future[int] = field(default_factory=_future)
    ran_since: float | None = None
    crashes: int = 0
    restarts: int = 0
    heard: float = 0.0
    wanted_end: bool = False
    why: str | None = None
    last_exit: str | None = None
    error: str | None = None
    last_lines: list[str] = field(default_factory=list)
    fault: str | None = None
    mem_bytes: int | None = None


@dataclass(frozen=True)
class _Change:
    """What is to be written down and published of a place.

    Attributes:
        state: What it is now.
        dead: The process that has just ended in it.
        forgotten: Whether the place is no more.
        again: Whether this was told already, and only keeps it from expiring.
        event: What happened, for those who read it later.
    """

    state: m.ProcessState
    dead: int | None = None
    forgotten: bool = False
    again: bool = False
    event: m.Event | None = None


class Supervisor:
    """Runs the replicas that desired state asks for, and answers `plugins.*`.

    Args:
        client: The connection.
        instance: This process's place on the bus.
        settings: The environment, handed on to the workers.
    """

    def __init__(self, client: Client, instance: Instance, settings: Settings) -> None:
        self._client = client
        self._instance = instance
        self._settings = settings
        self._hosts = Hosts(client, instance, settings)
        self._desired: dict[str, m.DesiredState] = {}
        self._replicas: dict[Key, _Replica] = {}
        self._registered: dict[Key, m.Registration] = {}
        self._wake = asyncio.Event()
        self._heard_self = 0.0
        # Unbounded, but a place in a crash loop adds three in 30 s, while the broker is away.
        self._changes: asyncio.Queue[_Change] = asyncio.Queue()
        self._lines: asyncio.Queue[m.LogEvent] = asyncio.Queue(LINES_WAITING)
        self._lines_lost = 0
        # The revision of the last that we wrote of each place: whoever writes there next has it.
        self._written: dict[Key, int] = {}
        # Who had each place before, when that was another host.
        self._before: dict[Key, str] = {}
        self._statuses: dict[str, m.Status] = {}
        self._untold: deque[m.Event] = deque(maxlen=UNTOLD_MAX)

    async def run(self) -> None:
        """Supervise until cancelled; then stop every worker within `STOP_ALL_S`."""
        async with (
            beside(self._tell_changes(), self._tell_again(), self._ship_lines()),
            self._stopping_all(),
            beside(self._follow_registrations(), self._follow_heartbeats()),
            follow_plugins(self._client.store) as view,
            # Left before the workers are stopped: other hosts take over while they finish.
            self._hosts.joined(),
            beside(
                self._follow_desired(),
                self._wake_at_changes(view),
                self._act(view),
                self._tell_of_all(view),
            ),
            self._hosts.answering(view),
            answering(self._client, self._instance, view),
        ):
            await self._instance.ready()
            await asyncio.Event().wait()

    # --- What is seen ---------------------------------------------------------------------------

    async def _follow_desired(self) -> None:
        async for changes in self._client.store.desired.follow():
            for entry in changes.entries:
                if entry.value is None:
                    self._desired.pop(entry.names[0], None)
                else:
                    self._desired[entry.names[0]] = entry.value
            self._wake.set()

    async def _follow_registrations(self) -> None:
        async for changes in self._client.store.instances.follow():
            for entry in changes.entries:
                key = Key(entry.names[0], int(entry.names[1]))
                if entry.value is None:
                    self._registered.pop(key, None)
                    continue
                self._registered[key] = entry.value
                replica = self._replicas.get(key)
                if not replica or not replica.child or replica.child.pid != entry.value.pid:
                    continue
                if entry.value.port and not replica.port.done():
                    replica.port.set_result(entry.value.port)
                if replica.phase == "starting" and entry.value.status == "running":
                    replica.error = None
                    replica.last_lines = []
                    self._enter(replica, "running", verb="ready")

    async def _follow_heartbeats(self) -> None:
        loop = asyncio.get_running_loop()
        async with self._client.follow(HEALTH) as beats:
            async for beat in beats:
                if beat.payload.id == self._instance.id:
                    self._heard_self = loop.time()
                if beat.payload.plugin == self._instance.plugin:
                    self._hosts.hear(beat.payload, loop.time())
                replica = self._replicas.get(Key(beat.payload.plugin, beat.payload.slot))
                if replica and replica.child and replica.child.pid == beat.payload.pid:
                    replica.heard = loop.time()

    async def _check_health(self, replica: _Replica) -> None:
        """Ask a replica for its health from the moment that it has said where."""
        port = await replica.port
        desired = self._desired.get(replica.key.plugin)
        if desired is None or desired.config.healthcheck is None:
            return
        # Only here: the HTTP client costs memory that a supervisor without such checks can spare.
        from services.supervisor import health  # noqa: PLC0415

        replica.fault = await health.watch(desired.config.healthcheck, port, replica.started_at)
        self._wake.set()

    # --- What is done ---------------------------------------------------------------------------

    async def _wake_at_changes(self, view: PluginsView) -> None:
        version = view.version
        while True:
            version = await view.wait(version)
            self._note_statuses(view)
            self._wake.set()

    async def _act(self, view: PluginsView) -> None:
        """Reconcile whenever something changed, and at every tick."""
        await self._end_leftovers()
        loop = asyncio.get_running_loop()
        last = measured = loop.time()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._wake.wait()
            self._wake.clear()
            now = loop.time()
            if now - last > 1.0 or now - self._heard_self > DEAF_S:
                # We were held up ourselves, or hear nothing because the broker hangs or is away:
                # the silence of workers and hosts says nothing about them.
                self._hosts.hear_all(now)
                for replica in self._replicas.values():
                    replica.heard = now
            last = now
            if now - measured > MEASURE_S:
                measured = now
                self._measure(now)
            alive = self._hosts.alive(now)
            wanted = self._wanted(view)
            seen = self._seen(view, alive)
            for action in reconcile(self._settings.host, wanted, seen, alive, now):
                await self._do(action)

    def _measure(self, now: float) -> None:
        """Look what the replicas use, and which of them have been well for long."""
        for replica in self._replicas.values():
            if replica.child is None:
                continue
            replica.mem_bytes = replica.child.mem_bytes()
            desired = self._desired.get(replica.key.plugin)
            most = desired.config.memory_max_bytes if desired else None
            if most is not None and replica.mem_bytes > most:
                replica.fault = (
                    f"used {replica.mem_bytes / 2**20:,.0f} MiB of memory; memoryMaxBytes allows "
                    f"{most / 2**20:,.0f} MiB"
                )
            if replica.ran_since is not None and now - replica.ran_since > HEALTHY_S:
                replica.crashes = replica.restarts = 0

    async def _end_leftovers(self) -> None:
        """See that no place has two processes after a supervisor of this host was killed."""
        found = [entry.value for entry in await self._client.store.processes.all()]
        left = {
            there.pid: self._env(Key(there.plugin, there.slot), there.generation)
            for there in found
            if there and there.pid and there.host == self._settings.host
        }
        for pid in await process.end_leftovers(left, STOP_ALL_S):
            log.warning("leftover.killed", pid=pid)

    def _wanted(self, view: PluginsView) -> dict[str, Wanted]:
        largest: dict[str, int] = {}
        measured = [(there.plugin, there.mem_bytes) for there in view.processes()]
        # Of our own we know it sooner.
        measured += [(key.plugin, replica.mem_bytes) for key, replica in self._replicas.items()]
        for name, mem_bytes in measured:
            largest[name] = max(largest.get(name, 0), mem_bytes or 0)
        return {
            name: Wanted(
                generation=desired.generation,
                replicas=desired.config.replicas,
                requires=desired.config.requires,
                replica_bytes=int(ROOM_FACTOR * largest.get(name, 0)),
            )
            for name, desired in self._desired.items()
            if desired.enabled
        }

    def _seen(self, view: PluginsView, alive: dict[str, Host]) -> dict[Key, Seen]:
        """Return every replica: our own as we know them, the others as they are written down."""
        seen = {
            Key(there.plugin, there.slot): Seen(
                phase=_PHASES[there.status],
                generation=there.generation,
                since=0.0,
                host=there.host,
            )
            for there in view.processes()
            if there.host != self._settings.host and there.host in alive
        }
        self._before |= {key: there.host for key, there in seen.items()}
        for key, r in self._replicas.items():
            # One of ours that has ended is nothing beside another host's that is there.
            if r.child or key not in seen:
                seen[key] = Seen(
                    r.phase, r.generation, r.since, self._settings.host, r.crashes, r.heard, r.fault
                )
        return seen

    async def _tell_of_all(self, view: PluginsView) -> None:
        """Tell what concerns no host alone: those that have gone, and places that have none."""
        while True:
            await asyncio.sleep(LOOK_S)
            alive = self._hosts.alive(asyncio.get_running_loop().time())
            with contextlib.suppress(BusError):
                await self._hosts.tell_lost(alive)
                if self._hosts.leads:
                    await self._tell_unplaced(view, alive)
                    while self._untold:
                        await self._client.store.tell(self._untold[0])
                        self._untold.popleft()
                else:
                    self._untold.clear()

    def _note_statuses(self, view: PluginsView) -> None:
        """Note plugins that have lost some of their replicas, and those that are whole again."""
        before, self._statuses = self._statuses, {one.name: one.status for one in view.list()}
        for state in view.list():
            was = before.get(state.name, state.status)
            if was == state.status or "degraded" not in (was, state.status):
                continue
            if verb := {"degraded": "degraded", "running": "recovered"}.get(state.status):
                cause = f"{state.replicas.ready} of {state.replicas.desired} are ready"
                self._untold.append(
                    m.Event(
                        kind="plugin", name=state.name, verb=verb, timestamp=m.now(), cause=cause
                    )
                )

    async def _tell_unplaced(self, view: PluginsView, alive: dict[str, Host]) -> None:
        """Write down the places for which no host fits, and take back those that have one now."""
        bucket, wanted = self._client.store.processes, self._wanted(view)
        missing = {
            Key(name, slot): why_unplaced(one.requires, alive)
            for name, one in wanted.items()
            for slot, host in enumerate(placed(name, one.replicas, one.requires, alive)[:-1])
            if host is None
        }
        written = {Key(one.plugin, one.slot): one for one in view.processes()}
        for key, why in missing.items():
            before = written.get(key)
            if before and before.host != NOWHERE:
                if before.host in alive:
                    # It is still on its way out there.
                    continue
            elif before and before.error == why and _age_s(before) < WRITE_AGAIN_S:
                continue
            state = m.ProcessState(
                plugin=key.plugin,
                slot=key.slot,
                host=NOWHERE,
                status="error",
                generation=wanted[key.plugin].generation,
                since=m.now(),
                error=why,
            )
            await bucket.put(state, key.plugin, key.slot)
            if before is None or before.host != NOWHERE:
                log.warning("plugin.unplaced", plugin=key.plugin, slot=key.slot, why=why)
        for key in {key for key, one in written.items() if one.host == NOWHERE} - missing.keys():
            entry = await bucket.get(key.plugin, key.slot)
            if entry and entry.value and entry.value.host == NOWHERE:
                with contextlib.suppress(Conflict):
                    await bucket.delete(key.plugin, key.slot, revision=entry.revision)

    async def _do(self, action: Action) -> None:
        """Carry an action out, if what it was decided for is still so: starting takes a while."""
        match action:
            case Start(key, generation):
                await self._start(key, generation)
            case Stop(key):
                replica = self._replicas[key]
                if replica.child:
                    replica.wanted_end = True
                    replica.child.stop()
                    self._enter(replica, "stopping", verb="draining")
            case Kill(key, why):
                replica = self._replicas[key]
                if replica.child:
                    log.warning("plugin.killed", plugin=key.plugin, slot=key.slot, why=why)
                    replica.why = why
                    replica.child.kill()
                    self._enter(replica, "stopping")
            case Forget(key):
                self._forget(key)

    async def _start(self, key: Key, generation: int) -> None:
        desired = self._desired.get(key.plugin)
        if desired is None:
            return
        config = desired.config
        before = self._replicas.get(key)
        replica = _Replica(key, generation, started_at=asyncio.get_running_loop().time())
        if before and before.generation == generation:
            replica.crashes, replica.restarts = before.crashes, before.restarts
        if before:
            replica.last_exit, replica.error = before.last_exit, before.error
            replica.last_lines = before.last_lines
        self._replicas[key] = replica

        def on_line(stream: str, level: m.Level, text: str) -> None:
            self._take_line(replica, stream, level, text)

        try:
            replica.child = await process.start(config, self._env(key, generation), on_line)
        except OSError as error:
            replica.crashes += 1
            replica.error = f"{config.entrypoint} cannot be started: {error.strerror}"
            log.warning("plugin.not_started", plugin=key.plugin, cause=replica.error)
            self._note(replica, "process.not_started")
            self._enter(replica, "ended", verb="crashed", cause=replica.error)
            return
        elsewhere = self._before.pop(key, None)
        self._enter(
            replica,
            "starting",
            verb="placed" if elsewhere else "started",
            cause=f"it was on {elsewhere}" if elsewhere else _cause(before, generation),
        )
        log.info("plugin.starting", plugin=key.plugin, slot=key.slot, pid=replica.child.pid)
        replica.task = asyncio.create_task(self._watch(replica, replica.child))

    def _env(self, key: Key, generation: int) -> dict[str, str]:
        return {
            "BKG_NATS_URL": self._settings.nats_url,
            "BKG_ROOT": self._settings.root,
            "BKG_DATA_DIR": str(self._settings.data_dir),
            "BKG_HOST_NAME": self._settings.host,
            "BKG_LOG_LEVEL": self._settings.log_level,
            "BKG_SLOT": str(key.slot),
            "BKG_GENERATION": str(generation),
            # The kernel is asked before exec, in `process.start`.
            "BKG_PARENT_PID": "",
            "PYTHONUNBUFFERED": "1",
        }

    async def _watch(self, replica: _Replica, child: Child) -> None:
        """Wait for a process's end, and remember it."""
        async with beside(self._check_health(replica)):
            said = await child.ended()
        now = asyncio.get_running_loop().time()
        ran_well = replica.ran_since is not None and now - replica.ran_since > HEALTHY_S
        replica.last_exit = f"{replica.why}; {said}" if replica.why else said
        replica.child, replica.fault, replica.mem_bytes = None, None, None
        if replica.wanted_end:
            replica.crashes, replica.error, replica.last_lines = 0, None, []
            log.info("plugin.stopped", plugin=replica.key.plugin, slot=replica.key.slot)
        else:
            if ran_well:
                replica.crashes = replica.restarts = 0
            replica.crashes += 1
            replica.restarts += 1
            reason = child.why()
            replica.error = f"{replica.last_exit}: {reason}" if reason else replica.last_exit
            replica.last_lines = child.last_lines()
            log.error(
                "plugin.crashed", plugin=replica.key.plugin, slot=replica.key.slot,
                cause=replica.error, crashes=replica.crashes,
            )  # fmt: skip
            self._note(replica, "process.ended")
        self._enter(
            replica,
            "ended",
            dead=child.pid,
            verb="stopped" if replica.wanted_end else "crashed",
            cause=replica.error,
        )

    def _enter(
        self,
        replica: _Replica,
        phase: Phase,
        *,
        dead: int | None = None,
        verb: str | None = None,
        cause: str | None = None,
    ) -> None:
        now = asyncio.get_running_loop().time()
        replica.phase, replica.since, replica.heard = phase, now, now
        replica.since_utc = m.now()
        if phase == "running":
            replica.ran_since = now
        event = None
        if verb is not None:
            event = m.Event(
                kind="plugin",
                name=replica.key.plugin,
                verb=verb,
                timestamp=replica.since_utc,
                slot=replica.key.slot,
                host=self._settings.host,
                cause=cause,
            )
        self._changes.put_nowait(_Change(self._state(replica), dead=dead, event=event))
        self._wake.set()

    def _forget(self, key: Key) -> None:
        replica = self._replicas.pop(key)
        state = msgspec.structs.replace(
            self._state(replica), status="stopped", since=m.now(), pid=None, error=None
        )
        told = _status(replica) == "stopped"
        self._changes.put_nowait(_Change(state, forgotten=True, again=told))

    @asynccontextmanager
    async def _stopping_all(self) -> AsyncGenerator[None]:
        """Left, no process of ours is left."""
        try:
            yield
        finally:
            watching = [replica.task for replica in self._replicas.values() if replica.task]
            for replica in self._replicas.values():
                replica.wanted_end = True
                if replica.child:
                    replica.child.stop()
            if watching:
                await asyncio.wait(watching, timeout=STOP_ALL_S)
            for replica in self._replicas.values():
                if replica.child:
                    replica.child.kill()
            await asyncio.gather(*watching, return_exceptions=True)
            for key in list(self._replicas):
                self._forget(key)
            await self._client.while_connected(self._all_told(), TELL_LAST_S)

    async def _all_told(self) -> None:
        await self._changes.join()
        await self._lines.join()

    # --- What is told ---------------------------------------------------------------------------

    def _state(self, replica: _Replica) -> m.ProcessState:
        return m.ProcessState(
            plugin=replica.key.plugin,
            slot=replica.key.slot,
            host=self._settings.host,
            status=_status(replica),
            generation=replica.generation,
            since=replica.since_utc,
            pid=replica.child.pid if replica.child else None,
            restarts=replica.restarts,
            last_exit=replica.last_exit,
            error=replica.error,
            last_lines=replica.last_lines,
            mem_bytes=replica.mem_bytes,
        )

    async def _tell_changes(self) -> None:
        """Write every change down and publish it, in their order.

        Nobody else writes them, and nobody waits here for the broker: while it is away, workers
        are started and stopped as ever.
        """
        while True:
            change = await self._changes.get()
            try:
                await self._tell(change)
            except BusError as error:
                log.warning("plugin.not_told", plugin=change.state.plugin, cause=error.message)
            finally:
                self._changes.task_done()

    async def _tell_again(self) -> None:
        """Write what does not change again, before it expires."""
        while True:
            await asyncio.sleep(WRITE_AGAIN_S)
            # What waits there says it all, once the broker is back.
            if self._changes.empty():
                for replica in self._replicas.values():
                    self._changes.put_nowait(_Change(self._state(replica), again=True))

    async def _tell(self, change: _Change) -> None:
        state = change.state
        if change.dead is not None:
            await self._bury(state, change.dead)
        if change.forgotten:
            await self._unwrite(state)
        elif not await self._write(state):
            return
        if not change.again:
            registered = self._registered.get(Key(state.plugin, state.slot))
            await self._client.publish(
                STATUS, place(state, registered), plugin=state.plugin, slot=state.slot
            )
        if change.event is not None:
            await self._client.store.tell(change.event)

    async def _write(self, state: m.ProcessState) -> bool:
        """Write a place down, and return whether it is still ours.

        While the broker was out of reach, another host may have taken it: then our process has to
        go, because that one answers under its name.
        """
        key, bucket = Key(state.plugin, state.slot), self._client.store.processes
        names = (state.plugin, state.slot)
        for _ in range(3):
            try:
                revision = self._written.get(key, 0)
                self._written[key] = await bucket.update(state, revision, *names)
            except Conflict:
                last = await bucket.last(*names)
                there = last.value if last else None
                alive = self._hosts.alive(asyncio.get_running_loop().time())
                if there and there.host != self._settings.host and there.host in alive:
                    self._lost(key, there.host)
                    return False
                # A key that expired, a host that is gone, or we ourselves in an earlier life.
                self._written[key] = last.revision if last else 0
            else:
                return True
        return False

    async def _unwrite(self, state: m.ProcessState) -> None:
        """Remove what we wrote of a place; what another host wrote since stays."""
        revision = self._written.pop(Key(state.plugin, state.slot), None)
        if revision is not None:
            with contextlib.suppress(Conflict):
                await self._client.store.processes.delete(
                    state.plugin, state.slot, revision=revision
                )

    def _lost(self, key: Key, host: str) -> None:
        replica = self._replicas.get(key)
        self._written.pop(key, None)
        if replica and replica.child and not replica.wanted_end:
            log.warning("plugin.place_lost", plugin=key.plugin, slot=key.slot, to=host)
            replica.wanted_end = True
            replica.child.stop()

    async def _bury(self, state: m.ProcessState, pid: int) -> None:
        """Remove the registration of a process that had no time to do so itself."""
        instances = self._client.store.instances
        entry = await instances.get(state.plugin, state.slot)
        if entry and entry.value and entry.value.pid == pid:
            # A successor has the place already.
            with contextlib.suppress(Conflict):
                await instances.delete(state.plugin, state.slot, revision=entry.revision)

    def _take_line(self, replica: _Replica, stream: str, level: m.Level, text: str) -> None:
        """Queue a line that a worker printed."""
        self._queue_line(
            m.LogEvent(
                plugin=replica.key.plugin,
                level=level,
                message=text,
                timestamp=m.now(),
                slot=replica.key.slot,
                host=self._settings.host,
                logger=stream,
            )
        )

    def _note(self, replica: _Replica, message: str) -> None:
        """Put an unwanted end into the worker's own log: a killed one could not do so."""
        self._queue_line(
            m.LogEvent(
                plugin=replica.key.plugin,
                level="error",
                message=message,
                timestamp=m.now(),
                slot=replica.key.slot,
                host=self._settings.host,
                logger="supervisor",
                fields={"cause": replica.error, "again_after_s": backoff_s(replica.crashes)},
            )
        )

    def _queue_line(self, record: m.LogEvent) -> None:
        """Queue a record; what the queue cannot hold is counted."""
        try:
            self._lines.put_nowait(record)
        except asyncio.QueueFull:
            self._lines_lost += 1

    async def _ship_lines(self) -> None:
        while True:
            record = await self._lines.get()
            try:
                with contextlib.suppress(BusError):
                    await publish_log(self._client, record)
            finally:
                self._lines.task_done()
            if self._lines_lost:
                lost, self._lines_lost = self._lines_lost, 0
                log.warning("lines.dropped", dropped=lost)


_PHASES: dict[m.Status, Phase] = {
    "starting": "starting",
    "running": "running",
    "degraded": "running",
    "stopping": "stopping",
    "stopped": "ended",
    "error": "ended",
}


def _age_s(state: m.ProcessState) -> float:
    return (m.now() - state.since).total_seconds()


def _cause(before: _Replica | None, generation: int) -> str:
    if before is None:
        return "wanted here"
    if before.generation != generation:
        return f"generation {generation}"
    return f"again after its end: {before.last_exit}"


def _status(replica: _Replica) -> m.Status:
    match replica.phase:
        case "ended":
            return "error" if replica.error else "stopped"
        case phase:
            return phase

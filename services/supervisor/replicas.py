"""The replicas of this host: processes that are started, watched and stopped as was decided."""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime

import msgspec
import structlog

from bus import messages as m
from bus.settings import Settings
from bus.tasks import beside
from services.supervisor import process
from services.supervisor.chronicle import Change, Chronicle
from services.supervisor.lines import Lines
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
    backoff_s,
)

STOP_ALL_S = 3.0

log = structlog.get_logger("supervisor.replicas")


def _future() -> asyncio.Future[int]:
    return asyncio.get_running_loop().create_future()


@dataclass
class Replica:
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

    @property
    def status(self) -> m.Status:
        """What it is, in the words of observed state."""
        match self.phase:
            case "ended":
                return "error" if self.error else "stopped"
            case phase:
                return phase


class Replicas:
    """The places of this host.

    Args:
        settings: The environment, handed on to the workers.
        desired: What is wanted, by plugin, kept up to date by somebody else.
        chronicle: Writes down what becomes of them.
        lines: Ships what they print.
        wake: Set when one has changed by itself.

    Attributes:
        here: The replicas, by place.
    """

    def __init__(
        self,
        settings: Settings,
        desired: Mapping[str, m.DesiredState],
        chronicle: Chronicle,
        lines: Lines,
        wake: asyncio.Event,
    ) -> None:
        self.here: dict[Key, Replica] = {}
        self._settings = settings
        self._desired = desired
        self._chronicle = chronicle
        self._lines = lines
        self._wake = wake
        # Who had each place before, when that was another host.
        self._before: dict[Key, str] = {}

    # --- What is seen of them -------------------------------------------------------------------

    def take_registration(self, key: Key, told: m.Registration) -> None:
        """Take in what the instance in a place tells of itself."""
        replica = self._with_process(key, told.pid)
        if replica is None:
            return
        if told.port and not replica.port.done():
            replica.port.set_result(told.port)
        if replica.phase == "starting" and told.status == "running":
            replica.error = None
            replica.last_lines = []
            self._enter(replica, "running", verb="ready")

    def hear(self, beat: m.Heartbeat, now: float) -> None:
        """Take in a worker's heartbeat."""
        if replica := self._with_process(Key(beat.plugin, beat.slot), beat.pid):
            replica.heard = now

    def hear_all(self, now: float) -> None:
        """Count every replica as just heard: it was us who could not hear."""
        for replica in self.here.values():
            replica.heard = now

    def measure(self, now: float) -> None:
        """Look what the replicas use, and which of them have been well for long."""
        for replica in self.here.values():
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

    def seen(self, elsewhere: Mapping[Key, Seen]) -> dict[Key, Seen]:
        """Return every replica: our own as we know them, the others as they are written down."""
        self._before |= {key: there.host for key, there in elsewhere.items()}
        seen = dict(elsewhere)
        for key, r in self.here.items():
            # One of ours that has ended is nothing beside another host's that is there.
            if r.child or key not in seen:
                seen[key] = Seen(
                    r.phase, r.generation, r.since, self._settings.host, r.crashes, r.heard, r.fault
                )
        return seen

    def states(self) -> Iterator[m.ProcessState]:
        """Give what each is now."""
        return map(self._state, self.here.values())

    def _with_process(self, key: Key, pid: int) -> Replica | None:
        """Return the replica in a place, if this very process fills it."""
        replica = self.here.get(key)
        return replica if replica and replica.child and replica.child.pid == pid else None

    # --- What is done with them -----------------------------------------------------------------

    @asynccontextmanager
    async def stopping_all(self) -> AsyncGenerator[None]:
        """Left, no process of ours is left, after `STOP_ALL_S` at most."""
        try:
            yield
        finally:
            watching = [replica.task for replica in self.here.values() if replica.task]
            for replica in self.here.values():
                replica.wanted_end = True
                if replica.child:
                    replica.child.stop()
            if watching:
                await asyncio.wait(watching, timeout=STOP_ALL_S)
            for replica in self.here.values():
                if replica.child:
                    replica.child.kill()
            await asyncio.gather(*watching, return_exceptions=True)
            for key in list(self.here):
                self._forget(key)

    async def end_leftovers(self, written: Iterable[m.ProcessState]) -> None:
        """See that no place has two processes after a supervisor of this host was killed."""
        left = {
            there.pid: self._env(Key(there.plugin, there.slot), there.generation)
            for there in written
            if there.pid and there.host == self._settings.host
        }
        for pid in await process.end_leftovers(left, STOP_ALL_S):
            log.warning("leftover.killed", pid=pid)

    async def do(self, action: Action) -> None:
        """Carry an action out, if what it was decided for is still so: starting takes a while."""
        match action:
            case Start(key, generation):
                await self._start(key, generation)
            case Stop(key):
                replica = self.here[key]
                if replica.child:
                    replica.wanted_end = True
                    replica.child.stop()
                    self._enter(replica, "stopping", verb="draining")
            case Kill(key, why):
                replica = self.here[key]
                if replica.child:
                    log.warning("plugin.killed", plugin=key.plugin, slot=key.slot, why=why)
                    replica.why = why
                    replica.child.kill()
                    self._enter(replica, "stopping")
            case Forget(key):
                self._forget(key)

    def give_up(self, key: Key, host: str) -> None:
        """Stop the process in a place that another host has taken."""
        replica = self.here.get(key)
        if replica and replica.child and not replica.wanted_end:
            log.warning("plugin.place_lost", plugin=key.plugin, slot=key.slot, to=host)
            replica.wanted_end = True
            replica.child.stop()

    async def _start(self, key: Key, generation: int) -> None:
        desired = self._desired.get(key.plugin)
        if desired is None:
            return
        config = desired.config
        before = self.here.get(key)
        replica = Replica(key, generation, started_at=asyncio.get_running_loop().time())
        if before and before.generation == generation:
            replica.crashes, replica.restarts = before.crashes, before.restarts
        if before:
            replica.last_exit, replica.error = before.last_exit, before.error
            replica.last_lines = before.last_lines
        self.here[key] = replica

        def on_line(stream: str, level: m.Level, text: str) -> None:
            self._lines.put(key, level, text, logger=stream)

        try:
            replica.child = await process.start(config, self._env(key, generation), on_line)
        except OSError as error:
            replica.crashes += 1
            replica.error = f"{config.entrypoint} cannot be started: {error.strerror}"
            log.warning("plugin.not_started", plugin=key.plugin, cause=replica.error)
            self._tell_its_log(replica, "process.not_started")
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

    async def _watch(self, replica: Replica, child: Child) -> None:
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
            self._tell_its_log(replica, "process.ended")
        self._enter(
            replica,
            "ended",
            dead=child.pid,
            verb="stopped" if replica.wanted_end else "crashed",
            cause=replica.error,
        )

    async def _check_health(self, replica: Replica) -> None:
        """Ask a replica for its health from the moment that it has said where."""
        port = await replica.port
        desired = self._desired.get(replica.key.plugin)
        if desired is None or desired.config.healthcheck is None:
            return
        # Only here: the HTTP client costs memory that a supervisor without such checks can spare.
        from services.supervisor import health  # noqa: PLC0415

        replica.fault = await health.watch(desired.config.healthcheck, port, replica.started_at)
        self._wake.set()

    # --- What is told of them -------------------------------------------------------------------

    def _enter(
        self,
        replica: Replica,
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
        self._chronicle.note(Change(self._state(replica), dead=dead, event=event))
        self._wake.set()

    def _forget(self, key: Key) -> None:
        replica = self.here.pop(key)
        state = msgspec.structs.replace(
            self._state(replica), status="stopped", since=m.now(), pid=None, error=None
        )
        told = replica.status == "stopped"
        self._chronicle.note(Change(state, forgotten=True, again=told))

    def _state(self, replica: Replica) -> m.ProcessState:
        return m.ProcessState(
            plugin=replica.key.plugin,
            slot=replica.key.slot,
            host=self._settings.host,
            status=replica.status,
            generation=replica.generation,
            since=replica.since_utc,
            pid=replica.child.pid if replica.child else None,
            restarts=replica.restarts,
            last_exit=replica.last_exit,
            error=replica.error,
            last_lines=replica.last_lines,
            mem_bytes=replica.mem_bytes,
        )

    def _tell_its_log(self, replica: Replica, message: str) -> None:
        """Put an unwanted end into the worker's own log: a killed one could not do so."""
        self._lines.put(
            replica.key,
            "error",
            message,
            logger="supervisor",
            fields={"cause": replica.error, "again_after_s": backoff_s(replica.crashes)},
        )


def _cause(before: Replica | None, generation: int) -> str:
    if before is None:
        return "wanted here"
    if before.generation != generation:
        return f"generation {generation}"
    return f"again after its end: {before.last_exit}"

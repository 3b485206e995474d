"""The hosts that are there: this one tells of itself, listens to the others, and drains on demand.

A host is its supervisor. It is alive as long as that one's heartbeat is heard; the bucket only says
who to listen for, and with which labels.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Final

import structlog

from bus import messages as m
from bus.assets import OBSERVED_TTL_S
from bus.client import Client
from bus.errors import BusError, Conflict, DeadlineExceeded, NotFound
from bus.instance import Instance, bkg_version
from bus.plugins import PluginsView
from bus.settings import Settings
from bus.subjects import HEALTH, HOSTS_DRAIN, HOSTS_LIST, HOSTS_UNDRAIN
from bus.tasks import beside
from bus.telemetry import HostSampler, report_host
from services.supervisor.placement import Host
from services.supervisor.process import exists

# Four heartbeats: with the start of its replicas elsewhere a lost host is made up for within 10 s.
DEAD_S: Final = 4.0
TELL_AGAIN_S: Final = OBSERVED_TTL_S / 3
MEASURE_S: Final = 5.0
LEAVE_S: Final = 1.0

log = structlog.get_logger("supervisor.hosts")


class Hosts:
    """The hosts, as this one sees them.

    Args:
        client: The connection.
        instance: This supervisor's place on the bus.
        settings: The environment: name and labels of this host.

    Attributes:
        changed: Set when there is something new.
    """

    def __init__(self, client: Client, instance: Instance, settings: Settings) -> None:
        self.me = settings.host
        self.changed = asyncio.Event()
        self._client = client
        self._instance = instance
        self._labels = settings.labels
        self._sampler = HostSampler(settings.host, settings.data_dir)
        self._since = m.now()
        self._told: dict[str, m.HostState] = {}
        self._draining: dict[str, bool] = {}
        self._heard: dict[str, float] = {}
        self._known: set[str] = set()
        self._revision = 0

    @property
    def leads(self) -> bool:
        """Whether this host tells what concerns no host alone: by name, so that one does."""
        return self.me == min(self.alive(asyncio.get_running_loop().time()))

    @asynccontextmanager
    async def joined(self) -> AsyncGenerator[None]:
        """Be one of the hosts while inside.

        Raises:
            Conflict: Another supervisor runs for a host of this name.
        """
        await self._claim()
        caught_up = [asyncio.Event(), asyncio.Event()]
        try:
            async with beside(
                self._follow_told(caught_up[0]),
                self._follow_desired(caught_up[1]),
                self._retell(),
                report_host(
                    self._client, self._sampler, period_s=MEASURE_S, leads=lambda: self.leads
                ),
            ):
                for event in caught_up:
                    await event.wait()
                yield
        finally:
            await self._leave()

    def hear(self, beat: m.Heartbeat, now: float) -> None:
        """Take in a supervisor's heartbeat."""
        self._heard[beat.id] = now

    def hear_all(self, now: float) -> None:
        """Count every host as just heard: it was us who could not hear."""
        for state in self._told.values():
            self._heard[state.id] = now

    def alive(self, now: float) -> dict[str, Host]:
        """Return the hosts that are there, this one always among them."""
        found = {
            name: Host(
                labels=state.labels,
                draining=self._draining.get(name, False),
                room_bytes=state.mem_available_bytes,
            )
            for name, state in self._told.items()
            # A new one has its first seconds.
            if now - self._heard.setdefault(state.id, now) < DEAD_S or name == self.me
        }
        found.setdefault(self.me, Host(self._labels, self._draining.get(self.me, False)))
        return found

    async def tell_lost(self, alive: dict[str, Host]) -> None:
        """Tell of hosts that have gone without a word since the last call, and of returned ones."""
        lost = {name for name in self._told if name not in alive}
        for name in sorted(lost - self._known):
            log.warning("host.lost", host=name)
            await self._event("lost", name, cause=f"not heard of for {DEAD_S:g} s")
        for name in sorted(self._known - lost):
            log.info("host.found_again", host=name)
        self._known = lost

    def list(self, view: PluginsView, now: float) -> list[m.HostInfo]:
        """Return every host with what runs there, by name."""
        alive = self.alive(now)
        return [
            self._info(state, view, is_alive=name in alive)
            for name, state in sorted(self._told.items())
        ]

    @asynccontextmanager
    async def answering(self, view: PluginsView) -> AsyncGenerator[None]:
        """Answer `hosts.*` while inside."""

        async def every(_request: m.Empty) -> m.HostList:
            return m.HostList(hosts=self.list(view, asyncio.get_running_loop().time()))

        async def drain(request: m.NameHost) -> m.HostInfo:
            return await self._change(request, view, draining=True)

        async def undrain(request: m.NameHost) -> m.HostInfo:
            return await self._change(request, view, draining=False)

        async with (
            self._instance.serving(HOSTS_LIST, every),
            self._instance.serving(HOSTS_DRAIN, drain),
            self._instance.serving(HOSTS_UNDRAIN, undrain),
        ):
            yield

    async def _change(
        self, request: m.NameHost, view: PluginsView, *, draining: bool
    ) -> m.HostInfo:
        """Change what is wanted of a host, and answer when it has come true.

        Raises:
            NotFound: There is no such host.
            DeadlineExceeded: It has not within the caller's time; says what is left there.
        """
        if request.name not in self._told:
            known = ", ".join(sorted(self._told))
            raise NotFound(f"there is no host {request.name!r}; there are: {known}", field="name")
        wanted = m.HostDesired(draining=draining, changed_by=request.by, changed_at=m.now())
        entry = await self._client.store.hosts_desired.get(request.name)
        if (entry.value.draining if entry and entry.value else False) != draining:
            await self._client.store.hosts_desired.put(wanted, request.name)
            await self._event("draining" if draining else "taken-back", request.name, by=request.by)
        info = self._one(request.name, view, draining=draining)
        if not request.wait:
            return info
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(request.timeout_s):
                version = view.version
                while info.status == "draining":
                    version = await view.wait(version)
                    info = self._one(request.name, view, draining=draining)
                return info
        raise DeadlineExceeded(
            f"{request.name}: not done within {request.timeout_s:g} s: "
            f"{', '.join(info.replicas)} still there"
        )

    def _one(self, name: str, view: PluginsView, *, draining: bool) -> m.HostInfo:
        state = self._told.get(name)
        if state is None:
            raise NotFound(f"the host {name!r} has just gone", field="name")
        # The bucket's follower may not have brought the change yet.
        self._draining[name] = draining
        return self._info(state, view, is_alive=True)

    def _info(self, state: m.HostState, view: PluginsView, *, is_alive: bool) -> m.HostInfo:
        there = [
            f"{plugin.name}/{one.slot}"
            for plugin in view.list()
            for one in plugin.instances
            if one.host == state.name and one.pid is not None
        ]
        draining = self._draining.get(state.name, False)
        status: str = ("draining" if there else "drained") if draining else "ready"
        return m.HostInfo(
            name=state.name,
            status="lost" if not is_alive else status,  # type: ignore[arg-type]
            labels=state.labels,
            version=state.version,
            since=state.since,
            last_heartbeat=state.last_heartbeat,
            processors=state.processors,
            mem_total_bytes=state.mem_total_bytes,
            mem_available_bytes=state.mem_available_bytes,
            replicas=there,
        )

    # --- This host ------------------------------------------------------------------------------

    async def _claim(self) -> None:
        """Take this host's name."""
        entry = await self._client.store.hosts.get(self.me)
        there = entry.value if entry else None
        if there and there.id != self._instance.id and await self._lives(there):
            raise Conflict(
                f"a supervisor for the host {self.me!r} runs already, process {there.pid}; name "
                "this one otherwise with BKG_HOST_NAME or --name"
            )
        await self._tell()
        await self._event("joined", self.me)

    async def _lives(self, there: m.HostState) -> bool:
        """Return whether a supervisor that told of this host is still to be heard."""
        heard = asyncio.Event()

        async def listen() -> None:
            async with self._client.follow(HEALTH, plugin="supervisor") as beats:
                async for beat in beats:
                    if beat.payload.id == there.id:
                        heard.set()

        # The common case: it was killed on this very machine, and nobody has to be listened for.
        if not exists(there.pid):
            return False
        async with beside(listen()):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DEAD_S):
                    await heard.wait()
        return heard.is_set()

    async def _tell(self) -> None:
        # Measured anew: what was sampled for telemetry is up to some seconds old.
        now = self._sampler.sample()
        state = m.HostState(
            name=self.me,
            id=self._instance.id,
            pid=os.getpid(),
            version=bkg_version(),
            since=self._since,
            last_heartbeat=m.now(),
            labels=self._labels,
            processors=max(1, round(now.processors)),
            mem_total_bytes=now.mem_total_bytes,
            mem_available_bytes=now.mem_available_bytes,
        )
        self._told[self.me] = state
        self._revision = await self._client.store.hosts.put(state, self.me)

    async def _retell(self) -> None:
        while True:
            await asyncio.sleep(TELL_AGAIN_S)
            try:
                await self._tell()
            except BusError as error:
                log.warning("host.not_told", cause=error.message)

    async def _leave(self) -> None:
        async def leave() -> None:
            await self._client.store.hosts.delete(self.me, revision=self._revision)
            await self._event("left", self.me)

        await self._client.while_connected(leave(), LEAVE_S)

    async def _event(
        self, verb: str, name: str, *, cause: str | None = None, by: str | None = None
    ) -> None:
        state = self._told.get(name)
        event = m.Event(
            kind="host", name=name, verb=verb, timestamp=m.now(), host=name, cause=cause, by=by
        )
        # Several see that one is lost; it is told once.
        once = f"{verb}-{name}-{state.id}" if verb == "lost" and state else None
        try:
            await self._client.store.tell(event, once=once)
        except BusError as error:
            log.warning("event.not_told", verb=verb, host=name, cause=error.message)

    # --- The others -----------------------------------------------------------------------------

    async def _follow_told(self, caught_up: asyncio.Event) -> None:
        async for changes in self._client.store.hosts.follow():
            for entry in changes.entries:
                name = entry.names[0]
                if entry.value is not None:
                    self._told[name] = entry.value
                elif name != self.me:
                    gone = self._told.pop(name, None)
                    if gone:
                        self._heard.pop(gone.id, None)
            if changes.caught_up:
                caught_up.set()
            self.changed.set()

    async def _follow_desired(self, caught_up: asyncio.Event) -> None:
        async for changes in self._client.store.hosts_desired.follow():
            for entry in changes.entries:
                self._draining[entry.names[0]] = bool(entry.value and entry.value.draining)
            if changes.caught_up:
                caught_up.set()
            self.changed.set()

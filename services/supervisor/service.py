"""Makes desired state true on this host, beside the supervisors of others."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager

from bus import messages as m
from bus.client import Client
from bus.instance import Instance
from bus.plugins import PluginsView, follow_plugins
from bus.settings import Settings
from bus.subjects import HEALTH
from bus.tasks import beside
from services.supervisor.chronicle import Chronicle
from services.supervisor.commands import answering
from services.supervisor.hosts import Hosts
from services.supervisor.leading import Leading
from services.supervisor.lines import Lines
from services.supervisor.placement import Host
from services.supervisor.reconcile import Key, Phase, Seen, Wanted, reconcile
from services.supervisor.replicas import Replicas

TICK_S = 0.5
# Our own heartbeat comes back to us every second. While it does not, we hear nobody.
DEAF_S = 3.0
TELL_LAST_S = 0.5
MEASURE_S = 5.0
# What a replica more may need beyond what the largest one uses, for a roll-out with one more.
ROOM_FACTOR = 1.25


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
        self._host = settings.host
        self._desired: dict[str, m.DesiredState] = {}
        self._registered: dict[Key, m.Registration] = {}
        self._wake = asyncio.Event()
        self._heard_self = 0.0
        self._hosts = Hosts(client, instance, settings)
        self._lines = Lines(client, settings.host)
        self._chronicle = Chronicle(client, self._hosts, self._registered)
        self._replicas = Replicas(settings, self._desired, self._chronicle, self._lines, self._wake)

    async def run(self) -> None:
        """Supervise until cancelled; then stop every worker."""
        chronicle, replicas = self._chronicle, self._replicas
        async with (
            beside(
                chronicle.write(replicas.give_up),
                chronicle.write_again(replicas.states),
                self._lines.ship(),
            ),
            self._telling_last(),
            replicas.stopping_all(),
            beside(self._follow_registrations(), self._follow_heartbeats()),
            follow_plugins(self._client.store) as view,
            # Left before the workers are stopped: other hosts take over while they finish.
            self._hosts.joined(),
            beside(
                self._follow_desired(),
                self._wake_at_changes(view),
                self._act(view),
                Leading(self._client, self._hosts, view, lambda: self._wanted(view)).run(),
            ),
            self._hosts.answering(view),
            answering(self._client, self._instance, view),
        ):
            await self._instance.ready()
            await asyncio.Event().wait()

    @asynccontextmanager
    async def _telling_last(self) -> AsyncGenerator[None]:
        """Left, what became of the workers is told, if the broker is there to hear it."""

        async def told() -> None:
            await self._chronicle.written()
            await self._lines.shipped()

        try:
            yield
        finally:
            await self._client.while_connected(told(), TELL_LAST_S)

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
                else:
                    self._registered[key] = entry.value
                    self._replicas.take_registration(key, entry.value)

    async def _follow_heartbeats(self) -> None:
        loop = asyncio.get_running_loop()
        async with self._client.follow(HEALTH) as beats:
            async for beat in beats:
                if beat.payload.id == self._instance.id:
                    self._heard_self = loop.time()
                if beat.payload.plugin == self._instance.plugin:
                    self._hosts.hear(beat.payload, loop.time())
                self._replicas.hear(beat.payload, loop.time())

    async def _wake_at_changes(self, view: PluginsView) -> None:
        version = view.version
        while True:
            version = await view.wait(version)
            self._wake.set()

    # --- What is done ---------------------------------------------------------------------------

    async def _act(self, view: PluginsView) -> None:
        """Reconcile whenever something changed, and at every tick."""
        written = [entry.value for entry in await self._client.store.processes.all()]
        await self._replicas.end_leftovers([one for one in written if one])
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
                self._replicas.hear_all(now)
            last = now
            if now - measured > MEASURE_S:
                measured = now
                self._replicas.measure(now)
            alive = self._hosts.alive(now)
            wanted = self._wanted(view)
            seen = self._replicas.seen(self._elsewhere(view, alive))
            for action in reconcile(self._host, wanted, seen, alive, now):
                await self._replicas.do(action)

    def _wanted(self, view: PluginsView) -> dict[str, Wanted]:
        largest: dict[str, int] = {}
        measured = [(there.plugin, there.mem_bytes) for there in view.processes()]
        # Of our own we know it sooner.
        measured += [(key.plugin, one.mem_bytes) for key, one in self._replicas.here.items()]
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

    def _elsewhere(self, view: PluginsView, alive: Mapping[str, Host]) -> dict[Key, Seen]:
        """Return the replicas on other hosts, as those have written them down."""
        return {
            Key(there.plugin, there.slot): Seen(
                phase=_PHASES[there.status],
                generation=there.generation,
                since=0.0,
                host=there.host,
            )
            for there in view.processes()
            if there.host != self._host and there.host in alive
        }


_PHASES: dict[m.Status, Phase] = {
    "starting": "starting",
    "running": "running",
    "degraded": "running",
    "stopping": "stopping",
    "stopped": "ended",
    "error": "ended",
}

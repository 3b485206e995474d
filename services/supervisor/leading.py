"""What concerns no host alone: told by the host that leads, so that it is told once."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Mapping

import structlog

from bus import messages as m
from bus.client import Client
from bus.errors import BusError, Conflict
from bus.plugins import PluginsView
from bus.tasks import beside
from services.supervisor.chronicle import WRITE_AGAIN_S
from services.supervisor.hosts import Hosts
from services.supervisor.placement import Host, placed, why_unplaced
from services.supervisor.reconcile import Key, Wanted

LOOK_S = 1.0
UNTOLD_MAX = 1_000
# Of a place for which no host fits.
NOWHERE = ""

log = structlog.get_logger("supervisor.leading")


class Leading:
    """Tells of hosts that have gone, of plugins that lost replicas, and of places without a host.

    Args:
        client: The connection.
        hosts: Who is there, and whether this host leads.
        view: All plugins.
        wanted: Tells what should run.
    """

    def __init__(
        self,
        client: Client,
        hosts: Hosts,
        view: PluginsView,
        wanted: Callable[[], Mapping[str, Wanted]],
    ) -> None:
        self._client = client
        self._hosts = hosts
        self._view = view
        self._wanted = wanted
        self._statuses: dict[str, m.Status] = {}
        self._untold: deque[m.Event] = deque(maxlen=UNTOLD_MAX)

    async def run(self) -> None:
        """Look and tell until cancelled; notes what happens also while another host leads."""
        async with beside(self._note_changes()):
            while True:
                await asyncio.sleep(LOOK_S)
                alive = self._hosts.alive(asyncio.get_running_loop().time())
                with contextlib.suppress(BusError):
                    await self._hosts.tell_lost(alive)
                    if self._hosts.leads:
                        await self._tell_unplaced(alive)
                        while self._untold:
                            await self._client.store.tell(self._untold[0])
                            self._untold.popleft()
                    else:
                        self._untold.clear()

    async def _note_changes(self) -> None:
        version = self._view.version
        while True:
            version = await self._view.wait(version)
            self._note_statuses()

    def _note_statuses(self) -> None:
        """Note plugins that have lost some of their replicas, and those that are whole again."""
        states = self._view.list()
        before, self._statuses = self._statuses, {one.name: one.status for one in states}
        for state in states:
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

    async def _tell_unplaced(self, alive: Mapping[str, Host]) -> None:
        """Write down the places for which no host fits, and take back those that have one now."""
        bucket, wanted = self._client.store.processes, self._wanted()
        missing = {
            Key(name, slot): why_unplaced(one.requires, alive)
            for name, one in wanted.items()
            for slot, host in enumerate(placed(name, one.replicas, one.requires, alive)[:-1])
            if host is None
        }
        written = {Key(one.plugin, one.slot): one for one in self._view.processes()}
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


def _age_s(state: m.ProcessState) -> float:
    return (m.now() - state.since).total_seconds()

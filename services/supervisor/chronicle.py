"""What becomes of places, written down and published in its order."""

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import structlog

from bus import messages as m
from bus.assets import OBSERVED_TTL_S
from bus.client import Client
from bus.errors import BusError, Conflict
from bus.plugins import place
from bus.subjects import STATUS
from services.supervisor.hosts import Hosts
from services.supervisor.reconcile import Key

WRITE_AGAIN_S = OBSERVED_TTL_S / 3

log = structlog.get_logger("supervisor.chronicle")


@dataclass(frozen=True)
class Change:
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


class Chronicle:
    """The one who writes observed state for this host's places.

    Nobody waits here for the broker: while it is away, workers are started and stopped as ever.

    Args:
        client: The connection.
        hosts: Who is there: another host may have taken a place.
        registered: The instances that are registered, kept up to date by somebody else.
    """

    def __init__(
        self, client: Client, hosts: Hosts, registered: Mapping[Key, m.Registration]
    ) -> None:
        self._client = client
        self._hosts = hosts
        self._registered = registered
        # Unbounded, but a place in a crash loop adds three in 30 s, while the broker is away.
        self._changes: asyncio.Queue[Change] = asyncio.Queue()
        # The revision of the last that we wrote of each place: whoever writes there next has it.
        self._written: dict[Key, int] = {}

    def note(self, change: Change) -> None:
        """Queue a change."""
        self._changes.put_nowait(change)

    async def write(self, lost: Callable[[Key, str], None]) -> None:
        """Write every change down and publish it, for ever.

        Args:
            lost: Called with a place that is ours no more, and the host that has it.
        """
        while True:
            change = await self._changes.get()
            try:
                await self._tell(change, lost)
            except BusError as error:
                log.warning("plugin.not_told", plugin=change.state.plugin, cause=error.message)
            finally:
                self._changes.task_done()

    async def write_again(self, present: Callable[[], Iterable[m.ProcessState]]) -> None:
        """Write what does not change again, before it expires."""
        while True:
            await asyncio.sleep(WRITE_AGAIN_S)
            # What waits there says it all, once the broker is back.
            if self._changes.empty():
                for state in present():
                    self.note(Change(state, again=True))

    async def written(self) -> None:
        """Wait until nothing is left."""
        await self._changes.join()

    async def _tell(self, change: Change, lost: Callable[[Key, str], None]) -> None:
        state = change.state
        if change.dead is not None:
            await self._bury(state, change.dead)
        if change.forgotten:
            await self._unwrite(state)
        elif not await self._write(state, lost):
            return
        if not change.again:
            registered = self._registered.get(Key(state.plugin, state.slot))
            await self._client.publish(
                STATUS, place(state, registered), plugin=state.plugin, slot=state.slot
            )
        if change.event is not None:
            await self._client.store.tell(change.event)

    async def _write(self, state: m.ProcessState, lost: Callable[[Key, str], None]) -> bool:
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
                if there and there.host != self._hosts.me and there.host in alive:
                    self._written.pop(key, None)
                    lost(key, there.host)
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

    async def _bury(self, state: m.ProcessState, pid: int) -> None:
        """Remove the registration of a process that had no time to do so itself."""
        instances = self._client.store.instances
        entry = await instances.get(state.plugin, state.slot)
        if entry and entry.value and entry.value.pid == pid:
            # A successor has the place already.
            with contextlib.suppress(Conflict):
                await instances.delete(state.plugin, state.slot, revision=entry.revision)

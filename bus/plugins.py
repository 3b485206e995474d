"""Desired and observed state put together: what a plugin is, as every reader sees it.

The gateway and the supervisors hold the same projection of the same buckets, so none of them has
to ask another one.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from bus.answers import Ended
from bus.masking import masked
from bus.messages import (
    DesiredState,
    InstanceState,
    PluginConfig,
    PluginSchema,
    PluginState,
    ProcessState,
    Registration,
    Replicas,
    Status,
)
from bus.state import Bucket, Changes, Entry, Store
from bus.tasks import beside


def plugin_state(
    name: str,
    desired: Entry[DesiredState] | None,
    processes: Sequence[ProcessState],
    instances: Sequence[Registration],
    schema: Mapping[str, Any] | None = None,
) -> PluginState:
    """Return a plugin's state as a whole, from what is wanted and what was last seen.

    `schema` is the last known one of its settings: it stands in while no instance tells one.
    """
    wanted = desired.value if desired else None
    by_slot = {registration.slot: registration for registration in instances}
    supervised = {process.slot: process for process in processes}
    places = [
        place(supervised.get(slot), by_slot.get(slot)) for slot in sorted({*by_slot, *supervised})
    ]
    ready = [place for place in places if place.status == "running"]
    first = ready[0] if ready else None
    told = max(instances, key=lambda r: r.since, default=None)
    count = wanted.config.replicas if wanted and wanted.enabled else 0
    return PluginState(
        name=name,
        status=_status(count, places),
        capabilities=_capabilities(wanted, instances),
        config=_shown(wanted.config, instances, schema) if wanted else None,
        replicas=Replicas(desired=count, ready=len(ready)),
        instances=places,
        generation=wanted.generation if wanted else 0,
        revision=desired.revision if desired else 0,
        pid=first.pid if first else None,
        port=first.port if first else None,
        last_heartbeat=first.last_heartbeat if first else None,
        config_schema=(told.config_schema if told else None) or (dict(schema) if schema else None),
        error=next((place.error for place in places if place.error), None),
    )


def place(process: ProcessState | None, told: Registration | None) -> InstanceState:
    """Return one slot's state; what the instance says counts while its process is there."""
    if process is None:
        assert told is not None  # noqa: S101
        return _told(told, None)
    if (
        told is not None
        and (told.pid, told.host) == (process.pid, process.host)
        and process.status in {"starting", "running"}
    ):
        return _told(told, process)
    return InstanceState(
        slot=process.slot,
        host=process.host,
        # What its supervisor said last may be old: without the instance's own word it serves none.
        status="starting" if process.status == "running" else process.status,
        since=process.since,
        restarts=process.restarts,
        pid=process.pid,
        last_exit=process.last_exit,
        error=process.error,
        generation=process.generation,
        last_lines=process.last_lines,
        mem_bytes=process.mem_bytes,
    )


def has_ended(before: ProcessState, after: ProcessState) -> bool:
    """Tell whether the process that filled a place is no more.

    Where another host has taken the place, the process that it is taken from may still be there.
    """
    return before.pid is not None and before.host == after.host and before.pid != after.pid


def _told(told: Registration, process: ProcessState | None) -> InstanceState:
    return InstanceState(
        slot=told.slot,
        host=told.host,
        status=told.status,
        since=told.since,
        restarts=process.restarts if process else 0,
        id=told.id,
        pid=told.pid,
        port=told.port or "internal",
        last_exit=process.last_exit if process else None,
        mem_bytes=process.mem_bytes if process else None,
        version=told.version,
        last_heartbeat=told.last_heartbeat,
        generation=told.generation,
        config_revision=told.config_revision or None,
    )


def _shown(
    config: PluginConfig, instances: Sequence[Registration], schema: Mapping[str, Any] | None
) -> PluginConfig:
    """Return a configuration without what any known schema calls a secret."""
    for one in (schema, *(registration.config_schema for registration in instances)):
        config = masked(config, one)
    return config


def _status(desired: int, places: Sequence[InstanceState]) -> Status:
    """Return the worst status that matters."""
    has = {place.status for place in places}
    ready = sum(place.status == "running" for place in places)
    if desired == 0:
        # Stopped by wish; hand-started instances may still serve.
        if ready:
            return "running"
        return "stopping" if has - {"stopped", "error"} else "stopped"
    if ready >= desired:
        return "running"
    if ready:
        return "degraded"
    return "error" if "error" in has else "starting"


def _capabilities(wanted: DesiredState | None, instances: Sequence[Registration]) -> list[str]:
    told = [name for registration in instances for name in registration.capabilities]
    configured = wanted.config.capabilities if wanted else []
    return sorted({*configured, *told})


class PluginsView:
    """Every plugin known by configuration or registration; made by `follow_plugins`.

    Args:
        on_end: Told when a process has ended that a supervisor watched.

    Attributes:
        version: Counts the changes.
    """

    def __init__(self, on_end: Callable[[Ended], None] | None = None) -> None:
        self.version = 0
        self._on_end = on_end
        # Who was last registered in a place, and since when that is known here: a registration is
        # removed before it is told how its process ended.
        self._came: dict[tuple[str, ...], tuple[Registration, float]] = {}
        self._desired: dict[str, Entry[DesiredState]] = {}
        self._processes: dict[tuple[str, ...], ProcessState] = {}
        self._instances: dict[tuple[str, ...], Registration] = {}
        self._schemas: dict[str, Mapping[str, Any]] = {}
        self._states: dict[str, PluginState] = {}
        self._changed = asyncio.Event()

    def get(self, name: str) -> PluginState | None:
        """Return a plugin's state; None when nobody knows it."""
        return self._states.get(name)

    def processes(self) -> list[ProcessState]:
        """Return every replica as its supervisor sees it."""
        return list(self._processes.values())

    def registrations(self) -> Sequence[Registration]:
        """Return every instance as it tells of itself."""
        return list(self._instances.values())

    def list(self) -> list[PluginState]:
        """Return all states, by name."""
        return [self._states[name] for name in sorted(self._states)]

    async def wait(self, version: int) -> int:
        """Wait until there is a newer version than the given one, and return it."""
        while self.version <= version:
            await self._changed.wait()
        return self.version

    def _on_desired(self, changes: Changes[DesiredState]) -> None:
        for entry in changes.entries:
            _apply(self._desired, entry.names[0], entry if entry.value else None)
        self._rework(entry.names[0] for entry in changes.entries)

    def _on_processes(self, changes: Changes[ProcessState]) -> None:
        ended = []
        for entry in changes.entries:
            before, after = self._processes.get(entry.names), entry.value
            _apply(self._processes, entry.names, after)
            if before and after and has_ended(before, after):
                ended.append((entry.names, before, after))
            if after is None and entry.names not in self._instances:
                self._came.pop(entry.names, None)
        self._rework(entry.names[0] for entry in changes.entries)
        if self._on_end:
            for names, process, now in ended:
                self._on_end(self._end_of(names, process, now.last_exit or "has ended"))

    def _on_instances(self, changes: Changes[Registration]) -> None:
        for entry in changes.entries:
            _apply(self._instances, entry.names, entry.value)
            if entry.value:
                known = self._came.get(entry.names)
                same = known is not None and known[0].id == entry.value.id
                at = known[1] if known and same else time.perf_counter()
                self._came[entry.names] = entry.value, at
            elif entry.names not in self._processes:
                self._came.pop(entry.names, None)
        self._rework(entry.names[0] for entry in changes.entries)

    def _on_schemas(self, changes: Changes[PluginSchema]) -> None:
        for entry in changes.entries:
            schema = entry.value.config_schema if entry.value else None
            _apply(self._schemas, entry.names[0], schema)
        self._rework(entry.names[0] for entry in changes.entries)

    def _end_of(self, names: tuple[str, ...], process: ProcessState, how: str) -> Ended:
        before, has = time.perf_counter(), set()
        if known := self._came.get(names):
            told, came_at = known
            has = set(told.capabilities)
            if told.pid != process.pid:
                before = came_at
        for key, other in self._instances.items():
            # One that starts is not ready for what was asked.
            if key != names and other.status != "starting":
                has -= set(other.capabilities)
        return Ended(
            plugin=process.plugin,
            slot=names[1],
            host=process.host,
            how=how,
            before=before,
            alone=frozenset(has),
        )

    def _rework(self, names: Iterable[str]) -> None:
        changed = False
        for name in set(names):
            processes = [value for key, value in self._processes.items() if key[0] == name]
            instances = [value for key, value in self._instances.items() if key[0] == name]
            desired = self._desired.get(name)
            state = (
                plugin_state(name, desired, processes, instances, self._schemas.get(name))
                if desired or processes or instances
                else None
            )
            if state != self._states.get(name):
                _apply(self._states, name, state)
                changed = True
        if changed:
            self.version += 1
            self._changed.set()
            self._changed = asyncio.Event()


@asynccontextmanager
async def follow_plugins(
    store: Store, on_end: Callable[[Ended], None] | None = None
) -> AsyncGenerator[PluginsView]:
    """Hold a view that follows the buckets while inside; entered, it has caught up.

    Args:
        store: The buckets.
        on_end: Told when a process has ended that a supervisor watched.
    """
    view = PluginsView(on_end)
    caught_up = [asyncio.Event() for _ in range(4)]
    async with beside(
        _follow(store.desired, view._on_desired, caught_up[0]),  # noqa: SLF001
        _follow(store.processes, view._on_processes, caught_up[1]),  # noqa: SLF001
        _follow(store.instances, view._on_instances, caught_up[2]),  # noqa: SLF001
        _follow(store.schemas, view._on_schemas, caught_up[3]),  # noqa: SLF001
    ):
        for event in caught_up:
            await event.wait()
        yield view


async def _follow(
    bucket: Bucket[Any], apply: Callable[[Changes[Any]], None], caught_up: asyncio.Event
) -> None:
    async for changes in bucket.follow():
        apply(changes)
        if changes.caught_up:
            caught_up.set()


def _apply(table: dict[Any, Any], key: Any, value: Any) -> None:
    if value is None:
        table.pop(key, None)
    else:
        table[key] = value


def without_heartbeat(state: PluginState) -> PluginState:
    """Return a state without the times that change all by themselves, to compare two of them."""
    return msgspec.structs.replace(
        state,
        last_heartbeat=None,
        instances=[msgspec.structs.replace(i, last_heartbeat=None) for i in state.instances],
    )

"""Answers `plugins.*`: a command changes desired state, and answers when that has come true."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import structlog

from bus import messages as m
from bus.client import Client
from bus.errors import Conflict, DeadlineExceeded, InvalidRequest, NotFound
from bus.instance import FIRST_FREE_SLOT, Instance
from bus.plugins import PluginsView
from bus.state import Entry
from bus.subjects import (
    PLUGINS_CONFIGURE,
    PLUGINS_GET,
    PLUGINS_LIST,
    PLUGINS_RESTART,
    PLUGINS_START,
    PLUGINS_STOP,
)

log = structlog.get_logger("supervisor.commands")

Change = Callable[[m.DesiredState], m.DesiredState]
Missing = Callable[[m.PluginState, int], str | None]


@asynccontextmanager
async def answering(client: Client, instance: Instance, view: PluginsView) -> AsyncGenerator[None]:
    """Answer `plugins.*` while inside."""
    commands = _Commands(client, view)
    serving = instance.serving
    async with (
        serving(PLUGINS_LIST, commands.list),
        serving(PLUGINS_GET, commands.get),
        serving(PLUGINS_START, commands.start),
        serving(PLUGINS_STOP, commands.stop),
        serving(PLUGINS_RESTART, commands.restart),
        serving(PLUGINS_CONFIGURE, commands.configure),
    ):
        yield


class _Commands:
    """The handlers."""

    def __init__(self, client: Client, view: PluginsView) -> None:
        self._client = client
        self._view = view

    async def list(self, _request: m.Empty) -> m.PluginList:
        return m.PluginList(plugins=self._view.list())

    async def get(self, request: m.NamePlugin) -> m.PluginState:
        return self._known(request.name)

    async def start(self, request: m.NamePlugin) -> m.PluginState:
        def enable(now: m.DesiredState) -> m.DesiredState:
            # One that is wanted but does not come up may be tried again by hand.
            if now.enabled and self._known(request.name).status != "error":
                raise Conflict(f"{request.name} is started already")
            return _next(now, request.by, enabled=True)

        return await self._change(request, enable, _all_ready)

    async def stop(self, request: m.NamePlugin) -> m.PluginState:
        def disable(now: m.DesiredState) -> m.DesiredState:
            return _next(now, request.by, enabled=False) if now.enabled else now

        return await self._change(request, disable, _all_gone)

    async def restart(self, request: m.NamePlugin) -> m.PluginState:
        def renew(now: m.DesiredState) -> m.DesiredState:
            return _next(now, request.by, enabled=True)

        return await self._change(request, renew, _all_ready)

    async def configure(self, request: m.ConfigurePlugin) -> m.PluginState:
        if request.config.name != request.name:
            raise InvalidRequest(
                f"the configuration is for {request.config.name!r}, not for {request.name!r}",
                field="name",
            )
        entry = await self._desired_entry(request.name)
        assert entry.value is not None  # noqa: S101 - an entry that is there has a value
        if request.revision is not None and request.revision != entry.revision:
            raise Conflict(
                f"{request.name} is at revision {entry.revision}, not {request.revision}; read "
                "it and try again"
            )
        desired = m.DesiredState(
            config=request.config,
            enabled=entry.value.enabled,
            generation=entry.value.generation,
            changed_by=request.by,
            changed_at=m.now(),
        )
        revision = await self._client.store.desired.update(desired, entry.revision, request.name)
        log.info("plugin.configured", plugin=request.name, by=request.by, revision=revision)
        async with asyncio.timeout(10):
            version = -1
            while True:
                version = await self._view.wait(version)
                state = self._known(request.name)
                if state.revision >= revision:
                    return state

    async def _change(
        self, request: m.NamePlugin, change: Change, missing_of: Missing
    ) -> m.PluginState:
        """Change desired state, and answer when observed state has reached it.

        Raises:
            Conflict: Another command wanted the opposite meanwhile.
            DeadlineExceeded: It has not within the caller's time; says what is missing.
        """
        desired = await self._write_desired(request.name, change)
        missing: str | None = "the supervisor has not seen the change yet"
        try:
            async with asyncio.timeout(request.timeout_s):
                version = -1
                while True:
                    version = await self._view.wait(version)
                    state = self._known(request.name)
                    if state.generation > desired.generation:
                        _check_not_overtaken(state, desired)
                    if state.generation >= desired.generation:
                        missing = missing_of(state, desired.generation)
                        if missing is None:
                            return state
        except TimeoutError:
            raise DeadlineExceeded(
                f"{request.name}: not done within {request.timeout_s:g} s: {missing}"
            ) from None

    async def _write_desired(self, name: str, change: Change) -> m.DesiredState:
        """Change desired state by compare-and-set, again when another writer came first."""
        for _ in range(5):
            entry = await self._desired_entry(name)
            assert entry.value is not None  # noqa: S101 - an entry that is there has a value
            desired = change(entry.value)
            if desired == entry.value:
                return desired
            with contextlib.suppress(Conflict):
                await self._client.store.desired.update(desired, entry.revision, name)
                return desired
        raise Conflict(f"{name} is being changed by others all the time; try again")

    async def _desired_entry(self, name: str) -> Entry[m.DesiredState]:
        entry = await self._client.store.desired.get(name)
        if entry is None:
            known = ", ".join(state.name for state in self._view.list() if state.config)
            raise NotFound(f"there is no plugin {name!r}; there are: {known or 'none'}")
        return entry

    def _known(self, name: str) -> m.PluginState:
        state = self._view.get(name)
        if state is None:
            known = ", ".join(state.name for state in self._view.list())
            raise NotFound(f"there is no plugin {name!r}; there are: {known or 'none'}")
        return state


def _next(now: m.DesiredState, by: str, *, enabled: bool) -> m.DesiredState:
    return m.DesiredState(
        config=now.config,
        enabled=enabled,
        generation=now.generation + 1,
        changed_by=by,
        changed_at=m.now(),
    )


def _check_not_overtaken(state: m.PluginState, desired: m.DesiredState) -> None:
    """Raise Conflict when a later command wants a plugin to stop that was started, or to run."""
    if desired.enabled and state.config and state.config.replicas and not state.replicas.desired:
        raise Conflict(f"{state.name} was stopped meanwhile by another command")
    if not desired.enabled and state.replicas.desired:
        raise Conflict(f"{state.name} was started meanwhile by another command")


def _all_ready(state: m.PluginState, generation: int) -> str | None:
    """Return what is missing until every replica runs a generation; None when nothing is."""
    places = {place.slot: place for place in state.instances}
    missing = []
    for slot in range(state.replicas.desired):
        there = places.get(slot)
        if there is None:
            missing.append(f"replica {slot} is not there yet")
        elif there.status != "running" or (there.generation or 0) < generation:
            said = f" ({there.error})" if there.error else ""
            missing.append(f"replica {slot} is {there.status}{said}")
    return "; ".join(missing) or None


def _all_gone(state: m.PluginState, _generation: int) -> str | None:
    """Return what is missing until no replica is left; those started by hand do not count."""
    left = [
        f"replica {place.slot} is {place.status}"
        for place in state.instances
        if place.slot < FIRST_FREE_SLOT
    ]
    return "; ".join(left) or None

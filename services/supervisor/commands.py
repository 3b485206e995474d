"""Answers `plugins.*`: a command changes desired state, and answers when that has come true."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import structlog

from bus import messages as m
from bus.client import Client
from bus.errors import BusError, Conflict, DeadlineExceeded, InvalidRequest, NotFound
from bus.instance import FIRST_FREE_SLOT, Instance
from bus.masking import masked, unmasked
from bus.plugins import PluginsView
from bus.state import Entry
from bus.subjects import (
    PLUGINS_CHECK,
    PLUGINS_CONFIGURE,
    PLUGINS_GET,
    PLUGINS_HISTORY,
    PLUGINS_LIST,
    PLUGINS_RESTART,
    PLUGINS_ROLLBACK,
    PLUGINS_SCALE,
    PLUGINS_START,
    PLUGINS_STOP,
)
from bus.tasks import beside
from services.supervisor import config as rules
from services.supervisor.missing import until_scaled, until_started, until_stopped, until_taken
from services.supervisor.schemas import keep_schemas

# How long the view may be behind what was just written, for who does not wait for more.
SEEN_S = 2.0

log = structlog.get_logger("supervisor.commands")

Change = Callable[[m.DesiredState], m.DesiredState]
Written = Entry[m.DesiredState]
Missing = Callable[[m.PluginState, m.DesiredState, int], str | None]


@asynccontextmanager
async def answering(client: Client, instance: Instance, view: PluginsView) -> AsyncGenerator[None]:
    """Answer `plugins.*` while inside, and keep the schemas that configurations are checked by."""
    commands = _Commands(client, view)
    serving = instance.serving
    async with (
        beside(keep_schemas(client)),
        serving(PLUGINS_LIST, commands.list),
        serving(PLUGINS_GET, commands.get),
        serving(PLUGINS_START, commands.start),
        serving(PLUGINS_STOP, commands.stop),
        serving(PLUGINS_RESTART, commands.restart),
        serving(PLUGINS_CONFIGURE, commands.configure),
        serving(PLUGINS_CHECK, commands.check),
        serving(PLUGINS_SCALE, commands.scale),
        serving(PLUGINS_HISTORY, commands.history),
        serving(PLUGINS_ROLLBACK, commands.rollback),
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
            return _next(now, request.by, enabled=True, generation=now.generation + 1)

        return await self._change(request, enable, until_started, verb="start-requested")

    async def stop(self, request: m.NamePlugin) -> m.PluginState:
        def disable(now: m.DesiredState) -> m.DesiredState:
            if not now.enabled:
                return now
            return _next(now, request.by, enabled=False, generation=now.generation + 1)

        return await self._change(request, disable, until_stopped, verb="stop-requested")

    async def restart(self, request: m.NamePlugin) -> m.PluginState:
        def renew(now: m.DesiredState) -> m.DesiredState:
            return _next(now, request.by, enabled=True, generation=now.generation + 1)

        return await self._change(request, renew, until_started, verb="restart-requested")

    async def scale(self, request: m.ScalePlugin) -> m.PluginState:
        def resize(now: m.DesiredState) -> m.DesiredState:
            if now.config.replicas == request.replicas:
                return now
            config = msgspec.structs.replace(now.config, replicas=request.replicas)
            return _next(now, request.by, config=config)

        return await self._change(
            request, resize, until_scaled, verb="scaled", expected=request.revision
        )

    async def configure(self, request: m.ConfigurePlugin) -> m.PluginState:
        return await self._store(request, request.config, request.revision, verb="configured")

    async def check(self, request: m.ConfigurePlugin) -> m.ConfigCheck:
        _check_name(request.name, request.config)
        entry = await self._desired_entry(request.name)
        _check_revision(request.name, entry.revision, request.revision)
        now = _value(entry)
        config = unmasked(request.config, now.config)
        schema = self._schema(request.name)
        errors = rules.errors(config, schema)
        live = await self._live_settings(request.name)
        return m.ConfigCheck(
            valid=not errors,
            errors=errors,
            changes=rules.changes(now.config, config, [schema]),
            restarts=now.enabled and rules.needs_restart(now.config, config, live),
        )

    async def history(self, request: m.HistoryOfPlugin) -> m.PluginHistory:
        kept = await self._kept(request.name)
        # What an older schema called a secret may stand in an older configuration.
        schemas = [
            entry.value.config_schema
            for entry in await self._client.store.schemas.history(request.name)
            if entry.value
        ]
        schemas.append(self._schema(request.name) or {})
        told = [
            _revision(entry, before, schemas)
            for before, entry in zip([None, *kept], kept, strict=False)
        ]
        return m.PluginHistory(revisions=told[::-1][: request.limit])

    async def rollback(self, request: m.RollbackPlugin) -> m.PluginState:
        kept = {entry.revision: _value(entry) for entry in await self._kept(request.name)}
        if request.revision not in kept:
            raise NotFound(
                f"{request.name} has no revision {request.revision}; kept are "
                f"{', '.join(map(str, sorted(kept)))}",
                field="revision",
            )
        config = kept[request.revision].config
        cause = f"to revision {request.revision}"
        return await self._store(
            request, config, request.at_revision, verb="rolled-back", cause=cause
        )

    async def _store(
        self,
        request: m.NamePlugin,
        wanted: m.PluginConfig,
        expected: int | None,
        *,
        verb: str,
        cause: str | None = None,
    ) -> m.PluginState:
        """Store a configuration, if it is allowed, and answer when every instance has it.

        Raises:
            InvalidRequest: It does not fit the plugin's schema; says all that is wrong.
        """
        _check_name(request.name, wanted)
        live = await self._live_settings(request.name)
        schema = self._schema(request.name)

        def replace(now: m.DesiredState) -> m.DesiredState:
            config = unmasked(wanted, now.config)
            if errors := rules.errors(config, schema):
                said = [error.message for error in errors]
                raise InvalidRequest("; ".join(said), field=errors[0].field, reasons=said)
            if rules.same(now.config, config):
                return now
            again = rules.needs_restart(now.config, config, live)
            return _next(
                now, request.by, config=config, generation=now.generation + 1 if again else None
            )

        return await self._change(
            request, replace, until_taken, verb=verb, cause=cause, expected=expected
        )

    async def _change(
        self,
        request: m.NamePlugin,
        change: Change,
        missing_of: Missing,
        *,
        verb: str,
        cause: str | None = None,
        expected: int | None = None,
    ) -> m.PluginState:
        """Change desired state, and answer when observed state has reached it.

        Raises:
            Conflict: Another command wanted the opposite meanwhile, or the revision is not the
                expected one.
            DeadlineExceeded: It has not within the caller's time; says what is missing.
        """
        before, written = await self._write_desired(request.name, change, expected)
        desired = _value(written)
        if written is not before:
            await self._told(request, verb, _value(before), written, cause)
        missing: str | None = "the supervisor has not seen the change yet"
        version = -1
        try:
            async with asyncio.timeout(request.timeout_s if request.wait else SEEN_S):
                while True:
                    version = await self._view.wait(version)
                    state = self._known(request.name)
                    if state.revision < written.revision:
                        continue
                    if not request.wait:
                        return state
                    missing = missing_of(state, desired, written.revision)
                    if missing is None:
                        return state
        except TimeoutError:
            if not request.wait:
                return self._known(request.name)
            raise DeadlineExceeded(
                f"{request.name}: revision {written.revision} is stored, but not reached within "
                f"{request.timeout_s:g} s: {missing}"
            ) from None

    async def _write_desired(
        self, name: str, change: Change, expected: int | None
    ) -> tuple[Written, Written]:
        """Change desired state by compare-and-set, again when another writer came first.

        Returns:
            What was there, and what is; the same one when there was nothing to change.
        """
        for _ in range(5):
            entry = await self._desired_entry(name)
            _check_revision(name, entry.revision, expected)
            desired = change(_value(entry))
            if desired is entry.value:
                return entry, entry
            with contextlib.suppress(Conflict):
                revision = await self._client.store.desired.update(desired, entry.revision, name)
                return entry, Entry((name,), desired, revision)
        raise Conflict(f"{name} is being changed by others all the time; try again")

    async def _told(
        self,
        request: m.NamePlugin,
        verb: str,
        before: m.DesiredState,
        written: Written,
        cause: str | None,
    ) -> None:
        """Log a command and store it as an event: which fields, never what stands in them."""
        desired = _value(written)
        schema = self._schema(request.name)
        fields = [c.field for c in rules.changes(before.config, desired.config, [schema])]
        if verb == "scaled":
            cause = f"from {before.config.replicas} to {desired.config.replicas} replicas"
        elif fields and cause is None:
            cause = ", ".join(fields)
        log.info(
            "plugin.changed", plugin=request.name, verb=verb, by=request.by,
            revision=written.revision, generation=desired.generation, fields=fields,
        )  # fmt: skip
        event = m.Event(
            kind="plugin",
            name=request.name,
            verb=verb,
            timestamp=desired.changed_at,
            by=request.by,
            cause=cause,
        )
        try:
            await self._client.store.tell(event)
        except BusError as error:
            # The change is stored; that nobody reads of it does not undo it.
            log.warning("event.not_stored", plugin=request.name, cause=error.message)

    async def _desired_entry(self, name: str) -> Written:
        entry = await self._client.store.desired.get(name)
        if entry is None:
            known = ", ".join(state.name for state in self._view.list() if state.config)
            raise NotFound(f"there is no plugin {name!r}; there are: {known or 'none'}")
        return entry

    async def _kept(self, name: str) -> Sequence[Written]:
        kept = await self._client.store.desired.history(name)
        if not kept:
            await self._desired_entry(name)
        return kept

    async def _live_settings(self, name: str) -> frozenset[str]:
        """Return the settings that every instance which the supervisor would replace takes live."""
        there = [entry.value for entry in await self._client.store.instances.all() if entry.value]
        return rules.live_settings(
            [one for one in there if one.plugin == name and one.slot < FIRST_FREE_SLOT]
        )

    def _schema(self, name: str) -> dict[str, Any] | None:
        state = self._view.get(name)
        return state.config_schema if state else None

    def _known(self, name: str) -> m.PluginState:
        state = self._view.get(name)
        if state is None:
            known = ", ".join(state.name for state in self._view.list())
            raise NotFound(f"there is no plugin {name!r}; there are: {known or 'none'}")
        return state


def _value(entry: Written) -> m.DesiredState:
    assert entry.value is not None  # noqa: S101 - an entry that is there has a value
    return entry.value


def _next(
    now: m.DesiredState,
    by: str,
    *,
    config: m.PluginConfig | None = None,
    enabled: bool | None = None,
    generation: int | None = None,
) -> m.DesiredState:
    return m.DesiredState(
        config=config or now.config,
        enabled=now.enabled if enabled is None else enabled,
        generation=generation or now.generation,
        changed_by=by,
        changed_at=m.now(),
    )


def _revision(
    entry: Written, before: Written | None, schemas: list[dict[str, Any]]
) -> m.PluginRevision:
    desired = _value(entry)
    changes: list[m.ConfigChange] = []
    if before is not None:
        was = _value(before)
        changes = rules.changes(was.config, desired.config, schemas)
        if was.enabled != desired.enabled:
            changes.append(
                m.ConfigChange(field="enabled", before=was.enabled, after=desired.enabled)
            )
    config = desired.config
    for schema in schemas:
        config = masked(config, schema)
    return m.PluginRevision(
        revision=entry.revision,
        config=config,
        enabled=desired.enabled,
        generation=desired.generation,
        changed_by=desired.changed_by,
        changed_at=desired.changed_at,
        changes=changes,
    )


def _check_name(name: str, config: m.PluginConfig) -> None:
    if config.name != name:
        raise InvalidRequest(
            f"the configuration is for {config.name!r}, not for {name!r}", field="name"
        )


def _check_revision(name: str, present: int, expected: int | None) -> None:
    if expected is not None and expected != present:
        raise Conflict(
            f"{name} is at revision {present}, not {expected}; read it and try again",
            revision=present,
        )

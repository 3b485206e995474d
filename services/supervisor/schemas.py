"""The schemas that configurations are checked by, kept where they outlive the instances."""

import contextlib
from typing import Any

import structlog

from bus import messages as m
from bus.client import Client
from bus.errors import BusError, Conflict

log = structlog.get_logger("supervisor.schemas")


async def keep_schemas(client: Client) -> None:
    """Write down the schema that each plugin's newest instances tell, for ever."""
    told: dict[str, dict[str, m.Registration]] = {}
    kept: dict[str, dict[str, Any]] = {}
    async for changes in client.store.instances.follow():
        for entry in changes.entries:
            plugin, slot = entry.names
            there = told.setdefault(plugin, {})
            if entry.value is None:
                there.pop(slot, None)
            else:
                there[slot] = entry.value
        if not changes.caught_up:
            continue
        for plugin in {entry.names[0] for entry in changes.entries}:
            # One rule for all supervisors, so that two versions side by side do not alternate.
            newest = max(
                told[plugin].values(), key=lambda r: (r.generation, r.version, r.id), default=None
            )
            # Registrations are written again every ten seconds: most say nothing new.
            if newest and newest.config_schema and newest.config_schema != kept.get(plugin):
                try:
                    await _keep(client, newest, newest.config_schema)
                    kept[plugin] = newest.config_schema
                except BusError as error:
                    # The next registration, in ten seconds, is another chance.
                    log.warning("schema.not_kept", plugin=plugin, cause=error.message)


async def _keep(client: Client, registration: m.Registration, schema: dict[str, Any]) -> None:
    plugin = registration.plugin
    kept = await client.store.schemas.get(plugin)
    if kept and kept.value and kept.value.config_schema == schema:
        return
    value = m.PluginSchema(config_schema=schema, version=registration.version, changed_at=m.now())
    # Another supervisor came first, with the same.
    with contextlib.suppress(Conflict):
        if kept:
            await client.store.schemas.update(value, kept.revision, plugin)
        else:
            await client.store.schemas.create(value, plugin)
        log.info("schema.kept", plugin=plugin, version=registration.version)

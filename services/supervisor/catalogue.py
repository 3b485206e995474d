"""The catalogue: which plugins exist, how to start them, and what is wanted of them at first."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
import structlog

from bus import codec
from bus.errors import BusError, Conflict, InvalidRequest
from bus.messages import DesiredState, PluginConfig, now
from bus.state import Store

SHIPPED: Final = Path(__file__).parents[1] / "plugins.json"

log = structlog.get_logger("supervisor.catalogue")


def path_from_env() -> Path:
    """Return the catalogue that `BKG_PLUGINS` names, or the one that bkg ships."""
    return Path(os.environ.get("BKG_PLUGINS") or SHIPPED)


def load(path: Path) -> list[PluginConfig]:
    """Read a catalogue: a JSON list of plugin configurations.

    Raises:
        InvalidRequest: It cannot be read; names the file, the plugin and the field.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"the catalogue {path} cannot be read: {error.strerror}") from None
    try:
        configs = codec.decode(content, list[PluginConfig])
    except BusError as error:
        raise InvalidRequest(
            f"the catalogue {path}{_plugin(content, error)}: {error.message}",
            field=error.field,
        ) from None
    names = [config.name for config in configs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InvalidRequest(f"the catalogue {path} has {', '.join(twice)} more than once")
    return configs


async def seed(store: Store, configs: Sequence[PluginConfig]) -> None:
    """Write the first desired state of each plugin that has none; what is there stays."""
    for config in configs:
        desired = DesiredState(
            config=config,
            enabled=config.autostart,
            generation=1,
            changed_by="catalogue",
            changed_at=now(),
        )
        try:
            await store.desired.create(desired, config.name)
        except Conflict:
            continue
        log.info("plugin.seeded", name=config.name, enabled=config.autostart)


def _plugin(content: bytes, error: BusError) -> str:
    """Return which plugin is meant, in words: people do not count entries of a list."""
    at = re.match(r"\[(\d+)\]", error.field or "")
    if at is None:
        return ""
    try:
        entry = msgspec.json.decode(content)[int(at[1])]
    except msgspec.DecodeError:
        # What comes behind the entry is no JSON.
        return ""
    name = entry.get("name") if isinstance(entry, dict) else None
    return f", plugin {name!r}" if isinstance(name, str) else ""

"""A plugin's configuration as one of its instances has it, and what of it changes live."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Final

import structlog

from bus import codec
from bus import messages as m
from bus.client import Client
from bus.errors import BusError, Unavailable
from bus.registration import Registered

# What a process is started with.
_AT_START: Final = ("entrypoint", "args", "env")

log = structlog.get_logger("bus.live_config")


class LiveConfig:
    """The configuration: as it was when the instance joined, and what it has taken live since.

    Args:
        client: The connection.
        registered: Tells others which settings are taken live, and which revision is.
        present: The configuration at the beginning; None if the plugin has none.

    Attributes:
        present: The configuration.
    """

    def __init__(
        self, client: Client, registered: Registered, present: m.PluginConfig | None
    ) -> None:
        self.present = present
        self._client = client
        self._registered = registered
        # A change that could not be taken live when it came, and its revision.
        self._waiting: tuple[m.DesiredState, int] | None = None
        self._takers: list[tuple[frozenset[str], Callable[[], None]]] = []

    def on_change(self, names: Sequence[str], callback: Callable[[], None]) -> None:
        """Take changes of these settings live; see `Instance.on_config`."""
        self._takers.append((frozenset(names), callback))
        self._registered.say(live_settings=sorted({*self._registered.told.live_settings, *names}))
        if self._waiting:
            self._take(*self._waiting)

    async def follow(self) -> None:
        """Take what can be taken live of every change, for ever."""
        async for changes in self._client.store.desired.follow(self._registered.told.plugin):
            for entry in changes.entries:
                if entry.value is None or entry.revision <= self._registered.told.config_revision:
                    continue
                if self._take(entry.value, entry.revision):
                    with contextlib.suppress(Unavailable):
                        await self._registered.write()

    def _take(self, desired: m.DesiredState, revision: int) -> bool:
        """Take a configuration, all of it or nothing; tell whether it was taken."""
        told = self._registered.told
        if 0 < told.generation < desired.generation:
            # This process is about to be replaced.
            return False
        self._waiting = None
        before, after = self.present, desired.config
        changed = _changed(before, after)
        if waits := sorted(changed.difference(told.live_settings)):
            log.warning("config.needs_restart", revision=revision, settings=waits)
            self._waiting = desired, revision
            return False
        self.present = after
        try:
            for names, callback in self._takers:
                if names & changed:
                    callback()
        except BusError as error:
            self.present = before
            log.error("config.refused", revision=revision, cause=error.message)
            return False
        self._registered.say(config_revision=revision)
        if changed:
            log.info("config.taken", revision=revision, settings=sorted(changed))
        return True


def _changed(before: m.PluginConfig | None, after: m.PluginConfig) -> set[str]:
    """Return the settings that differ; `entrypoint` also stands for all that a start takes."""
    old = before.settings if before else {}
    # As they travel: in Python true is 1, and 1 is 1.0.
    changed = {
        name
        for name in {*old, *after.settings}
        if (name in old) != (name in after.settings)
        or codec.encode(old.get(name)) != codec.encode(after.settings.get(name))
    }
    if before and any(getattr(before, name) != getattr(after, name) for name in _AT_START):
        changed.add("entrypoint")
    return changed

"""An instance's registration: what it says of itself, written where others read it."""

import asyncio
import contextlib
from typing import Any, Final

import msgspec
import structlog

from bus import messages as m
from bus.assets import OBSERVED_TTL_S
from bus.client import Client
from bus.errors import Conflict, Unavailable

REGISTER_AGAIN_S: Final = OBSERVED_TTL_S / 3
WITHDRAW_S: Final = 2.0
FIRST_FREE_SLOT: Final = 100
LAST_FREE_SLOT: Final = 999

log = structlog.get_logger("bus.registration")


class Registered:
    """A slot, and who fills it as it says itself.

    Args:
        client: The connection.
        told: What it says at first.
        listed: Whether it is written down at all.

    Attributes:
        told: What it says now.
    """

    def __init__(self, client: Client, told: m.Registration, *, listed: bool) -> None:
        self.told = told
        self._client = client
        self._listed = listed
        self._revision = 0
        self._writing = asyncio.Lock()

    def say(self, **changed: Any) -> None:
        """Change what it says; others read it after the next `write`."""
        self.told = msgspec.structs.replace(self.told, **changed)

    async def write(self) -> None:
        """Write the registration, unless another instance has taken the slot.

        Raises:
            Conflict: It has.
        """
        if not self._listed:
            return
        async with self._writing:
            self.say(last_heartbeat=m.now())
            bucket, names = self._client.store.instances, (self.told.plugin, self.told.slot)
            try:
                self._revision = await bucket.update(self.told, self._revision, *names)
            except Conflict:
                entry = await bucket.get(*names)
                if entry and entry.value and entry.value.id != self.told.id and self._revision:
                    raise Conflict(
                        f"slot {self.told.slot} of {self.told.plugin} was taken by process "
                        f"{entry.value.pid} on {entry.value.host}"
                    ) from None
                # A predecessor's key, or ours that expired while the broker was away.
                self._revision = await bucket.put(self.told, *names)

    async def keep(self) -> None:
        """Write it again before it expires, for ever."""
        while True:
            await asyncio.sleep(REGISTER_AGAIN_S)
            try:
                await self.write()
            except Unavailable as error:
                log.warning("instance.not_registered", cause=error.message)

    async def withdraw(self) -> None:
        """Remove it."""
        if not self._listed:
            return

        async def leave() -> None:
            async with self._writing:
                await self._client.store.instances.delete(
                    self.told.plugin, self.told.slot, revision=self._revision
                )

        # A successor may have the slot already; a broker that is away lets the key expire.
        await self._client.while_connected(leave(), WITHDRAW_S)


async def claim_free_slot(client: Client, registration: m.Registration) -> m.Registration:
    """Register in the lowest slot that no desired state asks for and nobody has.

    Raises:
        Conflict: There is none.
    """
    for slot in range(FIRST_FREE_SLOT, LAST_FREE_SLOT + 1):
        claimed = msgspec.structs.replace(registration, slot=slot)
        with contextlib.suppress(Conflict):
            await client.store.instances.create(claimed, registration.plugin, slot)
            return claimed
    raise Conflict(f"all slots of {registration.plugin} up to {LAST_FREE_SLOT} are taken")

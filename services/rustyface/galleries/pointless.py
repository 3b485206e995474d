"""Rejections that became pointless by what nobody waits for, withdrawn behind its answer."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping

from services.rustyface.galleries.gallery import Gallery
from services.rustyface.galleries.projection import Dead


class Pointless:
    """Looks after rejections where an entry is enrolled anew, as somebody else.

    Args:
        galleries: All of them, by name.
        withdraw: Withdraws the rejections of a gallery that have no sense.
    """

    def __init__(
        self, galleries: Mapping[str, Gallery], withdraw: Callable[[Gallery], Awaitable[object]]
    ) -> None:
        self._galleries = galleries
        self._withdraw = withdraw
        # By name, so there are no more of them than galleries.
        self._found: set[str] = set()
        self._any = asyncio.Event()

    def look(self, replaced: Iterable[Dead]) -> None:
        """Look for rejections that have no sense, after events of this process.

        An entry that is new contradicts nobody, has replaced nothing and costs nothing here.
        """
        for gallery in {one.gallery for one in replaced if one.entry is not None}:
            there = self._galleries.get(gallery)
            if there is not None and there.has_pointless():
                self._found.add(gallery)
                self._any.set()

    async def run(self) -> None:
        """Have them withdrawn until cancelled."""
        while True:
            await self._any.wait()
            self._any.clear()
            while self._found:
                there = self._galleries.get(self._found.pop())
                if there is not None:
                    await self._withdraw(there)

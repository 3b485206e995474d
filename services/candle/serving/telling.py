"""What an instance serves, kept written down for whoever wants to know it without asking."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final

from bus import messages as m
from bus.errors import BusError
from bus.state import Bucket

# It is written down at every change, but no more often than this, and again before its key expires.
WRITE_S: Final = 0.2
WRITE_AGAIN_S: Final = 10.0
# How long somebody who has been served waits for others to be able to read it; the end of `keep`
# takes no longer either.
PATIENCE_S: Final = 1.0


class Telling:
    """Keeps written down what an instance serves.

    Args:
        bucket: Where.
        served: Gives what is served now.
        names: Plugin and slot.
    """

    def __init__(
        self, bucket: Bucket[m.ServedModels], served: Callable[[], m.ServedModels], *names: object
    ) -> None:
        self._bucket = bucket
        self._served = served
        self._names = names
        self._changed = asyncio.Event()
        self._hurried = asyncio.Event()
        self._begun = 0
        self._written = 0
        self._wrote = asyncio.Event()

    def change(self) -> None:
        """Take note that something has changed."""
        self._changed.set()

    async def written(self) -> None:
        """Return once all that is so now is written down.

        So whoever is told that a model is served, and asks somebody else about it, hears the same.
        A broker that does not take it is not waited for longer than `PATIENCE_S`.
        """
        wanted = self._begun + 1
        self._hurried.set()
        self._changed.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                while self._written < wanted:
                    await self._wrote.wait()

    async def keep(self) -> None:
        """Write until cancelled, and take it all back then."""
        try:
            while True:
                await self._write()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(WRITE_S):
                        await self._hurried.wait()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(WRITE_AGAIN_S):
                        await self._changed.wait()
        finally:
            with contextlib.suppress(BusError, TimeoutError):
                async with asyncio.timeout(PATIENCE_S):
                    await self._bucket.delete(*self._names)

    async def _write(self) -> None:
        self._changed.clear()
        self._hurried.clear()
        self._begun += 1
        with contextlib.suppress(BusError):
            await self._bucket.put(self._served(), *self._names)
            self._written = self._begun
            self._wrote.set()
            self._wrote = asyncio.Event()

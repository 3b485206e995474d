"""Images of datasets that keep them: stored before their entry, gone with the last that has it."""

from collections.abc import Awaitable, Callable
from functools import partial

import structlog

from bus.artefacts import Artefacts
from bus.errors import BusError

log = structlog.get_logger("rustyface.kept")


class KeptImages:
    """Images in the object store of faces, each named by its SHA-256.

    An image is stored before the event of its entry, and looked for behind it: somebody may have
    deleted it in between, with the last entry that had it till then. Whoever deletes it takes it
    out of sight first and looks then whether an entry names it. So one of both sees the other, and
    no entry is left without its image. One whose event never came is garbage, collected by age.

    Args:
        store: The object store.
    """

    def __init__(self, store: Artefacts) -> None:
        self._store = store

    async def keep(self, image: bytes) -> str:
        """Store an image and return its digest; one that is there counts as brought just now.

        Raises:
            Unavailable: There is no room for it.
        """
        async with self._store.writing(len(image)) as upload:
            await upload.write(image)
            return (await upload.commit()).digest

    async def ensure(self, digest: str, image: bytes) -> None:
        """Store an image again if it has gone meanwhile, with another entry that had the same.

        Its entry is stored already, so a failure is only told to the log.
        """
        try:
            # One that is there stays: whoever begins to delete it now finds its entry.
            if await self._store.size(digest) is None and await self._store.touch(digest) is None:
                await self.keep(image)
        except BusError as error:
            log.warning("image.not_kept", image=digest, cause=error.message)

    async def drop(self, digest: str, named: Callable[[str], Awaitable[bool]]) -> None:
        """Delete an image, unless an entry names it by then.

        Args:
            digest: Which one.
            named: Tells whether one does, as of the broker's newest revision.

        Raises:
            BusError: It is not erased, or only a part of it; asked again, this goes on.
        """
        await self._store.delete(digest, unless=partial(named, digest), erase_s=None)

"""Images of datasets that keep them: stored before their entry, gone with the last that has it."""

from collections.abc import Iterable

import structlog

from bus.artefacts import Artefacts
from bus.errors import BusError

log = structlog.get_logger("rustyface.kept")


class KeptImages:
    """Images in the object store of faces, each named by its SHA-256.

    An image is stored before the event of its entry, so no entry ever names one that is not there.
    One whose event never came is garbage, which is collected by age.

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
            # Whoever is deleting it just now sees that it was brought again, and leaves it.
            if await self._store.touch(digest) is None:
                await self.keep(image)
        except BusError as error:
            log.warning("image.not_kept", image=digest, cause=error.message)

    async def gone(self, digests: Iterable[str]) -> None:
        """Delete images that no entry names any more; what cannot be is left to the garbage."""
        for digest in digests:
            try:
                await self._store.delete(digest)
            except BusError as error:
                log.warning("image.not_deleted", image=digest, cause=error.message)

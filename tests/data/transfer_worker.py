"""A process that does jobs of datasets and nothing else, to be killed in the middle of one.

Called with the broker's address, the root of its subjects, a folder, and how long vectors are.
"""

import asyncio
import sys
from pathlib import Path

from bus import jobs as jobs_module
from bus.client import connect
from bus.instance import join
from bus.settings import Settings
from bus.tasks import beside
from services.rustyface.galleries.galleries import Galleries
from services.rustyface.transfers.transfer import GalleryJobs


class Tiny:
    """Names vectors; asked for none."""

    name, digest = "tiny", "t1"

    def __init__(self, dimensions: int) -> None:
        self.dimensions = dimensions

    def encode(self, data: bytes) -> tuple[object, list[object]]:
        raise AssertionError(data)


async def main(url: str, root: str, folder: str, dimensions: str) -> None:
    # Told often, so that whoever kills this process sees how far it is.
    jobs_module.TELL_S = 0.05  # type: ignore[misc]
    env = Settings(
        nats_url=url,
        root=root,
        data_dir=Path(folder),
        slot=7,
        generation=1,
        log_level="info",
        host="another-host",
    )
    async with (
        connect(url, name="rustyface", root=root) as client,
        join(client, env, plugin="rustyface", description="a test") as instance,
    ):
        encoder = Tiny(int(dimensions))
        galleries = Galleries(
            client.store.galleries,
            root,
            encoder.name,
            encoder.dimensions,
            digest=encoder.digest,
            changes=client.store.changes,
        )
        jobs = GalleryJobs(client, instance, galleries, encoder, Path(folder))
        async with beside(galleries.run()):
            await galleries.caught_up.wait()
            async with jobs.serving():
                await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

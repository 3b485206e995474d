"""rustyface takes its threshold and the length of its queue live."""

import asyncio

import msgspec
import numpy as np

from bus import messages as m
from bus.instance import join
from bus.subjects import FACES_SEARCH
from bus.testing import until
from services.rustyface.assembly import assemble
from services.rustyface.photos.encoder import PixelEncoder
from services.rustyface.settings import settings_of


async def want(client, **settings: object) -> None:
    config = m.PluginConfig(
        name="rustyface", description="", entrypoint="x", capabilities=[], settings=settings
    )
    desired = m.DesiredState(
        config=config, enabled=True, generation=1, changed_by="t", changed_at=m.now()
    )
    await client.store.desired.put(desired, "rustyface")


async def test_the_threshold_and_the_queue_change_without_a_restart(client, settings):
    await want(client, embedder="pixel32", threshold=0.5)
    async with join(client, settings, plugin="rustyface", description="a test") as instance:
        encoder = PixelEncoder()
        faces = assemble(
            client,
            instance,
            encoder,
            settings_of(instance),
            datasets_dir=None,
            cache_dir=settings.cache_dir,
        )
        serving = asyncio.create_task(faces.run())
        await until(lambda: instance._registration.status == "running" or serving.done())
        try:
            assert instance._registration.live_settings == [
                "max_waiting",
                "telemetry_interval",
                "threshold",
            ]
            asked = m.SearchFaces(embedding=np.ones(encoder.dimensions).tolist())
            assert (await client.call(FACES_SEARCH, asked)).threshold == 0.5
            await want(client, embedder="pixel32", threshold=0.75, max_waiting=3)
            await until(lambda: faces._workers.max_waiting == 3)
            assert (await client.call(FACES_SEARCH, asked)).threshold == 0.75
            # Without one it is the embedder's own again.
            await want(client, embedder="pixel32")
            await until(lambda: faces._thresholds.plugin is None)
            found = await client.call(FACES_SEARCH, asked)
            assert found.threshold == 0.99
            assert msgspec.structs.asdict(found)["results"] == []
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)

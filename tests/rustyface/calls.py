"""Questions to rustyface as callers put them, and a worker in a process of its own."""

import asyncio
import base64
import contextlib
import os
import sys
from pathlib import Path

import cv2

from bus import messages as m
from bus.errors import BusError
from bus.subjects import DATASET_MANAGE, FACES_ENCODE, FACES_SEARCH


def as_png(image) -> str:
    return base64.b64encode(cv2.imencode(".png", image)[1].tobytes()).decode()


async def encode(client, image: str, **more) -> m.EncodedFace:
    return await client.call(FACES_ENCODE, m.EncodeFace(image_base64=image, **more))


async def search(client, **asked) -> m.FaceMatches:
    return await client.call(FACES_SEARCH, m.SearchFaces(**asked))


async def manage(client, action: str, **more) -> dict[str, int]:
    asked = m.ManageDataset(action=action, **more)
    listed = await client.call(DATASET_MANAGE, asked)
    return {dataset.id: dataset.entries for dataset in listed.datasets}


async def answers(client) -> bool:
    with contextlib.suppress(BusError):
        return bool(await manage(client, "list"))
    return False


@contextlib.asynccontextmanager
async def started(client, settings, given):
    """Start a worker as the supervisor does: a process of its own, its settings in the bucket."""
    config = m.PluginConfig(
        name="rustyface",
        description="a test",
        entrypoint="services.rustyface",
        capabilities=[],
        settings=given,
    )
    wanted = m.DesiredState(
        config=config, enabled=True, generation=1, changed_by="test", changed_at=m.now()
    )
    await client.store.desired.put(wanted, "rustyface")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.rustyface", stderr=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env={
            **os.environ,
            "BKG_NATS_URL": settings.nats_url,
            "BKG_ROOT": settings.root,
            "BKG_DATA_DIR": str(settings.data_dir),
        },
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()

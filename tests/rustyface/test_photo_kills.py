"""Killed in the middle of 1,000 photos that callers enrol: each is there, once, with its face."""

import asyncio
import base64
import contextlib
import os
import signal

import cv2
import numpy as np
import pytest

from bus import messages as m
from bus.broker import running_broker
from bus.client import connect
from bus.errors import BusError
from bus.subjects import DATASET_MANAGE, FACES_ENCODE, gallery_events
from bus.testing import until
from services.rustyface.photos.encoder import PixelEncoder
from tests.rustyface.calls import answers, started

COUNT = 1_000
CALLERS = 16


@pytest.fixture(scope="module")
def photos(photo) -> list[str]:
    """A thousand different pieces of a real photo, as PNG files in base64."""
    whole = photo("astronaut")
    pieces = [whole[8 * (i // 50) :, 8 * (i % 50) :][:48, :48] for i in range(COUNT)]
    return [base64.b64encode(cv2.imencode(".png", one)[1].tobytes()).decode() for one in pieces]


async def enrol_all(client, photos: list[str], known: dict[str, m.EncodedFace]) -> None:
    """Enrol every photo; who is told no, or nothing, asks again, as callers do."""
    left = iter(range(COUNT))

    async def enrol() -> None:
        for i in left:
            asked = m.EncodeFace(image_base64=photos[i], entry_id=f"e{i}", subject=f"p{i % 9}")
            while f"e{i}" not in known:
                with contextlib.suppress(BusError):
                    known[f"e{i}"] = await client.call(FACES_ENCODE, asked, timeout_s=3)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(CALLERS):
            tasks.create_task(enrol())


async def check(client, known: dict[str, m.EncodedFace]) -> None:
    """Look that every photo is there once, as it was acknowledged; a worker is asked."""
    found: dict[str, m.EntryInfo] = {}
    after = None
    while True:
        asked = m.ManageDataset(
            action="entries", dataset="default", limit=100, embeddings=True, after=after
        )
        told = await client.call(DATASET_MANAGE, asked)
        assert told.total == COUNT
        found |= {one.id: one for one in told.entries}
        if (after := told.next) is None:
            break
    assert found.keys() == known.keys()
    for name, entry in found.items():
        assert np.allclose(entry.embedding, known[name].embedding, atol=1e-6)
        assert entry.subject == f"p{int(name[1:]) % 9}"

    async def each_is_there_once() -> bool:
        # What was asked for again has taken the place of the first one, which is erased.
        events = client.store.galleries.read(gallery_events(client.root))
        return len([1 async for one in events if ".entry." in one.subject]) == COUNT

    await until(each_is_there_once, 30)


async def test_a_broker_that_is_killed_loses_no_photo_and_doubles_none(
    tmp_path, root, worker, photos
):
    known: dict[str, m.EncodedFace] = {}
    async with (
        contextlib.AsyncExitStack() as again,
        contextlib.AsyncExitStack() as first,
        contextlib.AsyncExitStack() as opened,
    ):
        broker = await first.enter_async_context(running_broker(tmp_path))
        client = await opened.enter_async_context(connect(broker.url, name="t", root=root))
        await client.store.declare()
        await opened.enter_async_context(worker(encoder=PixelEncoder(), nats_url=broker.url))

        async def kill_and_come_back() -> None:
            await until(lambda: len(known) > COUNT // 3, 60)
            os.kill(broker.pid, signal.SIGKILL)
            await first.aclose()
            assert len(known) < COUNT
            await again.enter_async_context(running_broker(tmp_path))

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(kill_and_come_back())
            tasks.create_task(enrol_all(client, photos, known))
        await check(client, known)


async def test_a_replica_that_is_killed_loses_no_photo_and_doubles_none(
    client, settings, worker, photos
):
    known: dict[str, m.EncodedFace] = {}
    async with started(client, settings, {"embedder": "pixel32"}) as process:
        await until(lambda: answers(client), 30)
        async with worker(1, encoder=PixelEncoder()):
            whose: list[m.EncodedFace] = []

            async def kill() -> None:
                await until(lambda: len(known) > COUNT // 3, 60)
                process.kill()
                whose.extend(known.values())
                assert await process.wait() == -signal.SIGKILL

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(kill())
                tasks.create_task(enrol_all(client, photos, known))
            assert len(whose) < COUNT
            await check(client, known)

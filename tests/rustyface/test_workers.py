"""Work on images is done beside the event loop: one thread for each processor, bounded."""

import asyncio
import threading

import numpy as np
import psutil
import pytest

from bus import messages as m
from bus.errors import Overloaded
from bus.subjects import DATASET_MANAGE, FACES_DETECT, FACES_ENCODE, FACES_SEARCH, FACES_VERIFY
from bus.testing import until
from services.rustyface.photos import weights, workers
from services.rustyface.photos.encoder import Found, PixelEncoder
from services.rustyface.photos.workers import Workers
from tests.rustyface.nets import arcface


class Held(PixelEncoder):
    """Embeds whole pictures, but not before it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.began, self.go = threading.Event(), threading.Event()

    def _wait(self) -> None:
        self.began.set()
        assert self.go.wait(30)

    def encode(self, data: bytes, **more):
        self._wait()
        return super().encode(data, **more)

    def find(self, _data: bytes, **_more):
        self._wait()
        return Found(1, 1, [])


@pytest.mark.parametrize("way", ["encode", "search", "detect", "verify"])
async def test_while_a_photo_is_worked_on_others_are_answered(client, worker, picture, way):
    held, image = Held(), picture("astronaut")
    side = m.FaceSide(image_base64=image)
    asks = {
        "encode": (FACES_ENCODE, m.EncodeFace(image_base64=image, persist=False)),
        "search": (FACES_SEARCH, m.SearchFaces(image_base64=image)),
        "detect": (FACES_DETECT, m.DetectFaces(image_base64=image)),
        "verify": (FACES_VERIFY, m.VerifyFaces(a=side, b=side)),
    }
    async with worker(encoder=held):
        asked = asyncio.create_task(client.call(*asks[way], timeout_s=60))
        try:
            await until(held.began.is_set)
            for _ in range(20):
                listed = await client.call(DATASET_MANAGE, m.ManageDataset(action="list"))
                assert [one.id for one in listed.datasets] == ["default"]
            assert not asked.done()
        finally:
            held.go.set()
        await asked


async def test_there_are_as_many_threads_as_processors_that_it_may_use(monkeypatch):
    """By the control group, too: where it may use three of sixty-four, they are three."""
    monkeypatch.setattr(workers, "allowed", lambda: (3.5, 1 << 30))
    pool, go, inside = Workers(99), threading.Event(), threading.Semaphore(0)
    begun = []

    def work() -> None:
        begun.append(threading.current_thread())
        inside.release()
        assert go.wait(30)

    working = [asyncio.create_task(pool.run(work)) for _ in range(10)]
    for _ in range(3):
        assert await asyncio.to_thread(inside.acquire, timeout=30)
    assert not await asyncio.to_thread(inside.acquire, timeout=0.3)
    assert pool.waiting == 10
    go.set()
    await asyncio.gather(*working)
    assert len(begun) == 10
    assert len(set(begun)) == 3
    pool.close()


@pytest.mark.parametrize("processors", [0.25, 1.0])
async def test_less_than_a_processor_is_one_thread(monkeypatch, processors):
    monkeypatch.setattr(workers, "allowed", lambda: (processors, 1 << 30))
    pool = Workers(9)
    assert await asyncio.gather(*(pool.run(threading.get_ident) for _ in range(5)))
    assert pool._threads._max_workers == 1
    pool.close()


async def test_what_is_refused_leaves_no_place_taken():
    pool, go = Workers(1), threading.Event()
    working = asyncio.create_task(pool.run(lambda: go.wait(30)))
    await until(lambda: pool.waiting == 1)
    for _ in range(3):
        with pytest.raises(Overloaded, match="1 images wait .* max_waiting allows 1"):
            await pool.run(lambda: None)
    go.set()
    assert await working
    assert await pool.run(lambda: 7) == 7
    assert pool.waiting == 0
    pool.close()


def test_a_net_runs_in_the_thread_that_asks_it_and_in_no_other():
    session = weights.open_session(arcface())
    options = session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)
    # The plans that it would keep for each size of its input grow with the sizes.
    assert not options.enable_mem_pattern
    before = psutil.Process().num_threads()
    session.run(None, {"picture": np.zeros((1, 3, 112, 112), np.float32)})
    assert psutil.Process().num_threads() <= before

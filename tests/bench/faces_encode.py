"""Images per second and the memory of a worker: our pipeline beside OpenCV's own."""

import asyncio
import base64
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Final

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

from bus import codec
from bus.client import Client
from bus.errors import Unprocessable
from bus.subjects import FACES_ENCODE
from services.rustyface import samples
from tests.bench.faces_platform import FOLDER, ask_child, empty_broker, rustyface
from tests.bench.memory import Trend, trend
from tests.bench.processes import Server
from tests.bench.running import ServerFailed

Image = npt.NDArray[np.uint8]

SIZE: Final = (640, 480)
CALLERS: Final = (1, 4, 16)
THREADS: Final = (1, 2)
# Pictures of the memory's part: their longer side, in pixels.
SIDE_MIN: Final = 48
SIDE_MAX: Final = 2_000
_CHILD: Final = "tests.bench.peers.encode_faces"
_JPEG: Final = (cv2.IMWRITE_JPEG_QUALITY, 90)
_SAMPLES: Final = 200
_TIMEOUT_S: Final = 60.0
_SEED: Final = 20_260_101


class Encoded(msgspec.Struct, frozen=True, kw_only=True):
    """Images per second of one way to embed a photo of 640 x 480 pixels with one face.

    Attributes:
        way: `opencv` or `ours`, in one process; `json` or `msgpack`: the product.
        side_by_side: Threads, or callers of the product.
        per_s: Images per second, the median over the rounds.
        cpu_ms: Processor time for each; of the product, the worker's.
        p50_ms: Of the product: half of the answers took no longer.
        p99_ms: 99 % of them.
    """

    way: str
    side_by_side: int
    per_s: float
    cpu_ms: float
    p50_ms: float | None = None
    p99_ms: float | None = None


class Steady(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker's memory did over many images of changing sizes.

    Attributes:
        images: How many.
        per_s: How many a second.
        faces: In how many of them there was a face.
        trend: Over the images; its slope is for 1,000 of them.
    """

    images: int
    per_s: float
    faces: int
    trend: Trend


def encode(seconds: int, rounds: int, say: Callable[[str], None]) -> list[Encoded]:
    """Embed one photo again and again in every way, in turn, so that all have the same machine.

    Args:
        seconds: How long each time.
        rounds: How often.
        say: Is told how far it is.

    Raises:
        ServerFailed: One of them did not run.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    photo = FOLDER / "photo.jpg"
    photo.write_bytes(_as_jpeg(_photo()))
    found: list[Encoded] = []
    for number in range(rounds):
        say(f"encode, round {number + 1} of {rounds}")
        for threads in THREADS:
            for way in ("opencv", "ours"):
                told = ask_child(
                    sys.executable, _CHILD, way, threads, photo, FOLDER / "weights", seconds
                )
                found.append(Encoded(way=way, side_by_side=threads, **told))
        found += asyncio.run(_through_the_product(photo.read_bytes(), seconds))
    return medians(found)


def steady(images: int, say: Callable[[str], None]) -> Steady:
    """Send a worker images of changing sizes, and watch its memory.

    Raises:
        ServerFailed: It did not start, or did not answer.
    """
    return asyncio.run(_steady(images, say))


def medians(found: list[Encoded]) -> list[Encoded]:
    """Return the median of each way over the rounds."""
    grouped: dict[tuple[str, int], list[Encoded]] = {}
    for one in found:
        grouped.setdefault((one.way, one.side_by_side), []).append(one)
    return [
        Encoded(
            way=way,
            side_by_side=number,
            per_s=median(one.per_s for one in group),
            cpu_ms=median(one.cpu_ms for one in group),
            p50_ms=_median([one.p50_ms for one in group]),
            p99_ms=_median([one.p99_ms for one in group]),
        )
        for (way, number), group in grouped.items()
    ]


async def _through_the_product(photo: bytes, seconds: int) -> list[Encoded]:
    """Return what each way of asking and each number of callers comes to, over NATS."""
    found = []
    async with empty_broker("encode") as (broker, client), rustyface(broker, client) as server:
        for way, (body, kind) in _requests(photo).items():
            await _ask(client, body, kind)
            found += [
                await _window(client, server, way, body, kind, callers, seconds)
                for callers in CALLERS
            ]
    return found


async def _window(
    client: Client, server: Server, way: str, body: bytes, kind: str, callers: int, seconds: int
) -> Encoded:
    took_ms: list[float] = []
    used_s = sum(server.cpu_s().values())
    began = time.perf_counter()

    async def keep_asking() -> None:
        while (asked := time.perf_counter()) - began < seconds:
            await _ask(client, body, kind)
            took_ms.append(1e3 * (time.perf_counter() - asked))

    async with asyncio.TaskGroup() as tasks:
        for _ in range(callers):
            tasks.create_task(keep_asking())
    passed_s = time.perf_counter() - began
    used_s = sum(server.cpu_s().values()) - used_s
    return Encoded(
        way=way,
        side_by_side=callers,
        per_s=len(took_ms) / passed_s,
        cpu_ms=1e3 * used_s / len(took_ms),
        p50_ms=float(np.percentile(took_ms, 50)),
        p99_ms=float(np.percentile(took_ms, 99)),
    )


async def _ask(client: Client, body: bytes, kind: str) -> None:
    await client.relay(
        FACES_ENCODE.subject(client.root),
        body,
        headers={codec.CONTENT_TYPE: kind},
        timeout_s=_TIMEOUT_S,
    )


def _requests(photo: bytes) -> dict[str, tuple[bytes, str]]:
    """Return the request with the photo in each of the two formats, and its content type."""
    text = {"image_base64": base64.b64encode(photo).decode(), "persist": False}
    packed = {"image": photo, "persist": False}
    return {
        "json": (codec.encode(text), codec.JSON),
        "msgpack": (codec.encode(packed, codec.MSGPACK), codec.MSGPACK),
    }


async def _steady(count: int, say: Callable[[str], None]) -> Steady:
    points: list[tuple[float, float]] = []
    faces, every = 0, max(1, count // _SAMPLES)
    side_by_side = asyncio.Semaphore(2 * (os.cpu_count() or 1))
    async with empty_broker("memory") as (broker, client), rustyface(broker, client) as server:

        async def send(picture: bytes) -> None:
            nonlocal faces
            try:
                body = codec.encode(
                    {"image": picture, "persist": False, "quality": "off"}, codec.MSGPACK
                )
                await _ask(client, body, codec.MSGPACK)
                faces += 1
            except Unprocessable:
                # Too small for a face.
                pass
            finally:
                side_by_side.release()

        began = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for number, picture in enumerate(_pictures(count)):
                await side_by_side.acquire()
                tasks.create_task(send(picture))
                if number % every == 0:
                    if server.ended:
                        raise ServerFailed(f"rustyface ended: {server.last_words()}")
                    points.append((float(number), sum(server.memory_mib().values())))
                    say(f"memory: {number} of {count} images, {points[-1][1]:.0f} MiB")
        took_s = time.perf_counter() - began
    return Steady(
        images=count,
        per_s=count / took_s,
        faces=faces,
        trend=trend("rustyface", points, per=1_000),
    )


def _pictures(count: int) -> Iterator[bytes]:
    """Give JPEG files of the astronaut in ever other sizes and shapes, the same on every run."""
    random = np.random.default_rng(_SEED)
    whole = _astronaut()
    for _ in range(count):
        # As many small ones as large ones, as a logarithm.
        side = float(np.exp(random.uniform(np.log(SIDE_MIN), np.log(SIDE_MAX))))
        shape = random.uniform(0.5, 1.0)
        size = (round(side), max(1, round(side * shape)))
        if random.random() < 0.5:
            size = size[::-1]
        yield _as_jpeg(_filled(whole, size))


def _photo() -> Image:
    return _filled(_astronaut(), SIZE)


def _filled(image: Image, size: tuple[int, int]) -> Image:
    """Return the middle of an image that has the shape of a size, in that size."""
    height, width = image.shape[:2]
    scale = min(width / size[0], height / size[1])
    across, down = max(1, int(size[0] * scale)), max(1, int(size[1] * scale))
    # From the top: that is where the face is.
    left = (width - across) // 2
    part = image[:down, left : left + across]
    return np.asarray(cv2.resize(part, size, interpolation=cv2.INTER_AREA), np.uint8)


def _astronaut() -> Image:
    path = Path(next(iter(samples.__path__))) / "astronaut.jpg"
    return np.asarray(cv2.imread(str(path)), np.uint8)


def _as_jpeg(image: Image) -> bytes:
    done, buffer = cv2.imencode(".jpg", image, _JPEG)
    if not done:
        raise ValueError(f"OpenCV writes no JPEG of {image.shape}")
    return bytes(buffer)


def _median(values: list[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return median(there) if there else None

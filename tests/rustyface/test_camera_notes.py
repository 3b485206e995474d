"""What a camera noted of place and maker: used to turn the picture, and then kept nowhere."""

import asyncio
import base64
import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from bus import codec
from bus import messages as m
from bus.broker import running_broker
from bus.client import connect
from bus.subjects import (
    DATASET_MANAGE,
    FACES_DETECT,
    FACES_ENCODE,
    FACES_SEARCH,
    FACES_SHEET,
    FACES_VERIFY,
)
from bus.testing import until
from tests.rustyface.files import SECRETS, encoded, exif_of, tiff, with_exif

# Three letters stand in any large file by chance.
NOTES = tuple(one for one in SECRETS if len(one) > 3)
HELD_TO_THE_LEFT = 6


@pytest.fixture
def photos(photo) -> dict[str, bytes]:
    """The astronaut as phones write her, lying on her side, with all that they note beside it."""
    lying = np.ascontiguousarray(np.rot90(photo("astronaut"), 1))
    exif = exif_of(HELD_TO_THE_LEFT)
    files = {
        "jpeg": with_exif(encoded(".jpg", lying), exif),
        "png": with_exif(encoded(".png", lying), exif),
        "webp": with_exif(encoded(".webp", lying, cv2.IMWRITE_WEBP_QUALITY, 90), exif),
        "tiff": tiff(lying, orientation=HELD_TO_THE_LEFT) + exif,
    }
    assert all(any(note in data for note in NOTES) for data in files.values())
    return files


@pytest.fixture
async def url(tmp_path):
    """Of a broker whose files lie in ``tmp_path``, as those of the worker do."""
    async with running_broker(tmp_path) as broker:
        yield broker.url


@pytest.fixture
async def client(url, root):
    async with connect(url, name="test", root=root) as one:
        await one.store.declare()
        yield one


def files_with(folder: Path, *needles: bytes) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if any(one in path.read_bytes() for one in needles)]


async def ask(client, endpoint, request):
    answer = await client.relay(
        endpoint.subject(client.root),
        codec.encode(request, codec.MSGPACK),
        headers={codec.CONTENT_TYPE: codec.MSGPACK},
        timeout_s=60,
    )
    return codec.decode(answer.body, endpoint.reply, codec.MSGPACK)


async def exported(client, dataset: str) -> bytes:
    started = await ask(client, DATASET_MANAGE, m.ManageDataset(action="export", dataset=dataset))

    async def is_done() -> bool:
        return (await client.store.jobs.get(started.job.job)).value.state == "done"

    await until(is_done, 60)
    result = (await client.store.jobs.get(started.job.job)).value.gallery_result
    return b"".join([block async for block in client.store.faces.read(result.artefact)])


async def test_no_file_sheet_export_or_log_holds_what_a_camera_noted(
    client, url, worker, photos, tmp_path
):
    """Byte by byte in all that the broker and the worker have written, images being kept."""
    async with worker(nats_url=url):
        settings = m.DatasetSettings(keep_images=True)
        configure = m.ManageDataset(action="configure", dataset="default", settings=settings)
        await ask(client, DATASET_MANAGE, configure)
        for name, data in photos.items():
            made = await ask(
                client, FACES_ENCODE, m.EncodeFace(image=data, entry_id=name, subject="Eileen")
            )
            # It was turned: lying on her side she is not found so surely, and is not upright.
            (face,) = made.faces
            assert abs(face.quality["roll"]) < 15
        entries = m.ManageDataset(action="entries", dataset="default")
        listed = (await ask(client, DATASET_MANAGE, entries)).entries
        assert {one.id for one in listed} == photos.keys()
        photo = photos["jpeg"]
        told = [
            await ask(client, FACES_DETECT, m.DetectFaces(image=photo)),
            await ask(client, FACES_SEARCH, m.SearchFaces(image=photo)),
            await ask(
                client,
                FACES_VERIFY,
                m.VerifyFaces(a=m.FaceSide(image=photo), b=m.FaceSide(image=photos["png"])),
            ),
        ]
        assert told[1].subject == "Eileen"
        assert told[2].same
        sheets = []
        for form in ("html", "png"):
            for image in (None, photo):
                sheet = m.DrawSheet(dataset="default", image=image, format=form)
                sheets.append((await ask(client, FACES_SHEET, sheet)).body)
        file = await exported(client, "default")
        kept = [
            b"".join([block async for block in client.store.faces.read(one.image)])
            for one in listed
        ]
        records = repr(await client.store.logs(None, limit=1_000)).encode()
    # The thumbnails of a page are coded.
    pictures = [
        base64.b64decode(one)
        for page in sheets[:2]
        for one in re.findall(rb'src="data:image/jpeg;base64,(.*?)"', page)
    ]
    # Of each entry one; the photo that was searched for, its face, and that of the best match.
    assert len(pictures) == len(photos) + 3
    answers = [codec.encode(one, codec.MSGPACK) for one in told]
    for body in (*sheets, *pictures, file, *kept, *answers, records):
        assert not any(note in body for note in NOTES)
    # What lies in the broker's files can be found there: a piece of the middle of each image.
    for body in kept:
        middle = len(body) // 2
        assert files_with(tmp_path, body[middle : middle + 48])
    assert await asyncio.to_thread(files_with, tmp_path, *NOTES) == []

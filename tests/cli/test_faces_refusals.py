"""`bkg faces` where the broker refuses to erase; for good, so apart from the others' worker."""

import asyncio
from pathlib import Path
from typing import Any

from bus import codec
from bus import messages as m
from bus.client import Client
from bus.subjects import FACES_ENCODE
from services.rustyface import samples
from tests.bus.damage import denying

PHOTO = Path(next(iter(samples.__path__))) / "astronaut.jpg"


async def test_what_is_deleted_but_not_erased_is_said(faces: Any, worker: Client, dataset: str):
    photo = await asyncio.to_thread(PHOTO.read_bytes)
    for entry in ("e1", "e2", "e3"):
        ask = m.EncodeFace(image=photo, dataset=dataset, entry_id=entry, subject=entry)
        await worker.call(FACES_ENCODE, ask, content_type=codec.MSGPACK)
    await denying(worker, f"{worker.root}-galleries")
    told = (await faces("rm", dataset, "--entry", "e1", "--yes")).out
    assert told.startswith("the entry e1 is gone: 1 entry\ngone for every question, but not erased")
    told = (await faces("rm", dataset, "--person", "e2", "--yes", "--json")).json
    assert told["unerased"] == 1
    assert "message delete not permitted" in told["warnings"][0]
    told = (await faces("delete", dataset, "--yes")).out
    assert f"\n{dataset} is deleted\ngone for every question, but not erased" in told

"""A dataset embedded anew while it is changed: the new one is as the old one is at the end."""

import asyncio
import contextlib
import dataclasses
import hashlib
import itertools
import threading

import cv2
import msgspec
import numpy as np
import pytest

from bus import messages as m
from bus.errors import NotFound
from bus.testing import until
from services.rustyface.galleries.galleries import NewEntry, Query
from services.rustyface.photos.embedding import Pixel32
from services.rustyface.photos.images import decode
from services.rustyface.transfers.reembed import Reembed

EAST = np.array([1, 0], np.float32)
WORK = m.GalleryWork(action="reembed", dataset="old", into="new", by="me")
JOB = m.Job(job="j1", gallery=WORK, kind="gallery", created_at=m.now(), updated_at=m.now())


class Pixels:
    """Embeds whole pictures, really; can be held up before the first one."""

    name, digest, dimensions = "pixel32", Pixel32.digest, 1024

    def __init__(self) -> None:
        self.began, self.let_go = threading.Event(), threading.Event()
        self.embedded: list[str] = []

    def encode(self, data: bytes):
        self.embedded.append(hashlib.sha256(data).hexdigest())
        self.began.set()
        assert self.let_go.wait(30)
        return Pixel32().embed([decode(data)])[0], []


@pytest.fixture
async def images(client, photo, tmp_path) -> list[str]:
    """Digests of ten pieces of a photo, which are stored."""
    digests = []
    for i in range(10):
        path = tmp_path / f"{i}.png"
        piece = photo("astronaut")[40 * i : 40 * i + 64, 100:164]
        path.write_bytes(cv2.imencode(".png", piece)[1].tobytes())
        digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
        await client.store.faces.put(digests[-1], path)
    return digests


@pytest.fixture
async def old(replica, images):
    """A dataset of an embedder of before: four entries of ann, four of bob."""
    async with replica() as before:
        await before.create("old", settings=m.DatasetSettings(scoring="best", threshold=0.7))
        entries = [
            NewEntry(id=f"{name}{i}", vector=EAST, subject=name, image=images[i + start])
            for name, start in (("ann", 0), ("bob", 4))
            for i in range(4)
        ]
        await before.enrol_many("old", entries, existing="fail")
        yield before


@contextlib.asynccontextmanager
async def embedding(client, galleries, pixels):
    """Inside, the job has begun and waits."""
    job = Reembed(client.store.faces, galleries, pixels)
    carried = asyncio.create_task(job.carry(JOB, WORK, lambda *_: None))
    try:
        await until(lambda: pixels.began.is_set() or carried.done())
        yield carried
    finally:
        pixels.let_go.set()
        await asyncio.gather(carried, return_exceptions=True)


@pytest.fixture
async def today(replica):
    async with replica(embedder="pixel32", dimensions=1024, digest=Pixel32.digest) as galleries:
        yield galleries


def told(galleries, dataset: str) -> dict[str, tuple[str | None, str | None]]:
    entries = galleries.picked(dataset, galleries.ids(dataset))
    return {one.id: (one.subject, one.image) for one in entries}


async def test_what_is_changed_meanwhile_is_in_the_new_dataset_as_it_is_at_the_end(
    client, old, today, images
):
    pixels = Pixels()
    async with embedding(client, today, pixels) as carried:
        await old.move_subjects("old", ["ann"], "anna", fresh=True)
        await old.move_entry("old", "bob0", "anna")
        await old.enrol("old", NewEntry(id="bob1", vector=EAST, subject="bob", image=images[8]))
        await old.enrol("old", NewEntry(id="late", vector=EAST, subject="eve", image=images[9]))
        await old.enrol("old", NewEntry(id="bob2", vector=EAST, subject="bob"))
        await old.remove("old", "bob3")
        pixels.let_go.set()
        done = await carried
    await today.wait(await today.newest())
    expected = told(old, "old")
    # Its new photo was not kept, and its old one is not it any more.
    assert expected.pop("bob2") == ("bob", None)
    assert told(today, "new") == expected
    assert (done.entries, done.added, done.skipped) == (8, 7, 1)
    assert done.failed == ["bob2: its image was not kept"]
    # Nothing was embedded twice: a name needs no new vector.
    assert len(pixels.embedded) == len(set(pixels.embedded)) == 10
    data = b"".join([block async for block in client.store.faces.read(images[8])])
    found = await today.search(
        "new",
        Query(vector=Pixel32().embed([decode(data)])[0], k=1, threshold=0.999, revision=None),
    )
    assert [one.entry.id for one in found.matches] == ["bob1"]


async def test_metadata_with_a_number_that_is_none_do_not_keep_it_from_ending(
    client, old, today, images
):
    odd = NewEntry(id="odd", vector=EAST, image=images[9], metadata={"n": float("nan")})
    await old.enrol("old", odd)
    async with embedding(client, today, pixels := Pixels()) as carried:
        pixels.let_go.set()
        assert (await carried).added == 9


async def test_settings_and_rejected_entries_come_along_but_no_threshold(client, old, today):
    of_entry, _ = await old.reject("old", "ann", entry="bob0")
    of_face, _ = await old.reject("old", "bob", vector=EAST)
    of_photo, _ = await old.reject("old", "ann", entry="bob1")
    # Another photo, of which nobody has said anything.
    north = np.array([0, 1], np.float32)
    [bob1] = old.picked("old", ["bob1"])
    await old.enrol("old", NewEntry(id="bob1", vector=north, subject="bob", image=bob1.image))
    for _ in range(2):
        # Taken up again after its last step, it says nothing twice.
        async with embedding(client, today, pixels := Pixels()) as carried:
            pixels.let_go.set()
            done = await carried
    [there] = today.rejections("new")
    assert (there.id, there.subject, there.entry) == (of_entry, "ann", "bob0")
    [bob0] = today.picked("new", ["bob0"], embeddings=True)
    assert there.vector.tolist() == pytest.approx(bob0.embedding, abs=1e-6)
    assert await today.settings("new") == m.DatasetSettings(scoring="best", threshold=None)
    assert (done.rejections, done.settings) == (1, "taken")
    [note] = done.notes
    assert note.startswith("threshold, 0.7, was left behind: cosines of pixel32 mean something")
    assert sorted(done.failed) == sorted([
        f"rejection {of_face}: its face is no entry and has no photo; reject it again",
        f"rejection {of_photo}: bob1 has another photo by now; reject it again",
    ])  # fmt: skip


async def test_thresholds_come_along_where_the_embedder_is_the_same(client, today, images):
    thresholds = m.DatasetSettings(threshold=0.7, verify_threshold=0.6)
    await today.create("old", settings=thresholds)
    faces = np.ones(1024, np.float32)
    await today.enrol("old", NewEntry(id="a", vector=faces, subject="ann", image=images[0]))
    async with embedding(client, today, pixels := Pixels()) as carried:
        pixels.let_go.set()
        assert (await carried).notes == []
    assert await today.settings("new") == thresholds


async def test_a_dataset_that_is_there_without_entries_is_filled_and_stays_set_as_it_is(
    client, old, today
):
    pixels = Pixels()
    pixels.let_go.set()
    await today.create("new", settings=m.DatasetSettings(scoring="mean", threshold=0.2))
    done = await Reembed(client.store.faces, today, pixels).carry(JOB, WORK, lambda *_: None)
    assert (done.added, done.settings, done.notes) == (8, "kept", [])
    assert (await today.settings("new")).threshold == 0.2


async def test_a_new_dataset_that_is_deleted_while_nobody_makes_it_does_not_come_back(
    client, old, today
):
    pixels = Pixels()
    pixels.let_go.set()
    work = Reembed(client.store.faces, today, pixels)
    await work.carry(JOB, WORK, lambda *_: None)
    await today.delete("new")
    cut_short = msgspec.structs.replace(JOB, entries=8)
    with pytest.raises(NotFound, match="'new' that this job had made was deleted meanwhile"):
        await work.carry(cut_short, WORK, lambda *_: None)
    assert "new" not in today
    # Somebody else's of that name is not what it had made.
    await today.create("new")
    await today.delete("new")
    await work.carry(cut_short, WORK, lambda *_: None)
    assert len(today.ids("new")) == 8


async def test_what_somebody_has_put_into_the_new_dataset_stays_theirs(client, old, today):
    pixels = Pixels()
    mine = NewEntry(id="ann0", vector=np.ones(1024, np.float32), subject="me")
    async with embedding(client, today, pixels) as carried:
        await today.enrol("new", mine)
        await today.enrol("new", dataclasses.replace(mine, id="own"))
        pixels.let_go.set()
        await carried
    await today.wait(await today.newest())
    shown = told(today, "new")
    assert shown["own"] == shown["ann0"] == ("me", None)
    assert shown.keys() == {*told(old, "old"), "own"}


async def test_what_somebody_puts_there_in_the_moment_of_storing_stays_theirs(
    client, old, today, images, monkeypatch
):
    pixels, append, numbers = Pixels(), today._stream.append_batch, itertools.count(1)
    mine = NewEntry(id="ann0", vector=np.ones(1024, np.float32), subject="me")

    async def late(messages):
        match next(numbers):
            case 1:
                await today.enrol("new", mine)
                fresh = NewEntry(id="ann1", vector=EAST, subject="ann", image=images[8])
                await old.enrol("old", fresh)
            case 3:
                # That one is about to be stored again, with its new photo.
                await today.enrol("new", dataclasses.replace(mine, id="ann1"))
        return await append(messages)

    monkeypatch.setattr(today._stream, "append_batch", late)
    pixels.let_go.set()
    async with embedding(client, today, pixels) as carried:
        await carried
    await today.wait(await today.newest())
    shown = told(today, "new")
    assert shown.pop("ann0") == shown.pop("ann1") == ("me", None)
    assert len(shown) == 6
    assert next(numbers) > 3


async def test_what_somebody_enrols_as_the_old_one_s_entry_is_taken_out_stays_theirs(
    client, old, today, monkeypatch
):
    pixels, store, append = Pixels(), today._stream.append_batch, today._ledger.append_entry
    mine = NewEntry(id="bob3", vector=np.ones(1024, np.float32), subject="me")
    removed: list[str] = []

    async def and_remove(messages):
        seq = await store(messages)
        if not removed:
            removed.append("bob3")
            await old.remove("old", "bob3")
        return seq

    async def late(there, entry, *args: object, **more):
        if entry.embedding is None:
            monkeypatch.undo()
            await today.enrol("new", mine)
        return await append(there, entry, *args, **more)

    monkeypatch.setattr(today._stream, "append_batch", and_remove)
    monkeypatch.setattr(today._ledger, "append_entry", late)
    pixels.let_go.set()
    async with embedding(client, today, pixels) as carried:
        await carried
    await today.wait(await today.newest())
    assert told(today, "new")["bob3"] == ("me", None)

"""What was deleted is in no file of the broker: looked for byte by byte, where it was before."""

import asyncio
import contextlib
import os
import signal
from functools import partial

import numpy as np
import pytest

from bus import codec
from bus import messages as m
from bus.broker import running_broker
from bus.client import connect
from bus.errors import Unavailable
from bus.streams import Stream
from bus.subjects import GALLERY_ENTRY, gallery_events
from bus.tasks import beside
from bus.testing import until
from services.rustyface.galleries import clearing
from services.rustyface.galleries.galleries import NewEntry
from services.rustyface.galleries.projection import LITTLE_ENDIAN, Dead
from services.rustyface.photos.kept import KeptImages
from tests.rustyface.remains import FACE, OTHER, declared, reading, remains

# Three chunks of the object store; nothing in it repeats.
PHOTO = np.random.default_rng(7).bytes(300 * 1024)


def face(name: str, **more) -> NewEntry:
    return NewEntry(id=name, vector=FACE, **more)


@pytest.fixture
async def client(tmp_path):
    """Over a broker whose files lie in ``tmp_path``."""
    async with running_broker(tmp_path) as broker, declared(broker.url) as one:
        yield one


@pytest.fixture
async def galleries(client):
    async with reading(client) as one:
        await one.create("g")
        yield one


@pytest.fixture
def copies(tmp_path):
    """Counts the face in all files of the broker."""
    return partial(remains, tmp_path)


@pytest.fixture
def pieces(tmp_path):
    """Counts in all files of the broker the pieces of the photo, one for each of its chunks."""
    needles = [PHOTO[at : at + 64] for at in (1_000, 140 * 1024, 290 * 1024)]
    return lambda: sum(remains(tmp_path, needle) for needle in needles)


@pytest.fixture
def fail_thrice(monkeypatch):
    """Makes the next three deletions of messages fail; nobody waits long for them."""

    def begin() -> None:
        remove, failures = Stream.remove, iter([Unavailable("the broker is away")] * 3)

        async def failing(self, seq, *, erase=False):
            for failure in failures:
                raise failure
            await remove(self, seq, erase=erase)

        monkeypatch.setattr(clearing, "PATIENT_S", 0.01)
        monkeypatch.setattr(clearing, "PAUSE_S", 0.01)
        monkeypatch.setattr(Stream, "remove", failing)

    return begin


async def nobody(_image) -> bool:
    """Say that no entry names an image."""
    return False


async def removed(galleries) -> None:
    await galleries.enrol("g", face("a", subject="ann"))
    await galleries.remove("g", "a")


async def removed_with_the_person(galleries) -> None:
    await galleries.enrol("g", face("a", subject="ann"))
    await galleries.enrol("g", face("b", subject="ann"))
    await galleries.remove_subject("g", "ann")


async def removed_after_it_was_moved(galleries) -> None:
    await galleries.enrol("g", face("a", subject="ann"))
    for name in ("bob", "cat", "dan"):
        await galleries.move_entry("g", "a", name)
    await galleries.remove_subject("g", "dan")


async def replaced(galleries) -> None:
    await galleries.enrol("g", face("a"))
    await galleries.enrol("g", NewEntry(id="a", vector=OTHER))


async def replaced_in_one_batch(galleries) -> None:
    await galleries.enrol_many("g", [face("a"), face("b")], existing="skip")
    new = [NewEntry(id=name, vector=OTHER) for name in "ab"]
    await galleries.enrol_many("g", new, existing="replace")


async def gone_with_the_dataset(galleries) -> None:
    await galleries.enrol("g", face("a", subject="ann"))
    await galleries.enrol("g", NewEntry(id="b", vector=OTHER, subject="bob"))
    await galleries.reject("g", "bob", entry="a")
    await galleries.delete("g")


async def gone_with_the_import(galleries) -> None:
    record = m.GalleryImport(id="i1", at=m.now(), source="f", format="json")
    await galleries.begin_import("g", record)
    brought = [face(name, imported="i1") for name in "ab"]
    await galleries.enrol_many("g", brought, existing="skip")
    await galleries.undo_import("g", "i1")


async def a_rejection_withdrawn(galleries) -> None:
    await galleries.enrol("g", NewEntry(id="b", vector=OTHER, subject="bob"))
    rejection, _ = await galleries.reject("g", "bob", vector=FACE)
    await galleries.withdraw("g", rejection)


async def a_rejection_without_its_face(galleries) -> None:
    await galleries.enrol("g", NewEntry(id="b", vector=OTHER, subject="bob"))
    await galleries.enrol("g", face("a"))
    await galleries.reject("g", "bob", entry="a")
    await galleries.remove("g", "a")


@pytest.mark.parametrize(
    "deletion",
    [
        removed,
        removed_with_the_person,
        removed_after_it_was_moved,
        gone_with_the_dataset,
        gone_with_the_import,
        a_rejection_withdrawn,
        a_rejection_without_its_face,
    ],
)
async def test_a_deleted_face_is_in_no_file_when_the_answer_comes(galleries, copies, deletion):
    # Beside it in the same block, so that no file goes away as a whole.
    await galleries.enrol("g", NewEntry(id="stays", vector=OTHER))
    await galleries.create("other")
    await galleries.enrol("other", NewEntry(id="stays", vector=OTHER))
    await galleries.enrol("other", face("probe"))
    assert copies() == 1
    await galleries.remove("other", "probe")
    await deletion(galleries)
    assert copies() == 0


@pytest.mark.parametrize("replacement", [replaced, replaced_in_one_batch])
async def test_a_replaced_face_is_in_no_file_soon_after(galleries, copies, replacement):
    await replacement(galleries)
    await until(lambda: copies() == 0)


async def test_a_face_that_is_replaced_faster_than_erased_is_in_no_file_once_that_has_caught_up(
    galleries, copies, monkeypatch
):
    """What the broker displaces nobody can erase any more."""
    remove, free = Stream.remove, asyncio.Event()

    async def held(self, seq, *, erase=False):
        await free.wait()
        await remove(self, seq, erase=erase)

    monkeypatch.setattr(Stream, "remove", held)
    for _ in range(30):
        await galleries.enrol("g", face("a"))
    await galleries.wait(await galleries.enrol("g", NewEntry(id="a", vector=OTHER)))
    assert copies() == 30
    free.set()
    await until(lambda: copies() == 0)


async def test_what_was_cut_short_before_it_was_erased_the_next_worker_erases(client, copies):
    async with reading(client) as galleries:
        await galleries.create("g")
        await galleries.enrol("g", face("a"))
    tombstone = codec.encode(m.GalleryEntry(id="a", at=m.now()))
    subject = GALLERY_ENTRY.subject(client.root, gallery="g", entry="a")
    await client.store.galleries.append(subject, tombstone)
    assert copies() == 1
    async with reading(client):
        assert copies() == 0


async def test_what_one_replica_replaces_the_others_leave_to_it(client, copies, monkeypatch):
    async with reading(client) as one, reading(client) as other:
        await one.create("g")
        asked = []
        remove = Stream.remove

        async def counted(self, seq, *, erase=False):
            asked.append(seq)
            await remove(self, seq, erase=erase)

        monkeypatch.setattr(Stream, "remove", counted)
        first = await one.enrol("g", face("a"))
        await other.wait(await one.enrol("g", NewEntry(id="a", vector=OTHER)))
        await until(lambda: copies() == 0)
        assert asked == [first]


async def test_nobody_comes_back_whose_place_was_taken_by_somebody_who_is_removed(
    client, copies, monkeypatch
):
    """The replica that erases what was replaced is not there; the other one removes the person."""
    async with reading(client) as one, reading(client) as other:
        await one.create("g")
        monkeypatch.setattr(one._ledger._clearing, "put", lambda *_args, **_more: None)
        await one.enrol("g", face("a", subject="ann"))
        revision = await one.enrol("g", NewEntry(id="a", vector=OTHER, subject="bob"))
        await other.wait(revision)
        assert copies() == 1
        await other.remove_subject("g", "bob")
        assert copies() == 0
        async with reading(client) as new:
            assert new.ids("g") == other.ids("g") == []


async def test_what_could_not_be_erased_is_tried_again(galleries, client, copies, fail_thrice):
    fail_thrice()
    await removed_with_the_person(galleries)
    assert galleries.ids("g") == []
    await until(lambda: copies() == 0)
    left = [one.subject async for one in client.store.galleries.read(gallery_events(client.root))]
    assert not [one for one in left if ".entry." in one]


async def test_what_the_first_try_at_the_start_has_left_is_erased_later(
    client, copies, fail_thrice
):
    async with reading(client) as galleries:
        await galleries.create("g")
        await galleries.enrol("g", face("a"))
    subject = GALLERY_ENTRY.subject(client.root, gallery="g", entry="a")
    await client.store.galleries.append(subject, codec.encode(m.GalleryEntry(id="a", at=m.now())))
    fail_thrice()
    async with reading(client):
        await until(lambda: copies() == 0)


async def test_a_kept_image_that_nobody_needs_is_in_no_file(client, pieces):
    kept = KeptImages(client.store.faces)
    digest = await kept.keep(PHOTO)
    # Beside it in the same block, so that no file goes away as a whole.
    other = await kept.keep(PHOTO[::-1])
    assert pieces() == 3
    await kept.drop(digest, nobody)
    assert pieces() == 0
    assert await client.store.faces.size(other) == len(PHOTO)


async def test_of_an_image_kept_twice_no_second_copy_stays_in_a_file(client, pieces):
    kept = KeptImages(client.store.faces)
    digest = await kept.keep(PHOTO)
    assert await kept.keep(PHOTO) == digest
    assert pieces() == 3


async def test_an_upload_of_a_photo_that_broke_off_is_in_no_file(client, pieces):
    faces = client.store.faces
    async with faces.writing() as upload:
        await upload.write(PHOTO)
        await until(lambda: pieces() >= 2)
    assert pieces() == 0
    async with faces.writing() as upload:
        await upload.write(PHOTO)
        await upload.keep()
    await faces.discard(upload.id)
    assert pieces() == 0


async def test_a_model_that_is_deleted_costs_no_erasing(client, pieces):
    kept = []
    for photo in (PHOTO, PHOTO[::-1]):
        async with client.store.artefacts.writing() as upload:
            await upload.write(photo)
            kept.append((await upload.commit()).digest)
    await client.store.artefacts.delete(kept[0])
    assert pieces() == 3


async def test_whoever_replaces_many_entries_waits_for_the_erasing(galleries, monkeypatch):
    monkeypatch.setattr(clearing, "BEHIND_MAX", 10)
    remove, free = Stream.remove, asyncio.Event()

    async def held(self, seq, *, erase=False):
        await free.wait()
        await remove(self, seq, erase=erase)

    monkeypatch.setattr(Stream, "remove", held)
    many = [face(f"e{i}") for i in range(20)]
    await galleries.enrol_many("g", many, existing="skip")
    await galleries.enrol_many("g", many, existing="replace")
    await galleries.wait(await galleries.newest())
    waiting = asyncio.create_task(galleries.enrol_many("g", many, existing="replace"))
    # What is new takes nobody's place.
    revision = (await galleries.enrol_many("g", [face("new")], existing="skip")).revision
    assert await galleries.newest() == revision
    assert not waiting.done()
    free.set()
    assert (await waiting).replaced == 20


async def test_half_an_import_that_a_killed_broker_has_is_in_no_file_when_it_is_back(
    tmp_path, copies
):
    # In this order: nats-py never ends where it is closed while it looks for its broker.
    async with contextlib.AsyncExitStack() as brokers, contextlib.AsyncExitStack() as opened:
        broker = await brokers.enter_async_context(running_broker(tmp_path))
        client = await opened.enter_async_context(connect(broker.url, name="test", root="r"))
        await client.store.declare()
        await client._nc.publish(
            GALLERY_ENTRY.subject("r", gallery="g", entry="a"),
            FACE.astype(LITTLE_ENDIAN).tobytes(),
            headers={"Nats-Batch-Id": "half", "Nats-Batch-Sequence": "1"},
        )
        await until(lambda: copies() == 1)
        os.kill(broker.pid, signal.SIGKILL)
        await brokers.aclose()
        assert copies() == 1
        await brokers.enter_async_context(running_broker(tmp_path))
        assert copies() == 0


async def test_an_image_that_an_entry_names_again_meanwhile_is_left(client):
    images: dict[str, int] = {}
    gone: list[str] = []

    async def drop(digest, _named) -> None:
        gone.append(digest)
        # While this one is being erased the other is enrolled again.
        images.update({"a": 1, "b": 1})

    dead = [Dead("g", seq, image=image) for seq, image in ((1, "a"), (2, "b"))]
    made = clearing.Clearing(client.store.galleries, client.root, images, nobody, drop)
    async with beside(made.run()):
        await made.clear(dead)
        await made.done()
    assert len(gone) == 1


async def test_what_cannot_be_erased_in_time_is_deleted_all_the_same(client, pieces):
    kept = KeptImages(client.store.faces)
    digest = await kept.keep(PHOTO)
    await kept.keep(PHOTO[::-1])
    assert await client.store.faces.delete(digest, erase_s=0)
    assert await client.store.faces.size(digest) is None
    assert not await client.store.faces.unfinished()
    assert pieces() == 3

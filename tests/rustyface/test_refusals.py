"""What the broker refuses to erase: said, tried again, and in nobody's way."""

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from structlog.testing import capture_logs

from bus import codec
from bus import messages as m
from bus.broker import running_broker
from bus.client import connect
from bus.errors import NotFound
from bus.subjects import gallery_events
from bus.tasks import beside
from bus.testing import until
from services.rustyface.galleries import clearing
from services.rustyface.galleries.clearing import Unerased
from services.rustyface.galleries.galleries import Galleries, NewEntry
from services.rustyface.galleries.ledger import Ledger
from services.rustyface.galleries.projection import LITTLE_ENDIAN
from services.rustyface.photos.kept import KeptImages
from tests.bus.damage import damaged, denying

D = 16
FACES = np.random.default_rng(3).normal(size=(40, D)).astype(np.float32)
FACES /= np.linalg.norm(FACES, axis=1, keepdims=True)
PHOTO = np.random.default_rng(7).bytes(300 * 1024)

T = TypeVar("T")


def face(i: int, **more) -> NewEntry:
    return NewEntry(id=f"e{i}", vector=FACES[i], **more)


class Running:
    """A broker whose files lie in a folder, and a replica on it that outlives it.

    Attributes:
        client: The replica's connection.
        galleries: The replica.
    """

    def __init__(self, home: Path, opened: contextlib.AsyncExitStack) -> None:
        self._home = home
        self._opened = opened
        self._broker = contextlib.AsyncExitStack()

    async def start(self) -> None:
        self._opened.push_async_callback(self.stop)
        broker = await self._broker.enter_async_context(running_broker(self._home))
        self.client = await self._opened.enter_async_context(
            connect(broker.url, name="test", root="r")
        )
        await self.client.store.declare()
        store = self.client.store
        self.galleries = Galleries(
            store.galleries, "r", "test", D,
            changes=store.changes, drop_image=KeptImages(store.faces).drop,
        )  # fmt: skip
        await self._opened.enter_async_context(beside(self.galleries.run()))
        await self.galleries.caught_up.wait()
        await self.galleries.create("g")

    async def stop(self) -> None:
        await self._broker.aclose()

    async def away_for(self, work: Callable[[], T]) -> T:
        """Do something to the files while the broker is down."""
        await self.stop()
        done = work()
        await self._broker.enter_async_context(running_broker(self._home))
        await until(lambda: self.client._nc.is_connected)
        return done


@pytest.fixture
async def at(tmp_path):
    async with contextlib.AsyncExitStack() as opened:
        running = Running(tmp_path, opened)
        await running.start()
        yield running


@pytest.fixture
def hurried(monkeypatch):
    """What is refused is tried again at once, and then soon."""
    monkeypatch.setattr(clearing, "PAUSE_S", 0.02)
    monkeypatch.setattr(clearing, "REFUSED_PAUSE_MAX_S", 0.3)


async def entries_in(client) -> list[str]:
    """Return whose events there are in the stream, one for each."""
    subjects = [one.subject async for one in client.store.galleries.read(gallery_events("r"))]
    return sorted(one.rpartition(".")[2] for one in subjects if ".entry." in one)


def copies(home: Path, i: int) -> int:
    """Count a face in all files of the broker."""
    needle = FACES[i].astype(LITTLE_ENDIAN).tobytes()
    return sum(path.read_bytes().count(needle) for path in home.rglob("*.blk"))


def said(records, event: str) -> list[dict[str, object]]:
    return [one for one in records if one["event"] == event]


# --- What is answered -----------------------------------------------------------------------------


async def removed(galleries) -> Unerased | None:
    return (await galleries.remove("g", "e0")).unerased


async def removed_with_the_person(galleries) -> Unerased | None:
    return (await galleries.remove_subject("g", "ann")).unerased


async def gone_with_the_dataset(galleries) -> Unerased | None:
    return (await galleries.delete("g")).unerased


async def gone_with_the_import(galleries) -> Unerased | None:
    return (await galleries.undo_import("g", "i1")).unerased


async def a_rejection_withdrawn(galleries) -> Unerased | None:
    rejection, _ = await galleries.reject("g", "bob", entry="e0")
    return (await galleries.withdraw("g", rejection)).unerased


async def a_rejection_without_its_face(galleries) -> Unerased | None:
    await galleries.reject("g", "bob", entry="e0")
    return (await galleries.remove("g", "e0")).unerased


@pytest.mark.parametrize(
    ("removal", "count"),
    [
        (removed, 1),
        (removed_with_the_person, 3),
        (gone_with_the_dataset, 4),
        (gone_with_the_import, 3),
        (a_rejection_withdrawn, 1),
        (a_rejection_without_its_face, 2),
    ],
)
async def test_whoever_deletes_is_told_what_the_broker_refuses_to_erase_and_why(at, removal, count):
    galleries = at.galleries
    record = m.GalleryImport(id="i1", at=m.now(), source="f", format="json")
    await galleries.begin_import("g", record)
    brought = [face(i, subject="ann", imported="i1") for i in range(3)]
    await galleries.enrol_many("g", brought, existing="fail")
    await galleries.enrol("g", face(3, subject="bob"))
    await denying(at.client, "r-galleries")
    async with asyncio.timeout(clearing.PATIENT_S / 2):
        left = await removal(galleries)
    assert left is not None
    assert left.left == count
    assert "message delete not permitted" in left.cause


# --- One of many ----------------------------------------------------------------------------------


async def test_of_a_person_all_is_erased_but_what_the_broker_cannot_and_that_once_it_can(
    at, tmp_path, hurried
):
    for i in range(10):
        await at.galleries.enrol("g", face(i, subject="ann"))
    await at.galleries.enrol("g", face(10, subject="bob"))
    needle = FACES[4].astype(LITTLE_ENDIAN).tobytes()
    repair = await at.away_for(lambda: damaged(tmp_path, needle))
    with capture_logs() as records:
        removed = await at.galleries.remove_subject("g", "ann")
        assert removed.affected == 10
        assert removed.unerased.left == 1
        assert "malformed or corrupt message" in removed.unerased.cause
        assert at.galleries.ids("g") == ["e10"]
        assert not any(copies(tmp_path, i) for i in range(10))
        # Others' have their turn, and nobody waits.
        assert (await at.galleries.remove("g", "e10")).unerased is None
        await at.galleries._ledger.chores_done()
        await until(lambda: len(said(records, "galleries.not_erased")) >= 3)
        assert not said(records, "galleries.erased_late")
        await at.away_for(repair)
        await until(lambda: said(records, "galleries.erased_late"))
    assert copies(tmp_path, 4) == 0
    first, second, *_ = said(records, "galleries.not_erased")
    assert first["log_level"] == "error"
    assert (first["faces"], first["images"], first["datasets"]) == (1, 0, ["g"])
    assert len(first["revisions"]) == 1
    assert first["again_in_s"] < second["again_in_s"]
    assert first["cause"] == removed.unerased.cause
    # Which entry it was does not go into the log, nor whose.
    assert not {"ann", "e4"} & {str(value) for one in records for value in one.values()}


async def test_whoever_replaces_does_not_wait_for_what_the_broker_refuses(at, monkeypatch):
    monkeypatch.setattr(clearing, "BEHIND_MAX", 4)
    many = [face(i) for i in range(10)]
    await at.galleries.enrol_many("g", many, existing="fail")
    await denying(at.client, "r-galleries")
    async with asyncio.timeout(clearing.PATIENT_S):
        for _ in range(3):
            outcome = await at.galleries.enrol_many("g", many, existing="replace")
            await at.galleries.wait(outcome.revision)
    assert outcome.replaced == 10
    assert len(await entries_in(at.client)) == 40


async def test_a_broker_that_refuses_keeps_no_worker_from_starting(at):
    await at.galleries.enrol("g", face(0))
    await at.galleries.wait(await at.galleries.enrol("g", NewEntry(id="e0", vector=FACES[1])))
    await until(lambda: len_of(at, 1))
    await denying(at.client, "r-galleries")
    await at.galleries.remove("g", "e0")
    with capture_logs() as records:
        again = Galleries(at.client.store.galleries, "r", "test", D)
        async with asyncio.timeout(clearing.PATIENT_S), beside(again.run()):
            await again.caught_up.wait()
    assert said(records, "galleries.not_erased")


async def len_of(at, count: int) -> bool:
    return len(await entries_in(at.client)) == count


async def test_of_a_dataset_nothing_is_only_deleted_while_a_face_of_it_is_not_erased(
    at, tmp_path, hurried
):
    """What is only deleted could not be erased any more."""
    for i in range(3):
        await at.galleries.enrol("g", face(i, subject="ann"))
    repair = await at.away_for(lambda: damaged(tmp_path, FACES[1].astype(LITTLE_ENDIAN).tobytes()))
    with capture_logs() as records:
        # Removed before, in a chore of its own.
        assert (await at.galleries.remove("g", "e1")).unerased.left == 1
        assert (await at.galleries.delete("g")).unerased is None
        await until(lambda: len(said(records, "galleries.not_erased")) >= 4)
        # Nor by a worker that starts, which cannot even see it.
        again = Galleries(at.client.store.galleries, "r", "test", D)
        async with beside(again.run()):
            await again.caught_up.wait()
            await again._ledger.chores_done()
        held = await at.client.store.galleries.occupied("r.gallery.g.entry.e1")
        assert sum(held.subjects.values()) == 1
        await at.away_for(repair)
        await until(lambda: said(records, "galleries.erased_late"))
    assert copies(tmp_path, 1) == 0
    held = await at.client.store.galleries.occupied("r.gallery.g.>")
    assert held.subjects == {"r.gallery.g.head": 1}


async def test_what_is_refused_is_remembered_within_bounds(at, monkeypatch, hurried):
    monkeypatch.setattr(clearing, "CHORES_MAX", 3)
    for i in range(4):
        await at.galleries.enrol("g", face(i))
    await denying(at.client, "r-galleries")
    with capture_logs() as records:
        for i in range(4):
            assert (await at.galleries.remove("g", f"e{i}")).unerased.left == 1
        await until(lambda: [one for one in records if one.get("again_in_s", 1) is None])
        await until(lambda: len(at.galleries._ledger._clearing._stuck) == 3)


# --- What is cut short ----------------------------------------------------------------------------


async def test_what_somebody_removed_who_did_not_wait_is_erased_all_the_same(
    at, tmp_path, monkeypatch
):
    await at.galleries.enrol("g", face(0, subject="ann"))
    await at.galleries.enrol("g", face(1))
    held = asyncio.Event()

    async def forever(*_args: object) -> None:
        held.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(at.galleries, "_forget_history", forever)
    removing = asyncio.create_task(at.galleries.remove("g", "e0"))
    await held.wait()
    removing.cancel()
    await asyncio.gather(removing, return_exceptions=True)
    await until(lambda: copies(tmp_path, 0) == 0)


async def test_a_move_into_a_dataset_that_is_deleted_meanwhile_is_refused_and_its_face_not_lost(
    at, monkeypatch
):
    """What it has stored cannot be taken back."""
    await at.galleries.enrol("g", face(0, subject="ann"))
    append = Ledger.append_after

    async def late(self, *told: object, **more):
        monkeypatch.undo()
        head = m.GalleryHead(id="g", at=m.now(), embedder="test", dimensions=D, deleted=True)
        await self.append_head(head, 1, "another's")
        return await append(self, *told, **more)

    monkeypatch.setattr(Ledger, "append_after", late)
    await denying(at.client, "r-galleries")
    with capture_logs() as records, pytest.raises(NotFound, match="'g' was deleted at this moment"):
        await at.galleries.move_entry("g", "e0", "bob")
    assert said(records, "galleries.not_erased")[0]["faces"] == 1


# --- Images ---------------------------------------------------------------------------------------


async def with_photos(at) -> tuple[str, str]:
    """Enrol two entries with an image each; return the images."""
    kept = KeptImages(at.client.store.faces)
    images = await kept.keep(PHOTO), await kept.keep(PHOTO[::-1])
    for i, image in enumerate(images):
        await at.galleries.wait(await at.galleries.enrol("g", face(i, image=image)))
    return images


async def test_an_image_that_the_broker_cannot_erase_is_said_and_erased_once_it_can(
    at, tmp_path, hurried
):
    image, other = await with_photos(at)
    repair = await at.away_for(lambda: damaged(tmp_path, PHOTO[140_000:140_064]))
    with capture_logs() as records:
        removed = await at.galleries.remove("g", "e0")
        # Nobody finds it, and the face itself is erased.
        assert removed.unerased.left == 1
        assert "cannot read 1 messages" in removed.unerased.cause
        assert await at.client.store.faces.size(image) is None
        assert copies(tmp_path, 0) == 0
        await at.away_for(repair)
        await until(lambda: said(records, "galleries.erased_late"))
    first = said(records, "galleries.not_erased")[0]
    assert (first["faces"], first["images"], first["digests"]) == (0, 1, [image])
    blocks = [path.read_bytes() for path in tmp_path.rglob("*.blk")]
    assert not any(PHOTO[at : at + 64] in block for block in blocks for at in (1_000, 140_000))
    assert await at.client.store.faces.size(other) == len(PHOTO)


async def test_an_image_whose_deletion_was_cut_short_the_next_worker_erases(at, monkeypatch):
    image, _ = await with_photos(at)
    store = at.client.store.faces

    async def stopped(*_args: object) -> None:
        raise asyncio.CancelledError

    with monkeypatch.context() as patched:
        patched.setattr(store, "drop", stopped)
        with pytest.raises(asyncio.CancelledError):
            await store.delete(image)
    tombstone = m.GalleryEntry(id="e0", at=m.now())
    there = at.galleries._ledger.projection.galleries["g"]
    # By another worker, which was killed: this one leaves it to that one.
    await at.client.store.galleries.append(
        at.galleries._ledger.entry_subject(there, "e0"), codec.encode(tombstone)
    )
    again = Galleries(at.client.store.galleries, "r", "test", D, drop_image=KeptImages(store).drop)
    async with beside(again.run()):
        await again.caught_up.wait()
    assert await store.half_deleted(m.now()) == []
    assert len(await store.all()) == 1
    assert sum((await store._stream.occupied("$O.r-faces.C.*")).subjects.values()) == 3

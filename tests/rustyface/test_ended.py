"""A dataset that has ended is in no file of the broker, whoever else was about to erase of it."""

import asyncio
import signal
import sys
from functools import partial

import pytest
from structlog.testing import capture_logs

from bus import codec
from bus import messages as m
from bus.broker import running_broker
from bus.errors import Internal
from bus.streams import Stream
from bus.subjects import GALLERY_HEAD, GALLERY_SUBJECT, gallery_events
from bus.testing import until
from services.rustyface.galleries import clearing
from services.rustyface.galleries.galleries import NewEntry
from tests.rustyface.remains import FACE, OTHER, D, declared, reading, remains
from tests.rustyface.transfers import REPOSITORY

# More than two turns of erasing.
MANY = 1_200
HEAD = "r.gallery.g.head"


@pytest.fixture
async def broker(tmp_path):
    """One whose files lie in ``tmp_path``."""
    async with running_broker(tmp_path) as one:
        yield one


@pytest.fixture
async def client(broker):
    async with declared(broker.url) as one:
        yield one


@pytest.fixture
def copies(tmp_path):
    """Counts the face in all files of the broker."""
    return partial(remains, tmp_path)


@pytest.fixture
def impatient(monkeypatch):
    """Nobody waits for the erasing."""
    monkeypatch.setattr(clearing, "PATIENT_S", 0)


def faces(count: int, subject: str, **more) -> list[NewEntry]:
    names = [f"{subject}-{i}" for i in range(count)]
    return [NewEntry(id=name, vector=FACE, subject=subject, **more) for name in names]


async def enrolled(galleries, count: int, **more) -> None:
    """Create a dataset of so many faces of one person, and ten of another."""
    await galleries.create("g")
    for subject, many in (("annabel", count), ("bartholomew", 10)):
        await galleries.enrol_many("g", faces(many, subject, **more), existing="fail")
    await galleries.wait(await galleries.newest())


async def end(client, galleries) -> int:
    """Store that the dataset is deleted, as somebody who is killed then."""
    head = m.GalleryHead(id="g", at=m.now(), embedder="test", dimensions=D, deleted=True)
    revision = await client.store.galleries.append(
        GALLERY_HEAD.subject("r", gallery="g"), codec.encode(head)
    )
    await galleries.wait(revision)
    return revision


async def held_in(client) -> dict[str, int]:
    """Return how many events of the dataset there are in the stream, by subject."""
    return dict((await client.store.galleries.occupied(gallery_events("r", "g"))).subjects)


class Held(Stream):
    """A stream of which one replica erases nothing until it is let."""

    def __init__(self, like: Stream) -> None:
        super().__init__(like._nc, like.name)
        self.free = asyncio.Event()

    async def remove(self, seq: int, *, erase: bool = False) -> None:
        await self.free.wait()
        await super().remove(seq, erase=erase)


async def test_a_dataset_deleted_while_a_person_of_it_is_being_erased_is_in_no_file(
    client, copies, impatient
):
    slow = Held(client.store.galleries)
    async with reading(client, stream=slow) as galleries:
        await enrolled(galleries, MANY)
        assert copies() == MANY + 10
        assert (await galleries.remove_subject("g", "annabel")).unerased.left == MANY
        left = (await galleries.delete("g")).unerased.left
        # A few are under way and in nobody's list.
        assert left == MANY + 10 - clearing.ERASED_AT_ONCE
        slow.free.set()
        await galleries._ledger._clearing.done()
        assert copies() == 0
    assert await held_in(client) == {HEAD: 1}


async def test_a_dataset_is_in_no_file_when_the_answer_comes_though_another_replica_was_erasing(
    client, copies
):
    slow = Held(client.store.galleries)
    async with reading(client, stream=slow) as one, reading(client) as other:
        await enrolled(one, 20)
        removing = asyncio.create_task(one.remove_subject("g", "annabel"))
        await until(lambda: other.ids("g") == [f"bartholomew-{i}" for i in range(10)])
        assert copies() == 30
        assert (await other.delete("g")).unerased is None
        assert copies() == 0
        slow.free.set()
        # What it was about to erase it finds gone.
        assert (await removing).unerased is None


async def test_a_replica_killed_while_it_erases_a_dataset_leaves_nothing_for_good(
    client, broker, copies
):
    async with reading(client) as galleries:
        await enrolled(galleries, MANY)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.data.enrolling_replica", "delete", broker.url, "r",
            cwd=REPOSITORY,
        )  # fmt: skip
        await until(lambda: copies() < MANY)
        process.kill()
        assert await process.wait() == -signal.SIGKILL
    assert copies() > MANY / 2
    with capture_logs() as records:
        async with reading(client) as again:
            await again._ledger._clearing.done()
    assert [one["dataset"] for one in records if one["event"] == "dataset.left_behind"] == ["g"]
    assert copies() == 0
    assert await held_in(client) == {HEAD: 1}


async def test_what_is_left_of_a_dataset_leaves_in_parts_and_spares_the_one_that_took_its_name(
    client, copies, monkeypatch
):
    monkeypatch.setattr(clearing, "FOUND_AT_ONCE", 7)
    async with reading(client) as galleries:
        await enrolled(galleries, 25)
        await end(client, galleries)
        assert copies() == 35
        await galleries.create("g")
        await galleries.enrol("g", NewEntry(id="annabel-0", vector=OTHER, subject="annabel"))
    async with reading(client) as again:
        await again._ledger._clearing.done()
        assert again.ids("g") == ["annabel-0"]
    assert copies() == 0
    assert await held_in(client) == {HEAD: 1, "r.gallery.g.entry.annabel-0": 1}


async def test_a_dataset_that_could_not_be_looked_at_is_looked_at_again(
    client, copies, monkeypatch
):
    monkeypatch.setattr(clearing, "PAUSE_S", 0.02)
    slow = Held(client.store.galleries)

    async def refused(subject, *, after):
        monkeypatch.undo()
        async for stored in slow.read(subject, after=after):
            yield stored
            if stored.seq > 5:
                raise Internal("maximum consumers limit reached")

    async with reading(client, stream=slow) as one, reading(client) as other:
        await enrolled(one, 20)
        removing = asyncio.create_task(one.remove_subject("g", "annabel"))
        await until(lambda: len(other.ids("g")) == 10)
        monkeypatch.setattr(other._ledger._stream, "read", refused)
        with capture_logs() as records:
            assert (await other.delete("g")).unerased == (0, "maximum consumers limit reached")
            await until(lambda: copies() == 0)
        slow.free.set()
        await removing
    [said] = [one for one in records if one["event"] == "galleries.not_erased"]
    assert (said["datasets"], said["cause"]) == (["g"], "maximum consumers limit reached")


async def test_of_a_deleted_dataset_no_name_is_in_a_file(client, tmp_path):
    names = [b"annabel", b"bartholomew", b"clementine"]
    # Beside it in the same block, so that no file goes away as a whole.
    async with reading(client) as galleries:
        await galleries.create("other")
        await enrolled(galleries, 3)
        record = m.GalleryImport(id="i1", at=m.now(), source="clementine.npz", format="npz")
        await galleries.begin_import("g", record)
        await galleries.move_subjects("g", ["annabel"], "clementine")
        await galleries.remove("g", "annabel-0")
        await galleries.remove_subject("g", "clementine")
        assert all(remains(tmp_path, name) for name in names)
        await galleries.delete("g")
    assert [remains(tmp_path, name) for name in names] == [0, 0, 0]


async def test_of_a_dataset_whose_deletion_nobody_waited_for_nothing_is_left_all_the_same(
    client, tmp_path, monkeypatch
):
    held = asyncio.Event()

    async def forever(*_args: object) -> None:
        held.set()
        await asyncio.Event().wait()

    async with reading(client) as galleries:
        await galleries.create("other")
        await enrolled(galleries, 3)
        await galleries.remove("g", "annabel-0")
        monkeypatch.setattr(galleries._history, "forget", forever)
        deleting = asyncio.create_task(galleries.delete("g"))
        await held.wait()
        deleting.cancel()
        await asyncio.gather(deleting, return_exceptions=True)
        await galleries._ledger._clearing.done()
    assert await held_in(client) == {HEAD: 1}
    assert remains(tmp_path, b"annabel") == remains(tmp_path) == 0


async def test_what_was_stored_behind_the_end_of_a_dataset_the_next_worker_erases(client, tmp_path):
    async with reading(client) as galleries:
        await galleries.create("other")
        await enrolled(galleries, 1)
        await galleries.delete("g")
    event = m.GallerySubject(id="clementine", at=m.now(), moves=[m.SubjectMove(into=None)])
    subject = GALLERY_SUBJECT.subject("r", gallery="g", subject="clementine")
    await client.store.galleries.append(subject, codec.encode(event))
    async with reading(client):
        assert await held_in(client) == {HEAD: 1}
    assert remains(tmp_path, b"clementine") == 0


async def test_the_images_of_what_is_left_of_a_dataset_go_before_the_events_that_name_them(client):
    """Whoever was about to drop them may be killed before."""
    dropped: list[tuple[str, int]] = []

    async def drop(image, _named) -> None:
        dropped.append((image, sum((await held_in(client)).values())))

    async with reading(client) as galleries:
        await enrolled(galleries, 3, image="a-photo")
        await end(client, galleries)
        before = sum((await held_in(client)).values())
    async with reading(client, drop_image=drop) as again:
        await again._ledger._clearing.done()
    assert dropped == [("a-photo", before)] * len(dropped)
    assert dropped
    assert await held_in(client) == {HEAD: 1}


async def test_whom_a_dataset_has_lost_before_it_ended_takes_no_history_of_a_namesake_since(client):
    kept = {"changes": client.store.changes}
    async with reading(client, **kept) as galleries:
        await enrolled(galleries, 3)
        gone = m.GallerySubject(id="annabel", at=m.now(), moves=[m.SubjectMove(into=None)])
        subject = GALLERY_SUBJECT.subject("r", gallery="g", subject="annabel")
        await client.store.galleries.append(subject, codec.encode(gone))
        await end(client, galleries)
        await galleries.create("g")
        await galleries.enrol("g", NewEntry(id="new", vector=OTHER, subject="annabel"))
        await galleries._ledger.telling.all_told()
    async with reading(client, **kept) as again:
        await again._ledger._clearing.done()
        changes, _ = await again._history.read("g", limit=10, before=None)
    assert "annabel" in {one.subject for one in changes}

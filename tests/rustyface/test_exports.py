"""Exports while a dataset is changed: they end, and have nothing of what was deleted before."""

import asyncio
import contextlib
import shutil
import time
from datetime import datetime

import pytest
import structlog

from bus import messages as m
from bus.errors import NotFound
from bus.testing import until
from services.rustyface.galleries.galleries import NewEntry
from services.rustyface.manage import Manage
from services.rustyface.transfers import exports as exports_module
from services.rustyface.transfers.files import reader
from services.rustyface.transfers.snapshot import Snapshot
from tests.rustyface.transfers import (
    FORMATS,
    LARGE,
    D,
    ended_as,
    now_of,
    rows_of,
    stored,
    vector,
)


class Stored:
    """Keeps a copy of each file that an export stores, and is told just before it is stored."""

    def __init__(self, at, folder) -> None:
        self.digests: list[str] = []
        self.before = nothing
        self._folder = folder
        store = at.jobs._work.exports._store
        self._put, store.put = store.put, self.put

    async def put(self, digest, path) -> None:
        self.digests.append(digest)
        shutil.copyfile(path, self._folder / digest)
        await self.before(len(self.digests))
        await self._put(digest, path)

    def rows(self, digest: str, kind: str) -> dict:
        file = reader(self._folder / digest, kind, D)
        return {row.id: row for batch in file.batches() for row in batch}

    def rejections(self, digest: str, kind: str) -> set[str]:
        file = reader(self._folder / digest, kind, D)
        list(file.batches())
        return {one.id for batch in file.rejections() for one in batch}


async def nothing(_count: int) -> None:
    """Do nothing."""


@pytest.fixture
async def at(carrier, hurried):
    async with carrier() as at:
        await at.galleries.create("d")
        yield at


@pytest.fixture
def files(at, tmp_path) -> Stored:
    return Stored(at, tmp_path)


@pytest.fixture
def manage(at):
    """Asks for a change as it comes over the bus."""
    manager = Manage(at.galleries, at.jobs, lambda *_: (0.4, 0.4), lambda *_: None)

    async def ask(action, **more):
        return await manager.answer(m.ManageDataset(action=action, dataset="d", **more))

    return ask


async def enrolled(at, count: int) -> None:
    entries = [NewEntry(id=one.id, vector=one.vector, subject=f"s{i}")
               for i, one in enumerate(rows_of(count))]  # fmt: skip
    await at.galleries.enrol_many("d", entries, existing="replace")


@pytest.mark.parametrize("kind", FORMATS)
async def test_an_export_ends_while_entries_keep_being_removed_and_has_none_of_them(
    client, at, manage, files, kind
):
    await enrolled(at, LARGE)
    began = time.monotonic()
    await at.do("export", "d", format=kind)
    # So long takes all of it: twice in that time something is removed.
    pause_s = (time.monotonic() - began) / 2
    # The first removal of all takes longest, and might end behind the export.
    last = f"e{LARGE - 1}"
    removed = {last: await manage("remove-entry", entry_id=last)}
    answered: dict[str, datetime] = {}
    enough = asyncio.Event()

    async def keep_removing() -> None:
        for i in range(LARGE):
            removed[f"e{i}"] = await manage("remove-entry", entry_id=f"e{i}")
            answered[f"e{i}"] = m.now()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(enough.wait(), pause_s)
                return

    job = await at.jobs.enter(m.GalleryWork(action="export", dataset="d", format=kind))

    async def is_running() -> bool:
        return (await now_of(client, job)).state == "running"

    await until(is_running)
    removing = asyncio.create_task(keep_removing())
    try:
        ended = await ended_as(client, job, "done", 100)
    finally:
        enough.set()
        await removing
    done = ended.gallery_result
    before = {one for one, told in removed.items() if told.revision <= done.revision}
    assert len(before) >= 2
    assert {one for one, moment in answered.items() if moment < ended.ended_at} <= before
    rows = files.rows(done.artefact, kind)
    assert rows.keys() == {f"e{i}" for i in range(LARGE)} - before
    assert done.entries == len(rows)


@pytest.mark.parametrize("kind", FORMATS)
async def test_a_file_is_as_the_dataset_is_when_it_is_written(at, manage, files, kind):
    await enrolled(at, 2_500)
    gone = (await manage("reject-match", subject="s7", embedding=vector(1).tolist())).rejection
    kept = (await manage("reject-match", subject="s8", embedding=vector(2).tolist())).rejection

    async def change(count: int) -> None:
        if count > 1:
            return
        await manage("rename-subject", subject="s3", into="Ada")
        await manage("move-entry", entry_id="e4", into="Bob")
        await at.galleries.enrol("d", NewEntry(id="new", vector=vector(1, 2)))
        await manage("withdraw-rejection", rejection=gone)
        for entry in ("e0", "e999", "e1000", "e2499"):
            await manage("remove-entry", entry_id=entry)
        # The same id again is another face.
        await at.galleries.enrol("d", NewEntry(id="e0", vector=vector(0, 1)))

    files.before = change
    done = (await at.do("export", "d", format=kind)).gallery_result
    first, last = files.digests
    assert (done.artefact, done.entries, done.rejections) == (last, 2_498, 1)
    rows = files.rows(last, kind)
    assert files.rows(first, kind).keys() - rows.keys() == {"e999", "e1000", "e2499"}
    assert (rows["e3"].subject, rows["e4"].subject, rows["e5"].subject) == ("Ada", "Bob", "s5")
    assert rows["e0"].vector.tolist() == vector(0, 1).tolist()
    assert rows["new"].vector.tolist() == vector(1, 2).tolist()
    assert files.rejections(last, kind) == {kept}
    # What had been stored with them in it is gone.
    assert await stored(at.client) == {last}


@pytest.mark.parametrize("kind", FORMATS)
async def test_an_entry_that_comes_back_under_its_id_has_its_new_face_alone(
    at, manage, files, kind
):
    await enrolled(at, 3)

    async def replace(count: int) -> None:
        if count == 1:
            await manage("remove-entry", entry_id="e0")
            await at.galleries.enrol("d", NewEntry(id="e0", vector=vector(0, 1)))

    files.before = replace
    done = (await at.do("export", "d", format=kind)).gallery_result
    rows = files.rows(done.artefact, kind)
    assert rows.keys() == {"e0", "e1", "e2"}
    assert rows["e0"].vector.tolist() == vector(0, 1).tolist()


async def test_of_what_was_deleted_no_byte_is_in_the_file(at, manage, files, tmp_path):
    await enrolled(at, 30)
    secret = NewEntry(id="Waldo", vector=vector(3, 4), subject="Whoever", metadata={"x": "Whence"})
    await at.galleries.enrol("d", secret)

    async def remove(count: int) -> None:
        if count == 1:
            await manage("remove-subject", subject="Whoever")

    files.before = remove
    done = (await at.do("export", "d")).gallery_result
    first, last = ((tmp_path / one).read_bytes() for one in files.digests)
    for word in (b"Waldo", b"Whoever", b"Whence", b"0.6,0.8,"):
        assert word in first
        assert word not in last
    assert len(last) == done.size_bytes


async def test_what_is_deleted_at_the_last_moment_is_in_no_file_that_can_be_found(
    client, at, manage, files, monkeypatch
):
    await enrolled(at, 3)
    real, asked = Snapshot.has_deleted, []

    async def looked(snapshot) -> bool:
        asked.append(await real(snapshot))
        if len(asked) == 1:
            await manage("remove-entry", entry_id="e1")
        return asked[-1]

    monkeypatch.setattr(Snapshot, "has_deleted", looked)
    ended = await at.do("export", "d")
    assert (asked, ended.tries) == ([False, False], 2)
    first, last = files.digests
    assert ended.gallery_result.artefact == last
    assert (files.rows(first, "json").keys(), files.rows(last, "json").keys()) == (
        {"e0", "e1", "e2"}, {"e0", "e2"},
    )  # fmt: skip
    assert await stored(client) == {last}


async def test_an_export_of_a_dataset_that_is_deleted_meanwhile_fails_and_leaves_nothing(
    client, at, manage, files
):
    await enrolled(at, 3)

    async def delete(_count: int) -> None:
        await manage("delete-dataset")
        await at.galleries.create("d")
        await at.galleries.enrol("d", NewEntry(id="another", vector=vector(1)))

    files.before = delete
    failed = await at.do("export", "d", "failed")
    assert failed.error == "there is no dataset 'd': it was deleted meanwhile"
    assert await stored(client) == set()


async def test_an_export_that_never_comes_to_rest_says_why_and_leaves_nothing(
    client, at, manage, files, monkeypatch
):
    monkeypatch.setattr(exports_module, "STORED_MAX", 2)
    await enrolled(at, 30)

    async def remove(count: int) -> None:
        await manage("remove-entry", entry_id=f"e{count}")

    files.before = remove
    job = await at.jobs.enter(m.GalleryWork(action="export", dataset="d"))

    async def waits() -> bool:
        now = await now_of(client, job)
        return now.state == "queued" and now.failures == 1

    await until(waits)
    assert len(files.digests) == 2
    assert await stored(client) == set()
    assert (await now_of(client, job)).error == (
        "something was deleted from the dataset each of 2 times that its file was being stored; "
        "export it when less is deleted"
    )
    # Whoever tries once more, when there is rest, has it.
    files.before = nothing
    await ended_as(client, job, "done")


async def test_two_exports_of_one_dataset_are_two_files(client, at):
    await enrolled(at, 3)
    for kind in FORMATS:
        one, other = [(await at.do("export", "d", format=kind)).gallery_result for _ in range(2)]
        assert one.artefact != other.artefact


async def test_all_files_of_a_dataset_go_though_one_cannot_be_deleted(
    client, at, manage, monkeypatch
):
    await enrolled(at, 3)
    one, other = [(await at.do("export", "d")).gallery_result.artefact for _ in range(2)]
    exports = at.jobs._work.exports
    delete, refused = exports._store.delete, []

    async def refuses(digest, **more) -> bool:
        if not refused:
            refused.append(digest)
            raise NotFound("a bad sector")
        return await delete(digest, **more)

    monkeypatch.setattr(exports._store, "delete", refuses)
    answer = await manage("remove-entry", entry_id="e0")
    assert await stored(client) == set(refused)
    assert refused[0] in (one, other)
    assert answer.warnings == [
        "exported files of 'd' may still have what was deleted, for an hour at most: a bad sector"
    ]


async def test_all_files_of_a_dataset_are_gone_before_the_first_is_erased_and_who_asked_may_leave(
    client, at, manage, monkeypatch
):
    await enrolled(at, 3)
    for _ in range(3):
        await at.do("export", "d")
    store = at.jobs._work.exports._store
    drop, erasing, go_on = store.drop, [], asyncio.Event()

    async def slow(upload, erase_s=None) -> None:
        erasing.append(upload)
        await go_on.wait()
        await drop(upload, erase_s)

    monkeypatch.setattr(store, "drop", slow)
    asked = asyncio.create_task(manage("remove-entry", entry_id="e0"))
    await until(lambda: len(erasing) == 3)
    assert await stored(client) == set()
    asked.cancel()
    await asyncio.wait([asked])
    assert asked.cancelled()
    go_on.set()
    await until(lambda: not at.jobs._dropping)
    assert not (await client.store.faces._stream.occupied("$O.*.C.*")).subjects


@pytest.mark.parametrize("action", ["delete-dataset", "remove-entry"])
async def test_files_go_with_what_was_deleted_though_nobody_waited_for_that(
    client, at, manage, monkeypatch, action
):
    await enrolled(at, 3)
    await at.do("export", "d")
    clear, clearing = at.galleries._ledger.clear, asyncio.Event()

    async def never(_dead, **_more) -> None:
        clearing.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(at.galleries._ledger, "clear", never)
    asked = asyncio.create_task(manage(action, entry_id="e0"))
    await clearing.wait()
    assert len(await stored(client)) == 1
    asked.cancel()
    monkeypatch.setattr(at.galleries._ledger, "clear", clear)
    await asyncio.wait([asked])

    async def has_none() -> bool:
        return await stored(client) == set()

    await until(has_none)


async def test_only_the_deletion_that_takes_a_file_says_so(at, manage):
    await enrolled(at, 3)
    job = await at.do("export", "d")
    with structlog.testing.capture_logs() as said:
        for entry in ("e0", "e1"):
            await manage("remove-entry", entry_id=entry)
    assert [one["job"] for one in said if one["event"] == "export.dropped"] == [job.job]

"""Jobs of datasets: in and out whole, whoever dies."""

import asyncio
import json
import os
import random
import signal
import sys
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pytest

from bus import messages as m
from bus.errors import Conflict, InvalidRequest, NotFound
from bus.subjects import DATASET_JOB_CANCEL, DATASET_JOB_RETRY
from bus.testing import until
from services.rustyface.galleries.galleries import NewEntry
from services.rustyface.transfers.files import Head
from services.rustyface.transfers.transfer import take_in
from tests.rustyface.transfers import (
    FORMATS,
    LARGE,
    REPOSITORY,
    D,
    answers,
    as_file,
    ended_as,
    in_stream,
    mutated,
    now_of,
    rows_of,
    stored,
    uploaded,
    vector,
    writing,
)

# --- There and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
async def test_a_dataset_that_goes_and_comes_back_answers_the_same(client, carrier, tmp_path, kind):
    async with carrier() as at:
        await at.galleries.create("people")
        entries = [
            NewEntry(id="a/1", vector=vector(1, 2), metadata={"x": [1, None]}, subject="Ada"),
            NewEntry(id="a/2", vector=vector(1, 2.1), subject="Ada", quality={"yaw": 3.5}),
            NewEntry(id="ç", vector=vector(-1, 0, 4), metadata="text", subject="Çelik", at=m.now()),
            NewEntry(id="nobody", vector=vector(0, 0, 0, 1)),
        ]
        await at.galleries.enrol_many("people", entries, existing="skip")
        await at.galleries.move_subjects("people", ["Ada"], "Ada L.")
        out = (await at.do("export", "people", format=kind)).gallery_result
        assert (out.entries, out.file_name.rsplit(".", 1)[1]) == (4, kind)
        assert out.size_bytes == await client.store.faces.size(out.artefact)
        done = await at.do("import", "copy", artefact=out.artefact)
        assert (done.gallery_result.entries, done.gallery_result.added) == (4, 4)
        for query in (vector(1, 2), vector(-1, 0, 3), vector(0, 0, 1, 1)):
            said = await answers(at.galleries, "people", query)
            assert said == await answers(at.galleries, "copy", query)
            assert len(said) == 4
        assert {one[2] for one in said} == {"Ada L.", "Çelik", None}
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and "transfers" in str(p)]


async def test_progress_is_told_in_entries(client, carrier, tmp_path, hurried):
    artefact = await uploaded(client, as_file(tmp_path / "f", rows_of(LARGE)))
    async with carrier() as at:
        job = await at.jobs.enter(m.GalleryWork(action="import", dataset="d", artefact=artefact))
        on_its_way = await writing(client, job)
        assert (on_its_way.total_entries, on_its_way.bytes) == (LARGE, 0)
        done = await ended_as(client, job, "done")
    assert (done.entries, done.total_entries, done.entries_per_s) == (LARGE, LARGE, None)
    assert done.gallery_result.added == LARGE


async def test_the_file_of_an_import_goes_with_its_end(client, carrier, tmp_path):
    artefact = await uploaded(client, as_file(tmp_path / "f", rows_of(3)))
    async with carrier() as at:
        await at.do("import", "d", artefact=artefact)

        async def is_gone() -> bool:
            return artefact not in await stored(client)

        await until(is_gone)


async def test_a_file_that_two_imports_need_stays_for_the_second(client, carrier, tmp_path):
    artefact = await uploaded(client, as_file(tmp_path / "f", rows_of(3)))
    async with carrier(at_once=1) as at:
        asked = [m.GalleryWork(action="import", dataset=d, artefact=artefact) for d in ("a", "b")]
        jobs = [await at.jobs.enter(one) for one in asked]
        for job in jobs:
            await ended_as(client, job, "done")
        assert at.galleries.ids("a") == at.galleries.ids("b") == ["e0", "e1", "e2"]


# --- All or nothing -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
async def test_one_bad_entry_keeps_the_whole_file_out(client, carrier, tmp_path, kind):
    rows = rows_of(2_500)
    rows[2_345] = rows[2_345]._replace(vector=np.full(D, np.nan, np.float32))
    artefact = await uploaded(client, as_file(tmp_path / "f", rows, kind))
    async with carrier() as at:
        failed = await at.do("import", "d", "failed", artefact=artefact)
        assert "entry 2,345" in failed.error
        assert failed.tries == 1
        assert "d" not in at.galleries


async def test_an_id_that_comes_twice_is_refused_with_both_places(client, carrier, tmp_path):
    rows = rows_of(1_500)
    rows[1_400] = rows[1_400]._replace(id="e7")
    artefact = await uploaded(client, as_file(tmp_path / "f", rows))
    async with carrier() as at:
        failed = await at.do("import", "d", "failed", artefact=artefact)
    assert failed.error == "entry 1,400 ('e7'): its id is that of entry 7 already"


async def test_vectors_of_another_embedder_are_refused(client, carrier, tmp_path):
    file = as_file(tmp_path / "f", rows_of(2), head=Head(embedder="sface"))
    artefact = await uploaded(client, file)
    async with carrier() as at:
        failed = await at.do("import", "d", "failed", artefact=artefact)
    assert "vectors of sface, this worker makes those of tiny" in failed.error


async def test_vectors_of_another_version_of_the_embedder_are_refused(client, carrier, tmp_path):
    head = Head(embedder="tiny", embedder_digest="t2")
    for kind in FORMATS:
        artefact = await uploaded(client, as_file(tmp_path / kind, rows_of(2), kind, head))
        async with carrier() as at:
            failed = await at.do("import", "d", "failed", artefact=artefact)
        assert "another version of tiny, t2; this worker's is t1" in failed.error


@pytest.mark.parametrize(("existing", "counts", "n"), [
    ("skip", (2, 0, 1), 100), ("replace", (2, 1, 0), 0),
])  # fmt: skip
async def test_entries_that_are_there_are_left_or_replaced(
    client, carrier, tmp_path, existing, counts, n
):
    artefact = await uploaded(client, as_file(tmp_path / "f", rows_of(3)))
    async with carrier() as at:
        await at.galleries.create("d")
        await at.galleries.enrol("d", NewEntry(id="e0", vector=vector(1), metadata={"n": 100}))
        done = (await at.do("import", "d", artefact=artefact, existing=existing)).gallery_result
        assert (done.added, done.replaced, done.skipped) == counts
        [there] = at.galleries.picked("d", ["e0"])
        assert there.metadata == {"n": n}


async def test_an_import_that_may_meet_nothing_fails_before_it_begins(client, carrier, tmp_path):
    artefact = await uploaded(client, as_file(tmp_path / "f", rows_of(1_200)))
    async with carrier() as at:
        await at.galleries.create("d")
        await at.galleries.enrol("d", NewEntry(id="e1100", vector=vector(1)))
        failed = await at.do("import", "d", "failed", artefact=artefact, existing="fail")
        assert "has an entry 'e1100' already" in failed.error
        assert at.galleries.ids("d") == ["e1100"]


async def test_an_import_can_be_undone(client, carrier, tmp_path):
    artefact = await uploaded(client, as_file(tmp_path / "f", rows_of(3)))
    async with carrier() as at:
        await at.galleries.create("d")
        await at.galleries.enrol("d", NewEntry(id="mine", vector=vector(1)))
        job = await at.do("import", "d", artefact=artefact, by="ann")
        [record] = await at.galleries.imports("d")
        assert (record.id, record.state, record.added, record.by) == (job.job, "done", 3, "ann")
        assert (await at.galleries.undo_import("d", record.id))[0] == 3
        assert at.galleries.ids("d") == ["mine"]


async def test_files_that_are_broken_somewhere_come_in_whole_or_not_at_all(
    client, carrier, tmp_path
):
    """Jobs of a real worker; what the readers make of thousands of files stands in test_files."""
    chance = random.Random(3)  # noqa: S311 - no secret
    rows = rows_of(30)
    sound = {kind: as_file(tmp_path / kind, rows, kind).read_bytes() for kind in FORMATS}
    seen: Counter[str] = Counter()
    async with carrier(at_once=2) as at:
        jobs = {}
        broken = [mutated(sound[FORMATS[i % 3]], chance) for i in range(60)]
        # One letter of an id is a file all the same.
        broken.append(sound["json"].replace(b'"e7"', b'"x7"', 1))
        for i, content in enumerate(broken):
            path = tmp_path / f"broken-{i}"
            path.write_bytes(content)
            artefact = await uploaded(client, path)
            work = m.GalleryWork(action="import", dataset=f"d{i}", artefact=artefact)
            jobs[f"d{i}"] = await at.jobs.enter(work)
        for dataset, job in jobs.items():
            await until(lambda one=job: has_ended(client, one), 60)
            ended = await now_of(client, job)
            seen[ended.state] += 1
            if ended.state == "failed":
                assert 10 < len(ended.error) < 1_000
                assert at.galleries.ids(dataset) == []
            else:
                assert len(at.galleries.ids(dataset)) == ended.gallery_result.added > 0
        assert seen.keys() == {"done", "failed"}
        good = await at.do("import", "good", artefact=await uploaded(client, tmp_path / "npz"))
        assert good.gallery_result.added == len(rows)


async def has_ended(client, job: m.Job) -> bool:
    return (await now_of(client, job)).state in {"done", "failed"}


# --- Whoever dies ---------------------------------------------------------------------------------


async def test_an_import_whose_worker_is_killed_is_ended_by_another_without_doubles(
    client, settings, carrier, tmp_path, hurried
):
    artefact = await uploaded(client, as_file(tmp_path / "f", rows_of(LARGE)))
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(Path(__file__).parents[1] / "data" / "transfer_worker.py"),
        settings.nats_url, settings.root, str(tmp_path / "other"), str(D), cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    try:
        async with carrier(at_once=0) as at:
            asked = m.GalleryWork(action="import", dataset="d", artefact=artefact)
            job = await at.jobs.enter(asked)
            held = await writing(client, job)
            os.kill(process.pid, signal.SIGKILL)
            await process.wait()
            assert (await now_of(client, job)).state == "running"
        async with carrier(slot=1) as at:
            done = await ended_as(client, job, "done", 90)
            assert (done.tries, done.instance != held.instance) == (2, True)
            assert done.gallery_result.added == LARGE
            found = await in_stream(client, at.galleries, "d")
            assert found == sorted(f"e{i}" for i in range(LARGE))
            # No entry was stored twice: a stored one has one event, its own.
            assert at.galleries.revision < 1.2 * LARGE
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_a_dataset_that_is_deleted_while_nobody_does_its_import_does_not_come_back(
    client, settings, carrier, tmp_path, hurried
):
    artefact = await uploaded(client, as_file(tmp_path / "f", rows_of(LARGE)))
    async with carrier() as at:
        asked = m.GalleryWork(action="import", dataset="d", artefact=artefact)
        job = await at.jobs.enter(asked)
        await writing(client, job)
    async with carrier(at_once=0, slot=2) as other:
        await other.galleries.delete("d")
    async with carrier(slot=1) as at:
        failed = await ended_as(client, job, "failed")
        assert "was deleted" in failed.error
        assert "d" not in at.galleries
        # Whoever wants it all the same says so.
        await client.call(DATASET_JOB_RETRY, m.NameJob(job=job.job))
        await ended_as(client, job, "done", 90)
        assert len(at.galleries.ids("d")) == LARGE


async def test_a_worker_that_leaves_gives_its_import_to_another(client, carrier, tmp_path, hurried):
    artefact = await uploaded(client, as_file(tmp_path / "f", rows_of(LARGE)))
    async with carrier() as at:
        asked = m.GalleryWork(action="import", dataset="d", artefact=artefact, existing="fail")
        job = await at.jobs.enter(asked)
        await writing(client, job)
    assert (await now_of(client, job)).state == "queued"
    async with carrier(slot=1) as at:
        done = await ended_as(client, job, "done")
        # What is there is its own: nothing to fail at.
        assert (done.gallery_result.added, len(at.galleries.ids("d"))) == (LARGE, LARGE)


async def test_a_cancelled_import_leaves_nothing_and_can_be_tried_again(
    client, carrier, tmp_path, hurried
):
    artefact = await uploaded(client, as_file(tmp_path / "f", rows_of(LARGE)))
    async with carrier() as at:
        job = await at.jobs.enter(m.GalleryWork(action="import", dataset="d", artefact=artefact))
        await writing(client, job)
        await client.call(DATASET_JOB_CANCEL, m.NameJob(job=job.job))
        await ended_as(client, job, "cancelled")
        await until(lambda: at.galleries.ids("d") == [])
        assert [one.state for one in await at.galleries.imports("d")] == ["undone"]
        assert await in_stream(client, at.galleries, "d") == []
        assert (await client.call(DATASET_JOB_RETRY, m.NameJob(job=job.job))).state == "queued"
        await ended_as(client, job, "done", 90)
        assert len(await in_stream(client, at.galleries, "d")) == LARGE


# --- What can be asked ----------------------------------------------------------------------------


async def test_what_cannot_be_done_is_refused_at_once_by_its_field(client, carrier):
    async with carrier() as at:
        await at.galleries.create("d")
        for error, field, work in (
            (InvalidRequest, "artefact", {"action": "import", "dataset": "d"}),
            (InvalidRequest, "artefact", {"action": "import", "dataset": "d", "artefact": "x"}),
            (NotFound, "artefact", {"action": "import", "dataset": "d", "artefact": "ab" * 32}),
            (NotFound, "dataset", {"action": "export", "dataset": "e"}),
            (InvalidRequest, "into", {"action": "reembed", "dataset": "d"}),
            (InvalidRequest, "into", {"action": "reembed", "dataset": "d", "into": "d"}),
            (InvalidRequest, "into", {"action": "reembed", "dataset": "d", "into": " "}),
        ):
            with pytest.raises(error) as raised:
                await at.jobs.enter(m.GalleryWork(**work))
            assert raised.value.field == field
        assert await client.store.jobs.all() == []


async def test_a_key_makes_two_requests_one_job(client, carrier):
    async with carrier(at_once=0) as at:
        await at.galleries.create("d")
        work = m.GalleryWork(action="export", dataset="d", key="k", by="ann")
        first = await at.jobs.enter(work)
        assert (await at.jobs.enter(work)).job == first.job
        with pytest.raises(Conflict, match="has been used for another job of a dataset"):
            await at.jobs.enter(msgspec.structs.replace(work, format="npz"))


async def test_a_key_gives_the_first_job_though_its_file_has_gone(client, carrier, tmp_path):
    artefact = await uploaded(client, as_file(tmp_path / "f", rows_of(3)))
    async with carrier() as at:
        done = await at.do("import", "d", artefact=artefact, key="k")

        async def is_gone() -> bool:
            return artefact not in await stored(client)

        await until(is_gone)
        again = await at.do("import", "d", artefact=artefact, key="k")
    assert (again.job, again.tries) == (done.job, 1)


async def test_jobs_of_models_are_left_to_others(client, carrier):
    request = m.ImportModel(id="m", url="https://example.org/m.json")
    model = m.Job(job="a1", request=request, created_at=m.now(), updated_at=m.now())
    await client.store.jobs.put(model, "a1")
    async with carrier() as at:
        with pytest.raises(NotFound, match="no job 'a1' of this kind"):
            await client.call(DATASET_JOB_CANCEL, m.NameJob(job="a1"))
        await at.galleries.create("d")
        await at.do("export", "d")
    assert await now_of(client, model) == model


# --- The folder -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
async def test_a_file_in_the_folder_becomes_a_dataset_once(carrier, tmp_path, kind):
    folder = tmp_path / "datasets"
    folder.mkdir()
    as_file(folder / f"x.{kind}", rows_of(3), kind, Head(id="people"))
    async with carrier() as at:
        await take_in(folder, at.galleries)
        assert at.galleries.ids("people") == ["e0", "e1", "e2"]
        assert [path.name for path in folder.iterdir()] == [f"x.{kind}.imported"]


async def test_a_file_in_the_folder_that_cannot_be_used_stays(carrier, tmp_path, caplog):
    content = {"id": "d", "entries": [{"id": "a", "embedding": [1] * D}, {"id": "b"}]}
    (tmp_path / "d.json").write_text(json.dumps(content))
    async with carrier() as at:
        await take_in(tmp_path, at.galleries)
        assert "d" not in at.galleries
    assert (tmp_path / "d.json").exists()

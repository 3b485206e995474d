"""Settings and rejections of datasets that go and come: taken, left and told, on a real broker."""

import asyncio
import json
import secrets

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from bus import codec
from bus import messages as m
from bus.errors import InvalidRequest
from bus.subjects import DATASET_JOB_CANCEL, DATASET_JOB_RETRY, gallery_events
from bus.testing import until
from services.rustyface.galleries.galleries import Galleries, NewEntry, NewRejection, Query
from services.rustyface.galleries.ledger import Ledger
from services.rustyface.galleries.projection import FENCE
from services.rustyface.manage import Manage
from services.rustyface.transfers.files import Head, RejectionRow, writer
from services.rustyface.transfers.transfer import take_in
from tests.rustyface.transfers import (
    FORMATS,
    LARGE,
    D,
    ended_as,
    rows_of,
    stored,
    uploaded,
    vector,
    writing,
)

SET = m.DatasetSettings(threshold=0.7, scoring="best", keep_images=True)
NOBODY_THERE = "who it is about is nobody of the dataset 'd'"


def people(*names: str) -> list[NewEntry]:
    """Return one entry of each, called as they are."""
    return [
        NewEntry(id=name.lower(), vector=vector(1, at), subject=name)
        for at, name in enumerate(names)
    ]


def row(name: str, subject: str, entry: str | None = None, face=None) -> RejectionRow:
    return RejectionRow(name, subject, vector(0, 1) if face is None else face, entry)


def as_file(path, rejections=(), set_to=SET, kind="npz", rows=None, created_at=None):
    """Write a file with the entries of Ada and Bob, unless others are given."""
    file = writer(path, kind, Head(id="people", created_at=created_at, settings=set_to), D)
    file.add([r._replace(subject=r.id.upper()) for r in rows_of(2)] if rows is None else rows)
    file.reject(rejections)
    file.finish()
    return path


def held(galleries: Galleries, dataset: str) -> dict:
    """Return all that a dataset is, as far as it can move."""
    entries = galleries.picked(dataset, galleries.ids(dataset), embeddings=True)
    rejections = galleries.rejections(dataset)
    faces = {one.id: one.embedding for one in entries} | {one.id: one.vector for one in rejections}
    return {
        "entries": {
            one.id: (one.subject, one.metadata, one.quality, one.last_seen) for one in entries
        },
        "rejections": {one.id: (one.subject, one.entry) for one in rejections},
        "faces": {name: list(face) for name, face in faces.items()},
    }


def alike(one: dict, other: dict) -> bool:
    # Stored again, a vector may be another one in its last bit.
    faces = {name: pytest.approx(face, abs=1e-6) for name, face in other["faces"].items()}
    return one == other | {"faces": faces}


# --- There and back -------------------------------------------------------------------------------

NAMES = st.sampled_from(["Ada", "Bob", "Çelik", 'a "]}', None])
FACES = st.lists(st.floats(-1, 1, width=16), min_size=D, max_size=D).filter(any)
ENTRIES = st.dictionaries(
    st.sampled_from([f"e{i}" for i in range(6)]), st.tuples(NAMES, FACES), max_size=6
)
REJECTIONS = st.lists(
    st.tuples(NAMES.filter(bool), st.none() | st.integers(0, 5), FACES), max_size=5
)
SETTINGS = st.none() | st.builds(
    m.DatasetSettings,
    threshold=st.none() | st.floats(-1, 1),
    scoring=st.sampled_from(["best", "mean"]),
    keep_images=st.booleans(),
    quality=st.builds(m.QualityBounds, below=st.just("off"), yaw_max=st.none() | st.floats(0, 180)),
)


@pytest.mark.parametrize("kind", FORMATS)
async def test_what_goes_out_comes_in_as_it_was(client, carrier, kind):
    async with carrier() as at:
        loop = asyncio.get_running_loop()

        async def there_and_back(entries, rejections, set_to) -> None:
            name, copy = secrets.token_hex(4), secrets.token_hex(4)
            await at.galleries.create(name, settings=set_to)
            new = [
                NewEntry(id=one, vector=np.array(face), subject=who, metadata={"of": who})
                for one, (who, face) in entries.items()
            ]
            await at.galleries.enrol_many(name, new, existing="fail")
            said = [
                NewRejection(
                    id=f"r{i}",
                    subject=who,
                    vector=np.array(face),
                    entry=None if entry is None else f"e{entry}",
                )
                for i, (who, entry, face) in enumerate(rejections)
            ]
            told = await at.galleries.reject_again(name, said)
            out = (await at.do("export", name, format=kind)).gallery_result
            assert (out.entries, out.rejections, out.settings) == (len(new), told.added, "written")
            done = (await at.do("import", copy, artefact=out.artefact)).gallery_result
            assert (done.added, done.rejections, done.settings) == (len(new), told.added, "taken")
            assert (done.failed, done.notes) == ([], [])
            assert alike(held(at.galleries, copy), held(at.galleries, name))
            assert len(held(at.galleries, copy)["rejections"]) == told.added
            before, after = await at.galleries.settings(name), await at.galleries.settings(copy)
            assert before == after == (set_to or m.DatasetSettings())
            [old, new_] = [one for one in at.galleries.datasets() if one.id in (name, copy)]
            assert old.created_at == new_.created_at

        # Jobs take their time: what fails is shown as it is, not made smaller first.
        @settings(
            max_examples=12,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate,),
        )
        @given(entries=ENTRIES, rejections=REJECTIONS, set_to=SETTINGS)
        def whatever_it_has(entries, rejections, set_to) -> None:
            work = there_and_back(entries, rejections, set_to)
            asyncio.run_coroutine_threadsafe(work, loop).result(60)

        await asyncio.to_thread(whatever_it_has)


async def test_whoever_was_told_apart_stays_so_in_the_copy(client, carrier):
    async with carrier() as at:
        await at.galleries.create("old")
        await at.galleries.enrol_many("old", people("Ada"), existing="fail")
        await at.galleries.reject("old", "Ada", vector=vector(1, 0.1))
        out = (await at.do("export", "old")).gallery_result
        await at.do("import", "d", artefact=out.artefact)
        for dataset in ("old", "d"):
            query = Query(vector=vector(1, 0.11), k=1, threshold=0, revision=None)
            [match] = (await at.galleries.search(dataset, query)).matches
            assert (match.subject, match.rejected) == ("Ada", True)


# --- Settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "asked", "became", "threshold"),
    [
        (False, None, "taken", 0.7),
        (False, "take", "taken", 0.7),
        (False, "keep", "kept", None),
        (True, None, "kept", 0.2),
        (True, "keep", "kept", 0.2),
        (True, "take", "taken", 0.7),
    ],
)
async def test_a_dataset_that_an_import_makes_takes_the_settings_and_one_that_is_there_if_asked(
    client, carrier, tmp_path, there, asked, became, threshold
):
    artefact = await uploaded(client, as_file(tmp_path / "f"))
    async with carrier() as at:
        if there:
            await at.galleries.create("d", settings=m.DatasetSettings(threshold=0.2))
        done = (await at.do("import", "d", artefact=artefact, file_settings=asked)).gallery_result
        found = await at.galleries.settings("d")
        assert (done.settings, found.threshold, found.keep_images) == (
            became,
            threshold,
            became == "taken",
        )
        kept = [note for note in done.notes if "threshold, scoring, keep_images" in note]
        assert len(kept) == (became == "kept")


async def test_an_import_says_when_there_are_no_settings_to_take(client, carrier, tmp_path):
    artefact = await uploaded(client, as_file(tmp_path / "f", set_to=None))
    async with carrier() as at:
        done = (await at.do("import", "d", artefact=artefact, file_settings="take")).gallery_result
        assert done.settings is None
        assert done.notes == ["the file has no settings that could be taken"]
        # With those that it has already there is nothing to say.
        artefact = await uploaded(client, as_file(tmp_path / "g", set_to=m.DatasetSettings()))
        done = (await at.do("import", "d", artefact=artefact)).gallery_result
        assert (done.settings, done.notes) == ("kept", [])


async def test_a_dataset_that_an_import_makes_is_as_old_as_its_file_says(client, carrier, tmp_path):
    since = m.now().replace(year=2019)
    artefact = await uploaded(client, as_file(tmp_path / "f", created_at=since))
    async with carrier() as at:
        await at.do("import", "d", artefact=artefact)
        [there] = at.galleries.datasets()
        assert there.created_at == since


async def test_an_import_that_is_cancelled_leaves_a_dataset_set_as_it_was(
    client, carrier, tmp_path, hurried
):
    rows = [r._replace(subject="E") for r in rows_of(LARGE)]
    artefact = await uploaded(client, as_file(tmp_path / "f", [row("r", "E")], rows=rows))
    async with carrier() as at:
        await at.galleries.create("d", settings=m.DatasetSettings(threshold=0.2))
        work = m.GalleryWork(action="import", dataset="d", artefact=artefact, file_settings="take")
        job = await at.jobs.enter(work)
        await writing(client, job)
        await client.call(DATASET_JOB_CANCEL, m.NameJob(job=job.job))
        await ended_as(client, job, "cancelled")
        await until(lambda: at.galleries.ids("d") == [])
        assert (await at.galleries.settings("d")).threshold == 0.2
        await client.call(DATASET_JOB_RETRY, m.NameJob(job=job.job))
        done = (await ended_as(client, job, "done", 90)).gallery_result
        assert (done.settings, done.rejections) == ("taken", 1)
        assert (await at.galleries.settings("d")).threshold == 0.7


async def test_another_try_of_an_import_knows_that_the_first_one_made_the_dataset(
    client, carrier, tmp_path, hurried
):
    rows = [r._replace(subject="E") for r in rows_of(LARGE)]
    artefact = await uploaded(client, as_file(tmp_path / "f", [row("r", "E")], rows=rows))
    async with carrier() as at:
        job = await at.jobs.enter(m.GalleryWork(action="import", dataset="d", artefact=artefact))
        await writing(client, job)
    async with carrier(slot=1) as at:
        # From the first moment on it was set so; what somebody has changed since stays.
        assert (await at.galleries.settings("d")).threshold == 0.7
        changed = msgspec.structs.replace(SET, threshold=0.6)
        await at.galleries.configure("d", changed)
        done = (await ended_as(client, job, "done", 90)).gallery_result
        assert (done.settings, done.notes, done.added) == ("taken", [], LARGE)
        assert await at.galleries.settings("d") == changed


async def test_what_is_wrong_with_settings_or_rejections_keeps_all_of_a_file_out(
    client, carrier, tmp_path
):
    entries = [{"id": "a", "embedding": [1] * D, "subject": "Ada"}]
    good = {"id": "r", "subject": "Ada", "entry": "a"}
    for said, sentence in (
        ({"settings": {"threshold": 3}}, "settings: threshold: Expected `float` <= 1"),
        (
            {"rejections": [good, {"id": "s", "subject": "Ada"}]},
            "rejection 1 ('s'): it has neither",
        ),
        ({"rejections": [good, good]}, "rejection 1 ('r'): its id is that of rejection 0 already"),
    ):
        path = tmp_path / secrets.token_hex(4)
        path.write_text(json.dumps({"entries": entries, **said}))
        artefact = await uploaded(client, path)
        async with carrier() as at:
            failed = await at.do("import", "d", "failed", artefact=artefact)
            assert sentence in failed.error
            assert (failed.tries, "d" in at.galleries) == (1, False)


# --- Rejections -----------------------------------------------------------------------------------


async def test_rejections_of_whom_or_what_is_not_there_are_left_out_and_told(
    client, carrier, tmp_path
):
    file = as_file(
        tmp_path / "f",
        [
            row("r1", "E0"),
            row("r2", "Eve"),
            row("r3", "E0", "late"),
            row("r4", "Bob", "e0"),
            row("r5", "Bob", "bob"),
        ],
    )
    artefact = await uploaded(client, file)
    async with carrier() as at:
        await at.galleries.create("d")
        await at.galleries.enrol_many("d", people("Bob"), existing="fail")
        done = (await at.do("import", "d", artefact=artefact)).gallery_result
        # Bob came from elsewhere, but is there.
        assert [one.id for one in at.galleries.rejections("d")] == ["r1", "r4"]
        assert done.rejections == 2
        assert done.failed == [
            f"rejection r2: {NOBODY_THERE}",
            "rejection r3: the dataset 'd' has no entry 'late'",
            "rejection r5: the entry 'bob' is enrolled as whom it is about",
        ]
        [record] = await at.galleries.imports("d")
        assert record.rejections == 2


async def test_of_many_rejections_that_are_left_out_the_first_are_told_and_all_counted(
    client, carrier, tmp_path
):
    many = [row(f"r{i:04}", "Eve") for i in range(1_200)]
    artefact = await uploaded(client, as_file(tmp_path / "f", many))
    async with carrier() as at:
        done = (await at.do("import", "d", artefact=artefact)).gallery_result
        assert (len(done.failed), done.failed[-1]) == (100, f"rejection r0099: {NOBODY_THERE}")
        assert done.notes == ["rejections left out: 1,200"]


async def test_undoing_an_import_takes_back_the_rejections_that_it_brought_and_no_others(
    client, carrier, tmp_path
):
    async with carrier() as at:
        await at.galleries.create("d")
        await at.galleries.enrol_many("d", people("Ada", "Bob"), existing="fail")
        mine, _ = await at.galleries.reject("d", "Ada", entry="bob")
        known = await at.galleries.reject_again(
            "d", [NewRejection(id="r1", subject="Ada", vector=vector(0, 0, 1))]
        )
        assert known.added == 1
        both = [row("r1", "Ada"), row("r2", "Ada"), row("r3", "Bob", "ada")]
        artefact = await uploaded(client, as_file(tmp_path / "f", both, rows=[]))
        job = await at.do("import", "d", artefact=artefact)
        assert job.gallery_result.rejections == 2
        assert "rejections that were there already: 1" in job.gallery_result.notes
        assert {one.id for one in at.galleries.rejections("d")} == {mine, "r1", "r2", "r3"}
        # It is entries that are counted, and there were none.
        assert (await at.galleries.undo_import("d", job.job))[0] == 0
        assert {one.id for one in at.galleries.rejections("d")} == {mine, "r1"}
        # Their faces have left the stream as well.
        faces = set()
        async for event in client.store.galleries.read(gallery_events(client.root)):
            if ".rejection." in event.subject:
                kind = event.headers.get(codec.CONTENT_TYPE)
                faces.add(codec.decode(event.body, m.GalleryRejection, kind).id)
        assert faces - {FENCE} == {mine, "r1"}
        anew = await at.do("import", "d", artefact=await uploaded(client, tmp_path / "f"))
        assert anew.gallery_result.rejections == 2


async def test_an_import_that_is_taken_up_again_counts_the_rejections_it_had_brought(carrier):
    async with carrier() as at:
        await at.galleries.create("d")
        await at.galleries.enrol_many("d", people("Ada"), existing="fail")
        said = [
            NewRejection(id=f"r{i}", subject="Ada", vector=vector(1, i), imported="i1")
            for i in range(3)
        ]
        first = await at.galleries.reject_again("d", said[:2])
        again = await at.galleries.reject_again("d", said)
        assert (first.added, again.added, again.known) == (2, 3, 0)
        other = await at.galleries.reject_again(
            "d", [NewRejection(id="r0", subject="Ada", vector=vector(1), imported="i2")]
        )
        assert (other.added, other.known) == (0, 1)


async def test_a_rejection_without_a_face_takes_its_entry_s(carrier):
    async with carrier() as at:
        await at.galleries.create("d")
        await at.galleries.enrol_many("d", people("Ada", "Bob"), existing="fail")
        said = NewRejection(id="r", subject="Ada", vector=None, entry="bob")
        await at.galleries.reject_again("d", [said])
        [there] = at.galleries.rejections("d")
        assert there.vector.tolist() == pytest.approx(vector(1, 1).tolist())
        # Nothing is stored when one of them cannot be.
        more = [
            NewRejection(id=n, subject="Ada", vector=v) for n, v in (("s", vector(1)), ("t", None))
        ]
        with pytest.raises(InvalidRequest, match="needs an entry or an embedding"):
            await at.galleries.reject_again("d", more)
        assert [one.id for one in at.galleries.rejections("d")] == ["r"]


async def test_a_rejection_of_somebody_who_is_renamed_at_that_moment_is_told_and_not_kept(
    carrier, monkeypatch
):
    async with carrier() as at:
        await at.galleries.create("d")
        await at.galleries.enrol_many("d", people("Ada", "Bob"), existing="fail")
        append = Ledger.append

        async def late(self, *args: object, **more: object):
            monkeypatch.undo()
            await at.galleries.move_subjects("d", ["Ada"], "Ada L.")
            return await append(self, *args, **more)

        monkeypatch.setattr(Ledger, "append", late)
        said = [
            NewRejection(id="a", subject="Ada", vector=vector(0, 1)),
            NewRejection(id="b", subject="Bob", vector=vector(0, 1)),
        ]
        told = await at.galleries.reject_again("d", said)
        assert (told.added, [one.id for one, _ in told.refused]) == (1, ["a"])
        await at.galleries.wait(await at.galleries.newest())
        assert list(at.galleries._galleries["d"].rejections) == ["b"]


async def test_an_export_goes_when_a_rejection_is_taken_back(client, carrier):
    async with carrier() as at:
        await at.galleries.create("d")
        await at.galleries.enrol_many("d", people("Ada"), existing="fail")
        rejection, _ = await at.galleries.reject("d", "Ada", vector=vector(1, 1))
        await at.do("export", "d")
        manage = Manage(at.galleries, at.jobs, lambda _: (0.4, 0.4), lambda *_: None)
        await manage.answer(
            m.ManageDataset(action="withdraw-rejection", dataset="d", rejection=rejection)
        )
        assert await stored(client) == set()


# --- The folder -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
async def test_a_file_in_the_folder_brings_its_settings_and_rejections(carrier, tmp_path, kind):
    folder = tmp_path / "datasets"
    folder.mkdir()
    as_file(folder / f"x.{kind}", [row("r1", "E0", "e1"), row("r2", "Eve")], kind=kind)
    async with carrier() as at:
        await take_in(folder, at.galleries)
        assert await at.galleries.settings("people") == SET
        assert [one.id for one in at.galleries.rejections("people")] == ["r1"]

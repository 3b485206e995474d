"""What jobs of datasets leave: a new dataset, and nothing of what was deleted or given up."""

import pytest

from bus import job_rules
from bus import messages as m
from bus.errors import Unavailable
from bus.subjects import DATASET_JOB_CANCEL
from bus.testing import until
from services.rustyface.galleries.galleries import NewEntry, Query
from services.rustyface.manage import Manage
from services.rustyface.transfers import exports as exports_module
from services.rustyface.transfers import leftovers as leftovers_module
from tests.rustyface.transfers import (
    Pixels,
    stored,
    uploaded,
    vector,
)

# --- What must not stay ---------------------------------------------------------------------------


async def test_an_export_goes_when_somebody_is_deleted(client, carrier):
    async with carrier() as at:
        for name in ("d", "other"):
            await at.galleries.create(name)
            await at.galleries.enrol(name, NewEntry(id="a", vector=vector(1), subject="Ada"))
        gone = (await at.do("export", "d")).gallery_result.artefact
        kept = (await at.do("export", "other")).gallery_result.artefact
        assert {gone, kept} <= await stored(client)
        manage = Manage(at.galleries, at.jobs, lambda _: (0.4, 0.4), lambda *_: None)
        asked = m.ManageDataset(action="remove-subject", dataset="d", subject="Ada")
        assert (await manage.answer(asked)).affected == 1
        assert await stored(client) == {kept}


async def removed(galleries) -> None:
    await galleries.remove("d", "a")


async def removed_with_the_person(galleries) -> None:
    await galleries.remove_subject("d", "Ada")


async def withdrawn(galleries) -> None:
    [rejection] = galleries.rejections("d")
    await galleries.withdraw("d", rejection.id)


async def undone(galleries) -> None:
    await galleries.undo_import("d", "i1")


async def deleted_and_made_anew(galleries) -> None:
    await galleries.delete("d")
    await galleries.create("d")


@pytest.mark.parametrize(
    "deletion", [removed, removed_with_the_person, withdrawn, undone, deleted_and_made_anew]
)
async def test_an_export_goes_though_whoever_deleted_something_was_killed(
    client, carrier, deletion
):
    async with carrier() as at:
        galleries = at.galleries
        await galleries.create("d")
        record = m.GalleryImport(id="i1", at=m.now(), source="f", format="json")
        await galleries.begin_import("d", record)
        for name, imported in (("Ada", None), ("Bob", "i1")):
            one = NewEntry(id=name[0].lower(), vector=vector(1), subject=name, imported=imported)
            await galleries.enrol("d", one)
        await galleries.reject("d", "Bob", vector=vector(0, 1))
        gone = (await at.do("export", "d")).gallery_result.artefact
        await galleries.enrol("d", NewEntry(id="c", vector=vector(1), subject="Ada"))
        await galleries.move_subjects("d", ["Bob"], "Rob")
        exports = at.jobs._work.exports
        await exports.drop_missed()
        assert await stored(client) == {gone}
        await deletion(galleries)
        await exports.drop_missed()
        assert await stored(client) == set()


async def test_an_export_has_an_hour(client, carrier, monkeypatch):
    async with carrier() as at:
        await at.galleries.create("d")
        job = await at.do("export", "d")
        exports = at.jobs._work.exports
        await exports.drop_old()
        assert await stored(client) == {job.gallery_result.artefact}
        monkeypatch.setattr(exports_module, "KEPT", exports_module.KEPT * 0)
        await exports.drop_old()
        assert await stored(client) == set()


async def test_leftovers_are_deleted_and_what_is_needed_stays(
    client, carrier, tmp_path, monkeypatch
):
    paths = {name: tmp_path / name for name in ("unused", "waiting", "image")}
    for name, path in paths.items():
        path.write_bytes(name.encode())
    digests = {name: await uploaded(client, path) for name, path in paths.items()}
    async with carrier(at_once=0) as at:
        await at.galleries.create("d")
        entry = NewEntry(id="a", vector=vector(1), image=digests["image"])
        await at.galleries.enrol("d", entry)
        work = m.GalleryWork(action="import", dataset="d", artefact=digests["waiting"])
        job = await at.jobs.enter(work)
        clear = at.jobs._leftovers.clear
        await clear()
        assert await stored(client) == set(digests.values())
        monkeypatch.setattr(leftovers_module, "YOUNG", leftovers_module.YOUNG * 0)
        await clear()
        assert await stored(client) == {digests["waiting"], digests["image"]}
        # A job that was given up may be tried again, for a day.
        await client.call(DATASET_JOB_CANCEL, m.NameJob(job=job.job))
        await clear()
        assert await stored(client) == {digests["waiting"], digests["image"]}
        monkeypatch.setattr(leftovers_module, "RETRIED", leftovers_module.RETRIED * 0)
        await clear()
        assert await stored(client) == {digests["image"]}


async def test_images_whose_deletion_was_cut_short_are_deleted_or_come_back(
    client, carrier, tmp_path, monkeypatch
):
    """Whoever had taken them out of sight died before it could decide."""
    monkeypatch.setattr(leftovers_module, "CUT_SHORT", leftovers_module.CUT_SHORT * 0)
    digests = []
    for name in ("needed", "not"):
        path = tmp_path / name
        path.write_bytes(name.encode())
        digests.append(await uploaded(client, path))

    async def dies() -> bool:
        raise Unavailable("the broker is away")

    async with carrier(at_once=0) as at:
        await at.galleries.create("d")
        await at.galleries.enrol("d", NewEntry(id="a", vector=vector(1), image=digests[0]))
        for digest in digests:
            with pytest.raises(Unavailable):
                await client.store.faces.delete(digest, unless=dies)
        assert await stored(client) == set()
        await at.jobs._leftovers.clear()
        assert await stored(client) == {digests[0]}
        assert await client.store.faces.half_deleted(m.now()) == []


async def test_what_a_worker_left_that_died_before_it_could_take_it_out_is_taken_out(
    client, carrier, monkeypatch
):
    monkeypatch.setattr(leftovers_module, "CLOSED", leftovers_module.CLOSED * 0)
    async with carrier(at_once=0) as at:
        await at.galleries.create("d")
        work = m.GalleryWork(action="import", dataset="d", artefact="ab" * 32)
        job = job_rules.ended(job_rules.new(work, m.now(), only=None), "cancelled", m.now())
        record = m.GalleryImport(id=job.job, at=m.now(), source="x", format="npz")
        await at.galleries.begin_import("d", record)
        half = [NewEntry(id="e0", vector=vector(1), imported=job.job)]
        await at.galleries.enrol_many("d", half, existing="skip")
        await client.store.jobs.put(job, job.job)
        await at.jobs._leftovers.clear()
        assert at.galleries.ids("d") == []
        assert [one.state for one in await at.galleries.imports("d")] == ["undone"]


async def test_one_replica_clears_for_all(carrier):
    async with carrier() as first, carrier(slot=1) as second:
        assert await first.jobs._leftovers._leads()

        async def only_the_first() -> bool:
            return not await second.jobs._leftovers._leads()

        await until(only_the_first)


# --- Embedded anew --------------------------------------------------------------------------------


async def test_a_dataset_is_embedded_anew_from_its_images(client, carrier, samples_dir, tmp_path):
    digests = {}
    for name in ("astronaut", "cameraman"):
        digests[name] = await uploaded(client, samples_dir / f"{name}.jpg")
    (tmp_path / "text").write_text("no image")
    digests["text"] = await uploaded(client, tmp_path / "text")
    async with carrier() as at:
        kept = m.DatasetSettings(keep_images=True, threshold=0.5)
        await at.galleries.create("old", settings=kept)
        entries = [
            NewEntry(id=name, vector=vector(1, i), image=digest, subject=name, metadata={"n": i})
            for i, (name, digest) in enumerate(digests.items())
        ]
        entries.append(NewEntry(id="bare", vector=vector(0, 0, 1)))
        await at.galleries.enrol_many("old", entries, existing="skip")
    async with carrier(encoder=Pixels()) as at:
        done = (await at.do("reembed", "old", into="new")).gallery_result
        assert (done.entries, done.added, done.skipped) == (4, 2, 2)
        assert [one.partition(":")[0] for one in sorted(done.failed)] == ["bare", "text"]
        assert at.galleries.ids("new") == ["astronaut", "cameraman"]
        settings = await at.galleries.settings("new")
        assert (settings.keep_images, settings.threshold) == (True, None)
        query, _ = Pixels().encode((samples_dir / "cameraman.jpg").read_bytes())
        found = await at.galleries.search(
            "new", Query(vector=query, k=1, threshold=0.99, revision=None, by_embedder=True)
        )
        [match] = found.matches
        assert (match.entry.id, match.entry.subject, match.entry.image) == (
            "cameraman", "cameraman", digests["cameraman"],
        )  # fmt: skip
        failed = await at.do("reembed", "old", "failed", into="new")
        assert "there is a dataset 'new' already" in failed.error

"""The repository of models: what comes in, what is sound, what it is called, and how it leaves."""

import asyncio
import json
import shutil
from datetime import timedelta
from types import SimpleNamespace

import msgspec
import pytest

from bus import messages as m
from bus.errors import Conflict, InvalidRequest, NotFound, Unavailable, Unprocessable
from bus.subjects import (
    MODEL_ADD,
    MODEL_ALIAS,
    MODEL_DESCRIBE,
    MODEL_GC,
    MODEL_LOAD,
    MODEL_REMOVE,
    MODEL_RUN,
    MODEL_UNLOAD,
    MODEL_VALIDATE,
)
from bus.testing import until
from services.candle.repository import garbage
from services.candle.repository.repository import Repository

SOURCE = m.ModelSource(kind="upload", file_name="mine.json", by="somebody")


def content(*weights: float, bias: float = 0) -> bytes:
    return json.dumps(
        {"input_dim": 2, "output_dim": 1, "weights": weights, "bias": [bias]}
    ).encode()


GOOD, OTHER, BAD = content(1, 1), content(2, 2), content(1, 2, 3)


@pytest.fixture
def upload(client):
    """Bring bytes into the object store; return their digest."""

    async def stored(body: bytes) -> str:
        async with client.store.artefacts.writing(len(body)) as upload:
            await upload.write(body)
            return (await upload.commit()).digest

    return stored


@pytest.fixture
def add(client, upload):
    """Bring bytes, and add them as a version."""

    async def added(body: bytes, version: str | None = None, **more) -> m.AddedModel:
        asked = {"id": "m", "file_name": "mine.json", "source": SOURCE, **more}
        ask = m.AddModel(checksum=await upload(body), version=version, **asked)
        return await client.call(MODEL_ADD, ask, timeout_s=60)

    return added


async def spec_of(client, model: str = "m") -> m.ModelSpec | None:
    entry = await client.store.models.get(model)
    return entry.value if entry else None


async def load(client, version: str | None = None, **more) -> m.LoadedModel:
    return await client.call(MODEL_LOAD, m.LoadModel(id="m", version=version, **more), timeout_s=60)


async def run(client) -> list[list[float]]:
    return (await client.call(MODEL_RUN, m.RunModel(id="m", inputs=[[1, 1]]))).outputs


async def remove(client, **asked) -> m.RemovedModel:
    return await client.call(MODEL_REMOVE, m.RemoveModel(id="m", **asked), timeout_s=60)


async def collect(client, *, dry_run: bool = False) -> m.CollectedGarbage:
    return await client.call(MODEL_GC, m.CollectGarbage(dry_run=dry_run), timeout_s=60)


# --- Add ------------------------------------------------------------------------------------------


async def test_an_artefact_becomes_a_version_that_is_not_served_until_it_is_loaded(
    client, worker, add
):
    async with worker():
        added = await add(GOOD, description="adds", labels={"team": "a"}, licence="MIT")
        assert (added.version, added.created, added.report.sound) == ("1", True, True)
        assert (added.report.format, added.report.batched) == ("linear", True)
        assert (await client.store.reports.get(added.checksum)).value == added.report
        spec = await spec_of(client)
        assert (spec.description, spec.labels, spec.licence) == ("adds", {"team": "a"}, "MIT")
        assert spec.created_at is not None
        (version,) = spec.versions
        assert (version.wanted, version.sound, version.problem) == (False, True, None)
        assert (version.source, version.path) == (SOURCE, "mine.json")
        assert (version.size_bytes, version.inputs[0].shape) == (len(GOOD), [-1, 2])
        assert (await client.store.served.get("candle", 0)).value.models == []
        assert (await load(client)).version == "1"
        assert await run(client) == [[2]]


async def test_the_next_version_is_added_beside_what_is_served(client, worker, add):
    async with worker():
        await add(GOOD)
        await load(client)
        assert (await add(OTHER)).version == "2"
        assert await run(client) == [[2]]
        await load(client, "2")
        assert await run(client) == [[4]]


async def test_the_same_bytes_under_the_same_version_are_there_once(client, worker, add):
    async with worker():
        first = await add(GOOD, "v1")
        again = await add(GOOD, "v1", description="said later")
        unnamed = await add(GOOD)
        assert (first.created, again.created, unnamed.created) == (True, False, False)
        assert unnamed.version == "v1"
        spec = await spec_of(client)
        assert [v.version for v in spec.versions] == ["v1"]
        assert spec.description == "said later"


async def test_a_version_never_changes_its_bytes(client, worker, add):
    async with worker():
        await add(GOOD, "7")
        with pytest.raises(Conflict, match=r"'7' of 'm' has other bytes.*next free number is 8"):
            await add(OTHER, "7")
        assert (await spec_of(client)).versions[0].checksum == (await add(GOOD)).checksum


@pytest.mark.parametrize("name", ["default", "latest"])
async def test_an_alias_is_no_name_for_what_is_added(client, worker, add, name):
    async with worker():
        with pytest.raises(InvalidRequest, match="is an alias"):
            await add(GOOD, name)
        await add(GOOD)
        await load(client)
        await client.call(MODEL_ALIAS, m.AliasModel(id="m", alias="stable", version="1"))
        with pytest.raises(Conflict, match=r"'stable' is an alias.*next free number is 2"):
            await add(OTHER, "stable")


async def test_of_many_that_add_one_version_at_once_one_wins(client, worker, add):
    async with worker(0), worker(1):
        done = await asyncio.gather(
            *(add(GOOD, "1") for _ in range(4)),
            *(add(OTHER, "1") for _ in range(4)),
            return_exceptions=True,
        )
        added = [one for one in done if isinstance(one, m.AddedModel)]
        refused = [one for one in done if isinstance(one, Conflict)]
        assert (len(added), len(refused)) == (4, 4)
        assert sum(one.created for one in added) == 1
        assert len({one.checksum for one in added}) == 1
        assert len((await spec_of(client)).versions) == 1


async def test_many_versions_added_at_once_all_get_a_number(client, worker, add):
    async with worker(0), worker(1):
        added = await asyncio.gather(*(add(content(i, i)) for i in range(6)))
    assert sorted(one.version for one in added) == ["1", "2", "3", "4", "5", "6"]


async def test_what_is_not_stored_cannot_be_added(client, worker):
    async with worker():
        ask = m.AddModel(id="m", checksum="0" * 64, file_name="x.onnx")
        with pytest.raises(NotFound, match="0000 is not stored; upload it first"):
            await client.call(MODEL_ADD, ask)
        assert await spec_of(client) is None


@pytest.mark.parametrize("name", ["model", "model.exe", ".."])
async def test_what_names_no_format_cannot_be_added(client, worker, add, name):
    async with worker():
        with pytest.raises(InvalidRequest, match="the format is told by the suffix"):
            await add(GOOD, file_name=name)


async def test_a_disk_without_room_refuses_what_is_added(client, worker, add, monkeypatch):
    full = SimpleNamespace(total=10, used=10, free=0)
    async with worker():
        monkeypatch.setattr(shutil, "disk_usage", lambda _path: full)
        with pytest.raises(Unavailable, match=f"has no room for {len(GOOD)} bytes"):
            await add(GOOD)
        assert await spec_of(client) is None


async def test_an_artefact_that_was_removed_while_it_was_added_is_brought_back(
    client, worker, add, monkeypatch
):
    change = Repository.change

    async def after_removal(self, model, how):
        revision = await change(self, model, how)
        for one in await self.store.artefacts.all():
            await self.store.artefacts.delete(one.digest)
        return revision

    async with worker():
        monkeypatch.setattr(Repository, "change", after_removal)
        added = await add(GOOD)
        assert await client.store.artefacts.size(added.checksum) == len(GOOD)


# --- Sound or not ---------------------------------------------------------------------------------


async def test_what_is_not_sound_is_kept_with_its_problem_and_cannot_be_loaded(client, worker, add):
    says = "weights length 3 does not match shape 1x2"
    async with worker():
        added = await add(BAD)
        assert (added.created, added.report.sound) == (True, False)
        assert says in added.report.problems[0].what
        (version,) = (await spec_of(client)).versions
        assert version.sound is False
        assert says in version.problem
        for name in (None, "1"):
            with pytest.raises(Unprocessable, match=f"version '1' of 'm' is not sound: .*{says}"):
                await load(client, name)
        assert (await spec_of(client)).versions[0].wanted is False


async def test_a_file_that_is_loaded_says_where_it_came_from_and_has_a_report(
    client, worker, linear
):
    async with worker():
        await load(client, path=linear())
        await load(client, path="sent.json", content=OTHER)
        spec = await spec_of(client)
        assert [(v.source.kind, v.source.file_name) for v in spec.versions] == [
            ("folder", "m.json"),
            ("content", "sent.json"),
        ]
        assert all(v.sound for v in spec.versions)
        assert spec.created_at <= spec.versions[0].added_at + timedelta(seconds=1)
        for version in spec.versions:
            assert (await client.store.reports.get(version.checksum)).value.sound


async def test_a_file_that_is_loaded_and_not_sound_leaves_nothing(client, worker):
    async with worker():
        with pytest.raises(Unprocessable, match="weights length 3"):
            await load(client, path="sent.json", content=BAD)
        assert await spec_of(client) is None
        assert await client.store.artefacts.all() == []
        assert await client.store.reports.all() == []


async def forget_verdict(client) -> None:
    """Make the model's versions what an older bkg has written."""
    spec = await spec_of(client)
    versions = [msgspec.structs.replace(v, sound=None, problem=None) for v in spec.versions]
    await client.store.models.put(msgspec.structs.replace(spec, versions=versions), "m")


async def test_a_version_that_was_never_validated_is_so_before_it_is_loaded(client, worker, add):
    async with worker():
        await add(GOOD, "1")
        await add(BAD, "2")
        await forget_verdict(client)
        with pytest.raises(Unprocessable, match="version '2' of 'm' is not sound"):
            await load(client, "2")
        assert (await load(client, "1")).version == "1"
        assert [v.sound for v in (await spec_of(client)).versions] == [True, False]


async def test_a_version_is_validated_again_and_every_model_is_told(client, worker, add):
    async with worker():
        first = await add(GOOD)
        await add(GOOD, id="twin")
        await forget_verdict(client)
        report = await client.call(MODEL_VALIDATE, m.ValidateModel(id="m"))
        assert report.sound
        assert report.validated_at > first.report.validated_at
        assert (await client.store.reports.get(report.checksum)).value == report
        assert (await spec_of(client)).versions[0].sound is True
        with pytest.raises(NotFound, match="no model 'x'"):
            await client.call(MODEL_VALIDATE, m.ValidateModel(id="x"))
        with pytest.raises(NotFound, match="in version '9'; there are: 1"):
            await client.call(MODEL_VALIDATE, m.ValidateModel(id="m", version="9"))


async def test_a_served_version_that_is_found_unsound_is_served_on_and_says_so(
    client, worker, add, monkeypatch
):
    really = Repository._validated

    async def found_wanting(self, file, name, checksum, sample=None):
        report = await really(self, file, name, checksum, sample)
        problem = m.ModelProblem(where="weights", what="they are out of fashion")
        return msgspec.structs.replace(report, sound=False, problems=[problem])

    async with worker():
        await add(GOOD)
        await load(client)
        monkeypatch.setattr(Repository, "_validated", found_wanting)
        report = await client.call(MODEL_VALIDATE, m.ValidateModel(id="m"))
        assert report.sound is False
        assert "served until it is unloaded" in report.advice[0]
        version = (await spec_of(client)).versions[0]
        assert (version.sound, version.wanted) == (False, True)
        assert version.problem == "weights: they are out of fashion"
        assert await run(client) == [[2]]
        await client.call(MODEL_UNLOAD, m.UnloadModel(id="m"))
        with pytest.raises(Unprocessable, match="out of fashion"):
            await load(client)


async def test_a_version_is_validated_with_a_sample(client, worker, add):
    def sample(*shape: int) -> dict[str, object]:
        tensor = {"name": "inputs", "datatype": "FP32", "shape": shape, "data": [1.0] * shape[1]}
        return {"inputs": [tensor]}

    async with worker():
        await add(GOOD)
        ask = m.ValidateModel(id="m", sample=sample(1, 2))
        report = await client.call(MODEL_VALIDATE, ask)
        assert report.sound
        assert report.sample_shapes == {"inputs": [1, 2]}


# --- Describe -------------------------------------------------------------------------------------


async def test_what_people_read_about_a_model_changes_and_the_rest_stays(client, worker, add):
    async with worker():
        await add(GOOD, description="old", licence="MIT")
        ask = m.DescribeModel(id="m", description="new", labels={"a": "b"})
        spec = await client.call(MODEL_DESCRIBE, ask)
        assert (spec.description, spec.labels, spec.licence) == ("new", {"a": "b"}, "MIT")
        assert spec == await spec_of(client)
        spec = await client.call(MODEL_DESCRIBE, m.DescribeModel(id="m", labels={}))
        assert (spec.description, spec.labels) == ("new", {})
        with pytest.raises(NotFound, match="no model 'x'"):
            await client.call(MODEL_DESCRIBE, m.DescribeModel(id="x", description=""))


# --- Remove ---------------------------------------------------------------------------------------


async def test_a_removed_version_goes_with_what_only_it_needs(client, worker, add):
    async with worker():
        one, two = await add(GOOD), await add(OTHER)
        await add(GOOD, id="twin")
        removed = await remove(client, version="1")
        # Another model needs the artefact.
        assert (removed.versions, removed.artefacts, removed.freed_bytes) == (["1"], [], 0)
        assert [v.version for v in (await spec_of(client)).versions] == ["2"]
        removed = await remove(client)
        assert (removed.versions, removed.artefacts) == (["2"], [two.checksum])
        assert removed.freed_bytes == len(OTHER)
        assert await spec_of(client) is None
        assert [kept.digest for kept in await client.store.artefacts.all()] == [one.checksum]
        assert await client.store.reports.get(two.checksum) is None
        assert await client.store.reports.get(one.checksum) is not None


async def test_what_is_not_there_cannot_be_removed(client, worker, add):
    async with worker():
        with pytest.raises(NotFound, match="no model 'm'"):
            await remove(client)
        await add(GOOD)
        with pytest.raises(NotFound, match="no version '2' of 'm'; there are: 1"):
            await remove(client, version="2")
        # An alias is no version's own name.
        with pytest.raises(NotFound, match="no version 'latest'"):
            await remove(client, version="latest", force=True)


async def test_a_dry_run_says_what_would_go_and_who_uses_it_and_does_nothing(client, worker, add):
    async with worker() as candle:
        added = await add(GOOD)
        await load(client)
        await client.call(MODEL_ALIAS, m.AliasModel(id="m", alias="stable", version="1"))
        await until(lambda: _is_served(client, 0))
        planned = await remove(client, dry_run=True)
        assert planned == m.RemovedModel(
            id="m",
            versions=["1"],
            artefacts=[added.checksum],
            freed_bytes=len(GOOD),
            used_by=[f"served by candle.0 on {candle._instance.host}", "alias stable"],
            dry_run=True,
        )
        assert await run(client) == [[2]]
        assert await client.store.artefacts.size(added.checksum) == len(GOOD)


async def _is_served(client, *slots: int) -> bool:
    served = [await client.store.served.get("candle", slot) for slot in slots]
    return all(
        entry and any(one.state == "ready" for one in entry.value.models) for entry in served
    )


async def test_what_is_used_is_removed_only_by_force_which_ends_its_use_first(client, worker, add):
    async with worker(0), worker(1):
        await add(GOOD)
        await add(OTHER)
        await load(client, "1")
        await client.call(MODEL_ALIAS, m.AliasModel(id="m", alias="stable", version="1"))
        await until(lambda: _is_served(client, 0, 1))
        with pytest.raises(Conflict, match=r"in use: .*alias stable.*remove it with force") as told:
            await remove(client, version="1")
        assert "alias stable" in told.value.reasons
        assert await run(client) == [[2]]
        removed = await remove(client, version="1", force=True)
        assert "alias stable" in removed.used_by
        spec = await spec_of(client)
        assert ([v.version for v in spec.versions], spec.aliases) == (["2"], {})
        for entry in await client.store.served.all():
            assert entry.value.models == []
        await load(client)
        assert await run(client) == [[4]]


async def test_a_removed_model_can_come_back_under_its_name(client, worker, add):
    async with worker():
        await add(GOOD)
        await load(client)
        await remove(client, force=True)
        added = await add(OTHER)
        assert (added.version, added.created) == ("1", True)
        await load(client)
        assert await run(client) == [[4]]


# --- Garbage --------------------------------------------------------------------------------------


async def test_garbage_is_what_no_version_needs_and_is_not_new(
    client, worker, add, upload, monkeypatch
):
    async with worker():
        needed = await add(GOOD)
        lone = await upload(OTHER)
        lone_report = msgspec.structs.replace(needed.report, checksum="f" * 64)
        await client.store.reports.put(lone_report, "f" * 64)
        async with client.store.artefacts.writing() as broken:
            await broken.write(b"half")
            await broken.keep()
        # Each of them may be about to be taken up.
        assert await collect(client, dry_run=True) == m.CollectedGarbage(
            artefacts=[], uploads=[], freed_bytes=0, dry_run=True
        )
        monkeypatch.setattr(garbage, "ARTEFACT_GRACE", timedelta())
        monkeypatch.setattr(garbage, "UPLOAD_GRACE", timedelta())
        collected = await collect(client, dry_run=True)
        assert collected.artefacts == [lone]
        assert collected.uploads == [broken.id]
        assert collected.freed_bytes == len(OTHER) + 4
        assert await client.store.artefacts.size(lone) == len(OTHER)
        assert await collect(client) == msgspec.structs.replace(collected, dry_run=False)
        assert [one.digest for one in await client.store.artefacts.all()] == [needed.checksum]
        assert await client.store.artefacts.unfinished() == []
        reports = await client.store.reports.all()
        assert [entry.names[0] for entry in reports] == [needed.checksum]
        assert (await collect(client)).freed_bytes == 0


async def test_a_deletion_that_was_cut_short_is_brought_to_its_end(
    client, worker, upload, monkeypatch
):
    async with worker():
        lone, store = await upload(OTHER), client.store.artefacts

        async def dies(*_args: object) -> None:
            raise Unavailable("the broker is away")

        with monkeypatch.context() as patched:
            patched.setattr(store, "drop", dies)
            with pytest.raises(Unavailable):
                await store.delete(lone)
        monkeypatch.setattr(garbage, "ARTEFACT_GRACE", timedelta())
        assert await store.half_deleted(m.now()) == [lone]
        await collect(client)
        assert await store.half_deleted(m.now()) == []
        assert sum((await store._stream.occupied(">")).subjects.values()) == 0


async def test_garbage_that_is_brought_again_in_the_last_moment_stays(
    client, worker, upload, monkeypatch
):
    async with worker() as candle:
        digest = await upload(GOOD)
        monkeypatch.setattr(garbage, "ARTEFACT_GRACE", timedelta())
        needed = candle._garbage._specs

        async def brought_again():
            await upload(GOOD)
            return await needed()

        monkeypatch.setattr(candle._garbage, "_specs", brought_again)
        assert (await collect(client)).artefacts == []
        assert await client.store.artefacts.size(digest) == len(GOOD)


async def test_marks_of_removed_files_go_when_they_are_old_and_their_file_has_gone(
    client, worker, linear
):
    linear("lies.json")
    long_ago = m.RemovedFile(removed_at=m.now() - timedelta(days=31))
    lately = m.RemovedFile(removed_at=m.now() - timedelta(days=29))
    async with worker():
        for mark, model in ((long_ago, "gone"), (long_ago, "lies"), (lately, "late")):
            await client.store.removed.put(mark, model, "a" * 64)
        await collect(client, dry_run=True)
        assert len(await client.store.removed.all()) == 3
        await collect(client)
    assert {one.names[0] for one in await client.store.removed.all()} == {"lies", "late"}


async def test_marks_of_removed_files_stay_while_the_folder_is_away(client, worker, models_dir):
    long_ago = m.RemovedFile(removed_at=m.now() - timedelta(days=31))
    await client.store.removed.put(long_ago, "gone", "a" * 64)
    async with worker():
        shutil.rmtree(models_dir)
        await collect(client)
    assert len(await client.store.removed.all()) == 1


async def test_a_sample_that_is_loaded_has_its_licence_whoever_comes_first(client, worker):
    async with worker(default_model="linear-demo.json"):
        await client.call(MODEL_LOAD, m.LoadModel(id="iris", path="iris.onnx"), timeout_s=60)
        for model in ("iris", "default"):
            assert (await spec_of(client, model)).licence == "Apache-2.0"


async def test_the_artefact_of_a_version_that_was_forgotten_is_garbage(
    client, worker, add, monkeypatch
):
    monkeypatch.setattr("services.candle.repository.specs.VERSIONS_KEPT", 2)
    monkeypatch.setattr(garbage, "ARTEFACT_GRACE", timedelta())
    async with worker():
        first, *_ = [await add(content(i, i)) for i in range(3)]
        assert [v.version for v in (await spec_of(client)).versions] == ["2", "3"]
        collected = await collect(client)
        assert collected.artefacts == [first.checksum]

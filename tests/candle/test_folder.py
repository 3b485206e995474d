"""The watched models folder: what is dropped there becomes a version, once, and is not served."""

import asyncio
import json
import os
import shutil
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from structlog.testing import capture_logs

from bus import messages as m
from bus.subjects import CANDLE_STATS, MODEL_LOAD, MODEL_RUN
from bus.testing import until
from services.candle.repository import folder as folder_module
from services.candle.repository.cache import Cache
from services.candle.repository.folder import FILES_MAX, Folder, scanned
from services.candle.repository.garbage import Garbage
from services.candle.repository.repository import Repository


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(folder_module, "LOOK_S", 0.05)
    monkeypatch.setattr(folder_module, "SETTLED_S", 0.2)
    monkeypatch.setattr(folder_module, "AGAIN_S", 0.2)


@pytest.fixture
def dropped(tmp_path):
    """An empty models folder."""
    folder = tmp_path / "dropped"
    folder.mkdir()
    return folder


@pytest.fixture
def watching(client, connected, tmp_path, dropped):
    """Watch the folder, as so many instances on one host."""

    @asynccontextmanager
    async def start(instances: int = 1, *, wanted=lambda: True):
        async with AsyncExitStack() as stack:
            for i in range(instances):
                own = await connected()
                cache = Cache(tmp_path / f"cache-{i}", 1 << 30)
                repository = Repository(own.store, dropped, cache)
                await repository.open()
                await stack.enter_async_context(Folder(dropped, repository, wanted).watching())
            yield

    return start


def content(weights=(1, 1)) -> str:
    return json.dumps({"input_dim": 2, "output_dim": 1, "weights": weights, "bias": [0]})


async def versions(client, model: str) -> list[m.ModelVersion]:
    entry = await client.store.models.get(model)
    return entry.value.versions if entry else []


async def has(client, model: str, count: int = 1) -> None:
    async def there() -> bool:
        return len(await versions(client, model)) == count

    await until(there, 30)


async def test_a_file_that_is_dropped_becomes_a_version_that_is_not_served(
    client, watching, dropped
):
    async with watching():
        (dropped / "m.json").write_text(content())
        await has(client, "m")
    (version,) = await versions(client, "m")
    assert (version.version, version.wanted, version.sound) == ("1", False, True)
    assert version.source == m.ModelSource(kind="folder", file_name="m.json")
    assert version.path == "m.json"


async def test_a_folder_as_triton_lays_it_out_says_model_and_version(client, watching, dropped):
    for version in ("2", "7"):
        (dropped / "net" / version).mkdir(parents=True)
        (dropped / "net" / version / "model.json").write_text(content((1, int(version))))
    async with watching():
        await has(client, "net", 2)
    assert {one.version for one in await versions(client, "net")} == {"2", "7"}


async def test_new_content_is_the_next_version_and_the_old_one_stays(client, watching, dropped):
    async with watching():
        (dropped / "m.json").write_text(content())
        await has(client, "m")
        (dropped / "m.json").write_text(content((2, 2)))
        await has(client, "m", 2)
        (dropped / "m.json").unlink()
        (dropped / "other.json").write_text(content())
        await has(client, "other")
    assert [one.version for one in await versions(client, "m")] == ["1", "2"]


async def test_several_instances_enter_a_file_once(client, watching, dropped):
    async with watching(3):
        for i in range(5):
            (dropped / f"m{i}.json").write_text(content((1, i)))
        for i in range(5):
            await has(client, f"m{i}")
        # Another one, later: all instances have been past the first ones by then.
        (dropped / "last.json").write_text(content((9, 9)))
        await has(client, "last")
    for i in range(5):
        assert len(await versions(client, f"m{i}")) == 1


async def test_the_same_bytes_are_not_entered_again(client, watching, dropped):
    """Neither after a restart, nor when the file was touched or copied anew."""
    (dropped / "m.json").write_text(content())
    async with watching():
        await has(client, "m")
    async with watching():
        os.utime(dropped / "m.json")
        shutil.copy(dropped / "m.json", dropped / "copy.json")
        await has(client, "copy")
        await asyncio.sleep(0.5)
    assert len(await versions(client, "m")) == 1


async def test_what_is_removed_stays_away_until_its_file_is_put_there_anew(
    client, watching, dropped, tmp_path
):
    """Also after a restart, when nobody remembers having looked at the file."""
    (dropped / "m.json").write_text(content())
    async with watching():
        await has(client, "m")
    repository = Repository(client.store, dropped, Cache(tmp_path / "another", 1 << 30))
    await Garbage(repository).remove(m.RemoveModel(id="m"))
    async with watching():
        # Looked at behind the other one.
        (dropped / "later.json").write_text(content((2, 2)))
        await has(client, "later")
        assert await versions(client, "m") == []
        (dropped / "m.json").write_text(content((3, 3)))
        await has(client, "m")
        await Garbage(repository).remove(m.RemoveModel(id="m"))
        (dropped / "m.json").write_text(content((3, 3)))
        await has(client, "m")


async def test_a_file_that_is_no_sound_model_is_kept_as_such(client, watching, dropped):
    async with watching():
        (dropped / "bad.json").write_text("{")
        await has(client, "bad")
    (version,) = await versions(client, "bad")
    assert (version.sound, version.wanted) == (False, False)
    assert version.problem


async def test_a_file_that_is_still_being_written_is_waited_for(client, watching, dropped):
    whole = content().encode()
    async with watching():
        with (dropped / "m.json").open("wb") as file:
            for byte in whole:
                file.write(bytes([byte]))
                file.flush()
                await asyncio.sleep(0.01)
        await has(client, "m")
    (version,) = await versions(client, "m")
    assert version.sound


async def test_the_samples_that_ship_have_their_licence(client, watching, dropped, models_dir):
    for name in ("iris.onnx", "linear-demo.json"):
        shutil.copy(models_dir / name, dropped / name)
    (dropped / "own.json").write_text(content())
    async with watching():
        for name in ("iris", "linear-demo", "own"):
            await has(client, name)
    licences = [
        (await client.store.models.get(name)).value.licence
        for name in ("iris", "linear-demo", "own")
    ]
    assert licences == ["Apache-2.0", "Apache-2.0", None]


async def test_what_can_be_no_model_is_passed_over(client, watching, dropped):
    for name in (".hidden.json", "notes.txt", "-odd-.json", "m.json.part"):
        (dropped / name).write_text(content())
    (dropped / "gone.json").symlink_to(dropped / "nowhere.json")
    (dropped / "loop").symlink_to(dropped)
    outside = dropped.parent / "outside.json"
    outside.write_text(content((4, 4)))
    (dropped / "leaves.json").symlink_to(outside)
    (dropped / "m.json").write_text(content())
    async with watching():
        await has(client, "m")
        await asyncio.sleep(0.5)
    assert [entry.names for entry in await client.store.models.all()] == [("m",)]


async def test_nothing_is_entered_while_the_setting_is_off(client, watching, dropped):
    wanted = False
    (dropped / "m.json").write_text(content())
    async with watching(wanted=lambda: wanted):
        await asyncio.sleep(0.5)
        assert await versions(client, "m") == []
        wanted = True
        await has(client, "m")


def test_a_folder_of_many_files_is_looked_at_up_to_a_limit(dropped):
    for i in range(FILES_MAX + 50):
        (dropped / f"m{i:04}.json").touch()
    assert len(scanned(dropped)[0]) == FILES_MAX + 1
    assert scanned(dropped / "missing") == ([], {})


async def test_a_link_that_leads_to_itself_is_passed_over_and_said_once(client, watching, dropped):
    (dropped / "net" / "1").mkdir(parents=True)
    loops = [
        dropped / "a.onnx",
        dropped / "z",
        dropped / "net" / "0",
        dropped / "net" / "1" / "model.onnx",
    ]
    for loop in loops:
        loop.symlink_to(loop)
    (dropped / "m.json").write_text(content())
    (dropped / "net" / "1" / "model.json").write_text(content((2, 2)))
    with capture_logs() as records:
        async with watching():
            await has(client, "m")
            await has(client, "net")
            # Looked at many times by then.
            (dropped / "later.json").write_text(content((3, 3)))
            await has(client, "later")
    said = [one["path"] for one in records if one["event"] == "folder.unreadable"]
    assert sorted(said) == sorted(map(str, loops))


async def test_loading_a_file_goes_on_as_it_was_beside_the_watched_folder(
    client, worker, models_dir, linear
):
    async with worker() as candle:
        watched = Folder(models_dir, candle._repository, lambda: True)
        async with watched.watching():
            await has(client, "iris")
            assert (await client.call(CANDLE_STATS, m.Empty())).models == []
            path = linear("m.json")
            await has(client, "m")
            first = await client.call(MODEL_LOAD, m.LoadModel(id="m", path=path))
            assert first.version == "1"
            linear("m.json", weights=[10, 10])
            await has(client, "m", 2)
            second = await client.call(MODEL_LOAD, m.LoadModel(id="m", path=path))
            reply = await client.call(MODEL_RUN, m.RunModel(id="m", inputs=[[1, 2]]))
            by_name = await client.call(MODEL_LOAD, m.LoadModel(id="iris"))
    assert (second.version, reply.outputs, by_name.version) == ("2", [[30]], "1")

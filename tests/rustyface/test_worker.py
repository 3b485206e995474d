"""A worker's life: started, stopped, killed, replaced; and what it keeps through all of it."""

import asyncio
import contextlib
import json
from datetime import datetime

import numpy as np
import pytest

from bus import messages as m
from bus.broker import running_broker
from bus.client import connect
from bus.errors import BusError, NobodyListens
from bus.subjects import DATASET_MANAGE
from bus.testing import until
from services.rustyface.galleries.ledger import Ledger
from tests.rustyface.calls import answers, encode, manage, search, started

_THEN = "2024-01-01T00:00:00+00:00"
_OWN = {"model": "gone.onnx", "name": "mine", "threshold": 0.3}


async def test_a_worker_that_is_stopped_answers_all_that_it_was_sent(client, worker, picture):
    async with worker(slot=0, max_waiting=100):
        asked = [
            asyncio.create_task(encode(client, picture("astronaut"), entry_id=f"e{i}"))
            for i in range(20)
        ]
        await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
    assert {(await answer).id for answer in asked} == {f"e{i}" for i in range(20)}


async def test_replacing_one_replica_after_the_other_loses_no_request(client, worker, picture):
    async def keep_encoding(answers: list[m.EncodedFace]) -> None:
        while True:
            answers.append(await encode(client, picture("astronaut"), persist=False))

    answers: list[m.EncodedFace] = []
    async with contextlib.AsyncExitStack() as second:
        await second.enter_async_context(worker(1))
        callers = [asyncio.create_task(keep_encoding(answers)) for _ in range(6)]
        for _ in range(3):
            async with worker(0):
                before = len(answers)
                await until(lambda before=before: len(answers) > before + 10)
                await second.aclose()
                before = len(answers)
                await until(lambda before=before: len(answers) > before + 10)
                await second.enter_async_context(worker(1))
        for caller in callers:
            caller.cancel()
        ends = await asyncio.gather(*callers, return_exceptions=True)
    assert [type(end) for end in ends] == [asyncio.CancelledError] * 6


async def test_galleries_outlive_the_broker_and_the_worker(tmp_path, root, worker, picture):
    async with contextlib.AsyncExitStack() as before:
        broker = await before.enter_async_context(running_broker(tmp_path, sync_interval="2m"))
        client = await before.enter_async_context(connect(broker.url, name="t", root=root))
        await client.store.declare()
        await before.enter_async_context(worker(nats_url=broker.url))
        await encode(client, picture("astronaut"), entry_id="eileen")
        await encode(client, picture("cameraman"), entry_id="cameraman")
        earlier = await search(client, image_base64=picture("astronaut-changed"))
    async with (
        running_broker(tmp_path, sync_interval="2m") as broker,
        connect(broker.url, name="t", root=root) as client,
        worker(nats_url=broker.url),
    ):
        later = await search(client, image_base64=picture("astronaut-changed"))
    assert later == earlier


async def test_a_worker_that_was_killed_answers_as_before(client, settings, picture):
    async with started(client, settings, {}) as process:
        await until(lambda: answers(client))
        await encode(client, picture("astronaut"), entry_id="eileen", metadata={"name": "Eileen"})
        for i in range(5):
            await encode(client, picture("cameraman"), entry_id=f"c{i}")
        await manage(client, "remove-entry", dataset="default", entry_id="c3")
        earlier = await search(client, image_base64=picture("astronaut-changed"), top_k=10)
        process.kill()
        await process.wait()
    assert len(earlier.results) == 5
    async with started(client, settings, {}) as process:
        await until(lambda: answers(client))
        later = await search(client, image_base64=picture("astronaut-changed"), top_k=10)
        process.terminate()
        assert await process.wait() == 0
    assert [(r.id, r.metadata, r.last_seen, r.known) for r in later.results] == [
        (r.id, r.metadata, r.last_seen, r.known) for r in earlier.results
    ]
    scores = [[r.score for r in found.results] for found in (earlier, later)]
    assert np.allclose(*scores, atol=1e-6)


async def test_a_worker_goes_on_while_the_broker_is_restarted(tmp_path, root, worker, picture):
    async with contextlib.AsyncExitStack() as first:
        broker = await first.enter_async_context(running_broker(tmp_path, sync_interval="2m"))
        async with connect(broker.url, name="t", root=root) as client:
            await client.store.declare()
            async with worker(nats_url=broker.url):
                await encode(client, picture("astronaut"), entry_id="a")
                await first.aclose()
                async with running_broker(tmp_path, sync_interval="2m"):
                    await until(lambda: client.connected)
                    await until(lambda: _enrols(client, picture("cameraman")))
                    found = await search(client, image_base64=picture("astronaut"), top_k=1)
    assert found.results[0].id == "a"


async def _enrols(client, image: str) -> bool:
    with contextlib.suppress(BusError):
        return bool(await encode(client, image, entry_id="c"))
    return False


async def test_the_files_of_the_original_are_taken_in_once(client, worker, settings, picture):
    folder = settings.data_dir / "datasets"
    folder.mkdir(parents=True)
    vector = [1.0] + [0.0] * 127
    entries = [{"id": "e", "embedding": vector, "metadata": {"n": 1}, "last_seen": _THEN}]
    content = {"id": "old", "created_at": _THEN, "updated_at": _THEN, "entries": entries}
    (folder / "old.json").write_text(json.dumps(content))
    (folder / "broken.json").write_text("{")
    short = {**content, "id": "short", "entries": [{**entries[0], "embedding": [1.0]}]}
    (folder / "short.json").write_text(json.dumps(short))
    async with worker():
        found = await search(client, dataset="old", embedding=vector)
        assert [(r.id, r.metadata) for r in found.results] == [("e", {"n": 1})]
        assert found.results[0].last_seen == datetime.fromisoformat(_THEN)
        listed = await client.call(DATASET_MANAGE, m.ManageDataset(action="list"))
        [old] = [d for d in listed.datasets if d.id == "old"]
        assert old.created_at == datetime.fromisoformat(_THEN)
        # A file that cannot be used leaves no half of it.
        assert {d.id for d in listed.datasets} == {"default", "old"}
        await manage(client, "remove-entry", dataset="old", entry_id="e")
    async with worker():
        assert (await manage(client, "list"))["old"] == 0
    assert sorted(p.name for p in folder.iterdir()) == [
        "broken.json",
        "old.json.imported",
        "short.json",
    ]


async def test_a_file_of_a_dataset_that_is_there_is_left_alone(client, worker, settings, picture):
    folder = settings.data_dir / "datasets"
    folder.mkdir(parents=True)
    # Times without a zone, and a length that overflows in float32.
    entries = [{"id": "e", "embedding": [0.0] * 127 + [1e300], "last_seen": "2024-01-01T00:00:00"}]
    (folder / "default.json").write_text(json.dumps({"id": "default", "entries": entries}))
    async with worker():
        assert await manage(client, "list") == {"default": 1}
    (folder / "again.json").write_text(json.dumps({"id": "default", "entries": []}))
    # This one was interrupted.
    more = {"id": "default", "entries": [{**entries[0], "id": "f"}]}
    (folder / "more.json.importing").write_text(json.dumps(more))
    async with worker():
        assert await manage(client, "list") == {"default": 2}
    left = sorted(p.name for p in folder.iterdir())
    assert left == ["again.json", "default.json.imported", "more.json.imported"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"datasets_pth": "x"}, "no setting 'datasets_pth'; did you mean 'datasets_path'?"),
        ({"zzz": 1}, "no setting 'zzz'; there are datasets_path, default_dataset, "),
        ({"embedder": "dlib"}, "embedder: Invalid enum value 'dlib'"),
        ({"max_waiting": 0}, "max_waiting: "),
        ({"own_embedder": _OWN | {"name": "sface"}}, "'sface' is the name of one that comes with"),
        ({"own_embedder": _OWN, "embedder": "pixel32"}, "give one of them"),
        ({"own_embedder": _OWN | {"chanels": "bgr"}}, "did you mean `channels`?"),
        ({"own_embedder": _OWN}, "own_embedder.model: there is no file "),
        ({"weights": {"sface": "nobody@2"}}, "weights.sface: there is no model 'nobody@2'"),
    ],
)
async def test_settings_that_do_not_fit_stop_the_worker_with_one_sentence(
    client, settings, given, says
):
    status, said = await started_with(client, settings, given)
    assert status == 1
    assert says in said
    assert said.count("\n") == 1


async def test_without_weights_the_worker_says_how_to_get_them(client, settings):
    given = {"models_dir": "nowhere", "datasets_path": None, "threshold": None}
    status, said = await started_with(client, settings, given)
    assert status == 1
    assert 'install them with pip install "bkg[faces]", or name a models_dir' in said
    assert said.count("\n") == 1


async def started_with(client, settings, given) -> tuple[int, str]:
    """Start a worker with settings that end it; return its exit status and its last words."""
    async with started(client, settings, given) as process, asyncio.timeout(30):
        _, said = await process.communicate()
    return process.returncode or 0, said.decode()


async def test_a_worker_is_ready_and_asked_only_when_it_knows_all_that_is_there(
    client, worker, picture, monkeypatch
):
    async with worker(0):
        await encode(client, picture("astronaut"), entry_id="eileen")
        await encode(client, picture("cameraman"), entry_id="sandy")
    gate, read = asyncio.Event(), []
    clear_away = Ledger._clear_away

    async def late(self) -> None:
        # Everything has been read, and nobody was told so yet.
        read.append(self.projection.revision)
        await gate.wait()
        await clear_away(self)

    monkeypatch.setattr(Ledger, "_clear_away", late)
    starting = worker(1)
    entering = asyncio.create_task(starting.__aenter__())
    try:
        await until(lambda: read)
        told = (await client.store.instances.get("rustyface", 1)).value
        assert told.status == "starting"
        with pytest.raises(NobodyListens):
            await manage(client, "list")
        assert not entering.done()
        gate.set()
        await entering
        found = await search(client, image_base64=picture("astronaut-changed"))
        assert [one.id for one in found.results] == ["eileen", "sandy"]
    finally:
        gate.set()
        await entering
        await starting.__aexit__(None, None, None)

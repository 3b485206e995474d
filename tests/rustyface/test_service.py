"""rustyface as callers see it: enrol, search, datasets; on one replica and on several."""

import asyncio
import base64
import contextlib
import hashlib
import math
import struct
import zlib

import cv2
import numpy as np
import pytest

from bus import messages as m
from bus.errors import BusError, InvalidRequest, NotFound, Overloaded, Unprocessable
from bus.subjects import DATASET_MANAGE, GALLERY_ENTRY, gallery_events
from bus.testing import until
from services.rustyface.galleries.galleries import NewEntry, Query
from services.rustyface.photos.encoder import PixelEncoder
from services.rustyface.photos.quality import SIZE_MIN_PX
from tests.rustyface.calls import as_png, encode, manage, search


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
        assert "be some 30 pixels wide" in raised.value.message
        large = cv2.imencode(".jpg", np.zeros((3_000, 6_400, 3), np.uint8))[1].tobytes()
        with pytest.raises(Unprocessable, match="be some 100 pixels wide in it"):
            await encode(client, base64.b64encode(large).decode())
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

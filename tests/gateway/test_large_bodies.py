"""Bodies that are too large for one message, over HTTP: a camera's photos and large tensors."""

import asyncio
import base64
import gzip
import io
import json

import msgpack
import numpy as np
import pytest

from bus.testing import until
from services.gateway.routes import faces as routes
from tests.gateway.dataset_asking import PEOPLE, ask, enrol
from tests.gateway.face_asking import form, post
from tests.gateway.inferring import held, put, version_of
from tests.photos import camera_photo

DETECT, SEARCH, ENCODE = "/api/faces/detect", "/api/faces/search", "/api/faces/encode"
INFER = "/v2/models/m/infer"
ROWS, COLUMNS = 200, 25_000


async def stored(gate):
    return (await gate.parts.client.bodies._stream.occupied("$O.>")).subjects


async def nothing_left(gate):
    async def is_empty():
        counts = (gate.parts.relaying, gate.parts.relaying_bytes)
        return not await stored(gate) and counts == (0, 0)

    await until(is_empty)


def infer_body(tensor):
    """Return a request with a tensor behind its JSON part, and the header that says so."""
    about = {
        "name": "inputs", "datatype": "FP32", "shape": list(tensor.shape),
        "parameters": {"binary_data_size": tensor.nbytes},
    }  # fmt: skip
    head = json.dumps({"inputs": [about]}).encode()
    return head + tensor.tobytes(), {"Inference-Header-Content-Length": str(len(head))}


async def infer(gate, body, headers, status=200, query=""):
    data = io.BytesIO(body) if isinstance(body, bytes) else body
    async with gate.http.post(f"{INFER}{query}", data=data, headers=headers) as response:
        told = await response.json(content_type=None)
        assert response.status == status, told
        return told


@pytest.fixture
async def wide(gate, candle, linear):
    """A model that sums up rows of 100 kB, and the worker that has it."""
    worker = await candle()
    path = linear(input_dim=COLUMNS, output_dim=1, weights=[1] * COLUMNS, bias=[0])
    await put(gate, path)
    return worker


@pytest.fixture(scope="module")
def large():
    return np.random.default_rng(7).integers(0, 5, (ROWS, COLUMNS)).astype(np.float32)


# --- Photos ---------------------------------------------------------------------------------------


async def test_a_photo_of_a_camera_is_taken_in_each_of_the_four_forms(faces):
    photo = camera_photo()
    assert len(photo) > 12_000_000 > faces.parts.client.max_payload
    coded = base64.b64encode(photo).decode()
    told = [
        await post(faces, DETECT, photo, Content_Type="image/jpeg"),
        await post(faces, DETECT, form(image=photo)),
        await post(faces, DETECT, json.dumps({"image_base64": coded}).encode()),
        await post(
            faces, DETECT, msgpack.packb({"image": photo}), Content_Type="application/msgpack"
        ),
    ]
    assert (told[0]["width"], told[0]["height"], len(told[0]["faces"])) == (4_000, 4_000, 1)
    assert all(one == told[0] for one in told)
    await nothing_left(faces)


async def test_it_is_enrolled_found_compared_and_kept(people, photo):
    await ask(people, "PATCH", PEOPLE, {"keep_images": True})
    large = camera_photo()
    told = await enrol(people, io.BytesIO(large), entry_id="eileen", subject="Eileen")
    assert (told["id"], len(told["faces"])) == ("eileen", 1)
    found = await post(people, SEARCH, photo("astronaut-changed"), query={"dataset": "people"})
    assert found["subject"] == "Eileen"
    async with people.http.get(f"{PEOPLE}/entries/eileen/image") as response:
        assert len(await response.read()) > 12_000_000
    both = form(a=large, b=photo("astronaut"))
    assert (await post(people, "/api/faces/verify", both))["same"] is True
    await nothing_left(people)


async def test_the_bus_takes_it_from_whoever_invokes_the_capability(faces):
    body = {"image_base64": base64.b64encode(camera_photo()).decode()}
    told = await faces.post("/api/capabilities/faces.detect", body)
    assert len(told["faces"]) == 1
    await nothing_left(faces)


async def test_the_limits_of_a_picture_still_hold(faces):
    """What it unfolds to is looked at before it is decoded, however it came."""
    huge = bytearray(camera_photo())
    at = huge.index(b"\xff\xc0")
    huge[at + 5 : at + 9] = (30_000).to_bytes(2, "big") * 2
    told = await post(faces, DETECT, bytes(huge), 413, Content_Type="image/jpeg")
    assert "30000 x 30000 pixels, 50000000 in all" in told["detail"]
    assert (await post(faces, DETECT, bytes(12_000_000), 422))["detail"]
    await nothing_left(faces)


@pytest.mark.parametrize("kind", ["image/jpeg", "application/json"])
async def test_a_body_over_the_limit_is_refused_before_it_is_sent(faces, kind):
    reader, writer = await asyncio.open_connection("127.0.0.1", faces.parts.port)
    said = {
        "Host": "127.0.0.1",
        "Authorization": faces.http.headers["Authorization"],
        "Content-Type": kind,
        "Content-Length": 70_000_000,
    }
    lines = [f"POST {SEARCH} HTTP/1.1", *(f"{name}: {value}" for name, value in said.items())]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    assert b" 413 " in await reader.readline()
    told = await reader.readuntil(b"}")
    assert b"70,000,000 bytes, allowed are 67,0" in told
    assert b"BKG_BODY_MAX_BYTES changes that" in told
    writer.transport.abort()


@pytest.mark.parametrize("path", [SEARCH, "/api/capabilities/faces.detect", INFER])
async def test_a_body_over_the_limit_that_does_not_say_how_long_it_is_leaves_nothing(gate, path):
    gate.parts.client.bodies.max_bytes = 20_000_000
    sent = 0

    async def endless():
        nonlocal sent
        while sent < 200_000_000:
            sent += 256 * 1024
            yield bytes(256 * 1024)

    try:
        async with gate.http.post(path, data=endless()) as response:
            told = await response.json(content_type=None)
            assert response.status == 413, told
            assert "or more, allowed are 20,000,000" in told["detail"] or "19,9" in told["detail"]
    except OSError:
        pass  # it was cut off while it was sending, which is as good
    assert sent < 200_000_000
    await nothing_left(gate)


async def test_bodies_that_come_in_pieces_are_counted_as_they_come(faces, monkeypatch):
    monkeypatch.setattr(routes, "RELAYING_MAX_BYTES", 10_000_000)

    async def pieces():
        for at in range(0, len(camera_photo()), 256 * 1024):
            yield camera_photo()[at : at + 256 * 1024]

    async with faces.http.post(DETECT, data=pieces()) as response:
        assert response.status == 429, await response.text()
    await nothing_left(faces)


async def test_an_enrolment_with_an_idempotency_key_is_done_once(people):
    for _ in range(2):
        told = await post(
            people, ENCODE, camera_photo(), query={"dataset": "people"}, Idempotency_Key="k"
        )
        assert told["id"]
    assert (await people.json(PEOPLE))["entries"] == 1
    await nothing_left(people)


async def test_the_fields_of_a_form_are_counted_as_its_files_are(faces, monkeypatch):
    """None of them says how long it is; all stand here until the form is whole."""
    monkeypatch.setattr(routes, "RELAYING_MAX_BYTES", 100_000)

    async def fields():
        for name in ("image_base64", "entry_id", "subject"):
            yield f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode()
            yield b"1" * 45_000 + b"\r\n"
        yield b"--x--\r\n"

    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    async with faces.http.post(ENCODE, data=fields(), headers=kind) as response:
        assert response.status == 429, await response.text()
    await nothing_left(faces)


# --- Tensors --------------------------------------------------------------------------------------


async def test_a_tensor_of_20_mb_runs_and_is_not_held_here(gate, wide, large):
    body, headers = infer_body(large)
    async with held(wide) as ran:
        asked = asyncio.create_task(infer(gate, body, headers))
        await until(lambda: ran)
        # The gateway waits with nothing in its hands.
        assert (gate.parts.relaying, gate.parts.relaying_bytes) == (1, 0)
        assert await stored(gate)
    told = await asked
    assert told["outputs"][0]["data"] == large.sum(axis=1).tolist()
    await nothing_left(gate)


async def test_it_may_come_in_pieces_and_compressed(gate, wide, large):
    body, headers = infer_body(large)

    async def pieces():
        for at in range(0, len(body), 100_000):
            yield body[at : at + 100_000]

    want = large.sum(axis=1).tolist()
    assert (await infer(gate, pieces(), headers))["outputs"][0]["data"] == want
    packed = gzip.compress(body, 1)
    assert len(packed) < gate.parts.client.max_payload < len(body)
    headers["Content-Encoding"] = "gzip"
    assert (await infer(gate, packed, headers))["outputs"][0]["data"] == want
    await nothing_left(gate)


async def test_rows_as_json_go_the_same_way(gate, wide):
    row = [1.25] * COLUMNS
    body = {"id": "m", "inputs": [row] * 80}
    assert len(json.dumps(body)) > gate.parts.client.max_payload
    told = await gate.post("/api/capabilities/candle.model.run", body)
    assert told["outputs"] == [[1.25 * COLUMNS]] * 80
    await nothing_left(gate)


async def test_a_body_that_the_broker_lost_can_be_sent_again(gate, wide, large, monkeypatch):
    body, headers = infer_body(large)
    bodies = gate.parts.client.bodies
    put = bodies.put

    async def lost(blocks, size, within_s):
        reference = await put(blocks, size, within_s)
        await bodies.delete(reference.name)
        return reference

    with monkeypatch.context() as patched:
        patched.setattr(bodies, "put", lost)
        data = io.BytesIO(body)
        async with gate.http.post(INFER, data=data, headers=headers) as response:
            told = await response.json(content_type=None)
            assert (response.status, response.headers["Retry-After"]) == (503, "1"), told
            assert "has lost the body" in told["detail"]
            assert "field" not in told
    told = await infer(gate, body, headers)
    assert told["outputs"][0]["data"] == large.sum(axis=1).tolist()
    await nothing_left(gate)


async def test_a_model_that_nobody_has_is_404_and_nothing_stays(gate, wide, large):
    body, headers = infer_body(large)
    async with gate.http.post(
        "/v2/models/nobody/infer", data=io.BytesIO(body), headers=headers
    ) as response:
        assert response.status == 404
    await nothing_left(gate)


async def test_a_caller_that_hangs_up_while_it_sends_leaves_nothing(gate, wide, large):
    body, headers = infer_body(large)
    _, writer = await asyncio.open_connection("127.0.0.1", gate.parts.port)
    said = headers | {
        "Host": "127.0.0.1",
        "Authorization": gate.http.headers["Authorization"],
        "Content-Length": str(len(body)),
    }
    lines = [f"POST {INFER} HTTP/1.1", *(f"{name}: {value}" for name, value in said.items())]
    writer.write("\r\n".join([*lines, "", ""]).encode() + body[:12_000_000])

    async def some_of_it():
        return await stored(gate)

    await until(some_of_it)
    writer.transport.abort()
    await nothing_left(gate)
    assert version_of(wide).counted().inference_count == 0


async def test_a_caller_that_hangs_up_before_its_answer_is_not_run_and_leaves_nothing(
    gate, wide, large
):
    body, headers = infer_body(large)
    async with held(wide) as ran:
        first = asyncio.create_task(infer(gate, *infer_body(large[:1])))
        await until(lambda: ran)
        gone = asyncio.create_task(infer(gate, body, headers))
        await until(lambda: version_of(wide).rows_waiting == ROWS)
        gone.cancel()
        await until(lambda: version_of(wide).rows_waiting == 0)
    await first
    await nothing_left(gate)
    assert len(ran) == 1


async def test_a_deadline_is_kept(gate, wide, large):
    body, headers = infer_body(large)
    async with held(wide) as ran:
        first = asyncio.create_task(infer(gate, *infer_body(large[:1])))
        await until(lambda: ran)
        await infer(gate, body, headers, 504, "?timeout=1")
        await until(lambda: version_of(wide).rows_waiting == 0)
    await first
    await nothing_left(gate)

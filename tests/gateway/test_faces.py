"""Faces over HTTP, before a real worker with the real nets."""

import base64
import io
import json
import random

import msgpack
import pytest

from services.gateway.image_bodies import FIELD_MAX_BYTES
from tests.gateway.face_asking import form, post

SEARCH = "/api/faces/search"
ENCODE = "/api/faces/encode"
DETECT = "/api/faces/detect"


async def ask(gate, path, status=200, **body):
    return await gate.post(path, body, status)


# --- Four ways in ---------------------------------------------------------------------------------


async def test_a_photo_is_enrolled_by_its_bytes_with_the_rest_in_the_query(faces, photo):
    query = {"entry_id": "eileen", "subject": "Eileen", "metadata": '{"role": "pilot"}'}
    told = await post(faces, ENCODE, photo("astronaut"), query=query, Content_Type="image/jpeg")
    assert (told["id"], told["dataset"], told["subject"]) == ("eileen", "default", "Eileen")
    assert (told["dimensions"], len(told["embedding"]), len(told["faces"])) == (128, 128, 1)
    found = await post(faces, SEARCH, photo("astronaut-changed"), Content_Type="image/jpeg")
    assert found["known"] is True
    assert found["results"][0]["id"] == "eileen"
    assert found["results"][0]["metadata"] == {"role": "pilot"}


async def test_json_form_bytes_and_msgpack_give_the_same_answer(faces, photo):
    data = photo("astronaut")
    coded = base64.b64encode(data).decode()
    packed = msgpack.packb({"image": data, "persist": False, "entry_id": "e"})
    fields = {"persist": "false", "entry_id": "e"}
    told = [
        await ask(faces, ENCODE, image_base64=coded, persist=False, entry_id="e"),
        await post(faces, ENCODE, form(image=data, **fields)),
        await post(faces, ENCODE, data, query=fields, Content_Type="application/octet-stream"),
        await post(faces, ENCODE, packed, Content_Type="application/msgpack"),
    ]
    assert told[0]["dataset"] is None
    assert all(one == told[0] for one in told)


async def test_who_reads_msgpack_is_answered_in_it(faces, photo):
    data = photo("astronaut")
    packed = await post(faces, "/api/faces/detect", data, Accept="application/msgpack")
    assert packed == await post(faces, "/api/faces/detect", data)


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "image/png", ""])
async def test_a_photo_is_taken_for_one_whatever_its_type_is_called(faces, photo, kind):
    headers = {"Content_Type": kind} if kind else {}
    told = await post(faces, "/api/faces/detect", photo("astronaut"), **headers)
    assert len(told["faces"]) == 1


async def test_faces_are_found_without_embeddings(faces, photo):
    told = await post(faces, "/api/faces/detect", photo("astronaut"), Content_Type="image/jpeg")
    [face] = told["faces"]
    assert len(face["landmarks"]) == 5
    assert "embedding" not in face
    told = await post(faces, "/api/faces/detect", photo("coffee"), Content_Type="image/jpeg")
    assert told["faces"] == []


async def test_two_photos_are_compared(faces, photo):
    same = form(a=photo("astronaut"), b=photo("astronaut-changed"))
    told = await post(faces, "/api/faces/verify", same)
    assert told["same"] is True
    other = await post(faces, "/api/faces/verify", form(a=photo("astronaut"), b=photo("cameraman")))
    assert other["same"] is False
    assert other["similarity"] < told["threshold"] < told["similarity"]


async def test_a_photo_is_compared_with_an_embedding(faces, photo):
    data = photo("astronaut")
    vector = (await ask(faces, ENCODE, image_base64=_base64(data), persist=False))["embedding"]
    parts = form(a=data, b=f'{{"embedding": {vector}}}')
    told = await post(faces, "/api/faces/verify", parts)
    assert told["similarity"] == pytest.approx(1, abs=1e-4)
    sides = {"a": {"image_base64": _base64(data)}, "b": {"embedding": vector}}
    assert (await ask(faces, "/api/faces/verify", **sides))["same"] is True


async def test_whoever_enrols_finds_it_in_the_search_that_follows(faces, photo):
    for _ in range(10):
        told = await post(faces, ENCODE, photo("astronaut"))
        found = await ask(faces, SEARCH, embedding=told["embedding"], top_k=100)
        assert told["id"] in {one["id"] for one in found["results"]}
        assert found["revision"] >= told["revision"]


async def test_a_filter_in_the_query_is_json(faces, photo):
    await post(faces, ENCODE, photo("astronaut"), query={"metadata": '{"team": "red"}'})
    for team, count in (("red", 1), ("blue", 0)):
        query = {"filter": f'{{"team": "{team}"}}'}
        found = await post(faces, SEARCH, photo("astronaut"), query=query)
        assert len(found["results"]) == count


async def test_the_same_request_with_an_idempotency_key_enrols_once(faces, photo):
    first = await post(faces, ENCODE, photo("astronaut"), Idempotency_Key="k1")
    again = await post(faces, ENCODE, photo("astronaut"), Idempotency_Key="k1")
    other = await post(faces, ENCODE, photo("cameraman"), Idempotency_Key="k1")
    assert first["id"] == again["id"] != other["id"]
    stats = await faces.json("/api/datasets/default")
    assert stats["entries"] == 2


# --- Refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (SEARCH, {"embeding": [1.0]}, "embeding"),
        (SEARCH, {"embedding": [1.0] * 128, "top_k": 0}, "top_k"),
        (SEARCH, {"embedding": [1.0] * 128, "threshold": "high"}, "threshold"),
        (ENCODE, {"by": "somebody"}, "by"),
        (ENCODE, {"image_base64": "%%%"}, "image_base64"),
    ],
)
async def test_what_does_not_fit_is_refused_by_its_field(faces, path, body, field):
    told = await faces.post(path, body, 400)
    assert told["field"] == field


HUGE = 10**26


@pytest.mark.parametrize(
    ("path", "asked", "field"),
    [
        (ENCODE, {"metadata": {"n": HUGE}}, "metadata"),
        (ENCODE, {"metadata": [[-HUGE]]}, "metadata"),
        (SEARCH, {"filter": {"n": HUGE}}, "filter"),
        (SEARCH, {"revision": HUGE}, "revision"),
        (SEARCH, {"revision": -1}, "revision"),
    ],
)
async def test_a_number_that_nothing_can_carry_is_refused_by_its_field_whichever_way_it_comes(
    faces, photo, path, asked, field
):
    [(name, value)] = asked.items()
    in_json = {"image_base64": _base64(photo("astronaut")), **asked}
    told = [
        await ask(faces, path, 400, **in_json),
        await post(faces, path, json.dumps(in_json).encode(), 400, Idempotency_Key="k"),
        await post(faces, path, photo("astronaut"), 400, {name: json.dumps(value)}),
        await post(faces, path, form(image=photo("astronaut"), **{name: json.dumps(value)}), 400),
    ]
    assert [one["field"] for one in told] == [field] * 4
    assert (await faces.json("/api/datasets/default"))["entries"] == 0


async def test_an_unknown_field_is_told_the_nearest_one(faces):
    told = await ask(faces, SEARCH, 400, embeding=[1.0])
    assert "did you mean embedding?" in told["detail"]


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"top_k": "many"}, "top_k is 'many', which is no JSON"),
        ({"every_face": "often"}, "allowed are true and false"),
        ({"datset": "x"}, "did you mean dataset?"),
    ],
)
async def test_a_query_that_cannot_be_is_refused_by_its_word(faces, photo, query, said):
    told = await post(faces, SEARCH, photo("astronaut"), 400, query)
    assert said in told["detail"]


async def test_a_field_in_query_and_body_is_refused(faces, photo):
    told = await post(faces, SEARCH, form(image=photo("astronaut"), top_k="3"), 400, {"top_k": "4"})
    assert "given twice" in told["detail"]


async def test_one_body_is_no_comparison(faces, photo):
    told = await post(faces, "/api/faces/verify", photo("astronaut"), 400)
    assert "a form with the files a and b" in told["detail"]


async def test_a_form_with_an_unknown_file_or_a_huge_field_is_refused(faces, photo):
    told = await post(faces, SEARCH, form(photo=photo("astronaut")), 400)
    assert told["field"] == "photo"
    huge = form(image=photo("astronaut"), filter=" " * (FIELD_MAX_BYTES + 1))
    assert "filter has more than" in (await post(faces, SEARCH, huge, 413))["detail"]


@pytest.mark.parametrize("path", [ENCODE, SEARCH, "/api/faces/detect"])
async def test_what_is_no_picture_is_422(faces, path):
    told = await post(faces, path, b"%PDF-1.7 not a photo", 422, Content_Type="image/jpeg")
    assert "PDF" in told["detail"]


async def test_a_picture_without_a_face_is_422_and_enrols_nobody(faces, photo):
    told = await post(faces, ENCODE, photo("coffee"), 422)
    assert "no face" in told["detail"]
    assert (await faces.json("/api/datasets/default"))["entries"] == 0


async def test_a_dataset_that_is_not_there_is_404(faces, photo):
    told = await post(faces, SEARCH, photo("astronaut"), 404, {"dataset": "nobodys"})
    assert told["field"] == "dataset"


async def test_without_a_worker_it_is_said_who_is_missing(gate, photo):
    told = await post(gate, SEARCH, photo("astronaut"), 503)
    assert "rustyface" in told["detail"]


async def test_more_bodies_than_there_is_room_for_are_refused(faces, photo, monkeypatch):
    monkeypatch.setattr("services.gateway.routes.faces.RELAYING_MAX_BYTES", 1_000)
    await post(faces, SEARCH, photo("astronaut"), 429)
    assert faces.parts.relaying == faces.parts.relaying_bytes == 0


def broken_forms(photo):
    """Forms that were damaged on their way, the same ones each time."""
    chance = random.Random(7)  # noqa: S311 - a test wants the same ones
    sound = (
        b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n'
        b"Content-Type: image/jpeg\r\n\r\n" + photo[:2_000] + b"\r\n--x\r\n"
        b'Content-Disposition: form-data; name="top_k"\r\n\r\n3\r\n--x--\r\n'
    )
    for _ in range(150):
        body = bytearray(sound)
        for _ in range(chance.randint(1, 6)):
            at = chance.randrange(len(body))
            match chance.randrange(4):
                case 0:
                    del body[at:]
                    body = body or bytearray(b"x")
                case 1:
                    body[at] = chance.randrange(256)
                case 2:
                    body[at:at] = body[: chance.randrange(200)]
                case 3:
                    body[at:at] = chance.choice([b"--x--", b"\r\n\r\n", b"--x\r\n", b"\0", b"\xff"])
        yield bytes(body)


# Only tests make errors of what aiohttp warns of.
@pytest.mark.filterwarnings("ignore::aiohttp.BadContentDispositionHeader")
@pytest.mark.filterwarnings("ignore::aiohttp.BadContentDispositionParam")
async def test_no_broken_form_makes_the_gateway_fail(gate, photo):
    statuses = set()
    for body in broken_forms(photo("astronaut")):
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        async with gate.http.post(SEARCH, data=io.BytesIO(body), headers=headers) as response:
            told = await response.json(content_type=None)
        statuses.add(response.status)
        # Nobody is there to take those that are sound enough.
        assert response.status in {400, 503}, (body, told)
        assert told["detail"]
    assert statuses == {400, 503}


# --- Who may --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [ENCODE, SEARCH, "/api/faces/detect", "/api/faces/verify"])
async def test_reading_that_is_public_recognises_nobody(start, path):
    gate = await start(public_read=True)
    async with gate.anonymous.post(path, json={}) as response:
        assert response.status == 401


# --- To look at -----------------------------------------------------------------------------------


async def test_a_search_is_drawn_as_a_page_that_loads_nothing(faces, photo):
    await post(faces, ENCODE, photo("astronaut"), query={"subject": "<Eileen>"})
    headers = {"Accept-Language": "de-CH, en;q=0.5", "Content-Type": "image/jpeg"}
    body = photo("astronaut-changed")
    async with faces.http.post("/api/faces/sheet", data=body, headers=headers) as response:
        assert response.status == 200
        assert response.content_type == "text/html"
        policy = response.headers["Content-Security-Policy"]
        page = await response.text()
    assert "default-src 'none'" in policy
    assert "sandbox" in policy
    assert "Suche in default" in page
    assert "&lt;Eileen&gt;" in page
    assert "<Eileen>" not in page
    assert "bekannt" in page


async def test_a_search_is_drawn_as_a_picture(faces, photo):
    await post(faces, ENCODE, photo("astronaut"), query={"subject": "Eileen"})
    query = {"format": "png"}
    async with faces.http.post(
        "/api/faces/sheet", data=photo("astronaut"), params=query
    ) as response:
        assert (response.status, response.content_type) == (200, "image/png")
        assert (await response.read())[:4] == b"\x89PNG"


def _base64(data):
    return base64.b64encode(data).decode()

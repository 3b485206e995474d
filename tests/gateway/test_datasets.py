"""Datasets over HTTP, before a real worker: settings, entries, persons, and files as jobs."""

import asyncio
import hashlib
import io
import json

import numpy as np
import pytest
import pytest_asyncio
from aiohttp import FormData
from yarl import URL

from bus.testing import until

PEOPLE = "/api/datasets/people"


@pytest.fixture
def photo(samples_dir):
    """Gives a sample photo's bytes by name."""
    return lambda name: (samples_dir / f"{name}.jpg").read_bytes()


async def ask(gate, method, path, body=None, status=200, **headers):
    """Ask, and return the answer and its headers."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    data = body if body is None or isinstance(body, (bytes, FormData)) else json.dumps(body)
    data = io.BytesIO(data) if isinstance(data, bytes) else data
    async with gate.http.request(method, path, data=data, headers=named) as response:
        told = await response.read()
        assert response.status == status, told
        is_json = response.content_type in {"application/json", "application/problem+json"}
        return (json.loads(told) if told and is_json else told), response.headers


async def enrol(gate, data, dataset="people", **query):
    said = {"dataset": dataset, **query}
    async with gate.http.post("/api/faces/encode", data=data, params=said) as response:
        told = await response.json(content_type=None)
        assert response.status == 200, told
        return told


def vectors(count, seed=1):
    """So many unit vectors, the same each time."""
    rows = np.random.default_rng(seed).normal(size=(count, 128))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def dataset_file(count, name="people", **more):
    entries = [
        {
            "id": f"e{i:05}",
            "embedding": row.tolist(),
            "metadata": {"n": i},
            "last_seen": "2024-05-01T00:00:00Z",
        }
        for i, row in enumerate(vectors(count))
    ]
    told = {
        "id": name,
        "created_at": "2024-05-01T00:00:00Z",
        "updated_at": "2024-05-01T00:00:00Z",
        "entries": entries,
        **more,
    }
    return json.dumps(told).encode()


async def ended(gate, job):
    """Wait until a job has ended, and return it."""
    found = {}

    async def is_over():
        found.update(await gate.json(f"/api/jobs/{job}"))
        return found["state"] in {"done", "failed", "cancelled"}

    await until(is_over, 60)
    return found


@pytest_asyncio.fixture
async def people(faces):
    """A dataset without entries."""
    await ask(faces, "PUT", PEOPLE, status=201)
    return faces


# --- Datasets -------------------------------------------------------------------------------------


async def test_a_dataset_is_made_once_and_then_it_is_there(faces):
    told, headers = await ask(faces, "PUT", PEOPLE, {"threshold": 0.5}, 201)
    assert (told["id"], told["settings"]["threshold"]) == ("people", 0.5)
    assert headers["Location"] == PEOPLE
    again, _ = await ask(faces, "PUT", PEOPLE, status=200)
    assert again["settings"]["threshold"] == 0.5
    changed, _ = await ask(faces, "PUT", PEOPLE, {"threshold": 0.6})
    assert changed["settings"]["threshold"] == 0.6


async def test_a_change_of_settings_leaves_the_others(people):
    await ask(people, "PATCH", PEOPLE, {"threshold": 0.5, "quality": {"below": "reject"}})
    await ask(people, "PATCH", PEOPLE, {"quality": {"size_min_px": None}})
    told = await people.json(PEOPLE)
    assert told["settings"]["threshold"] == 0.5
    assert told["settings"]["quality"]["below"] == "reject"
    assert told["settings"]["quality"]["size_min_px"] is None
    await ask(people, "PATCH", PEOPLE, {"threshold": None})
    assert (await people.json(PEOPLE))["settings"]["threshold"] is None


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"treshold": 0.5}, "treshold"),
        ({"threshold": 2}, "threshold"),
        ({"quality": {"size": 3}}, "quality.size"),
        ({"quality": {"below": "maybe"}}, "quality.below"),
    ],
)
async def test_a_setting_that_cannot_be_is_refused_by_its_name(people, body, field):
    before = await people.json(PEOPLE)
    told, _ = await ask(people, "PATCH", PEOPLE, body, 400)
    assert field in told["detail"]
    assert await people.json(PEOPLE) == before


async def test_datasets_are_filtered_sorted_and_paged(faces, photo):
    for name in ("ants", "bees", "cats"):
        await ask(faces, "PUT", f"/api/datasets/{name}", status=201)
    await enrol(faces, photo("astronaut"), "bees")
    listed = await faces.json("/api/datasets")
    assert [one["id"] for one in listed["datasets"]] == ["ants", "bees", "cats", "default"]
    assert listed["total"] == 4
    fullest = await faces.json("/api/datasets", sort="-entries", per_page=1)
    assert [(one["id"], one["entries"]) for one in fullest["datasets"]] == [("bees", 1)]
    named = await faces.json("/api/datasets", q="EE")
    assert [one["id"] for one in named["datasets"]] == ["bees"]
    assert (await faces.json("/api/datasets", embedder="pixel32"))["datasets"] == []


@pytest.mark.parametrize("query", [{"sort": "age"}, {"page": "0"}, {"colour": "red"}])
async def test_a_list_that_cannot_be_is_refused_by_its_word(faces, query):
    told = await faces.json("/api/datasets", 400, **query)
    assert told["field"] in query


async def test_a_dataset_that_has_not_changed_is_304(people, photo):
    _, headers = await ask(people, "GET", PEOPLE)
    await ask(people, "GET", PEOPLE, status=304, If_None_Match=headers["ETag"])
    await enrol(people, photo("astronaut"))
    _, changed = await ask(people, "GET", PEOPLE, If_None_Match=headers["ETag"])
    assert changed["ETag"] != headers["ETag"]


async def test_deleting_says_first_what_would_go(people, photo):
    await enrol(people, photo("astronaut"), subject="Eileen")
    told, _ = await ask(people, "DELETE", f"{PEOPLE}?dry-run")
    assert (told["entries"], told["subjects"], told["images"]) == (1, 1, 0)
    assert (await people.json(PEOPLE))["entries"] == 1
    told, _ = await ask(people, "DELETE", PEOPLE)
    assert (told["entries"], told["dry_run"]) == (1, False)
    await people.json(PEOPLE, 404)
    await ask(people, "DELETE", PEOPLE, status=404)


async def test_without_a_worker_it_is_said_who_is_missing(gate):
    told = await gate.json("/api/datasets", 503)
    assert "rustyface" in told["detail"]


# --- Entries --------------------------------------------------------------------------------------


async def test_entries_are_listed_in_pages_and_filtered(people, photo):
    for i in range(5):
        metadata = json.dumps({"odd": bool(i % 2)})
        await enrol(people, photo("astronaut"), entry_id=f"e{i}", metadata=metadata, subject="E")
    first = await people.json(f"{PEOPLE}/entries", limit=2)
    assert [one["id"] for one in first["entries"]] == ["e0", "e1"]
    assert first["total"] == 5
    rest = await people.json(f"{PEOPLE}/entries", after=first["next"])
    assert [one["id"] for one in rest["entries"]] == ["e2", "e3", "e4"]
    assert rest["next"] is None
    odd = await people.json(f"{PEOPLE}/entries", filter='{"odd": true}')
    assert [one["id"] for one in odd["entries"]] == ["e1", "e3"]
    of_one = await people.json(f"{PEOPLE}/entries", subject="E")
    assert len(of_one["entries"]) == 5
    await people.json(f"{PEOPLE}/entries", 404, subject="F")
    assert "embedding" not in first["entries"][0]
    full = await people.json(f"{PEOPLE}/entries", embeddings="true", limit=1)
    assert len(full["entries"][0]["embedding"]) == 128


async def test_an_entry_is_shown_moved_and_deleted(people, photo):
    await enrol(people, photo("astronaut"), entry_id="a/b c", subject="Eileen")
    place = f"{PEOPLE}/entries/a%2Fb%20c"
    told, _ = await ask(people, "GET", place)
    assert (told["id"], told["subject"]) == ("a/b c", "Eileen")
    await ask(people, "PATCH", place, {"subject": "Valentina"})
    assert (await ask(people, "GET", place))[0]["subject"] == "Valentina"
    await ask(people, "PATCH", place, {"subject": None})
    assert (await ask(people, "GET", place))[0]["subject"] is None
    await ask(people, "PATCH", place, {}, 400)
    await ask(people, "DELETE", place)
    await ask(people, "GET", place, status=404)
    await ask(people, "DELETE", place, status=404)


async def test_an_image_is_given_back_only_where_images_are_kept(people, photo):
    await enrol(people, photo("astronaut"), entry_id="before")
    told, _ = await ask(people, "GET", f"{PEOPLE}/entries/before/image", status=404)
    assert "keep_images" in told["detail"]
    await ask(people, "PATCH", PEOPLE, {"keep_images": True})
    await enrol(people, photo("astronaut"), entry_id="after")
    place = f"{PEOPLE}/entries/after/image"
    body, headers = await ask(people, "GET", place)
    assert body[:3] == b"\xff\xd8\xff"
    assert headers["Content-Type"] == "image/jpeg"
    await ask(people, "GET", place, status=304, If_None_Match=headers["ETag"])
    part, _ = await ask(people, "GET", place, status=206, Range="bytes=0-9")
    assert part == body[:10]
    await ask(people, "DELETE", f"{PEOPLE}/entries/after")
    digest = headers["ETag"].strip('"')
    await until(lambda: _gone(people, digest))


async def _gone(gate, digest):
    return await gate.parts.client.store.faces.size(digest) is None


# --- Persons --------------------------------------------------------------------------------------


@pytest_asyncio.fixture
async def crew(people, photo):
    """Three persons, one of them twice."""
    for entry, subject in (("a", "Anna"), ("b", "Bert"), ("b2", "Bert"), ("c", "Carla")):
        await enrol(people, photo("astronaut"), entry_id=entry, subject=subject)
    return people


async def names(gate):
    listed = await gate.json(f"{PEOPLE}/subjects")
    return {one["id"]: one["entries"] for one in listed["subjects"]}


async def test_persons_are_listed_in_pages(crew):
    first = await crew.json(f"{PEOPLE}/subjects", limit=2)
    assert [one["id"] for one in first["subjects"]] == ["Anna", "Bert"]
    assert first["total"] == 3
    rest = await crew.json(f"{PEOPLE}/subjects", after=first["next"])
    assert [(one["id"], one["entries"]) for one in rest["subjects"]] == [("Carla", 1)]


async def test_a_person_is_renamed_but_not_into_another(crew):
    await ask(crew, "PATCH", f"{PEOPLE}/subjects/Anna", {"name": "Änne"})
    assert await names(crew) == {"Bert": 2, "Carla": 1, "Änne": 1}
    told, _ = await ask(crew, "PATCH", f"{PEOPLE}/subjects/Bert", {"name": "Carla"}, 409)
    assert "merge" in told["detail"]
    await ask(crew, "PATCH", f"{PEOPLE}/subjects/Nobody", {"name": "X"}, 404)


async def test_persons_are_merged(crew):
    await ask(crew, "POST", f"{PEOPLE}/subjects/Anna/merge", {"from": ["Bert", "Carla"]})
    assert await names(crew) == {"Anna": 4}
    await ask(crew, "POST", f"{PEOPLE}/subjects/Anna/merge", {"from": ["Nobody"]}, 404)
    await ask(crew, "POST", f"{PEOPLE}/subjects/Anna/merge", {"from": []}, 400)


async def test_a_person_is_deleted_with_all_entries(crew):
    told, _ = await ask(crew, "DELETE", f"{PEOPLE}/subjects/Bert?dry-run")
    assert (told["affected"], told["dry_run"]) == (2, True)
    assert "Bert" in await names(crew)
    told, _ = await ask(crew, "DELETE", f"{PEOPLE}/subjects/Bert")
    assert told["affected"] == 2
    assert await names(crew) == {"Anna": 1, "Carla": 1}
    assert (await crew.json(PEOPLE))["entries"] == 2


async def test_a_face_that_is_not_a_person_is_not_named_so_until_that_is_withdrawn(people, photo):
    told = await enrol(people, photo("astronaut"), entry_id="e", subject="Eileen")
    search = {"dataset": "people", "embedding": told["embedding"]}
    assert (await people.post("/api/faces/search", search))["known"] is True
    body = {"subject": "Eileen", "embedding": told["embedding"]}
    made, headers = await ask(people, "POST", f"{PEOPLE}/rejections", body, 201)
    assert headers["Location"] == f"{PEOPLE}/rejections/{made['rejection']}"
    found = await people.post("/api/faces/search", search)
    assert found["known"] is False
    assert found["results"][0]["rejected"] is True
    await ask(people, "DELETE", headers["Location"])
    assert (await people.post("/api/faces/search", search))["known"] is True
    await ask(people, "DELETE", headers["Location"], status=404)


async def test_what_was_done_is_told_newest_first(crew):
    await ask(crew, "PATCH", f"{PEOPLE}/subjects/Anna", {"name": "Änne"})
    told = await crew.json(f"{PEOPLE}/history")
    assert [one["action"] for one in told["history"][:2]] == ["rename-subject", "enrolled"]
    assert {one["by"] for one in told["history"]} == {"admin"}
    first = await crew.json(f"{PEOPLE}/history", limit=1)
    rest = await crew.json(f"{PEOPLE}/history", after=first["next"])
    assert first["history"] + rest["history"] == told["history"]


# --- Files ----------------------------------------------------------------------------------------


async def test_a_dataset_file_is_imported_by_a_job_and_taken_back(people):
    body = dataset_file(100)
    job, headers = await ask(people, "POST", f"{PEOPLE}/import?format=json", body, 202)
    assert headers["Location"] == f"/api/jobs/{job['job']}"
    done = await ended(people, job["job"])
    assert done["gallery_result"]["added"] == 100, done
    listed = await people.json(f"{PEOPLE}/entries", limit=1)
    assert listed["total"] == 100
    assert listed["entries"][0]["metadata"] == {"n": 0}
    [imported] = (await people.json(f"{PEOPLE}/imports"))["imports"]
    assert (imported["state"], imported["added"], imported["by"]) == ("done", 100, "admin")
    undo = f"{PEOPLE}/imports/{imported['id']}/undo"
    told, _ = await ask(people, "POST", f"{undo}?dry-run")
    assert told["affected"] == 100
    assert (await people.json(PEOPLE))["entries"] == 100
    told, _ = await ask(people, "POST", undo)
    assert told["affected"] == 100
    assert (await people.json(PEOPLE))["entries"] == 0


async def test_a_file_larger_than_any_message_is_taken(people):
    body = dataset_file(8_000)
    assert len(body) > people.parts.client.max_payload
    form = FormData()
    form.add_field(
        "file", io.BytesIO(body), filename="people.json", content_type="application/json"
    )
    form.add_field("existing", "replace")
    form.add_field("sha256", hashlib.sha256(body).hexdigest())
    job, _ = await ask(people, "POST", f"{PEOPLE}/import", form, 202)
    assert (await ended(people, job["job"]))["gallery_result"]["added"] == 8_000


async def test_the_same_import_with_an_idempotency_key_is_the_same_job(people):
    body = dataset_file(3)
    first, _ = await ask(people, "POST", f"{PEOPLE}/import", body, 202, Idempotency_Key="k")
    again, _ = await ask(people, "POST", f"{PEOPLE}/import", body, 202, Idempotency_Key="k")
    assert first["job"] == again["job"]
    await ended(people, first["job"])


@pytest.mark.parametrize(
    ("query", "headers", "status", "said"),
    [
        ("?format=csv", {}, 400, "format"),
        ("?existing=maybe", {}, 400, "existing"),
        ("?how=fast", {}, 400, "how"),
        ("?sha256=12", {}, 400, "64 hex digits"),
        ("", {"X_Checksum_Sha256": "0" * 64}, 422, "SHA-256"),
        ("", {"Upload_Offset": "5"}, 400, "one piece"),
    ],
)
async def test_an_import_that_cannot_be_is_refused_and_leaves_nothing(
    people, query, headers, status, said
):
    body = dataset_file(1)
    told, _ = await ask(people, "POST", f"{PEOPLE}/import{query}", body, status, **headers)
    assert said in told["detail"]
    store = people.parts.client.store.faces
    assert await store.size(hashlib.sha256(body).hexdigest()) is None
    assert await store.unfinished() == []


async def test_an_import_makes_the_dataset_that_is_not_there(faces):
    job, _ = await ask(faces, "POST", f"{PEOPLE}/import", dataset_file(3), 202)
    await ended(faces, job["job"])
    assert (await faces.json(PEOPLE))["entries"] == 3


@pytest.mark.parametrize(("path", "status"), [(PEOPLE, 503), ("/api/datasets/-", 400)])
async def test_an_import_for_nothing_is_refused_before_its_bytes_come(gate, path, status):
    reader, writer = await asyncio.open_connection("127.0.0.1", gate.parts.port)
    key = gate.http.headers["Authorization"]
    head = (
        f"POST {path}/import HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\n"
        "Content-Length: 1000\r\nExpect: 100-continue\r\n\r\n"
    )
    writer.write(head.encode())
    assert f" {status} ".encode() in await reader.readline()
    writer.transport.abort()


async def test_a_larger_file_than_is_allowed_is_refused(start, rustyface):
    gate = await start(upload_max_bytes=100)
    await ask(gate, "PUT", PEOPLE, status=201)
    told, _ = await ask(gate, "POST", f"{PEOPLE}/import", dataset_file(1), 413)
    assert "BKG_UPLOAD_MAX_BYTES" in told["detail"]


@pytest.mark.parametrize("kind", ["json", "npz", "parquet"])
async def test_an_export_is_fetched_whole_or_in_part_and_can_be_imported(people, kind):
    job, _ = await ask(people, "POST", f"{PEOPLE}/import", dataset_file(20), 202)
    await ended(people, job["job"])
    job, headers = await ask(people, "POST", f"{PEOPLE}/export?format={kind}", status=202)
    assert headers["Location"] == f"/api/jobs/{job['job']}"
    done = await ended(people, job["job"])
    assert done["state"] == "done", done
    place = f"{PEOPLE}/exports/{job['job']}"
    body, headers = await ask(people, "GET", place)
    assert hashlib.sha256(body).hexdigest() == done["gallery_result"]["artefact"]
    assert f".{kind}" in headers["Content-Disposition"]
    part, _ = await ask(people, "GET", place, status=206, Range="bytes=5-9")
    assert part == body[5:10]
    await ask(people, "GET", place, status=304, If_None_Match=headers["ETag"])
    await ask(people, "PUT", "/api/datasets/copy", status=201)
    job, _ = await ask(people, "POST", "/api/datasets/copy/import", body, 202)
    assert (await ended(people, job["job"]))["gallery_result"]["added"] == 20


async def test_an_export_whose_file_was_deleted_is_410(people):
    job, _ = await ask(people, "POST", f"{PEOPLE}/export", status=202)
    done = await ended(people, job["job"])
    await people.parts.client.store.faces.delete(done["gallery_result"]["artefact"])
    told, _ = await ask(people, "GET", f"{PEOPLE}/exports/{job['job']}", status=410)
    assert "ask for a new one" in told["detail"]


async def test_an_export_that_is_not_done_is_409_and_one_that_is_not_there_404(people, client):
    job, _ = await ask(people, "POST", f"{PEOPLE}/export", status=202)
    await ended(people, job["job"])
    entry = await client.store.jobs.get(job["job"])
    running = type(entry.value)(
        job="b1", kind="gallery", state="running", gallery=entry.value.gallery,
        created_at=entry.value.created_at, updated_at=entry.value.updated_at,
    )  # fmt: skip
    await client.store.jobs.put(running, "b1")
    told, _ = await ask(people, "GET", f"{PEOPLE}/exports/b1", status=409)
    assert told["state"] == "running"
    for name in ("nobody", "x" * 5_000):
        await ask(people, "GET", f"{PEOPLE}/exports/{name}", status=404)
    await ask(people, "PUT", "/api/datasets/other", status=201)
    await ask(people, "GET", f"/api/datasets/other/exports/{job['job']}", status=404)


async def test_kept_images_are_embedded_anew_into_another_dataset(people, photo):
    await ask(people, "PATCH", PEOPLE, {"keep_images": True})
    await enrol(people, photo("astronaut"), entry_id="e", subject="Eileen")
    job, _ = await ask(people, "POST", f"{PEOPLE}/reembed", {"into": "anew"}, 202)
    done = await ended(people, job["job"])
    assert done["state"] == "done", done
    told = await people.json("/api/datasets/anew/entries")
    assert [(one["id"], one["subject"]) for one in told["entries"]] == [("e", "Eileen")]


# --- To look at -----------------------------------------------------------------------------------


async def test_a_dataset_is_drawn_in_pages(crew):
    path = f"{PEOPLE}/sheet?limit=3"
    page, headers = await ask(crew, "GET", path, Accept_Language="de")
    assert "3 von 4 Einträgen" in page.decode()
    assert 'rel="next"' in headers["Link"]
    further = headers["Link"].partition(">")[0].removeprefix("<")
    rest, headers = await ask(crew, "GET", further)
    assert "1 of 4 entries" in rest.decode()
    assert "Link" not in headers


async def test_a_person_is_drawn_as_a_picture(crew):
    body, headers = await ask(crew, "GET", f"{PEOPLE}/sheet?format=png&subject=Bert")
    assert headers["Content-Type"] == "image/png"
    assert body[:4] == b"\x89PNG"
    await ask(crew, "GET", f"{PEOPLE}/sheet?subject=Nobody", status=404)


# --- Who may --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["entries", "entries/e", "entries/e/image", "subjects", "history", "imports", "sheet",
     "exports/a1"],
)  # fmt: skip
async def test_reading_that_is_public_shows_nobody(start, path):
    gate = await start(public_read=True)
    async with gate.anonymous.get(f"{PEOPLE}/{path}") as response:
        assert response.status == 401


ODD = ("%FF", "%00", "%2E%2E", "%ED%A0%80", "a" * 3_000, "%F0%9F%99%82", "%20", "*", "%3E")


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd[:10])
async def test_no_odd_name_makes_the_gateway_fail(people, odd):
    for dataset, rest in ((odd, ""), ("people", odd)):
        base = f"/api/datasets/{dataset}"
        part = rest or "e"
        for method, path, body in (
            ("GET", base, None),
            ("GET", f"{base}/entries/{part}", None),
            ("GET", f"{base}/entries/{part}/image", None),
            ("PATCH", f"{base}/entries/{part}", b'{"subject": "x"}'),
            ("DELETE", f"{base}/entries/{part}", None),
            ("PATCH", f"{base}/subjects/{part}", b'{"name": "x"}'),
            ("DELETE", f"{base}/subjects/{part}?dry-run", None),
            ("POST", f"{base}/subjects/x/merge", b'{"from": ["y"]}'),
            ("DELETE", f"{base}/rejections/{part}", None),
            ("POST", f"{base}/imports/{part}/undo", None),
            ("GET", f"{base}/exports/{part}", None),
            ("GET", f"{base}/entries?subject={part}&after={part}", None),
            ("GET", f"{base}/sheet?subject={part}", None),
        ):
            url = URL(path, encoded=True)
            async with people.http.request(method, url, data=body) as response:
                told = await response.text()
            known = {200} if base == PEOPLE and path == base else {400, 404, 409}
            assert response.status in known, (method, path[:80], told)

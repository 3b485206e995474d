"""Dataset files over HTTP: imports, exports and embedding anew, each of them a job."""

import asyncio
import hashlib
import io

import pytest
from aiohttp import FormData

from tests.gateway.dataset_asking import PEOPLE, ask, dataset_file, ended, enrol


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


@pytest.mark.parametrize(
    ("query", "headers", "name"),
    [
        (
            "",
            {"Content_Disposition": 'attachment; filename="C:\\\\old\\\\staff.json"'},
            "staff.json",
        ),
        ("?file_name=crew.json", {"Content_Disposition": 'attachment; filename="x"'}, "crew.json"),
        ("", {}, None),
    ],
)
async def test_an_import_is_known_by_the_name_of_its_file(people, query, headers, name):
    body = dataset_file(2)
    job, _ = await ask(people, "POST", f"{PEOPLE}/import{query}", body, 202, **headers)
    await ended(people, job["job"])
    [imported] = (await people.json(f"{PEOPLE}/imports"))["imports"]
    assert imported["source"] == (name or hashlib.sha256(body).hexdigest())


async def test_of_a_form_the_name_of_its_file_counts_unless_another_is_given(people):
    for fields, name in (({}, "people.json"), ({"file_name": "crew.json"}, "crew.json")):
        form = FormData()
        form.add_field("file", io.BytesIO(dataset_file(2)), filename="people.json")
        for field, value in fields.items():
            form.add_field(field, value)
        job, _ = await ask(people, "POST", f"{PEOPLE}/import", form, 202)
        await ended(people, job["job"])
        [newest, *_] = (await people.json(f"{PEOPLE}/imports"))["imports"]
        assert newest["source"] == name


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
        ("?file_settings=some", {}, 400, "file_settings"),
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


async def test_settings_and_rejections_go_over_http_and_come_back(people):
    job, _ = await ask(people, "POST", f"{PEOPLE}/import", dataset_file(2), 202)
    await ended(people, job["job"])
    for entry in ("e00000", "e00001"):
        await ask(people, "PATCH", f"{PEOPLE}/entries/{entry}", {"subject": entry.upper()})
    await ask(people, "PATCH", PEOPLE, {"threshold": 0.6})
    said = {"subject": "E00000", "entry": "e00001"}
    told, _ = await ask(people, "POST", f"{PEOPLE}/rejections", said, 201)
    job, _ = await ask(people, "POST", f"{PEOPLE}/export", status=202)
    done = (await ended(people, job["job"]))["gallery_result"]
    assert (done["rejections"], done["settings"]) == (1, "written")
    body, _ = await ask(people, "GET", f"{PEOPLE}/exports/{job['job']}")
    copy = "/api/datasets/copy"
    await ask(people, "PUT", copy, {"threshold": 0.3}, 201)
    for query, became, threshold, new in (
        ("", "kept", 0.3, 1),
        ("?file_settings=take", "taken", 0.6, 0),
    ):
        job, _ = await ask(people, "POST", f"{copy}/import{query}", body, 202)
        done = (await ended(people, job["job"]))["gallery_result"]
        assert (done["settings"], done["rejections"], done["failed"]) == (became, new, [])
        assert (await people.json(copy))["settings"]["threshold"] == threshold
        [newest, *_] = (await people.json(f"{copy}/imports"))["imports"]
        assert newest["rejections"] == new
    listed = (await people.json(f"{copy}/subjects"))["subjects"]
    assert [one["rejections"] for one in listed] == [[told["rejection"]], []]


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

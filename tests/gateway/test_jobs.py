"""Jobs over HTTP and over the WebSocket."""

from datetime import timedelta

import msgspec
import pytest
import pytest_asyncio

from bus.errors import Conflict, NotFound
from bus.instance import join
from bus.messages import GalleryWork, GalleryWorkDone, ImportModel, Job, NameJob, now
from bus.subjects import (
    DATASET_JOB_CANCEL,
    DATASET_JOB_RETRY,
    JOB_CANCEL,
    JOB_RETRY,
    MODEL_IMPORT,
)
from bus.testing import until
from tests.gateway.test_live import ask, frame, socket

URL = "https://example.org/iris.onnx"


def job(name="a1", state="queued", **more):
    request = ImportModel(id="iris", url=URL)
    given = {"job": name, "request": request, "created_at": now(), "updated_at": now(), **more}
    return Job(state=state, **given)


@pytest_asyncio.fixture
async def importer(client, settings):
    """An instance that begins, ends and takes up jobs, and does none; gives what it was asked."""
    asked = []

    async def begin(request):
        asked.append(request)
        made = msgspec.structs.replace(job(f"a{len(asked)}"), request=request)
        await client.store.jobs.put(made, made.job)
        return made

    async def change(request, state):
        asked.append(request)
        entry = await client.store.jobs.get(request.job)
        if entry is None:
            raise NotFound(f"there is no job {request.job!r}")
        if entry.value.state == "done":
            raise Conflict("it is done")
        changed = msgspec.structs.replace(entry.value, state=state)
        await client.store.jobs.put(changed, changed.job)
        return changed

    async def cancel(request):
        return await change(request, "cancelled")

    async def retry(request):
        return await change(request, "queued")

    async with (
        join(client, settings, plugin="candle", description="Does no jobs.") as instance,
        instance.serving(MODEL_IMPORT, begin),
        instance.serving(JOB_CANCEL, cancel),
        instance.serving(JOB_RETRY, retry),
    ):
        await instance.ready()
        yield asked


async def post(gate, path, body=None, status=202, **headers):
    async with gate.http.post(path, json=body, headers=headers) as response:
        told = await response.json(content_type=None)
        assert response.status == status, told
        return told, response.headers


async def test_an_import_is_answered_at_once_with_its_job(gate, importer):
    body = {"url": URL, "name": "iris", "sha256": "AB" * 32, "load": True}
    told, headers = await post(gate, "/api/models/import", body, **{"Idempotency-Key": "k"})
    assert headers["Location"] == f"/api/jobs/{told['job']}"
    assert importer == [
        ImportModel(id="iris", url=URL, sha256="ab" * 32, load=True, by="admin", key="k")
    ]
    assert (await gate.json(headers["Location"]))["state"] == "queued"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"name": "iris"}, "url"),
        ({"url": URL}, "name"),
        ({"url": URL, "name": "-"}, "id"),
        ({"url": URL, "name": "iris", "sha256": "xyz"}, "sha256"),
        ({"url": URL, "name": "iris", "sha265": ""}, "sha256"),
    ],
)
async def test_an_import_that_cannot_be_is_refused_by_its_field(gate, importer, body, said):
    told, _ = await post(gate, "/api/models/import", body, 400)
    assert said in told["detail"]
    assert importer == []


async def test_without_candle_no_import_begins(gate):
    await post(gate, "/api/models/import", {"url": URL, "name": "iris"}, 503)


async def test_jobs_are_listed_newest_first_in_pages(gate, client):
    for i in range(5):
        begun = now() - timedelta(minutes=i)
        state = "failed" if i == 3 else "done"
        await client.store.jobs.put(job(f"j{i}", state, created_at=begun), f"j{i}")
    first = await gate.json("/api/jobs", per_page=2)
    assert [one["job"] for one in first["jobs"]] == ["j0", "j1"]
    assert (first["total"], first["page"], first["per_page"]) == (5, 1, 2)
    last = await gate.json("/api/jobs", per_page=2, page=3)
    assert [one["job"] for one in last["jobs"]] == ["j4"]
    failed = await gate.json("/api/jobs", state="failed")
    assert [one["job"] for one in failed["jobs"]] == ["j3"]


@pytest.mark.parametrize("query", [{"state": "lost"}, {"page": "0"}, {"per_page": "x"}, {"s": ""}])
async def test_a_list_that_cannot_be_is_refused_by_its_word(gate, query):
    told = await gate.json("/api/jobs", 400, **query)
    assert told["field"] in query


@pytest.mark.parametrize("name", ["nobody", "No_Id", "a" * 41])
async def test_a_job_that_is_not_there_is_404(gate, importer, name):
    told = await gate.json(f"/api/jobs/{name}", 404)
    assert "GET /api/jobs lists them" in told["detail"]


async def test_a_job_is_cancelled_and_taken_up_again(gate, client, importer):
    await client.store.jobs.put(job(), "a1")
    told, _ = await post(gate, "/api/jobs/a1/cancel", status=200)
    assert told["state"] == "cancelled"
    told, headers = await post(gate, "/api/jobs/a1/retry")
    assert told["state"] == "queued"
    assert headers["Location"] == "/api/jobs/a1"
    assert importer == [NameJob(job="a1"), NameJob(job="a1")]
    await post(gate, "/api/jobs/nobody/cancel", status=404)


def export(name="g1", state="queued", **more):
    """Return a job of a dataset."""
    work = GalleryWork(action="export", dataset="people", by="ann")
    given = {"job": name, "gallery": work, "created_at": now(), "updated_at": now(), **more}
    return Job(kind="gallery", state=state, **given)


async def test_a_job_of_a_dataset_is_ended_and_taken_up_where_no_candle_runs(
    gate, client, settings
):
    await client.store.jobs.put(export(), "g1")

    async def cancel(request):
        return export(request.job, "cancelled")

    async def retry(request):
        return export(request.job)

    async with (
        join(client, settings, plugin="rustyface", description="Does no jobs.") as instance,
        instance.serving(DATASET_JOB_CANCEL, cancel),
        instance.serving(DATASET_JOB_RETRY, retry),
    ):
        told, _ = await post(gate, "/api/jobs/g1/cancel", status=200)
        assert (told["state"], told["gallery"]["dataset"]) == ("cancelled", "people")
        told, headers = await post(gate, "/api/jobs/g1/retry")
        assert (told["state"], headers["Location"]) == ("queued", "/api/jobs/g1")
    await client.store.jobs.put(job(), "a1")
    await post(gate, "/api/jobs/a1/cancel", status=503)


async def test_jobs_are_listed_by_their_kind(gate, client):
    done = GalleryWorkDone(entries=3, artefact="ab" * 32, size_bytes=5, file_name="people.json")
    await client.store.jobs.put(export(state="done", gallery_result=done), "g1")
    await client.store.jobs.put(job(), "a1")
    found = await gate.json("/api/jobs", kind="gallery")
    assert [one["job"] for one in found["jobs"]] == ["g1"]
    assert found["jobs"][0]["gallery_result"]["file_name"] == "people.json"
    assert (await gate.json("/api/jobs", kind="import"))["jobs"][0]["job"] == "a1"
    assert (await gate.json("/api/jobs"))["total"] == 2
    assert (await gate.json("/api/jobs", 400, kind="x"))["field"] == "kind"


async def test_a_job_that_is_done_is_not_taken_up(gate, client, importer):
    await client.store.jobs.put(job(state="done"), "a1")
    await post(gate, "/api/jobs/a1/retry", status=409)


# --- The WebSocket --------------------------------------------------------------------------------


async def test_the_topic_tells_what_has_not_ended_and_then_each_change(gate, client):
    for name, state in (("a", "queued"), ("b", "running"), ("c", "done")):
        await client.store.jobs.put(job(name, state), name)
    await until(lambda: set(gate.parts.feeds._jobs) == {"a", "b"})
    async with socket(gate) as ws:
        told = await ask(ws, "SUB", "jobs", pluginId="candle")
        assert [(one["type"], one["payload"]["job"]) for one in told] == [
            ("jobs", "a"),
            ("jobs", "b"),
        ]
        assert await ask(ws, "SUB", "jobs") == []
        await client.store.jobs.put(job("a", "running", bytes=5), "a")
        change = (await frame(ws, "jobs"))["payload"]
        assert (change["job"], change["state"], change["bytes"]) == ("a", "running", 5)
        await client.store.jobs.put(job("a", "failed", error="it broke"), "a")
        change = (await frame(ws, "jobs"))["payload"]
        assert (change["state"], change["error"]) == ("failed", "it broke")
        await client.store.jobs.put(job("d"), "d")
        assert (await frame(ws, "jobs"))["payload"]["job"] == "d"


async def test_the_topic_tells_of_jobs_of_every_kind(gate, client):
    async with socket(gate) as ws:
        await ask(ws, "SUB", "jobs")
        await client.store.jobs.put(export(state="running", entries=5, total_entries=9), "g1")
        told = (await frame(ws, "jobs"))["payload"]
    assert (told["kind"], told["entries"], told["total_entries"]) == ("gallery", 5, 9)


async def test_unsub_ends_the_topic(gate, client):
    async with socket(gate) as ws:
        await ask(ws, "SUB", "jobs")
        await ask(ws, "UNSUB", "jobs")
        await client.store.jobs.put(job(), "a1")
        await until(lambda: "a1" in gate.parts.feeds._jobs)
        assert await ask(ws, "SUB", "jobs")
        assert not [one for one in await ask(ws, "UNSUB", "jobs") if one["type"] == "jobs"]


async def test_nothing_of_jobs_comes_without_a_wish(gate, client):
    async with socket(gate) as ws:
        await ask(ws, "SUB", "status")
        await client.store.jobs.put(job(), "a1")
        await until(lambda: "a1" in gate.parts.feeds._jobs)
        assert not [one for one in await ask(ws, "UNSUB", "status") if one["type"] == "jobs"]


async def test_the_query_of_an_address_is_shown_to_nobody(gate, client, importer):
    body = {"name": "iris", "url": f"{URL}?signature=secret"}
    async with socket(gate) as ws:
        await ask(ws, "SUB", "jobs")
        begun = await gate.post("/api/models/import", body, 202)
        assert begun["request"]["url"] == f"{URL}?..."
        assert (await frame(ws, "jobs"))["payload"]["request"]["url"] == f"{URL}?..."
    assert importer[0].url == body["url"]
    for path in ("/api/jobs", f"/api/jobs/{begun['job']}"):
        assert "secret" not in str(await gate.json(path))
    for verb, status in (("cancel", 200), ("retry", 202)):
        assert "secret" not in str(await gate.post(f"/api/jobs/{begun['job']}/{verb}", {}, status))

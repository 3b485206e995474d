"""The repository over HTTP: lists, details, examples, bytes, changes; with candle behind."""

import asyncio
import hashlib
import json
import os
import sys
from dataclasses import replace
from importlib.resources import files
from itertools import pairwise

import msgspec
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import settings as runs
from hypothesis import strategies as st

from bus import messages as m
from bus.client import connect
from bus.errors import Conflict, InvalidRequest, NotFound
from bus.instance import join
from bus.messages import now
from bus.subjects import CAPABILITIES, MODEL_DESCRIBE, MODEL_GC, MODEL_REMOVE, MODEL_VALIDATE
from bus.testing import until
from services.candle.repository.cache import Cache
from services.candle.repository.repository import Repository
from services.candle.service import Candle
from services.candle.settings import CandleSettings
from services.gateway import contents, repository

BLOB = hashlib.shake_256(b"model").digest(700_000)


def version(name="1", **more):
    given = {"path": "m.onnx", "checksum": "0" * 64, "format": "onnx", "added_at": now(), **more}
    return m.ModelVersion(version=name, wanted=given.pop("wanted", False), **given)


@pytest.fixture
def know(gate, client):
    """Write a model into the repository, and wait until the gateway knows it."""

    async def one(name, *versions: m.ModelVersion, **more):
        spec = m.ModelSpec(id=name, versions=list(versions) or [version()], **more)
        await client.store.models.put(spec, name)
        await until(lambda: gate.parts.models.spec(name) == spec)
        return spec

    return one


@pytest.fixture
def serve(gate, client):
    """Say that an instance serves models."""

    async def one(*models: m.ServedModel, slot=0):
        told = m.ServedModels(
            plugin="candle",
            slot=slot,
            instance=f"i{slot}",
            host="here",
            models=list(models),
            budget_bytes=1_000,
        )
        await client.store.served.put(told, "candle", slot)
        await until(lambda: told in gate.parts.models.instances())

    return one


def served(name, state="ready", of="1", **more):
    return m.ServedModel(id=name, version=of, state=state, since=now(), **more)


async def names(gate, **query):
    return [one["name"] for one in (await gate.json("/api/models", **query))["models"]]


# --- The list -------------------------------------------------------------------------------------


async def test_models_are_found_by_what_they_are(gate, know, serve):
    await know("iris", description="Flowers", labels={"team": "a", "stage": "prod"})
    await know("Rose", version(format="linear"), labels={"team": "a"}, aliases={"best": "1"})
    await know("tulip", labels={"team": "b"})
    await serve(served("iris"), served("tulip", "loading"))
    assert await names(gate) == ["Rose", "iris", "tulip"]
    assert await names(gate, q="FLOW") == ["iris"]
    assert await names(gate, q="best") == ["Rose"]
    assert await names(gate, label="team=a") == ["Rose", "iris"]
    both = "/api/models?label=team=a&label=stage=prod"
    assert [one["name"] for one in (await gate.json(both))["models"]] == ["iris"]
    assert await names(gate, format="linear") == ["Rose"]
    assert await names(gate, state="loading") == ["tulip"]
    assert await names(gate, state="unloaded") == ["Rose"]
    assert await names(gate, loaded="true") == ["iris"]
    assert await names(gate, loaded="false") == ["Rose", "tulip"]


async def test_a_list_is_sorted_and_comes_in_pages_with_its_length(gate, know):
    for i, name in enumerate(["c", "a", "b"]):
        await know(name, version(checksum=f"{i}" * 64, size_bytes=min(i, 1)))
    assert await names(gate, sort="-name") == ["c", "b", "a"]
    # Of the same size: by name, in either direction.
    assert await names(gate, sort="size") == ["c", "a", "b"]
    assert await names(gate, sort="-size") == ["a", "b", "c"]
    part = await gate.json("/api/models", per_page=2, page=2)
    assert [one["name"] for one in part["models"]] == ["c"]
    assert (part["total"], part["page"], part["per_page"]) == (3, 2, 2)
    assert (await gate.json("/api/models", page=9))["models"] == []


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("sort=colour", "sort"),
        ("page=0", "page"),
        ("per_page=501", "per_page"),
        ("state=lost", "state"),
        ("loaded=maybe", "loaded"),
        ("label=team", "label"),
        ("q=a&q=b", "q"),
        ("lable=a=b", "lable"),
    ],
)
async def test_a_list_that_cannot_be_is_refused_by_its_word(gate, query, field):
    told = await gate.json(f"/api/models?{query}", 400)
    assert told["field"] == field


summaries = st.builds(
    lambda name, size, state, labels: repository.Summary(
        name=name,
        description="",
        labels=labels,
        licence=None,
        created_at=None,
        updated_at=now(),
        format="onnx",
        default="1",
        version_count=1,
        aliases={},
        state=state,
        reason=None,
        loaded=state == "ready",
        sound=True,
        problem=None,
        size_bytes=size,
        memory_bytes=0,
        last_used=None,
        hosts=[],
    ),
    st.text("abc", min_size=1, max_size=3),
    st.integers(0, 3),
    st.sampled_from(repository.STATES),
    st.dictionaries(st.sampled_from("xy"), st.sampled_from("12")),
)
words = st.lists(
    st.tuples(
        st.sampled_from(["q", "label", "format", "state", "loaded", "sort", "page", "per_page"]),
        st.sampled_from(["", "a", "x=1", "onnx", "ready", "true", "-size", "name", "2", "-created"])
        | st.text(max_size=5),
    ),
    max_size=4,
)


@runs(deadline=None)
@given(words, st.lists(summaries, max_size=8, unique_by=lambda one: one.name))
def test_pages_hold_every_wanted_model_once_in_order(pairs, models):
    try:
        query = repository.list_query(pairs)
    except InvalidRequest as refused:
        assert refused.field in {name for name, _ in pairs}  # noqa: PT017 - or it is not raised
        return
    wanted = [one for one in models if query.wants(one)]
    pages, got = 0, []
    while True:
        pages += 1
        page = repository.Page(pages, 3)
        part = replace(query, page=page).applied(models)
        assert part.total == len(wanted)
        if not part.items:
            break
        got += part.items
    assert sorted(one.name for one in got) == sorted(one.name for one in wanted)
    for before, after in pairwise(got):
        keys = repository._SORTS[query.sort](before), repository._SORTS[query.sort](after)
        assert keys[0] >= keys[1] if query.descending else keys[0] <= keys[1]
        if keys[0] == keys[1]:
            assert before.name <= after.name


# --- One model ------------------------------------------------------------------------------------


async def test_a_model_shows_its_versions_and_where_they_are_served(gate, client, know, serve):
    source = m.ModelSource(kind="upload", file_name="a.onnx", by="admin")
    sizes = {"size_bytes": 10, "sound": True, "source": source}
    await know(
        "iris",
        version("1", **sizes),
        version("2", checksum="1" * 64, sound=False, problem="no such operator"),
        aliases={"default": "1"},
        licence="MIT",
    )
    report = m.ModelReport(checksum="0" * 64, sound=True, validated_at=now(), advice=["Be good."])
    await client.store.reports.put(report, report.checksum)
    await serve(served("iris", memory_bytes=5, kept="room", names=["1", "default"]))
    told = await gate.json("/api/models/iris")
    assert (told["default"], told["licence"], told["version_count"]) == ("1", "MIT", 2)
    assert (told["state"], told["loaded"], told["memory_bytes"]) == ("ready", True, 5)
    first, second = told["versions"]
    assert first["names"] == ["1", "default"]
    assert first["source"]["by"] == "admin"
    assert first["file_name"] == "a.onnx"
    assert first["validation"]["advice"] == ["Be good."]
    assert first["served"][0]["host"] == "here"
    assert (second["state"], second["sound"]) == ("unloaded", False)
    assert second["problem"] == "no such operator"
    one = await gate.json("/api/models/iris/versions/default")
    assert one["version"] == "1"
    assert one["report"]["advice"] == ["Be good."]
    assert (await gate.json("/api/models/iris/versions/1/report"))["sound"] is True
    told = await gate.json("/api/models/iris/versions/2/report", 404)
    assert "/validate" in told["detail"]


async def test_a_models_versions_are_listed_as_the_model_shows_them(gate, know):
    await know("iris", version("1"), version("2"))
    listed = await gate.json("/api/models/iris/versions")
    assert (listed["name"], listed["total"]) == ("iris", 2)
    assert listed["versions"] == (await gate.json("/api/models/iris"))["versions"]


@pytest.mark.parametrize(
    "path", ["nobody", "nobody/versions", "nobody/versions/1", "iris/versions/9"]
)
async def test_what_is_not_there_is_404_and_says_what_is(gate, know, path):
    await know("iris")
    told = await gate.json(f"/api/models/{path}", 404)
    assert "iris" in told["detail"]


async def test_loaded_shows_what_is_where_and_why(gate, serve):
    await serve(served("b", memory_bytes=7, kept="pinned"), served("a", "cold", reason="idle"))
    await serve(served("b"), slot=1)
    told = await gate.json("/api/models/loaded")
    assert [(one["name"], one["slot"], one["state"]) for one in told["models"]] == [
        ("b", 0, "ready"),
        ("a", 0, "cold"),
        ("b", 1, "ready"),
    ]
    assert told["models"][0]["kept"] == "pinned"
    assert told["models"][1]["reason"] == "idle"
    assert [one["memory_bytes"] for one in told["instances"]] == [7, 0]
    assert told["instances"][0]["budget_bytes"] == 1_000


async def test_what_failed_for_good_promises_no_other_try_and_says_what_helps(gate, know, serve):
    await know("m", version(wanted=True))
    await serve(served("m", "failed", reason="its weights are NaN"))
    async with gate.http.post("/v2/models/m/infer", json={"inputs": []}) as response:
        told = await response.json(content_type=None)
        assert (response.status, told["state"]) == (503, "failed")
        assert "Retry-After" not in response.headers
    assert "its weights are NaN; load it again" in told["detail"]


async def test_what_waits_for_another_try_says_what_it_waits_for(gate, know, serve):
    await know("m", version(wanted=True))
    await serve(served("m", "queued", reason="the broker is away"))
    async with gate.http.post("/v2/models/m/infer", json={"inputs": []}) as response:
        told = await response.json(content_type=None)
        assert (response.status, response.headers["Retry-After"]) == (503, "1")
    assert "the broker is away" in told["detail"]


# --- Examples, with candle behind -----------------------------------------------------------------


@pytest_asyncio.fixture
async def candle(client, settings, tmp_path, wanted):
    """An instance of candle, with the sample models and one that takes an image."""
    await wanted("candle", capabilities=[c for c in CAPABILITIES if c.startswith("candle")])
    folder = tmp_path / "models"
    folder.mkdir()
    for name in ("iris.onnx", "linear-demo.json"):
        with files("services.candle").joinpath("models", name).open("rb") as sample:
            (folder / name).write_bytes(sample.read())
    (folder / "wide.json").write_text(
        json.dumps({"input_dim": 5_000, "output_dim": 1, "weights": [1] * 5_000, "bias": [0]})
    )
    async with (
        connect(settings.nats_url, name="candle", root=settings.root) as own,
        join(own, settings, plugin="candle", description="Under test.") as instance,
    ):
        worker = Repository(own.store, folder, Cache(tmp_path / "cache", 1 << 30))
        candle = Candle(instance, worker, CandleSettings(), own.store.served)
        serving = asyncio.create_task(candle.run())
        await until(lambda: serving.done() or instance._registration.status == "running", 30)
        yield candle
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


async def shell(command, **env):
    """Run a command line, and return what it wrote."""
    process = await asyncio.create_subprocess_exec(
        "/bin/sh",
        "-c",
        command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "no_proxy": "127.0.0.1", **env},
    )
    said, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return said.decode()


@pytest.mark.parametrize("path", ["iris.onnx", "linear-demo.json", "wide.json"])
async def test_the_curl_example_is_answered_by_candle(gate, candle, path):
    name = "a model: 1 @home"
    body = {"id": name, "path": path}
    await gate.post("/api/capabilities/candle.model.load", body)
    key = gate.http.headers["Authorization"].removeprefix("Bearer ")
    for place in ("/api/models/a%20model%3A%201%20%40home", "/api/models/{}/versions/1"):
        told = await gate.json(place.format(name))
        answer = json.loads(await shell(told["examples"]["curl"], BKG_KEY=key))
        assert answer["model_name"] == name
        assert answer["outputs"]


async def test_the_python_example_runs_as_it_is(gate, candle):
    await gate.post("/api/capabilities/candle.model.load", {"id": "iris", "path": "iris.onnx"})
    key = gate.http.headers["Authorization"].removeprefix("Bearer ")
    told = await gate.json("/api/models/iris")
    code = told["examples"]["python"]
    said = await shell('exec "$PYTHON" -c "$CODE"', BKG_KEY=key, CODE=code, PYTHON=sys.executable)
    assert "probabilities" in said


async def test_the_nats_example_is_answered_by_candle(gate, client, candle):
    await gate.post("/api/capabilities/candle.model.load", {"id": "iris", "path": "iris.onnx"})
    told = (await gate.json("/api/models/iris/versions/1"))["examples"]["nats"]
    asked, body = told.removeprefix("nats req ").split(" ", 1)
    answered = await client.relay(asked, body.strip("'").encode(), timeout_s=10)
    assert json.loads(answered.body)["outputs"]


async def test_load_and_unload_answer_when_it_is_so(gate, candle):
    await gate.post("/api/capabilities/candle.model.load", {"id": "iris", "path": "iris.onnx"})
    told = await gate.post("/api/models/iris/unload", b"")
    assert told == {"id": "iris"}
    assert (await gate.json("/api/models/iris"))["loaded"] is False
    told = await gate.post("/api/models/iris/load", {"version": "1", "config": {"pinned": True}})
    assert told["config"] == {"pinned": True}
    assert (await gate.json("/api/models/iris"))["loaded"] is True
    await gate.post("/api/models/iris/load", {"version": "9"}, 404)
    told = await gate.post("/api/models/iris/load", {"config": {"pined": True}}, 400)
    assert "pinned" in told["detail"]
    await gate.post("/api/models/nobody/unload", b"", 404)


async def test_a_model_that_never_fits_into_memory_is_422_and_then_failed(gate, candle):
    candle._memory.budget_bytes = 10_000
    body = {"id": "wide", "path": "wide.json"}
    told = await gate.post("/api/capabilities/candle.model.load", body, 422)
    assert "memory_budget_mb" in told["detail"]
    assert (told["budget_bytes"], told["needed_bytes"] > 10_000) == (10_000, True)
    await gate.post("/api/models/wide/load", b"", 422)
    await until(lambda: any(o.state == "failed" for _, o in gate.parts.models.served("wide", "1")))
    for _ in range(2):
        async with gate.http.post("/v2/models/wide/infer", json={"inputs": []}) as response:
            told = await response.json(content_type=None)
            assert (response.status, told["state"]) == (503, "failed")
            assert "Retry-After" not in response.headers
        assert "memory_budget_mb" in told["detail"]


# --- The whole way --------------------------------------------------------------------------------


async def upload(gate, name, body, status, query=""):
    path = f"/api/models/{name}/versions/1{query}"
    async with gate.http.put(path, data=body) as response:
        told = await response.json(content_type=None)
        assert response.status == status, told
        return told


async def test_what_is_uploaded_is_validated_served_described_and_deleted(gate, candle):
    body = files("services.candle").joinpath("models", "iris.onnx").read_bytes()
    told = await upload(gate, "flowers", body, 201, "?load=true&label=team=a&licence=MIT")
    assert told["sound"] is True
    assert told["loaded"]["inputs"] == [{"name": "flower", "datatype": "FP32", "shape": [-1, 4]}]
    ones = {"name": "flower", "datatype": "FP32", "shape": [1, 4], "data": [1, 1, 1, 1]}
    answer = await gate.post("/v2/models/flowers/infer", {"inputs": [ones]})
    assert answer["outputs"]
    told = await gate.json("/api/models/flowers")
    assert (told["loaded"], told["labels"], told["licence"]) == (True, {"team": "a"}, "MIT")
    assert told["versions"][0]["validation"]["sound"] is True
    assert told["versions"][0]["source"]["kind"] == "upload"
    place = "/api/models/flowers/versions/1/content"
    async with gate.http.get(place) as response:
        assert await response.read() == body
    assert (await gate.post("/api/models/flowers/validate", b""))["sound"] is True
    told = await change(gate, "PATCH", "/api/models/flowers", {"description": "Iris"})
    assert told["description"] == "Iris"
    told = await change(gate, "DELETE", "/api/models/flowers", status=409)
    assert "served" in str(told)
    told = await change(gate, "DELETE", "/api/models/flowers?force")
    assert told["versions"] == ["1"]
    await gate.json("/api/models/flowers", 404)


async def test_what_is_uploaded_and_not_sound_is_kept_and_never_served(gate, candle):
    told = await upload(gate, "broken", b"\x08\x07nonsense", 201)
    assert told["sound"] is False
    assert told["problems"]
    told = await upload(gate, "broken", b"\x08\x07nonsense", 422, "?load=true")
    assert "not sound" in told["detail"]
    await gate.post("/api/models/broken/load", b"", 422)
    assert (await gate.json("/api/models/broken"))["loaded"] is False
    told = await upload(gate, "broken", b"\x08\x07other", 409)
    assert "2" in told["detail"]


# --- Bytes ----------------------------------------------------------------------------------------


@pytest_asyncio.fixture
async def stored(client, know):
    """A version with bytes; gives their digest."""
    async with client.store.artefacts.writing() as upload:
        await upload.write(BLOB)
        digest, size = await upload.commit()
    await know("ä b", version(checksum=digest, size_bytes=size))
    return digest


CONTENT = "/api/models/ä b/versions/1/content"


async def content(gate, status=200, method="GET", **headers):
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with gate.http.request(method, CONTENT, headers=named) as response:
        body = await response.read()
        assert response.status == status, body[:500]
        return body, response.headers


async def test_the_bytes_of_a_version_come_whole_with_their_digest(gate, stored):
    body, headers = await content(gate)
    assert body == BLOB
    assert headers["ETag"] == f'"{stored}"'
    assert headers["Content-Length"] == str(len(BLOB))
    assert headers["Accept-Ranges"] == "bytes"
    said = headers["Content-Disposition"]
    assert said == "attachment; filename=\"_ b-1.onnx\"; filename*=UTF-8''%C3%A4%20b-1.onnx"
    body, headers = await content(gate, method="HEAD")
    assert (body, headers["Content-Length"]) == (b"", str(len(BLOB)))


@pytest.mark.parametrize(
    ("asked", "first", "end"),
    [
        ("bytes=0-99", 0, 100),
        ("bytes=131071-131073", 131_071, 131_074),
        ("bytes=600000-", 600_000, 700_000),
        ("bytes=-5", 699_995, 700_000),
        ("bytes=-9999999", 0, 700_000),
        ("bytes=699999-9999999", 699_999, 700_000),
    ],
)
async def test_a_range_is_206_with_its_place(gate, stored, asked, first, end):
    body, headers = await content(gate, 206, Range=asked)
    assert body == BLOB[first:end]
    assert headers["Content-Range"] == f"bytes {first}-{end - 1}/{len(BLOB)}"


async def test_a_range_behind_the_end_is_416_with_the_length(gate, stored):
    for asked in ("bytes=700000-", "bytes=-0"):
        _, headers = await content(gate, 416, Range=asked)
        assert headers["Content-Range"] == f"bytes */{len(BLOB)}"
        assert headers["Content-Type"].startswith("application/problem+json")


async def test_what_the_caller_has_is_not_sent_again(gate, stored):
    etag = f'"{stored}"'
    body, headers = await content(gate, 304, If_None_Match=f'"x", W/{etag}')
    assert (body, headers["ETag"]) == (b"", etag)
    await content(gate, 200, If_None_Match='"x"')


async def test_a_range_of_other_bytes_than_the_caller_began_with_is_all_of_it(gate, stored):
    await content(gate, 206, Range="bytes=0-9", If_Range=f'"{stored}"')
    body, _ = await content(gate, 200, Range="bytes=0-9", If_Range='"another"')
    assert body == BLOB


async def test_bytes_that_are_gone_are_404(gate, client, stored):
    await client.store.artefacts.delete(stored)
    await content(gate, 404)


async def test_more_readers_than_there_is_room_for_are_refused(gate, stored, monkeypatch):
    monkeypatch.setattr(contents, "DOWNLOADS_MAX", 0)
    await content(gate, 429)
    assert gate.parts.downloads == 0


async def test_a_reader_that_takes_nothing_is_cut_off(gate, client, know, monkeypatch):
    monkeypatch.setattr(contents, "STALL_S", 0.5)
    async with client.store.artefacts.writing() as upload:
        for _ in range(64):
            await upload.write(bytes(1 << 20))
        digest, size = await upload.commit()
    await know("big", version(checksum=digest, size_bytes=size))
    _, writer = await asyncio.open_connection("127.0.0.1", gate.parts.port, limit=1_024)
    key = gate.http.headers["Authorization"]
    path = "/api/models/big/versions/1/content"
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\n\r\n".encode())
    await until(lambda: gate.parts.downloads == 1)
    await until(lambda: gate.parts.downloads == 0, 30)
    writer.transport.abort()


# --- Changes --------------------------------------------------------------------------------------


@pytest_asyncio.fixture
async def keeper(client, settings, know):
    """An instance that describes, deletes and validates; gives what it was asked."""
    asked = []

    async def describe(request):
        asked.append(request)
        entry = await client.store.models.get(request.id)
        if entry is None:
            raise NotFound(f"there is no model {request.id!r}", field="id")
        spec = msgspec.structs.replace(entry.value, description=request.description)
        await client.store.models.put(spec, request.id)
        return spec

    async def remove(request):
        asked.append(request)
        if not (request.force or request.dry_run):
            raise Conflict("it is used", reasons=["served by candle.0 on here"])
        if not request.dry_run:
            await client.store.models.delete(request.id)
        return m.RemovedModel(
            id=request.id, versions=["1"], artefacts=[], freed_bytes=5, dry_run=request.dry_run
        )

    async def validate(request):
        asked.append(request)
        return m.ModelReport(checksum="0" * 64, sound=True, validated_at=now())

    async def collect(request):
        asked.append(request)
        return m.CollectedGarbage(artefacts=[], uploads=[], freed_bytes=0, dry_run=request.dry_run)

    async with (
        join(client, settings, plugin="candle", description="Keeps models.") as instance,
        instance.serving(MODEL_DESCRIBE, describe),
        instance.serving(MODEL_REMOVE, remove),
        instance.serving(MODEL_VALIDATE, validate),
        instance.serving(MODEL_GC, collect),
    ):
        await instance.ready()
        await know("iris")
        yield asked


async def change(gate, method, path, body=None, status=200):
    raw = json.dumps(body).encode() if body is not None else None
    async with gate.http.request(method, path, data=raw) as response:
        told = await response.json(content_type=None)
        assert response.status == status, told
        return told


async def test_what_people_read_about_a_model_is_changed(gate, keeper):
    told = await change(gate, "PATCH", "/api/models/iris", {"description": "Flowers"})
    assert told["description"] == "Flowers"
    assert (await gate.json("/api/models/iris"))["description"] == "Flowers"
    assert keeper == [m.DescribeModel(id="iris", description="Flowers")]
    told = await change(gate, "PATCH", "/api/models/iris", {"colour": "red"}, 400)
    assert told["field"] == "colour"
    await change(gate, "PATCH", "/api/models/nobody", {}, 404)


async def test_a_model_in_use_is_not_deleted_unless_by_force(gate, keeper):
    told = await change(gate, "DELETE", "/api/models/iris", status=409)
    assert told["reasons"] == ["served by candle.0 on here"]
    told = await change(gate, "DELETE", "/api/models/iris/versions/1?dry-run")
    assert (told["dry_run"], told["freed_bytes"]) == (True, 5)
    await gate.json("/api/models/iris")
    await change(gate, "DELETE", "/api/models/iris?force=true")
    await gate.json("/api/models/iris", 404)
    assert [(one.version, one.force, one.dry_run) for one in keeper] == [
        (None, False, False),
        ("1", False, True),
        (None, True, False),
    ]
    await change(gate, "DELETE", "/api/models/iris?force=perhaps", status=400)


async def test_a_version_is_validated_again_with_a_sample(gate, keeper):
    sample = {"inputs": []}
    told = await gate.post("/api/models/iris/validate", {"version": "1", "sample": sample})
    assert told["sound"] is True
    await gate.post("/api/models/iris/validate", b"")
    assert keeper == [
        m.ValidateModel(id="iris", version="1", sample=sample),
        m.ValidateModel(id="iris"),
    ]


async def test_garbage_is_collected_or_only_named(gate, keeper):
    told = await gate.post("/api/models/gc?dry-run=1", b"")
    assert told["dry_run"] is True
    await gate.post("/api/models/gc", b"")
    assert keeper == [m.CollectGarbage(dry_run=True), m.CollectGarbage()]


@pytest.mark.parametrize(
    ("method", "path"),
    [("PATCH", ""), ("DELETE", ""), ("POST", "/load"), ("POST", "/validate"),
     ("PUT", "/versions/1"), ("DELETE", "/versions/1/upload")],
)  # fmt: skip
async def test_changing_needs_the_key(gate, method, path):
    async with gate.anonymous.request(method, f"/api/models/iris{path}") as response:
        assert response.status == 401

"""Hostile input to every endpoint: a clear refusal, and everything goes on working."""

import base64
import io
import json
from pathlib import Path

import pytest

from tests.journeys.conftest import REPOSITORY, ask

SAMPLES = REPOSITORY / "services" / "rustyface" / "samples"
CAPABILITIES = (
    "candle.model.load",
    "candle.model.unload",
    "candle.model.run",
    "faces.encode",
    "faces.search",
    "dataset.manage",
)
BODIES = (
    b"",
    b"{",
    b"[]",
    b"null",
    b'"text"',
    b"\xff\xfe\x00",
    b'{"id": 7, "path": [], "inputs": {}, "image_base64": 1, "action": null, "embedding": "x"}',
    b'{"id": "../../etc", "path": "../../x", "dataset": "../x", "image_base64": "x", "inputs": []}',
    b"[" * 50_000,
)


@pytest.fixture
async def session(platform):
    async with platform.session() as one:
        yield one


def photo(name: str) -> str:
    return base64.b64encode((SAMPLES / name).read_bytes()).decode()


async def refused(answer) -> str:
    """Check that an answer is a refusal of the caller's making, and return what it says."""
    body = await answer.json(content_type=None)
    assert 400 <= answer.status < 500, body
    assert answer.content_type == "application/problem+json"
    assert len(body["detail"]) > 10
    assert "Traceback" not in json.dumps(body)
    return body["detail"]


@pytest.mark.parametrize("capability", CAPABILITIES)
async def test_a_body_that_does_not_fit_is_refused(session, capability):
    for body in BODIES:
        headers = {"Content-Type": "application/json"}
        async with session.post(
            f"/api/capabilities/{capability}", data=body, headers=headers
        ) as answer:
            await refused(answer)


@pytest.mark.parametrize("capability", CAPABILITIES)
async def test_a_body_over_the_limit_is_refused_with_the_limit(session, capability):
    large = io.BytesIO(b"x" * 68_000_000)
    async with session.post(f"/api/capabilities/{capability}", data=large) as answer:
        assert answer.status == 413
        assert "67,108,864" in await refused(answer)


async def test_pictures_that_are_none_are_refused(session):
    good = photo("astronaut.jpg")
    for image, says in [
        (good[: len(good) // 8 * 4], "cut"),
        (base64.b64encode(b"hello, I am a text").decode(), "allowed"),
        ("###", "base64"),
        (photo("coffee.jpg"), "no face"),
    ]:
        body = {"image_base64": image}
        for capability in ("faces.encode", "faces.search"):
            async with session.post(f"/api/capabilities/{capability}", json=body) as answer:
                said = await refused(answer)
                assert says in said or capability == "faces.search", said


async def test_a_text_that_is_named_like_a_model_is_refused(platform, session):
    models: Path = platform.data_dir / "models"
    (models / "text.onnx").write_text("I only say that I am a model. " * 100)
    (models / "text.json").write_text("so do I")
    for path in ("text.onnx", "text.json", "../admin.key", "/etc/passwd", "none.onnx", "."):
        async with session.post(
            "/api/capabilities/candle.model.load", json={"id": "x", "path": path}
        ) as answer:
            await refused(answer)


async def test_names_that_lead_elsewhere_are_refused(session):
    for path in (
        "/api/plugins/..%2f..%2fetc",
        "/api/plugins/%00",
        "/api/plugins/" + "x" * 4000,
        "/api/plugins/nobody/logs",
        "/api/plugins/nobody/telemetry",
        "/api/capabilities/..%2f",
        "/ui/../../../etc/passwd",
        "/ui/x/..%2f..%2fetc%2fpasswd",
        "/nowhere",
    ):
        async with session.get(path) as answer:
            assert 400 <= answer.status < 500, path
    for verb in ("start", "stop", "restart"):
        async with session.post(f"/api/plugins/nobody/{verb}") as answer:
            assert answer.status == 404
            assert "candle" in await refused(answer)


async def test_writes_without_a_key_are_refused(platform):
    import aiohttp  # noqa: PLC0415 - only here without the platform's key

    async with aiohttp.ClientSession(platform.url) as stranger:
        for path in ("/api/plugins/candle/stop", "/api/capabilities/candle.stats"):
            async with stranger.post(path) as answer:
                assert answer.status == 401
                await refused(answer)


async def test_after_all_that_everything_works(platform, session):
    """Last in this file: the same platform has had all of the above."""
    await ask(session, "candle.model.load", id="demo", path="linear-demo.json")
    ran = await ask(session, "candle.model.run", id="demo", inputs=[[1, 2, 3]])
    assert ran["outputs"] == [[6.0, -1.5]]
    made = await ask(session, "faces.encode", image_base64=photo("astronaut.jpg"), persist=False)
    assert made["dimensions"] == 128
    async with session.get("/api/plugins") as answer:
        states = await answer.json()
    assert [s["status"] for s in states] == ["running", "running"]
    assert [i["restarts"] for s in states for i in s["instances"]] == [0, 0]

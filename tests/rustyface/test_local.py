"""rustyface's own HTTP on the loopback interface: the contract's rows, and what it refuses."""

import asyncio
import base64
import io
import json

import cv2
import numpy as np
import pytest
import pytest_asyncio
from aiohttp import ClientSession

from bus import messages as m
from bus.client import connect
from bus.instance import join
from bus.subjects import DATASET_MANAGE, FACES_ENCODE, FACES_SEARCH
from bus.testing import until
from services.rustyface.assembly import assemble
from services.rustyface.photos.encoder import PixelEncoder
from services.rustyface.settings import RustyfaceSettings


def picture(seed: int) -> str:
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 40, 3), np.uint8)
    return base64.b64encode(cv2.imencode(".png", pixels)[1].tobytes()).decode()


@pytest_asyncio.fixture
async def http(client, settings):
    """A worker with two pictures in its default dataset, and a session on its port."""
    encoder = PixelEncoder()
    async with (
        connect(settings.nats_url, name="rustyface", root=settings.root) as own,
        join(own, settings, plugin="rustyface", description="a test") as instance,
        ClientSession(f"http://127.0.0.1:{instance._registration.port}") as session,
    ):
        faces = assemble(
            own,
            instance,
            encoder,
            RustyfaceSettings(),
            datasets_dir=None,
            cache_dir=settings.cache_dir,
        )
        serving = asyncio.create_task(faces.run())
        await until(lambda: instance._registration.status == "running" or serving.done())
        for entry, seed in (("one", 1), ("two", 2)):
            asked = m.EncodeFace(image_base64=picture(seed), entry_id=entry)
            await client.call(FACES_ENCODE, asked)
        yield session
        serving.cancel()
        results = await asyncio.gather(serving, return_exceptions=True)
        assert isinstance(results[0], asyncio.CancelledError), results


async def get(http, path: str, status: int = 200, **more):
    async with http.get(path, **more) as response:
        assert response.status == status, await response.text()
        return await response.json(content_type=None)


async def search(http, body: object, status: int = 200, dataset: str = "default"):
    data = io.BytesIO(json.dumps(body).encode())
    headers = {"Content-Type": "application/json"}
    async with http.post(f"/datasets/{dataset}/search", data=data, headers=headers) as response:
        assert response.status == status, await response.text()
        return await response.json(content_type=None)


async def test_health_counts_datasets_and_entries(client, http):
    assert await get(http, "/health") == {"status": "ok", "datasets": 1, "entries": 2}
    await client.call(DATASET_MANAGE, m.ManageDataset(action="create", dataset="more"))
    assert await get(http, "/health") == {"status": "ok", "datasets": 2, "entries": 2}


async def test_datasets_are_listed_as_over_the_bus(client, http):
    told = await get(http, "/datasets")
    there = await client.call(DATASET_MANAGE, m.ManageDataset(action="list"))
    assert [(d["id"], d["entries"]) for d in told["datasets"]] == [("default", 2)]
    assert [d.id for d in there.datasets] == ["default"]


async def test_one_dataset_is_shown(client, http):
    await client.call(DATASET_MANAGE, m.ManageDataset(action="create", dataset="a b@1"))
    shown = await get(http, "/datasets/default")
    assert (shown["id"], shown["entries"], shown["embedder"]) == ("default", 2, "pixel32")
    assert shown["created_at"].endswith("Z")
    assert (await get(http, "/datasets/a%20b@1"))["id"] == "a b@1"


@pytest.mark.parametrize("name", ["nobody", "%7F", "..%2F..%2Fetc", "x" * 500])
async def test_a_dataset_that_is_not_there_is_404_and_says_which_are(http, name):
    problem = await get(http, f"/datasets/{name}", 404)
    assert problem["detail"].endswith("there are: default")


async def test_a_search_answers_as_over_the_bus(client, http):
    here = await search(http, {"image_base64": picture(2), "top_k": 1})
    asked = m.SearchFaces(image_base64=picture(2), top_k=1)
    there = await client.call(FACES_SEARCH, asked)
    assert here["dataset"] == "default"
    assert [(r["id"], r["known"]) for r in here["results"]] == [("two", True)]
    assert here["results"][0]["score"] == pytest.approx(there.results[0].score)
    again = await search(http, {"embedding": here["query_embedding"], "threshold": 0.999})
    assert [r["id"] for r in again["results"]] == ["two"]


@pytest.mark.parametrize(
    ("dataset", "body", "status", "says"),
    [
        ("default", {}, 400, "give either image_base64 or embedding"),
        ("default", {"embedding": [1, 2]}, 400, "1024"),
        ("default", {"embedding": []}, 400, "no direction"),
        ("default", {"embedding": "x"}, 400, "embedding"),
        ("default", {"image_base64": "!"}, 400, "base64"),
        ("default", {"image_base64": "aGVsbG8="}, 422, "image"),
        ("default", {"image_base64": "aGVsbG8=", "top_k": 0}, 400, "top_k"),
        ("default", {"dataset": "other", "embedding": [1]}, 400, "dataset: the path says"),
        ("nobody", {"embedding": [1.0] * 1024}, 404, "there is no dataset 'nobody'"),
    ],
)
async def test_a_search_that_cannot_be_is_refused_as_over_the_bus(
    http, dataset, body, status, says
):
    problem = await search(http, body, status, dataset)
    assert says in problem["detail"]
    assert "Traceback" not in json.dumps(problem)


async def test_a_page_of_somebody_else_does_not_read_faces(http):
    """By a name that resolves to 127.0.0.1, or by a form that needs no leave."""
    for path in ("/datasets", "/datasets/default", "/health"):
        await get(http, path, 403, headers={"Host": "evil.example"})
    body = json.dumps({"image_base64": picture(1)})
    for headers in (
        {"Host": "evil.example", "Content-Type": "application/json"},
        {"Content-Type": "text/plain", "Origin": "https://evil.example"},
    ):
        async with http.post("/datasets/default/search", data=body, headers=headers) as response:
            assert response.status in {400, 403}
            assert "results" not in await response.text()

"""Datasets over HTTP, before a real worker: settings, entries, persons, and sheets of them."""

import asyncio
import json

import pytest
import pytest_asyncio
from yarl import URL

from bus.testing import until
from tests.bus.damage import denying
from tests.gateway.dataset_asking import PEOPLE, ask, enrol

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


async def test_two_changes_at_the_same_moment_are_both_kept(people):
    changes = [{"threshold": 0.5}, {"scoring": "best"}, {"quality": {"below": "reject"}}]
    await asyncio.gather(*(ask(people, "PATCH", PEOPLE, one) for one in changes))
    settings = (await people.json(PEOPLE))["settings"]
    assert (settings["threshold"], settings["scoring"]) == (0.5, "best")
    assert settings["quality"]["below"] == "reject"


@pytest.mark.parametrize("method", ["PATCH", "PUT"])
async def test_settings_that_were_changed_since_they_were_seen_are_left(people, photo, method):
    _, seen = await ask(people, "GET", PEOPLE)
    await enrol(people, photo("astronaut"))
    tag = seen["ETag"]
    _, changed = await ask(people, method, PEOPLE, {"threshold": 0.5}, If_Match=tag)
    told, _ = await ask(people, method, PEOPLE, {"threshold": 0.6}, 409, If_Match=tag)
    assert told["revision"] == int(changed["ETag"].strip('"').partition("-")[0])
    assert (await people.json(PEOPLE))["settings"]["threshold"] == 0.5
    await ask(people, method, PEOPLE, {"threshold": 0.6}, If_Match=changed["ETag"])
    told, _ = await ask(people, method, PEOPLE, {"threshold": 0.7}, 400, If_Match='"new"')
    assert told["field"] == "If-Match"


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


async def test_the_deletion_of_an_entry_can_be_tried(crew):
    [one, *_] = (await crew.json(f"{PEOPLE}/entries"))["entries"]
    told, _ = await ask(crew, "DELETE", f"{PEOPLE}/entries/{one['id']}?dry-run")
    assert (told["affected"], told["dry_run"]) == (1, True)
    assert (await crew.json(f"{PEOPLE}/entries"))["total"] == 4
    await ask(crew, "DELETE", f"{PEOPLE}/entries/x?dry-run", status=404)
    await ask(crew, "DELETE", f"{PEOPLE}/entries/{one['id']}?dry-run=maybe", status=400)
    assert (await crew.json(f"{PEOPLE}/entries"))["total"] == 4


async def test_what_is_deleted_but_not_erased_is_said(crew):
    client = crew.parts.client
    await denying(client, f"{client.root}-galleries")
    # Of the dataset Bert's are left as well.
    for path, count in ((f"{PEOPLE}/subjects/Bert", 2), (PEOPLE, 4)):
        told, _ = await ask(crew, "DELETE", path)
        assert told["unerased"] == count
        assert "message delete not permitted" in told["warnings"][0]


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
    told, _ = await ask(people, "DELETE", f"{headers['Location']}?dry-run")
    assert told["dry_run"] is True
    assert (await people.post("/api/faces/search", search))["known"] is False
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

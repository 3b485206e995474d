"""Faces on the whole platform: a folder is enrolled, replicas die, a person is forgotten."""

import asyncio
import base64
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import skimage

from bus import codec
from bus import messages as m
from bus.client import Client, connect
from bus.errors import BusError
from bus.subjects import DATASET_MANAGE, FACES_ENCODE, GALLERY_ENTRY
from bus.testing import until
from services.rustyface import samples
from tests.journeys.conftest import REPOSITORY, Platform, ask, running_platform, without_bkg

DATA = Path(skimage.__file__).parent / "data"
SAMPLES = Path(next(iter(samples.__path__)))
ONCE_MORE = SAMPLES / "astronaut-changed.jpg"

pytestmark = pytest.mark.timeout(300)


def photo(name: str) -> np.ndarray:
    picture = cv2.imread(str(DATA / f"{name}.png"))
    assert picture is not None
    return picture


def variants() -> dict[str, np.ndarray]:
    """Return one face as photos show it: mirrored, cropped, small, dark, grey."""
    eileen = photo("astronaut")
    grey = cv2.cvtColor(eileen, cv2.COLOR_BGR2GRAY)
    return {
        "front": eileen,
        "mirrored": np.ascontiguousarray(eileen[:, ::-1]),
        "cropped": np.ascontiguousarray(eileen[:300, 80:380]),
        "half": cv2.resize(eileen, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA),
        "dark": (eileen * 0.5).astype(np.uint8),
        "grey": cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR),
    }


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six photos of eileen, one of a man, two of no one."""
    folder = tmp_path_factory.mktemp("album")
    (folder / "eileen").mkdir()
    for name, picture in variants().items():
        cv2.imwrite(str(folder / f"eileen/{name}.jpg"), picture)
    (folder / "man").mkdir()
    (folder / "man/camera.jpg").write_bytes((SAMPLES / "cameraman.jpg").read_bytes())
    for name in ("coffee", "rocket"):
        source = next(DATA.glob(f"{name}.*"))
        (folder / f"man/{name}{source.suffix}").write_bytes(source.read_bytes())
    return folder


@pytest.fixture(scope="module")
def two(platform: Platform) -> Platform:
    """The platform with two replicas of rustyface."""
    bkg(platform, "plugins", "scale", "rustyface", "2", "--timeout", "60")
    return platform


def bkg(platform: Platform, *args: object, status: int = 0) -> str:
    """Run a command on the platform, and return what it printed."""
    ended = subprocess.run(
        [sys.executable, "-m", "services.cli", *map(str, args)],
        cwd=REPOSITORY, env=without_bkg(BKG_DATA_DIR=str(platform.data_dir), COLUMNS="200"),
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert ended.returncode == status, ended.stdout + ended.stderr
    return ended.stdout


def faces(platform: Platform, *args: object, status: int = 0) -> Any:
    return json.loads(bkg(platform, "faces", *args, "--json", status=status))


async def search_at(client: Client, slot: int, **fields: Any) -> m.FaceMatches:
    """Ask one replica."""
    body = codec.encode(m.SearchFaces(**fields), codec.MSGPACK)
    answer = await client.relay(
        f"{client.root}.inst.rustyface.{slot}.call.faces.search", body,
        headers={codec.CONTENT_TYPE: codec.MSGPACK},
    )  # fmt: skip
    return codec.decode(answer.body, m.FaceMatches, answer.headers.get(codec.CONTENT_TYPE))


def as_found(found: m.FaceMatches) -> list[tuple[str, str | None, float, bool]]:
    return [(one.id, one.subject, one.score, one.known) for one in found.results]


async def test_a_folder_is_enrolled_and_found_by_every_replica_alike(two: Platform, album: Path):
    told = faces(two, "enrol", album, "-d", "people", "--create", status=1)
    assert told["enrolled"] == 7
    assert {Path(one["file"]).stem for one in told["failed"]} == {"coffee", "rocket"}
    assert all("no face was found" in one["reason"] for one in told["failed"])

    data = (DATA / "astronaut.png").read_bytes()
    async with connect(two.nats_url, name="test") as client:
        one, other = [
            await search_at(client, slot, dataset="people", image=data, top_k=7) for slot in (0, 1)
        ]
        assert as_found(one) == as_found(other)
        assert one.subject == "eileen"
        assert [match.subject for match in one.results] == ["eileen"] * 6 + ["man"]
        assert not one.results[-1].known

    async with two.session() as session:
        data = ONCE_MORE.read_bytes()
        encoded = base64.b64encode(data).decode()
        found = await ask(session, "faces.search", dataset="people", image_base64=encoded)
        async with session.post(
            "/api/faces/search?dataset=people", data=data, headers={"Content-Type": "image/jpeg"}
        ) as answer:
            assert answer.status == 200, await answer.text()
            raw = await answer.json()
    on_terminal = faces(two, "search", ONCE_MORE, "-d", "people")
    assert found["results"] == raw["results"] == on_terminal["results"]
    assert (found["subject"], len(found["results"])) == ("eileen", 5)


async def test_who_enrols_finds_it_at_once_on_whichever_replica_answers(two: Platform):
    picture = photo("astronaut")
    async with connect(two.nats_url, name="test") as client:
        create = m.ManageDataset(action="create", dataset="at-once")
        await client.call(DATASET_MANAGE, create)
        for i in range(20):
            picture[0, 0] = i
            image = cv2.imencode(".png", picture)[1].tobytes()
            enrolled = await client.call(
                FACES_ENCODE, m.EncodeFace(image=image, dataset="at-once", entry_id=f"e{i}"),
                content_type=codec.MSGPACK,
            )  # fmt: skip
            for slot in (0, 1):
                found = await search_at(
                    client, slot, dataset="at-once", embedding=enrolled.embedding, top_k=100
                )
                assert f"e{i}" in {match.id for match in found.results}


@pytest.fixture
def crowd(tmp_path: Path) -> Callable[[int], Path]:
    """Makes a folder of so many photos of one face, no two alike."""

    def make(count: int) -> Path:
        picture = cv2.resize(photo("astronaut"), (256, 256), interpolation=cv2.INTER_AREA)
        folder = tmp_path / "crowd" / "eileen"
        folder.mkdir(parents=True)
        for i in range(count):
            picture[0, :2] = [[i % 256, i // 256, 7]] * 2
            cv2.imwrite(str(folder / f"{i:04}.png"), picture)
        return folder.parent

    return make


async def test_a_replica_killed_in_the_middle_of_an_enrolment_costs_no_photo_and_doubles_none(
    two: Platform, crowd: Callable[[int], Path]
):
    folder = crowd(300)
    running = asyncio.create_task(
        asyncio.to_thread(faces, two, "enrol", folder, "-d", "crowd", "--create")
    )
    async with connect(two.nats_url, name="test") as client:

        async def entries() -> int:
            try:
                answer = await client.call(
                    DATASET_MANAGE, m.ManageDataset(action="stats", dataset="crowd")
                )
            except BusError:
                return 0
            return answer.dataset.entries if answer.dataset else 0

        async def well_under_way() -> bool:
            return await entries() >= 40

        await until(well_under_way, 120)
        told = await client.store.instances.get("rustyface", 0)
        assert told
        assert told.value
        os.kill(told.value.pid, signal.SIGKILL)
        assert not running.done()
        result = await running
        assert (result["enrolled"], result["failed"], result["left"]) == (300, [], 0)
        listed = faces(two, "entries", "crowd", "--limit", "1000")
        files = [entry["metadata"]["file"] for entry in listed["entries"]]
        assert sorted(files) == sorted(f"eileen/{i:04}.png" for i in range(300))

        async def back() -> bool:
            entry = await client.store.instances.get("rustyface", 0)
            now = entry.value if entry else None
            return now is not None and now.pid != told.value.pid and now.status == "running"

        await until(back, 60)
        data = (DATA / "astronaut.png").read_bytes()
        one, other = [
            await search_at(client, slot, dataset="crowd", image=data, top_k=300) for slot in (0, 1)
        ]
        assert as_found(one) == as_found(other)
        assert len(one.results) == 300


async def test_a_deleted_person_is_gone_from_searches_exports_and_the_stream(
    two: Platform, album: Path, tmp_path: Path
):
    faces(two, "enrol", album, "-d", "forgetful", "--create", status=1)
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    bkg(two, "faces", "export", "forgetful", before)
    assert before.read_text().count('"eileen"') == 6
    async with connect(two.nats_url, name="test") as client:

        async def stored() -> list[bytes]:
            entries = GALLERY_ENTRY.subject(client.root, gallery="forgetful")
            events = client.store.galleries.read(entries)
            return [event.body async for event in events]

        def eileens(bodies: list[bytes]) -> list[bytes]:
            return [body for body in bodies if b"eileen" in body]

        assert len(eileens(await stored())) == 6
        bkg(two, "faces", "rm", "forgetful", "--person", "eileen", "--yes")
        data = (DATA / "astronaut.png").read_bytes()
        for slot in (0, 1):
            found = await search_at(client, slot, dataset="forgetful", image=data, top_k=100)
            assert [match.subject for match in found.results] == ["man"]
            assert not found.known

        async def cleared() -> bool:
            return not eileens(await stored())

        await until(cleared, 30)
    bkg(two, "faces", "export", "forgetful", after)
    assert [entry["subject"] for entry in json.loads(after.read_text())["entries"]] == ["man"]
    assert "eileen" not in after.read_text()
    assert "eileen" not in bkg(two, "faces", "history", "forgetful", "--json")


def test_a_restart_keeps_everything(tmp_path: Path, album: Path):
    with running_platform(tmp_path) as first:
        faces(first, "enrol", album / "eileen", "-d", "kept", "--create", "--subject-from", "file")
        bkg(first, "faces", "rename", "kept", "front", "eileen")
        bkg(first, "faces", "set", "kept", "--threshold", "0.5")
        before = faces(first, "search", DATA / "astronaut.png", "-d", "kept")
    with running_platform(tmp_path) as second:
        found = faces(second, "search", DATA / "astronaut.png", "-d", "kept")
        assert found["results"] == before["results"]
        assert (found["subject"], found["threshold"]) == ("eileen", 0.5)
        assert faces(second, "show", "kept")["entries"] == 6

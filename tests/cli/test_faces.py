"""`bkg faces` on a real broker with a real rustyface worker: photos and datasets on a terminal."""

import asyncio
import json
import secrets
import subprocess
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import pytest_asyncio
import typer

from bus import codec
from bus import messages as m
from bus.broker import Broker
from bus.client import Client
from bus.subjects import FACES_ENCODE
from bus.testing import until
from services.cli.dataset_settings import Changes
from services.cli.faces import filter_of
from services.rustyface import samples
from tests.cli.terminal import BKG, typed_at_terminal

PHOTOS = Path(next(iter(samples.__path__)))
ASTRONAUT, CHANGED = PHOTOS / "astronaut.jpg", PHOTOS / "astronaut-changed.jpg"
CAMERAMAN, COFFEE = PHOTOS / "cameraman.jpg", PHOTOS / "coffee.jpg"


def files_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.is_file())


@pytest_asyncio.fixture
async def staff(worker: Client, dataset: str) -> str:
    """A dataset with two photos of eileen, and one of a man."""
    for photo, entry, person in (
        (ASTRONAUT, "e1", "eileen"),
        (CHANGED, "e2", "eileen"),
        (CAMERAMAN, "m1", "man"),
    ):
        ask = m.EncodeFace(
            image=photo.read_bytes(), dataset=dataset, entry_id=entry, subject=person,
            metadata={"shot": int(entry[1])},
        )  # fmt: skip
        await worker.call(FACES_ENCODE, ask, content_type=codec.MSGPACK)
    return dataset


# --- Photos ---------------------------------------------------------------------------------------


async def test_the_faces_of_a_photo_are_shown_and_no_face_is_no_error(faces: Any):
    shown = (await faces("detect", ASTRONAUT)).out
    assert shown.startswith("1 face in ")
    assert "size_px" in shown
    [face] = (await faces("detect", ASTRONAUT, "--json")).json["faces"]
    assert len(face["landmarks"]) == 5
    assert (await faces("detect", COFFEE)).out.startswith("0 faces in ")


async def test_a_face_is_encoded_and_kept_nowhere_unless_a_dataset_is_named(
    faces: Any, dataset: str
):
    told = (await faces("encode", ASTRONAUT, "--json")).json
    assert told["dataset"] is None
    assert np.linalg.norm(told["embedding"]) == pytest.approx(1, abs=1e-5)
    assert (await faces("show", dataset, "--json")).json["entries"] == 0

    kept = await faces("encode", ASTRONAUT, "-d", dataset, "--person", "eileen")
    assert f"{dataset} has it as " in kept.out
    assert ", shows eileen" in kept.out

    ended = await faces("encode", ASTRONAUT, "--person", "eileen", status=2)
    assert "--person is for an entry" in ended.err


async def test_a_photo_without_a_face_and_a_file_that_is_none_are_refused_in_a_sentence(
    faces: Any, tmp_path: Path
):
    ended = await faces("encode", COFFEE, status=1)
    assert ended.out == ""
    assert "no face was found" in ended.err
    notes = tmp_path / "notes.jpg"
    notes.write_text("no photo")
    ended = await faces("search", notes, status=1)
    assert "JPEG, PNG" in ended.err
    ended = await faces("detect", tmp_path / "absent.jpg", status=2)
    assert "not there" in ended.err


async def test_a_search_names_a_known_person_and_says_unknown_of_another(faces: Any, staff: str):
    shown = (await faces("search", CHANGED, "-d", staff)).out
    assert shown.startswith("eileen: cosine 1.000")
    assert "known" in shown
    await faces("rm", staff, "--person", "man", "--yes")
    shown = (await faces("search", CAMERAMAN, "-d", staff)).out
    assert shown.startswith("unknown: cosine 0.")
    assert "below" in shown


async def test_a_search_by_person_has_a_line_for_each_and_a_filter_leaves_out_the_rest(
    faces: Any, staff: str
):
    found = (await faces("search", ASTRONAUT, "-d", staff, "--by", "person", "--json")).json
    assert [one["subject"] for one in found["results"]] == ["eileen", "man"]
    assert found["results"][0]["subject_entries"] == 2
    told = await faces("search", ASTRONAUT, "-d", staff, "--filter", "shot=2", "--json")
    assert [one["id"] for one in told.json["results"]] == ["e2"]
    told = await faces(
        "search", ASTRONAUT, "-d", staff, "--filter", "subject=man", "--filter", "subject=x",
        "--json",
    )  # fmt: skip
    assert [one["id"] for one in told.json["results"]] == ["m1"]


async def test_every_face_of_a_photo_is_searched_for(faces: Any, staff: str, tmp_path: Path):
    one, other = (cv2.resize(cv2.imread(str(f)), (400, 400)) for f in (ASTRONAUT, CAMERAMAN))
    both = tmp_path / "both.png"
    cv2.imwrite(str(both), np.hstack([one, other]))
    shown = (await faces("search", both, "-d", staff, "--every-face")).out
    assert "face 1" in shown
    assert "face 2" in shown
    told = (await faces("search", both, "-d", staff, "--every-face", "--json")).json["faces"]
    best = {face["matches"][0]["subject"] for face in told}
    assert best == {"eileen", "man"}


async def test_two_photos_are_compared_at_a_stated_rate(faces: Any):
    assert (await faces("verify", ASTRONAUT, CHANGED)).out.startswith("one person: cosine 0.8")
    told = await faces("verify", ASTRONAUT, CAMERAMAN, "--rate", "1e-4")
    assert told.out.startswith("two persons: cosine 0.1")
    assert "strangers reach the threshold in 0.0001 of all comparisons" in told.out
    await faces("verify", ASTRONAUT, CHANGED, "--rate", "1e-4", "--threshold", "0.4", status=2)


async def test_a_photo_may_come_from_stdin(rustyface: dict[str, str]):
    process = await asyncio.create_subprocess_exec(
        *BKG, "faces", "detect", "-", "--json",
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=rustyface,
    )  # fmt: skip
    out, _ = await asyncio.wait_for(process.communicate(ASTRONAUT.read_bytes()), 60)
    assert len(json.loads(out)["faces"]) == 1


async def test_a_contact_sheet_is_written_as_its_name_ends(faces: Any, staff: str, tmp_path: Path):
    page, picture = tmp_path / "staff.html", tmp_path / "photo.png"
    told = await faces("sheet", staff, "-o", page)
    assert "shows 3 entries" in told.out
    assert "eileen" in page.read_text()
    await faces("sheet", staff, "--image", ASTRONAUT, "-o", picture)
    assert cv2.imread(str(picture)) is not None
    ended = await faces("sheet", staff, "-o", page, status=2)
    assert "--force writes over it" in ended.err
    ended = await faces("sheet", staff, "-o", tmp_path / "sheet.pdf", status=2)
    assert ".html or .png" in ended.err
    assert files_in(tmp_path) == ["photo.png", "plugins.json", "staff.html"]


# --- Datasets -------------------------------------------------------------------------------------


async def test_a_dataset_is_made_set_shown_and_listed(faces: Any, dataset: str):
    told = await faces("set", dataset, "--threshold", "0.5", "--keep-images", "--yaw-max", "60")
    assert "cosine 0.500, set here" in told.out
    told = (await faces("set", dataset, "--size-min", "none", "--json")).json["settings"]
    assert told["threshold"] == 0.5
    assert told["keep_images"] is True
    quality = told["quality"]
    assert quality.get("yaw_max") == 60
    assert quality["size_min_px"] is None
    told = (await faces("set", dataset, "--threshold", "default", "--json")).json
    assert told["settings"]["threshold"] is None
    assert told["threshold"] == pytest.approx(0.45)
    assert dataset in (await faces("datasets")).out
    assert dataset in {one["id"] for one in (await faces("datasets", "--json")).json}
    await faces("set", dataset, status=2)
    ended = await faces("set", dataset, "--threshold", "high", status=2)
    assert "neither a number nor default" in ended.err
    ended = await faces("set", dataset, "--threshold", "7", status=1)
    assert "threshold" in ended.err


async def test_a_dataset_that_is_not_there_is_named(faces: Any):
    ended = await faces("show", "nowhere", status=1)
    assert "nowhere" in ended.err
    assert "Traceback" not in ended.err


async def test_a_dataset_is_deleted_only_by_its_name_or_with_yes(
    faces: Any, staff: str, rustyface: dict[str, str]
):
    told = await faces("delete", staff, "--dry-run")
    assert "3 entries of 2 persons" in told.out
    ended = await faces("delete", staff, status=2)
    assert "give --yes" in ended.err
    delete = (rustyface, "faces", "delete", staff)
    assert (await typed_at_terminal(*delete, typed="stuff\n"))[0] == 1
    assert (await faces("show", staff, "--json")).json["entries"] == 3
    assert (await typed_at_terminal(*delete, typed=f"{staff}\n"))[0] == 0
    await faces("show", staff, status=1)


async def test_entries_and_persons_are_listed_in_pages(faces: Any, staff: str):
    shown = (await faces("entries", staff, "--limit", "2")).out
    assert [line.split()[0] for line in shown.splitlines()[1:3]] == ["e1", "e2"]
    assert "2 of 3; for more: --after e2" in shown
    told = (await faces("entries", staff, "--after", "e2", "--json")).json
    assert [one["id"] for one in told["entries"]] == ["m1"]
    assert told["next"] is None
    told = (await faces("entries", staff, "--person", "eileen", "--embeddings", "--json")).json
    assert [len(one["embedding"]) for one in told["entries"]] == [128, 128]
    told = (await faces("subjects", staff, "--json")).json
    assert [(one["id"], one["entries"]) for one in told["subjects"]] == [("eileen", 2), ("man", 1)]


async def test_persons_are_renamed_merged_and_entries_moved(faces: Any, staff: str):
    async def persons() -> dict[str, int]:
        told = (await faces("subjects", staff, "--json")).json["subjects"]
        return {one["id"]: one["entries"] for one in told}

    assert (
        "eileen is Eileen Collins now: 2 entries"
        in (await faces("rename", staff, "eileen", "Eileen Collins")).out
    )
    await faces("rename", staff, "man", "Eileen Collins", status=1)
    await faces("move", staff, "e2", "man")
    assert await persons() == {"Eileen Collins": 1, "man": 2}
    await faces("move", staff, "e2", "--nobody")
    await faces("move", staff, "e2", status=2)
    await faces("merge", staff, "Eileen Collins", "man", "somebody")
    assert await persons() == {"somebody": 2}


async def test_what_goes_is_told_before_and_goes_only_with_consent(
    faces: Any, staff: str, rustyface: dict[str, str]
):
    told = await faces("rm", staff, "--person", "eileen", "--dry-run")
    assert told.out == "eileen would go: 2 entries\n"
    ended = await faces("rm", staff, "--person", "eileen", status=2)
    remove = (rustyface, "faces", "rm", staff, "--entry", "m1")
    assert (await typed_at_terminal(*remove, typed="n\n"))[0] == 1
    assert (await typed_at_terminal(*remove, typed="y\n"))[0] == 0
    await faces("rm", staff, "--person", "eileen", "--yes")
    assert (await faces("entries", staff, "--json")).json["entries"] == []
    ended = await faces("rm", staff, "--person", "eileen", "--yes", status=1)
    assert "eileen" in ended.err


async def test_a_rejected_face_is_not_named_until_that_is_withdrawn(faces: Any, staff: str):
    of_eileen = ("search", CAMERAMAN, "-d", staff, "--filter", "subject=eileen")

    async def named() -> str | None:
        return (await faces(*of_eileen, "--json")).json.get("subject")

    await faces("set", staff, "--threshold", "0.1")
    assert await named() == "eileen"
    told = await faces("reject", staff, "--person", "eileen", "--entry", "m1", "--json")
    assert await named() is None
    assert (await faces(*of_eileen)).out.startswith("unknown: the nearest is eileen, of which")
    await faces("reject", staff, "--withdraw", told.json["rejection"])
    assert await named() == "eileen"
    ended = await faces("reject", staff, "--person", "eileen", "--entry", "e1", status=1)
    assert "move-entry" in ended.err


async def test_behind_a_rejected_person_the_next_one_is_named(faces: Any, staff: str):
    await faces("set", staff, "--threshold", "-1")
    search = ("search", ASTRONAUT, "-d", staff)
    assert (await faces(*search)).out.startswith("eileen: cosine")
    told = await faces("encode", ASTRONAUT, "-d", staff, "--entry", "stranger", "--json")
    await faces("reject", staff, "--person", "eileen", "--entry", told.json["id"])
    shown = (await faces(*search, "--filter", "subject=eileen", "--filter", "subject=man")).out
    assert shown.startswith("man: cosine")
    assert "rejected" in shown


async def test_the_history_tells_what_was_faces(faces: Any, staff: str):
    await faces("rename", staff, "man", "cameraman")

    async def deeds() -> list[str]:
        told = (await faces("history", staff, "--json")).json["history"]
        return [one["action"] for one in told]

    # It is written behind the change.
    async def told_all() -> bool:
        return len(await deeds()) >= 5

    await until(told_all, 30)
    assert (await deeds())[0] == "rename-subject"
    assert (await deeds()).count("enrolled") == 3
    shown = (await faces("history", staff, "--limit", "1")).out
    assert "rename-subject" in shown
    assert "by cli" in shown
    assert "for more: --after " in shown


# --- Files ----------------------------------------------------------------------------------------


async def test_what_is_exported_is_imported_elsewhere_and_undone(
    faces: Any, staff: str, tmp_path: Path
):
    file, copy = tmp_path / "staff.npz", f"{staff}-copy"
    await faces("set", staff, "--threshold", "0.52")
    await faces("reject", staff, "--person", "man", "--entry", "e1")
    told = await faces("export", staff, file)
    assert "3 entries, 1 rejections, its settings" in told.out
    await faces("export", staff, file, status=2)
    told = await faces("import", file, "-d", copy, "--create")
    assert [line.split() for line in told.out.splitlines()[-2:]] == [
        ["rejections", "1"],
        ["settings", "taken"],
    ]
    shown = (await faces("show", copy, "--json")).json
    assert (shown["settings"]["threshold"], shown["rejections"]) == (0.52, 1)
    await faces("set", copy, "--threshold", "0.4")
    told = await faces("import", file, "-d", copy)
    assert "set otherwise than the file says, in threshold" in told.out
    assert "rejections that were there already: 1" in told.out
    await faces("import", file, "-d", copy, "--settings", "take")
    assert (await faces("show", copy, "--json")).json["settings"]["threshold"] == 0.52
    found = (await faces("search", ASTRONAUT, "-d", copy, "--json")).json["results"]
    before = (await faces("search", ASTRONAUT, "-d", staff, "--json")).json["results"]
    assert [(r["id"], r["subject"], r["metadata"]) for r in found] == [
        (r["id"], r["subject"], r["metadata"]) for r in before
    ]
    *_, record = (await faces("imports", copy, "--json")).json
    assert (record["source"], record["state"], record["added"]) == (file.name, "done", 3)
    assert record["rejections"] == 1
    assert "3 entries" in (await faces("undo", copy, record["id"], "--dry-run")).out
    await faces("undo", copy, record["id"], "--yes")
    assert (await faces("show", copy, "--json")).json["entries"] == 0
    assert files_in(tmp_path) == ["plugins.json", file.name]


async def test_an_export_without_a_format_and_an_import_to_nowhere_are_refused(
    faces: Any, staff: str, tmp_path: Path
):
    ended = await faces("export", staff, tmp_path / "staff.csv", status=2)
    assert ".json, .npz, .parquet" in ended.err
    file = tmp_path / "some.json"
    file.write_text("{}")
    ended = await faces("import", file, "-d", "nowhere", status=1)
    assert "`bkg faces create nowhere` makes it" in ended.err


async def test_a_file_that_is_no_dataset_fails_with_its_reason(
    faces: Any, dataset: str, tmp_path: Path
):
    file = tmp_path / "broken.json"
    file.write_text('{"id": "x", "entries": [{"id": "a", "embedding": [1, 2]}]}')
    await faces("import", file, "-d", dataset, status=1)
    assert (await faces("show", dataset, "--json")).json["entries"] == 0


async def test_kept_photos_are_embedded_anew(faces: Any, dataset: str):
    await faces("set", dataset, "--keep-images")
    await faces("encode", ASTRONAUT, "-d", dataset, "--entry", "e1", "--person", "eileen")
    await faces("reembed", dataset, "--into", f"{dataset}-2")
    told = (await faces("search", ASTRONAUT, "-d", f"{dataset}-2", "--json")).json
    assert (told["subject"], told["results"][0]["id"]) == ("eileen", "e1")


async def test_without_a_worker_a_command_says_who_is_missing(
    bkg: Any, broker: Broker, env: dict[str, str]
):
    env.update(BKG_NATS_URL=broker.url, BKG_ROOT=f"t{secrets.token_hex(4)}")
    ended = await bkg("faces", "datasets")
    assert ended.status == 3
    assert "dataset.manage" in ended.err


# --- Text -----------------------------------------------------------------------------------------


def test_a_filter_that_names_a_field_twice_takes_any_of_its_values():
    assert filter_of(["age=3", "team=vision", "age=4", "age=five"]) == {
        "age": [3, 4, "five"], "team": "vision",
    }  # fmt: skip
    with pytest.raises(typer.BadParameter, match="no KEY=VALUE"):
        filter_of(["team"])


def changes(**given: Any) -> Changes:
    nothing: dict[str, Any] = dict.fromkeys(
        ("threshold", "verify_threshold", "scoring", "keep_images", "quality")
    )
    bounds = {name: given.pop(name) for name in list(given) if name.endswith(("_min_px", "_max"))}
    return Changes(**(nothing | given), bounds=bounds)


def test_settings_that_are_not_named_stay():
    before = m.DatasetSettings(
        threshold=0.5, keep_images=True, quality=m.QualityBounds(below="off", yaw_max=30)
    )
    after = changes(verify_threshold="0.4", size_min_px="none").applied_to(before)
    assert after == m.DatasetSettings(
        threshold=0.5,
        verify_threshold=0.4,
        keep_images=True,
        quality=m.QualityBounds(below="off", yaw_max=30, size_min_px=None),
    )
    assert not changes()
    assert changes(keep_images=False)

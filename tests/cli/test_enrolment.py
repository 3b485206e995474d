"""`bkg faces enrol`: a folder of real photos, with all that is wrong with folders."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from bus import messages as m
from bus.client import Client
from bus.errors import Conflict, DeadlineExceeded, NotFound, Overloaded, Unavailable
from bus.subjects import DATASET_MANAGE
from bus.testing import until
from services.cli import enrolment
from services.cli.photos import SubjectFrom, files_in, subject_of
from services.cli.progress import line_of
from services.rustyface import samples
from tests.cli.terminal import BKG, shown_at_terminal
from tests.photos import camera_photo

PHOTOS = Path(next(iter(samples.__path__)))


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Two photos of eileen, one of a man, one without a face."""
    folder = tmp_path / "album"
    for file, photo in (
        ("eileen/1.jpg", "astronaut"),
        ("eileen/old/2.JPG", "astronaut-changed"),
        ("man/1.jpg", "cameraman"),
        ("man/cup.jpg", "coffee"),
    ):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PHOTOS / f"{photo}.jpg", folder / file)
    return folder


@pytest.fixture
def many(tmp_path: Path) -> Callable[[int], Path]:
    """Makes a folder of so many photos of one face, no two alike."""

    def make(count: int) -> Path:
        folder = tmp_path / "many"
        folder.mkdir()
        photo = cv2.imread(str(PHOTOS / "astronaut.jpg"))
        for i in range(count):
            # A dot in the corner: other bytes, the same face.
            changed = photo.copy()
            changed[0, :3] = [[i % 256, i // 256, 77]] * 3
            cv2.imwrite(str(folder / f"eileen_{i:04}.png"), changed)
        return folder

    return make


async def entries_of(worker: Client, dataset: str) -> list[m.EntryInfo]:
    ask = m.ManageDataset(action="entries", dataset=dataset, limit=1_000)
    return (await worker.call(DATASET_MANAGE, ask)).entries or []


async def test_a_folder_is_enrolled_and_what_failed_is_told_with_its_reason(
    faces: Any, worker: Client, dataset: str, album: Path, tmp_path: Path
):
    report = tmp_path / "report.jsonl"
    ended = await faces("enrol", album, "-d", dataset, "--report", report, status=1)
    assert f"{dataset}: 3 enrolled, 0 were there, 1 failed, 0 left out" in ended.out
    [line] = [line for line in ended.out.splitlines() if line.startswith("man/cup.jpg")]
    assert "no face was found" in line
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert sorted((one["file"], one["status"]) for one in lines) == [
        ("eileen/1.jpg", "enrolled"),
        ("eileen/old/2.JPG", "enrolled"),
        ("man/1.jpg", "enrolled"),
        ("man/cup.jpg", "failed"),
    ]
    found = await entries_of(worker, dataset)
    assert sorted((one.subject or "", one.metadata["file"]) for one in found) == [
        ("eileen", "eileen/1.jpg"),
        ("eileen", "eileen/old/2.JPG"),
        ("man", "man/1.jpg"),
    ]
    assert "4 of 4 photos" in ended.err


async def test_photos_of_a_camera_are_enrolled_though_no_message_holds_them(
    faces: Any, worker: Client, dataset: str, tmp_path: Path
):
    folder = tmp_path / "camera" / "eileen"
    folder.mkdir(parents=True)
    assert len(camera_photo()) > 12_000_000 > worker.max_payload
    for i in range(4):
        # What stands behind a JPEG's end is no part of the picture.
        (folder / f"{i}.jpg").write_bytes(camera_photo() + bytes([i]))
    told = (await faces("enrol", folder.parent, "-d", dataset, "--json", "--one-face")).json
    assert (told["enrolled"], told["failed"]) == (4, [])
    found = (await faces("search", folder / "0.jpg", "-d", dataset, "--json")).json
    assert found["subject"] == "eileen"
    assert not (await worker.bodies._stream.occupied("$O.>")).subjects


async def test_a_second_run_sends_only_what_is_not_there(
    faces: Any, worker: Client, dataset: str, album: Path
):
    (album / "man/cup.jpg").unlink()
    (album / "man/1.jpg").rename(album.parent / "later.jpg")
    await faces("enrol", album, "-d", dataset)
    before = await entries_of(worker, dataset)
    (album.parent / "later.jpg").rename(album / "man/1.jpg")
    told = (await faces("enrol", album, "-d", dataset, "--json")).json
    assert (told["enrolled"], told["there"]) == (1, 2)
    after = await entries_of(worker, dataset)
    assert [one for one in after if one.subject == "eileen"] == before

    told = (await faces("enrol", album, "-d", dataset, "--again", "--json")).json
    assert (told["enrolled"], told["there"]) == (3, 0)
    assert len(await entries_of(worker, dataset)) == 3


async def test_an_entry_whose_person_was_changed_there_is_left_and_told(
    faces: Any, worker: Client, dataset: str, album: Path
):
    (album / "man/cup.jpg").unlink()
    await faces("enrol", album, "-d", dataset)
    rename = m.ManageDataset(action="rename-subject", dataset=dataset, subject="man", into="Jim")
    await worker.call(DATASET_MANAGE, rename)
    told = (await faces("enrol", album, "-d", dataset, "--json")).json
    assert told["there"] == 3
    [odd] = told["warnings"]
    assert odd["file"] == "man/1.jpg"
    assert "it is there as Jim" in odd["reason"]


async def test_the_person_may_stand_in_the_files_name_or_nowhere(
    faces: Any, worker: Client, dataset: str, album: Path
):
    flat = album.parent / "flat"
    flat.mkdir()
    shutil.copy(album / "eileen/1.jpg", flat / "Eileen_Collins_0001.jpg")
    shutil.copy(album / "man/1.jpg", flat / "man (2).jpg")
    await faces("enrol", flat, "-d", dataset, "--subject-from", "file", "--metadata", "year=1999")
    found = await entries_of(worker, dataset)
    assert {one.subject for one in found} == {"Eileen_Collins", "man"}
    assert {one.metadata["year"] for one in found} == {1999}
    await faces("enrol", flat, "-d", f"{dataset}-2", "--create", "--subject-from", "none")
    assert {one.subject for one in await entries_of(worker, f"{dataset}-2")} == {None}


async def test_what_is_no_photo_is_listed_and_fails_nothing(faces: Any, dataset: str, album: Path):
    (album / "man/cup.jpg").unlink()
    (album / "notes.txt").write_text("read me")
    (album / ".cache").mkdir()
    (album / ".cache/x.jpg").write_bytes(b"x")
    told = (await faces("enrol", album, "-d", dataset, "--json")).json
    assert [(one["file"], one["reason"]) for one in told["left_out"]] == [
        (".cache", "its name begins with a dot"),
        ("notes.txt", "it is no photo by its name (.txt)"),
    ]
    assert told["enrolled"] == 3


async def test_broken_photos_and_unknown_formats_fail_each_for_itself(
    faces: Any, dataset: str, album: Path
):
    whole = (album / "eileen/1.jpg").read_bytes()
    (album / "man/cup.jpg").write_bytes(whole[: len(whole) // 3])
    (album / "man/empty.png").touch()
    (album / "man/phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    (album / "man/link.jpg").symlink_to("nowhere.jpg")
    with (album / "man/huge.tif").open("wb") as huge:
        huge.truncate(1 << 30)
    told = (await faces("enrol", album, "-d", dataset, "--json", status=1)).json
    why = {one["file"]: one["reason"] for one in told["failed"]}
    assert told["enrolled"] == 3
    assert set(why) == {
        "man/cup.jpg", "man/empty.png", "man/phone.heic", "man/link.jpg", "man/huge.tif",
    }  # fmt: skip
    assert "cut off or damaged" in why["man/cup.jpg"]
    assert why["man/empty.png"] == "it has no bytes"
    assert "HEIC" in why["man/phone.heic"]
    assert "No such file" in why["man/link.jpg"]
    assert "1,073,741,824 bytes" in why["man/huge.tif"]


async def test_a_name_that_is_no_utf8_or_a_pipe_ends_nothing(
    faces: Any, worker: Client, dataset: str, album: Path, tmp_path: Path
):
    photo = (album / "eileen/1.jpg").read_bytes()
    os.mkfifo(album / "eileen/pipe.jpg")
    for file in (b"jos\xe9/1.jpg", b"eileen/\xff.jpg", b"eileen/\xfe.\xfd"):
        path = album / os.fsdecode(file)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(photo + file)
    report = tmp_path / "report.jsonl"
    ended = await faces("enrol", album, "-d", dataset, "--report", report, status=1)
    assert f"{dataset}: 4 enrolled, 0 were there, 3 failed, 1 left out" in ended.out
    told = {one["file"]: one for one in map(json.loads, report.read_text().splitlines())}
    assert "is no file, but a folder, a pipe" in told["eileen/pipe.jpg"]["reason"]
    assert "the name is no UTF-8" in told["jos\\xe9/1.jpg"]["reason"]
    assert "(.\\xfd)" in told["eileen/\\xfe.\\xfd"]["reason"]
    assert told["eileen/\\xff.jpg"]["status"] == "enrolled"
    files = {one.metadata["file"] for one in await entries_of(worker, dataset)}
    assert "eileen/\\xff.jpg" in files


async def test_one_photo_in_two_places_is_one_entry_and_cannot_be_two_persons(
    faces: Any, worker: Client, dataset: str, album: Path
):
    shutil.copy(album / "eileen/1.jpg", album / "eileen/copy.jpg")
    shutil.copy(album / "eileen/1.jpg", album / "man/2.jpg")
    shutil.copy(album / "man/cup.jpg", album / "man/cup2.jpg")
    told = (await faces("enrol", album, "-d", dataset, "--json", status=1)).json
    assert (told["enrolled"], told["there"]) == (3, 1)
    why = {one["file"]: one["reason"] for one in told["failed"]}
    assert set(why) == {"man/2.jpg", "man/cup.jpg", "man/cup2.jpg"}
    # Whichever of the two was read first.
    assert re.search(
        r"the same photo as eileen/(1|copy)\.jpg, which shows eileen", why["man/2.jpg"]
    )
    assert len(await entries_of(worker, dataset)) == 3


async def test_a_photo_of_several_faces_is_told_of_or_refused(
    faces: Any, dataset: str, tmp_path: Path
):
    pictures = (cv2.imread(str(PHOTOS / f"{name}.jpg")) for name in ("astronaut", "cameraman"))
    folder = tmp_path / "pair"
    folder.mkdir()
    cv2.imwrite(
        str(folder / "pair.png"), np.hstack([cv2.resize(one, (400, 400)) for one in pictures])
    )
    told = (await faces("enrol", folder, "-d", dataset, "--json", "--one-face", status=1)).json
    assert [one["reason"] for one in told["failed"]] == ["it shows several faces"]
    told = (await faces("enrol", folder, "-d", dataset, "--json")).json
    [odd] = told["warnings"]
    assert "it shows 2 faces; the largest was taken" in odd["warnings"]


async def test_an_interrupted_run_says_how_to_go_on_and_goes_on(
    faces: Any, rustyface: dict[str, str], worker: Client, dataset: str, many: Any
):
    folder = many(120)
    process = await asyncio.create_subprocess_exec(
        *BKG, "faces", "enrol", str(folder), "-d", dataset, "--subject-from", "file",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=rustyface,
    )  # fmt: skip

    async def some() -> bool:
        return len(await entries_of(worker, dataset)) >= 10

    await until(some, 60)
    process.send_signal(signal.SIGINT)
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 130
    assert b"the same command goes on with them" in err
    assert b" enrolled, 0 were there, 0 failed" in out
    before = len(await entries_of(worker, dataset))
    assert 10 <= before < 120
    told = await faces("enrol", folder, "-d", dataset, "--subject-from", "file", "--json")
    assert told.json["there"] >= before
    assert told.json["there"] + told.json["enrolled"] == 120
    assert len(await entries_of(worker, dataset)) == 120


async def test_a_terminal_gets_a_bar_with_photos_and_rate(
    rustyface: dict[str, str], dataset: str, album: Path
):
    shown = await shown_at_terminal(
        rustyface, "faces", "enrol", str(album / "eileen"), "-d", dataset
    )
    assert f"enrolling into {dataset}" in shown
    assert "2/2" in shown
    assert "photos/s" in shown


async def test_a_folder_or_a_dataset_that_is_not_there_is_said_before_anything_is_sent(
    faces: Any, dataset: str, album: Path, tmp_path: Path
):
    for folder, why in (("nowhere", "not there"), ("album/man/1.jpg", "a file")):
        ended = await faces("enrol", tmp_path / folder, "-d", dataset, status=2)
        assert why in ended.err
    (tmp_path / "bare").mkdir()
    ended = await faces("enrol", tmp_path / "bare", "-d", dataset, status=2)
    assert "has no photo" in ended.err
    ended = await faces("enrol", album, "-d", "nowhere", status=1)
    assert "`bkg faces create nowhere` makes it, or --create here" in ended.err
    ended = await faces("enrol", album, "-d", dataset, "--report", tmp_path / "a/b/c", status=2)
    assert "cannot be written to" in ended.err


# --- Patience -------------------------------------------------------------------------------------


class Moody:
    """Answers, after it has raised what it was told to."""

    def __init__(self, *moods: Exception) -> None:
        self.moods = list(moods)

    async def __call__(self) -> str:
        if self.moods:
            raise self.moods.pop(0)
        return "an answer"


async def test_what_is_busy_or_away_is_asked_again(monkeypatch: pytest.MonkeyPatch):
    busy = Moody(Overloaded("64 images wait", retry_after_s=0.01), Unavailable("nobody"))
    assert await enrolment._patient(busy) == "an answer"
    monkeypatch.setattr(enrolment, "PATIENCE_S", 0.2)
    with pytest.raises(Unavailable, match="nobody"):
        await enrolment._patient(Moody(*[Unavailable("nobody")] * 50))


async def test_what_gets_no_answer_is_sent_again_but_not_for_ever():
    lost = DeadlineExceeded("no answer within 20 s")
    assert await enrolment._patient(Moody(lost, Conflict("others"), lost)) == "an answer"
    with pytest.raises(DeadlineExceeded, match=r"no answer within 20 s \(4 times\)"):
        await enrolment._patient(Moody(*[lost] * 4))


async def test_what_is_refused_is_not_sent_again():
    refusing = Moody(NotFound("no dataset"), NotFound("no dataset"))
    with pytest.raises(NotFound):
        await enrolment._patient(refusing)
    assert len(refusing.moods) == 1


# --- Text -----------------------------------------------------------------------------------------

words = st.from_regex(r"[A-Za-zäß_-]*[A-Za-zäß]", fullmatch=True)


@given(words, st.integers(0, 9_999), st.sampled_from(["{}_{:04}", "{}{}", "{} ({})", "{}-{}"]))
def test_a_number_behind_a_name_is_no_part_of_it(name: str, number: int, form: str):
    file = Path(form.format(name, number) + ".jpg")
    assert subject_of(file, "file") == name
    assert subject_of(Path("album") / file, "folder") == "album"
    assert subject_of(file, "folder") is None
    assert subject_of(file, "none") is None


def test_a_name_that_is_a_number_stays_one():
    assert subject_of(Path("0001.jpg"), "file") == "0001"


@pytest.mark.parametrize("source", ["folder", "file"])
def test_one_name_written_with_accents_in_two_ways_is_one_person(source: SubjectFrom):
    composed, decomposed = "Jos\u00e9", "Jose\u0301"
    for name in (composed, decomposed):
        file = Path(f"{name}/{name}_01.jpg")
        assert subject_of(file, source) == composed


def test_a_folder_that_cannot_be_read_is_no_folder_without_photos(
    album: Path, monkeypatch: pytest.MonkeyPatch
):
    scandir = os.scandir

    def guarded(path: Any) -> Any:
        if Path(path).name == "man":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    photos, others = files_in(album)
    assert [photo.name for photo in photos] == ["1.jpg", "2.JPG"]
    assert [(one.file, one.status) for one in others] == [("man", "failed")]
    with pytest.raises(typer.BadParameter, match="Permission denied"):
        files_in(album / "man")


@pytest.mark.parametrize(("done", "total", "spent_s", "line"), [
    (0, 1_000, 0.0, "x: 0 of 1,000 photos"),
    (250, 1_000, 10.0, "x: 250 of 1,000 photos, 25.0/s, 30 s left"),
    (1_000, 1_000, 10.0, "x: 1,000 of 1,000 photos, 100.0/s"),
])  # fmt: skip
def test_progress_in_photos_is_a_line_with_rate_and_time_left(
    done: int, total: int, spent_s: float, line: str
):
    assert line_of("x", done, total, 0, spent_s, "photos") == line

"""Contact sheets: who is on them, what they look like, and that they always fit."""

import asyncio
import re
from datetime import UTC, datetime

import cv2
import numpy as np
import pytest

from bus import messages as m
from bus.errors import InvalidRequest, NotFound, TooLarge
from services.rustyface import images
from services.rustyface.sheet import Sheets

AT = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)
MIB = 1024 * 1024


class Listed:
    """Entries that are there, as galleries list them."""

    def __init__(self, entries) -> None:
        self.all = sorted(entries, key=lambda one: one.id)

    async def entries(self, gallery, *, limit, after=None, subject=None, entry=None):
        if gallery != "people":
            raise NotFound(f"there is no dataset {gallery!r}", field="dataset")
        found = [
            one for one in self.all if subject in (None, one.subject) and entry in (None, one.id)
        ]
        behind = [one for one in found if after is None or one.id > after]
        part = behind[:limit]
        return part, part[-1].id if len(behind) > limit else None, len(found)


def entry(name, subject=None, image=None, **more):
    return m.EntryInfo(id=name, last_seen=AT, revision=1, subject=subject, image=image, **more)


@pytest.fixture
def sheets(client, pipeline, photo):
    """Make a drawer of sheets over some entries; what a search finds is given."""

    async def detect(request):
        image = images.decode(request.image)
        faces = await asyncio.to_thread(pipeline.analyse, image, embedded_max=0)
        height, width = image.shape[:2]
        found = [
            m.FaceInfo(box=list(one.box), landmarks=[], score=one.score, quality={})
            for one in faces
        ]
        return m.DetectedFaces(width=width, height=height, faces=found)

    def made(*entries: m.EntryInfo, found=None, max_bytes=8 * MIB):
        async def search(request):
            assert request.every_face
            return found

        return Sheets(Listed(entries), client.store.faces, detect, search, max_bytes)

    return made


@pytest.fixture
def kept(client, samples_dir):
    """Keep an image, and give its digest."""

    async def one(name="astronaut", data=None):
        async with client.store.faces.writing() as upload:
            await upload.write(data or (samples_dir / f"{name}.jpg").read_bytes())
            return (await upload.commit()).digest

    return one


async def html(sheets, **asked):
    told = await sheets.answer(m.DrawSheet(**asked))
    assert told.content_type == "text/html; charset=utf-8"
    return told.body.decode(), told


async def png(sheets, **asked):
    told = await sheets.answer(m.DrawSheet(format="png", **asked))
    assert told.content_type == "image/png"
    return cv2.imdecode(np.frombuffer(told.body, np.uint8), cv2.IMREAD_COLOR), told


def names(page):
    return re.findall(r"<h2>(?:<b.*?</b>)?(.*?)</h2>", page)


def cells(page):
    return re.findall(r"<h3>(.*?)</h3>", page)


# --- Of a dataset ---------------------------------------------------------------------------------


async def test_entries_stand_below_their_person_and_nobodys_at_the_end(sheets):
    drawer = sheets(entry("1"), entry("2", "Zoe"), entry("3", "Anna"), entry("4", "Zoe"))
    page, told = await html(drawer, dataset="people")
    assert names(page) == ["Anna", "Zoe", "Nobody&#x27;s"]
    assert cells(page) == ["3", "2", "4", "1"]
    assert (told.shown, told.next) == (4, None)


async def test_a_kept_picture_is_cut_to_the_face_and_a_missing_one_is_said(sheets, kept):
    drawer = sheets(
        entry("kept", image=await kept()),
        entry("none"),
        entry("gone", image="0" * 64),
        entry("broken", image=await kept(data=b"no picture")),
    )
    page, _ = await html(drawer, dataset="people")
    [source] = re.findall(r'src="data:image/jpeg;base64,(.*?)"', page)
    assert page.count("no picture kept") == 1
    assert page.count("picture is gone") == 2
    assert len(source) > 2_000


async def test_the_page_needs_nothing_from_elsewhere(sheets, kept):
    page, _ = await html(sheets(entry("a", image=await kept())), dataset="people")
    assert all(one.startswith("data:image/jpeg") for one in re.findall(r'src="(.*?)"', page))
    assert not re.search(r"<script|http:|https:|@import|url\(", page)


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", 'a" onload="x', "a\0b\n\x1b[31m", "李明"]
)
@pytest.mark.parametrize("form", ["html", "png"])
async def test_any_name_is_only_text(sheets, name, form):
    told = await sheets(entry("e", name)).answer(m.DrawSheet(dataset="people", format=form))
    page = told.body.decode(errors="replace")
    if form == "html":
        assert "<script" not in page
        assert 'onload="x' not in page
        assert "\0" not in page


async def test_the_words_are_in_the_readers_language(sheets):
    page, _ = await html(sheets(entry("1")), dataset="people", language="de")
    assert '<html lang="de">' in page
    assert "Datensatz people" in page
    assert "1 von 1 Einträgen" in page


async def test_only_one_person_is_drawn_if_they_are_named(sheets):
    drawer = sheets(entry("1", "Anna"), entry("2", "Bert"))
    page, _ = await html(drawer, dataset="people", subject="Bert")
    assert names(page) == ["Bert"]
    with pytest.raises(NotFound, match="nobody called"):
        await drawer.answer(m.DrawSheet(dataset="people", subject="Carla"))


async def test_what_is_not_there_cannot_be_drawn(sheets):
    with pytest.raises(NotFound, match="no dataset"):
        await sheets().answer(m.DrawSheet(dataset="others"))
    with pytest.raises(InvalidRequest, match="dataset"):
        await sheets().answer(m.DrawSheet())


async def test_an_empty_dataset_says_so(sheets):
    page, told = await html(sheets(), dataset="people")
    assert "There are no entries." in page
    assert told.shown == 0
    image, _ = await png(sheets(), dataset="people")
    assert image.shape[0] > 100


async def test_the_png_has_a_row_for_every_six_entries(sheets, kept):
    image = await kept()
    heights = []
    for count in (1, 6, 7):
        drawer = sheets(*(entry(f"{i}", "Anna", image) for i in range(count)))
        heights.append((await png(drawer, dataset="people"))[0].shape[0])
    assert heights[0] == heights[1] < heights[2]


# --- It fits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["html", "png"])
@pytest.mark.parametrize("max_bytes", [60_000, 120_000, MIB])
async def test_a_sheet_that_does_not_fit_goes_on_where_it_ends(sheets, kept, form, max_bytes):
    image = await kept()
    everybody = [f"e{i:02}" for i in range(48)]
    drawer = sheets(*(entry(name, "Anna", image) for name in everybody), max_bytes=max_bytes)
    after, seen, pages = None, 0, 0
    while True:
        request = m.DrawSheet(dataset="people", after=after, format=form)
        told = await drawer.answer(request)
        assert len(told.body) <= max_bytes
        pages += 1
        seen += told.shown
        if told.next is None:
            break
        assert told.next == everybody[seen - 1]
        after = told.next
    assert seen == 48
    assert (pages == 1) is (max_bytes == MIB)


async def test_pictures_get_smaller_before_entries_are_left_out(sheets, kept):
    image = await kept()
    entries = [entry(f"e{i:02}", "Anna", image) for i in range(30)]
    wide, told = await html(sheets(*entries), dataset="people")
    narrow, told_too = await html(sheets(*entries, max_bytes=len(wide) // 2), dataset="people")
    assert told.shown == told_too.shown == 30
    assert len(narrow) <= len(wide) // 2


async def test_what_fits_in_no_way_is_refused(sheets):
    with pytest.raises(TooLarge, match="max_payload"):
        await sheets(entry("e"), max_bytes=1_000).answer(m.DrawSheet(dataset="people"))


# --- Of a search ----------------------------------------------------------------------------------


def match(name, score, **more):
    given = {"metadata": None, "last_seen": AT, "known": score >= 0.45, **more}
    return m.FaceMatch(id=name, score=score, **given)


def matches(*faces: m.FaceInfo, **more):
    given = {
        "dataset": "people",
        "query_embedding": [],
        "results": [],
        "known": False,
        "threshold": 0.45,
        "revision": 1,
        "searched": 12,
        **more,
    }
    return m.FaceMatches(faces=list(faces), **given)


def face(*found: m.FaceMatch, left=100.0):
    return m.FaceInfo(
        box=[left, 60.0, 80.0, 100.0], landmarks=[], score=0.94, quality={}, matches=list(found)
    )


@pytest.fixture
def picture(samples_dir):
    return (samples_dir / "astronaut.jpg").read_bytes()


async def test_every_face_stands_below_the_photo_with_what_was_found_for_it(sheets, picture):
    found = matches(
        face(match("e1", 0.87, subject="Eileen", expected_false=0.0012)),
        face(match("c1", 0.21, subject="Carl"), left=200.0),
        face(match("r1", 0.7, subject="Rosa", rejected=True, known=False), left=300.0),
        face(left=400.0),
    )
    page, told = await html(sheets(found=found), dataset="people", image=picture)
    assert names(page) == ["Eileen", "Unknown", "Unknown", "Unknown"]
    assert cells(page) == ["Eileen", "Carl", "Rosa"]
    assert re.findall(r'<span class="chip">(.*?)<', page) == ["known", "unknown", "rejected"]
    assert "0.87" in page
    assert "0.0012 strangers expected" in page
    assert "Nobody is like this face." in page
    assert re.findall(r"<text .*?>(\d+)</text>", page) == ["1", "2", "3", "4"]
    assert told.shown == 3


async def test_the_match_that_was_found_is_shown_with_its_picture(sheets, kept, picture):
    found = matches(face(match("e1", 0.87, subject="Eileen")))
    with_picture, _ = await html(
        sheets(entry("e1", "Eileen", await kept()), found=found), dataset="people", image=picture
    )
    without, _ = await html(sheets(found=found), dataset="people", image=picture)
    # The photo, and the face that was searched for, are always there.
    assert with_picture.count("data:image/jpeg") == 3
    assert without.count("data:image/jpeg") == 2


async def test_an_embedder_without_faces_has_its_matches_on_the_sheet(sheets, picture):
    found = matches(results=[match("e1", 0.99)])
    page, _ = await html(sheets(found=found), dataset="people", image=picture)
    assert cells(page) == ["e1"]


async def test_a_search_is_drawn_with_boxes_in_the_photo(sheets, picture):
    plain, _ = await png(sheets(found=matches()), dataset="people", image=picture)
    found = matches(face(match("e1", 0.87, subject="Eileen")))
    boxed, _ = await png(sheets(found=found), dataset="people", image=picture)
    green = (boxed == (87, 157, 31)).all(axis=2).sum()
    assert green > 500
    assert not (plain == (87, 157, 31)).all(axis=2).any()
    assert boxed.shape[1] == 1_360


@pytest.mark.parametrize(("form", "max_bytes"), [("html", 700_000), ("png", 2 * MIB)])
async def test_a_crowd_fits_with_fewer_matches_and_smaller_pictures(
    sheets, kept, picture, form, max_bytes
):
    image = await kept()
    everybody = [entry(f"e{i}", f"P{i}", image) for i in range(6)]
    found = matches(
        *(face(*(match(f"e{i}", 0.5, subject=f"P{i}") for i in range(6))) for _ in range(40))
    )
    drawer = sheets(*everybody, found=found, max_bytes=max_bytes)
    request = m.DrawSheet(dataset="people", image=picture, format=form)
    told = await drawer.answer(request)
    assert len(told.body) <= max_bytes
    assert 40 <= told.shown <= 240

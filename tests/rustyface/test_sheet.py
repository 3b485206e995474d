"""Contact sheets: who is on them, what they look like, and that they always fit."""

import asyncio
import base64
import re
from datetime import UTC, datetime

import cv2
import numpy as np
import pytest

from bus import messages as m
from bus.errors import InvalidRequest, NotFound, Overloaded, TooLarge
from bus.subjects import FACES_ENCODE, FACES_SHEET
from bus.testing import until
from services.rustyface.calibration import Thresholds
from services.rustyface.faces import Faces
from services.rustyface.galleries.galleries import NewEntry
from services.rustyface.photos.encoder import FaceEncoder, PixelEncoder
from services.rustyface.photos.kept import KeptImages
from services.rustyface.photos.workers import Workers
from services.rustyface.sheets.sheet import SHEETS_AT_ONCE, WAITING_MAX, Sheets
from tests.rustyface.files import encoded

EAST = np.eye(1, 128, dtype=np.float32)[0]
AT = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)
MIB = 1024 * 1024


def entry(name, subject=None, image=None, vector=EAST):
    return NewEntry(id=name, vector=vector, subject=subject, image=image, at=AT)


@pytest.fixture
async def faces(client, worker, pipeline):
    """What a worker answers with: its galleries, and faces that are found and searched for."""
    async with worker(encoder=FaceEncoder(pipeline)) as galleries:
        yield Faces(
            galleries,
            FaceEncoder(pipeline),
            Workers(64),
            KeptImages(client.store.faces),
            Thresholds("sface"),
            "default",
        )


@pytest.fixture
def sheets(client, faces):
    """Enrol entries in `people`, and give what draws sheets of it."""

    async def made(*entries: NewEntry, max_bytes=8 * MIB, **more) -> Sheets:
        await faces._galleries.create("people")
        await faces._galleries.enrol_many("people", entries, existing="replace")
        given = {"detect": faces.detect, "search": faces.search} | more
        return Sheets(faces._galleries, client.store.faces, max_bytes=max_bytes, **given)

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
    drawer = await sheets(entry("1"), entry("2", "Zoe"), entry("3", "Anna"), entry("4", "Zoe"))
    page, told = await html(drawer, dataset="people")
    assert names(page) == ["Anna", "Zoe", "Nobody&#x27;s"]
    assert cells(page) == ["3", "2", "4", "1"]
    assert (told.shown, told.next) == (4, None)


async def test_a_kept_picture_is_cut_to_the_face_and_a_missing_one_is_said(sheets, kept):
    drawer = await sheets(
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
    page, _ = await html(await sheets(entry("a", image=await kept())), dataset="people")
    assert all(one.startswith("data:image/jpeg") for one in re.findall(r'src="(.*?)"', page))
    assert not re.search(r"<script|http:|https:|@import|url\(", page)


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", 'a" onload="x', "a\0b\n\x1b[31m", "李明"]
)
@pytest.mark.parametrize("form", ["html", "png"])
async def test_any_name_is_only_text(sheets, name, form):
    told = await (await sheets(entry("e", name))).answer(m.DrawSheet(dataset="people", format=form))
    page = told.body.decode(errors="replace")
    if form == "html":
        assert "<script" not in page
        assert 'onload="x' not in page
        assert "\0" not in page


async def test_the_words_are_in_the_readers_language(sheets):
    page, _ = await html(await sheets(entry("1")), dataset="people", language="de")
    assert '<html lang="de">' in page
    assert "Datensatz people" in page
    assert "1 von 1 Einträgen" in page


async def test_only_one_person_is_drawn_if_they_are_named(sheets):
    drawer = await sheets(entry("1", "Anna"), entry("2", "Bert"))
    page, _ = await html(drawer, dataset="people", subject="Bert")
    assert names(page) == ["Bert"]
    with pytest.raises(NotFound, match="nobody called"):
        await drawer.answer(m.DrawSheet(dataset="people", subject="Carla"))


async def test_what_is_not_there_cannot_be_drawn(sheets):
    with pytest.raises(NotFound, match="no dataset"):
        await (await sheets()).answer(m.DrawSheet(dataset="others"))
    with pytest.raises(InvalidRequest, match="dataset"):
        await (await sheets()).answer(m.DrawSheet())


async def test_an_empty_dataset_says_so(sheets):
    page, told = await html(await sheets(), dataset="people")
    assert "There are no entries." in page
    assert told.shown == 0
    image, _ = await png(await sheets(), dataset="people")
    assert image.shape[0] > 100


async def test_the_png_has_a_row_for_every_six_entries(sheets, kept):
    image = await kept()
    heights = []
    for count in (1, 6, 7):
        drawer = await sheets(*(entry(f"{i}", "Anna", image) for i in range(count)))
        heights.append((await png(drawer, dataset="people"))[0].shape[0])
    assert heights[0] == heights[1] < heights[2]


# --- It fits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["html", "png"])
@pytest.mark.parametrize("max_bytes", [60_000, 120_000, MIB])
async def test_a_sheet_that_does_not_fit_goes_on_where_it_ends(sheets, kept, form, max_bytes):
    image = await kept()
    everybody = [f"e{i:02}" for i in range(48)]
    drawer = await sheets(*(entry(name, "Anna", image) for name in everybody), max_bytes=max_bytes)
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
    wide, told = await html(await sheets(*entries), dataset="people")
    narrow, told_too = await html(
        await sheets(*entries, max_bytes=len(wide) // 2), dataset="people"
    )
    assert told.shown == told_too.shown == 30
    assert len(narrow) <= len(wide) // 2


async def test_what_fits_in_no_way_is_refused(sheets):
    with pytest.raises(TooLarge, match="max_payload"):
        await (await sheets(entry("e"), max_bytes=1_000)).answer(m.DrawSheet(dataset="people"))


# --- Of a search ----------------------------------------------------------------------------------


@pytest.fixture
def file(samples_dir):
    return lambda name: (samples_dir / f"{name}.jpg").read_bytes()


@pytest.fixture
async def vectors(faces, file):
    """The vectors of the two whose photos there are."""
    eileen, sandy = [
        (await faces.encode(m.EncodeFace(image=file(name), persist=False))).embedding
        for name in ("astronaut", "cameraman")
    ]
    return {"Eileen": np.array(eileen, np.float32), "Sandy": np.array(sandy, np.float32)}


@pytest.fixture
def both(photo) -> bytes:
    """The astronaut, and smaller than her the cameraman."""
    image = photo("astronaut").copy()
    image[330:450, 20:140] = cv2.resize(photo("cameraman")[60:260, 120:320], (120, 120))
    return encoded(".png", image)


async def test_every_face_stands_below_the_photo_with_what_was_found_for_it(sheets, vectors, both):
    drawer = await sheets(entry("e1", "Eileen", vector=vectors["Eileen"]))
    page, told = await html(drawer, dataset="people", image=both)
    assert names(page) == ["Eileen", "Unknown"]
    assert cells(page)[0] == "Eileen"
    assert re.findall(r'<span class="chip">(.*?)<', page)[0] == "known"
    assert "strangers expected" in page
    assert re.findall(r"<text .*?>(\d+)</text>", page) == ["1", "2"]
    assert told.shown == len(cells(page))


async def test_a_face_that_nobody_is_like_says_so(sheets, vectors, both):
    drawer = await sheets(entry("e1", "Eileen", vector=-vectors["Eileen"]))
    page, told = await html(drawer, dataset="people", image=both, limit=1)
    assert "Nobody is like this face." in page
    assert told.shown == len(cells(page))


async def test_behind_whoever_was_rejected_the_next_one_is_named_as_a_search_names(
    faces, sheets, vectors, file
):
    near = vectors["Eileen"] + 0.5 * vectors["Sandy"]
    drawer = await sheets(
        entry("r1", "Rosa", vector=vectors["Eileen"]), entry("e1", "Eileen", vector=near)
    )
    await faces._galleries.reject("people", "Rosa", vector=vectors["Eileen"])
    page, _ = await html(drawer, dataset="people", image=file("astronaut"))
    asked = m.SearchFaces(dataset="people", image=file("astronaut"), group_by="subject")
    assert names(page) == ["Eileen"] == [(await faces.search(asked)).subject]
    assert cells(page) == ["Eileen", "Rosa"]
    assert re.findall(r'<span class="chip">(.*?)<', page) == ["known", "rejected"]


async def test_the_match_that_was_found_is_shown_with_its_picture(sheets, kept, vectors, file):
    for image, count in ((await kept(), 3), (None, 2)):
        drawer = await sheets(entry("e1", "Eileen", image, vector=vectors["Eileen"]))
        page, _ = await html(drawer, dataset="people", image=file("astronaut"))
        # The photo, and the face that was searched for, are always there.
        assert page.count("data:image/jpeg") == count


async def test_an_embedder_without_faces_has_its_matches_on_the_sheet(client, worker, file):
    async with worker(encoder=PixelEncoder()):
        asked = m.EncodeFace(image_base64=base64.b64encode(file("coffee")).decode(), entry_id="e1")
        await client.call(FACES_ENCODE, asked)
        told = await client.call(FACES_SHEET, m.DrawSheet(image_base64=asked.image_base64))
    assert cells(told.body.decode()) == ["e1"]


async def test_a_search_is_drawn_with_boxes_in_the_photo(sheets, vectors, file):
    drawer = await sheets(entry("e1", "Eileen", vector=vectors["Eileen"]))
    boxed, _ = await png(drawer, dataset="people", image=file("astronaut"))
    green = (boxed == (87, 157, 31)).all(axis=2).sum()
    assert green > 500
    assert boxed.shape[1] == 1_360
    drawer = await sheets(entry("e1", "Eileen", vector=-vectors["Eileen"]))
    unknown, _ = await png(drawer, dataset="people", image=file("astronaut"))
    assert not (unknown == (87, 157, 31)).all(axis=2).any()


@pytest.fixture
def crowd(photo) -> bytes:
    """Forty faces."""
    face = cv2.resize(photo("astronaut")[:256, 100:356], (160, 160), interpolation=cv2.INTER_AREA)
    return encoded(".png", np.tile(face, (5, 8, 1)))


@pytest.mark.parametrize(("form", "max_bytes"), [("html", 700_000), ("png", 2 * MIB)])
async def test_a_crowd_fits_with_fewer_matches_and_smaller_pictures(
    sheets, kept, vectors, crowd, form, max_bytes
):
    image, vector = await kept(), vectors["Eileen"]
    everybody = [entry(f"e{i}", f"P{i}", image, vector=vector) for i in range(6)]
    drawer = await sheets(*everybody, max_bytes=max_bytes)
    told = await drawer.answer(m.DrawSheet(dataset="people", image=crowd, format=form))
    assert len(told.body) <= max_bytes
    assert 40 <= told.shown <= 240


# --- Not more than there is room for --------------------------------------------------------------


async def test_more_sheets_than_may_wait_are_refused_and_the_others_are_drawn(
    faces, sheets, vectors, file
):
    go = asyncio.Event()
    begun = []

    async def search(request):
        begun.append(request)
        await go.wait()
        return await faces.search(request)

    drawer = await sheets(entry("e1", "Eileen", vector=vectors["Eileen"]), search=search)
    asked = m.DrawSheet(dataset="people", image=file("astronaut"))
    waiting = [
        asyncio.create_task(drawer.answer(asked)) for _ in range(SHEETS_AT_ONCE + WAITING_MAX)
    ]
    await until(lambda: len(begun) == SHEETS_AT_ONCE)
    with pytest.raises(Overloaded, match="sheets are drawn or wait"):
        await drawer.answer(asked)
    assert len(begun) == SHEETS_AT_ONCE
    go.set()
    assert all(names(one.body.decode()) == ["Eileen"] for one in await asyncio.gather(*waiting))
    assert names((await drawer.answer(asked)).body.decode()) == ["Eileen"]


async def test_how_large_a_picture_may_be_is_the_workers_setting(sheets, kept, file):
    drawer = await sheets(entry("kept", image=await kept()), max_pixels=512 * 512 - 1)
    with pytest.raises(TooLarge, match="512 x 512 pixels, 262143 in all"):
        await drawer.answer(m.DrawSheet(dataset="people", image=file("astronaut")))
    page, _ = await html(drawer, dataset="people")
    assert "picture is gone" in page
    drawer = await sheets(max_pixels=512 * 512)
    page, _ = await html(drawer, dataset="people")
    assert "picture is gone" not in page

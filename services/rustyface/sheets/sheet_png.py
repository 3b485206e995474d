"""A contact sheet as one PNG, drawn by hand: strips from top to bottom, as wide as the sheet."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, Final

import cv2
import numpy as np

from services.rustyface.photos.images import Image
from services.rustyface.sheets.sheet_parts import Boxed, Cell, Group, Mark, Page

WIDTH_PX: Final = 1_360
MARGIN_PX: Final = 40
GAP_PX: Final = 22
INNER_PX: Final = WIDTH_PX - 2 * MARGIN_PX
CELL_PX: Final = (INNER_PX - 2 * GAP_PX - 5 * GAP_PX) // 6
PHOTO_HEIGHT_MAX_PX: Final = 900
# How much it is shrunk; the first one that fits is taken.
SCALES: Final = (1.0, 0.8, 0.6, 0.45, 0.33)
# What is estimated so much larger than it may be is not tried: coding a long sheet takes a second.
HOPELESS: Final = 1.3
# More rows than that no viewer shows, and each takes 4 kB.
ROWS_MAX: Final = 30_000

Colour = tuple[int, int, int]

# Blue first, as everywhere in OpenCV.
GROUND: Final = (248, 246, 245)
SURFACE: Final = (255, 255, 255)
SUNKEN: Final = (243, 240, 238)
LINE: Final = (233, 228, 225)
TEXT: Final = (40, 31, 26)
QUIET: Final = (113, 98, 89)
TONES: Final[dict[Mark | None, Colour]] = {
    "known": (61, 112, 20), "unknown": QUIET, "rejected": (30, 38, 179), None: QUIET,
}  # fmt: skip
TONE_GROUNDS: Final[dict[Mark | None, Colour]] = {
    "known": (233, 244, 226), "unknown": SUNKEN, "rejected": (234, 234, 253), None: SUNKEN,
}  # fmt: skip
FRAMES: Final[dict[Mark, Colour]] = {
    "known": (87, 157, 31), "unknown": (61, 163, 232), "rejected": (58, 69, 217),
}  # fmt: skip


def drawn(page: Page, max_bytes: int) -> bytes | None:
    """Return a page as a PNG; None if it does not fit into `max_bytes` even when it is shrunk."""
    strips = list(_strips(page))
    if sum(len(strip) for strip in strips) > ROWS_MAX:
        return None
    sheet = np.concatenate(strips)
    likely_bytes = 0
    for scale in SCALES:
        if likely_bytes * scale * scale > max_bytes * HOPELESS:
            continue
        size = round(sheet.shape[1] * scale), round(sheet.shape[0] * scale)
        fit = sheet if scale == 1 else cv2.resize(sheet, size, interpolation=cv2.INTER_AREA)
        done, coded = cv2.imencode(".png", fit, [cv2.IMWRITE_PNG_COMPRESSION, 6])
        if done and len(coded) <= max_bytes:
            return np.asarray(coded).tobytes()
        likely_bytes = round(len(coded) / scale**2)
    return None


# --- Strips ---------------------------------------------------------------------------------------


def _strips(page: Page) -> Iterator[Image]:
    yield _head(page)
    if page.photo is not None:
        yield _photo(page.photo, page.boxes)
    if not page.groups:
        strip = _blank(80)
        _write(strip, page.empty, (MARGIN_PX, 40), 18, QUIET)
        yield strip
    for group in page.groups:
        yield from _group(group)
    yield _blank(MARGIN_PX)


def _head(page: Page) -> Image:
    strip = _blank(124)
    _write(strip, page.title, (MARGIN_PX, 66), 32, TEXT, weight=640, most=INNER_PX)
    _write(strip, page.about, (MARGIN_PX, 98), 17, QUIET, most=INNER_PX)
    return strip


def _photo(photo: Image, boxes: Sequence[Boxed]) -> Image:
    height, width = photo.shape[:2]
    scale = min(INNER_PX / width, PHOTO_HEIGHT_MAX_PX / height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    shown = _rounded(np.asarray(cv2.resize(photo, size, interpolation=way), np.uint8), 14, GROUND)
    for one in boxes:
        left, top, across, down = (round(value * scale) for value in one.box)
        colour = FRAMES[one.mark]
        # White around it, so that it is seen on a ground of its own colour, too.
        for line, width_px in ((SURFACE, 6), (colour, 3)):
            corner = left + across, top + down
            cv2.rectangle(shown, (left, top), corner, line, width_px, cv2.LINE_AA)
        text = str(one.number)
        wide = _width(text, 18, 700) + 16
        cv2.rectangle(shown, (left - 1, top - 1), (left + wide, top + 27), colour, cv2.FILLED)
        _write(shown, text, (left + 8, top + 20), 18, SURFACE, weight=700)
    strip = _blank(size[1] + GAP_PX)
    left = (WIDTH_PX - size[0]) // 2
    strip[: size[1], left : left + size[0]] = shown
    return strip


def _group(group: Group) -> Iterator[Image]:
    """Give a group's card: its top with the name, its rows of cells, its bottom."""
    yield _card(_group_head(group), is_top=True)
    if not group.cells:
        strip = _blank(44, SURFACE)
        _write(strip, group.empty, (MARGIN_PX + GAP_PX, 22), 16, QUIET)
        yield _card(strip)
    for at in range(0, len(group.cells), 6):
        yield _card(_row(group.cells[at : at + 6]))
    yield _card(_blank(10, SURFACE), is_bottom=True)
    yield _blank(16)


def _group_head(group: Group) -> Image:
    with_picture = group.picture is not None
    strip = _blank(112 if with_picture else 86, SURFACE)
    left, base = MARGIN_PX + GAP_PX, 54 if with_picture else 40
    if group.picture is not None:
        small = np.asarray(
            cv2.resize(group.picture, (72, 72), interpolation=cv2.INTER_AREA), np.uint8
        )
        strip[18:90, left : left + 72] = _rounded(small, 36, SURFACE)
        cv2.circle(strip, (left + 36, 54), 36, TONES[group.mark], 3, cv2.LINE_AA)
        left += 72 + 18
        base = 50
    if group.number is not None:
        text = str(group.number)
        wide = _width(text, 17, 700) + 18
        _chip(strip, (left, base - 20, wide, 27), TONE_GROUNDS[group.mark])
        _write(strip, text, (left + 9, base), 17, TONES[group.mark], weight=700)
        _write(strip, group.title, (left + wide + 10, base), 22, TEXT, weight=620, most=900)
    else:
        _write(strip, group.title, (left, base), 22, TEXT, weight=620, most=1_000)
    _write(strip, group.about, (left, base + 26), 16, QUIET, most=1_000)
    return strip


def _row(cells: Sequence[Cell]) -> Image:
    parts = [_cell(cell) for cell in cells]
    strip = _blank(max(len(part) for part in parts) + 14, SURFACE)
    for i, part in enumerate(parts):
        left = MARGIN_PX + GAP_PX + i * (CELL_PX + GAP_PX)
        strip[: len(part), left : left + CELL_PX] = part
    return strip


def _cell(cell: Cell) -> Image:
    lines = len(cell.lines) + 1 + (2 if cell.score is not None else 0)
    part = np.full((CELL_PX + 10 + 22 * lines, CELL_PX, 3), SURFACE, np.uint8)
    if cell.picture is None:
        _gap(part, cell.gap)
    else:
        small = cv2.resize(cell.picture, (CELL_PX, CELL_PX), interpolation=cv2.INTER_AREA)
        part[:CELL_PX] = _rounded(np.asarray(small, np.uint8), 10, SURFACE)
    at = CELL_PX + 24
    _write(part, cell.title, (0, at), 16, TEXT, weight=560, most=CELL_PX)
    if cell.score is not None:
        _bar(part, at + 15, cell)
        at += 42
        _write(part, cell.score_text, (0, at), 16, TEXT, weight=640)
        wide = _width(cell.mark_text, 14, 560) + 18
        _chip(part, (CELL_PX - wide, at - 17, wide, 23), TONE_GROUNDS[cell.mark])
        _write(part, cell.mark_text, (CELL_PX - wide + 9, at - 1), 14, TONES[cell.mark], weight=560)
    for line in cell.lines:
        at += 22
        _write(part, line, (0, at), 14, QUIET, most=CELL_PX)
    return part


def _gap(part: Image, text: str) -> None:
    part[:CELL_PX] = _rounded(np.full((CELL_PX, CELL_PX, 3), SUNKEN, np.uint8), 10, SURFACE)
    wide = min(CELL_PX - 12, _width(text, 15))
    _write(part, text, ((CELL_PX - wide) // 2, CELL_PX // 2 + 5), 15, QUIET, most=CELL_PX - 12)


def _bar(part: Image, top: int, cell: Cell) -> None:
    """Draw how high a score is, and a tick where it would begin to count."""
    share, tick = (min(1.0, max(0.0, value or 0.0)) for value in (cell.score, cell.threshold))
    _chip(part, (0, top, CELL_PX, 6), SUNKEN)
    if share > 0:
        _chip(part, (0, top, max(6, round(CELL_PX * share)), 6), TONES[cell.mark])
    at = min(CELL_PX - 2, round(CELL_PX * tick))
    part[top - 3 : top + 9, at : at + 2] = TEXT


# --- Drawing --------------------------------------------------------------------------------------


def _blank(height: int, colour: Colour = GROUND) -> Image:
    return np.full((height, WIDTH_PX, 3), colour, np.uint8)


def _card(strip: Image, *, is_top: bool = False, is_bottom: bool = False) -> Image:
    """Return a strip with the edges of a card around its middle."""
    strip[:, : MARGIN_PX - 1] = GROUND
    strip[:, WIDTH_PX - MARGIN_PX + 1 :] = GROUND
    strip[:, MARGIN_PX - 1] = strip[:, WIDTH_PX - MARGIN_PX] = LINE
    if is_top:
        strip[0, MARGIN_PX - 1 : WIDTH_PX - MARGIN_PX + 1] = LINE
    if is_bottom:
        strip[-1, MARGIN_PX - 1 : WIDTH_PX - MARGIN_PX + 1] = LINE
    return strip


def _rounded(image: Image, radius: int, ground: Colour) -> Image:
    """Return an image with round corners on a plain ground."""
    cover = _cover(image.shape[0], image.shape[1], radius)[:, :, None]
    return np.asarray(image * cover + np.array(ground) * (1 - cover), np.uint8)


def _chip(image: Image, place: tuple[int, int, int, int], colour: Colour) -> None:
    """Draw a bar with round ends: left, top, width, height."""
    left, top, width, height = place
    cover = _cover(height, width, height // 2)[:, :, None]
    under = image[top : top + height, left : left + width]
    under[:] = np.asarray(np.array(colour) * cover + under * (1 - cover), np.uint8)


@cache
def _cover(height: int, width: int, radius: int) -> Any:
    """Return how much of each pixel a rectangle with round corners covers."""
    finer = 4
    radius = min(radius, height // 2, width // 2)
    mask = np.zeros((height * finer, width * finer), np.uint8)
    r = radius * finer
    cv2.rectangle(mask, (r, 0), (width * finer - r - 1, height * finer), 255, cv2.FILLED)
    cv2.rectangle(mask, (0, r), (width * finer, height * finer - r - 1), 255, cv2.FILLED)
    for x in (r, width * finer - r - 1):
        for y in (r, height * finer - r - 1):
            cv2.circle(mask, (x, y), r, 255, cv2.FILLED)
    return cv2.resize(mask, (width, height), interpolation=cv2.INTER_AREA) / 255.0


def _write(
    image: Image,
    text: str,
    place: tuple[int, int],
    size: int,
    colour: Colour,
    *,
    weight: int = 400,
    most: int | None = None,
) -> None:
    """Write one line, its base at `place`; what is wider than `most` pixels is cut off."""
    if most is not None:
        text = _fitting(text, lambda one: _width(one, size, weight) <= most)
    if text:
        cv2.putText(image, text, place, colour, _font(), size, weight)


def _fitting(text: str, fits: Callable[[str], bool]) -> str:
    if fits(text):
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(f"{text[:middle]}…") else (low, middle - 1)
    return f"{text[:low]}…"


def _width(text: str, size: int, weight: int = 400) -> int:
    _, _, width, _ = cv2.getTextSize((WIDTH_PX, 100), text, (0, 0), _font(), size, weight)
    return int(width)


def _font() -> Any:
    """Return the font that OpenCV carries: it has the letters of most scripts."""
    # Made anew: it is not said that threads may share one.
    return cv2.FontFace("sans")

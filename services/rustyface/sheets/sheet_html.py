"""A contact sheet as one HTML file that loads nothing: its pictures are in it."""

import base64
from collections.abc import Iterator, Sequence
from html import escape
from typing import Final

import cv2
import numpy as np

from services.rustyface.photos.images import Image
from services.rustyface.sheets.sheet_parts import Boxed, Cell, Group, Page

# Side in pixels and quality of what stands in a cell; the first one that fits is taken.
THUMBNAILS: Final = ((208, 86), (160, 80), (112, 74), (72, 66), (48, 55))
PHOTOS: Final = ((1_400, 88), (1_000, 82), (700, 76), (420, 68))
# The photo may take this share of what the pictures have.
PHOTO_SHARE: Final = 0.5
# What a cell has beside its picture, mostly.
CELL_TEXT_BYTES: Final = 1_200


def drawn(page: Page, max_bytes: int) -> bytes | None:
    """Return a page as HTML in UTF-8; None if it does not fit, pictures and all."""
    pictures = sum(
        [group.picture is not None for group in page.groups]
        + [cell.picture is not None for group in page.groups for cell in group.cells]
    )
    texts = len(page.groups) + sum(len(group.cells) for group in page.groups)
    room = max(0, max_bytes - len(_STYLE) - 4_096 - texts * CELL_TEXT_BYTES)
    photo_room = room * PHOTO_SHARE if page.photo is not None else 0
    each = (room - photo_room) / max(1, pictures)
    try:
        body = "".join(_document(page, photo_room, each)).encode()
    except _NoRoomError:
        return None
    return body if len(body) <= max_bytes else None


class _NoRoomError(Exception):
    """A picture has no room even at its smallest."""


def _document(page: Page, photo_room: float, cell_room: float) -> Iterator[str]:
    yield (
        f'<!doctype html>\n<html lang="{page.language}">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(page.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(page.title)}</h1><p>{escape(page.about)}</p></header>\n<main>\n"
    )
    if page.photo is not None:
        yield _photo(page.photo, page.boxes, photo_room)
    if not page.groups:
        yield f'<p class="empty">{escape(page.empty)}</p>\n' if page.empty else ""
    for group in page.groups:
        yield from _group(group, cell_room)
    yield "</main>\n</body>\n</html>\n"


def _photo(photo: Image, boxes: Sequence[Boxed], room: float) -> str:
    source = _source(photo, PHOTOS, room)
    height, width = photo.shape[:2]
    drawn_boxes = "".join(_box(one, max(width, height)) for one in boxes)
    return (
        f'<figure style="aspect-ratio:{width}/{height};max-width:min(100%,calc(70vh*{width}/'
        f'{height}))"><img src="{source}" alt=""><svg viewBox="0 0 {width} {height}" '
        f'aria-hidden="true">{drawn_boxes}</svg></figure>\n'
    )


def _box(one: Boxed, longer: int) -> str:
    """Return a face's frame with its number; sizes follow the photo's."""
    left, top, width, height = one.box
    unit = longer / 100
    side = 2.6 * unit + 0.9 * unit * (len(str(one.number)) - 1)
    frame = (
        f'x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}" '
        f'rx="{unit * 0.7:.1f}"'
    )
    # White around it, so that it is seen on a ground of its own colour, too.
    return (
        f'<g class="{one.mark}"><rect class="halo" {frame} stroke-width="{unit * 0.7:.1f}"/>'
        f'<rect class="frame" {frame} stroke-width="{unit * 0.35:.1f}"/>'
        f'<rect class="tag" x="{left:.1f}" y="{top:.1f}" width="{side:.1f}" '
        f'height="{2.6 * unit:.1f}" rx="{unit * 0.7:.1f}"/>'
        f'<text x="{left + side / 2:.1f}" y="{top + 1.98 * unit:.1f}" '
        f'font-size="{1.9 * unit:.1f}">{one.number}</text></g>'
    )


def _group(group: Group, room: float) -> Iterator[str]:
    number = "" if group.number is None else f'<b class="number">{group.number}</b>'
    picture = ""
    if group.picture is not None:
        source = _source(group.picture, THUMBNAILS, room)
        picture = f'<img class="query" src="{source}" alt="">'
    mark = f" {group.mark}" if group.mark else ""
    yield (
        f'<section class="group{mark}"><div class="head">{picture}<div><h2>{number}'
        f"{escape(group.title)}</h2><p>{escape(group.about)}</p></div></div>\n"
    )
    if group.cells:
        yield '<ul class="cells">\n'
        for cell in group.cells:
            yield _cell(cell, room)
        yield "</ul>"
    else:
        yield f'<p class="empty">{escape(group.empty)}</p>'
    yield "</section>\n"


def _cell(cell: Cell, room: float) -> str:
    if cell.picture is None:
        shown = f'<div class="gap">{escape(cell.gap)}</div>'
    else:
        shown = f'<img src="{_source(cell.picture, THUMBNAILS, room)}" alt="">'
    lines = "".join(f"<p>{escape(line)}</p>" for line in cell.lines)
    score = ""
    if cell.score is not None:
        # Who is no more like them than a stranger has no bar at all.
        share = 100 * min(1.0, max(0.0, cell.score))
        at = 100 * min(1.0, max(0.0, cell.threshold or 0.0))
        score = (
            f'<div class="bar"><i style="width:{share:.0f}%"></i>'
            f'<u style="left:{at:.0f}%"></u></div>'
            f'<p class="score"><b>{escape(cell.score_text)}</b> '
            f'<span class="chip">{escape(cell.mark_text)}</span></p>'
        )
    mark = f' class="{cell.mark}"' if cell.mark else ""
    return f"<li{mark}>{shown}<h3>{escape(cell.title)}</h3>{score}{lines}</li>\n"


def _source(image: Image, steps: Sequence[tuple[int, int]], room: float) -> str:
    """Return an image as a `data:` URL of at most `room` bytes.

    Raises:
        _NoRoomError: Even at the last step it has more.
    """
    height, width = image.shape[:2]
    for side, quality in steps:
        shrink = min(1.0, side / max(height, width))
        size = max(1, round(width * shrink)), max(1, round(height * shrink))
        small = image if shrink == 1 else cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        done, coded = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, quality])
        url = f"data:image/jpeg;base64,{base64.b64encode(np.asarray(coded).tobytes()).decode()}"
        if done and len(url) <= room:
            return url
    raise _NoRoomError


_STYLE: Final = """
:root {
  color-scheme: light dark;
  --ground: light-dark(#f5f6f8, #0e1115);
  --surface: light-dark(#ffffff, #161a20);
  --sunken: light-dark(#eef0f3, #0a0d11);
  --line: light-dark(#e1e4e9, #272d36);
  --text: light-dark(#1a1f28, #e5e9ef);
  --quiet: light-dark(#596271, #98a3b3);
  --green: light-dark(#14703d, #6bd596);
  --green-ground: light-dark(#e2f4e9, #14291d);
  --red: light-dark(#b3261e, #ff9b91);
  --red-ground: light-dark(#fdeaea, #361a1b);
  --tone: var(--quiet);
  --tone-ground: var(--sunken);
}
.known { --tone: var(--green); --tone-ground: var(--green-ground); }
.unknown { --tone: var(--quiet); --tone-ground: var(--sunken); }
.rejected { --tone: var(--red); --tone-ground: var(--red-ground); }
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 32px clamp(16px, 4vw, 48px) 64px; max-width: 1320px;
  background: var(--ground); color: var(--text);
  font: 14px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans",
    sans-serif;
}
h1, h2, h3, p, ul, figure { margin: 0; padding: 0; }
h1 { font-size: 24px; font-weight: 650; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 17px; font-weight: 620; overflow-wrap: anywhere; }
h3 {
  display: -webkit-box; overflow: hidden; margin-top: 8px; font-size: 13px; font-weight: 560;
  overflow-wrap: anywhere; -webkit-box-orient: vertical; -webkit-line-clamp: 2;
}
p { color: var(--quiet); font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
header { margin-bottom: 24px; }
figure {
  position: relative; margin: 0 auto 24px; overflow: hidden; border-radius: 12px;
  background: var(--sunken);
}
figure img, figure svg { position: absolute; inset: 0; width: 100%; height: 100%; }
figure .halo, figure .frame { fill: none; stroke: #fff; }
figure .frame { stroke: var(--mark); }
figure .tag { fill: var(--mark); }
figure text { fill: #fff; font-weight: 700; text-anchor: middle; font-family: inherit; }
figure g { --mark: #e8a33d; }
figure g.known { --mark: #1f9d57; }
figure g.rejected { --mark: #d9453a; }
.group {
  margin-bottom: 16px; padding: 16px; background: var(--surface); border: 1px solid var(--line);
  border-radius: 12px;
}
.head { display: flex; gap: 14px; align-items: center; margin-bottom: 14px; }
.head .query { width: 64px; height: 64px; border-radius: 50%; border: 3px solid var(--tone); }
.number {
  display: inline-block; min-width: 1.6em; margin-right: 8px; padding: 0 0.4em; text-align: center;
  border-radius: 6px; font-size: 0.85em; background: var(--tone-ground); color: var(--tone);
}
.cells {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(136px, 1fr)); gap: 18px 14px;
  list-style: none;
}
.cells li { min-width: 0; break-inside: avoid; font-size: 12px; }
.cells img, .gap { display: block; width: 100%; aspect-ratio: 1; border-radius: 8px; }
.cells img { object-fit: cover; background: var(--sunken); }
.gap {
  display: grid; place-items: center; padding: 8px; text-align: center; color: var(--quiet);
  background: var(--sunken); border: 1px dashed var(--line);
}
.bar {
  position: relative; height: 5px; margin: 7px 0 5px; border-radius: 3px;
  background: var(--sunken);
}
.bar i { display: block; height: 100%; border-radius: 3px; background: var(--tone); }
.bar u { position: absolute; top: -3px; bottom: -3px; width: 2px; background: var(--text); }
.score { display: flex; justify-content: space-between; align-items: center; gap: 6px; }
.score b { color: var(--text); font-size: 13px; }
.chip {
  padding: 1px 8px; border-radius: 99px; color: var(--tone); background: var(--tone-ground);
  font-weight: 560;
}
.empty { padding: 8px 0; }
@media print {
  :root { color-scheme: only light; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { padding: 0; max-width: none; background: none; font-size: 11px; }
  .group { border-radius: 0; border-width: 1px 0 0; padding: 10px 0; }
  .head { break-after: avoid; }
  .cells { grid-template-columns: repeat(6, 1fr); gap: 12px 10px; }
  figure { break-inside: avoid; }
}
@page { margin: 14mm; }
"""

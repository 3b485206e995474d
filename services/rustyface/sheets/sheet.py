"""Contact sheets: what a dataset has, or what a search finds, for people who would rather look.

What is on a sheet is gathered here; `sheet_html` and `sheet_png` draw it.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from typing import Any, Final, Protocol

import cv2
import numpy as np

from bus import messages as m
from bus.artefacts import Artefacts
from bus.errors import BusError, InvalidRequest, NotFound, Overloaded, TooLarge
from services.rustyface.faces import first_known
from services.rustyface.photos import images
from services.rustyface.photos.images import Image
from services.rustyface.sheets import sheet_html, sheet_png
from services.rustyface.sheets.sheet_parts import (
    SIDE_PX,
    Boxed,
    Cell,
    Group,
    Mark,
    Page,
    clipped,
    words_in,
)

Detect = Callable[[m.DetectFaces], Awaitable[m.DetectedFaces]]
Search = Callable[[m.SearchFaces], Awaitable[m.FaceMatches]]

# With an image: matches for each face, whatever `limit` says.
MATCHES_MAX: Final = 6
# Pictures of one sheet that are fetched and decoded, at some 50 ms each.
PICTURES_MAX: Final = 240
# A picture in memory may have 150 MB and more, and a sheet of a search holds one until it is drawn:
# so many sheets are drawn at a time, so many pictures decoded for them, and so many sheets wait.
SHEETS_AT_ONCE: Final = 2
PICTURES_AT_ONCE: Final = 2
WAITING_MAX: Final = 8
# Around a face, so that hair and chin are on it.
AROUND: Final = 1.9
PHOTO_SIDE_PX: Final = 1_400
# What an answer has beside the sheet.
BESIDE_BYTES: Final = 1_024


class Entries(Protocol):
    """What a sheet asks of the galleries."""

    async def entries(
        self,
        gallery: str,
        *,
        limit: int,
        after: str | None = None,
        subject: str | None = None,
        entry: str | None = None,
    ) -> tuple[list[m.EntryInfo], str | None, int]:
        """Return entries, where the next ones begin, and how many there are."""
        ...


class Sheets:
    """Draws contact sheets.

    Args:
        galleries: Where the entries are.
        store: Where the images are that datasets keep.
        detect: Finds the faces of an image.
        search: Finds who they are.
        max_bytes: How large an answer may be.
        max_pixels: How many pixels a picture may have.
    """

    def __init__(
        self,
        galleries: Entries,
        store: Artefacts,
        detect: Detect,
        search: Search,
        *,
        max_bytes: int,
        max_pixels: int = images.MAX_PIXELS,
    ) -> None:
        self._galleries = galleries
        self._store = store
        self._detect = detect
        self._search = search
        self._max_bytes = max_bytes - BESIDE_BYTES
        self._max_pixels = max_pixels
        self._places = asyncio.Semaphore(SHEETS_AT_ONCE)
        self._turn = asyncio.Semaphore(PICTURES_AT_ONCE)
        self._under_way = 0

    async def answer(self, request: m.DrawSheet) -> m.Sheet:
        """Return a sheet of a search if there is an image, of a dataset otherwise.

        What does not fit gets smaller pictures, and then fewer entries: `next` goes on. Of a
        search, fewer matches for each face.

        Raises:
            InvalidRequest: Neither a dataset nor an image is given.
            NotFound: There is no such dataset, or no such person in it.
            TooLarge: Even the smallest sheet of a search does not fit into an answer.
            Overloaded: Too many sheets wait already.
            BusError: As a search.
        """
        of_search = request.image_base64 is not None or request.image is not None
        if not of_search and request.dataset is None:
            raise InvalidRequest("a sheet needs the field dataset, or an image", field="dataset")
        async with self._place():
            if of_search:
                return await self._of_search(request)
            return await self._of_dataset(request, request.dataset or "")

    @contextlib.asynccontextmanager
    async def _place(self) -> AsyncGenerator[None]:
        """Wait for one's turn, and have it while inside.

        Raises:
            Overloaded: Too many wait already.
        """
        if self._under_way >= SHEETS_AT_ONCE + WAITING_MAX:
            raise Overloaded(
                f"{self._under_way} sheets are drawn or wait for it already; {SHEETS_AT_ONCE} are "
                f"drawn at a time, and {WAITING_MAX} may wait",
                retry_after_s=2,
            )
        self._under_way += 1
        try:
            async with self._places:
                yield
        finally:
            self._under_way -= 1

    # --- Of a dataset -----------------------------------------------------------------------------

    async def _of_dataset(self, request: m.DrawSheet, dataset: str) -> m.Sheet:
        found, following, total = await self._galleries.entries(
            dataset, limit=request.limit, after=request.after, subject=request.subject
        )
        if request.subject is not None and total == 0:
            raise NotFound(
                f"dataset {dataset!r} has nobody called {request.subject[:100]!r}", field="subject"
            )
        pictures = await self._pictures(found)
        while True:
            page = _page_of(request, dataset, found, pictures, total)
            body = await self._drawn(request, page)
            if body is not None:
                return _sheet(request, body, len(found), following)
            if len(found) <= 1:
                raise _too_large(self._max_bytes)
            found = found[: len(found) // 2]
            following = found[-1].id

    async def _pictures(self, entries: Iterable[m.EntryInfo]) -> dict[str, Image]:
        """Return the faces of kept images by digest; what cannot be had is left out."""
        digests = list(dict.fromkeys(one.image for one in entries if one.image is not None))
        faces = await asyncio.gather(*(self._face_of(one) for one in digests[:PICTURES_MAX]))
        pairs = zip(digests, faces, strict=False)
        return {digest: face for digest, face in pairs if face is not None}

    async def _face_of(self, digest: str) -> Image | None:
        """Return the largest face of a kept image, or all of it where none is found."""
        async with self._turn:
            try:
                data = b"".join([block async for block in self._store.read(digest)])
                box = None
                with contextlib.suppress(BusError):
                    found = await self._detect(m.DetectFaces(image=data, faces_max=1))
                    box = found.faces[0].box if found.faces else None
                return await asyncio.to_thread(_decoded_face, data, box, self._max_pixels)
            except BusError:
                # A sheet with a gap says more than none: its cell shows that the picture is gone.
                return None

    # --- Of a search ------------------------------------------------------------------------------

    async def _of_search(self, request: m.DrawSheet) -> m.Sheet:
        data = request.image
        if data is None:
            data = await asyncio.to_thread(images.from_base64, request.image_base64 or "")
        found = await self._search(
            m.SearchFaces(
                dataset=request.dataset,
                image=data,
                top_k=min(request.limit, MATCHES_MAX),
                group_by="subject",
                every_face=True,
            )
        )
        photo = await asyncio.to_thread(images.decode, data, max_pixels=self._max_pixels)
        matches = [match for face in found.faces for match in face.matches or []]
        if not found.faces:
            # An embedder that takes whole pictures.
            matches = found.results
        entries = await self._entries(found.dataset, matches)
        pictures = await self._pictures(entries.values())
        by_entry = {
            name: pictures[one.image] for name, one in entries.items() if one.image in pictures
        }
        for matches_max in (MATCHES_MAX, 3, 1):
            page = await asyncio.to_thread(
                _page_of_search, request, found, photo, by_entry, matches_max
            )
            body = await self._drawn(request, page)
            if body is not None:
                shown = sum(len(group.cells) for group in page.groups)
                return _sheet(request, body, shown, None)
        raise _too_large(self._max_bytes)

    async def _entries(
        self, dataset: str, matches: Sequence[m.FaceMatch]
    ) -> dict[str, m.EntryInfo]:
        """Return the entries that were found, as far as they are still there."""
        entries = {}
        for name in dict.fromkeys(match.id for match in matches):
            found, _, _ = await self._galleries.entries(dataset, limit=1, entry=name)
            entries.update({one.id: one for one in found})
        return entries

    async def _drawn(self, request: m.DrawSheet, page: Page) -> bytes | None:
        """Return the sheet as a file; None if it does not fit into an answer."""
        draw = sheet_html.drawn if request.format == "html" else sheet_png.drawn
        return await asyncio.to_thread(draw, page, self._max_bytes)


def _sheet(request: m.DrawSheet, body: bytes, shown: int, following: str | None) -> m.Sheet:
    kind = "text/html; charset=utf-8" if request.format == "html" else "image/png"
    return m.Sheet(content_type=kind, body=body, shown=shown, next=following)


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(
        f"the sheet does not fit into the {max_bytes:,} bytes of an answer (the broker's "
        "max_payload); ask for fewer entries, or for a smaller picture",
        field="limit",
    )


# --- What is on it --------------------------------------------------------------------------------


def _page_of(
    request: m.DrawSheet,
    dataset: str,
    entries: Sequence[m.EntryInfo],
    pictures: dict[str, Image],
    total: int,
) -> Page:
    """Return a dataset's entries by person: by name, and those of nobody at the end."""
    say = words_in(request.language)
    groups: dict[str | None, list[Cell]] = {}
    for one in sorted(entries, key=lambda one: (one.subject is None, one.subject or "")):
        cell = Cell(
            title=clipped(one.id),
            lines=[say.moment(one.last_seen), *_quality(one, say)],
            picture=pictures.get(one.image or ""),
            gap=say("gone" if one.image else "not_kept"),
        )
        groups.setdefault(one.subject, []).append(cell)
    return Page(
        language=request.language,
        title=say("dataset", name=clipped(dataset)),
        about=say("shown", shown=len(entries), total=total),
        empty=say("empty"),
        groups=[
            Group(
                title=say("nobody") if name is None else clipped(name),
                about=say.entries(len(cells)),
                cells=cells,
            )
            for name, cells in groups.items()
        ],
    )


def _quality(one: m.EntryInfo, say: Any) -> list[str]:
    size = one.quality.get("size_px")
    return [] if size is None else [say("size", px=round(size))]


def _page_of_search(
    request: m.DrawSheet,
    found: m.FaceMatches,
    photo: Image,
    pictures: dict[str, Image],
    matches_max: int,
) -> Page:
    """Return a photo with its faces numbered, and below it the best that was found for each."""
    say = words_in(request.language)
    groups, boxes = [], []
    for number, face in enumerate(found.faces, 1):
        matches = face.matches or []
        mark, name = _named(matches, say)
        boxes.append(Boxed(number=number, box=face.box, mark=mark))
        groups.append(
            Group(
                number=number,
                title=name,
                about=say("face", score=say.number(face.score), px=round(min(face.box[2:]))),
                mark=mark,
                picture=_face(photo, face.box),
                cells=[
                    _match(one, found.threshold, pictures, say) for one in matches[:matches_max]
                ],
                empty=say("no_match"),
            )
        )
    if not found.faces:
        mark, name = _named(found.results, say)
        cells = [_match(one, found.threshold, pictures, say) for one in found.results[:matches_max]]
        groups = [Group(title=name, about="", mark=mark, cells=cells, empty=say("no_match"))]
    height, width = photo.shape[:2]
    shrink = min(1.0, PHOTO_SIDE_PX / max(height, width))
    size = max(1, round(width * shrink)), max(1, round(height * shrink))
    return Page(
        language=request.language,
        title=say("search", name=clipped(found.dataset)),
        about=say(
            "threshold",
            threshold=say.number(found.threshold),
            faces=say.faces(len(found.faces)),
            searched=say.entries(found.searched or 0),
        ),
        empty="",
        groups=groups,
        photo=np.asarray(cv2.resize(photo, size, interpolation=cv2.INTER_AREA), np.uint8),
        boxes=[Boxed(one.number, [v * shrink for v in one.box], one.mark) for one in boxes],
    )


def _named(matches: Sequence[m.FaceMatch], say: Any) -> tuple[Mark, str]:
    """Return how a face counts, and what it is called: by its best match that counts."""
    best = first_known(matches)
    if best is not None:
        return "known", clipped(best.subject or best.id)
    if any(one.rejected for one in matches):
        return "rejected", say("stranger")
    return "unknown", say("stranger")


def _match(one: m.FaceMatch, threshold: float, pictures: dict[str, Image], say: Any) -> Cell:
    mark: Mark = "rejected" if one.rejected else "known" if one.known else "unknown"
    lines = [] if one.subject is None else [clipped(one.id)]
    if one.expected_false is not None:
        lines.append(say("expected_false", count=say.number(one.expected_false)))
    return Cell(
        title=clipped(one.subject or one.id),
        lines=lines,
        picture=pictures.get(one.id),
        gap=say("not_kept"),
        mark=mark,
        mark_text=say(mark),
        score=one.score,
        score_text=say.number(one.score),
        threshold=threshold,
    )


# --- Pictures -------------------------------------------------------------------------------------


def _decoded_face(data: bytes, box: Sequence[float] | None, max_pixels: int) -> Image:
    image = images.decode(data, max_pixels=max_pixels)
    height, width = image.shape[:2]
    return _face(image, box or (0, 0, width, height))


def _face(image: Image, box: Sequence[float]) -> Image:
    """Return a square around a face, moved inside the picture where it would reach beyond."""
    height, width = image.shape[:2]
    left, top, across, down = box
    side = max(1, min(round(AROUND * max(across, down)), height, width))
    x = min(max(round(left + (across - side) / 2), 0), width - side)
    y = min(max(round(top + (down - side) / 2), 0), height - side)
    way = cv2.INTER_AREA if side > SIDE_PX else cv2.INTER_CUBIC
    square = image[y : y + side, x : x + side]
    return np.asarray(cv2.resize(square, (SIDE_PX, SIDE_PX), interpolation=way), np.uint8)

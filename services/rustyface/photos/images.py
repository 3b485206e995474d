"""Bytes into pixels: the guards before decoding, and which way is up; and pictures to be kept."""

import base64
import binascii
import contextlib
import re
from struct import pack
from typing import Any, Final
from zlib import crc32

import cv2
import numpy as np
import numpy.typing as npt

from bus.errors import InvalidRequest, TooLarge, Unprocessable
from services.rustyface.photos import exif, formats
from services.rustyface.photos.formats import ALLOWED, Header

Image = npt.NDArray[np.uint8]
"""Pixels of shape ``[height, width, 3]``, blue first, upright."""

MAX_BYTES: Final = 64 * 1024 * 1024
"""What a request may bring unless `BKG_BODY_MAX_BYTES` says otherwise; a PNG of 24 megapixels has
some 40 MB."""
KEPT_MAX_BYTES: Final = 16 * 1024 * 1024
"""From here on a picture that is written anew to be kept becomes a JPEG."""
MAX_PIXELS: Final = 50_000_000
"""What today's cameras give: 150 MB once decoded, and up to 500 MB on the way there (10 bytes for
each pixel, measured)."""
MAX_SIDE: Final = 32_767
"""OpenCV's warps count pixels in 16 bits."""


def decode(
    data: bytes | bytearray | memoryview,
    *,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
    field: str | None = None,
) -> Image:
    """Return the picture in `data`, upright, as 8-bit BGR.

    The size is read from the file's header, so that a small file that unfolds into a huge
    picture is refused before a decoder sees it. The orientation that a camera noted is applied.
    Grey becomes three equal channels, 16 bits become 8, what is transparent is white, as viewers
    show it (what a file hides below it is nobody's face), and of an animation the first frame is
    taken.

    Args:
        data: The file, of a format named in `ALLOWED`.
        max_bytes: Largest file.
        max_pixels: Largest width times height; half of it for kinds that take twice the memory:
            GIF, and transparency in 16 bits.
        field: The request's field that `data` came from, for the error.

    Raises:
        InvalidRequest: There are no bytes.
        TooLarge: More bytes or pixels than allowed.
        Unprocessable: Another kind of file, or one that is cut off or damaged.
    """
    if not data:
        raise InvalidRequest("the image has no bytes", field=field)
    if len(data) > max_bytes:
        raise TooLarge(f"the image has {len(data)} bytes, {max_bytes} are allowed", field=field)
    held = bytes(data)
    kind, header = _checked(held, max_pixels, field)
    width, height = header.width, header.height
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    if header.alpha:
        flags = cv2.IMREAD_UNCHANGED
    try:
        pixels = cv2.imdecode(np.frombuffer(held, np.uint8), flags)
    except cv2.error:
        pixels = None
    # A file whose header we read otherwise than the decoder did has slipped past the limits.
    if pixels is None or pixels.shape[:2] not in ((height, width), (width, height)):
        raise Unprocessable(
            f"the {kind} image of {width} x {height} pixels cannot be decoded: it is cut off, "
            "damaged, or of a rare kind (save it as an ordinary JPEG or PNG)",
            field=field,
        )
    return _turned(_bgr(pixels, premultiplied=header.premultiplied), header.orientation)


def without_metadata(
    data: bytes, *, max_bytes: int = KEPT_MAX_BYTES, max_pixels: int = MAX_PIXELS
) -> bytes:
    """Return a file with the same picture, and nothing else: no place, no time, no camera, no text.

    Only what a decoder needs for the pixels is taken over, so what nobody has thought of stays
    behind as well: previews, further pictures, films behind the end. JPEG, PNG and WebP keep
    their coded pixels and a note which way is up; the others, animations, and what is so damaged
    that a decoder would read no more of it then, are written anew as PNG, upright and without loss,
    or as JPEG of quality 95 should that be over `max_bytes`.

    Args:
        data: A file that `decode` can read.
        max_bytes: How long the result may be, if it is written anew.
        max_pixels: As for `decode`.

    Raises:
        Unprocessable: It is none.
        TooLarge: It has more pixels than allowed.
    """
    kind, header = _checked(data, max_pixels, None)
    if not header.frames and kind in _STRIPPED:
        made = _STRIPPED[kind](data, header)
        # A chunk may say that it is shorter than what a decoder takes of it.
        with contextlib.suppress(Unprocessable):
            decode(made, max_bytes=len(made), max_pixels=max_pixels)
            return made
    image = decode(data, max_bytes=len(data), max_pixels=max_pixels)
    made = _encoded(".png", image)
    return made if len(made) <= max_bytes else _encoded(".jpg", image)


def from_base64(
    text: str, *, max_bytes: int = MAX_BYTES, field: str | None = "image_base64"
) -> bytes:
    """Return the bytes in `text`: base64, or a ``data:`` URL with base64 in it.

    Line breaks and blanks are passed over, missing ``=`` at the end are made good.

    Raises:
        InvalidRequest: It is not base64; says at which character.
        TooLarge: It would give more than `max_bytes`.
    """
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise InvalidRequest(
                "the data: URL has no ';base64,' before its bytes, other encodings are not read",
                field=field,
            )
    text = "".join(text.split()).rstrip("=")
    if len(text) * 3 // 4 > max_bytes:
        raise TooLarge(
            f"the image has {len(text) * 3 // 4} bytes, {max_bytes} are allowed", field=field
        )
    if alien := _NOT_BASE64.search(text):
        raise InvalidRequest(
            f"the image is not base64: character {alien.start()} is {alien.group()!r}, "
            "A-Z a-z 0-9 + / are allowed",
            field=field,
        )
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except binascii.Error:
        raise InvalidRequest(
            f"the image is not base64: {len(text)} characters are one too many or too few",
            field=field,
        ) from None


_NOT_BASE64: Final = re.compile(r"[^A-Za-z0-9+/]")
# Rows that are laid on white at a time: the wider numbers for it take little room.
_ROWS: Final = 256
# Behind the transposition that 5 to 8 begin with. OpenCV's flips: 0 upside down, 1 left to right,
# -1 both.
_FLIPS: Final = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}


def _checked(data: bytes, max_pixels: int, field: str | None) -> tuple[str, Header]:
    """Return what kind of file it is, and its header, if it may be decoded."""
    kind = formats.kind_of(data)
    if kind is None:
        raise Unprocessable(f"the image is {formats.what(data)}; {ALLOWED} is allowed", field=field)
    try:
        header = formats.header_of(kind, data)
    except ValueError:
        raise Unprocessable(f"the {kind} image is cut off or damaged", field=field) from None
    width, height = header.width, header.height
    if width < 1 or height < 1:
        raise Unprocessable(f"the {kind} image says it is {width} x {height} pixels", field=field)
    which = ""
    if header.heavy:
        max_pixels //= 2
        which = " of a kind that takes twice the memory"
    if width * height > max_pixels or max(width, height) > MAX_SIDE:
        raise TooLarge(
            f"the image is {width} x {height} pixels{which}, {max_pixels} in all and {MAX_SIDE} "
            "to a side are allowed",
            field=field,
        )
    return kind, header


def _bgr(pixels: npt.NDArray[Any], *, premultiplied: bool) -> Image:
    """Return what the decoder gave as 8-bit BGR, what is transparent on white."""
    if pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8:
        return np.asarray(pixels, np.uint8)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[:, :, None], 3, axis=2)
    made = np.empty((*pixels.shape[:2], 3), np.uint8)
    shift = 8 if pixels.dtype == np.uint16 else 0
    for top in range(0, len(pixels), _ROWS):
        rows = pixels[top : top + _ROWS].astype(np.uint16) >> shift
        colour, alpha = rows[:, :, :3], rows[:, :, 3:]
        if alpha.size:
            if not premultiplied:
                colour = (colour * alpha + 127) // 255
            colour = (colour + (255 - alpha)).clip(max=255)
        made[top : top + _ROWS] = colour
    return made


def _turned(pixels: Image, orientation: int) -> Image:
    """Return a picture upright, given how the camera was held."""
    if orientation >= 5:
        pixels = np.asarray(cv2.transpose(pixels), np.uint8)
    flip = _FLIPS.get(orientation)
    return pixels if flip is None else np.asarray(cv2.flip(pixels, flip), np.uint8)


def _encoded(extension: str, image: Image) -> bytes:
    done, data = cv2.imencode(extension, image)
    if not done:
        raise Unprocessable(f"the image cannot be written as {extension}")
    return bytes(data.tobytes())


# --- Without metadata -----------------------------------------------------------------------------

# All frame headers and tables, scans, and the marker by which Adobe says how colours are coded.
_JPEG_KEPT: Final = frozenset(bytes([k]) for k in (*range(0xC0, 0xD0), 0xDA, 0xDB, 0xDC, 0xDD))
_JPEG_ADOBE: Final = b"\xee"
_JFIF: Final = b"\xff\xe0" + pack(">H5sHBHHBB", 16, b"JFIF\0", 0x0101, 0, 1, 1, 0, 0)
_PNG_KEPT: Final = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
_WEBP_KEPT: Final = frozenset({b"ALPH", b"VP8 ", b"VP8L"})


def _stripped_jpeg(data: bytes, header: Header) -> bytes:
    made = [b"\xff\xd8"]
    parts = list(formats.jpeg_parts(data))
    if any(p.kind == formats.JPEG_APP0 and p.body.startswith(b"JFIF\0") for p in parts):
        made.append(_JFIF)
    if header.orientation != exif.UPRIGHT:
        note = exif.PREFIX + exif.note_of(header.orientation)
        made.append(b"\xff\xe1" + pack(">H", len(note) + 2) + note)
    for part in parts:
        if part.kind in _JPEG_KEPT:
            made.append(part.whole)
        elif part.kind == _JPEG_ADOBE and part.body.startswith(b"Adobe"):
            # It has 12 bytes; whatever stands behind them is something else.
            made.append(b"\xff\xee" + pack(">H", 14) + part.body[:12].ljust(12, b"\0"))
    return b"".join([*made, b"\xff\xd9"])


def _stripped_png(data: bytes, header: Header) -> bytes:
    made = [formats.PNG_BEGIN]
    for part in formats.png_parts(data):
        if part.kind in _PNG_KEPT:
            made.append(part.whole)
        if part.kind == b"IHDR" and header.orientation != exif.UPRIGHT:
            chunk = b"eXIf" + exif.note_of(header.orientation)
            made.append(pack(">I", len(chunk) - 4) + chunk + pack(">I", crc32(chunk)))
    return b"".join(made)


def _stripped_webp(data: bytes, header: Header) -> bytes:
    made = [part.whole for part in formats.webp_parts(data) if part.kind in _WEBP_KEPT]
    turned = header.orientation != exif.UPRIGHT
    first = next(formats.webp_parts(data))
    if first.kind == b"VP8X":
        flags = (formats.WEBP_ALPHA if header.alpha else 0) | (formats.WEBP_EXIF if turned else 0)
        made.insert(0, b"VP8X" + pack("<IB", 10, flags) + bytes(3) + first.body[4:10])
    if turned:
        note = exif.note_of(header.orientation)
        made.append(b"EXIF" + pack("<I", len(note)) + note)
    body = b"WEBP" + b"".join(made)
    return b"RIFF" + pack("<I", len(body)) + body


_STRIPPED: Final = {"JPEG": _stripped_jpeg, "PNG": _stripped_png, "WebP": _stripped_webp}

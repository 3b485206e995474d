"""Bytes into pixels: the guards before decoding, the formats, and which way is up."""

import base64
import binascii
import re
from collections.abc import Callable
from struct import error as StructError  # noqa: N812
from struct import unpack_from
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt

from bus.errors import InvalidRequest, TooLarge, Unprocessable

Image = npt.NDArray[np.uint8]
"""Pixels of shape ``[height, width, 3]``, blue first, upright."""

MAX_BYTES: Final = 16 * 1024 * 1024
MAX_PIXELS: Final = 50_000_000
"""What today's cameras give, and 150 MB once decoded."""
MAX_SIDE: Final = 32_767
"""OpenCV's warps count pixels in 16 bits."""

ALLOWED: Final = "JPEG, PNG, WebP, BMP, TIFF or GIF"


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
    Grey becomes three equal channels, 16 bits become 8, transparency is dropped (the colour
    below it counts), and of an animation the first frame is taken.

    Args:
        data: The file, of a format named in `ALLOWED`.
        max_bytes: Largest file.
        max_pixels: Largest width times height.
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
    name = _format(held)
    if name is None:
        raise Unprocessable(
            f"the image is {_what(held)}; {ALLOWED} is allowed",
            field=field,
        )
    try:
        width, height = _SIZES[name](held)
    except (StructError, LookupError, ValueError):
        raise Unprocessable(f"the {name} image is cut off or damaged", field=field) from None
    if width < 1 or height < 1:
        raise Unprocessable(f"the {name} image says it is {width} x {height} pixels", field=field)
    if width * height > max_pixels or max(width, height) > MAX_SIDE:
        raise TooLarge(
            f"the image is {width} x {height} pixels, {max_pixels} in all and {MAX_SIDE} "
            "to a side are allowed",
            field=field,
        )
    try:
        # COLOR, not UNCHANGED: only then does OpenCV apply the orientation.
        pixels = cv2.imdecode(np.frombuffer(held, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        pixels = None
    # A file whose header we read otherwise than the decoder did has slipped past the limits.
    if pixels is None or pixels.shape not in ((height, width, 3), (width, height, 3)):
        raise Unprocessable(
            f"the {name} image of {width} x {height} pixels cannot be decoded: it is cut off, "
            "damaged, or of a rare kind (save it as an ordinary JPEG or PNG)",
            field=field,
        )
    return np.asarray(pixels, np.uint8)


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

# In a JPEG's coded pixels 0xFF is followed by 0x00, or by D0 to D7 where it may be resumed.
_JPEG_MARKER: Final = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")
_JPEG_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


_PNG_CHUNKS_MAX: Final = 65_536
_TIFF_WIDTH, _TIFF_LENGTH, _TIFF_TILE_WIDTH, _TIFF_TILE_LENGTH = 256, 257, 322, 323
_TIFF_TILE_MAX: Final = 4_096


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Return width and height of a JPEG that is whole (ITU-T T.81, annex B).

    OpenCV 4 fills what is missing with grey and says nothing, so the walk goes on through all
    scans to the end-of-image marker. What cameras append after it does not matter.
    """
    size = None
    at = 2
    while found := _JPEG_MARKER.search(data, at):
        marker, at = found.group(1)[0], found.end()
        if marker == 0xD9:
            if size is None:
                break
            return size
        if marker in (0x01, 0xD8):
            continue
        if marker in _JPEG_FRAMES and size is None:
            height, width = unpack_from(">HH", data, at + 3)
            size = width, height
        (length,) = unpack_from(">H", data, at)
        at += length
    raise ValueError


def _png_size(data: bytes) -> tuple[int, int]:
    """Return width and height of a PNG whose chunks all lie within the file (PNG, section 5.3).

    OpenCV 5 takes memory for a chunk before it looks whether the file has as many bytes: with
    206 bytes one could make it fill 4 GB in 11 seconds.
    """
    if data[12:16] != b"IHDR":
        raise ValueError
    width, height = unpack_from(">II", data, 16)
    at = 8
    for _ in range(_PNG_CHUNKS_MAX):
        (length,) = unpack_from(">I", data, at)
        kind = data[at + 4 : at + 8]
        at += length + 12
        if at > len(data):
            raise ValueError
        if kind == b"IEND":
            return width, height
    raise ValueError


def _webp_size(data: bytes) -> tuple[int, int]:
    """Return the canvas of a WebP (RFC 9649): extended, lossless or lossy."""
    kind = data[12:16]
    if kind == b"VP8X":
        width, _, height, _ = unpack_from("<HBHB", data, 24)
        return width + (data[26] << 16) + 1, height + (data[29] << 16) + 1
    if kind == b"VP8L" and data[20] == 0x2F:
        (bits,) = unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise ValueError


def _bmp_size(data: bytes) -> tuple[int, int]:
    (header,) = unpack_from("<I", data, 14)
    # A negative height means that the rows stand from top to bottom.
    width, height = unpack_from("<HH" if header == 12 else "<ii", data, 18)
    return width, abs(height)


def _gif_size(data: bytes) -> tuple[int, int]:
    width, height = unpack_from("<HH", data, 6)
    return width, height


def _tiff_size(data: bytes) -> tuple[int, int]:
    """Return the size of a TIFF's first picture (TIFF 6.0, sections 8 and 15).

    A tile may be larger than the picture, and memory is taken for it: with 400 bytes, 400 MB.
    """
    order = "<" if data[:2] == b"II" else ">"
    (at,) = unpack_from(order + "I", data, 4)
    (count,) = unpack_from(order + "H", data, at)
    sides = {_TIFF_TILE_WIDTH: 0, _TIFF_TILE_LENGTH: 0}
    for entry in range(at + 2, at + 2 + 12 * count, 12):
        tag, kind = unpack_from(order + "HH", data, entry)
        if tag in (_TIFF_WIDTH, _TIFF_LENGTH, _TIFF_TILE_WIDTH, _TIFF_TILE_LENGTH):
            (sides[tag],) = unpack_from(order + ("H" if kind == 3 else "I"), data, entry + 8)
    if max(sides[_TIFF_TILE_WIDTH], sides[_TIFF_TILE_LENGTH]) > _TIFF_TILE_MAX:
        raise ValueError
    return sides[_TIFF_WIDTH], sides[_TIFF_LENGTH]


_SIZES: Final[dict[str, Callable[[bytes], tuple[int, int]]]] = {
    "JPEG": _jpeg_size,
    "PNG": _png_size,
    "WebP": _webp_size,
    "BMP": _bmp_size,
    "TIFF": _tiff_size,
    "GIF": _gif_size,
}

_SIGNATURES: Final = (
    ("JPEG", re.compile(rb"\xff\xd8\xff")),
    ("PNG", re.compile(rb"\x89PNG\r\n\x1a\n")),
    ("WebP", re.compile(rb"RIFF....WEBP", re.DOTALL)),
    ("BMP", re.compile(rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\x00\x00\x00", re.DOTALL)),
    ("TIFF", re.compile(rb"II\*\x00|MM\x00\*")),
    ("GIF", re.compile(rb"GIF8[79]a")),
)

_OTHERS: Final = (
    ("a HEIC picture", re.compile(rb"....ftyp(?:hei|hev|mif1|msf1)", re.DOTALL)),
    ("an AVIF picture", re.compile(rb"....ftypavi", re.DOTALL)),
    ("a film", re.compile(rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ", re.DOTALL)),
    ("a JPEG 2000 picture", re.compile(rb"\x00\x00\x00\x0cjP|\xff\x4f\xff\x51")),
    ("a BigTIFF picture", re.compile(rb"II\+\x00|MM\x00\+")),
    ("a PDF document", re.compile(rb"%PDF")),
    ("an archive", re.compile(rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf")),
    ("an SVG drawing or a web page", re.compile(rb"\s*<")),
    ("text", re.compile(rb"[\t\r\n\x20-\x7e]{1,64}\Z")),
)


def _format(data: bytes) -> str | None:
    return next((name for name, starts in _SIGNATURES if starts.match(data)), None)


def _what(data: bytes) -> str:
    """Say in words what kind of file was sent instead of a picture."""
    named = next((name for name, starts in _OTHERS if starts.match(data[:64])), None)
    return named or f"of no known kind (it begins with {data[:8].hex(' ')})"

"""Image files by their headers: what kind, how large, which way up; nothing is decoded here.

Each walker goes only as far as the bytes reach, and knows the tricks by which a small file makes a
decoder take much memory.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from struct import error as StructError  # noqa: N812
from struct import unpack_from
from typing import Final, NamedTuple

from services.rustyface.photos import exif

ALLOWED: Final = "JPEG, PNG, WebP, BMP, TIFF or GIF"


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file says of its picture before it is decoded.

    Attributes:
        width: In pixels, as stored.
        height: Likewise.
        orientation: How the stored picture has to be turned, as Exif counts it; `exif.UPRIGHT`
            for TIFF, where the decoder does it.
        alpha: Whether there may be transparency.
        premultiplied: Whether colours come out of the decoder multiplied by it already.
        deep: Whether a channel has 16 bits.
        frames: Whether there is more than one picture in it.
    """

    width: int
    height: int
    orientation: int = exif.UPRIGHT
    alpha: bool = False
    premultiplied: bool = False
    deep: bool = False
    frames: bool = False

    @property
    def heavy(self) -> bool:
        """Whether its decoder takes about twice the memory of the others for a pixel."""
        return self.alpha and (self.deep or self.frames)


class Part(NamedTuple):
    """A marker segment of a JPEG, or a chunk of a PNG or WebP; nothing of it is copied yet.

    Attributes:
        kind: The marker as one byte, or the chunk's four letters.
        data: The file that it stands in.
        begin: Where it begins there.
        body_begin: Where what it carries begins.
        body_end: Where that ends.
        end: Where the next one begins.
    """

    kind: bytes
    data: bytes
    begin: int
    body_begin: int
    body_end: int
    end: int

    @property
    def body(self) -> bytes:
        """What it carries; of a scan of a JPEG its header and its coded pixels."""
        return self.data[self.body_begin : self.body_end]

    @property
    def whole(self) -> bytes:
        """All of its bytes, as they stand in the file."""
        return self.data[self.begin : self.end]


def kind_of(data: bytes) -> str | None:
    """Return which of `ALLOWED` a file is, by its first bytes; None: none of them."""
    return next((name for name, starts in _SIGNATURES if starts.match(data)), None)


def header_of(kind: str, data: bytes) -> Header:
    """Read the header of a file of a kind.

    Raises:
        ValueError: It is cut off, damaged, or made to harm a decoder.
    """
    try:
        return _HEADERS[kind](data)
    except (StructError, LookupError) as error:
        raise ValueError(kind) from error


def what(data: bytes) -> str:
    """Say in words what kind of file was sent instead of a picture."""
    named = next((name for name, starts in _OTHERS if starts.match(data[:64])), None)
    return named or f"of no known kind (it begins with {data[:8].hex(' ')})"


# --- JPEG (ITU-T T.81, annex B) -------------------------------------------------------------------

# In coded pixels 0xFF is followed by 0x00, or by D0 to D7 where they may be resumed.
_JPEG_MARKER: Final = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")
_JPEG_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
JPEG_END: Final = b"\xd9"
JPEG_SCAN: Final = b"\xda"
JPEG_APP0: Final = b"\xe0"
JPEG_EXIF: Final = b"\xe1"
# Ordinary progressive files have about ten. Each one is a pass over the whole picture: thousands
# of empty ones keep a decoder busy for minutes.
_JPEG_SCANS_MAX: Final = 100


def jpeg_parts(data: bytes) -> Iterator[Part]:
    """Give a JPEG's segments up to and with its end; what cameras append does not matter.

    Raises:
        ValueError: There is no end, or a length leads out of the file.
    """
    at = 2
    while found := _JPEG_MARKER.search(data, at):
        begin, at = found.start(), found.end()
        kind = found.group(1)
        if kind == JPEG_END:
            yield Part(kind, data, begin, at, at, at)
            return
        if kind in (b"\x01", b"\xd8"):
            continue
        (length,) = unpack_from(">H", data, at)
        stop = at + length
        if kind == JPEG_SCAN:
            behind = _JPEG_MARKER.search(data, stop)
            stop = behind.start() if behind else len(data)
        yield Part(kind, data, begin, at + 2, stop, stop)
        at = stop
    raise ValueError


def _jpeg_header(data: bytes) -> Header:
    """Read a JPEG that is whole.

    OpenCV 4 fills what is missing with grey and says nothing, so the walk goes on through all
    scans to the end-of-image marker.
    """
    size, orientation, scans = None, None, 0
    for part in jpeg_parts(data):
        if part.kind[0] in _JPEG_FRAMES and size is None:
            size = unpack_from(">HH", part.body, 1)
        elif part.kind == JPEG_EXIF and orientation is None and part.body.startswith(exif.PREFIX):
            orientation = exif.orientation_of(part.body)
        elif part.kind == JPEG_SCAN:
            scans += 1
    if size is None or scans > _JPEG_SCANS_MAX:
        raise ValueError
    height, width = size
    return Header(width=width, height=height, orientation=orientation or exif.UPRIGHT)


# --- PNG (third edition, section 5) ---------------------------------------------------------------

PNG_BEGIN: Final = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNKS_MAX: Final = 65_536
_PNG_ALPHA: Final = 4


def png_parts(data: bytes) -> Iterator[Part]:
    """Give a PNG's chunks up to and with its end.

    OpenCV 5 takes memory for a chunk before it looks whether the file has as many bytes: with
    206 bytes one could make it fill 4 GB in 11 seconds.

    Raises:
        ValueError: They do not all lie within the file.
    """
    at = len(PNG_BEGIN)
    for _ in range(_PNG_CHUNKS_MAX):
        (length,) = unpack_from(">I", data, at)
        stop = at + length + 12
        if stop > len(data):
            break
        part = Part(data[at + 4 : at + 8], data, at, at + 8, stop - 4, stop)
        yield part
        at = stop
        if part.kind == b"IEND":
            return
    raise ValueError


def _png_header(data: bytes) -> Header:
    if data[12:16] != b"IHDR":
        raise ValueError
    width, height, depth, colour = unpack_from(">IIBB", data, 16)
    orientation, alpha, frames = exif.UPRIGHT, bool(colour & _PNG_ALPHA), False
    for part in png_parts(data):
        if part.kind == b"eXIf":
            orientation = exif.orientation_of(part.body)
        alpha |= part.kind == b"tRNS"
        frames |= part.kind == b"acTL"
    return Header(
        width=width,
        height=height,
        orientation=orientation,
        alpha=alpha,
        deep=depth == 16,
        frames=frames,
    )


# --- WebP (RFC 9649) ------------------------------------------------------------------------------

WEBP_HEAD_BYTES: Final = 12
WEBP_ALPHA, WEBP_EXIF, WEBP_ANIMATED = 0x10, 0x08, 0x02


def webp_parts(data: bytes) -> Iterator[Part]:
    """Give a WebP's chunks; one that is cut off as far as it is there."""
    at = WEBP_HEAD_BYTES
    while at + 8 <= len(data):
        (length,) = unpack_from("<I", data, at + 4)
        # A chunk of an odd length has a byte of padding behind it.
        stop = at + 8 + length + length % 2
        yield Part(data[at : at + 4], data, at, at + 8, at + 8 + length, stop)
        at = stop


def _webp_header(data: bytes) -> Header:
    """Read a WebP: extended, lossless or lossy."""
    parts = webp_parts(data)
    first = next(parts, None)
    if first is None:
        raise ValueError
    kind, body = first.kind, first.body
    if kind == b"VP8X":
        width, width_high, height, height_high = unpack_from("<HBHB", body, 4)
        noted = next((part.body for part in parts if part.kind == b"EXIF"), b"")
        return Header(
            width=width + (width_high << 16) + 1,
            height=height + (height_high << 16) + 1,
            orientation=exif.orientation_of(noted),
            alpha=bool(body[0] & WEBP_ALPHA),
            frames=bool(body[0] & WEBP_ANIMATED),
        )
    if kind == b"VP8L" and body[0] == 0x2F:
        (bits,) = unpack_from("<I", body, 1)
        return Header(
            width=(bits & 0x3FFF) + 1,
            height=(bits >> 14 & 0x3FFF) + 1,
            alpha=bool(bits >> 28 & 1),
        )
    if kind == b"VP8 " and body[3:6] == b"\x9d\x01\x2a":
        width, height = unpack_from("<HH", body, 6)
        return Header(width=width & 0x3FFF, height=height & 0x3FFF)
    raise ValueError


# --- The others -----------------------------------------------------------------------------------


def _bmp_header(data: bytes) -> Header:
    # Never with transparency: in most files of 32 bits the fourth byte is an unused zero.
    (header,) = unpack_from("<I", data, 14)
    # A negative height means that the rows stand from top to bottom.
    width, height = unpack_from("<HH" if header == 12 else "<ii", data, 18)
    return Header(width=width, height=abs(height))


def _gif_header(data: bytes) -> Header:
    width, height = unpack_from("<HH", data, 6)
    # Whether the first frame has holes stands far behind; the decoder gives four channels then.
    return Header(width=width, height=height, alpha=True, frames=True)


_TIFF_WIDTH, _TIFF_LENGTH, _TIFF_BITS, _TIFF_EXTRA = 256, 257, 258, 338
_TIFF_TILE_WIDTH, _TIFF_TILE_LENGTH = 322, 323
_TIFF_SHORT: Final = 3
_TIFF_TILE_MAX: Final = 4_096
# Of the values of ExtraSamples; 0 is a mask that somebody drew, and no transparency.
_TIFF_ASSOCIATED, _TIFF_STRAIGHT = 1, 2


def _tiff_header(data: bytes) -> Header:
    """Read a TIFF's first picture (TIFF 6.0, sections 8, 15 and 18).

    A tile may be larger than the picture, and memory is taken for it: with 400 bytes, 400 MB.
    """
    order = "<" if data[:2] == b"II" else ">"
    (at,) = unpack_from(order + "I", data, 4)
    (count,) = unpack_from(order + "H", data, at)
    found: dict[int, int] = {}
    for entry in range(at + 2, at + 2 + 12 * count, 12):
        tag, kind, values = unpack_from(order + "HHI", data, entry)
        if tag in _TIFF_TAGS:
            short = kind == _TIFF_SHORT
            where = entry + 8
            if short and values > 2:
                (where,) = unpack_from(order + "I", data, where)
            (found[tag],) = unpack_from(order + ("H" if short else "I"), data, where)
    if max(found.get(_TIFF_TILE_WIDTH, 0), found.get(_TIFF_TILE_LENGTH, 0)) > _TIFF_TILE_MAX:
        raise ValueError
    deep = found.get(_TIFF_BITS, 1) > 8
    extra = found.get(_TIFF_EXTRA)
    return Header(
        width=found.get(_TIFF_WIDTH, 0),
        height=found.get(_TIFF_LENGTH, 0),
        alpha=extra in (_TIFF_ASSOCIATED, _TIFF_STRAIGHT),
        # libtiff gives 8 bits premultiplied, whatever the file has.
        premultiplied=extra == _TIFF_ASSOCIATED or not deep,
        deep=deep,
    )


_TIFF_TAGS: Final = frozenset(
    {_TIFF_WIDTH, _TIFF_LENGTH, _TIFF_BITS, _TIFF_EXTRA, _TIFF_TILE_WIDTH, _TIFF_TILE_LENGTH}
)

_HEADERS: Final[dict[str, Callable[[bytes], Header]]] = {
    "JPEG": _jpeg_header,
    "PNG": _png_header,
    "WebP": _webp_header,
    "BMP": _bmp_header,
    "TIFF": _tiff_header,
    "GIF": _gif_header,
}

_SIGNATURES: Final = (
    ("JPEG", re.compile(rb"\xff\xd8\xff")),
    ("PNG", re.compile(re.escape(PNG_BEGIN))),
    ("WebP", re.compile(rb"RIFF....WEBP", re.DOTALL)),
    ("BMP", re.compile(rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\x00\x00\x00", re.DOTALL)),
    ("TIFF", re.compile(rb"II\*\x00|MM\x00\*")),
    ("GIF", re.compile(rb"GIF8[79]a")),
)

_OTHERS: Final = (
    (
        "a HEIC picture, as phones take them (share or export it as JPEG)",
        re.compile(rb"....ftyp(?:hei|hev|mif1|msf1)", re.DOTALL),
    ),
    ("an AVIF picture", re.compile(rb"....ftypavi", re.DOTALL)),
    ("a film", re.compile(rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ", re.DOTALL)),
    ("a JPEG 2000 picture", re.compile(rb"\x00\x00\x00\x0cjP|\xff\x4f\xff\x51")),
    ("a BigTIFF picture", re.compile(rb"II\+\x00|MM\x00\+")),
    ("a PDF document", re.compile(rb"%PDF")),
    ("an archive", re.compile(rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf")),
    ("an SVG drawing or a web page", re.compile(rb"\s*<")),
    ("text", re.compile(rb"[\t\r\n\x20-\x7e]{1,64}\Z")),
)

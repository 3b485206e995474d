"""Image files made for tests, by OpenCV and by hand: what cameras and rare programs write."""

import struct
import zlib

import cv2
import numpy as np

SLOPES = np.indices((24, 40)).sum(0)
PICTURE = np.stack([SLOPES * 3, SLOPES * 2, 255 - SLOPES * 4], axis=2).astype(np.uint8)

# What a camera writes about where and by whom, each findable in a file.
MAKER = b"SECRET-CAMERA"
LATITUDE = struct.pack(">6I", 51, 1, 7, 1, 4142135, 100_000)
LONGITUDE = struct.pack(">6I", 13, 1, 44, 1, 1732050, 100_000)
SECRETS = (MAKER, LATITUDE, LONGITUDE, b"SECRET-TEXT", b"GPS", b"xmpmeta")


def encoded(extension: str, pixels: np.ndarray = PICTURE, *parameters: int) -> bytes:
    done, data = cv2.imencode(extension, pixels, parameters)
    assert done
    return data.tobytes()


def chunk(kind: bytes, body: bytes) -> bytes:
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def riff(kind: bytes, body: bytes) -> bytes:
    """Return a chunk of a WebP."""
    return kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)


def exif_of(orientation: int) -> bytes:
    """Return an Exif block as a phone writes it: its maker, where it was, and how it was held."""
    # Two directories, the second one for the place; values longer than four bytes stand behind.
    maker_at = 8 + 2 + 3 * 12 + 4
    place_at = maker_at + len(MAKER) + 1
    values_at = place_at + 2 + 4 * 12 + 4
    main = [
        (0x010F, 2, len(MAKER) + 1, struct.pack(">I", maker_at)),
        (0x0112, 3, 1, struct.pack(">HH", orientation, 0)),
        (0x8825, 4, 1, struct.pack(">I", place_at)),
    ]
    place = [
        (1, 2, 2, b"N\0\0\0"),
        (2, 5, 3, struct.pack(">I", values_at)),
        (3, 2, 2, b"E\0\0\0"),
        (4, 5, 3, struct.pack(">I", values_at + len(LATITUDE))),
    ]
    return b"".join(
        [
            b"MM\0*\0\0\0\x08",
            *_directory(main),
            MAKER + b"\0",
            *_directory(place),
            LATITUDE,
            LONGITUDE,
        ]
    )


def _directory(entries: list[tuple[int, int, int, bytes]]) -> list[bytes]:
    rows = [struct.pack(">HHI", tag, kind, count) + value for tag, kind, count, value in entries]
    return [struct.pack(">H", len(entries)), *rows, bytes(4)]


def with_exif(data: bytes, exif: bytes) -> bytes:
    """Put an Exif block, and other notes, into a JPEG, PNG or WebP."""
    xmp = b"<x:xmpmeta>SECRET-TEXT</x:xmpmeta>"
    if data.startswith(b"\xff\xd8"):
        notes = [
            (0xE1, b"Exif\0\0" + exif),
            (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp),
            (0xED, b"Photoshop 3.0\0SECRET-TEXT"),
            (0xFE, b"SECRET-TEXT"),
        ]
        parts = [
            bytes([0xFF, kind]) + struct.pack(">H", len(body) + 2) + body for kind, body in notes
        ]
        # Behind the end: a preview, or the film of a "live photo".
        return data[:2] + b"".join(parts) + data[2:] + b"SECRET-TEXT" + exif
    if data.startswith(b"\x89PNG"):
        notes = chunk(b"eXIf", exif) + chunk(b"tEXt", b"Comment\0SECRET-TEXT")
        return data[:33] + notes + data[33:-12] + chunk(b"tIME", b"SECRETS") + data[-12:] + exif
    assert data.startswith(b"RIFF")
    pixels = data[12:]
    if not pixels.startswith(b"VP8X"):
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        height, width, channels = image.shape
        flags = 0x08 | 0x04 | (0x10 if channels == 4 else 0)
        sizes = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
        pixels = riff(b"VP8X", bytes([flags, 0, 0, 0]) + sizes) + pixels
    body = b"WEBP" + pixels + riff(b"EXIF", exif) + riff(b"XMP ", xmp)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tiff(pixels: np.ndarray, *, bits: int = 8, orientation: int = 1, extra: int = 0) -> bytes:
    """Write a TIFF in one strip without compression; `extra` says what a fourth channel means."""
    height, width, channels = pixels.shape
    order = [2, 1, 0, 3][:channels]
    values = pixels[:, :, order].astype("<u2") * 257 if bits == 16 else pixels[:, :, order]
    strip = np.ascontiguousarray(values).tobytes()
    bits_at = 8 + len(strip)
    tags = [
        (256, 3, 1, width),
        (257, 3, 1, height),
        (258, 3, channels, bits_at),
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, 1, 8),
        (274, 3, 1, orientation),
        (277, 3, 1, channels),
        (278, 3, 1, height),
        (279, 4, 1, len(strip)),
    ]
    if channels == 4:
        tags.append((338, 3, 1, extra))
    rows = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    sizes = struct.pack(f"<{channels}H", *[bits] * channels)
    directory = struct.pack("<H", len(tags)) + rows + bytes(4)
    return b"II*\0" + struct.pack("<I", bits_at + len(sizes)) + strip + sizes + directory

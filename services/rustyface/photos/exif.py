"""What a camera noted beside the picture: which way is up. The rest is never read, nor kept.

Source: Exif 2.32 (CIPA DC-008), 4.6.4 A, tag 274; the layout is that of TIFF 6.0, section 2.
"""

from struct import error as StructError  # noqa: N812
from struct import pack, unpack_from
from typing import Final

UPRIGHT: Final = 1
ORIENTATION_TAG: Final = 274
PREFIX: Final = b"Exif\0\0"
"""What stands before it in a JPEG, and by mistake in some WebP files."""

_SHORT: Final = 3
_TAGS_MAX: Final = 1_000


def orientation_of(exif: bytes) -> int:
    """Return the orientation that an Exif block notes, 1 to 8; `UPRIGHT` if it has none.

    A damaged block is one without: it is no reason to refuse a picture.
    """
    exif = exif.removeprefix(PREFIX)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return UPRIGHT
    try:
        (at,) = unpack_from(order + "I", exif, 4)
        (count,) = unpack_from(order + "H", exif, at)
        for entry in range(at + 2, at + 2 + 12 * min(count, _TAGS_MAX), 12):
            tag, kind, _, value = unpack_from(order + "HHIH", exif, entry)
            if tag == ORIENTATION_TAG and kind == _SHORT:
                return value if 1 <= value <= 8 else UPRIGHT
    except StructError:
        pass
    return UPRIGHT


def note_of(orientation: int) -> bytes:
    """Return an Exif block that notes an orientation, and nothing else."""
    return b"MM\0*" + pack(">IHHHIHHI", 8, 1, ORIENTATION_TAG, _SHORT, 1, orientation, 0, 0)

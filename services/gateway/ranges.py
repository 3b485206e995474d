"""What of a file a request wants: byte ranges and preconditions, as RFC 9110 has them."""

import re
from typing import Final

from bus.errors import BusError

_SPEC: Final = re.compile(r"\s*(\d*)\s*-\s*(\d*)\s*")
_TAG: Final = re.compile(r'\s*((?:W/)?"[^"]*")\s*(?:,|\Z)')
# Longer numbers are no offset in any file, and cost time to read.
_DIGITS_MAX: Final = 18


class Unsatisfiable(BusError):
    """The range begins behind the end of the file, or asks for none of its bytes."""

    code = "range-not-satisfiable"
    number = 416


def range_of(header: str | None, size: int) -> tuple[int, int] | None:
    """Return where the range that a header asks for begins, and where it stops; None: all of it.

    Several ranges, other units and what cannot be read mean all of it, which RFC 9110 (14.2)
    allows: a client sees by the status what it got.

    Args:
        header: `bytes=0-499`, `bytes=500-` or `bytes=-500`.
        size: How many bytes the file has.

    Raises:
        Unsatisfiable: The file has none of these bytes.
    """
    unit, _, spec = (header or "").partition("=")
    found = _SPEC.fullmatch(spec) if unit.strip().lower() == "bytes" else None
    if found is None or not spec.isascii():
        return None
    first, last = found[1], found[2]
    if max(len(first), len(last)) > _DIGITS_MAX or not (first or last):
        return None
    if not first:
        start, stop = max(0, size - int(last)), size
    else:
        start, stop = int(first), min(size, int(last) + 1) if last else size
        if last and int(last) < start:
            return None
    if start >= stop:
        raise Unsatisfiable(
            f"the file has {size:,} bytes, none of them in the range {spec.strip()[:60]!r}; ask "
            "for a range inside it"
        )
    return start, stop


def is_known(if_none_match: str | None, etag: str) -> bool:
    """Tell whether the caller has this version of the file already (RFC 9110, 13.1.2)."""
    if if_none_match is None:
        return False
    if if_none_match.strip() == "*":
        return True
    tags = [tag.removeprefix("W/") for tag in _TAG.findall(if_none_match)]
    return etag in tags


def range_stands(if_range: str | None, etag: str) -> bool:
    """Tell whether a range is of the version that the caller has begun to fetch (13.1.5).

    A date never is: what is named by its digest has none.
    """
    return if_range is None or if_range.strip() == etag

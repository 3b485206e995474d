"""What a request says of the bytes that it brings: place, length and digests.

The names are those of the IETF's draft on resumable uploads and of RFC 9530.
"""

import binascii
import re
from base64 import b64decode
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from bus.errors import InvalidRequest

OFFSET: Final = "Upload-Offset"
LENGTH: Final = "Upload-Length"
COMPLETE: Final = "Upload-Complete"
CHECKSUM: Final = "X-Checksum-Sha256"
# Not aiohttp's constant: that is no plain text, and an error's body could not be written.
CONTENT_ENCODING: Final = "Content-Encoding"
CONTENT_DIGEST: Final = "Content-Digest"
REPR_DIGEST: Final = "Repr-Digest"

SHA256: Final = re.compile(r"[0-9a-f]{64}")
_DIGEST: Final = re.compile(r"\s*sha-256\s*=\s*:([A-Za-z0-9+/=]+):\s*")


@dataclass(frozen=True)
class Told:
    """What a request says of the bytes that it brings.

    Attributes:
        offset: Where they begin in the file.
        total_bytes: How many the file has, where that is known.
        is_last: Whether the file ends with them.
        sha256: The digest of the file.
        part_sha256: The digest of these bytes alone.
    """

    offset: int = 0
    total_bytes: int | None = None
    is_last: bool = True
    sha256: str | None = None
    part_sha256: str | None = None


def told_by(headers: Mapping[str, str], content_length: int | None) -> Told:
    """Return what a request's headers say of the bytes that it brings.

    Raises:
        InvalidRequest: One of them has a value that it cannot have, or they contradict each other.
    """
    encoding = headers.get(CONTENT_ENCODING, "identity").lower()
    if encoding != "identity":
        raise InvalidRequest(
            f"Content-Encoding is {encoding[:40]!r}; send the file as it is: resuming and digests "
            "count its own bytes",
            field=CONTENT_ENCODING,
        )
    begins = _number(headers, OFFSET) or 0
    total = _number(headers, LENGTH)
    said = headers.get(COMPLETE, "?1").strip()
    if said not in {"?0", "?1"}:
        raise InvalidRequest(
            f"{COMPLETE} is {said[:40]!r}; allowed are ?1, the file ends with these bytes, and ?0",
            field=COMPLETE,
        )
    is_last = said == "?1"
    if content_length is not None:
        end = begins + content_length
        if total is None and is_last:
            total = end
        elif total is not None and (end > total or (is_last and end != total)):
            raise InvalidRequest(
                f"{LENGTH} says {total:,} bytes, but these end at {end:,}", field=LENGTH
            )
    part = _digest_in(headers, CONTENT_DIGEST)
    whole = _digest_in(headers, REPR_DIGEST)
    if (hexed := headers.get(CHECKSUM)) is not None:
        hexed = hexed.strip().lower()
        if not SHA256.fullmatch(hexed):
            raise InvalidRequest(f"{CHECKSUM} must be 64 hex digits", field=CHECKSUM)
        if whole not in {None, hexed}:
            raise InvalidRequest(f"{CHECKSUM} and {REPR_DIGEST} differ", field=CHECKSUM)
        whole = hexed
    if part is not None and begins == 0 and is_last:
        if whole not in {None, part}:
            raise InvalidRequest(
                f"{CONTENT_DIGEST} and the other digest differ, but these bytes are the whole file",
                field=CONTENT_DIGEST,
            )
        part, whole = None, part
    return Told(begins, total, is_last, whole, part)


def _digest_in(headers: Mapping[str, str], name: str) -> str | None:
    """Return the SHA-256 in a digest field of RFC 9530, in hex; others are passed over."""
    for one in headers.get(name, "").split(","):
        if found := _DIGEST.fullmatch(one):
            try:
                digest = b64decode(found[1], validate=True).hex()
            except (binascii.Error, ValueError):
                digest = ""
            if not SHA256.fullmatch(digest):
                raise InvalidRequest(
                    f"{name}: sha-256 must be the base64 of 32 bytes between colons", field=name
                )
            return digest
    return None


def _number(headers: Mapping[str, str], name: str) -> int | None:
    text = headers.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise InvalidRequest(f"{name} is {text[:40]!r}; it is a number of bytes", field=name)
    return int(text)

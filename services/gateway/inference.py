"""What a request for inference is on its way through the gateway, whichever way it came in."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Final

from aiohttp import hdrs

from bus.errors import Overloaded
from bus.subjects import MODEL_INFER
from services.gateway.parts import Parts
from services.gateway.room import Room, full

LENGTH: Final = "Inference-Header-Content-Length"
# What it is, and who gave it.
SHOWN: Final = (
    hdrs.CONTENT_TYPE, LENGTH, "Bkg-Model-Version", "Bkg-Model-Digest", "Bkg-Instance",
)  # fmt: skip
NAME_MAX_CHARS: Final = 128
RELAYING_MAX: Final = 1_024
# What inference bodies may hold of the gateway's memory while their answers are waited for.
RELAYING_MAX_BYTES: Final = 512 * 1024**2
# Less than this is sent sooner than it is compressed.
COMPRESS_MIN_BYTES: Final = 1_400


def too_many(at: Parts, more_bytes: int) -> Overloaded | None:
    """Return why one more request with so many bytes cannot be taken, if it is so."""
    if at.relaying < RELAYING_MAX and at.relaying_bytes + more_bytes <= RELAYING_MAX_BYTES:
        return None
    return full(at, RELAYING_MAX, RELAYING_MAX_BYTES)


def room_for_one(at: Parts) -> Room:
    """Return room for one more request."""
    return Room(at, RELAYING_MAX, RELAYING_MAX_BYTES)


@lru_cache(4_096)
def subject_of(root: str, model: str, version: str | None) -> str:
    """Return where a model, or a version of it, is asked."""
    return MODEL_INFER.subject(root, model, *([version] if version else []))


def shown(headers: Mapping[str, str]) -> dict[str, str]:
    """Return what of an answer's headers is for the client."""
    return {name: headers[name] for name in SHOWN if name in headers}

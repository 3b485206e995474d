"""Faces: finding, embedding, comparing and searching them, from a picture or a vector.

Whoever may read may search, but reading that is open to everybody opens none of this: it says who
is on a picture. It changes nothing, so it needs no admin.
"""

import asyncio
import hashlib
import uuid
from collections.abc import Sequence
from typing import Any, Final, TypeVar

import msgspec
from aiohttp import hdrs, web

from bus import codec
from bus.client import Answer
from bus.errors import NobodyListens
from bus.messages import (
    DetectFaces,
    DrawSheet,
    EncodeFace,
    SearchFaces,
    Sheet,
    VerifyFaces,
)
from bus.subjects import (
    FACES_DETECT,
    FACES_ENCODE,
    FACES_SEARCH,
    FACES_SHEET,
    FACES_VERIFY,
    Endpoint,
)
from services.gateway.image_bodies import IMAGE, read_images, wants_msgpack
from services.gateway.parts import PARTS
from services.gateway.room import Room
from services.gateway.routes.capabilities import why_nobody
from services.gateway.routes.jobs import idempotency_key
from services.gateway.translate import (
    answer,
    answer_as_it_is,
    encoded,
    headers_for_bus,
    timeout_of,
)

# What a message may have beside its image.
BESIDE_IMAGE_BYTES: Final = 16 * 1024
RELAYING_MAX: Final = 256
RELAYING_MAX_BYTES: Final = 256 * 1024**2

# A picture of our own, in which nothing runs and that loads nothing.
SHEET_POLICY: Final = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; sandbox"
)
# Names the entries that are made by an idempotency key.
_ENTRIES: Final = uuid.UUID("5c1b0d6c-92b1-4c0e-9d4e-0d9a3f6a7e11")

T = TypeVar("T", bound=msgspec.Struct)


async def encode(request: web.Request) -> web.Response:
    """Embed the largest face of an image, and enrol it unless `persist` is off.

    The same `Idempotency-Key` with the same request enrols it once. 400 a field that does not fit;
    404 no such dataset; 408 the body comes too slowly; 413 too large; 422 no image, no face, or one
    that the dataset does not take, and why; 429 and 503 try again after `Retry-After`; 504 no
    answer in time.
    """
    key = idempotency_key(request)
    with _room_for(request) as room:
        ask = await _asked(request, room, EncodeFace, by="admin")
        if key is not None and ask.entry_id is None:
            # A large image's digest takes a while.
            entry = await asyncio.to_thread(_entry_for, key, ask)
            ask = msgspec.structs.replace(ask, entry_id=entry)
        return await _answered(request, FACES_ENCODE, ask)


async def detect(request: web.Request) -> web.Response:
    """Find the faces of an image; none is no error. Statuses as `encode`."""
    with _room_for(request) as room:
        return await _answered(request, FACES_DETECT, await _asked(request, room, DetectFaces))


async def search(request: web.Request) -> web.Response:
    """Find who is nearest to a face, or to each one of an image. Statuses as `encode`."""
    with _room_for(request) as room:
        return await _answered(request, FACES_SEARCH, await _asked(request, room, SearchFaces))


async def verify(request: web.Request) -> web.Response:
    """Say whether two faces, `a` and `b`, are one person. Statuses as `encode`."""
    with _room_for(request) as room:
        ask = await _asked(request, room, VerifyFaces, images=("a", "b"))
        return await _answered(request, FACES_VERIFY, ask)


async def sheet(request: web.Request) -> web.Response:
    """Draw what a search finds for each face of an image, to look at: HTML or PNG.

    Statuses as `encode`.
    """
    with _room_for(request) as room:
        ask = await _asked(request, room, DrawSheet, language=language_of(request))
        return await drawn(request, ask)


async def drawn(request: web.Request, ask: DrawSheet) -> web.Response:
    """Return a contact sheet; where it goes on stands in the header `Link`."""
    told = await relayed(request, FACES_SHEET, ask, codec.MSGPACK)
    found = codec.decode(told.body, Sheet, told.headers.get(codec.CONTENT_TYPE))
    headers: dict[str, str] = {
        hdrs.CONTENT_TYPE: found.content_type,
        "Content-Security-Policy": SHEET_POLICY,
        "Bkg-Shown": str(found.shown),
    }
    if found.next is not None:
        further = request.rel_url.update_query({"after": found.next})
        headers[hdrs.LINK] = f'<{further}>; rel="next"'
    return web.Response(body=found.body, headers=headers)


def language_of(request: web.Request) -> str:
    """Return the first language of the reader's that we speak, as the dashboard chooses it."""
    for one in request.headers.get(hdrs.ACCEPT_LANGUAGE, "").split(","):
        short = one.partition(";")[0].strip().lower().partition("-")[0]
        if short in {"de", "en"}:
            return str(short)
    return "en"


async def relayed(
    request: web.Request, endpoint: Endpoint[Any, Any], ask: msgspec.Struct, content_type: str
) -> Answer:
    """Ask rustyface, and return the answer as it is.

    Raises:
        BusError: As `Client.relay`; when nobody listens, it says why.
    """
    at = request.app[PARTS]
    subject = endpoint.subject_of(at.client.root, ask)
    try:
        return await at.client.relay(
            subject,
            encoded(ask, content_type),
            headers=headers_for_bus(request) | {codec.CONTENT_TYPE: content_type},
            timeout_s=timeout_of(request),
        )
    except NobodyListens:
        raise await why_nobody(at, endpoint.capability, subject) from None


def _room_for(request: web.Request) -> Room:
    """Return room for a request, and for its body."""
    return Room(request.app[PARTS], RELAYING_MAX, RELAYING_MAX_BYTES)


async def _asked(
    request: web.Request, room: Room, kind: type[T], images: Sequence[str] = (IMAGE,), **said: Any
) -> T:
    max_bytes = request.app[PARTS].client.body_max_bytes - BESIDE_IMAGE_BYTES
    return await read_images(request, kind, max_bytes, room, images=images, said=said)


async def _answered(
    request: web.Request, endpoint: Endpoint[Any, Any], ask: msgspec.Struct
) -> web.Response:
    """Ask rustyface; answer in what the caller reads: JSON, or MessagePack if it says so."""
    wanted = codec.MSGPACK if wants_msgpack(request) else codec.JSON
    # Bytes travel as they are only in MessagePack, and the answer comes in what was asked in.
    told = await relayed(request, endpoint, ask, codec.MSGPACK if _has_bytes(ask) else wanted)
    kind = told.headers.get(codec.CONTENT_TYPE)
    if kind == wanted:
        return answer_as_it_is(told)
    return answer(codec.decode(told.body, endpoint.reply, kind))


def _has_bytes(ask: Any) -> bool:
    sides = (ask, getattr(ask, "a", None), getattr(ask, "b", None))
    return any(getattr(side, "image", None) is not None for side in sides)


def _entry_for(key: str, ask: EncodeFace) -> str:
    """Return the entry that a request with an idempotency key makes: each time the same one.

    The request is part of it: a key that is used for another image replaces nobody.
    """
    digest = hashlib.sha256(encoded(ask, codec.MSGPACK)).hexdigest()
    return str(uuid.uuid5(_ENTRIES, f"{key}\0{digest}"))

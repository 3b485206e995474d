"""Requests that bring images: as JSON, as MessagePack, as raw bytes, or as a form.

Whichever it is becomes one message, the image in it as the bytes that came: nothing here decodes a
picture. What does not stand in the body may stand in the query.
"""

import difflib
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar

import msgspec
from aiohttp import BodyPartReader, hdrs, web

from bus import codec
from bus.errors import InvalidRequest
from services.gateway.bodies import check_length, parts_of, whole_body, whole_part
from services.gateway.patience import for_body
from services.gateway.repository import switch
from services.gateway.room import Room
from services.gateway.translate import asked

IMAGE: Final = "image"
FIELD_MAX_BYTES: Final = 256 * 1024

# In a query or a form these are text, or on and off; all others are JSON.
_TEXTS: Final = frozenset(
    {"dataset", "entry_id", "subject", "quality", "group_by", "format", "after", "image_base64"}
)
_SWITCHES: Final = frozenset({"persist", "every_face", "small"})
# Of the request itself, not of what it asks.
_QUERY_ONLY: Final = frozenset({"timeout"})
# What the gateway says by itself.
_OURS: Final = frozenset({"by", "language"})
# Clients say these of a photo and of JSON, when nobody tells them better; no image begins with {.
_VAGUE: Final = frozenset({"", "application/x-www-form-urlencoded", "application/octet-stream"})
_PLAIN: Final = frozenset({codec.JSON, codec.MSGPACK, "text/json", "text/plain", *_VAGUE})

T = TypeVar("T", bound=msgspec.Struct)


async def read_images(
    request: web.Request,
    kind: type[T],
    max_bytes: int,
    room: Room,
    *,
    images: Sequence[str] = (IMAGE,),
    said: Mapping[str, Any] | None = None,
) -> T:
    """Return a request that may bring images as a message.

    Args:
        request: JSON or MessagePack with the message's fields; an image's bytes, with them in the
            query; or a form with them as fields.
        kind: The message.
        max_bytes: How many bytes the body may have.
        room: For them.
        images: The fields that may come as files of a form; a single one may be the whole body.
        said: What the gateway adds.

    Raises:
        InvalidRequest: A field is not known, comes twice, or has a value that it cannot have.
        TooLarge: There are more bytes than may be.
        Overloaded: There is no room for them.
        BusError: As `whole_body` and `parts_of`.
    """
    check_length(request, max_bytes)
    allowed = [name for name in kind.__struct_fields__ if name not in _OURS]
    given = _by_name(allowed, _in_query(request, allowed))
    media = request.headers.get(hdrs.CONTENT_TYPE, "").partition(";")[0].strip().lower()
    if media.startswith("multipart/"):
        fields = [pair async for pair in _in_form(request, allowed, images, max_bytes, room)]
    else:
        fields = _in_body(media, await whole_body(request, room, max_bytes), images)
    given = _by_name(allowed, fields, given)
    return asked(kind, given | dict(said or {}))


def wants_msgpack(request: web.Request) -> bool:
    """Tell whether the caller would rather have MessagePack than JSON (`Accept`)."""
    kinds = [
        one.partition(";")[0].strip() for one in request.headers.get(hdrs.ACCEPT, "").split(",")
    ]
    return codec.MSGPACK in kinds and codec.JSON not in kinds


def _by_name(
    allowed: Sequence[str],
    fields: Iterable[tuple[str, Any]],
    before: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return fields by name, with those that came before."""
    found = dict(before or {})
    for name, value in fields:
        _check_name(name, allowed)
        if name in found:
            raise InvalidRequest(f"{name} is given twice; give it once", field=name)
        found[name] = value
    return found


def _check_name(name: str, allowed: Sequence[str]) -> None:
    if name not in allowed:
        near = difflib.get_close_matches(name, allowed, 1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(allowed)}"
        raise InvalidRequest(f"the field {name[:40]!r} is not known here; {hint}", field=name[:40])


def _in_query(request: web.Request, allowed: Sequence[str]) -> Iterator[tuple[str, Any]]:
    for name, text in request.query.items():
        if name not in _QUERY_ONLY:
            _check_name(name, allowed)
            yield name, _value_of(name, text)


def _in_body(media: str, body: bytes, images: Sequence[str]) -> list[tuple[str, Any]]:
    """Return the fields of a body that is no form: what it names, or itself as the image."""
    is_photo = media in _VAGUE and bool(body) and body.lstrip()[:1] != b"{"
    if is_photo or media.startswith("image/"):
        if list(images) != [IMAGE]:
            raise InvalidRequest(
                f"one body is one image, and here are {len(images)}: send a form with the files "
                f"{' and '.join(images)}, or JSON",
                field=codec.CONTENT_TYPE,
            )
        return [(IMAGE, body)]
    if media not in _PLAIN:
        raise InvalidRequest(
            f"a body of type {media[:60]!r} cannot be read; allowed are {codec.JSON}, "
            f"{codec.MSGPACK}, multipart/form-data, image/* and application/octet-stream",
            field=codec.CONTENT_TYPE,
        )
    return list(codec.decode(body, dict[str, Any], media).items())


async def _in_form(
    request: web.Request, allowed: Sequence[str], images: Sequence[str], max_bytes: int, room: Room
) -> AsyncIterator[tuple[str, Any]]:
    """Give the fields of a form; all of them together have no more than `max_bytes`."""
    room.hold(request.content_length or 0)
    left = max_bytes

    def grown(size: int) -> None:
        room.hold_at_least(max_bytes - left + size)

    patience = await for_body(request)
    async for part in parts_of(request, patience):
        name = part.name or ""
        _check_name(name, allowed)
        if name in images and _is_file(part, name):
            raw = await whole_part(part, patience, left, grown)
            yield name, raw if name == IMAGE else {IMAGE: raw}
        elif part.filename is not None:
            raise InvalidRequest(
                f"the form has a file {name[:40]!r}; files are {' and '.join(images)}",
                field=name[:40],
            )
        else:
            raw = await whole_part(part, patience, min(left, FIELD_MAX_BYTES), grown)
            yield name, _value_of(name, raw.decode(errors="replace"))
        left -= len(raw)


def _is_file(part: BodyPartReader, name: str) -> bool:
    """Tell a file from a field: the side of a comparison may be JSON with an embedding, too."""
    kind = part.headers.get(hdrs.CONTENT_TYPE, "")
    return part.filename is not None or name == IMAGE or kind.startswith("image/")


def _value_of(name: str, text: str) -> Any:
    """Return what a text in a query or a form stands for."""
    if name in _TEXTS:
        return text
    if name in _SWITCHES:
        return switch(text, name)
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        raise InvalidRequest(
            f"{name[:40]} is {text[:40]!r}, which is no JSON: write a text in quotes, a number or "
            "an object as it is",
            field=name[:40],
        ) from None

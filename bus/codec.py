"""Messages to bytes and back: JSON for what a person may read, MessagePack for bulk.

`Content-Type` says which; without one a body is JSON, and an empty body is an empty object, so
that `nats request SUBJECT ''` calls whatever has no required field.
"""

import difflib
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final, TypeVar

import msgpack
import msgspec
import msgspec.inspect

from bus.errors import InvalidRequest
from bus.messages import PATTERNS_IN_WORDS

JSON: Final = "application/json"
MSGPACK: Final = "application/msgpack"
CONTENT_TYPE: Final = "Content-Type"

T = TypeVar("T")


def encode(message: object, content_type: str = JSON) -> bytes:
    """Return a message as bytes of the given content type."""
    if content_type == MSGPACK:
        plain_message = msgspec.to_builtins(message, builtin_types=(bytes, datetime))
        packed: bytes = msgpack.packb(plain_message, datetime=True)
        return packed
    return _JSON_ENCODER.encode(message)


def decode(body: bytes | memoryview, kind: type[T], content_type: str | None = JSON) -> T:
    """Read a body as a message of type `kind`; fields that it does not name are passed over.

    Raises:
        InvalidRequest: The body is not of that content type, or does not fit the type; names
            the field.
    """
    media = (content_type or JSON).partition(";")[0].strip().lower()
    try:
        if media == MSGPACK:
            return msgspec.convert(_unpacked(body), kind)
        if media not in _READ_AS_JSON:
            raise InvalidRequest(
                f"a body of type {media!r} cannot be read; allowed are {JSON} and {MSGPACK}",
                field=CONTENT_TYPE,
            )
        return msgspec.json.decode(body or b"{}", type=kind)
    except msgspec.ValidationError as error:
        raise _invalid(str(error), kind) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None


def convert(plain: object, kind: type[T]) -> T:
    """Read plain dicts and lists as a message; raises as `decode` does."""
    try:
        return msgspec.convert(plain, kind)
    except msgspec.ValidationError as error:
        raise _invalid(str(error), kind) from None


def check_settings(given: Mapping[str, Any], kind: type[Any], owner: str, place: str = "") -> None:
    """Refuse settings that a message has no field for: what is misspelt would be passed over.

    Args:
        given: By name.
        kind: The message that they are for.
        owner: Whose settings they are, for the error.
        place: What stands before their names.

    Raises:
        InvalidRequest: There is no such setting; says which is near, or which there are.
    """
    known = kind.__struct_fields__
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise InvalidRequest(
                f"{owner} has no setting {place}{name[:40]}; {hint}", field=f"{place}{name[:40]}"
            )


def plain(message: object) -> Any:
    """Return a message as plain dicts, lists, strings and numbers, as JSON would carry it."""
    return msgspec.to_builtins(message)


def schema(kind: type) -> dict[str, Any]:
    """Return the JSON Schema of a message type."""
    return msgspec.json.schema(kind)


_JSON_ENCODER = msgspec.json.Encoder()
# What plain clients send: curl -d says x-www-form-urlencoded whatever the body is.
_READ_AS_JSON = {JSON, "", "text/plain", "application/octet-stream", "text/json",
                 "application/x-www-form-urlencoded"}  # fmt: skip

# msgspec ends its sentence with the place: "Expected `int`, got `str` - at `$.inputs[0]`".
_PLACE = re.compile(r"\A(?P<what>.*) - at `(?:key in )?\$\.?(?P<path>[^`]*)`\Z", re.DOTALL)
_NAMES_FIELD = re.compile(r"(?:missing required field|unknown field) `(?P<name>[^`]+)`")


def _unpacked(body: bytes | memoryview) -> Any:
    try:
        # Its limits follow from the body's own length: a few bytes cannot ask for gigabytes.
        return msgpack.unpackb(body, timestamp=3) if body else {}
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        said = str(error) or type(error).__name__
        raise InvalidRequest(f"the body is not MessagePack: {said}") from None


def _invalid(sentence: str, kind: Any) -> InvalidRequest:
    place = _PLACE.match(sentence)
    what, path = (place["what"], place["path"]) if place else (sentence, "")
    if named := _NAMES_FIELD.search(what):
        if what.startswith("Object contains unknown"):
            what += _nearest(named["name"], _known_at(kind, path))
        path = f"{path}.{named['name']}" if path else named["name"]
    if what.startswith("Invalid enum value"):
        allowed = getattr(_there(_type_at(kind, path)), "values", ())
        what += f"; allowed are {', '.join(map(str, allowed))}" if allowed else ""
    for pattern, words in PATTERNS_IN_WORDS.items():
        if repr(pattern) in what or f"'{pattern}'" in what:
            what = words
    said = f"{path}: {what}" if path else what
    return InvalidRequest(said, field=path or None)


def _known_at(kind: Any, path: str) -> list[str]:
    """Return the fields of the struct that a path leads to; none where it leads elsewhere."""
    return [field.encode_name for field in getattr(_there(_type_at(kind, path)), "fields", ())]


def _type_at(kind: Any, path: str) -> Any:
    """Return the type that a path leads to; None where there is none."""
    at: Any = msgspec.inspect.type_info(kind)
    for step in re.findall(r"\[[^\]]*\]|[^.\[\]]+", path):
        at = _there(at)
        if step.startswith("["):
            at = getattr(at, "item_type", None) or getattr(at, "value_type", None)
        else:
            fields = {field.encode_name: field.type for field in getattr(at, "fields", ())}
            at = fields.get(step)
    return at


def _there(kind: Any) -> Any:
    """Return what an optional type is when it is there."""
    for one in getattr(kind, "types", ()):
        if not isinstance(one, msgspec.inspect.NoneType):
            return one
    return kind


def _nearest(name: str, known: list[str]) -> str:
    """Return a hint for a key that is nearly right."""
    if not known:
        return ""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean `{near[0]}`?" if near else f"; known are {', '.join(known)}"

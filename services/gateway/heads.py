"""Heads of HTTP requests, as far as they are plain: where a request ends, what it asks. Pure.

Nothing is read here that two readers could read in two ways: whatever is not of the narrow form
below (HTTP/1.1, one `Content-Length` or none, each field once, printable ASCII) is left to aiohttp.
"""

import re
from typing import Final, NamedTuple

HEAD_MAX_BYTES: Final = 8_190
# aiohttp refuses a request with more.
FIELDS_MAX: Final = 128


class Infer(NamedTuple):
    """A request for inference with nothing special about it.

    Attributes:
        model: The model.
        version: The version, if one is named.
        host: What the client calls us.
        authorization: The header of that name.
        tensors_at: How long the JSON part of the body is, where it says so.
        traceparent: Its trace, as it came.
        request_id: Its id, as it came.
        compressible: Whether the answer may be compressed.
    """

    model: str
    version: str | None
    host: str
    authorization: str | None
    tensors_at: str | None
    traceparent: str
    request_id: str
    compressible: bool


class Head(NamedTuple):
    """The head of a request.

    Attributes:
        size: Its length in bytes, the empty line included.
        body_size: The length of what follows it.
        infer: What is asked, if that is plain inference.
    """

    size: int
    body_size: int
    infer: Infer | None


def read_head(data: bytes) -> Head | None:
    """Return the head that data begins with; None if it is not whole, or not plain."""
    end = data.find(b"\r\n\r\n", 0, HEAD_MAX_BYTES)
    line = _REQUEST_LINE.match(data)
    if end < 0 or line is None:
        return None
    fields: dict[str, str] = {}
    for raw in data[line.end() : end].split(b"\r\n"):
        found = _FIELD.fullmatch(raw)
        if found is None:
            return None
        name = found[1].decode().lower()
        if name in fields or name in _NOT_PLAIN:
            return None
        fields[name] = found[2].decode()
    if len(fields) > FIELDS_MAX:
        return None
    length = fields.get("content-length", "0")
    if not _LENGTH.fullmatch(length) or fields.get("connection", _KEEP).lower() != _KEEP:
        return None
    return Head(end + 4, int(length), _infer(line[1], line[2], fields))


def _infer(method: bytes, path: bytes, fields: dict[str, str]) -> Infer | None:
    asked = _INFER.fullmatch(path) if method == b"POST" else None
    if asked is None or "host" not in fields or not _SPECIAL.isdisjoint(fields):
        return None
    return Infer(
        model=asked[1].decode(),
        version=asked[2].decode() if asked[2] else None,
        host=fields["host"],
        authorization=fields.get("authorization"),
        tensors_at=fields.get("inference-header-content-length"),
        traceparent=fields.get("traceparent", ""),
        request_id=fields.get("x-request-id", ""),
        compressible="accept-encoding" in fields,
    )


_KEEP: Final = "keep-alive"
_REQUEST_LINE: Final = re.compile(
    rb"(GET|HEAD|POST|PUT|PATCH|DELETE|OPTIONS) (/[\x21-\x7e]*) HTTP/1\.1\r\n"
)
_FIELD: Final = re.compile(
    rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*((?:[\x21-\x7e](?:[\x20-\x7e\t]*[\x21-\x7e])?)?)[ \t]*"
)
_LENGTH: Final = re.compile(r"[0-9]{1,12}")
# They say that what follows is no body of a known length, or not a body at all.
_NOT_PLAIN: Final = frozenset({"transfer-encoding", "upgrade", "expect"})
# Names that mean the same encoded or not, and are no step up in a path.
_INFER: Final = re.compile(
    rb"/v2/models/([A-Za-z0-9_][A-Za-z0-9._-]{0,127})"
    rb"(?:/versions/([A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?/infer"
)
# With one of these a request is not decided by its head alone, or its body is not what it is.
_SPECIAL: Final = frozenset({"content-encoding", "cookie", "origin", "x-timeout-seconds"})

"""Answers as they leave: with the headers that each has, and in one piece where they can."""

import time
from collections.abc import Mapping
from email.utils import formatdate
from functools import lru_cache
from typing import Any, Final

from aiohttp import HttpVersion11, hdrs, web

REQUEST_ID: Final = "X-Request-Id"
# The id of a request: the caller's own, or one that it was given.
ID_GIVEN: Final = web.RequestKey("id", str)
# A relayed answer beyond this waits for the client to take it, as aiohttp's responses do.
WHOLE_MAX_BYTES: Final = 64 * 1024

# What is not said is denied. Answers of third parties are shown by browsers as inert text at most;
# the page brings its own policy.
_EVERYWHERE: Final = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Cache-Control": "no-store",
}
_SERVER: Final = "bkg"
_EVERYWHERE_ENCODED: Final = (
    "".join([f"{name}: {value}\r\n" for name, value in _EVERYWHERE.items()])
    + f"{hdrs.SERVER}: {_SERVER}\r\n\r\n"
).encode()


async def dress(request: web.Request, response: web.StreamResponse) -> None:
    """Give every response the headers that it has; runs before each."""
    protect(response)
    if request_id := request.get(ID_GIVEN):
        response.headers[REQUEST_ID] = request_id
    if would_inflate(request):
        response.force_close()
        # aiohttp has decided on this header before it asks here.
        response.headers[hdrs.CONNECTION] = "close"


def would_inflate(request: web.BaseRequest) -> bool:
    """Tell whether reading a request to its end means to inflate it.

    aiohttp does so behind every answer, for ten seconds, and a small body can become gigabytes:
    nobody else would be served. So the connection ends with the answer (`express`), also where
    there is no such address, or no key.
    """
    return hdrs.CONTENT_ENCODING in request.headers and not request.content.is_eof()


def protect(response: web.StreamResponse) -> None:
    """Give a response the headers that protect our pages and answers."""
    for name, value in _EVERYWHERE.items():
        response.headers.setdefault(name, value)
    response.headers[hdrs.SERVER] = _SERVER


class Relayed(web.Response):
    """An answer of the bus with status 200, passed on as it is.

    Where nothing about it is special, it is written in one piece, with a head put together here:
    what aiohttp does for any response costs more than all else that we do for a request.

    Args:
        body: The body.
        headers: Those of its headers that are for the client, each in one line.
    """

    def __init__(self, body: bytes, headers: dict[str, str]) -> None:
        super().__init__(body=body, headers=headers)
        self._relayed = body, headers
        self._written = False

    async def prepare(self, request: web.BaseRequest) -> Any:
        """Begin to answer; where it can be done in one piece, end, too."""
        body, headers = self._relayed
        transport = request.transport
        if (
            len(body) > WHOLE_MAX_BYTES
            or transport is None
            or transport.is_closing()
            or not request.keep_alive
            or request.version != HttpVersion11
            or request.method == hdrs.METH_HEAD
            or self.compression
            # The client takes it slowly: wait for it, as aiohttp's responses do.
            or request.protocol.writing_paused
        ):
            return await super().prepare(request)
        answer = whole(body, headers, request[ID_GIVEN])
        if answer is None:
            return await super().prepare(request)
        transport.write(answer)
        self._written = True
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        """End the answer."""
        if not self._written:
            await super().write_eof(data)

    @property
    def prepared(self) -> bool:
        """Whether answering has begun."""
        return self._written or super().prepared

    @property
    def keep_alive(self) -> bool | None:
        """Whether the connection stays open."""
        return self._written or super().keep_alive


def whole(body: bytes, headers: Mapping[str, str], request_id: str) -> bytes | None:
    """Return an answer with status 200, head and body in one piece.

    None if a header is not one line: no worker may write headers of its own making into an answer,
    and aiohttp refuses it.
    """
    lines = _lines(tuple(headers.items()))
    if lines is None:
        return None
    head = (
        f"HTTP/1.1 200 OK\r\n{lines}{REQUEST_ID}: {request_id}\r\n"
        f"Content-Length: {len(body)}\r\nDate: {_date(int(time.time()))}\r\n"
    )
    return b"".join((head.encode(), _EVERYWHERE_ENCODED, body))


@lru_cache(256)
def _lines(headers: tuple[tuple[str, str], ...]) -> str | None:
    """Return headers as they are written; answers of one model have all the same."""
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers])
    return lines if lines.count("\n") == lines.count("\r") == len(headers) else None


@lru_cache(1)
def _date(second: int) -> str:
    """Return a second of Unix time as HTTP has it."""
    return formatdate(second, usegmt=True)

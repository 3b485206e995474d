"""Artefacts on their way out: whole or in ranges, never more of one in memory than a few blocks."""

import asyncio
import contextlib
from typing import Final
from urllib.parse import quote

import structlog
from aiohttp import hdrs, web

from bus.artefacts import Artefacts
from bus.errors import BusError, Overloaded
from services.gateway.parts import PARTS
from services.gateway.ranges import Unsatisfiable, is_known, range_of, range_stands
from services.gateway.translate import problem_of

# Artefacts that are read at the same time; each takes a consumer at the broker.
DOWNLOADS_MAX: Final = 16
# A reader that takes nothing more for this long has gone.
STALL_S: Final = 60.0

log = structlog.get_logger("services.gateway")


async def content(
    request: web.Request,
    artefacts: Artefacts,
    digest: str,
    size: int,
    *,
    content_type: str = "application/octet-stream",
    file_name: str | None = None,
) -> web.StreamResponse:
    """Send an artefact: all of it, or one range.

    206 a range; 304 the caller has it (`If-None-Match`); 416 no bytes in that range; 429 too many
    are read already.

    Args:
        request: Says what of it is wanted.
        artefacts: The store that has it.
        digest: Which one.
        size: How many bytes it has.
        content_type: What it is.
        file_name: What to call it where it is saved; without, it is shown.
    """
    at = request.app[PARTS]
    etag = f'"{digest}"'
    headers = {hdrs.ETAG: etag, hdrs.ACCEPT_RANGES: "bytes", hdrs.CACHE_CONTROL: "no-cache"}
    if is_known(request.headers.get(hdrs.IF_NONE_MATCH), etag):
        return web.Response(status=304, headers=headers)
    part = None
    if request.method == "GET" and range_stands(request.headers.get(hdrs.IF_RANGE), etag):
        try:
            part = range_of(request.headers.get(hdrs.RANGE), size)
        except Unsatisfiable as error:
            refused = problem_of(error)
            refused.headers[hdrs.CONTENT_RANGE] = f"bytes */{size}"
            return refused
    start, stop = part or (0, size)
    response = web.StreamResponse(status=200 if part is None else 206, headers=headers)
    response.content_type = content_type
    response.content_length = stop - start
    if file_name is not None:
        response.headers[hdrs.CONTENT_DISPOSITION] = _disposition(file_name)
    if part is not None:
        response.headers[hdrs.CONTENT_RANGE] = f"bytes {start}-{stop - 1}/{size}"
    if request.method == "HEAD":
        await response.prepare(request)
        return response
    if at.downloads >= DOWNLOADS_MAX:
        raise Overloaded(f"{DOWNLOADS_MAX} artefacts are being read already", retry_after_s=5)
    at.downloads += 1
    try:
        await _send(request, response, artefacts, digest, (start, stop))
    finally:
        at.downloads -= 1
    return response


def _disposition(name: str) -> str:
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "-._ ") else "_" for c in name)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"


async def _send(
    request: web.Request,
    response: web.StreamResponse,
    artefacts: Artefacts,
    digest: str,
    part: tuple[int, int],
) -> None:
    """Send a part of an artefact.

    What fails after the headers are out cuts the connection: the caller sees by the length that
    something is missing, and can go on from there.
    """
    start, stop = part
    await response.prepare(request)
    try:
        reading = artefacts.read(digest, start, stop)
        async with contextlib.aclosing(reading) as blocks:  # type: ignore[type-var]
            async for block in blocks:
                async with asyncio.timeout(STALL_S):
                    await response.write(block)
        await response.write_eof()
    except (BusError, TimeoutError) as error:
        cause = error.message if isinstance(error, BusError) else "the reader takes nothing"
        log.warning("artefact.unsent", digest=digest, cause=cause)
        if request.transport is not None:
            request.transport.abort()

"""Bodies as they come in: block by block, in time, raw or as the parts of a form."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

import aiohttp
from aiohttp import BodyPartReader, hdrs, web
from aiohttp.http_exceptions import HttpProcessingError

from bus.errors import DeadlineExceeded, InvalidRequest, TooLarge
from services.gateway.uploads import CutOff

# A caller that sends nothing more for this long has gone.
STALL_S: Final = 60.0
BLOCK_BYTES: Final = 64 * 1024
PARTS_MAX: Final = 100

T = TypeVar("T")


async def hold_back(_request: web.Request) -> None:
    """Send no `100 Continue` yet: who may not, or has too much, shall hear it before sending."""


async def blocks_of(request: web.Request) -> AsyncIterator[bytes]:
    """Give the blocks of a request's body as they come.

    Raises:
        CutOff: It is cut off.
        DeadlineExceeded: Nothing came for `STALL_S`.
    """
    await _welcome(request)
    while block := await _in_time(request.content.readany()):
        yield block


async def begun(
    blocks: AsyncIterator[bytes], *, may_be_empty: bool = False
) -> tuple[bytes, AsyncIterator[bytes]]:
    """Return the first block, and all of them.

    Raises:
        InvalidRequest: There is none.
    """
    first = await anext(blocks, b"")
    if not first and not may_be_empty:
        raise InvalidRequest("the body is empty; send the file's bytes")

    async def all_of_them() -> AsyncIterator[bytes]:
        if first:
            yield first
        async for block in blocks:
            yield block

    return first, all_of_them()


async def parts_of(request: web.Request) -> AsyncGenerator[BodyPartReader]:
    """Give the parts of a form as they come; each is read before the next is asked for.

    Raises:
        InvalidRequest: It is no form, has another form inside, or more than `PARTS_MAX` parts.
        CutOff, DeadlineExceeded: As `blocks_of`.
    """
    await _welcome(request)
    with _as_a_form():
        form = await request.multipart()
    for _ in range(PARTS_MAX):
        with _as_a_form():
            part = await _in_time(form.next())
        if part is None:
            return
        if not isinstance(part, BodyPartReader):
            raise InvalidRequest("a form inside the form is not taken; send plain parts")
        yield part
    raise InvalidRequest(f"the form has more than {PARTS_MAX} parts")


async def chunks_of(part: BodyPartReader) -> AsyncIterator[bytes]:
    """Give the blocks of a form's part as they come; raises as `parts_of` does."""
    with _as_a_form():
        while block := await _in_time(part.read_chunk(BLOCK_BYTES)):
            yield block


async def whole_part(part: BodyPartReader, max_bytes: int) -> bytes:
    """Return all of a form's part.

    Raises:
        TooLarge: It has more than `max_bytes`.
        BusError: As `parts_of`.
    """
    raw = bytearray()
    async for block in chunks_of(part):
        raw += block
        if len(raw) > max_bytes:
            raise TooLarge(
                f"the field {part.name} has more than {max_bytes:,} bytes", field=part.name
            )
    return bytes(raw)


@contextmanager
def _as_a_form() -> Iterator[None]:
    """Say what is wrong with a form that aiohttp cannot read."""
    try:
        yield
    except (ValueError, AssertionError) as error:
        raise InvalidRequest(f"the body is not a form as Content-Type says: {error}") from None


async def _welcome(request: web.Request) -> None:
    """Send the `100 Continue` that `hold_back` held back."""
    if request.headers.get(hdrs.EXPECT, "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        # The answer has not begun yet; aiohttp does the same.
        request.writer.output_size = 0


async def _in_time(reading: Awaitable[T]) -> T:
    """Return what comes next of the body, in time."""
    try:
        async with asyncio.timeout(STALL_S):
            return await reading
    except TimeoutError:
        raise DeadlineExceeded(f"nothing more of the file came for {STALL_S:g} s") from None
    except (
        web.RequestPayloadError,
        web.PayloadAccessError,
        aiohttp.ClientPayloadError,
        HttpProcessingError,
        ConnectionError,
    ) as error:
        raise CutOff(f"the body is cut off: {type(error).__name__}") from None

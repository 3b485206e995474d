"""Bodies as they come in: block by block, in time, raw or as the parts of a form.

What is too large for one message of the bus is put aside as it comes (`bus.bodies`).
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

import aiohttp
from aiohttp import BodyPartReader, HttpVersion11, hdrs, web
from aiohttp.http_exceptions import HttpProcessingError

from bus.bodies import too_large
from bus.client import Client, Reference
from bus.errors import DeadlineExceeded, InvalidRequest, TooLarge
from bus.instance import Instance
from services.gateway.room import Room
from services.gateway.translate import BODY_PATIENCE_S, cut_off, read_body, translated
from services.gateway.uploads import CutOff

# A caller that sends nothing more for this long has gone.
STALL_S: Final = 60.0
BLOCK_BYTES: Final = 64 * 1024
PARTS_MAX: Final = 100
CONTINUE: Final = "100-continue"
# A body that somebody waits on has `BODY_PATIENCE_S` for each so many bytes begun.
PATIENCE_BYTES: Final = 16 * 1024**2

T = TypeVar("T")


Expecting = Callable[[web.Request], Awaitable[web.StreamResponse | None]]


def expecting(instance: Instance, *, hold_back: bool) -> Expecting:
    """Return what takes the header `Expect`; anything but `100-continue` is 417.

    Args:
        instance: Counts what is refused.
        hold_back: Send no `100 Continue` yet: who may not, or has too much, shall hear it before
            sending.
    """
    refuse = translated(instance, _refuse_expectation)

    async def expect(request: web.Request) -> web.StreamResponse | None:
        # HTTP/1.0 has no such thing, and what stands there means nothing.
        if request.version < HttpVersion11:
            return None
        if request.headers[hdrs.EXPECT].lower() != CONTINUE:
            return await refuse(request)
        if not hold_back:
            await _welcome(request)
        return None

    return expect


async def _refuse_expectation(request: web.Request) -> web.StreamResponse:
    said = request.headers[hdrs.EXPECT][:40]
    raise web.HTTPExpectationFailed(text=f"Expect is {said!r}; {CONTINUE} is taken")


async def body_for_bus(request: web.Request, client: Client, room: Room) -> bytes | Reference:
    """Return a request's body as it can be asked with.

    What is too large for one message is put aside as it comes; whoever gets its reference asks
    with it at once. No more than one message's worth is held here.

    Raises:
        TooLarge: There is more than can be asked with; said before the rest is read.
        Overloaded: There is no room for it.
        NoSpace: The store is full just now.
        InvalidRequest: It is cut off, or not encoded as it says.
        DeadlineExceeded: It did not come in time.
    """
    most = client.max_payload
    if _is_here(request, most):
        body = await read_body(request, most)
        room.hold(len(body))
        return body
    check_length(request, client.body_max_bytes)
    announced = request.content_length or 0
    room.hold(min(announced, most))
    blocks = _blocks_in_time(request)
    if announced > most:
        return await _put_aside(client, room, b"", blocks)
    held = bytearray()
    async for block in blocks:
        held += block
        room.hold_at_least(min(len(held), most))
        if len(held) > most:
            return await _put_aside(client, room, held, blocks)
    return bytes(held)


async def whole_body(request: web.Request, room: Room, max_bytes: int) -> bytes:
    """Return all of a request's body; raises as `body_for_bus` does."""
    if _is_here(request, max_bytes):
        body = await read_body(request, max_bytes)
        room.hold(len(body))
        return body
    check_length(request, max_bytes)
    room.hold(request.content_length or 0)
    held = bytearray()
    async for block in _blocks_in_time(request):
        held += block
        if len(held) > max_bytes:
            raise too_large(len(held), max_bytes, or_more=True)
        room.hold_at_least(len(held))
    return bytes(held)


def check_length(request: web.Request, max_bytes: int) -> None:
    """Refuse what says of itself that it is too large, before any of it is read."""
    if (announced := request.content_length or 0) > max_bytes:
        raise too_large(announced, max_bytes)


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


async def whole_part(
    part: BodyPartReader, max_bytes: int, grown: Callable[[int], None] = lambda _size: None
) -> bytes:
    """Return all of a form's part.

    Args:
        part: The part.
        max_bytes: How many bytes it may have.
        grown: Is told how many have come; may refuse.

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
        grown(len(raw))
    return bytes(raw)


def _is_here(request: web.Request, most: int) -> bool:
    """Tell whether a whole body came with the headers, as small ones do, and is no larger."""
    content = request.content
    return content.is_eof() and content.exception() is None and content.total_bytes <= most


async def _blocks_in_time(request: web.Request) -> AsyncIterator[bytes]:
    """Give the blocks of a body that somebody waits on."""
    began, came = asyncio.get_running_loop().time(), 0
    while True:
        patience_s = BODY_PATIENCE_S * (1 + came // PATIENCE_BYTES)
        try:
            async with asyncio.timeout_at(began + patience_s):
                block = await request.content.readany()
        except (web.RequestPayloadError, web.PayloadAccessError) as error:
            raise cut_off(request, error) from None
        except TimeoutError:
            raise DeadlineExceeded(
                f"of the body {came:,} bytes came within {patience_s:g} s, and not the rest"
            ) from None
        if not block:
            return
        came += len(block)
        yield block


async def _put_aside(
    client: Client, room: Room, held: bytes | bytearray, blocks: AsyncIterator[bytes]
) -> Reference:
    """Put aside what came of a body, and all that comes."""

    async def all_of_it() -> AsyncIterator[bytes]:
        nonlocal held
        if held:
            yield bytes(held)
        held = b""
        async for block in blocks:
            yield block

    reference = await client.bodies.put(all_of_it())
    room.hold(0)
    return reference


@contextmanager
def _as_a_form() -> Iterator[None]:
    """Say what is wrong with a form that aiohttp cannot read."""
    try:
        yield
    except (ValueError, AssertionError) as error:
        raise InvalidRequest(f"the body is not a form as Content-Type says: {error}") from None


async def _welcome(request: web.Request) -> None:
    """Send the `100 Continue` that somebody waits for, if so."""
    if request.headers.get(hdrs.EXPECT, "").lower() == CONTINUE:
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

"""Bodies as they come in: block by block, in time, raw or as the parts of a form.

What is too large for one message of the bus is put aside as it comes (`bus.bodies`).
"""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

import aiohttp
from aiohttp import BodyPartReader, web
from aiohttp.http_exceptions import HttpProcessingError

from bus.bodies import too_large
from bus.client import Client, Reference
from bus.errors import InvalidRequest, TooLarge
from services.gateway.patience import Patience, for_body, for_file
from services.gateway.room import Room
from services.gateway.translate import cut_off, read_body
from services.gateway.uploads import CutOff

BLOCK_BYTES: Final = 64 * 1024
PARTS_MAX: Final = 100

T = TypeVar("T")


async def body_for_bus(
    request: web.Request, client: Client, room: Room, timeout_s: float
) -> bytes | Reference:
    """Return a request's body as it can be asked with.

    What is too large for one message is put aside as it comes; whoever gets its reference asks
    with it at once. No more than one message's worth is held here.

    Args:
        request: The request.
        client: Puts it aside.
        room: For it.
        timeout_s: How long its caller waits for anything but itself.

    Raises:
        TooLarge: There is more than can be asked with; said before the rest is read.
        Overloaded: There is no room for it.
        Unavailable: There is none in the store, for what comes through here or for anybody.
        InvalidRequest: It is cut off, or not encoded as it says.
        TooSlow: It did not come in time.
        DeadlineExceeded: It was not stored in time.
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
        return await _put_aside(client, room, b"", blocks, announced, timeout_s)
    held = bytearray()
    async for block in blocks:
        held += block
        room.hold_at_least(min(len(held), most))
        if len(held) > most:
            return await _put_aside(client, room, held, blocks, len(held), timeout_s)
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
    """Give the blocks of a file that is a request's body as they come.

    Raises:
        CutOff: It is cut off.
        TooSlow: Nothing came for too long.
    """
    patience = await for_file(request)
    while block := await _in_time(request.content.readany(), patience):
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


async def parts_of(request: web.Request, patience: Patience) -> AsyncGenerator[BodyPartReader]:
    """Give the parts of a form as they come; each is read before the next is asked for.

    Args:
        request: The form.
        patience: With whoever sends it; the one for its parts, too.

    Raises:
        InvalidRequest: It is no form, has another form inside, or more than `PARTS_MAX` parts.
        CutOff, TooSlow: As `blocks_of`.
    """
    with _as_a_form():
        form = await request.multipart()
    for _ in range(PARTS_MAX):
        with _as_a_form():
            part = await _in_time(form.next(), patience)
        if part is None:
            return
        if not isinstance(part, BodyPartReader):
            raise InvalidRequest("a form inside the form is not taken; send plain parts")
        yield part
    raise InvalidRequest(f"the form has more than {PARTS_MAX} parts")


async def chunks_of(part: BodyPartReader, patience: Patience) -> AsyncIterator[bytes]:
    """Give the blocks of a form's part as they come; raises as `parts_of` does."""
    with _as_a_form():
        while block := await _in_time(part.read_chunk(BLOCK_BYTES), patience):
            yield block


async def whole_part(
    part: BodyPartReader,
    patience: Patience,
    max_bytes: int,
    grown: Callable[[int], None] = lambda _size: None,
) -> bytes:
    """Return all of a form's part.

    Args:
        part: The part.
        patience: With whoever sends it.
        max_bytes: How many bytes it may have.
        grown: Is told how many have come; may refuse.

    Raises:
        TooLarge: It has more than `max_bytes`.
        BusError: As `parts_of`.
    """
    raw = bytearray()
    async for block in chunks_of(part, patience):
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
    patience = await for_body(request)
    try:
        while block := await patience.wait(request.content.readany()):
            yield block
    except (web.RequestPayloadError, web.PayloadAccessError) as error:
        raise cut_off(request, error) from None


async def _put_aside(
    client: Client,
    room: Room,
    held: bytes | bytearray,
    blocks: AsyncIterator[bytes],
    announced: int,
    timeout_s: float,
) -> Reference:
    """Put aside what came of a body, and all that comes."""

    async def all_of_it() -> AsyncIterator[bytes]:
        nonlocal held
        if held:
            yield bytes(held)
        held = b""
        async for block in blocks:
            yield block

    reference = await client.bodies.put(all_of_it(), announced, timeout_s)
    room.hold(0)
    return reference


@contextmanager
def _as_a_form() -> Iterator[None]:
    """Say what is wrong with a form that aiohttp cannot read."""
    try:
        yield
    except (ValueError, AssertionError) as error:
        raise InvalidRequest(f"the body is not a form as Content-Type says: {error}") from None


async def _in_time(reading: Awaitable[T], patience: Patience) -> T:
    """Return what comes next of a file or a form."""
    try:
        return await patience.wait(reading)
    except (
        web.RequestPayloadError,
        web.PayloadAccessError,
        aiohttp.ClientPayloadError,
        HttpProcessingError,
        ConnectionError,
    ) as error:
        raise CutOff(f"the body is cut off: {type(error).__name__}") from None

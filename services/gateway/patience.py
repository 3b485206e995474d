"""How long a caller may take to send a body: waiting uses it up, what comes gives it back.

So a body that stops coming is given up soon, however much of it came before, and one that comes
may take as long as so many bytes do at the least rate.
"""

from asyncio import get_running_loop, timeout
from collections.abc import Awaitable
from typing import Final, TypeVar

from aiohttp import HttpVersion11, StreamReader, hdrs, web

from bus.errors import DeadlineExceeded

# How long nothing may come of a body that somebody waits on.
PATIENCE_S: Final = 30.0
# The least rate beyond that, in bytes a second: what `Options` read.
RATE: Final = web.AppKey("rate", int)
RATE_SETTING: Final = "BKG_BODY_MIN_BYTES_PER_S"
# A photo of four megabytes over a poor mobile line comes through.
RATE_DEFAULT: Final = 16 * 1024
# What is put aside of a body is kept for `bus.assets.BODY_AGE_S`, and its answer may take 300 s.
ALL_S: Final = 540.0
# Of a file, which may be large and its sender far away, nothing may come for this long; it may
# take as long as it likes.
STALL_S: Final = 60.0

_CONTINUE: Final = "100-continue"
_HELD_BACK: Final = web.RequestKey("held back", bool)

T = TypeVar("T")


class TooSlow(DeadlineExceeded):
    """The caller took too long to send the body."""

    code = "request-timeout"
    number = 408


class Patience:
    """Patience with whoever sends one body.

    Args:
        content: The body as it comes.
        limit_s: How long nothing may come.
        bytes_per_s: How many bytes give back a second; 0: any byte gives back all.
        all_s: How long may be waited in all; None: for ever.
        what: What the body is called.
    """

    def __init__(
        self,
        content: StreamReader,
        limit_s: float,
        bytes_per_s: int = 0,
        all_s: float | None = None,
        what: str = "body",
    ) -> None:
        self._content = content
        self._limit_s = limit_s
        self._bytes_per_s = bytes_per_s
        self._all_s = all_s
        self._what = what
        self._left_s = limit_s
        self._waited_s = 0.0
        self._come = content.total_bytes

    async def wait(self, reading: Awaitable[T]) -> T:
        """Return what is read of the body; only that is waiting, not what is done with it.

        Raises:
            TooSlow: There is no patience left; says what came, and what should have come.
        """
        loop = get_running_loop()
        began = loop.time()
        try:
            async with timeout(self._at_most_s()):
                found = await reading
        except TimeoutError:
            raise self._too_slow(loop.time() - began) from None
        self._go_on(loop.time() - began)
        return found

    def _at_most_s(self) -> float:
        if self._all_s is None:
            return self._left_s
        return min(self._left_s, self._all_s - self._waited_s)

    def _go_on(self, waited_s: float) -> None:
        self._waited_s += waited_s
        come = self._content.total_bytes - self._come
        self._come += come
        if come and not self._bytes_per_s:
            self._left_s = self._limit_s
        else:
            given_s = come / self._bytes_per_s if come else 0.0
            self._left_s = min(self._limit_s, self._left_s - waited_s + given_s)

    def _too_slow(self, waited_s: float) -> TooSlow:
        come, waited_all_s = self._content.total_bytes, self._waited_s + waited_s
        if self._all_s is not None and waited_all_s >= self._all_s:
            return TooSlow(
                f"the {self._what} did not come within {self._all_s:g} s, but {come:,} bytes of it"
            )
        if come == self._come and waited_s > 0.9 * self._limit_s:
            return TooSlow(
                f"nothing more of the {self._what} came for {waited_s:.3g} s, after {come:,} bytes"
            )
        return TooSlow(
            f"the {self._what} comes too slowly: {come:,} bytes in {waited_all_s:.3g} s, beyond "
            f"{self._limit_s:g} s it must be {self._bytes_per_s:,} in each; {RATE_SETTING} of the "
            "gateway changes that"
        )


async def for_body(request: web.Request) -> Patience:
    """Have the caller send the body that it waits for the answer to; return the patience for it."""
    await _welcome(request)
    return Patience(request.content, PATIENCE_S, request.app[RATE], ALL_S)


async def for_file(request: web.Request) -> Patience:
    """Have the caller send a file; return the patience for it."""
    await _welcome(request)
    return Patience(request.content, STALL_S, what="file")


async def hold_back(request: web.Request) -> None:
    """Send no `100 Continue` yet: who may not, or has too much, shall hear it before sending.

    Raises:
        HTTPExpectationFailed: Something else is expected.
    """
    expected = request.headers.get(hdrs.EXPECT, "")
    if expected.lower() != _CONTINUE and request.version >= HttpVersion11:
        raise web.HTTPExpectationFailed(
            text=f"Expect is {expected[:60]!r}; what can be expected is {_CONTINUE}"
        )
    request[_HELD_BACK] = True


def is_held_back(request: web.Request) -> bool:
    """Tell whether the caller waits for a `100 Continue` that it was not sent, with its body."""
    return bool(request.get(_HELD_BACK)) and not request.content.is_eof()


async def _welcome(request: web.Request) -> None:
    """Send the `100 Continue` that `hold_back` held back."""
    if request.pop(_HELD_BACK, False) and request.version >= HttpVersion11:
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        # The answer has not begun yet; aiohttp does the same.
        request.writer.output_size = 0

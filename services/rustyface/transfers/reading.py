"""A dataset file read in a thread, batch by batch, and looked through as a whole."""

import contextlib
import hashlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from bus.tasks import to_its_end
from services.rustyface.transfers.files import Head, Reader, RejectionRow, Row
from services.rustyface.transfers.files.rows import Kind, refuse

Open = Callable[[], Reader]
R = TypeVar("R", Row, RejectionRow)


@dataclass(frozen=True)
class Sound:
    """A file that can be taken in as a whole: how many rows, and what it says of itself."""

    total: int
    head: Head


async def checked(
    opened: Open, look: Callable[[list[Row], int, int | None], Awaitable[None]] | None = None
) -> Sound:
    """Read a file to its end.

    Args:
        opened: Opens it from the start.
        look: Is awaited with each batch, where it begins, and how many rows there are.

    Raises:
        Unprocessable: It cannot be taken; says which entry, and why.
    """
    file = await to_its_end(opened)
    seen, first = _Seen(), 0
    async with contextlib.aclosing(batches(file.batches())) as found:
        async for rows in found:
            seen.add(rows)
            if look is not None:
                await look(rows, first, file.total)
            first += len(rows)
    rejections = _Seen()
    async with contextlib.aclosing(batches(file.rejections())) as said:
        async for one in said:
            rejections.add(one)
    if doubled := await to_its_end(seen.doubled):
        again = await to_its_end(opened)
        await _refuse_doubled(again.batches(), doubled, "entry")
    if doubled := await to_its_end(rejections.doubled):
        await _refuse_doubled(file.rejections(), doubled, "rejection")
    return Sound(first, file.head)


async def batches(rows: Iterator[list[R]]) -> AsyncGenerator[list[R]]:
    """Give the rows of a file, read in a thread: a cancelled job waits for one batch at most."""
    try:
        while (batch := await to_its_end(next, rows, None)) is not None:
            yield batch
    finally:
        close = getattr(rows, "close", None)
        if close is not None:
            close()


class _Seen:
    """Which ids there were: eight bytes of a digest for each, so that millions have room."""

    def __init__(self) -> None:
        self._digests = bytearray()

    def add(self, rows: Iterable[Row | RejectionRow]) -> None:
        for row in rows:
            self._digests += _digest(row.id)

    def doubled(self) -> set[bytes]:
        """Return the digests that came more than once."""
        sorted_ = np.sort(np.frombuffer(self._digests, np.uint64))
        return {one.tobytes() for one in sorted_[1:][sorted_[1:] == sorted_[:-1]]}


async def _refuse_doubled(rows: Iterator[list[R]], doubled: set[bytes], what: Kind) -> None:
    """Raise Unprocessable if one of these ids is there twice; two ids may share a digest."""
    first_at: dict[str, int] = {}
    index = 0
    async with contextlib.aclosing(batches(rows)) as found:
        async for batch in found:
            for row in batch:
                if _digest(row.id) in doubled:
                    if row.id in first_at:
                        first = first_at[row.id]
                        said = f"its id is that of {what} {first:,} already"
                        refuse(index, row.id, said, what=what)
                    first_at[row.id] = index
                index += 1


def _digest(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=8).digest()

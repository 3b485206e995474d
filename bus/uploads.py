"""An upload on its way into the object store: chunks in their order, whatever happens to them.

Chunks are sent some ahead of their acknowledgements. After a failure nobody knows which of those
were stored, so they are looked for, deleted, and sent anew one by one. Before the name is written
the broker's count must be ours: with the sequences of all chunks in rising order, what is stored
is what was sent.
"""

import asyncio
import contextlib
import hashlib
from collections import deque
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

import structlog

from bus.errors import BusError, Conflict, InvalidRequest, NoSpace, Unavailable, Unprocessable
from bus.streams import Stored, StoreFullError, Stream

CHUNK_BYTES: Final = 128 * 1024
# Chunks that wait for their acknowledgements: 4 MiB, 80 MB/s at a round trip of 50 ms.
WINDOW: Final = 32
ACK_S: Final = 30.0
LOOK_S: Final = 0.5
# How long a broker that went away in the middle may take to come back.
RECOVER_S: Final = 30.0
LEAVE_S: Final = 10.0
# Of a chunk: at which byte it begins.
OFFSET: Final = "Bkg-Offset"

log = structlog.get_logger("bus.uploads")


class Committed(NamedTuple):
    """An upload that has become an artefact: its SHA-256 in hex, and its size in bytes."""

    digest: str
    size: int


class Naming(Protocol):
    """What an upload asks of the store that it goes into."""

    async def name(self, digest: str, upload: "Upload") -> bool:
        """Give chunks their name, once; tell whether they are the ones that it leads to now."""

    async def full(self, error: StoreFullError, taken_bytes: int) -> NoSpace:
        """Return the error for whoever wanted to store more than there is room for."""

    async def drop(self, upload_id: str) -> None:
        """Delete what is stored of an upload."""


@dataclass
class _Sent:
    """A chunk on its way, at an offset; the answer is its sequence."""

    at: int
    body: bytes
    answer: asyncio.Task[int]
    reconnects: int


class Upload:
    """Bytes on their way into the store; made by `Artefacts.writing` and `resuming`.

    One task writes. Memory is bounded: `write` returns when its bytes are sent, and no more than
    `WINDOW` chunks wait for the broker's acknowledgement.

    Attributes:
        id: Names it for `resuming` and `discard`.
        offset: How many bytes it has taken.
        chunks: How many chunks are stored.

    Args:
        stream: Where its chunks go.
        subject: Under which subject.
        upload_id: Its id.
        naming: Gives it its name.
    """

    def __init__(self, stream: Stream, subject: str, upload_id: str, naming: "Naming") -> None:
        self.id = upload_id
        self.offset = 0
        self.chunks = 0
        self._stream = stream
        self._subject = subject
        self._naming = naming
        self._sha = hashlib.sha256()
        self._tail = bytearray()
        self._window: deque[_Sent] = deque()
        self._stored_bytes = 0
        self._last_seq = 0
        self._kept = False
        self._ended = False

    async def write(self, block: bytes | bytearray | memoryview) -> None:
        """Take more bytes; waits while too many are on their way.

        Raises:
            NoSpace: The store is full.
            Unavailable: The broker went away and did not come back in time.
        """
        self._check_open()
        view = memoryview(block).cast("B")
        while view:
            room = CHUNK_BYTES - len(self._tail)
            piece, view = view[:room], view[room:]
            self._tail += piece
            self._sha.update(piece)
            self.offset += len(piece)
            if len(self._tail) == CHUNK_BYTES:
                await self._send()

    async def commit(self, sha256: str | None = None) -> Committed:
        """Make the bytes an artefact; the same bytes are stored once.

        Args:
            sha256: What they must come to, in hex.

        Raises:
            Unprocessable: They come to another digest.
            Unavailable: As `write`.
            Conflict: Somebody else writes this upload, or has discarded it.
        """
        self._check_open()
        digest = self._sha.hexdigest()
        if sha256 is not None and sha256.lower() != digest:
            self._kept = False
            raise other_digest(digest, sha256)
        await self._settle()
        await self._check_count()
        if await self._naming.name(digest, self):
            self._ended = True
        else:
            self._kept = False
        return Committed(digest, self.offset)

    async def keep(self) -> None:
        """Leave the bytes in the store for `resuming`: those so far, and those still to come.

        Raises:
            Unavailable: As `write`.
        """
        self._check_open()
        self._kept = True
        await self._settle()

    async def take_up(self) -> None:
        """Read what is stored of it, as far as it is without a gap; the rest is deleted.

        It is kept from now on, as it was before.
        """
        self._kept = True
        surplus: list[int] = []
        chunks = self._stream.read(self._subject)
        async with contextlib.aclosing(chunks):  # type: ignore[type-var]
            async for chunk in chunks:
                if surplus or not follows(chunk, self.offset):
                    surplus.append(chunk.seq)
                    continue
                self._sha.update(chunk.body)
                self.offset += len(chunk.body)
                self.chunks += 1
                self._last_seq, self._stored_bytes = chunk.seq, self.offset
        for seq in surplus:
            await self._stream.remove(seq)

    async def leave(self) -> None:
        """End: what is kept is stored as far as it can be, and what nobody keeps is deleted."""
        try:
            async with asyncio.timeout(LEAVE_S):
                if self._kept and not self._ended:
                    await self._settle()
                elif self._window:
                    # What is on its way would come in behind the purge.
                    await asyncio.wait({sent.answer for sent in self._window})
        except (BusError, TimeoutError) as error:
            log.info("upload.shortened", upload=self.id, cause=str(error))
        finally:
            await self._call_off()
        if self._ended or self._kept:
            self._ended = True
            return
        self._ended = True
        try:
            async with asyncio.timeout(LEAVE_S):
                await self._naming.drop(self.id)
        except (BusError, TimeoutError) as error:
            # Whoever collects garbage finds it.
            log.warning("upload.left", upload=self.id, cause=str(error))

    # --- Chunks on their way ----------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._ended:
            raise InvalidRequest(f"the upload {self.id} has ended")

    async def _send(self) -> None:
        """Send the tail as a chunk, as soon as there is a place in the window."""
        while len(self._window) >= WINDOW:
            await self._take_answer()
        at, body = self.offset - len(self._tail), bytes(self._tail)
        self._tail.clear()
        answer = asyncio.create_task(self._append(at, body))
        self._window.append(_Sent(at, body, answer, self._stream.reconnects))

    async def _append(self, at: int, body: bytes) -> int:
        return await self._stream.append_once(self._subject, body, {OFFSET: str(at)}, ACK_S)

    async def _settle(self) -> None:
        """Send what is left, and wait until all is stored."""
        if self._tail:
            await self._send()
        while self._window:
            await self._take_answer()

    async def _take_answer(self) -> None:
        """Wait for the acknowledgement of the oldest chunk that is on its way."""
        sent = self._window[0]
        while not sent.answer.done() and self._stream.reconnects == sent.reconnects:
            await asyncio.wait({sent.answer}, timeout=LOOK_S)
        seq = 0
        if sent.answer.done():
            try:
                seq = sent.answer.result()
            except StoreFullError as error:
                raise await self._naming.full(error, self._stored_bytes) from None
            except BusError as error:
                log.info("upload.interrupted", upload=self.id, cause=error.message)
        if seq > self._last_seq:
            self._count_in(sent, seq)
            self._window.popleft()
        else:
            await self._recover()

    async def _call_off(self) -> None:
        for sent in self._window:
            sent.answer.cancel()
        await asyncio.gather(*(sent.answer for sent in self._window), return_exceptions=True)

    def _count_in(self, sent: _Sent, seq: int) -> None:
        self._last_seq = seq
        self.chunks += 1
        self._stored_bytes += len(sent.body)

    async def _recover(self) -> None:
        """Store what is on its way one by one behind the last chunk that is known to be there."""
        await self._call_off()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + RECOVER_S
        pause_s, cause = 0.1, "it does not answer"
        while self._window:
            try:
                async with asyncio.timeout_at(deadline):
                    await self._remove_strays()
                    while self._window:
                        await self._store_one(self._window[0])
                        self._window.popleft()
                        deadline = loop.time() + RECOVER_S
            except StoreFullError as error:
                raise await self._naming.full(error, self._stored_bytes) from None
            except (Unavailable, Conflict) as error:
                cause = error.message
            except TimeoutError:
                pass
            if self._window:
                if loop.time() + pause_s > deadline:
                    raise Unavailable(
                        f"the broker took nothing more of the upload {self.id} for "
                        f"{RECOVER_S:g} s, behind {self._stored_bytes:,} bytes: {cause}",
                        retry_after_s=5,
                    )
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, 2.0)

    async def _store_one(self, sent: _Sent) -> None:
        headers = {OFFSET: str(sent.at)}
        # Whatever of us was still on its way is stored before this, and then it is refused.
        expect = self._subject, self._last_seq
        seq = await self._stream.append(self._subject, sent.body, headers=headers, expect=expect)
        self._count_in(sent, seq)

    async def _remove_strays(self) -> None:
        """Delete the chunks behind the last one that is known to be there in its order."""
        chunks = self._stream.read(self._subject, after=self._last_seq)
        async with contextlib.aclosing(chunks):  # type: ignore[type-var]
            strays = [chunk.seq async for chunk in chunks]
        for seq in strays:
            await self._stream.remove(seq)

    async def _check_count(self) -> None:
        count = (await self._stream.occupied(self._subject)).subjects.get(self._subject, 0)
        if count != self.chunks or self._stored_bytes != self.offset:
            raise Conflict(
                f"the upload {self.id} is not whole: of {self.chunks:,} chunks that were sent "
                f"{count:,} are there; somebody else writes it, or has discarded it; send it again"
            )


def other_digest(found: str, said: str) -> Unprocessable:
    """Return what is told of bytes that come to another digest than was said."""
    return Unprocessable(
        f"the bytes have the SHA-256 {found}, but {said} was said; send them again",
        field="sha256",
    )


def follows(chunk: Stored, at: int) -> bool:
    """Tell whether a chunk begins at a byte, as far as it says where it begins."""
    return int(chunk.headers.get(OFFSET, at)) == at

"""Bodies of requests that are too large for one message: put aside, fetched, gone with the request.

Whoever asks puts the body into an object store of its own and says in headers which object it is.
Whoever answers fetches it. When the request is over, whoever asked deletes it; should that process
die, the store does, by age. `docs/decisions/0018-bodies-by-reference.md` says why it is so.
"""

import asyncio
import contextlib
import hashlib
import io
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Coroutine, Mapping
from typing import Any, Final, NamedTuple, TypeVar

import structlog

from bus.errors import (
    BusError,
    Conflict,
    DeadlineExceeded,
    InvalidRequest,
    NoSpace,
    TooLarge,
    Unavailable,
    Unprocessable,
)
from bus.objects import chunks_subject, description, info_of, message, name_subject
from bus.settings import BODIES_SHARE_BYTES, BODY_MAX_BYTES
from bus.streams import StoreFullError, Stream
from bus.uploads import Upload

# Of a request: the object that is its body, how many bytes that has, and its SHA-256 in hex.
BODY: Final = "Bkg-Body"
BODY_BYTES: Final = "Bkg-Body-Bytes"
BODY_SHA256: Final = "Bkg-Body-Sha256"
REFERENCE: Final = frozenset({BODY, BODY_BYTES, BODY_SHA256})
# Travels in the body's place. Neither JSON nor MessagePack: a worker that does not know the headers
# refuses it, where it would take an empty body for an empty request.
IN_ITS_PLACE: Final = b"see the header Bkg-Body"
DELETE_S: Final = 10.0
# How long what is called off may take to end.
END_S: Final = 1.0
# Of those that have come: computing a digest holds up everybody else.
CHUNKS_IN_A_TURN: Final = 8
# On average. They have 128 KiB unless somebody says otherwise; each is a message, and takes a
# kilobyte and 50 us here however little is in it.
CHUNK_MIN_BYTES: Final = 4 * 1024
RETRY_AFTER_S: Final = 1.0

log = structlog.get_logger("bus.bodies")

T = TypeVar("T")


class Reference(NamedTuple):
    """A body that is put aside.

    Attributes:
        name: The object's name.
        size: How many bytes it has.
        sha256: Their SHA-256, in hex.
    """

    name: str
    size: int
    sha256: str

    @property
    def headers(self) -> dict[str, str]:
        """What says so on a request."""
        return {BODY: self.name, BODY_BYTES: str(self.size), BODY_SHA256: self.sha256}


def reference_in(headers: Mapping[str, str]) -> Reference:
    """Return the reference that a request's headers are.

    Raises:
        InvalidRequest: One is missing, or cannot be; names it.
    """
    size, sha256 = headers.get(BODY_BYTES, ""), headers.get(BODY_SHA256, "").lower()
    if not _SIZE.fullmatch(size):
        raise InvalidRequest(
            f"{BODY_BYTES} is {size[:40]!r}; beside {BODY} it says how many bytes the body has",
            field=BODY_BYTES,
        )
    if not _SHA256.fullmatch(sha256):
        raise InvalidRequest(
            f"{BODY_SHA256} is {sha256[:80]!r}; beside {BODY} it is the body's SHA-256 in hex",
            field=BODY_SHA256,
        )
    return Reference(headers[BODY], int(size), sha256)


def too_large(size: int, max_bytes: int, *, or_more: bool = False) -> TooLarge:
    """Return what is said of too large a body."""
    return TooLarge(
        f"the body has {size:,} bytes{' or more' if or_more else ''}, allowed are {max_bytes:,}; "
        f"{BODY_MAX_BYTES} changes that"
    )


class Bodies:
    """The object store of bodies.

    Args:
        stream: The stream behind it.
        bucket: Its name.
        max_bytes: How large one may be.
        share_bytes: How many bytes may be here from this process: what comes slowly, or is worked
            on for long, leaves others their room.

    Attributes:
        max_bytes: As above.
        share_bytes: As above.
    """

    def __init__(self, stream: Stream, bucket: str, max_bytes: int, share_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.share_bytes = share_bytes
        self._stream = stream
        self._bucket = bucket
        # What is here from this process, or has room promised, in bytes by name.
        self._ours: dict[str, int] = {}
        # Taking out what nobody needs any more.
        self._leaving: set[asyncio.Task[None]] = set()

    def check_size(self, size: int, *, or_more: bool = False) -> None:
        """Raise TooLarge if a body of this size, or more, is not taken."""
        if size > self.max_bytes:
            raise too_large(size, self.max_bytes, or_more=or_more)

    async def put(
        self, blocks: AsyncIterator[bytes], size: int = 0, within_s: float | None = None
    ) -> Reference:
        """Put a body aside as it comes, and return its reference.

        Whoever has that asks with it, or lets go of it. A caller that goes, or has no time left,
        does not wait until what had come is out again.

        Args:
            blocks: The body.
            size: How many bytes will come, as far as that is known.
            within_s: How long the store may take for all of them; that they come is not counted.

        Raises:
            DeadlineExceeded: They were not stored in time.
            TooLarge: It has more than `max_bytes`.
            Unavailable: This process has no room left for it; or the broker went away and did not
                come back in time.
            NoSpace: The store is full just now.
        """
        name = secrets.token_hex(11)
        upload = Upload(self._stream, chunks_subject(self._bucket, name), name, self)
        in_time = _InTime(within_s, upload)
        self._make_room(name, size)
        try:
            async for block in blocks:
                come = upload.offset + len(block)
                self.check_size(come, or_more=True)
                self._make_room(name, come, or_more=True)
                await in_time.wait(upload.write(block))
            done = await in_time.wait(upload.commit())
        except BaseException:
            self._take_out(name, self._give_up(upload))
            raise
        return Reference(name, done.size, done.digest)

    async def fetch(self, reference: Reference) -> bytes:
        """Return a body.

        Raises:
            Conflict: It is not there, or no longer.
            Unprocessable: It is not what the reference says.
        """
        last = await self._stream.last(name_subject(self._bucket, reference.name))
        info = info_of(last) if last else None
        if info is None:
            raise Conflict(
                f"the body {reference.name[:80]!r} is not in {self._bucket}, or no longer: put it "
                "there and ask again",
                field=BODY,
            )
        _check_size(info.size, reference)
        # It gives its bytes away at the end; joining a list of chunks would hold them twice.
        gathered, count, sha = io.BytesIO(), 0, hashlib.sha256()
        chunks = self._stream.read(chunks_subject(self._bucket, info.nuid))
        async with contextlib.aclosing(chunks):  # type: ignore[type-var]
            async for chunk in chunks:
                gathered.write(chunk.body)
                sha.update(chunk.body)
                count += 1
                if gathered.tell() > reference.size:
                    break
                _check_count(count, reference)
                if not count % CHUNKS_IN_A_TURN:
                    await asyncio.sleep(0)
        _check_size(gathered.tell(), reference)
        if sha.hexdigest() != reference.sha256:
            raise Unprocessable(
                f"the body {reference.name[:80]!r} has the SHA-256 {sha.hexdigest()}, but "
                f"{BODY_SHA256} says {reference.sha256}: put it there anew, and ask again",
                field=BODY_SHA256,
            )
        return gathered.getvalue()

    def let_go(self, reference: Reference) -> None:
        """Delete a body that nobody needs any more, beside what else is to be done."""
        self._take_out(reference.name, self.delete(reference.name))

    async def delete(self, name: str) -> None:
        """Delete a body that was put here; what cannot be deleted now goes by its age."""
        try:
            async with asyncio.timeout(DELETE_S):
                await self._stream.purge(name_subject(self._bucket, name))
                await self.drop(name)
        except (BusError, TimeoutError) as error:
            log.debug("body.left", name=name, cause=str(error))

    async def gone(self, timeout_s: float) -> None:
        """Wait until what nobody needs is out; what takes longer goes by its age."""
        if self._leaving:
            await asyncio.wait(self._leaving, timeout=timeout_s)
        if left := set(self._leaving):
            for one in left:
                one.cancel()
            await asyncio.wait(left, timeout=END_S)

    # --- Room -------------------------------------------------------------------------------------

    def _make_room(self, name: str, size: int, *, or_more: bool = False) -> None:
        """Promise room for so many bytes, if it is not more already.

        Raises:
            Unavailable: There is none.
        """
        had = self._ours.get(name, 0)
        if size <= had:
            return
        others = sum(self._ours.values()) - had
        if others + size > self.share_bytes:
            raise Unavailable(
                f"this body has {size:,} bytes{' or more' if or_more else ''}, and other large "
                f"ones that were sent through here have {others:,} in {self._bucket}; "
                f"{self.share_bytes:,} are allowed together ({BODIES_SHARE_BYTES} changes that). "
                "It empties as requests end: try again",
                retry_after_s=RETRY_AFTER_S,
            )
        self._ours[name] = size

    async def _give_up(self, upload: Upload) -> None:
        """Take out what had come of a body."""
        await upload.leave()
        # It may have got its name just when it was given up.
        await self.delete(upload.id)

    def _take_out(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Have a body taken out beside all else, and give back its room; `gone` waits for it."""

        def done(task: asyncio.Task[None]) -> None:
            self._leaving.discard(task)
            self._ours.pop(name, None)
            if not task.cancelled() and (error := task.exception()):
                log.error("body.not_deleted", exc_info=error)

        task = asyncio.create_task(work)
        self._leaving.add(task)
        task.add_done_callback(done)

    # --- For uploads ------------------------------------------------------------------------------

    async def name(self, digest: str, upload: Upload) -> bool:
        """Give chunks their name; no other has it."""
        said = message(description(self._bucket, upload.id, upload, digest))
        try:
            await self._stream.append(name_subject(self._bucket, upload.id), said)
        except StoreFullError as error:
            raise await self.full(error, upload.offset) from None
        return True

    async def drop(self, upload_id: str) -> None:
        """Delete chunks."""
        await self._stream.purge(chunks_subject(self._bucket, upload_id))

    async def full(self, error: StoreFullError, taken_bytes: int) -> NoSpace:
        """Return the error for whoever wanted to store more than there is room for."""
        return NoSpace(
            f"the store of large bodies, {self._bucket}, was full after {taken_bytes:,} bytes of "
            f"this one ({error.message}); it empties as requests end: try again",
            retry_after_s=RETRY_AFTER_S,
        )


class _InTime:
    """Bounds how long the store takes for all that is stored of an upload.

    Args:
        within_s: How long it may; None: as long as an upload may.
        upload: Which one.
    """

    def __init__(self, within_s: float | None, upload: Upload) -> None:
        self._within_s = within_s
        self._upload = upload
        self._took_s = 0.0

    async def wait(self, storing: Awaitable[T]) -> T:
        if self._within_s is None:
            return await storing
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout(self._within_s - self._took_s):
                done = await storing
        except TimeoutError:
            raise DeadlineExceeded(
                f"the body of {self._upload.offset:,} bytes or more was not stored within "
                f"{self._within_s:g} s"
            ) from None
        self._took_s += loop.time() - began
        return done


def _check_size(found: int, reference: Reference) -> None:
    if found != reference.size:
        more = " or more" if found > reference.size else ""
        raise Unprocessable(
            f"the body {reference.name[:80]!r} has {found:,} bytes{more}, but {BODY_BYTES} says "
            f"{reference.size:,}: put it there whole, and ask again",
            field=BODY_BYTES,
        )


def _check_count(count: int, reference: Reference) -> None:
    if count > (most := 1 + reference.size // CHUNK_MIN_BYTES):
        raise Unprocessable(
            f"the body {reference.name[:80]!r} of {reference.size:,} bytes has more than {most:,} "
            f"chunks: put it there in chunks of {CHUNK_MIN_BYTES:,} bytes or more",
            field=BODY,
        )


_SIZE = re.compile(r"[0-9]{1,15}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

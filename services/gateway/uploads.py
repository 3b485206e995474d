"""Uploads: bytes on their way into the object store, and what waits for the rest of them.

An upload that breaks off is kept for an hour. What is known of it stands in a bucket, so that a
gateway that was restarted still knows it. A deployment has one gateway: that a version is uploaded
by one caller at a time is seen to here, in memory.
"""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, Protocol

import msgspec
import structlog

from bus.client import Client
from bus.errors import (
    BusError,
    Conflict,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    Overloaded,
    TooLarge,
    Unprocessable,
)
from bus.messages import KeptAnswer, UnfinishedUpload, now
from bus.uploads import Upload

# Each holds a window of unacknowledged chunks.
UPLOADS_MAX: Final = 16
# How long what broke off waits for its rest, and how often that is looked at.
KEEP_S: Final = 3_600.0
SWEEP_S: Final = 60.0
# How long putting an upload aside may take once its caller has gone.
END_S: Final = 10.0

log = structlog.get_logger("services.gateway.uploads")


class CutOff(InvalidRequest):
    """The body ended before its end."""


class WrongOffset(Conflict):
    """The rest of an upload does not begin where the upload ends.

    Args:
        offset: Where it ends.
    """

    def __init__(self, given: int, offset: int) -> None:
        super().__init__(
            f"Upload-Offset is {given:,}, but {offset:,} bytes are here: send the rest from there",
            field="Upload-Offset",
            details={"upload_offset": offset},
        )
        self.offset = offset


@dataclass
class Reception:
    """An upload that goes on.

    Attributes:
        upload: Its way into the object store.
        wish: What is known of it.
        is_aside: Whether it was put aside, to go on later.
    """

    upload: Upload
    wish: UnfinishedUpload
    is_aside: bool = False


class Uploads:
    """The uploads of this gateway.

    Args:
        client: The connection.
        max_bytes: How many bytes one may have.
        keep_s: How long one that broke off is kept, in seconds.
    """

    def __init__(self, client: Client, max_bytes: int, keep_s: float = KEEP_S) -> None:
        self.max_bytes = max_bytes
        self.keep_s = keep_s
        self._store = client.store
        self._live: dict[tuple[str, str], Upload | None] = {}
        self._keys: set[str] = set()
        self._count = 0

    async def run(self) -> None:
        """Drop what has waited for its rest too long, until cancelled."""
        while True:
            try:
                await self.sweep()
            except BusError as error:
                log.warning("uploads.unswept", cause=error.message)
            await asyncio.sleep(min(SWEEP_S, self.keep_s))

    async def sweep(self) -> None:
        """Drop what has waited for its rest too long."""
        oldest = now() - timedelta(seconds=self.keep_s)
        for entry in await self._store.uploads.all():
            one = entry.value
            if one is None or (one.id, one.version) in self._live:
                continue
            if (one.broken_at or one.begun_at) < oldest:
                await self._drop(one)
                log.info("upload.dropped", model=one.id, version=one.version, bytes=one.offset)

    @contextmanager
    def claiming(self, model: str, version: str | None, key: str | None) -> Iterator[None]:
        """Let nobody else upload this version, or use this idempotency key, while inside.

        Raises:
            Conflict: Somebody does.
            Overloaded: `UPLOADS_MAX` go on already.
        """
        if self._count >= UPLOADS_MAX:
            raise Overloaded(f"{UPLOADS_MAX} uploads go on already", retry_after_s=5)
        if key is not None and key in self._keys:
            raise Conflict("a request with this Idempotency-Key goes on; wait for its answer")
        place = (model, version) if version is not None else None
        if place in self._live:
            raise Conflict(
                f"version {version!r} of {model!r} is being uploaded already; HEAD .../upload says "
                "how far it is"
            )
        self._count += 1
        if key is not None:
            self._keys.add(key)
        if place is not None:
            self._live[place] = None
        try:
            yield
        finally:
            self._count -= 1
            if key is not None:
                self._keys.discard(key)
            if place is not None:
                del self._live[place]

    # --- Bytes ------------------------------------------------------------------------------------

    @asynccontextmanager
    async def receiving(self, wish: UnfinishedUpload, offset: int) -> AsyncGenerator["Reception"]:
        """Write an upload that can be resumed; if its caller breaks off, its bytes are kept.

        Args:
            wish: What is known of it: model, version, name, length.
            offset: Where it begins; 0 begins anew, whatever is here.

        Raises:
            NotFound: Nothing is here that could be resumed.
            WrongOffset: Another number of bytes is here.
            InvalidRequest: The file has another length than was said before.
        """
        if offset == 0:
            await self._make_way(wish)
            opened = self._store.artefacts.writing()
        else:
            present = await self.resumable(wish.id, wish.version, offset)
            if wish.total_bytes and present.total_bytes not in {None, wish.total_bytes}:
                raise InvalidRequest(
                    f"the file was said to have {present.total_bytes:,} bytes, and now "
                    f"{wish.total_bytes:,}: send the right rest, or begin anew",
                    field="Upload-Length",
                )
            wish = msgspec.structs.replace(
                wish,
                file_name=present.file_name,
                begun_at=present.begun_at,
                total_bytes=wish.total_bytes or present.total_bytes,
            )
            opened = self._store.artefacts.resuming(present.upload)
        kept = False
        try:
            async with opened as upload:
                wish = msgspec.structs.replace(wish, upload=upload.id)
                reception = Reception(upload, wish)
                if upload.offset != offset:
                    kept = await _to_its_end(self.put_aside(reception))
                    raise WrongOffset(offset, upload.offset)  # noqa: TRY301
                self._live[wish.id, wish.version] = upload
                await self._store.uploads.put(wish, wish.id, wish.version)
                try:
                    yield reception
                except (asyncio.CancelledError, CutOff, DeadlineExceeded):
                    kept = await _to_its_end(self.put_aside(reception))
                    raise
                kept = reception.is_aside
        except BaseException:
            if not kept and wish.upload:
                await _to_its_end(self._drop(wish))
            raise
        if not kept:
            await self._forget(wish)

    async def put_aside(self, reception: "Reception") -> None:
        """Keep what has come, until the rest comes."""
        upload, wish = reception.upload, reception.wish
        await upload.keep()
        kept = msgspec.structs.replace(wish, offset=upload.offset, broken_at=now())
        await self._store.uploads.put(kept, wish.id, wish.version)
        reception.is_aside = True

    async def resumable(self, model: str, version: str, offset: int) -> UnfinishedUpload:
        """Return what is known of an upload whose rest begins at `offset`.

        Raises:
            NotFound: There is none.
            WrongOffset: Another number of bytes is here.
        """
        present = await self.unfinished(model, version)
        if present is None:
            raise _nothing_to_resume(model, version)
        if present.offset != offset:
            raise WrongOffset(offset, present.offset)
        return present

    async def _make_way(self, wish: UnfinishedUpload) -> None:
        entry = await self._store.uploads.get(wish.id, wish.version)
        if entry is not None and entry.value is not None:
            await self._drop(entry.value)

    async def unfinished(self, model: str, version: str) -> UnfinishedUpload | None:
        """Return what is known of an upload that goes on or broke off, with its present offset."""
        entry = await self._store.uploads.get(model, version)
        found = entry.value if entry else None
        if found is None or found.broken_at is not None:
            return found
        live = self._live.get((model, version))
        if live is not None and live.id == found.upload:
            return msgspec.structs.replace(found, offset=live.offset)
        # The gateway ended while it went on: the store knows how much has come.
        for one in await self._store.artefacts.unfinished():
            if one.upload_id == found.upload:
                return msgspec.structs.replace(found, offset=one.bytes)
        return None

    async def drop(self, model: str, version: str) -> None:
        """Forget an upload that broke off, and its bytes.

        Raises:
            NotFound: There is none.
            Conflict: It goes on.
        """
        if (model, version) in self._live:
            raise Conflict(
                f"version {version!r} of {model!r} is being uploaded; end that request first"
            )
        entry = await self._store.uploads.get(model, version)
        if entry is None or entry.value is None:
            raise _nothing_to_resume(model, version)
        await self._drop(entry.value)

    async def _drop(self, one: UnfinishedUpload) -> None:
        with contextlib.suppress(NotFound, Conflict):
            await self._store.artefacts.discard(one.upload)
        await self._forget(one)

    async def _forget(self, one: UnfinishedUpload) -> None:
        await self._store.uploads.delete(one.id, one.version)

    # --- Answers for those who ask again ----------------------------------------------------------

    async def answered(self, key: str | None, request: str) -> KeptAnswer | None:
        """Return the answer that a request with this key had.

        Raises:
            Unprocessable: It was another request.
        """
        if key is None:
            return None
        entry = await self._store.answers.get(_hashed(key))
        kept = entry.value if entry else None
        if kept is not None and kept.request != request:
            raise other_request(kept.request)
        return kept

    async def keep_answer(self, key: str, answer: KeptAnswer) -> None:
        """Keep an answer for a day."""
        await self._store.answers.put(
            msgspec.structs.replace(answer, key=_hashed(key)), _hashed(key)
        )


def other_request(before: str) -> Unprocessable:
    """Return what is said to somebody who uses an idempotency key twice."""
    return Unprocessable(
        f"this Idempotency-Key was used for another request before ({before[:200]}, or other "
        "bytes); take a new one",
        field="Idempotency-Key",
    )


class Taker(Protocol):
    """What the bytes of an upload go to."""

    @property
    def offset(self) -> int:
        """How many bytes it has taken."""

    async def write(self, block: bytes) -> None:
        """Take more."""


async def take(
    upload: Taker,
    blocks: AsyncIterator[bytes],
    *,
    max_bytes: int,
    total_bytes: int | None = None,
    part_sha256: str | None = None,
) -> None:
    """Write blocks as they come, at the pace of the object store.

    Args:
        upload: Where to.
        blocks: Of any length.
        max_bytes: How many bytes there may be in all.
        total_bytes: How many there will be, where that is known.
        part_sha256: The digest of these blocks alone, where that is known.

    Raises:
        TooLarge: There are more than may be.
        InvalidRequest: There are more than was said.
        Unprocessable: They have another digest.
    """
    sha = hashlib.sha256()
    async for block in blocks:
        size = upload.offset + len(block)
        if size > max_bytes:
            raise too_large(size, max_bytes)
        if total_bytes is not None and size > total_bytes:
            raise InvalidRequest(
                f"more bytes came than the {total_bytes:,} that Upload-Length says",
                field="Upload-Length",
            )
        if part_sha256 is not None:
            sha.update(block)
        await upload.write(block)
    if part_sha256 is not None and sha.hexdigest() != part_sha256:
        raise Unprocessable(
            f"the content has the SHA-256 {sha.hexdigest()}, not {part_sha256} as Content-Digest "
            "says: it was damaged on its way; upload it again",
            field="Content-Digest",
        )


def too_large(size: int, max_bytes: int) -> TooLarge:
    """Return what is said of too large a file."""
    return TooLarge(
        f"the file has {size:,} bytes or more, allowed are {max_bytes:,}; BKG_UPLOAD_MAX_BYTES "
        "of the gateway changes that"
    )


def _nothing_to_resume(model: str, version: str) -> NotFound:
    return NotFound(
        f"there is no unfinished upload of version {version!r} of {model!r}: begin anew, without "
        "Upload-Offset"
    )


def _hashed(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


async def _to_its_end(work: Coroutine[Any, Any, None]) -> bool:
    """Let work end, though this task was cancelled; tell whether it was done.

    In a task of its own: what reads from the broker ends at once in one that was cancelled.
    """
    task = asyncio.create_task(work)
    try:
        await asyncio.wait({task}, timeout=END_S)
    finally:
        task.cancel()
    if not task.done() or task.cancelled():
        log.warning("upload.left", cause=f"the broker did not answer within {END_S:g} s")
        return False
    if error := task.exception():
        if not isinstance(error, BusError):
            raise error
        log.warning("upload.left", cause=error.message)
        return False
    return True

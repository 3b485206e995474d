"""The object store of artefacts: bytes under the SHA-256 that they come to.

Laid out as ADR-20 says, so that `nats object get` reads what we write: the chunks of an object
stand under a random id, and a message with its name says which id, how many chunks and how many
bytes. The name is written last. So what breaks off has no name, and is taken up again or deleted
under its id.
"""

import asyncio
import contextlib
import hashlib
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, NamedTuple

import structlog

from bus import private
from bus.errors import (
    BusError,
    Conflict,
    DeadlineExceeded,
    NoSpace,
    NotFound,
    TooLarge,
    Unprocessable,
)
from bus.objects import Info, Objects, condemned, deleted, living
from bus.streams import StoreFullError, Stream
from bus.uploads import CHUNK_BYTES, OFFSET, Upload, follows

# An artefact of which nothing more comes for this long is given up.
STALL_S: Final = 30.0
# How long bytes are written over, an fsync for each chunk; shorter than `bus.uploads.LEAVE_S`.
ERASE_S: Final = 5.0
# What the broker stores beside a chunk: lengths, subject, headers, checksum.
BESIDE_CHUNK_BYTES: Final = 512
_TRIES: Final = 20

log = structlog.get_logger("bus.artefacts")


class Unfinished(NamedTuple):
    """What is stored of an upload that has no name (yet)."""

    upload_id: str
    bytes: int
    written_at: datetime


class Kept(NamedTuple):
    """An artefact that is stored; `stored_at` is when it was last brought."""

    digest: str
    size: int
    stored_at: datetime


class Artefacts:
    """The object store of artefacts, named by their SHA-256 and so immutable (ADR-20).

    Args:
        stream: The stream behind it.
        bucket: Its name.
        setting: What says how much it may hold, where something does; named in errors.
        erases: Whether the bytes of what is deleted are written over in the broker's files.
    """

    def __init__(
        self, stream: Stream, bucket: str, setting: str | None = None, *, erases: bool = False
    ) -> None:
        self._stream = stream
        self._objects = Objects(stream, bucket)
        self._erases = erases
        self._limit = f" ({setting})" if setting else ""
        more = f", or allow the store more{self._limit}" if setting else ""
        self._way_out = f"remove what nobody needs{more}"

    # --- Read -------------------------------------------------------------------------------------

    async def size(self, digest: str) -> int | None:
        """Return how many bytes an artefact has; None if it is not stored."""
        info = await self._objects.info(digest)
        return info.size if info else None

    async def read(
        self, digest: str, start: int = 0, stop: int | None = None
    ) -> AsyncIterator[bytes]:
        """Give the bytes of an artefact, or those that a slice of it has, a chunk at a time.

        Raises:
            NotFound: It is not stored.
            Unprocessable: It is stored broken: bytes are missing.
            DeadlineExceeded: Nothing more came for `STALL_S`.
        """
        info = await self._objects.info(digest)
        if info is None:
            raise NotFound(f"the artefact {digest} is not stored")
        start, stop, _ = slice(start, stop).indices(info.size)
        if start >= stop:
            return
        subject = self._objects.chunks(info.nuid)
        after, at = await self._objects.seek(info, start) if start >= CHUNK_BYTES else (0, 0)
        chunks = self._stream.read(subject, after=after)
        async with contextlib.aclosing(chunks):  # type: ignore[type-var]
            while at < stop:
                try:
                    async with asyncio.timeout(STALL_S):
                        chunk = await anext(chunks, None)
                except TimeoutError:
                    raise DeadlineExceeded(
                        f"the artefact {digest} stopped coming: {at:,} of {info.size:,} bytes, "
                        f"then nothing for {STALL_S:g} s"
                    ) from None
                if chunk is None or not follows(chunk, at):
                    raise Unprocessable(
                        f"the artefact {digest} is stored broken: {at:,} of {info.size:,} bytes, "
                        "and the next ones are missing; load its file again"
                    )
                end = at + len(chunk.body)
                if end > start:
                    yield chunk.body[max(0, start - at) : stop - at]
                at = end

    async def fetch(
        self, digest: str, path: Path, *, told: Callable[[float], None] = lambda _share: None
    ) -> None:
        """Write an artefact to a file, whole and sound or not at all.

        Args:
            digest: Which one.
            path: Where it goes.
            told: Is called with the share that has come, 0 to 1.

        Raises:
            NotFound: It is not stored.
            Unprocessable: What is stored has not the digest of its name.
            DeadlineExceeded: Nothing more came for `STALL_S`.
        """
        size = await self.size(digest)
        if size is None:
            raise NotFound(f"the artefact {digest} is not stored")
        found, sha = 0, hashlib.sha256()
        part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
        blocks = self.read(digest)
        try:
            async with contextlib.aclosing(blocks):  # type: ignore[type-var]
                with private.opened(part) as file:
                    async for block in blocks:
                        file.write(block)
                        sha.update(block)
                        found += len(block)
                        told(found / size)
            if sha.hexdigest() != digest:
                raise Unprocessable(
                    f"the artefact {digest} is stored broken: {found:,} of {size:,} bytes, and "
                    "another digest; load its file again"
                )
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    async def all(self) -> list[Kept]:
        """Return every artefact that is stored, by digest."""
        found = await self._objects.all()
        return sorted(Kept(one.name, one.size, _moment(one.at)) for one in found if one.lives)

    async def unfinished(self) -> list[Unfinished]:
        """Return what is stored of uploads that have no name (yet), the oldest first."""
        counted = await self._objects.counted(self._objects.chunks("*"))
        ids = [subject.rpartition(".")[2] for subject in counted]
        # Asked for second: what was named meanwhile is in it. What is being deleted is in it too:
        # whoever deletes sees to that.
        named = {one.nuid for one in await self._objects.all()}
        found = []
        for upload_id in ids:
            if upload_id in named:
                continue
            last = await self._stream.last(self._objects.chunks(upload_id))
            if last is not None:
                stored = int(last.headers.get(OFFSET, 0)) + len(last.body)
                found.append(Unfinished(upload_id, stored, _moment(last.at)))
        return sorted(found, key=lambda one: one.written_at)

    async def check_room(self, size_bytes: int, digest: str | None = None) -> None:
        """Say before an artefact comes whether there is room for it.

        Args:
            size_bytes: How many bytes it has.
            digest: Its SHA-256, where that is known: what is stored already needs no room.

        Raises:
            TooLarge: So many never fit; says how many do.
            NoSpace: There is no room for so many now; says how many there is room for.
        """
        if digest is not None and await self.size(digest) is not None:
            return
        held = await self._stream.occupied()
        if held.max_bytes is not None and size_bytes > (fits := _payload(held.max_bytes)):
            raise TooLarge(
                f"an artefact of {size_bytes:,} bytes does not fit into the store, which holds at "
                f"most {fits:,} bytes{self._limit}"
            )
        room = await self.room()
        if room is not None and size_bytes > room:
            raise NoSpace(
                f"the store has no room for an artefact of {size_bytes:,} bytes: {room:,} bytes "
                f"are free; {self._way_out}",
                retry_after_s=60,
            )

    async def room(self) -> int | None:
        """Return how many bytes the store can still take; None without a limit."""
        held = await self._stream.occupied()
        free = None if held.max_bytes is None else max(0, held.max_bytes - held.size_bytes)
        account = await self._stream.account_room()
        rooms = [room for room in (free, account) if room is not None]
        return _payload(min(rooms)) if rooms else None

    # --- Write ------------------------------------------------------------------------------------

    @asynccontextmanager
    async def writing(self, expect_bytes: int | None = None) -> AsyncGenerator[Upload]:
        """Have an upload to write to while inside; left without commit or keep, it is deleted.

        Args:
            expect_bytes: How many bytes will come, where that is known.

        Raises:
            TooLarge: So many never fit; says how many do.
            NoSpace: There is no room for so many now; says how many there is room for.
        """
        if expect_bytes is not None:
            await self.check_room(expect_bytes)
        async with self._inside(self._upload(secrets.token_hex(11))) as upload:
            yield upload

    @asynccontextmanager
    async def resuming(self, upload_id: str) -> AsyncGenerator[Upload]:
        """Have an upload that was kept while inside; it goes on at its `offset`.

        What is stored of it is read, for the digest.

        Raises:
            NotFound: It is gone, or was committed.
        """
        if upload_id not in {one.upload_id for one in await self.unfinished()}:
            raise NotFound(f"there is no unfinished upload {upload_id!r}", field="upload")
        upload = self._upload(upload_id)
        await upload.take_up()
        async with self._inside(upload):
            yield upload

    async def touch(self, digest: str) -> int | None:
        """Have an artefact count as just brought; return its size, None if it is not stored.

        Whoever deletes what is old and unused leaves it for a while then.
        """
        for _ in range(_TRIES):
            info = await self._objects.find(digest)
            if info is None or info.deleted:
                return None
            with contextlib.suppress(Conflict):
                await self._objects.say(digest, living(info), info.seq)
                return info.size
        raise Conflict(f"others keep storing the artefact {digest}; try again")

    async def holds(self, digest: str) -> bool:
        """Tell whether an artefact is stored whole, and have it count as just brought."""
        info = await self._objects.info(digest)
        if info is None or not await self._objects.whole(info):
            return False
        return await self.touch(digest) is not None

    async def put(self, digest: str, path: Path) -> None:
        """Store a file under its digest; one that is there already, and whole, stays.

        Raises:
            TooLarge: It never fits.
            NoSpace: There is no room for it now.
            Unavailable: The broker did not take it; says why.
            Unprocessable: The file has another digest.
        """
        if await self.holds(digest):
            return
        size = (await asyncio.to_thread(path.stat)).st_size
        async with self.writing(size) as upload:
            with path.open("rb") as file:
                while block := await asyncio.to_thread(file.read, 8 * CHUNK_BYTES):
                    await upload.write(block)
            await upload.commit(digest)

    async def discard(self, upload_id: str) -> None:
        """Delete what is stored of an unfinished upload; one that is not there is no error.

        Raises:
            Conflict: It has become an artefact.
        """
        names = await self._objects.all()
        if any(one.nuid == upload_id and not one.deleted for one in names):
            raise Conflict(f"the upload {upload_id!r} has become an artefact")
        await self.drop(upload_id)

    async def delete(
        self,
        digest: str,
        *,
        unless_since: datetime | None = None,
        unless: Callable[[], Awaitable[bool]] | None = None,
        erase_s: float | None = ERASE_S,
    ) -> bool:
        """Delete an artefact; tell whether it was there, and is gone.

        What is cut short goes on when it is asked for again: see `half_deleted`.

        Args:
            digest: Which one.
            unless_since: Leave it if it was brought, or brought again, at this moment or later.
            unless: Is asked once nobody finds it any more, and before a byte of it is gone, whether
                somebody has come to need it: then it comes back. Whoever comes to need it looks
                afterwards whether it is there. So of two at the same moment one sees the other.
            erase_s: How long its bytes are written over at most, where they are at all; None: until
                all of them are.

        Raises:
            BusError: It is not all gone; says why.
        """
        begun = False
        for _ in range(_TRIES):
            info = await self._objects.find(digest)
            if info is None:
                return False
            if info.lives and (begun or (unless_since and _moment(info.at) >= unless_since)):
                # Brought again in between, or not that old.
                return False
            # First the name, so that none leads to chunks that are not there; and only as it was
            # read, so that of whoever deletes and whoever brings it again one has to look anew.
            begun, seq = True, info.seq
            try:
                if info.lives and unless is not None:
                    seq = await self._objects.say(digest, condemned(info), seq)
                if not info.deleted:
                    if unless is not None and await unless():
                        await self._objects.say(digest, living(info), seq)
                        return False
                    seq = await self._objects.say(digest, deleted(info), seq)
            except Conflict:
                continue
            except StoreFullError:
                return await self._delete_unsaid(info, seq, unless, erase_s)
            await self.drop(info.nuid, erase_s)
            await self._objects.forget(digest, seq)
            return True
        raise Conflict(f"others keep storing the artefact {digest}; try again")

    async def half_deleted(self, before: datetime) -> list[str]:
        """Return what somebody has begun to delete before a moment; `delete` ends it."""
        found = await self._objects.all()
        return [one.name for one in found if not one.lives and _moment(one.at) < before]

    # --- For uploads ------------------------------------------------------------------------------

    @asynccontextmanager
    async def _inside(self, upload: Upload) -> AsyncGenerator[Upload]:
        try:
            yield upload
        finally:
            await upload.leave()

    def _upload(self, upload_id: str) -> Upload:
        return Upload(self._stream, self._objects.chunks(upload_id), upload_id, self)

    async def name(self, digest: str, upload: Upload) -> bool:
        """Give chunks their name, once; tell whether they are the ones that it leads to now."""
        for _ in range(_TRIES):
            info = await self._objects.find(digest)
            stays = info is not None and not info.deleted and await self._objects.whole(info)
            said = self._objects.described(digest, upload, digest)
            if stays and info is not None:
                # The same bytes are there. Their name is written anew, so that whoever deletes
                # them, or what is old and unused, sees that somebody has just brought them.
                said = living(info)
            try:
                await self._objects.say(digest, said, info.seq if info else 0)
            except Conflict:
                continue
            except StoreFullError as error:
                raise await self.full(error, upload.offset) from None
            if info is not None and not stays and info.nuid != upload.id:
                try:
                    await self.drop(info.nuid)
                except BusError as error:
                    # The artefact has its name, and its own chunks.
                    log.warning("artefact.not_erased", upload=info.nuid, cause=error.message)
            return not stays
        raise Conflict(f"others keep storing the artefact {digest}; try again")

    async def drop(self, upload_id: str, erase_s: float | None = ERASE_S) -> None:
        """Delete chunks; what does not come to its end is garbage without a name.

        What cannot be erased within `erase_s` is only deleted: somebody waits, and for room. What
        the broker refuses to erase is not deleted either, or another try would not find it.
        """
        chunks = self._objects.chunks(upload_id)
        if self._erases:
            try:
                async with asyncio.timeout(erase_s):
                    await self._stream.erase(chunks)
            except TimeoutError:
                log.info("artefact.not_erased", upload=upload_id, after_s=erase_s)
        await self._stream.purge(chunks)

    async def _delete_unsaid(
        self,
        info: Info,
        seq: int,
        unless: Callable[[], Awaitable[bool]] | None,
        erase_s: float | None,
    ) -> bool:
        """Delete what there is no room to call deleted; cut short, it is an upload that broke off.

        Args:
            info: What was said of it at first.
            seq: Where something was said of it last.
            unless: As for `delete`.
            erase_s: As for `delete`.
        """
        await self._objects.forget(info.name, seq)
        again = await self._objects.info(info.name)
        if again is not None and again.nuid == info.nuid:
            return False
        needed = unless is not None and await unless()
        if needed:
            with contextlib.suppress(Conflict):
                await self._objects.say(info.name, living(info), 0)
                return False
        await self.drop(info.nuid, erase_s)
        return not needed

    async def full(self, error: StoreFullError, taken_bytes: int) -> NoSpace:
        """Return the error for whoever wanted to store more than there is room for.

        Args:
            error: What the broker said.
            taken_bytes: How much had been stored of what does not fit.
        """
        try:
            held, room = (await self._stream.occupied()).size_bytes, await self.room()
        except BusError:
            held, room = None, None
        free = "" if room is None else f"; {held:,} bytes are stored, {room:,} are free"
        return NoSpace(
            f"the store of artefacts was full after {taken_bytes:,} bytes of this one "
            f"({error.message}{free}); {self._way_out}",
            retry_after_s=60,
        )


def _payload(free_bytes: int) -> int:
    """Return how many bytes of an artefact fit where the broker has so many left."""
    return free_bytes * CHUNK_BYTES // (CHUNK_BYTES + BESIDE_CHUNK_BYTES)


def _moment(ns: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=ns // 1_000)

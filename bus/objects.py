"""How an object lies in a stream, as ADR-20 says: so `nats object` reads and writes the same.

The chunks of an object stand under an id, and a message with its name says which id, how many
chunks and how many bytes.
"""

import json
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from bus.streams import Stored, Stream
from bus.subjects import token
from bus.uploads import CHUNK_BYTES, OFFSET, Upload


@dataclass(frozen=True)
class Info:
    """The message with an object's name: its sequence and when it was stored, and what it says.

    Attributes:
        seq: Its sequence.
        at: When it was stored, in nanoseconds since 1970.
        name: The object's name.
        nuid: The id of its chunks.
        size: Its bytes.
        chunks: Its chunks.
        condemned: It is deleted, but has all its chunks and may come back.
        deleted: It is deleted, and its chunks are being deleted.
        said: The description, in the words of ADR-20.
    """

    seq: int
    at: int
    name: str
    nuid: str
    size: int
    chunks: int
    condemned: bool
    deleted: bool
    said: Mapping[str, Any]

    @property
    def lives(self) -> bool:
        """Whether there is such an object."""
        return not (self.condemned or self.deleted)


class Objects:
    """The messages of a bucket's objects.

    Args:
        stream: The stream behind it.
        bucket: Its name.
    """

    def __init__(self, stream: Stream, bucket: str) -> None:
        self._stream = stream
        self._bucket = bucket

    async def find(self, name: str) -> Info | None:
        """Return what is said of an object, or was said last of one that is being deleted."""
        found = await self._stream.last(name_subject(self._bucket, name))
        return _said_of(found) if found else None

    async def info(self, name: str) -> Info | None:
        """Return what is said of an object; None if there is none."""
        found = await self.find(name)
        return found if found is not None and found.lives else None

    async def all(self) -> list[Info]:
        """Return what is said of every object, and of each that is being deleted."""
        names = self._stream.read(f"$O.{self._bucket}.M.*", latest_only=True)
        found = [_said_of(stored) async for stored in names]
        return [one for one in found if one is not None]

    async def say(self, name: str, said: Mapping[str, Any], before: int) -> int:
        """Write what is said of an object if nothing was said since `before`; return where.

        Raises:
            Conflict: Something was.
            StoreFullError: There is no room for it.
        """
        subject = name_subject(self._bucket, name)
        return await self._stream.append(
            subject, message(said), headers={"Nats-Rollup": "sub"}, expect=(subject, before)
        )

    async def forget(self, name: str, seq: int) -> None:
        """Delete what was said of an object, up to a sequence."""
        await self._stream.purge(name_subject(self._bucket, name), keep_from=seq + 1)

    async def whole(self, info: Info) -> bool:
        """Tell whether as many chunks are there as the name says."""
        subject = self.chunks(info.nuid)
        return (await self.counted(subject)).get(subject, 0) == info.chunks

    async def counted(self, subject: str) -> dict[str, int]:
        """Return how many chunks there are, by subject."""
        return dict((await self._stream.occupied(subject)).subjects)

    async def seek(self, info: Info, start: int) -> tuple[int, int]:
        """Return after which sequence the chunk with a byte comes, and where that chunk begins.

        By halving the sequences between the first chunk and the name: what is between is not read.
        Chunks that somebody else's client wrote do not say where they begin: (0, 0).
        """
        subject = self.chunks(info.nuid)
        first = await self._stream.at_or_after(1, subject)
        if first is None or OFFSET not in first.headers:
            return 0, 0
        found = first.seq, 0
        low, high = first.seq + 1, info.seq
        while low < high:
            middle = (low + high) // 2
            chunk = await self._stream.at_or_after(middle, subject)
            if chunk is None:
                high = middle
                continue
            at = int(chunk.headers.get(OFFSET, 0))
            if at > start:
                high = middle
            else:
                found = chunk.seq, at
                low = chunk.seq + 1
        return found[0] - 1, found[1]

    def chunks(self, nuid: str) -> str:
        """Return where chunks stand; of every id for `*`."""
        return f"$O.{self._bucket}.C.*" if nuid == "*" else chunks_subject(self._bucket, nuid)

    def described(self, name: str, upload: Upload, digest: str) -> dict[str, Any]:
        """Return what is said of an upload that has ended."""
        return description(self._bucket, name, upload, digest)


def info_of(stored: Stored) -> Info | None:
    """Return what the message with a name says; None if the object was deleted, or says nothing."""
    said = _said_of(stored)
    return said if said is not None and said.lives else None


def _said_of(stored: Stored) -> Info | None:
    try:
        said = json.loads(stored.body)
        gone = bool(said.get("deleted"))
        return Info(
            seq=stored.seq,
            at=stored.at,
            name=str(said["name"]),
            nuid=str(said["nuid"]),
            size=int(said.get("size", 0)),
            chunks=int(said.get("chunks", 0)),
            condemned=gone and bool(said.get("digest")),
            deleted=gone and not said.get("digest"),
            said=said,
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None


def description(bucket: str, name: str, upload: Upload, digest: str) -> dict[str, Any]:
    """Return what the message with a name says of an upload that has ended."""
    return {
        "name": name,
        "options": {"max_chunk_size": CHUNK_BYTES},
        "bucket": bucket,
        "nuid": upload.id,
        "size": upload.offset,
        "chunks": upload.chunks,
        "digest": f"SHA-256={urlsafe_b64encode(bytes.fromhex(digest)).decode()}",
    }


def living(info: Info) -> dict[str, Any]:
    """Return the description of an object as it is, or was before it was condemned."""
    return {key: value for key, value in info.said.items() if key != "deleted"}


def condemned(info: Info) -> dict[str, Any]:
    """Return a description that says that an object is deleted, and all that brings it back."""
    return {**info.said, "deleted": True}


def deleted(info: Info) -> dict[str, Any]:
    """Return a description that says that an object is deleted, and where its chunks may be."""
    kept = {key: info.said[key] for key in ("name", "bucket", "nuid") if key in info.said}
    return {**kept, "deleted": True}


def message(said: Mapping[str, Any]) -> bytes:
    """Return a description as it is stored now."""
    return json.dumps({**said, "mtime": datetime.now(UTC).isoformat()}).encode()


def name_subject(bucket: str, name: str) -> str:
    """Return where the message with a name stands."""
    return f"$O.{bucket}.M.{urlsafe_b64encode(name.encode()).decode()}"


def chunks_subject(bucket: str, nuid: str) -> str:
    """Return where chunks stand."""
    return f"$O.{bucket}.C.{token(nuid)}"

"""How an object lies in a stream, as ADR-20 says: so `nats object` reads and writes the same.

The chunks of an object stand under an id, and a message with its name says which id, how many
chunks and how many bytes.
"""

import json
from base64 import urlsafe_b64encode
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from bus.streams import Stored
from bus.subjects import token
from bus.uploads import CHUNK_BYTES, Upload


@dataclass(frozen=True)
class Info:
    """The message with an object's name: its sequence and when it was stored, and what it says."""

    seq: int
    name: str
    nuid: str
    size: int
    chunks: int
    at: int


def info_of(stored: Stored) -> Info | None:
    """Return what the message with a name says; None if the object was deleted, or says nothing."""
    try:
        said = json.loads(stored.body)
        if said.get("deleted"):
            return None
        return Info(
            stored.seq,
            str(said["name"]),
            str(said["nuid"]),
            int(said.get("size", 0)),
            int(said.get("chunks", 0)),
            stored.at,
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


def message(said: dict[str, Any]) -> bytes:
    """Return a description as it is stored now."""
    return json.dumps(said | {"mtime": datetime.now(UTC).isoformat()}).encode()


def name_subject(bucket: str, name: str) -> str:
    """Return where the message with a name stands."""
    return f"$O.{bucket}.M.{urlsafe_b64encode(name.encode()).decode()}"


def chunks_subject(bucket: str, nuid: str) -> str:
    """Return where chunks stand."""
    return f"$O.{bucket}.C.{token(nuid)}"

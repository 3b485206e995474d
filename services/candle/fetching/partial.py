"""A file of which only a part has come: its bytes, and beside them what it is a part of."""

import fcntl
import hashlib
import os
from pathlib import Path
from typing import IO, Final, Self

import msgspec

from bus.errors import Unavailable

# Read in one piece for the digest of what is there.
BLOCK_BYTES: Final = 1024 * 1024


class Mark(msgspec.Struct, frozen=True):
    """What a partial file is a part of; stands beside it."""

    url: str
    etag: str | None = None
    modified: str | None = None
    total: int | None = None
    name: str = ""

    @property
    def condition(self) -> str | None:
        """What `If-Range` may carry: a strong ETag, or else the time of change.

        RFC 9110, 13.1.5.
        """
        if self.etag is not None:
            return None if self.etag.startswith("W/") else self.etag
        return self.modified


class Part:
    """A partial file that is written to while inside, by one process alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        """Open it.

        Raises:
            Unavailable: Another process writes to it.
        """
        file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise Unavailable(
                f"{self.path.name} is still being written by another process", retry_after_s=2
            ) from None
        self._file = file
        return self

    def __exit__(self, *_error: object) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def _open(self) -> IO[bytes]:
        assert self._file is not None  # noqa: S101 - used inside only
        return self._file

    def mark(self) -> Mark | None:
        """Return what the file is a part of, if that is known."""
        try:
            return msgspec.json.decode(mark_of(self.path).read_bytes(), type=Mark)
        except (OSError, msgspec.MsgspecError):
            return None

    def set_mark(self, mark: Mark) -> None:
        """Write down what the file is a part of. Blocks."""
        path = mark_of(self.path)
        made = path.with_suffix(".new")
        made.write_bytes(msgspec.json.encode(mark))
        made.replace(path)

    def begin(self, keep: bool) -> "tuple[hashlib._Hash, int]":
        """Go to the end of what is kept; return its hash so far and its size. Blocks."""
        file = self._open
        file.seek(0)
        if not keep:
            mark_of(self.path).unlink(missing_ok=True)
            file.truncate()
        sha, size = hashlib.sha256(), 0
        while block := file.read(BLOCK_BYTES):
            sha.update(block)
            size += len(block)
        return sha, size

    def append(self, blocks: list[bytes], sha: "hashlib._Hash") -> None:
        """Write what has come. Blocks."""
        for block in blocks:
            self._open.write(block)
            sha.update(block)
        self._open.flush()

    def discard(self) -> None:
        """Forget what has come."""
        self._open.seek(0)
        self._open.truncate()
        mark_of(self.path).unlink(missing_ok=True)


def mark_of(part: Path) -> Path:
    """Return where it is written down what a partial file is a part of."""
    return part.with_suffix(".json")

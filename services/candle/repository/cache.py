"""The artefacts on this host's disk, by digest: shared by all its workers, fetched at need.

A lock on a file (flock) says that it is in use, across processes and however they end.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import structlog

from bus.errors import NoSpace, Unprocessable
from bus.tasks import to_its_end

PARTS_KEPT_S: Final = 3_600
# Left free on the disk, beside what is fetched.
ROOM_BYTES: Final = 64 * 1024**2
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")

log = structlog.get_logger("candle.cache")

Fetch = Callable[[Path], Awaitable[None]]


class Cache:
    """A folder of artefacts, no larger than `max_bytes` as far as it can be helped.

    What is in use is never removed, so that much can be there beyond the limit.

    Args:
        folder: Where; made when it is missing.
        max_bytes: How much; can be changed at any time.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._folder = folder

    def open(self) -> None:
        """Make the folder, and remove what broken downloads of old have left. Blocks."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for part in self._folder.glob("*.part"):
            with contextlib.suppress(OSError):
                if part.stat().st_mtime < time.time() - PARTS_KEPT_S:
                    part.unlink()

    @asynccontextmanager
    async def holding(
        self, digest: str, suffix: str, size_bytes: int, fetch: Fetch
    ) -> AsyncGenerator[Path]:
        """Have an artefact on the disk while inside; nobody removes it meanwhile.

        What is there and has another digest is fetched again.

        Args:
            digest: Its SHA-256, hex.
            suffix: How the file's name ends.
            size_bytes: How large it is.
            fetch: Writes it to a path, whole and with the right digest.

        Raises:
            NoSpace: The disk is full.
            Unprocessable: The digest is none.
            BusError: What `fetch` raised.
        """
        if not _DIGEST.fullmatch(digest):
            # It becomes a path.
            raise Unprocessable(f"{digest[:80]!r} is no SHA-256 in lower case hex")
        path = self._folder / f"{digest}{suffix}"
        hold = _Hold(path)
        try:
            # To its end: a load that is called off in between must not leave the file held.
            await to_its_end(hold.take)
            if hold.taken and await to_its_end(sha256_of, path) != digest:
                log.warning("artefact.broken", path=str(path))
                hold.release()
                path.unlink(missing_ok=True)
            while not hold.taken:
                await asyncio.to_thread(self.make_room, size_bytes)
                await fetch(path)
                await to_its_end(hold.take)
            # The time of the last use is what `make_room` goes by.
            with contextlib.suppress(OSError):
                os.utime(path)
            yield path
        finally:
            hold.release()

    def make_room(self, size_bytes: int) -> None:
        """Remove what was not used longest, until `size_bytes` more fit. Blocks.

        Raises:
            NoSpace: The disk has no room for them; says how much there is.
        """
        found = [(path.stat(), path) for path in self._folder.iterdir() if path.suffix != ".part"]
        found.sort(key=lambda one: one[0].st_mtime)
        total = sum(stat.st_size for stat, _ in found) + size_bytes
        for stat, path in found:
            if total <= self.max_bytes and self._missing(size_bytes) <= 0:
                break
            if _remove_unused(path):
                total -= stat.st_size
                log.info("artefact.removed", path=path.name, size_bytes=stat.st_size)
        if self._missing(size_bytes) > 0:
            free = shutil.disk_usage(self._folder).free
            raise NoSpace(
                f"the disk of {self._folder} has no room for {size_bytes:,} bytes, beside "
                f"{ROOM_BYTES:,} that stay free there; {free:,} bytes are free: make room, or put "
                "the data directory (BKG_DATA_DIR) on a larger disk",
                retry_after_s=60,
            )
        if total > self.max_bytes:
            log.warning("cache.full", total_bytes=total, cache_max_bytes=self.max_bytes)

    def _missing(self, size_bytes: int) -> int:
        return size_bytes + ROOM_BYTES - shutil.disk_usage(self._folder).free


def sha256_of(path: Path) -> str:
    """Return a file's digest in hex. Blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Hold:
    """Keeps a file from being removed while it is taken."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: int | None = None

    @property
    def taken(self) -> bool:
        return self._held is not None

    def take(self) -> None:
        """Take the file, if there is one. Blocks."""
        try:
            self._held = os.open(self._path, os.O_RDONLY)
        except FileNotFoundError:
            return
        fcntl.flock(self._held, fcntl.LOCK_SH)
        # Removed between the two: what we hold is no longer what the path names.
        if os.fstat(self._held).st_nlink == 0:
            self.release()

    def release(self) -> None:
        """Let go of it; done twice, it is done."""
        if self._held is not None:
            os.close(self._held)
            self._held = None


def _remove_unused(path: Path) -> bool:
    """Remove a file unless somebody holds it; tell whether it was removed."""
    try:
        opened = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except OSError:
        return False
    finally:
        os.close(opened)
    return True

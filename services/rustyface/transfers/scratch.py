"""Where files lie while they are imported or exported: nobody else reads them, and none is left.

Replicas of a host share a folder, and each has one of its own in it, which it holds locked for as
long as it lives: so whoever comes later tells what a killed one has left from what is in use, at
once and without a clock.
"""

import asyncio
import contextlib
import fcntl
import os
import secrets
import shutil
import threading
from pathlib import Path
from typing import Final, NamedTuple

import structlog

from bus import private

# So often it is looked for what others have left that were killed and never came back.
TIDY_S: Final = 60.0

log = structlog.get_logger("rustyface.scratch")


class _Own(NamedTuple):
    path: Path
    lock: int


class Scratch:
    """A folder for files that outlive no process.

    Args:
        shared: The folder that replicas share.
    """

    def __init__(self, shared: Path) -> None:
        self.shared = shared
        self._own: _Own | None = None
        # Jobs ask in threads.
        self._making = threading.Lock()

    def place(self, name: str) -> Path:
        """Return where a file of that name may lie. Blocks.

        Raises:
            OSError: There cannot be a folder.
        """
        with self._making:
            if self._own is None or not self._own.path.is_dir():
                self._let_go()
                private.make_folder(self.shared)
                self._own = self._made()
            return self._own.path / name

    def close(self) -> None:
        """Delete all that lies here. Blocks."""
        with self._making:
            self._let_go()

    async def keep_tidy(self) -> None:
        """Delete what killed processes have left, at the start and then every minute."""
        while True:
            try:
                await asyncio.to_thread(self.tidy)
            except OSError as error:
                log.warning("scratch.not_tidied", folder=str(self.shared), cause=str(error))
            await asyncio.sleep(TIDY_S)

    def tidy(self) -> None:
        """Delete what processes have left that live no more. Blocks.

        Raises:
            OSError: Something cannot be deleted; the rest is.
        """
        if not self.shared.is_dir():
            return
        private.make_folder(self.shared)
        failed: list[OSError] = []
        for path in self.shared.iterdir():
            try:
                if path.is_dir() and not path.is_symlink():
                    _delete_unless_locked(path)
                else:
                    # Of a version that had no folders of its own in here.
                    path.unlink(missing_ok=True)
            except OSError as error:
                failed.append(error)
        if failed:
            raise failed[0]

    def _made(self) -> _Own:
        while True:
            path = self.shared / secrets.token_hex(8)
            path.mkdir(mode=0o700)
            # Whoever tidies may be faster, and delete it.
            lock = _locked(path)
            if lock is not None and path.is_dir():
                return _Own(path, lock)
            if lock is not None:
                os.close(lock)

    def _let_go(self) -> None:
        if self._own is not None:
            shutil.rmtree(self._own.path, ignore_errors=True)
            os.close(self._own.lock)
            self._own = None


def _delete_unless_locked(path: Path) -> None:
    lock = _locked(path)
    if lock is None:
        return
    try:
        # Not there any more: another one that tidies was faster.
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path)
            log.info("scratch.tidied", folder=path.name)
    finally:
        os.close(lock)


def _locked(path: Path) -> int | None:
    """Return a folder open and locked; None if it is not there, or another one has it."""
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(folder)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return folder

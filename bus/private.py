"""Files and folders that nobody but this user looks into, whatever the umask says."""

import os
from pathlib import Path
from typing import IO


def opened(path: Path) -> IO[bytes]:
    """Open a file to write it from its beginning, and to read what was written."""
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
    return os.fdopen(os.open(path, flags, 0o600), "w+b")


def make_folder(path: Path) -> None:
    """Make a folder, or close one that is there to others."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.chmod(0o700)

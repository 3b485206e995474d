"""Damage to what a broker has on its disk, as bad sectors leave it; and its repair."""

from collections.abc import Callable
from pathlib import Path


def damaged(home: Path, needle: bytes) -> Callable[[], None]:
    """Spoil the one copy of some bytes in the files of a broker that is down; return the repair."""
    [(path, at)] = [
        (path, at) for path in home.rglob("*.blk") if (at := path.read_bytes().find(needle)) >= 0
    ]

    def write(body: bytes) -> None:
        with path.open("r+b") as file:
            file.seek(at)
            file.write(body)

    write(bytes(byte ^ 0xFF for byte in needle[:8]))
    return lambda: write(needle[:8])

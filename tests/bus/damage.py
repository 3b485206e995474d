"""What keeps a broker from deleting: damage to its disk, as bad sectors leave it; and its word."""

import json
from collections.abc import Callable
from pathlib import Path

from bus.client import Client


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


async def denying(client: Client, stream: str) -> None:
    """Have the broker refuse every deletion of a message of a stream, for good."""
    told = await client._nc.request(f"$JS.API.STREAM.INFO.{stream}", b"")
    config = json.loads(told.data)["config"] | {"deny_delete": True}
    told = await client._nc.request(f"$JS.API.STREAM.UPDATE.{stream}", json.dumps(config).encode())
    assert "error" not in json.loads(told.data)

"""Galleries that come from elsewhere: dataset files, as the original kept them."""

import asyncio
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import structlog

from bus import codec
from bus.errors import BusError
from bus.messages import Name
from services.rustyface.galleries import Galleries

log = structlog.get_logger("rustyface.transfer")


class FileEntry(msgspec.Struct, frozen=True):
    """One face of a dataset file."""

    id: str
    embedding: list[float]
    last_seen: datetime | None = None
    metadata: Any = None


class DatasetFile(msgspec.Struct, frozen=True):
    """A dataset as a file."""

    id: Name
    entries: list[FileEntry]
    created_at: datetime | None = None
    updated_at: datetime | None = None


async def take_in(folder: Path, galleries: Galleries) -> None:
    """Enrol every dataset file of a folder, once.

    A file that is done gets the ending `.imported`. One that was interrupted is enrolled again
    from its beginning, which changes nothing in what is there already. One that cannot be used
    stays as it is, and the log says why.
    """
    for path in await asyncio.to_thread(lambda: sorted(folder.glob("*.json"))):
        try:
            content = codec.decode(await asyncio.to_thread(path.read_bytes), DatasetFile)
            await galleries.create(content.id)
            for entry in content.entries:
                vector = np.asarray(entry.embedding, np.float32)
                galleries.check_vector(content.id, vector)
                await galleries.enrol(content.id, entry.id, vector, entry.metadata)
            await asyncio.to_thread(path.rename, path.with_name(f"{path.name}.imported"))
        except (BusError, OSError) as error:
            log.error("dataset.not_imported", file=path.name, cause=str(error))
        else:
            log.info("dataset.imported", dataset=content.id, entries=len(content.entries))

"""Galleries that come from elsewhere: dataset files, as the original kept them."""

import asyncio
import contextlib
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
import structlog
from msgspec import Meta

from bus import codec
from bus.errors import BusError, Conflict
from bus.messages import Name
from services.rustyface.galleries import Galleries, NewEntry, check_metadata

Floats = npt.NDArray[np.float32]

BEGUN: Final = ".importing"
DONE: Final = ".imported"

log = structlog.get_logger("rustyface.transfer")


class FileEntry(msgspec.Struct, frozen=True):
    """One face of a dataset file."""

    id: Annotated[str, Meta(min_length=1, max_length=256)]
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
    """Enrol every dataset file of a folder of which there is no dataset yet, once.

    A file that is begun gets the ending `.importing`, one that is done `.imported`: so it is
    never taken in again when its dataset was deleted, and one that was interrupted goes on at the
    next start. A file that cannot be used stays as it is, and the log says why.
    """
    for path in await asyncio.to_thread(_files_in, folder):
        try:
            content = codec.decode(await asyncio.to_thread(path.read_bytes), DatasetFile)
            await _take_in(path, content, galleries)
        except FileNotFoundError:
            # Another replica on this host has it.
            continue
        except (BusError, OSError) as error:
            log.error("dataset.not_imported", file=path.name, cause=str(error))
        else:
            log.info("dataset.imported", dataset=content.id, entries=len(content.entries))


async def _take_in(path: Path, content: DatasetFile, galleries: Galleries) -> None:
    # All of it before the first one is stored: half a dataset would be worse than none.
    vectors = [_narrow(entry.embedding) for entry in content.entries]
    for entry, vector in zip(content.entries, vectors, strict=True):
        galleries.check_vector(vector)
        check_metadata(entry.metadata)
    begun = path
    if path.suffix != BEGUN:
        await galleries.wait(await galleries.newest())
        if content.id in galleries:
            raise Conflict(f"there is a dataset {content.id!r} already")
        # Where nothing can be renamed nothing is taken in: it would come back at every start.
        begun = await asyncio.to_thread(path.rename, path.with_name(path.name + BEGUN))
    await galleries.create(content.id, at=content.created_at)
    for entry, vector in zip(content.entries, vectors, strict=True):
        new = NewEntry(id=entry.id, vector=vector, metadata=entry.metadata, at=entry.last_seen)
        await galleries.enrol(content.id, new)
    with contextlib.suppress(FileNotFoundError):
        done = begun.with_name(begun.name.removesuffix(BEGUN) + DONE)
        await asyncio.to_thread(begun.rename, done)


def _narrow(embedding: list[float]) -> Floats:
    """Return a vector in float32, at a length that cannot overflow there."""
    wide = np.asarray(embedding, np.float64)
    return np.asarray(wide / (np.abs(wide).max(initial=0) or 1), np.float32)


def _files_in(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.json"), *folder.glob(f"*.json{BEGUN}")])

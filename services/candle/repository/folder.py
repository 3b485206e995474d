"""The watched models folder: a file that is dropped there becomes a version, not yet served.

`iris.onnx` becomes the model `iris`, and `iris/2/model.onnx`, as Triton lays repositories out, its
version `2`. What is taken out of the folder stays in the repository, and what is removed from the
repository stays away until its file is written to, or put there anew.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Final

import msgspec
import structlog

from bus import messages as m
from bus.errors import BusError, Unavailable
from bus.tasks import beside, to_its_end
from services.candle.models.shipped import licence_of
from services.candle.repository.cache import sha256_of
from services.candle.repository.repository import Repository
from services.candle.runtimes import FORMATS

LOOK_S: Final = 2.0
# A file that nobody has written to for so long is whole.
SETTLED_S: Final = 2.0
FILES_MAX: Final = 1_000
# Looked at in one folder, whatever they are.
ENTRIES_MAX: Final = 10_000
AGAIN_S: Final = 30.0

log = structlog.get_logger("candle.folder")


@dataclass(frozen=True)
class State:
    """How a file is; another one, or one that was written to, has another state."""

    size_bytes: int
    modified_ns: int
    changed_ns: int
    inode: int

    @property
    def changed_at(self) -> datetime:
        """When it was last written to, or put where it is."""
        return datetime.fromtimestamp(self.changed_ns / 1e9, UTC)


@dataclass(frozen=True)
class Found:
    """A file of the folder.

    Attributes:
        path: Below the folder.
        model: Which model it is.
        version: Which version, where its path says so.
        state: How it is.
    """

    path: str
    model: str
    version: str | None
    state: State


class Folder:
    """Offers the repository what lies in the models folder.

    Args:
        folder: The models folder; may come and go.
        repository: Where its files are entered.
        watched: Whether that is wanted, now.
    """

    def __init__(self, folder: Path, repository: Repository, watched: Callable[[], bool]) -> None:
        self._folder = folder
        self._repository = repository
        self._watched = watched
        self._settling: dict[str, tuple[State, float]] = {}
        self._handled: dict[str, State] = {}
        self._not_before: dict[str, float] = {}
        self._unreadable: frozenset[str] = frozenset()
        self._full = False

    @asynccontextmanager
    async def watching(self) -> AsyncGenerator[None]:
        """Watch it while inside."""
        async with beside(self._keep_looking()):
            yield

    async def _keep_looking(self) -> None:
        while True:
            if self._watched():
                await self._look()
            await asyncio.sleep(LOOK_S)

    async def _look(self) -> None:
        found, unreadable = await to_its_end(scanned, self._folder)
        self._say_unreadable(unreadable)
        self._say_full(len(found) > FILES_MAX)
        there = {one.path: one for one in found[:FILES_MAX]}
        for known in (self._settling, self._handled, self._not_before):
            for path in known.keys() - there.keys():
                del known[path]
        now = time.monotonic()
        for one in there.values():
            if self._handled.get(one.path) == one.state:
                continue
            state, since = self._settling.get(one.path, (None, now))
            if state != one.state:
                self._settling[one.path] = one.state, now
            elif now - since >= SETTLED_S and now >= self._not_before.get(one.path, 0.0):
                await self._offer(one)

    async def _offer(self, one: Found) -> None:
        """Enter a file, unless the repository has it; said once, and again when it changes."""
        try:
            added = await self._entered(one)
        except (Unavailable, OSError) as error:
            # The broker or its room, or the file was taken away under our eyes.
            self._not_before[one.path] = time.monotonic() + AGAIN_S
            log.warning("folder.waiting", path=one.path, cause=str(error))
            return
        except BusError as error:
            log.warning("folder.refused", path=one.path, cause=error.message)
        else:
            if added is not None:
                log.info(
                    "folder.entered",
                    path=one.path,
                    model=added.id,
                    version=added.version,
                    sound=added.report.sound,
                )
        self._handled[one.path] = one.state
        self._settling.pop(one.path, None)

    async def _entered(self, one: Found) -> m.AddedModel | None:
        """Make a file a version; None when the repository has these bytes, or removed them."""
        store = self._repository.store
        entry = await store.models.get(one.model)
        versions = entry.value.versions if entry and entry.value else []
        if any(_came_from(version, one) for version in versions):
            return None
        path = await to_its_end(self._repository.find, one.path)
        checksum = await to_its_end(sha256_of, path)
        if any(
            version.checksum == checksum and one.version in (None, version.version)
            for version in versions
        ):
            return None
        removed = await store.removed.get(one.model, checksum)
        if removed and removed.value and removed.value.removed_at >= one.state.changed_at:
            log.info("folder.passed_over", path=one.path, model=one.model, removed=True)
            return None
        await store.artefacts.put(checksum, path)
        return await self._repository.enter(
            m.AddModel(
                id=one.model,
                checksum=checksum,
                file_name=one.path,
                version=one.version,
                source=m.ModelSource(kind="folder", file_name=one.path),
                licence=licence_of(checksum),
            )
        )

    def _say_unreadable(self, causes: Mapping[str, str]) -> None:
        for path in sorted(causes.keys() - self._unreadable):
            log.warning("folder.unreadable", path=path, cause=causes[path])
        self._unreadable = frozenset(causes)

    def _say_full(self, full: bool) -> None:
        if full and not self._full:
            log.warning("folder.full", path=str(self._folder), files_max=FILES_MAX)
        self._full = full


def scanned(folder: Path) -> tuple[list[Found], dict[str, str]]:
    """Return the files that may be models, by path, and by path why others cannot be looked at.

    The files are a few more than may be, at most. Blocks.
    """
    found: list[Found] = []
    unreadable: dict[str, str] = {}
    files, folders = _entries(folder, unreadable)
    for file in files:
        name = Path(file.name)
        if name.suffix.lower() in FORMATS:
            found += _as_found(file, file.name, name.stem, None)
        if len(found) > FILES_MAX:
            break
    for model in folders:
        if len(found) > FILES_MAX:
            break
        for version in _entries(Path(model.path), unreadable)[1]:
            found += _model_files(version, model.name, unreadable)
    return sorted(found, key=lambda one: one.path), unreadable


def _model_files(
    version: os.DirEntry[str], model: str, unreadable: dict[str, str]
) -> Iterator[Found]:
    for file in _entries(Path(version.path), unreadable)[0]:
        name = Path(file.name)
        if name.stem == "model" and name.suffix.lower() in FORMATS:
            path = f"{model}/{version.name}/{file.name}"
            yield from _as_found(file, path, model, version.name)


def _entries(
    folder: Path, unreadable: dict[str, str]
) -> tuple[list[os.DirEntry[str]], list[os.DirEntry[str]]]:
    """Return the files and the folders in a folder, but for what is hidden.

    There are none if it cannot be read. What cannot be told to be either, such as a link that
    leads to itself, is put down as unreadable, with the cause.
    """
    files: list[os.DirEntry[str]] = []
    folders: list[os.DirEntry[str]] = []
    with contextlib.suppress(OSError), os.scandir(folder) as there:
        for entry in islice(there, ENTRIES_MAX):
            if entry.name.startswith("."):
                continue
            try:
                if entry.is_dir():
                    folders.append(entry)
                elif entry.is_file():
                    files.append(entry)
            except OSError as error:
                path = os.fsencode(entry.path).decode(errors="replace")
                unreadable[path] = error.strerror or str(error)
    return files, folders


def _as_found(
    entry: os.DirEntry[str], path: str, model: str, version: str | None
) -> Iterator[Found]:
    """Give a file as found, unless it has gone or its name can be no model's."""
    try:
        msgspec.convert({"id": model, "version": version}, m.ValidateModel)
        path.encode()
        stat = entry.stat()
    except (msgspec.ValidationError, UnicodeError, OSError):
        return
    state = State(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    yield Found(path, model, version, state)


def _came_from(version: m.ModelVersion, one: Found) -> bool:
    """Tell whether a version is what a file was when it was last changed, without reading it."""
    return (
        version.path == one.path
        and version.size_bytes == one.state.size_bytes
        and version.added_at >= one.state.changed_at
        and version.source is not None
        and version.source.kind == "folder"
    )

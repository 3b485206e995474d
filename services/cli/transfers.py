"""Bytes on their way into a store and out of it; and the commands that move a model: push, pull."""

import asyncio
import contextlib
import fcntl
import hashlib
import os
import secrets
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import platformdirs
import typer
from rich.filesize import decimal

from bus import codec
from bus import messages as m
from bus.artefacts import Artefacts
from bus.client import Client
from bus.errors import NotFound, Unprocessable
from bus.subjects import MODEL_ADD, MODEL_LOAD
from services.cli.console import out, show_json
from services.cli.models import VALIDATE_S, end_unsound, look_up
from services.cli.models_shown import show_loaded, show_report
from services.cli.options import Platform, named
from services.cli.plugins import connected
from services.cli.progress import Meter

BLOCK_BYTES: Final = 1024 * 1024
# An upload that was broken off is remembered for so long; what it left is garbage by then.
REMEMBERED_S: Final = 86_400


async def push(
    file: Path,
    model: str | None,
    at: Platform,
    *,
    version: str | None,
    description: str | None,
    labels: Mapping[str, str] | None,
    licence: str | None,
    load: bool,
    timeout_s: float,
) -> None:
    """Bring a file into the repository, print what its validation found, and perhaps load it.

    Raises:
        typer.Exit: It is not sound.
    """
    file = readable(file, "a model's file")
    name, version = named(model or file.stem, version)
    more = {"version": version, "description": description, "labels": labels, "licence": licence}
    source = {"kind": "upload", "file_name": file.name, "by": "cli"}
    said = {"id": name, "file_name": file.name, "source": source}
    said |= {key: value for key, value in more.items() if value is not None}
    # Whatever is wrong with the names is said before anything is sent.
    codec.convert(said | {"checksum": "0" * 64}, m.AddModel)
    before = file.stat()
    digest = await digest_of(file, before.st_size, quiet=at.as_json)
    ask = codec.convert(said | {"checksum": digest}, m.AddModel)
    async with connected(at.nats, at.data_dir) as client:
        await store(client.store.artefacts, client.root, file, before, digest, quiet=at.as_json)
        added = await client.call(MODEL_ADD, ask, timeout_s=VALIDATE_S)
        loaded = None
        if load and added.report.sound:
            wanted = m.LoadModel(id=added.id, version=added.version)
            loaded = await client.call(MODEL_LOAD, wanted, timeout_s=timeout_s)
    if at.as_json:
        show_json(added)
    else:
        show_added(added)
        if loaded:
            show_loaded(loaded)
    end_unsound(added.report)


def show_added(added: m.AddedModel) -> None:
    """Print a version that the repository has now, and what its validation found."""
    was = "" if added.created else ", as before"
    out.print(f"{added.id}:{added.version} is in the repository{was}, sha256 {added.checksum}")
    show_report(added.report)


async def pull(model: str, target: str | None, at: Platform, *, force: bool) -> None:
    """Write a version's artefact to a file, whole and sound or not at all; `-` is stdout.

    Raises:
        typer.BadParameter: The file is there already, or cannot be one.
        NotFound: There is no such version, or its artefact is not stored.
        Unprocessable: What is stored has another digest.
    """
    async with connected(at.nats, at.data_dir) as client:
        spec, version = await look_up(client, model)
        if target == "-":
            await _copy(client, spec, version, sys.stdout.buffer, quiet=True)
            return
        path = target_of(target, f"{spec.id}{Path(version.path).suffix.lower()}", force=force)
        with appearing(path, force=force) as file:
            await _copy(client, spec, version, file, quiet=at.as_json)
    if at.as_json:
        pulled = {"id": spec.id, "version": version.version, "checksum": version.checksum}
        show_json(pulled | {"path": str(path), "size_bytes": path.stat().st_size})
    else:
        size = decimal(path.stat().st_size)
        out.print(f"{spec.id}:{version.version} is in {path}, {size}, sha256 {version.checksum}")


async def _copy(
    client: Client, spec: m.ModelSpec, version: m.ModelVersion, file: IO[bytes], *, quiet: bool
) -> None:
    what = f"{spec.id}:{version.version}"
    with Meter(f"pulling {what}", quiet=quiet) as meter:
        await copy(client.store.artefacts, version.checksum, what, file, meter)


async def copy(artefacts: Artefacts, digest: str, what: str, file: IO[bytes], meter: Meter) -> None:
    """Write an artefact to an open file.

    Args:
        artefacts: Where it is stored.
        digest: Its SHA-256.
        what: What it is of, for the errors.
        file: Where it goes.
        meter: Shows how far it is.

    Raises:
        NotFound: It is not stored.
        Unprocessable: What is stored has another digest.
    """
    sha, done = hashlib.sha256(), 0
    total = await artefacts.size(digest)
    if total is None:
        raise NotFound(f"the artefact of {what} is not stored any more; push its file again")
    meter.to(0, total)
    async with contextlib.aclosing(artefacts.read(digest)) as blocks:  # type: ignore[type-var]
        async for block in blocks:
            await asyncio.to_thread(file.write, block)
            sha.update(block)
            done += len(block)
            meter.to(done)
    file.flush()
    if sha.hexdigest() != digest:
        raise Unprocessable(
            f"what is stored of {what} is broken: it has the SHA-256 {sha.hexdigest()}, not "
            f"{digest}; push its file again"
        )


async def digest_of(file: Path, size: int, *, quiet: bool) -> str:
    """Return a file's SHA-256: what is stored already is not sent again, and what is sent fits."""
    sha, done = hashlib.sha256(), 0
    with Meter(f"reading {file.name}", size, quiet=quiet, sums_up=False) as meter:
        async for block in _blocks(file):
            sha.update(block)
            done += len(block)
            meter.to(done)
    return sha.hexdigest()


async def store(
    artefacts: Artefacts,
    place: str,
    file: Path,
    before: os.stat_result,
    digest: str,
    *,
    quiet: bool,
) -> None:
    """Have a file in an object store; what was broken off is taken up where it was.

    Args:
        artefacts: The store.
        place: Names it, so that an upload into another one is not taken up.
        file: What is stored.
        before: How the file was when its digest was taken.
        digest: Its SHA-256.
        quiet: Whether progress is left out.

    Raises:
        Unprocessable: It was changed meanwhile.
    """
    size = before.st_size
    if await artefacts.size(digest) == size:
        return
    with _remembered(f"{file}|{size}|{before.st_mtime_ns}|{place}") as memory:
        async with contextlib.AsyncExitStack() as stack:
            upload = None
            if memory.upload:
                with contextlib.suppress(NotFound):
                    upload = await stack.enter_async_context(artefacts.resuming(memory.upload))
            if upload is None:
                upload = await stack.enter_async_context(artefacts.writing(size))
                # From the beginning: whatever ends this process, the next one goes on.
                await upload.keep()
                memory.write(upload.id)
            with Meter(f"pushing {file.name}", size, quiet=quiet) as meter:
                if upload.offset:
                    sys.stderr.write(f"going on behind {decimal(upload.offset)}\n")
                meter.begin_at(upload.offset)
                try:
                    async for block in _blocks(file, upload.offset):
                        await upload.write(block)
                        meter.to(upload.offset)
                except asyncio.CancelledError:
                    sys.stderr.write("what was sent is kept; give the same command to go on\n")
                    raise
            try:
                await upload.commit(digest)
            except Unprocessable:
                memory.forget()
                raise Unprocessable(
                    f"{file} was changed while it was sent; push it again"
                ) from None
        memory.forget()


async def _blocks(file: Path, start: int = 0) -> AsyncIterator[bytes]:
    with file.open("rb") as opened:
        opened.seek(start)
        while block := await asyncio.to_thread(opened.read, BLOCK_BYTES):
            yield block


@dataclass
class _Memory:
    """What is known of an upload that was broken off.

    Attributes:
        upload: Its id, if there is one.
        write: Remembers another one.
        forget: Forgets it.
    """

    upload: str
    write: Callable[[str], object]
    forget: Callable[[], object]


@contextlib.contextmanager
def _remembered(key: str) -> Iterator[_Memory]:
    """Hold what is remembered of a file's upload; two pushes of one file do not share it."""
    folder = platformdirs.user_cache_path("bkg", appauthor=False) / "uploads"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / hashlib.sha256(key.encode()).hexdigest()[:32]
    for old in folder.iterdir():
        with contextlib.suppress(OSError):
            if old != path and old.stat().st_mtime < time.time() - REMEMBERED_S:
                old.unlink()
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield _Memory("", lambda _upload: None, lambda: None)
            return

        def write(upload: str) -> None:
            file.truncate(0)
            file.write(upload)
            file.flush()

        file.seek(0)
        yield _Memory(file.read(64).strip(), write, lambda: path.unlink(missing_ok=True))


def readable(path: Path, what: str) -> Path:
    """Return a file that can be read; raises BadParameter if it is none, and asks for `what`."""
    try:
        if not path.is_file():
            found = "a folder" if path.is_dir() else "not there"
            raise typer.BadParameter(f"{path} is {found}; give {what}")
        with path.open("rb"):
            return path.resolve()
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be read: {error.strerror}") from None


def target_of(given: str | None, name: str, *, force: bool) -> Path:
    """Return the file to write to: `name` here or in the folder that is given, or what is given."""
    path = Path(given or name)
    if path.is_dir():
        path /= name
    _check_free(path, force=force)
    return path


def _check_free(path: Path, *, force: bool) -> None:
    if path.exists() and not (force and path.is_file()):
        how = "--force writes over it" if path.is_file() else "name a file with -o"
        raise typer.BadParameter(f"{path} is there already; {how}")


@contextlib.contextmanager
def appearing(path: Path, *, force: bool) -> Iterator[IO[bytes]]:
    """Write a file while inside; it is there whole when that ended well, and else not at all.

    Raises:
        typer.BadParameter: Its folder cannot be written to, or it is there already.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with _opened(part) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # Somebody else may have made it meanwhile.
        _check_free(path, force=force)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def _opened(part: Path) -> Iterator[IO[bytes]]:
    try:
        file = part.open("xb")
    except OSError as error:
        raise typer.BadParameter(
            f"{part.parent} cannot be written to: {error.strerror}", param_hint="-o"
        ) from None
    with file:
        yield file

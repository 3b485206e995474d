"""Models and their artefacts: the folder people drop files into, the store, the local cache.

What should be served stands in a bucket and names its artefact by SHA-256; the bytes stand in the
broker's object store. So a replica on another host needs no shared disk: it fetches what its own
cache lacks. The cache can be deleted at any time.
"""

import asyncio
import hashlib
import shutil
from collections.abc import AsyncIterator
from importlib.resources import files
from pathlib import Path
from typing import Final

import structlog

from bus.errors import InvalidRequest, NotFound, TooLarge, Unprocessable
from bus.messages import ModelSpec
from bus.state import Changes, Store

MAX_BYTES: Final = 2 * 1024**3
SAMPLES: Final = ("linear-demo.json", "iris.onnx")

log = structlog.get_logger("candle.repository")


class Repository:
    """What to serve, and where its bytes are.

    Args:
        store: The buckets and the object store.
        models_dir: Where people put model files; made, with the samples in it, if missing.
        cache_dir: Where artefacts are kept by digest.
    """

    def __init__(self, store: Store, models_dir: Path, cache_dir: Path) -> None:
        self._store = store
        self._models_dir = models_dir
        self._artefacts_dir = cache_dir / "artefacts"

    async def open(self) -> None:
        """Make the folders; a new models folder gets the sample models."""
        await asyncio.to_thread(self._make_folders)

    def find(self, path: str) -> Path:
        """Return the file that a path below the models folder names.

        Raises:
            InvalidRequest: The path leaves the folder.
            NotFound: There is no such file; says which there are.
        """
        folder = self._models_dir.resolve()
        try:
            found = (folder / path).resolve()
            is_file = found.is_file()
        except (ValueError, OSError, RuntimeError):
            raise InvalidRequest("path: cannot be the path of a file", field="path") from None
        if not found.is_relative_to(folder):
            raise InvalidRequest(
                f"path: {path!r} leaves the models folder; give a path inside it", field="path"
            )
        if not is_file:
            there = sorted(p.name for p in folder.iterdir() if p.is_file())
            raise NotFound(
                f"there is no file {path!r} in the models folder; there are: "
                f"{', '.join(there[:20]) or 'none'}",
                field="path",
            )
        if found.stat().st_size > MAX_BYTES:
            raise TooLarge(f"{path!r} has more than {MAX_BYTES:,} bytes", field="path")
        return found

    async def keep(self, path: Path) -> str:
        """Put a file into the object store, and return its SHA-256 in hex."""
        digest = await asyncio.to_thread(_sha256, path)
        await self._store.artefacts.put(digest, path)
        return digest

    async def bring(self, spec: ModelSpec) -> Path:
        """Return the local copy of a model's artefact, fetched if it is not there yet.

        Raises:
            NotFound: The object store does not have it.
            Unprocessable: What it has is not what the digest says.
        """
        local = self._artefacts_dir / f"{spec.checksum}{Path(spec.path).suffix.lower()}"
        if not local.exists():
            await self._store.artefacts.fetch(spec.checksum, local)
        if await asyncio.to_thread(_sha256, local) != spec.checksum:
            local.unlink(missing_ok=True)
            raise Unprocessable(f"the artefact of {spec.id} does not have the digest of its name")
        return local

    async def want(self, spec: ModelSpec) -> int:
        """Have a model served by every replica; return the revision of that wish."""
        return await self._store.models.put(spec, spec.id)

    async def forget(self, model: str) -> None:
        """Have a model served no longer.

        Raises:
            NotFound: It was not.
        """
        if await self._store.models.get(model) is None:
            raise NotFound(f"there is no model {model!r}", field="id")
        await self._store.models.delete(model)

    def follow(self) -> AsyncIterator[Changes[ModelSpec]]:
        """Give what should be served, and then every change."""
        return self._store.models.follow()

    def _make_folders(self) -> None:
        self._artefacts_dir.mkdir(parents=True, exist_ok=True)
        if self._models_dir.exists():
            return
        self._models_dir.mkdir(parents=True)
        for name in SAMPLES:
            with (
                files("services.candle").joinpath("models", name).open("rb") as sample,
                (self._models_dir / name).open("wb") as copy,
            ):
                shutil.copyfileobj(sample, copy)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

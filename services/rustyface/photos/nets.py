"""Files of nets that the settings name: from the model repository, by digest, or on this host."""

import asyncio
import hashlib
import re
from pathlib import Path
from typing import Final

from bus.errors import InvalidRequest, NotFound, Unprocessable
from bus.models import version_of
from bus.state import Store

_DIGEST: Final = re.compile(r"\A[0-9a-f]{64}\Z")


class Nets:
    """Brings what a setting names onto this host's disk.

    Args:
        store: Has the model repository.
        data_dir: Paths are below it.
        cache_dir: Artefacts are kept in it under their digest, each fetched once; made if missing.
    """

    def __init__(self, store: Store, data_dir: Path, cache_dir: Path) -> None:
        self._store = store
        self._data_dir = data_dir
        self._cache_dir = cache_dir

    async def file(self, named: str, *, setting: str) -> Path:
        """Return the file that a setting names; see `settings.ModelRef`.

        Args:
            named: Its value.
            setting: Its name, for the error.

        Raises:
            InvalidRequest: The path leads out of the data directory.
            NotFound: There is no such file, model or version; says which there are.
            Unprocessable: The version is not ONNX or not sound, or the stored artefact is broken.
            DeadlineExceeded: The artefact stopped coming.
        """
        if named.endswith(".onnx"):
            return await asyncio.to_thread(self._below, named, setting)
        digest = named if _DIGEST.match(named) else await self._digest_of(named, setting)
        path = self._cache_dir / f"{digest}.onnx"
        if await asyncio.to_thread(_is_whole, path, digest):
            return path
        await asyncio.to_thread(path.parent.mkdir, parents=True, exist_ok=True)
        try:
            await self._store.artefacts.fetch(digest, path)
        except NotFound as error:
            raise NotFound(f"{setting}: {error.message}", field=setting) from None
        return path

    def _below(self, named: str, setting: str) -> Path:
        root = self._data_dir.resolve()
        path = (root / named).resolve()
        if not path.is_relative_to(root):
            raise InvalidRequest(
                f"{setting}: {named!r} leads out of the data directory {root}", field=setting
            )
        if not path.is_file():
            raise NotFound(f"{setting}: there is no file {path}", field=setting)
        return path

    async def _digest_of(self, named: str, setting: str) -> str:
        """Return the artefact of a version that is named as `NAME` or `NAME@VERSION`."""
        model, at, wanted = named.rpartition("@")
        entry = await self._store.models.get(named)
        if entry is None and at:
            entry = await self._store.models.get(model)
        else:
            wanted = ""
        spec = entry.value if entry else None
        if spec is None:
            raise NotFound(
                f"{setting}: there is no model {named!r} in the repository (a path has to end in "
                ".onnx)",
                field=setting,
            )
        version = version_of(spec, wanted or None)
        if version is None:
            there = ", ".join(one.version for one in spec.versions) or "none"
            raise NotFound(
                f"{setting}: the model {spec.id!r} has no version {wanted or 'default'!r}; there "
                f"are: {there}",
                field=setting,
            )
        if version.format != "onnx":
            raise Unprocessable(
                f"{setting}: version {version.version} of {spec.id!r} is {version.format}, "
                "not onnx",
                field=setting,
            )
        if version.sound is False:
            raise Unprocessable(
                f"{setting}: version {version.version} of {spec.id!r} is not sound: "
                f"{version.problem}",
                field=setting,
            )
        return version.checksum


def _is_whole(path: Path, digest: str) -> bool:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == digest
    except FileNotFoundError:
        return False

"""Models and their artefacts: the folder people drop files into, the store, the local cache.

What there is, and what of it should be served, stands in a bucket and names artefacts by SHA-256;
the bytes stand in the broker's object store. So a replica on another host needs no shared disk: it
fetches what its own cache lacks.
"""

import asyncio
import shutil
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Final

import msgspec
import structlog

from bus import messages as m
from bus.errors import Conflict, InvalidRequest, NotFound, TooLarge, Unprocessable
from bus.models import DEFAULT, LATEST, next_version, version_of
from bus.state import Changes, Store
from bus.tasks import to_its_end
from services.candle.cache import Cache, sha256_of
from services.candle.runtimes import FORMATS
from services.candle.runtimes.base import Signature
from services.candle.validation import validate

MAX_BYTES: Final = 2 * 1024**3
SAMPLES: Final = ("linear-demo.json", "iris.onnx")
# Versions that nobody wants any more are forgotten beyond this many of a model.
VERSIONS_KEPT: Final = 32
FILE_NAME_MAX_BYTES: Final = 200
_TRIES: Final = 20

log = structlog.get_logger("candle.repository")

Change = Callable[[m.ModelSpec | None], m.ModelSpec]


class Repository:
    """What models there are, and where their bytes are.

    Args:
        store: The buckets and the object store.
        models_dir: Where people put model files; made, with the samples in it, if missing.
        cache: Where artefacts are kept by digest.
    """

    def __init__(self, store: Store, models_dir: Path, cache: Cache) -> None:
        self.cache = cache
        self._store = store
        self._models_dir = models_dir
        self._inspecting = asyncio.Lock()

    async def open(self) -> None:
        """Make the folders; a new models folder gets the sample models."""
        await asyncio.to_thread(self._make_folders)

    def follow(self) -> AsyncIterator[Changes[m.ModelSpec]]:
        """Give what there is, and then every change."""
        return self._store.models.follow()

    @asynccontextmanager
    async def artefact(
        self, version: m.ModelVersion, told: Callable[[float], None]
    ) -> AsyncGenerator[Path]:
        """Have a version's artefact on the disk while inside.

        Args:
            version: Whose.
            told: Is called with the share that has come, should it have to be fetched.

        Raises:
            NotFound: The object store does not have it.
            Unprocessable: What it has is not what the digest says.
            Unavailable: The disk is full.
        """

        async def fetch(path: Path) -> None:
            await self._store.artefacts.fetch(version.checksum, path, told=told)

        suffix = Path(version.path).suffix.lower()
        async with self.cache.holding(version.checksum, suffix, version.size_bytes, fetch) as path:
            yield path

    async def add(self, request: m.LoadModel) -> tuple[str, int]:
        """Have a file served as a version of a model; return the version and the wish's revision.

        It is opened first: what is not sound never becomes a version.

        Raises:
            InvalidRequest: The path leaves the models folder, or names no format.
            NotFound: There is no such file or version; says which there are.
            Unprocessable: It is not a sound model; says why.
        """
        if request.version in {DEFAULT, LATEST}:
            raise InvalidRequest(
                f"version: {request.version!r} is an alias; a version needs a name of its own",
                field="version",
            )
        if request.content is not None:
            with tempfile.TemporaryDirectory(prefix="bkg-") as folder:
                path = Path(folder) / _file_name(request.path)
                await asyncio.to_thread(path.write_bytes, request.content)
                made = await self._version_from(path, request.path or "")
        else:
            given = request.path or await self._path_of_unknown(request)
            if given is None:
                return await self._want_again(request)
            made = await self._version_from(self.find(given), given)
        name = ""

        def change(spec: m.ModelSpec | None) -> m.ModelSpec:
            nonlocal name
            spec, name = _with(spec, request, made)
            return spec

        revision = await self._change(request.id, change)
        return name, revision

    async def unwant(self, model: str, version: str | None) -> int:
        """Have a model, or one version of it, served no longer; return the wish's revision.

        Raises:
            NotFound: It was not.
        """

        def change(spec: m.ModelSpec | None) -> m.ModelSpec:
            if version is None:
                names = {v.version for v in spec.versions} if spec else set()
            else:
                meant = version_of(spec, version) if spec else None
                names = {meant.version} if meant else set()
            if spec is None or not any(v.wanted and v.version in names for v in spec.versions):
                what = f"model {model!r}" + (f" in version {version!r}" if version else "")
                raise NotFound(f"there is no {what} loaded", field="id")
            kept = [
                msgspec.structs.replace(v, wanted=False) if v.version in names else v
                for v in spec.versions
            ]
            # A name that stood for this one version goes with it; those of a whole model wait.
            aliases = {a: v for a, v in spec.aliases.items() if not version or v not in names}
            return msgspec.structs.replace(spec, versions=kept, aliases=aliases)

        return await self._change(model, change)

    async def alias(self, request: m.AliasModel) -> tuple[m.ModelSpec, int]:
        """Let a name stand for another version; return the model and the wish's revision.

        Raises:
            NotFound: There is no such model or version; says which there are.
            InvalidRequest: The name is a version's, or `latest`.
            Conflict: The version is not loaded.
        """
        changed: m.ModelSpec | None = None

        def change(spec: m.ModelSpec | None) -> m.ModelSpec:
            nonlocal changed
            changed = _aliased(spec, request)
            return changed

        revision = await self._change(request.id, change)
        assert changed is not None  # noqa: S101 - `_change` has called it
        return changed, revision

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

    async def _path_of_unknown(self, request: m.LoadModel) -> str | None:
        """Return the file that a model which the repository lacks is likely to mean."""
        if await self._store.models.get(request.id) is not None:
            return None
        for path in _likely_paths(request.id, request.version):
            try:
                self.find(path)
            except (NotFound, InvalidRequest):
                continue
            return path
        raise NotFound(
            f"there is no model {request.id!r}, and no file {request.id}.onnx or {request.id}.json "
            "in the models folder; give the path of its file",
            field="id",
        )

    async def _version_from(self, file: Path, path: str) -> m.ModelVersion:
        if Path(path).suffix.lower() not in FORMATS:
            raise InvalidRequest(
                f"{path!r}: the format is told by the suffix; served are {', '.join(FORMATS)}",
                field="path",
            )
        checksum = await to_its_end(sha256_of, file)
        report = await self._validated(file, Path(path).name, checksum)
        if not report.sound:
            raise unsound(report)
        await self._store.artefacts.put(checksum, file)
        await self._store.reports.put(report, checksum)
        return _version_of(report, path)

    async def _validated(self, file: Path, name: str, checksum: str) -> m.ModelReport:
        """Return what a file is; every artefact comes through here before it can be loaded."""
        # One at a time: each takes the memory of a whole model, for which no room was made.
        async with self._inspecting:
            return await validate(file, name=name, checksum=checksum)

    async def _want_again(self, request: m.LoadModel) -> tuple[str, int]:
        name = ""

        def change(spec: m.ModelSpec | None) -> m.ModelSpec:
            nonlocal name
            meant = version_of(spec, request.version) if spec else None
            if spec is None or meant is None:
                known = ", ".join(v.version for v in spec.versions) if spec else ""
                raise NotFound(
                    f"there is no model {request.id!r}"
                    + (f" in version {request.version!r}; there are: {known}" if known else ""),
                    field="version" if known else "id",
                )
            name = meant.version
            again = msgspec.structs.replace(
                meant,
                wanted=True,
                wanted_at=m.now(),
                config=request.config if request.config is not None else meant.config,
            )
            return _replaced(spec, again)

        revision = await self._change(request.id, change)
        return name, revision

    async def _change(self, model: str, change: Change) -> int:
        """Write what `change` makes of a model, again while others write it, too."""
        for _ in range(_TRIES):
            last = await self._store.models.last(model)
            spec = change(last.value if last else None)
            try:
                return await self._store.models.update(spec, last.revision if last else 0, model)
            except Conflict:
                continue
        raise Conflict(f"others keep changing {model!r}; try again")

    def _make_folders(self) -> None:
        self.cache.open()
        if self._models_dir.exists():
            return
        self._models_dir.mkdir(parents=True)
        for name in SAMPLES:
            with (
                files("services.candle").joinpath("models", name).open("rb") as sample,
                (self._models_dir / name).open("wb") as copy,
            ):
                shutil.copyfileobj(sample, copy)


def unsound(report: m.ModelReport) -> Unprocessable:
    """Return the error for an artefact that cannot be loaded, with everything that is wrong."""
    first = report.problems[0]
    said = [problem.what for problem in report.problems]
    return Unprocessable(
        first.what, field=first.where or None, reasons=said if len(said) > 1 else None
    )


def _version_of(report: m.ModelReport, path: str) -> m.ModelVersion:
    return m.ModelVersion(
        version="1",
        path=path,
        checksum=report.checksum,
        format=report.format,
        added_at=m.now(),
        wanted_at=m.now(),
        size_bytes=report.size_bytes,
        inputs=report.inputs,
        outputs=report.outputs,
        batched=report.batched,
        sound=True,
    )


def tensors_of(signature: Signature) -> tuple[list[m.TensorInfo], list[m.TensorInfo]]:
    """Return inputs and outputs as they travel."""
    inputs, outputs = (
        [m.TensorInfo(name=t.name, datatype=t.datatype, shape=list(t.shape)) for t in side]
        for side in (signature.inputs, signature.outputs)
    )
    return inputs, outputs


def _file_name(path: str | None) -> str:
    """Return the name of a file that comes with a request.

    Raises:
        InvalidRequest: It can be none.
    """
    name = Path(path or "").name
    if not name or name == ".." or "\0" in name or len(name.encode()) > FILE_NAME_MAX_BYTES:
        raise InvalidRequest(
            f"path: {(path or '')[:80]!r} does not end in a file's name, such as model.onnx, of at "
            f"most {FILE_NAME_MAX_BYTES} bytes",
            field="path",
        )
    return name


def _with(
    spec: m.ModelSpec | None, request: m.LoadModel, made: m.ModelVersion
) -> tuple[m.ModelSpec, str]:
    """Return a model with one more version, and that version's name."""
    spec = spec or m.ModelSpec(id=request.id, versions=[])
    present = version_of(spec, request.version)
    config = request.config or (present.config if present else m.ModelConfig())
    made = msgspec.structs.replace(made, config=config)
    if request.version is not None:
        made = msgspec.structs.replace(made, version=request.version)
        return _replaced(spec, made), made.version
    if present and present.checksum == made.checksum:
        # The same file again: nothing new, but it should be served, and perhaps in another way.
        made = msgspec.structs.replace(made, version=present.version, added_at=present.added_at)
        return _replaced(spec, made), made.version
    made = msgspec.structs.replace(made, version=next_version(spec))
    others = [msgspec.structs.replace(v, wanted=False) for v in spec.versions]
    aliases = {name: v for name, v in spec.aliases.items() if name != DEFAULT}
    spec = msgspec.structs.replace(spec, versions=others, aliases=aliases)
    return _replaced(spec, made), made.version


def _replaced(spec: m.ModelSpec, version: m.ModelVersion) -> m.ModelSpec:
    """Return a model with a version put in or put anew, without too many that nobody wants."""
    kept = [version if v.version == version.version else v for v in spec.versions]
    if version not in kept:
        kept.append(version)
    surplus = [v for v in kept if not v.wanted and v.version not in spec.aliases.values()]
    for old in surplus[: max(0, len(kept) - VERSIONS_KEPT)]:
        kept.remove(old)
    return msgspec.structs.replace(spec, versions=kept)


def _aliased(spec: m.ModelSpec | None, request: m.AliasModel) -> m.ModelSpec:
    if spec is None:
        raise NotFound(f"there is no model {request.id!r}", field="id")
    names = [v.version for v in spec.versions]
    if request.alias == LATEST or request.alias in names:
        why = "goes with the versions" if request.alias == LATEST else "is a version's own name"
        raise InvalidRequest(f"alias: {request.alias!r} {why}; take another name", field="alias")
    aliases = {name: v for name, v in spec.aliases.items() if name != request.alias}
    if request.version is not None:
        meant = version_of(spec, request.version)
        if meant is None:
            raise NotFound(
                f"there is no version {request.version!r} of {request.id!r}; there are: "
                f"{', '.join(names) or 'none'}",
                field="version",
            )
        if not meant.wanted:
            raise Conflict(
                f"version {meant.version!r} of {request.id!r} is not loaded; load it first"
            )
        aliases[request.alias] = meant.version
    return msgspec.structs.replace(spec, aliases=aliases)


def _likely_paths(model: str, version: str | None) -> Sequence[str]:
    """Return where a model's file may lie: by its name, or as Triton lays repositories out."""
    flat = [f"{model}{suffix}" for suffix in FORMATS]
    return [*flat, *(f"{model}/{version or 1}/model{suffix}" for suffix in FORMATS)]

"""Models and their artefacts: the folder people drop files into, the store, the local cache.

What there is, and what of it should be served, stands in a bucket and names artefacts by SHA-256;
the bytes stand in the broker's object store. So a replica on another host needs no shared disk: it
fetches what its own cache lacks. What wishes make of a model's entry is in `specs`, how models and
artefacts leave in `garbage`.
"""

import asyncio
import shutil
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog

from bus import messages as m
from bus.errors import Conflict, InvalidRequest, NotFound, TooLarge, Unprocessable
from bus.state import Changes, Store
from bus.tasks import to_its_end
from services.candle.models.shipped import SAMPLES, licence_of
from services.candle.repository import specs
from services.candle.repository.cache import Cache, sha256_of
from services.candle.repository.validation import Limits, validate
from services.candle.runtimes import FORMATS

MAX_BYTES: Final = 2 * 1024**3
FILE_NAME_MAX_BYTES: Final = 200
_TRIES: Final = 20

log = structlog.get_logger("candle.repository")

Change = Callable[[m.ModelSpec | None], m.ModelSpec | None]


class Repository:
    """What models there are, and where their bytes are.

    Attributes:
        cache: Where artefacts are kept by digest.
        models_dir: Where people put model files.
        store: The buckets and the object store.
        limits: What looking into one file may take; can be changed at any time.

    Args:
        store: The buckets and the object store.
        models_dir: Where people put model files; made, with the samples in it, if missing.
        cache: Where artefacts are kept by digest.
    """

    def __init__(self, store: Store, models_dir: Path, cache: Cache) -> None:
        self.cache = cache
        self.store = store
        self.limits = Limits()
        self.models_dir = models_dir
        self._inspecting = asyncio.Lock()

    async def open(self) -> None:
        """Make the folders; a new models folder gets the sample models."""
        await asyncio.to_thread(self._make_folders)

    def follow(self) -> AsyncIterator[Changes[m.ModelSpec]]:
        """Give what there is, and then every change."""
        return self.store.models.follow()

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
            NoSpace: The disk is full.
        """
        async with self._held(version.checksum, version.path, version.size_bytes, told) as path:
            yield path

    # --- Wishes -----------------------------------------------------------------------------------

    async def want(self, request: m.LoadModel) -> tuple[str, int]:
        """Have a version of a model served; return the version and the wish's revision.

        A file that comes with the wish is validated first: what is not sound never becomes a
        version.

        Raises:
            InvalidRequest: The path leaves the models folder, or names no format.
            NotFound: There is no such file or version; says which there are.
            Conflict: The version has other bytes; names the next free number.
            Unprocessable: It is not a sound model; says why.
        """
        specs.check_name(request.version)
        if request.content is not None:
            with tempfile.TemporaryDirectory(prefix="bkg-") as folder:
                path = Path(folder) / _file_name(request.path or "", "path")
                await asyncio.to_thread(path.write_bytes, request.content)
                made = await self._brought(request, path, request.path or "", "content")
        else:
            given = request.path or await self._path_of_unknown(request)
            if given is None:
                return await self._want_again(request)
            made = await self._brought(request, self.find(given), given, "folder")
        name = ""

        def change(spec: m.ModelSpec | None) -> m.ModelSpec:
            nonlocal name
            spec, name = specs.loaded(spec, request, made)
            if spec.licence is None:
                spec = msgspec.structs.replace(spec, licence=licence_of(made.checksum))
            return spec

        revision = await self.change(request.id, change)
        return name, revision

    async def unwant(self, model: str, version: str | None) -> int:
        """Have a model, or one version of it, served no longer; return the wish's revision.

        Raises:
            NotFound: It was not.
        """
        return await self.change(model, lambda spec: specs.unwanted(spec, model, version))

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
            changed = specs.aliased(spec, request)
            return changed

        revision = await self.change(request.id, change)
        assert changed is not None  # noqa: S101 - `change` has called it
        return changed, revision

    async def describe(self, request: m.DescribeModel) -> m.ModelSpec:
        """Change what people read about a model, and return it.

        Raises:
            NotFound: There is no such model.
        """
        changed: m.ModelSpec | None = None

        def change(spec: m.ModelSpec | None) -> m.ModelSpec:
            nonlocal changed
            if spec is None:
                raise NotFound(f"there is no model {request.id!r}", field="id")
            changed = specs.described(spec, request)
            return changed

        await self.change(request.id, change)
        assert changed is not None  # noqa: S101 - `change` has called it
        return changed

    # --- Artefacts become versions ----------------------------------------------------------------

    async def enter(self, request: m.AddModel) -> m.AddedModel:
        """Make an artefact of the object store a version of a model, not yet served.

        What is not sound becomes one, too, to be looked at; it cannot be loaded. The same bytes
        under the same version, or without one, are there once.

        Raises:
            InvalidRequest: The file's name names no format, or the version's is an alias.
            NotFound: There is no such artefact.
            Conflict: The version has other bytes; names the next free number.
            NoSpace: The disk here has no room for it.
        """
        specs.check_name(request.version)
        format_name = _format_of(request.file_name, "file_name")
        # Touched, so that nobody who collects garbage takes it for old.
        size = await self.store.artefacts.touch(request.checksum)
        if size is None:
            raise NotFound(
                f"the artefact {request.checksum} is not stored; upload it first", field="checksum"
            )
        if size > MAX_BYTES:
            raise TooLarge(
                f"the artefact has {size:,} bytes; a model may have {MAX_BYTES:,}",
                field="checksum",
            )
        entry = await self.store.models.get(request.id)
        specs.same_as(entry.value if entry else None, request.version, request.checksum)
        report = await self._known_report(request.checksum, format_name)
        if report is None:
            async with self._held(request.checksum, request.file_name, size) as path:
                name = _file_name(request.file_name, "file_name")
                report = await self._validated(path, name, request.checksum)
            await self.store.reports.put(report, request.checksum)
        source = request.source or m.ModelSource(kind="upload", file_name=request.file_name)
        made = _version(report, request.file_name, format_name, source)
        made = msgspec.structs.replace(made, size_bytes=size)
        name, created = "", False

        def change(spec: m.ModelSpec | None) -> m.ModelSpec:
            nonlocal name, created
            spec, name, created = specs.entered(spec, request, made)
            return spec

        await self.change(request.id, change)
        if await self.store.artefacts.size(request.checksum) is None:
            # Whoever removed the last version that needed it saw ours too late.
            async with self._held(request.checksum, request.file_name, size) as path:
                await self.store.artefacts.put(request.checksum, path)
        log.info("model.added", model=request.id, version=name, sound=report.sound, created=created)
        return m.AddedModel(
            id=request.id,
            version=name,
            checksum=request.checksum,
            created=created,
            report=report,
        )

    async def validate(self, request: m.ValidateModel) -> m.ModelReport:
        """Validate a version again, and write down what that found.

        One that is served and found not sound is served on until it is unloaded.

        Raises:
            InvalidRequest: The sample is no request for this model.
            NotFound: There is no such model or version, or its artefact is gone.
        """
        entry = await self.store.models.get(request.id)
        spec = entry.value if entry else None
        version = specs.found_version(spec, request.id, request.version)
        report = await self._judge(version, request.sample)
        if version.wanted and not report.sound:
            served_on = (
                f"version {version.version} of {request.id} is not sound, and is served until it "
                "is unloaded"
            )
            report = msgspec.structs.replace(report, advice=[served_on, *report.advice])
            await self.store.reports.put(report, version.checksum)
        return report

    async def _judge(
        self, version: m.ModelVersion, sample: Mapping[str, Any] | None = None
    ) -> m.ModelReport:
        """Validate a version's artefact, and tell every version that has it."""
        async with self._held(version.checksum, version.path, version.size_bytes) as path:
            name = Path(version.path).name
            report = await self._validated(path, name, version.checksum, sample)
        await self.store.reports.put(report, version.checksum)
        for entry in await self.store.models.all():
            if entry.value and version.checksum in specs.needed([entry.value]):
                await self.change(
                    entry.names[0], lambda spec: specs.judged(spec, report) if spec else None
                )
        return report

    async def _validated(
        self, file: Path, name: str, checksum: str, sample: Mapping[str, Any] | None = None
    ) -> m.ModelReport:
        """Return what the validation of a file finds: the one way to it.

        Args:
            file: Where it is.
            name: What people call it.
            checksum: Its SHA-256.
            sample: A request of the Open Inference Protocol to run.
        """
        # One at a time: each takes the memory of a whole model, for which no room was made.
        async with self._inspecting:
            return await validate(
                file, name=name, checksum=checksum, sample=sample, limits=self.limits
            )

    async def _known_report(self, checksum: str, format_name: str) -> m.ModelReport | None:
        """Return what a validation of the artefact in this format has found already."""
        entry = await self.store.reports.get(checksum)
        report = entry.value if entry else None
        # The same bytes under another suffix are something else.
        return report if report and report.format in {"", format_name} else None

    async def _brought(
        self, request: m.LoadModel, file: Path, path: str, kind: Any
    ) -> m.ModelVersion:
        """Return what a file is as a version; its bytes and its report are stored.

        Raises:
            InvalidRequest: Its name names no format.
            Conflict: The version that is asked for has other bytes.
            Unprocessable: It is not a sound model; says why, and nothing is stored.
        """
        format_name = _format_of(path or file.name, "path")
        checksum = await to_its_end(sha256_of, file)
        if request.version is not None:
            entry = await self.store.models.get(request.id)
            specs.same_as(entry.value if entry else None, request.version, checksum)
        report = await self._validated(file, file.name, checksum)
        if not report.sound:
            raise unsound(report)
        await self.store.artefacts.put(checksum, file)
        await self.store.reports.put(report, checksum)
        return _version(report, path, format_name, m.ModelSource(kind=kind, file_name=path))

    # --- Files ------------------------------------------------------------------------------------

    def find(self, path: str) -> Path:
        """Return the file that a path below the models folder names.

        Raises:
            InvalidRequest: The path leaves the folder.
            NotFound: There is no such file; says which there are.
        """
        folder = self.models_dir.resolve()
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
        if await self.store.models.get(request.id) is not None:
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

    async def _want_again(self, request: m.LoadModel) -> tuple[str, int]:
        entry = await self.store.models.get(request.id)
        spec = entry.value if entry else None
        await self._check_sound(request, specs.found_version(spec, request.id, request.version))
        name = ""

        def change(spec: m.ModelSpec | None) -> m.ModelSpec | None:
            nonlocal name
            meant = specs.found_version(spec, request.id, request.version)
            name = meant.version
            return specs.wanted_again(spec, meant, request.config) if spec else None

        revision = await self.change(request.id, change)
        return name, revision

    async def _check_sound(self, request: m.LoadModel, version: m.ModelVersion) -> None:
        """Raise Unprocessable for what is not sound; what was never validated is so now."""
        sound, problem = version.sound, version.problem
        if sound is None:
            report = await self._judge(version)
            sound, problem = report.sound, specs.problem_of(report)
        if not sound:
            raise Unprocessable(
                f"version {version.version!r} of {request.id!r} is not sound: {problem}",
                field="version",
            )

    @asynccontextmanager
    async def _held(
        self,
        checksum: str,
        file_name: str,
        size_bytes: int,
        told: Callable[[float], None] = lambda _share: None,
    ) -> AsyncGenerator[Path]:
        async def fetch(path: Path) -> None:
            await self.store.artefacts.fetch(checksum, path, told=told)

        suffix = Path(file_name).suffix.lower()
        async with self.cache.holding(checksum, suffix, size_bytes, fetch) as path:
            yield path

    async def change(self, model: str, change: Change) -> int:
        """Write what `change` makes of a model, again while others write it, too.

        What it makes None is deleted, if it was there.
        """
        for _ in range(_TRIES):
            last = await self.store.models.last(model)
            before = last.value if last else None
            spec = change(before)
            revision = last.revision if last else 0
            if spec == before:
                return revision
            try:
                if spec is None:
                    return await self.store.models.delete(model, revision=revision)
                return await self.store.models.update(spec, revision, model)
            except Conflict:
                continue
        raise Conflict(f"others keep changing {model!r}; try again")

    def _make_folders(self) -> None:
        self.cache.open()
        if self.models_dir.exists():
            return
        self.models_dir.mkdir(parents=True)
        for name in SAMPLES:
            with (
                files("services.candle").joinpath("models", name).open("rb") as sample,
                (self.models_dir / name).open("wb") as copy,
            ):
                shutil.copyfileobj(sample, copy)


def unsound(report: m.ModelReport) -> Unprocessable:
    """Return the error for an artefact that cannot be loaded, with everything that is wrong."""
    said = [problem.what for problem in report.problems]
    where = report.problems[0].where if report.problems else ""
    return Unprocessable(
        specs.problem_of(report) or "",
        field=where or None,
        reasons=said if len(said) > 1 else None,
    )


def _version(
    report: m.ModelReport, path: str, format_name: str, source: m.ModelSource
) -> m.ModelVersion:
    """Return a validated artefact as a version; it has no name of its own yet."""
    return m.ModelVersion(
        version="1",
        path=path,
        checksum=report.checksum,
        format=format_name,
        added_at=m.now(),
        size_bytes=report.size_bytes,
        inputs=report.inputs,
        outputs=report.outputs,
        batched=report.batched,
        sound=report.sound,
        problem=specs.problem_of(report),
        source=source,
    )


def _format_of(path: str, field: str) -> str:
    """Return the format that a file's name says.

    Raises:
        InvalidRequest: It says none.
    """
    runtime = FORMATS.get(Path(path).suffix.lower())
    if runtime is None:
        raise InvalidRequest(
            f"{Path(path).name!r}: the format is told by the suffix; served are "
            f"{', '.join(FORMATS)}",
            field=field,
        )
    return str(runtime.format)


def _file_name(path: str, field: str) -> str:
    """Return the name of a file that comes with a request.

    Raises:
        InvalidRequest: It can be none.
    """
    name = Path(path).name
    if not name or name == ".." or "\0" in name or len(name.encode()) > FILE_NAME_MAX_BYTES:
        raise InvalidRequest(
            f"{field}: {path[:80]!r} does not end in a file's name, such as model.onnx, of at "
            f"most {FILE_NAME_MAX_BYTES} bytes",
            field=field,
        )
    return name


def _likely_paths(model: str, version: str | None) -> Sequence[str]:
    """Return where a model's file may lie: by its name, or as Triton lays repositories out."""
    flat = [f"{model}{suffix}" for suffix in FORMATS]
    return [*flat, *(f"{model}/{version or 1}/model{suffix}" for suffix in FORMATS)]

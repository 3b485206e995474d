"""What wishes make of a model's entry in the repository: pure rules, no bus."""

from collections.abc import Collection, Sequence
from typing import Final

import msgspec

from bus import messages as m
from bus.errors import Conflict, InvalidRequest, NotFound
from bus.models import DEFAULT, LATEST, next_version, version_of
from services.candle.runtimes.base import Signature

# Versions that nobody wants any more are forgotten beyond this many of a model. Their artefacts
# are garbage then.
VERSIONS_KEPT: Final = 32


def check_name(version: str | None) -> None:
    """Raise InvalidRequest where a version's name is one that belongs to an alias."""
    if version in {DEFAULT, LATEST}:
        raise InvalidRequest(
            f"version: {version!r} is an alias; a version needs a name of its own",
            field="version",
        )


def found_version(spec: m.ModelSpec | None, model: str, name: str | None) -> m.ModelVersion:
    """Return what a version or alias leads to.

    Raises:
        NotFound: There is no such model or version; says which there are.
    """
    meant = version_of(spec, name) if spec else None
    if meant is None:
        known = ", ".join(v.version for v in spec.versions) if spec else ""
        raise NotFound(
            f"there is no model {model!r}"
            + (f" in version {name!r}; there are: {known}" if known else ""),
            field="version" if known else "id",
        )
    return meant


def loaded(
    spec: m.ModelSpec | None, request: m.LoadModel, made: m.ModelVersion
) -> tuple[m.ModelSpec, str]:
    """Return a model with a version that came with the wish to serve it, and its name.

    Raises:
        Conflict: As `same_as`.
    """
    spec = spec or _new(request.id)
    if request.version is None:
        present = version_of(spec, None)
    else:
        present = same_as(spec, request.version, made.checksum)
    config = request.config or (present.config if present else m.ModelConfig())
    made = msgspec.structs.replace(made, config=config, wanted=True, wanted_at=m.now())
    if request.version is not None and present is None:
        made = msgspec.structs.replace(made, version=request.version)
        return replaced(spec, made), made.version
    if present and present.checksum == made.checksum:
        # The same file again: nothing new, but it should be served, and perhaps in another way.
        made = msgspec.structs.replace(
            made,
            version=present.version,
            added_at=present.added_at,
            source=present.source or made.source,
        )
        return replaced(spec, made), made.version
    # What the watched folder has entered, and nobody ever served, is not there twice.
    known = [
        v
        for v in spec.versions
        if v.checksum == made.checksum and not v.wanted and v.wanted_at is None
    ]
    if known:
        made = msgspec.structs.replace(
            made, version=known[-1].version, added_at=known[-1].added_at, source=known[-1].source
        )
    else:
        made = msgspec.structs.replace(made, version=next_version(spec))
    others = [msgspec.structs.replace(v, wanted=False) for v in spec.versions]
    aliases = {name: v for name, v in spec.aliases.items() if name != DEFAULT}
    spec = msgspec.structs.replace(spec, versions=others, aliases=aliases)
    return replaced(spec, made), made.version


def same_as(spec: m.ModelSpec | None, version: str | None, checksum: str) -> m.ModelVersion | None:
    """Return the version that already is what somebody brings; None where it would be new.

    Args:
        spec: The model, if there is one.
        version: The name that it should have; None: any.
        checksum: The SHA-256 of its bytes.

    Raises:
        Conflict: Its name is taken: by other bytes, or as an alias.
    """
    if spec is None:
        return None
    if version is None:
        same = [v for v in spec.versions if v.checksum == checksum]
        return same[-1] if same else None
    for one in spec.versions:
        if one.version != version:
            continue
        if one.checksum == checksum:
            return one
        raise Conflict(
            f"version {version!r} of {spec.id!r} has other bytes, and a version never "
            f"changes its bytes; give these another version: the next free number is "
            f"{next_version(spec)}",
            field="version",
        )
    if version in spec.aliases:
        raise Conflict(
            f"{version!r} is an alias of {spec.id!r}; the next free number is {next_version(spec)}",
            field="version",
        )
    return None


def entered(
    spec: m.ModelSpec | None, request: m.AddModel, made: m.ModelVersion
) -> tuple[m.ModelSpec, str, bool]:
    """Return a model with a version that is not yet wanted, its name, and whether it is new.

    Raises:
        Conflict: As `same_as`.
    """
    same = same_as(spec, request.version, request.checksum)
    spec = described(spec or _new(request.id), request)
    if same is not None:
        again = msgspec.structs.replace(same, sound=made.sound, problem=made.problem)
        return replaced(spec, again), again.version, False
    name = request.version or next_version(spec)
    made = msgspec.structs.replace(made, version=name, wanted=False, wanted_at=None)
    return replaced(spec, made), name, True


def described(spec: m.ModelSpec, request: m.DescribeModel | m.AddModel) -> m.ModelSpec:
    """Return a model with the words about it that a request gives."""
    given = {
        name: value
        for name in ("description", "labels", "licence")
        if (value := getattr(request, name)) is not None
    }
    return msgspec.structs.replace(spec, **given)


def wanted_again(
    spec: m.ModelSpec, version: m.ModelVersion, config: m.ModelConfig | None
) -> m.ModelSpec:
    """Return a model one version of which should be served, perhaps in another way."""
    again = msgspec.structs.replace(
        version,
        wanted=True,
        wanted_at=m.now(),
        config=config if config is not None else version.config,
    )
    return replaced(spec, again)


def unwanted(spec: m.ModelSpec | None, model: str, version: str | None) -> m.ModelSpec:
    """Return a model, or one version of it, that should be served no longer.

    Raises:
        NotFound: It should not have been.
    """
    if version is None:
        names = {v.version for v in spec.versions} if spec else set()
    else:
        meant = version_of(spec, version) if spec else None
        names = {meant.version} if meant else set()
    if spec is None or not any(v.wanted and v.version in names for v in spec.versions):
        what = f"model {model!r}" + (f" in version {version!r}" if version else "")
        raise NotFound(f"there is no {what} loaded", field="id")
    kept = [
        msgspec.structs.replace(v, wanted=False) if v.version in names else v for v in spec.versions
    ]
    # A name that stood for this one version goes with it; those of a whole model wait.
    aliases = {a: v for a, v in spec.aliases.items() if not version or v not in names}
    return msgspec.structs.replace(spec, versions=kept, aliases=aliases)


def aliased(spec: m.ModelSpec | None, request: m.AliasModel) -> m.ModelSpec:
    """Return a model one name of which stands for another version, or for none.

    Raises:
        NotFound: There is no such model or version; says which there are.
        InvalidRequest: The name is a version's, or `latest`.
        Conflict: The version is not loaded.
    """
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


def judged(spec: m.ModelSpec, report: m.ModelReport) -> m.ModelSpec:
    """Return a model the versions of which have what the validation of their artefact found."""
    verdict = {"sound": report.sound, "problem": problem_of(report)}
    versions = [
        msgspec.structs.replace(v, **verdict) if v.checksum == report.checksum else v
        for v in spec.versions
    ]
    return msgspec.structs.replace(spec, versions=versions)


def to_remove(spec: m.ModelSpec | None, request: m.RemoveModel) -> list[m.ModelVersion]:
    """Return the versions that a request names: one by its own name, or all.

    Raises:
        NotFound: There is no such model or version; says which there are.
    """
    if spec is None:
        raise NotFound(f"there is no model {request.id!r}", field="id")
    named = [v for v in spec.versions if request.version in {None, v.version}]
    if not named and request.version is not None:
        raise NotFound(
            f"there is no version {request.version!r} of {request.id!r}; there are: "
            f"{', '.join(v.version for v in spec.versions) or 'none'}",
            field="version",
        )
    return named


def without(spec: m.ModelSpec, names: Collection[str]) -> m.ModelSpec | None:
    """Return a model without some versions and what leads to them; None when none is left."""
    kept = [v for v in spec.versions if v.version not in names]
    aliases = {alias: v for alias, v in spec.aliases.items() if v not in names}
    return msgspec.structs.replace(spec, versions=kept, aliases=aliases) if kept else None


def needed(specs: Sequence[m.ModelSpec]) -> set[str]:
    """Return the artefacts that some version of some model needs."""
    return {version.checksum for spec in specs for version in spec.versions}


def problem_of(report: m.ModelReport) -> str | None:
    """Return the first thing that is wrong, in a sentence."""
    if report.sound:
        return None
    if not report.problems:
        return "it is not sound"
    first = report.problems[0]
    return first.what if first.where in first.what else f"{first.where}: {first.what}"


def replaced(spec: m.ModelSpec, version: m.ModelVersion) -> m.ModelSpec:
    """Return a model with a version put in or put anew, without too many that nobody wants."""
    kept = [version if v.version == version.version else v for v in spec.versions]
    if version not in kept:
        kept.append(version)
    surplus = [
        v for v in kept
        if not v.wanted and v.version not in spec.aliases.values() and v is not version
    ]  # fmt: skip
    for old in surplus[: max(0, len(kept) - VERSIONS_KEPT)]:
        kept.remove(old)
    return msgspec.structs.replace(spec, versions=kept)


def tensors_of(signature: Signature) -> tuple[list[m.TensorInfo], list[m.TensorInfo]]:
    """Return inputs and outputs as they travel."""
    inputs, outputs = (
        [m.TensorInfo(name=t.name, datatype=t.datatype, shape=list(t.shape)) for t in side]
        for side in (signature.inputs, signature.outputs)
    )
    return inputs, outputs


def _new(model: str) -> m.ModelSpec:
    return m.ModelSpec(id=model, versions=[], created_at=m.now())

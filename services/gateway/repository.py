"""The repository of models as people read it: summaries, filters, order, pages, and details."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Generic, TypeVar, get_args

import msgspec

from bus.errors import InvalidRequest
from bus.messages import (
    ModelConfig,
    ModelProblem,
    ModelReport,
    ModelSource,
    ModelSpec,
    ModelState,
    ModelVersion,
    ServedModel,
    ServedModels,
    TensorInfo,
)
from bus.models import DEFAULT, LATEST, ModelsView, version_of

PER_PAGE: Final = 50
PER_PAGE_MAX: Final = 500
PAGE_MAX: Final = 1_000_000
UNLOADED: Final = "unloaded"
STATES: Final = (*get_args(ModelState), UNLOADED)
_NEAREST: Final = ("ready", "loading", "fetching", "queued", "leaving", "cold", "failed", UNLOADED)

T = TypeVar("T")


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """A model in a list.

    Attributes:
        name: What requests call it.
        description: What it is.
        labels: Names and values to find it by.
        licence: Under which it may be used.
        created_at: When its first version came.
        updated_at: When its last version came.
        format: That of the default version.
        default: The version that answers a request that names none.
        version_count: How many versions there are.
        aliases: Further names of versions.
        state: How near it is to answering, by its nearest version: `ready`, what comes before it,
            or `unloaded`.
        reason: Why it is so, where there is a reason.
        loaded: Whether an instance serves a version of it.
        sound: What the validation of the default version came to.
        problem: The first thing that is wrong with it.
        size_bytes: What its artefacts take, each counted once.
        memory_bytes: What it takes in memory, on all instances.
        last_used: When it was last asked.
        hosts: Where it is served.
    """

    name: str
    description: str
    labels: dict[str, str]
    licence: str | None
    created_at: datetime | None
    updated_at: datetime | None
    format: str
    default: str | None
    version_count: int
    aliases: dict[str, str]
    state: str
    reason: str | None
    loaded: bool
    sound: bool | None
    problem: str | None
    size_bytes: int
    memory_bytes: int
    last_used: datetime | None
    hosts: list[str]


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """A version as one instance has it; the fields are those of `ServedModel`, and where."""

    name: str
    version: str
    state: str
    since: datetime
    plugin: str
    slot: int
    instance: str
    host: str
    names: list[str]
    progress: float | None
    reason: str | None
    memory_bytes: int
    threads: int
    last_used: datetime | None
    kept: str | None


class Validation(msgspec.Struct, frozen=True, kw_only=True):
    """A report in short."""

    validated_at: datetime
    sound: bool
    problems: list[ModelProblem]
    advice: list[str]
    load_ms: float | None
    run_ms: float | None
    peak_memory_bytes: int | None
    runtime: str


class Detail(msgspec.Struct, frozen=True, kw_only=True):
    """A version with all that is known of it; `names` are its own and its aliases."""

    version: str
    names: list[str]
    format: str
    file_name: str
    checksum: str
    size_bytes: int
    added_at: datetime
    wanted: bool
    state: str
    reason: str | None
    sound: bool | None
    problem: str | None
    source: ModelSource | None
    config: ModelConfig
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]
    batched: bool
    validation: Validation | None
    served: list[Served]


# --- The list -------------------------------------------------------------------------------------

_Key = Callable[[Summary], Any]
# What has no value comes first: it never happened.
_NEVER: Final = datetime.min.replace(tzinfo=UTC)
_SORTS: Final[Mapping[str, _Key]] = {
    "name": lambda one: one.name,
    "created": lambda one: _moment(one.created_at),
    "updated": lambda one: _moment(one.updated_at),
    "used": lambda one: _moment(one.last_used),
    "size": lambda one: one.size_bytes,
    "memory": lambda one: one.memory_bytes,
    "versions": lambda one: one.version_count,
    "state": lambda one: _NEAREST.index(one.state),
}


@dataclass(frozen=True)
class Page:
    """Which part of a list is wanted, counted from 1."""

    page: int = 1
    per_page: int = PER_PAGE

    def of(self, found: Sequence[T]) -> "Part[T]":
        """Return that part; behind the end it is empty."""
        start = (self.page - 1) * self.per_page
        part = list(found[start : start + self.per_page])
        return Part(items=part, total=len(found), page=self.page, per_page=self.per_page)


class Part(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """A part of a list, and how long all of it is."""

    items: list[T]
    total: int
    page: int
    per_page: int


@dataclass(frozen=True)
class ListQuery:
    """Which models are wanted, and in which order.

    Attributes:
        text: What the name, the description, a label or an alias has in it, whatever the case.
        labels: Labels that it has.
        format: That of its default version.
        state: Its state.
        loaded: Whether it is served.
        sort: By what; see `_SORTS`.
        descending: Whether the largest, newest or last comes first.
        page: Which part.
    """

    text: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    format: str | None = None
    state: str | None = None
    loaded: bool | None = None
    sort: str = "name"
    descending: bool = False
    page: Page = Page()

    def wants(self, one: Summary) -> bool:
        """Tell whether a model is wanted."""
        return (
            (not self.text or any(self.text in text.casefold() for text in _texts(one)))
            and self.labels.items() <= one.labels.items()
            and self.format in (None, one.format)
            and self.state in (None, one.state)
            and self.loaded in (None, one.loaded)
        )

    def applied(self, models: Iterable[Summary]) -> Part[Summary]:
        """Return the wanted ones, sorted; equal ones by name, so that the order is stable."""
        found = sorted((one for one in models if self.wants(one)), key=lambda one: one.name)
        found.sort(key=_SORTS[self.sort], reverse=self.descending)
        return self.page.of(found)


def list_query(pairs: Iterable[tuple[str, str]]) -> ListQuery:
    """Return what a query string asks for.

    Raises:
        InvalidRequest: A word is not known, comes twice, or has a value that it cannot have.
    """
    said: dict[str, str] = {}
    labels: dict[str, str] = {}
    for name, value in pairs:
        if name == "label":
            key, wanted = label_in(value)
            if labels.get(key, wanted) != wanted:
                raise InvalidRequest(
                    f"label {key[:60]!r} has two values, which no model has", field="label"
                )
            labels[key] = wanted
        elif name in said:
            raise InvalidRequest(f"{name} is given twice; give it once", field=name)
        elif name not in {"q", "format", "state", "loaded", "sort", "page", "per_page"}:
            raise InvalidRequest(
                f"{name[:40]!r} is not known here; allowed are q, label, format, state, loaded, "
                "sort, page and per_page",
                field=name[:40],
            )
        else:
            said[name] = value
    sort = said.get("sort", "name")
    by = sort.removeprefix("-")
    if by not in _SORTS:
        raise InvalidRequest(
            f"sort is {sort[:40]!r}; allowed are {', '.join(_SORTS)}, each with - before it for "
            "the other direction",
            field="sort",
        )
    return ListQuery(
        text=said.get("q", "").strip().casefold(),
        labels=labels,
        format=said.get("format"),
        state=one_of(said.get("state"), "state", STATES),
        loaded=switch(said["loaded"], "loaded") if "loaded" in said else None,
        sort=by,
        descending=sort.startswith("-"),
        page=page_in(said),
    )


def label_in(text: str) -> tuple[str, str]:
    """Return the name and the value of a label.

    Raises:
        InvalidRequest: It is not `NAME=VALUE`.
    """
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise InvalidRequest(f"label is {text[:80]!r}; write it as NAME=VALUE", field="label")
    return name, value


def page_in(said: Mapping[str, str]) -> Page:
    """Return which part of a list is asked for: `page` (1) and `per_page` (50).

    Raises:
        InvalidRequest: One of them is no such number.
    """
    return Page(
        _whole(said.get("page"), "page", 1, PAGE_MAX),
        _whole(said.get("per_page"), "per_page", PER_PAGE, PER_PAGE_MAX),
    )


def one_of(text: str | None, name: str, allowed: Sequence[str]) -> str | None:
    """Return a word that is one of those allowed, or None.

    Raises:
        InvalidRequest: It is another one.
    """
    if text is not None and text not in allowed:
        raise InvalidRequest(
            f"{name} is {text[:40]!r}; allowed are {', '.join(allowed)}", field=name
        )
    return text


def switch(text: str, name: str) -> bool:
    """Return whether something is switched on; a bare word means that it is.

    Raises:
        InvalidRequest: It is neither on nor off.
    """
    if text not in {"", "0", "1", "true", "false"}:
        raise InvalidRequest(f"{name} is {text[:40]!r}; allowed are true and false", field=name)
    return text in {"", "1", "true"}


def _whole(text: str | None, name: str, default: int, most: int) -> int:
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 19 and 1 <= int(text) <= most):
        raise InvalidRequest(
            f"{name} is {text[:40]!r}; allowed are whole numbers from 1 to {most:,}", field=name
        )
    return int(text)


def _texts(one: Summary) -> Iterable[str]:
    yield one.name
    yield one.description
    yield from one.aliases
    for name, value in one.labels.items():
        yield f"{name}={value}"


def _moment(at: datetime | None) -> datetime:
    return _NEVER if at is None else at


# --- What there is --------------------------------------------------------------------------------


def summary_of(view: ModelsView, spec: ModelSpec) -> Summary:
    """Return a model in short."""
    default = version_of(spec)
    places = [list(view.served(spec.id, version.version)) for version in spec.versions]
    states = [
        _state(view, version, place) for version, place in zip(spec.versions, places, strict=True)
    ]
    state, reason = min(states, key=lambda one: _NEAREST.index(one[0]), default=(UNLOADED, None))
    served = [one for place in places for _, one in place]
    hosts = {at.host for place in places for at, _ in place}
    sizes = {version.checksum: version.size_bytes for version in spec.versions}
    added = [version.added_at for version in spec.versions]
    return Summary(
        name=spec.id,
        description=spec.description,
        labels=spec.labels,
        licence=spec.licence,
        created_at=spec.created_at or min(added, default=None),
        updated_at=max(added, default=None),
        format=default.format if default else "",
        default=default.version if default else None,
        version_count=len(spec.versions),
        aliases=spec.aliases,
        state=state,
        reason=reason,
        loaded=any(one.state == "ready" for one in served),
        sound=default.sound if default else None,
        problem=default.problem if default else None,
        size_bytes=sum(sizes.values()),
        memory_bytes=sum(one.memory_bytes for one in served),
        last_used=max((one.last_used for one in served if one.last_used), default=None),
        hosts=sorted(hosts),
    )


def detail_of(
    view: ModelsView, spec: ModelSpec, version: ModelVersion, report: ModelReport | None
) -> Detail:
    """Return a version with all that is known of it."""
    places = list(view.served(spec.id, version.version))
    state, reason = _state(view, version, places)
    aliases = sorted({DEFAULT, LATEST, *spec.aliases})
    names = [name for name in aliases if version_of(spec, name) is version]
    return Detail(
        version=version.version,
        names=[version.version, *names],
        format=version.format,
        file_name=version.source.file_name if version.source else version.path,
        checksum=version.checksum,
        size_bytes=version.size_bytes,
        added_at=version.added_at,
        wanted=version.wanted,
        state=state,
        reason=reason,
        sound=version.sound,
        problem=version.problem,
        source=version.source,
        config=version.config,
        inputs=version.inputs,
        outputs=version.outputs,
        batched=version.batched,
        validation=_in_short(report) if report else None,
        served=[served_of(*pair) for pair in places],
    )


def served_of(at: ServedModels, one: ServedModel) -> Served:
    """Return a version as one instance has it."""
    return Served(
        name=one.id,
        version=one.version,
        state=one.state,
        since=one.since,
        plugin=at.plugin,
        slot=at.slot,
        instance=at.instance,
        host=at.host,
        names=one.names,
        progress=one.progress,
        reason=one.reason,
        memory_bytes=one.memory_bytes,
        threads=one.threads,
        last_used=one.last_used,
        kept=one.kept,
    )


def _state(
    view: ModelsView, version: ModelVersion, places: Sequence[tuple[ServedModels, ServedModel]]
) -> tuple[str, str | None]:
    """Return how near a version is to answering, and why, where there is a reason."""
    if places:
        nearest = places[0][1]
        return nearest.state, nearest.reason
    if not version.wanted:
        return UNLOADED, None
    waits = "its turn" if view.instances() else "an instance of candle"
    return "queued", f"it waits for {waits}"


def _in_short(report: ModelReport) -> Validation:
    return Validation(
        validated_at=report.validated_at,
        sound=report.sound,
        problems=report.problems,
        advice=report.advice,
        load_ms=report.load_ms,
        run_ms=report.run_ms,
        peak_memory_bytes=report.peak_memory_bytes,
        runtime=report.runtime,
    )

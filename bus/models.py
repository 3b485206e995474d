"""Models, desired and observed: which version answers to a name, and who serves it.

The gateway and candle's instances read the same two buckets by the same rules, so none of them has
to ask another one.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Container, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Final

import msgspec

from bus.messages import (
    ModelSpec,
    ModelVersion,
    Registration,
    ServedModel,
    ServedModels,
    ShippedModel,
    ShippedModels,
)
from bus.state import Changes, Store
from bus.tasks import beside

DEFAULT: Final = "default"
LATEST: Final = "latest"
# A model that is on its way comes before one that is not, and one that serves before both.
_NEAREST: Final = ("ready", "loading", "fetching", "queued", "leaving", "cold", "failed")


def version_of(spec: ModelSpec, name: str | None = None) -> ModelVersion | None:
    """Return the version that a name stands for; None: `default`.

    A version's own name comes before an alias, and `latest` stands for the wanted version with the
    highest number.
    """
    name = name or DEFAULT
    for version in spec.versions:
        if version.version == name:
            return version
    if name in spec.aliases:
        return next((v for v in spec.versions if v.version == spec.aliases[name]), None)
    return latest(spec) if name in {DEFAULT, LATEST} else None


def latest(spec: ModelSpec) -> ModelVersion | None:
    """Return the wanted version with the highest number; without numbers, the one that came last.

    Where none is wanted, the same of all versions.
    """
    wanted = [version for version in spec.versions if version.wanted] or spec.versions
    return max(wanted, key=_order, default=None)


def names_of(spec: ModelSpec) -> dict[str, ModelVersion]:
    """Return every name that the model answers to, and the wanted version behind it."""
    names = {version.version for version in spec.versions} | {DEFAULT, LATEST, *spec.aliases}
    found = ((name, version_of(spec, name)) for name in sorted(names))
    return {name: version for name, version in found if version and version.wanted}


def next_version(spec: ModelSpec | None) -> str:
    """Return the name of the next version: one more than the highest number."""
    numbers = [int(v.version) for v in spec.versions if v.version.isdecimal()] if spec else []
    return str(max(numbers, default=0) + 1)


def shipped_by(registrations: Iterable[Registration]) -> ShippedModels:
    """Return what comes with the plugins of these instances, each file once.

    What an instance tells in another form is passed over: others than ours write registrations.
    """
    found: dict[tuple[str, str, str], ShippedModel] = {}
    for told in registrations:
        listed = told.meta.get("ships")
        for one in listed if isinstance(listed, list) else ():
            with contextlib.suppress(msgspec.ValidationError):
                model = msgspec.structs.replace(
                    msgspec.convert(one, ShippedModel), plugin=told.plugin
                )
                found[model.plugin, model.name, model.checksum] = model
    return ShippedModels(models=[found[key] for key in sorted(found)])


def _order(version: ModelVersion) -> tuple[int, float]:
    number = int(version.version) if version.version.isdecimal() else -1
    return number, version.added_at.timestamp()


class ModelsView:
    """Every model, in memory; made by `follow_models`.

    Args:
        store: What it follows.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        # How far it has read: what is wished, and what is served.
        self._read = [0, 0]
        self._specs: dict[str, ModelSpec] = {}
        self._served: dict[tuple[str, ...], ServedModels] = {}
        self._changed = asyncio.Event()

    async def until(self, true: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until something is true of the view; return whether it is, at the end of the time.

        What an instance has answered for is seen here a moment later.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not true():
                    await self._changed.wait()
        return true()

    async def catch_up(self, timeout_s: float) -> bool:
        """Wait until all that is written down at this moment is seen here; return whether it is.

        Raises:
            BusError: The broker does not say how far that is.
        """
        buckets = self._store.models, self._store.served
        newest = await asyncio.gather(*(bucket.revision() for bucket in buckets))
        return await self.until(
            lambda: all(read >= one for read, one in zip(self._read, newest, strict=True)),
            timeout_s,
        )

    def spec(self, model: str) -> ModelSpec | None:
        """Return a model of the repository."""
        return self._specs.get(model)

    def specs(self) -> list[ModelSpec]:
        """Return every model of the repository, by name."""
        return sorted(self._specs.values(), key=lambda spec: spec.id)

    def instances(self) -> list[ServedModels]:
        """Return every instance that serves models, by slot."""
        return sorted(self._served.values(), key=lambda one: (one.plugin, one.slot))

    def served(self, model: str, version: str) -> Iterator[tuple[ServedModels, ServedModel]]:
        """Give every instance that has a version, and how, the nearest to serving first."""
        found = [
            (instance, one)
            for instance in self.instances()
            for one in instance.models
            if (one.id, one.version) == (model, version)
        ]
        yield from sorted(found, key=lambda pair: _NEAREST.index(pair[1].state))

    def wanted(self, model: str) -> bool:
        """Tell whether any version of a model should be served."""
        spec = self._specs.get(model)
        return spec is not None and any(version.wanted for version in spec.versions)

    def ready(self, model: str, version: str) -> bool:
        """Tell whether an instance serves a version."""
        return any(one.state == "ready" for _, one in self.served(model, version))

    def answers(
        self, model: str, name: str, revision: int = 0, among: Container[str] | None = None
    ) -> bool:
        """Tell whether an instance answers to a version's name, or to an alias.

        While another version is on its way, the old one answers to the names that they share. What
        was told of an older revision of the wish than the one that is asked for does not count.

        Args:
            model: The model.
            name: The name.
            revision: Of the model's wish.
            among: Ids of the instances that count; None: all that have told of themselves. What one
                told that was killed stays for a while.
        """
        return any(
            one.id == model
            and one.state == "ready"
            and name in one.names
            and one.revision >= revision
            for instance in self._served.values()
            if among is None or instance.instance in among
            for one in instance.models
        )

    def _on_specs(self, changes: Changes[ModelSpec]) -> None:
        for entry in changes.entries:
            if entry.value is None:
                self._specs.pop(entry.names[0], None)
            else:
                self._specs[entry.names[0]] = entry.value
        self._read[0] = max(self._read[0], changes.revision)
        self._tell()

    def _on_served(self, changes: Changes[ServedModels]) -> None:
        for entry in changes.entries:
            if entry.value is None:
                self._served.pop(entry.names, None)
            else:
                self._served[entry.names] = entry.value
        self._read[1] = max(self._read[1], changes.revision)
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


@asynccontextmanager
async def follow_models(store: Store) -> AsyncGenerator[ModelsView]:
    """Hold a view that follows both buckets while inside; entered, it has caught up."""
    view = ModelsView(store)
    caught_up = asyncio.Event(), asyncio.Event()

    async def follow_specs() -> None:
        async for changes in store.models.follow():
            view._on_specs(changes)  # noqa: SLF001
            if changes.caught_up:
                caught_up[0].set()

    async def follow_served() -> None:
        async for changes in store.served.follow():
            view._on_served(changes)  # noqa: SLF001
            if changes.caught_up:
                caught_up[1].set()

    async with beside(follow_specs(), follow_served()):
        for event in caught_up:
            await event.wait()
        yield view

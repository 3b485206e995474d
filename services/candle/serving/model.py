"""One model on this instance: its versions, and the names that it answers to.

A name has one subscription, and stands for one version at a time. When the name moves, the
subscription stays: what came before is answered by the old version, what comes after by the new
one, and nobody finds nobody.
"""

import asyncio
import contextlib
import dataclasses
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Final

import structlog

from bus import messages as m
from bus.errors import BusError, Unavailable, error_from
from bus.instance import Call, Instance
from bus.models import DEFAULT, names_of
from bus.subjects import MODEL_INFER, MODEL_RUN
from services.candle.serving.version import Surroundings, Version

AGAIN_S: Final = 5.0

log = structlog.get_logger("candle.model")

# What a loaded version cannot take live: another one has to be loaded in its place.
Key = tuple[str, str, int | None, str | None]


def key_of(version: m.ModelVersion) -> Key:
    """Return what tells one loading of a version from another."""
    config = version.config
    return version.version, version.checksum, config.threads, config.provider


@dataclass
class _Door:
    """A name that is listened for, and the version that answers."""

    version: Version
    open: AsyncExitStack = field(default_factory=AsyncExitStack)


class Model:
    """One model here: brings in line what is served with what is wanted, for ever.

    Args:
        model: Its name.
        instance: This process on the bus.
        around: What its versions need.

    Attributes:
        spec: What is wanted; None when the model is to go.
        revision: The revision of that wish.
    """

    def __init__(self, model: str, instance: Instance, around: Surroundings) -> None:
        self.model = model
        self.spec: m.ModelSpec | None = None
        self.revision = 0
        self._instance = instance
        self._tell = around.changed
        self._around = dataclasses.replace(around, changed=self._on_version)
        self._versions: dict[Key, Version] = {}
        self._doors: dict[str, _Door] = {}
        self._evicted: dict[Key, str] = {}
        self._leaving: dict[Key, asyncio.Task[None]] = {}
        self._nudged = asyncio.Event()
        self._may_evict = False

    @property
    def versions(self) -> list[Version]:
        """Every version that is here, in whatever state."""
        return list(self._versions.values())

    @property
    def settled(self) -> bool:
        """Whether all is as wanted, as far as it can be."""
        if self.spec is None:
            return not self._versions
        for name, wanted in names_of(self.spec).items():
            version, door = self._versions.get(key_of(wanted)), self._doors.get(name)
            if version is None or (version.on_its_way and not version.failure):
                return False
            if version.state == "ready" and (door is None or door.version is not version):
                return False
        return True

    def want(self, spec: m.ModelSpec | None, revision: int, *, may_evict: bool) -> None:
        """Take another wish."""
        before = self._wanted()
        self.spec, self.revision, self._may_evict = spec, revision, may_evict
        for key, version in self._wanted().items():
            # Who asks for a version anew wants it in memory.
            if key not in before or before[key].wanted_at != version.wanted_at:
                self._evicted.pop(key, None)
        self.nudge()

    def nudge(self) -> None:
        """Look again: something has changed."""
        self._nudged.set()

    def cool(self, version: Version, reason: str) -> None:
        """Put a version out of memory until it is asked for."""
        key = key_of(version.spec)
        if self._versions.get(key) is version:
            self._evicted[key] = reason
            self.nudge()

    def leaves(self, version: Version) -> bool:
        """Tell whether a version is on its way out of memory."""
        key = key_of(version.spec)
        return key in self._evicted or key in self._leaving or key not in self._wanted()

    def wake(self, wanted: m.ModelVersion) -> Version | None:
        """Bring a version back that left memory; return it, in whatever state it is.

        What failed is left alone: it would fail again, until somebody loads it anew.
        """
        key = key_of(wanted)
        version = self._versions.get(key)
        self._evicted.pop(key, None)
        if version and version.state == "cold":
            version.begin(may_evict=True)
        self.nudge()
        return version

    def serving(self, wanted: m.ModelVersion) -> Version | None:
        """Return a wanted version once every name that it should answer to leads to it.

        Raises:
            BusError: It could not be loaded.
        """
        version = self._versions.get(key_of(wanted))
        if version is None or self.spec is None or version.spec is not wanted:
            # It has another wish to follow yet: its configuration and failure are of an older one.
            return None
        if version.failure:
            raise error_from(version.failure)
        if version.state == "cold" or key_of(wanted) in self._evicted:
            raise Unavailable(
                f"{version.label} left memory as soon as it was loaded: "
                f"{self._evicted.get(key_of(wanted), 'others have the room')}",
                retry_after_s=1,
            )
        names = [n for n, v in names_of(self.spec).items() if v.version == wanted.version]
        here = all(n in self._doors and self._doors[n].version is version for n in names)
        old = any(key not in self._wanted() for key in self._versions)
        return version if version.state == "ready" and here and not old else None

    def gone(self, versions: set[str]) -> bool:
        """Tell whether nothing of these versions is left here."""
        return not any(version.spec.version in versions for version in self._versions.values())

    def names(self, version: Version) -> list[str]:
        """Return the names that lead to a version."""
        return sorted(name for name, door in self._doors.items() if door.version is version)

    def told(self, version: Version) -> m.ServedModel:
        """Return a version as others see it."""
        return version.told(self.names(version), self.revision)

    def as_loaded(self, version: Version) -> m.LoadedModel:
        """Return a version as `candle.stats` tells it; raises NotFound if it is not loaded."""
        return version.as_loaded(self.names(version), self.revision)

    async def run(self) -> None:
        """Work until there is nothing left to do for a model that is gone, or cancelled."""
        try:
            while True:
                await self._nudged.wait()
                self._nudged.clear()
                try:
                    await self._step()
                except BusError as error:
                    # The broker is away, most likely.
                    log.warning("model.stuck", model=self.model, cause=error.message)
                    asyncio.get_running_loop().call_later(AGAIN_S, self.nudge)
                if self.spec is None and not self._versions:
                    return
        finally:
            self.spec = None
            await self._close_all()

    async def _step(self) -> None:
        wanted = self._wanted()
        for key, spec in wanted.items():
            if key in self._leaving:
                continue
            version = self._versions.get(key)
            if version is None:
                version = self._versions[key] = Version(self.model, spec, self._around)
                version.begin(may_evict=self._may_evict)
            elif version.spec is not spec:
                again = version.spec.wanted_at != spec.wanted_at
                version.take(spec)
                if again and version.state in {"cold", "failed"}:
                    version.begin(may_evict=self._may_evict)
        await self._move_names()
        for key, version in self._versions.items():
            stays = key in wanted and key not in self._evicted
            if stays or key in self._leaving or self.names(version):
                continue
            if key in wanted and version.state in {"cold", "failed"}:
                continue
            self._leaving[key] = asyncio.create_task(self._leave(key, version))
        self._tell()

    async def _move_names(self) -> None:
        """Let every name lead to the version that it should, as soon as that one is ready."""
        targets = {}
        if self.spec is not None:
            targets = {name: key_of(v) for name, v in names_of(self.spec).items()}
        for name, key in targets.items():
            version = self._versions.get(key)
            ready = version is not None and version.state == "ready" and key not in self._evicted
            door = self._doors.get(name)
            if ready and version is not None:
                if door is None:
                    await self._open(name, version)
                else:
                    door.version = version
            elif door is not None and not self._serves_on(door.version, key):
                await self._close(name)
        closing = [name for name in self._doors if name not in targets]
        await asyncio.gather(*(self._close(name) for name in closing))

    def _serves_on(self, version: Version, target: Key) -> bool:
        """Whether the version behind a name stands in until the one that is wanted is there."""
        key = key_of(version.spec)
        return key != target and version.state == "ready" and key not in self._evicted

    async def _open(self, name: str, version: Version) -> None:
        door = _Door(version)

        def infer(call: Call) -> None:
            door.version.infer(call)

        async def run(request: m.RunModel) -> m.ModelOutput:
            return await door.version.run_rows(request, self._instance.id)

        here, enter = self._instance, door.open.enter_async_context
        try:
            await enter(here.serving_calls(MODEL_INFER, infer, self.model, name))
            if name == DEFAULT:
                await enter(here.serving_calls(MODEL_INFER, infer, self.model))
                await enter(here.serving(MODEL_RUN, run, self.model))
        except BaseException:
            await door.open.aclose()
            raise
        self._doors[name] = door

    async def _close(self, name: str) -> None:
        """Listen for a name no longer; what it was asked until then is answered."""
        door = self._doors.pop(name)
        await door.open.aclose()

    async def _leave(self, key: Key, version: Version) -> None:
        try:
            wanted = key in self._wanted()
            reason = self._evicted.get(key) if wanted else None
            await version.leave("cold" if wanted else "leaving", reason)
            again = self._wanted().get(key)
            if again is not None and key not in self._evicted:
                # Asked for while it left.
                version.take(again)
                version.begin(may_evict=self._may_evict)
            elif again is None:
                del self._versions[key]
                self._evicted.pop(key, None)
                log.info("model.unloaded", model=self.model, version=version.spec.version)
        finally:
            self._leaving.pop(key, None)
            self.nudge()

    async def _close_all(self) -> None:
        await asyncio.gather(*(self._close(name) for name in list(self._doors)))
        leaving = list(self._leaving.values())
        for task in leaving:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await asyncio.gather(*(v.leave("leaving", None) for v in self._versions.values()))
        self._versions.clear()

    def _on_version(self) -> None:
        self.nudge()
        self._tell()

    def _wanted(self) -> dict[Key, m.ModelVersion]:
        versions = self.spec.versions if self.spec else []
        return {key_of(version): version for version in versions if version.wanted}

"""Serves the models that are wanted, and answers whoever wants others."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import msgspec
import structlog

from bus import messages as m
from bus.errors import BusError, InvalidRequest, NobodyListens, NotFound, Unavailable, Unprocessable
from bus.instance import Instance
from bus.models import version_of
from bus.probes import Route
from bus.state import Bucket, Entry
from bus.subjects import (
    CANDLE_STATS,
    JOB_CANCEL,
    JOB_RETRY,
    MODEL_ADD,
    MODEL_ALIAS,
    MODEL_DESCRIBE,
    MODEL_GC,
    MODEL_IMPORT,
    MODEL_INFER,
    MODEL_LOAD,
    MODEL_REMOVE,
    MODEL_RUN,
    MODEL_UNLOAD,
    MODEL_VALIDATE,
    MODEL_WAKE,
)
from bus.tasks import beside
from bus.telemetry import allowed
from services.candle.repository.garbage import Garbage, check_unused
from services.candle.repository.repository import Repository
from services.candle.serving.memory import Full, Memory, Tenant, to_evict
from services.candle.serving.metrics import PREFIX, gauges_of, series_of
from services.candle.serving.model import Model
from services.candle.serving.telling import Telling
from services.candle.serving.version import Surroundings, Version
from services.candle.settings import (
    LIVE,
    MIB,
    CandleSettings,
    budget_bytes,
    threads_of,
    validation_limits,
)

SERVED: Final = (
    MODEL_LOAD,
    MODEL_UNLOAD,
    MODEL_ALIAS,
    MODEL_WAKE,
    MODEL_RUN,
    MODEL_INFER,
    MODEL_ADD,
    MODEL_VALIDATE,
    MODEL_DESCRIBE,
    MODEL_REMOVE,
    MODEL_GC,
    MODEL_IMPORT,
    JOB_CANCEL,
    JOB_RETRY,
    CANDLE_STATS,
)
TELL_S: Final = 1.0
# How long what is removed by force may take to leave every instance.
LEAVE_S: Final = 15.0

log = structlog.get_logger("candle.service")


class Candle:
    """Serves the models that the repository wants served.

    Args:
        instance: This process's place on the bus.
        repository: Says what to serve, and brings it.
        settings: How.
        served: Where it is written down what this instance serves.
    """

    def __init__(
        self,
        instance: Instance,
        repository: Repository,
        settings: CandleSettings,
        served: Bucket[m.ServedModels],
    ) -> None:
        self._instance = instance
        self._repository = repository
        self._garbage = Garbage(repository)
        self._settings = settings
        self._telling = Telling(served, self._as_served, instance.plugin, instance.slot)
        self._models: dict[str, Model] = {}
        self._running: dict[Model, asyncio.Task[None]] = {}
        self._known_revision = 0
        self._caught_up = False
        self._processors, self._host_bytes = allowed()
        self._memory = Memory(self._budget(), self._tenants, self._evict)
        self._around = Surroundings(
            repository,
            self._memory,
            lambda: self._settings,
            self._threads,
            self._processors,
            self._on_change,
        )
        repository.limits = validation_limits(settings)
        self._changed = asyncio.Event()
        self._failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self._told = 0, 0
        instance.series.append(lambda: series_of(self._versions()))
        instance.on_config(LIVE, self._take_settings)

    async def run(self) -> None:
        """Serve until cancelled."""
        await self._repository.open()
        async with (
            self._instance.serving(MODEL_LOAD, self._load),
            self._instance.serving(MODEL_UNLOAD, self._unload),
            self._instance.serving(MODEL_ALIAS, self._alias),
            self._instance.serving(MODEL_WAKE, self._wake),
            self._instance.serving(MODEL_ADD, self._repository.enter),
            self._instance.serving(MODEL_VALIDATE, self._repository.validate),
            self._instance.serving(MODEL_DESCRIBE, self._repository.describe),
            self._instance.serving(MODEL_REMOVE, self._remove),
            self._instance.serving(MODEL_GC, self._garbage.collect),
            self._instance.serving(CANDLE_STATS, self._stats),
            self._instance.local_routes(*self._routes()),
            beside(
                self._keep_telling(),
                self._telling.keep(),
                self._raise_failure(),
                self._become_ready(),
            ),
        ):
            try:
                await self._follow()
            finally:
                await self._end()

    def _routes(self) -> tuple[Route, ...]:
        stats = partial(self._instance.answer_here, CANDLE_STATS)
        return (
            Route("GET", "/health", m.Empty, self._health),
            Route("GET", "/models", m.Empty, stats),
            Route("POST", "/models/{id}/run", m.RunModel, self._run_here),
        )

    async def _health(self, _request: m.Empty) -> dict[str, Any]:
        return {"status": "ok", "loaded_models": self._loaded()}

    async def _run_here(self, request: m.RunModel) -> m.ModelOutput:
        try:
            return await self._instance.answer_here(MODEL_RUN, request)
        except NobodyListens:
            loaded = sorted({v.model for v in self._versions() if v.state == "ready"})
            raise InvalidRequest(
                f"there is no model {request.id!r} here; loaded are: {', '.join(loaded) or 'none'}",
                field="id",
            ) from None
        except Unprocessable as error:
            # Whatever the caller could mend is 400 on this route; clients of old know no other.
            raise InvalidRequest(error.message, field=error.field) from None

    # --- Desired state ----------------------------------------------------------------------------

    async def _follow(self) -> None:
        """Bring what is served in line with what is wanted, for ever."""
        async for changes in self._repository.follow():
            for entry in changes.entries:
                self._apply(entry)
            if changes.caught_up and not self._caught_up:
                self._caught_up = True
                self._on_change()

    async def _become_ready(self) -> None:
        """Say that this instance is ready, once what is wanted is served, as far as it can be.

        Beside `_follow`: what is wanted can change meanwhile.
        """
        await self._until(lambda: self._caught_up and self._settled())
        await self._load_default()
        self._tell()
        await self._instance.ready()

    def _settled(self) -> bool:
        return all(one.settled for one in self._models.values())

    def _apply(self, entry: Entry[m.ModelSpec]) -> None:
        name = entry.names[0]
        model = self._models.get(name)
        if model is None and entry.value is not None:
            model = self._models[name] = Model(name, self._instance, self._around)
            self._run(model)
        if model is not None:
            # What is there from before does not put each other out of memory.
            model.want(entry.value, entry.revision, may_evict=self._caught_up)
        self._known_revision = max(self._known_revision, entry.revision)
        self._on_change()

    def _run(self, model: Model) -> None:
        task = self._running[model] = asyncio.create_task(model.run())

        def ended(_task: asyncio.Task[None]) -> None:
            del self._running[model]
            if self._models.get(model.model) is model:
                del self._models[model.model]
            error = None if task.cancelled() else task.exception()
            if error is not None and not self._failed.done():
                self._failed.set_result(error)
            elif model.spec is not None and not task.cancelled():
                # Wanted again after it had looked for the last time.
                again = self._models[model.model] = Model(model.model, self._instance, self._around)
                self._run(again)
                again.want(model.spec, model.revision, may_evict=self._caught_up)
            self._on_change()

        task.add_done_callback(ended)

    async def _raise_failure(self) -> None:
        raise await self._failed

    async def _end(self) -> None:
        running = list(self._running.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def _load_default(self) -> None:
        path = self._settings.default_model
        if path is None or "default" in self._models:
            return
        try:
            _, revision = await self._repository.want(m.LoadModel(id="default", path=path))
        except BusError as error:
            log.error("model.failed", model="default", cause=error.message)
            return
        await self._until(lambda: self._known_revision >= revision and self._settled())

    # --- What we are asked ------------------------------------------------------------------------

    async def _load(self, request: m.LoadModel) -> m.LoadedModel:
        """Have a model served by every replica, and answer when this one does."""
        name, revision = await self._repository.want(request)
        version = await self._served_as(request.id, name, revision)
        await self._telling.written()
        return self._models[request.id].as_loaded(version)

    async def _unload(self, request: m.UnloadModel) -> m.UnloadedModel:
        revision = await self._repository.unwant(request.id, request.version)
        await self._until(lambda: self._known_revision >= revision)
        model = self._models.get(request.id)
        if model is not None and model.spec is not None:
            left = {v.version for v in model.spec.versions if not v.wanted}

            def left_or_back() -> bool:
                wanted = {v.version for v in model.spec.versions if v.wanted} if model.spec else ()
                return model.gone(left.difference(wanted))

            await self._until(left_or_back)
        await self._telling.written()
        return m.UnloadedModel(id=request.id)

    async def _remove(self, request: m.RemoveModel) -> m.RemovedModel:
        """Delete a model or a version; with force it is taken out of service first."""
        planned = await self._garbage.removal(request)
        if request.dry_run:
            return planned
        check_unused(planned, request)
        for version in planned.versions if planned.used_by else ():
            with contextlib.suppress(NotFound):
                await self._repository.unwant(request.id, version)
        if planned.used_by:
            await self._garbage.until_unserved(request.id, planned.versions, LEAVE_S)
        removed, revision = await self._garbage.remove(request)
        await self._until(lambda: self._known_revision >= revision)
        return msgspec.structs.replace(removed, used_by=planned.used_by)

    async def _alias(self, request: m.AliasModel) -> m.ModelAliases:
        """Let a name stand for another version, and answer when it does so here."""
        spec, revision = await self._repository.alias(request)
        if meant := version_of(spec, request.alias):
            await self._served_as(request.id, meant.version, revision)
            await self._telling.written()
        return m.ModelAliases(id=spec.id, aliases=spec.aliases)

    async def _wake(self, request: m.WakeModel) -> m.ServedModel:
        model = self._models.get(request.id)
        wanted = version_of(model.spec, request.version) if model and model.spec else None
        if model is None or wanted is None or not wanted.wanted:
            raise NotFound(f"there is no model {request.id!r} that should be served", field="id")
        version = model.wake(wanted)
        if version is None:
            raise Unavailable(f"model {request.id!r} is about to be loaded", retry_after_s=1)
        return model.told(version)

    async def _stats(self, _request: m.Empty) -> m.CandleStats:
        ready = [v for v in self._versions() if v.state == "ready"]
        told = [self._models[v.model].as_loaded(v) for v in ready]
        return m.CandleStats(
            models=sorted(told, key=lambda one: (one.id, one.version)),
            instance=self._instance.id,
            # What left memory for a while keeps what it has done.
            model_stats=[v.counted() for v in self._versions()],
        )

    async def _served_as(self, model: str, version: str, revision: int) -> Version:
        """Return a version once it is served here as a revision of the wishes has it.

        Raises:
            Unavailable: Somebody else wished otherwise meanwhile.
            BusError: It could not be loaded.
        """
        await self._until(lambda: self._known_revision >= revision)
        while True:
            one = self._models.get(model)
            wanted = version_of(one.spec, version) if one and one.spec else None
            if one is None or wanted is None or not wanted.wanted:
                raise Unavailable(
                    f"another caller changed {model!r} meanwhile; try again", retry_after_s=1
                )
            if served := one.serving(wanted):
                return served
            await self._next_change()

    # --- Memory -----------------------------------------------------------------------------------

    def _versions(self) -> list[Version]:
        return [version for model in self._models.values() for version in model.versions]

    def _tenants(self) -> list[Tenant]:
        return [version for version in self._versions() if version.memory_bytes]

    async def _evict(self, tenant: Tenant) -> None:
        version = next((v for v in self._versions() if v is tenant), None)
        if version is None:
            # Gone, while another one was put out.
            return
        model = self._models[version.model]
        model.cool(version, "made room for another model")
        await self._until(lambda: not version.in_memory or not model.leaves(version))
        if version.in_memory:
            raise Unavailable(f"{version.label} was to make room, but was asked for again")

    def _budget(self) -> int:
        config = self._instance.config
        plugin_bytes = config.memory_max_bytes if config else None
        return budget_bytes(self._settings, plugin_bytes, self._host_bytes)

    def _threads(self, config: m.ModelConfig) -> int:
        wanted = sum(
            1 for model in self._models.values() if model.spec
            for version in model.spec.versions if version.wanted
        )  # fmt: skip
        return threads_of(config, self._settings, self._processors, wanted)

    def _take_settings(self) -> None:
        self._settings = self._instance.settings(CandleSettings)
        self._memory.budget_bytes = self._budget()
        leaving = to_evict(self._tenants(), 0, self._memory.budget_bytes)
        for tenant in [] if isinstance(leaving, Full) else leaving:
            for version in self._versions():
                if version is tenant:
                    reason = "memory_budget_mb leaves it no room"
                    self._models[version.model].cool(version, reason)
        self._repository.cache.max_bytes = self._settings.cache_max_mb * MIB
        self._repository.limits = validation_limits(self._settings)
        for version in self._versions():
            version.limit()

    # --- What we tell -----------------------------------------------------------------------------

    def _on_change(self) -> None:
        """Wake whoever waits for something to become true."""
        self._telling.change()
        self._changed.set()
        self._changed = asyncio.Event()

    async def _next_change(self) -> None:
        await self._changed.wait()

    async def _until(self, true: Callable[[], bool]) -> None:
        while not true():
            await self._next_change()

    async def _keep_telling(self) -> None:
        while True:
            await asyncio.sleep(TELL_S)
            self._tell()
            now = time.monotonic()
            for version in self._versions():
                if version.idle_too_long(now):
                    self._models[version.model].cool(version, "not asked for its keep-alive time")

    def _tell(self) -> None:
        """Put into telemetry what is loaded, what waits, and how large batches have been lately."""
        self._instance.counts["models_loaded"] = self._loaded()
        versions = [v for v in self._versions() if v.state == "ready"]
        runs = sum(v.statistics.execution_count for v in versions)
        rows = sum(v.statistics.inference_count for v in versions)
        gauges = self._instance.gauges
        gauges["rows_waiting"] = sum(v.rows_waiting for v in versions)
        gauges["models_bytes"] = sum(v.memory_bytes for v in versions)
        # Fewer than before: a model was unloaded, and its counts with it.
        new_runs, new_rows = runs - self._told[0], rows - self._told[1]
        if new_runs > 0 and new_rows > 0:
            gauges["batch_rows"] = round(new_rows / new_runs, 2)
        self._told = runs, rows
        for name in [name for name in gauges if name.startswith(PREFIX)]:
            del gauges[name]
        gauges.update(gauges_of(versions))

    def _as_served(self) -> m.ServedModels:
        return m.ServedModels(
            plugin=self._instance.plugin,
            slot=self._instance.slot,
            instance=self._instance.id,
            host=self._instance.host,
            models=[self._models[v.model].told(v) for v in self._versions()],
            budget_bytes=self._memory.budget_bytes,
        )

    def _loaded(self) -> int:
        return len({version.model for version in self._versions() if version.state == "ready"})

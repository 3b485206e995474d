"""Serves the models that are wanted: one subject for each that is loaded."""

import asyncio
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
import structlog
from msgspec import Meta

from bus import messages as m
from bus.errors import (
    BusError,
    Internal,
    InvalidRequest,
    NobodyListens,
    NotFound,
    Unavailable,
    Unprocessable,
)
from bus.instance import Instance
from bus.probes import Route
from bus.state import Entry
from bus.subjects import CANDLE_STATS, MODEL_LOAD, MODEL_RUN, MODEL_UNLOAD
from bus.tasks import beside
from services.candle.batcher import Batcher, Limits
from services.candle.repository import Repository
from services.candle.runtimes import open_model
from services.candle.runtimes.base import ANY_LENGTH, DTYPES, Array, Runtime, Tensors, TensorSpec
from services.candle.statistics import Statistics

SERVED: Final = (MODEL_LOAD, MODEL_UNLOAD, MODEL_RUN, CANDLE_STATS)
TELL_S: Final = 1.0
# Started when they are needed: one for each model that runs just now.
MAX_THREADS: Final = 64

log = structlog.get_logger("candle.service")


class CandleSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The plugin's settings.

    Attributes:
        models_path: Folder that `candle.model.load` takes files from; relative to the data
            directory.
        default_model: A file there that is served as `default` from the start.
        telemetry_interval: Seconds between two telemetry snapshots.
        max_batch_rows: Rows that are put together into one run.
        max_waiting_rows: Rows that may wait for a model; more are refused.
        threads: onnxruntime threads for each model.
    """

    models_path: str = "models"
    default_model: str | None = None
    telemetry_interval: Annotated[float, Meta(gt=0, le=3600)] = 10.0
    max_batch_rows: Annotated[int, Meta(ge=1, le=65_536)] = 256
    max_waiting_rows: Annotated[int, Meta(ge=1, le=1_048_576)] = 4_096
    threads: Annotated[int, Meta(ge=1, le=64)] = 1


@dataclass
class _Serving:
    """A model on its way to being served, being served, or failed."""

    spec: m.ModelSpec
    revision: int
    replaces: "_Serving | None" = None
    task: asyncio.Task[None] | None = None
    runtime: Runtime | None = None
    batcher: Batcher | None = None
    statistics: Statistics | None = None
    failure: BusError | None = None
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    requests: int = 0
    rows: int = 0


class Candle:
    """Serves the models that the repository wants served.

    Args:
        instance: This process's place on the bus.
        repository: Says what to serve, and brings it.
        settings: How.
    """

    def __init__(
        self, instance: Instance, repository: Repository, settings: CandleSettings
    ) -> None:
        self._instance = instance
        self._repository = repository
        self._settings = settings
        self._models: dict[str, _Serving] = {}
        self._changed = asyncio.Condition()
        self._known_revision = 0
        self._told = 0, 0
        self._threads = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="candle-run")
        instance.on_config(("max_batch_rows", "max_waiting_rows"), self._take_settings)

    async def run(self) -> None:
        """Serve until cancelled."""
        await self._repository.open()
        async with (
            self._instance.serving(MODEL_LOAD, self._load),
            self._instance.serving(MODEL_UNLOAD, self._unload),
            self._instance.serving(CANDLE_STATS, self._stats),
            self._instance.local_routes(*self._routes()),
            beside(self._keep_telling()),
        ):
            try:
                await self._follow()
            finally:
                await asyncio.gather(*(_end(serving) for serving in self._models.values()))
                self._threads.shutdown(wait=False, cancel_futures=True)

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
            loaded = ", ".join(sorted(s.spec.id for s in self._models.values() if s.runtime))
            raise InvalidRequest(
                f"there is no model {request.id!r} here; loaded are: {loaded or 'none'}", field="id"
            ) from None
        except Unprocessable as error:
            # Whatever the caller could mend is 400 on this route; clients of old know no other.
            raise InvalidRequest(error.message, field=error.field) from None

    async def _follow(self) -> None:
        """Bring what is served in line with what is wanted, for ever."""
        ready = False
        async for changes in self._repository.follow():
            for entry in changes.entries:
                await self._apply(entry)
            if changes.caught_up and not ready:
                ready = True
                for serving in list(self._models.values()):
                    await serving.settled.wait()
                await self._load_default()
                self._tell()
                await self._instance.ready()

    async def _apply(self, entry: Entry[m.ModelSpec]) -> None:
        name = entry.names[0]
        old = self._models.pop(name, None)
        if entry.value is not None:
            # The old one leaves when the new one serves: no request finds nobody.
            new = self._models[name] = _Serving(entry.value, entry.revision, replaces=old)
            new.task = asyncio.create_task(self._serve(new))
        elif old is not None:
            await _end(old)
            log.info("model.unloaded", model=name)
        self._tell()
        async with self._changed:
            self._known_revision = entry.revision
            self._changed.notify_all()

    async def _serve(self, serving: _Serving) -> None:
        """Answer for one model until this task is cancelled: by unload, or at the end."""
        spec = serving.spec
        began = time.perf_counter()
        try:
            path = await self._repository.bring(spec)
            runtime = await asyncio.to_thread(open_model, path, threads=self._settings.threads)
            await asyncio.to_thread(runtime.warm_up)
        except Exception as error:
            serving.failure = error if isinstance(error, BusError) else Internal(str(error))
            serving.settled.set()
            log.exception("model.failed", model=spec.id, cause=serving.failure.message)
            await _end(serving.replaces)
            return
        serving.runtime = runtime
        serving.statistics = Statistics(spec.id)
        batcher = Batcher(
            partial(_forward, runtime),
            joins=runtime.signature.batched,
            limits=self._limits(),
            name=f"model {spec.id!r}",
            statistics=serving.statistics,
            threads=self._threads,
        )
        serving.batcher = batcher

        async def run_model(request: m.RunModel) -> m.ModelOutput:
            rows = as_rows(request.inputs, runtime)
            started = time.perf_counter()
            ran = await batcher.submit({runtime.signature.inputs[0].name: rows})
            took_ms = 1e3 * (time.perf_counter() - started)
            serving.requests += 1
            serving.rows += len(rows)
            log.debug("model.run", model=spec.id, rows=len(rows), execution_ms=took_ms)
            return self._output(spec, ran.outputs, took_ms)

        # Read from the inside out, this is the way down: leave the queue group, finish what is
        # in flight, and only then stop the batcher that the rest waits for.
        batching = asyncio.create_task(batcher.run())
        try:
            async with self._instance.serving(MODEL_RUN, run_model, spec.id):
                took_ms = round(1e3 * (time.perf_counter() - began), 1)
                await _end(serving.replaces)
                serving.replaces = None
                # Only now: who was told that it is loaded never meets the old one here.
                serving.settled.set()
                self._tell()
                log.info(
                    "model.loaded", model=spec.id, path=spec.path, format=spec.format,
                    checksum=spec.checksum, took_ms=took_ms,
                )  # fmt: skip
                await asyncio.Event().wait()
        finally:
            batching.cancel()
            await asyncio.gather(batching, return_exceptions=True)

    def _take_settings(self) -> None:
        self._settings = self._instance.settings(CandleSettings)
        for serving in self._models.values():
            if serving.batcher:
                serving.batcher.limit(self._limits())

    def _limits(self) -> Limits:
        return Limits(
            max_rows=self._settings.max_batch_rows,
            max_waiting_rows=self._settings.max_waiting_rows,
        )

    async def _load(self, request: m.LoadModel) -> m.LoadedModel:
        """Check a file, have it served by every replica, and answer when this one does."""
        path = self._repository.find(request.path)
        # Opened here first: a file that is not sound never becomes desired state.
        runtime = await asyncio.to_thread(open_model, path, threads=1)
        spec = m.ModelSpec(
            id=request.id,
            path=request.path,
            checksum=await self._repository.keep(path),
            format=runtime.format,
            loaded_at=m.now(),
        )
        serving = await self._until_known(spec.id, await self._repository.want(spec))
        if serving is None:
            raise Unavailable(f"another caller changed {request.id!r} meanwhile; try again")
        await serving.settled.wait()
        if serving.failure:
            raise serving.failure
        return _told(serving)

    async def _unload(self, request: m.UnloadModel) -> m.UnloadedModel:
        await self._repository.forget(request.id)
        async with self._changed:
            await self._changed.wait_for(lambda: request.id not in self._models)
        return m.UnloadedModel(id=request.id)

    async def _stats(self, _request: m.Empty) -> m.CandleStats:
        models = [_told(s) for s in self._models.values() if s.runtime]
        return m.CandleStats(
            models=sorted(models, key=lambda model: model.id), instance=self._instance.id
        )

    async def _until_known(self, model: str, revision: int) -> _Serving | None:
        """Return what became of a revision of the models' desired state."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._known_revision >= revision)
        serving = self._models.get(model)
        return serving if serving and serving.revision >= revision else None

    async def _load_default(self) -> None:
        path = self._settings.default_model
        if path is None or "default" in self._models:
            return
        try:
            # Not awaited until served: the change comes round to `_follow`, which runs this.
            found = self._repository.find(path)
            runtime = await asyncio.to_thread(open_model, found, threads=1)
            checksum = await self._repository.keep(found)
            await self._repository.want(
                m.ModelSpec(
                    id="default",
                    path=path,
                    checksum=checksum,
                    format=runtime.format,
                    loaded_at=m.now(),
                )
            )
        except BusError as error:
            log.error("model.failed", model="default", cause=error.message)

    def _output(self, spec: m.ModelSpec, outputs: Tensors, took_ms: float) -> m.ModelOutput:
        first = next((value for value in outputs.values() if value.dtype.kind in "biuf"), None)
        rows = np.empty((0, 0)) if first is None else _as_numbers(first)
        if not np.isfinite(rows).all():
            raise Unprocessable("the model gave values that are not finite; JSON has none")
        is_all = len(outputs) == 1 and first is not None and first.ndim == 2
        named = {} if is_all else {name: value.tolist() for name, value in outputs.items()}
        return m.ModelOutput(
            id=spec.id,
            outputs=rows.tolist(),
            execution_ms=took_ms,
            named=named,
            checksum=spec.checksum,
            instance=self._instance.id,
        )

    async def _keep_telling(self) -> None:
        while True:
            await asyncio.sleep(TELL_S)
            self._tell()

    def _tell(self) -> None:
        """Put into telemetry what is loaded, what waits, and how large batches have been lately."""
        self._instance.counts["models_loaded"] = self._loaded()
        batchers = [one.batcher for one in self._models.values() if one.batcher]
        counted = [one.statistics for one in self._models.values() if one.statistics]
        batches = sum(one.execution_count for one in counted)
        rows = sum(one.inference_count for one in counted)
        gauges = self._instance.gauges
        gauges["rows_waiting"] = sum(b.rows_waiting for b in batchers)
        # Fewer than before: a model was unloaded, and its counts with it.
        new_batches, new_rows = batches - self._told[0], rows - self._told[1]
        if new_batches > 0 and new_rows > 0:
            gauges["batch_rows"] = round(new_rows / new_batches, 2)
        self._told = batches, rows

    def _loaded(self) -> int:
        return sum(1 for serving in self._models.values() if serving.runtime)


def as_rows(inputs: list[list[float]], runtime: Runtime) -> Array:
    """Turn JSON rows into one array of shape ``[n, input_dim]`` of the type the model takes.

    Raises:
        InvalidRequest: The model does not take rows; there is no row; one has another length or
            a value that does not fit; says which.
    """
    spec = _row_input(runtime)
    if not inputs:
        raise InvalidRequest("inputs: there is no row", field="inputs")
    width = spec.shape[1] if spec.shape[1] > 0 else len(inputs[0])
    for i, row in enumerate(inputs):
        if len(row) != width:
            raise InvalidRequest(
                f"dimension mismatch: expected {width} columns, got {len(row)} in row {i}",
                field=f"inputs[{i}]",
            )
    wide = np.asarray(inputs, np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        rows: Array = wide.astype(DTYPES[spec.datatype])
        kept = np.isfinite(rows.astype(np.float64)) & (
            (rows == wide) | np.issubdtype(rows.dtype, np.floating)
        )
    if not kept.all():
        i, j = (int(at) for at in np.argwhere(~kept)[0])
        raise InvalidRequest(
            f"inputs[{i}][{j}]: {inputs[i][j]!r} is no {spec.datatype}, which the model takes",
            field=f"inputs[{i}][{j}]",
        )
    return rows


def _row_input(runtime: Runtime) -> TensorSpec:
    """Return the only input of a model that takes rows of numbers."""
    inputs = runtime.signature.inputs
    if len(inputs) == 1 and len(inputs[0].shape) == 2 and inputs[0].datatype != "BYTES":
        return inputs[0]
    said = ", ".join(f"{spec.name} {spec.datatype}{list(spec.shape)}" for spec in inputs)
    raise InvalidRequest(
        f"candle.model.run takes models with one input of numbers in rows; this one takes {said}",
        field="id",
    )


def _forward(runtime: Runtime, tensors: Tensors) -> Mapping[str, Array]:
    """Run rows through a model: at once, or in steps where its first axis has a fixed length."""
    spec = runtime.signature.inputs[0]
    rows = tensors[spec.name]
    step = len(rows) if spec.shape[0] == ANY_LENGTH else spec.shape[0]
    if step == len(rows):
        return runtime.run(tensors)
    each = [runtime.run({spec.name: rows[at : at + step]}) for at in range(0, len(rows), step)]
    return {
        output: np.concatenate([np.atleast_1d(one[output]) for one in each]) for output in each[0]
    }


def _told(serving: _Serving) -> m.LoadedModel:
    runtime, spec = serving.runtime, serving.spec
    if runtime is None:
        raise NotFound(f"there is no model {spec.id!r}", field="id")
    signature = runtime.signature
    return m.LoadedModel(
        id=spec.id,
        input_dim=signature.input_dim,
        output_dim=signature.output_dim,
        checksum=spec.checksum,
        path=spec.path,
        loaded_at=spec.loaded_at,
        metadata=dict(runtime.metadata),
        format=runtime.format,
        inputs=[_tensor(tensor) for tensor in signature.inputs],
        outputs=[_tensor(tensor) for tensor in signature.outputs],
        requests=serving.requests,
        rows=serving.rows,
    )


def _as_numbers(output: Array) -> npt.NDArray[np.float64]:
    """Return an output as rows of numbers, whatever its rank: a scalar is one row of one."""
    return output.reshape(len(output) if output.ndim else 1, -1).astype(np.float64)


def _tensor(spec: TensorSpec) -> m.TensorInfo:
    return m.TensorInfo(name=spec.name, datatype=spec.datatype, shape=list(spec.shape))


async def _end(serving: _Serving | None) -> None:
    """Stop serving a model, and what it had not yet replaced; its last request is answered then."""
    while serving is not None:
        if serving.task:
            serving.task.cancel()
            await asyncio.gather(serving.task, return_exceptions=True)
        serving = serving.replaces

"""One version of a model on this instance: fetched, loaded and warm, and asked meanwhile."""

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Final

import structlog

from bus import messages as m
from bus.errors import BusError, ErrorBody, Internal, NotFound, Unavailable, body_of
from bus.instance import DRAIN_S, Call
from bus.process import give_back, trim
from bus.tasks import to_its_end
from services.candle.repository.repository import Repository
from services.candle.repository.specs import tensors_of
from services.candle.runtimes import open_model
from services.candle.runtimes.base import CPU, Array, Runtime, Tensors
from services.candle.serving import rows
from services.candle.serving.batcher import Asked, Batcher, Ran
from services.candle.serving.joining import Limits
from services.candle.serving.kserve import HEADER_LENGTH, Codec, Request
from services.candle.serving.memory import FACTOR, Memory, NoRoom
from services.candle.serving.pace import QUICK_NS, Pace
from services.candle.serving.statistics import Statistics
from services.candle.settings import INSTANCES_MAX, CandleSettings, instances_of

VERSION: Final = "Bkg-Model-Version"
DIGEST: Final = "Bkg-Model-Digest"
RETRY_MAX_S: Final = 30.0

log = structlog.get_logger("candle.version")


@dataclass(frozen=True)
class Surroundings:
    """What a version needs of its worker.

    Attributes:
        repository: Brings artefacts.
        memory: Says when it may load.
        settings: Gives the plugin's settings as they are now.
        threads: Gives the threads of one run for a configuration.
        processors: How many this process may use.
        changed: Is called when a state has changed.
    """

    repository: Repository
    memory: Memory
    settings: Callable[[], CandleSettings]
    threads: Callable[[m.ModelConfig], int]
    processors: float
    changed: Callable[[], None]


@dataclass(frozen=True)
class _Loaded:
    """What there is of a version only while it is in memory."""

    runtime: Runtime
    codec: Codec
    batcher: Batcher
    batching: asyncio.Task[None]
    threads: ThreadPoolExecutor


class Version:
    """One version of a model, from its artefact to its last answer.

    Attributes:
        spec: What it is.
        label: What it is called in words.
        state: How far it is.
        since: Since when.
        reason: Why it failed, or left memory.
        failure: The error of the last try to load it.
        memory_bytes: What it takes.
        used_at: When it was last asked, in monotonic seconds.
        statistics: What it has done.
    """

    def __init__(self, model: str, spec: m.ModelVersion, around: Surroundings) -> None:
        self.model = model
        self.spec = spec
        self.label = f"model {model!r} version {spec.version!r}"
        self.state: m.ModelState = "queued"
        self.since = m.now()
        self.reason: str | None = None
        self.failure: ErrorBody | None = None
        self.memory_bytes = 0
        self.threads = 0
        self.used_at = time.monotonic()
        self.statistics = Statistics(model, spec.version)
        self._around = around
        self._progress: float | None = None
        self._loaded: _Loaded | None = None
        self._using = 0
        self._unused = asyncio.Event()
        self._loading: asyncio.Task[None] | None = None
        self._holding = AsyncExitStack()
        self._about = {VERSION: spec.version, DIGEST: spec.checksum}

    @property
    def last_used(self) -> datetime | None:
        """When it was last asked."""
        if not self.statistics.last_inference:
            return None
        return m.now() - timedelta(seconds=time.monotonic() - self.used_at)

    @property
    def pinned(self) -> bool:
        """Whether it stays in memory, whatever else wants room."""
        return self.spec.config.pinned

    @property
    def busy(self) -> bool:
        """Whether it is being asked just now."""
        return self._using > 0

    @property
    def on_its_way(self) -> bool:
        """Whether it will be ready, or failed, without anybody doing anything."""
        return self.state in {"queued", "fetching", "loading"}

    @property
    def rows_waiting(self) -> int:
        """Rows that wait for a run."""
        return self._loaded.batcher.rows_waiting if self._loaded else 0

    @property
    def in_memory(self) -> bool:
        """Whether it takes memory."""
        return self._loaded is not None

    def idle_too_long(self, now: float) -> bool:
        """Tell whether its keep-alive has passed."""
        keep_s = self.spec.config.keep_alive_s
        if keep_s is None or self.pinned or self.state != "ready" or self.busy:
            return False
        return now - self.used_at > keep_s

    def begin(self, *, may_evict: bool) -> None:
        """Go and load it, unless that is being done."""
        if self._loading is None or self._loading.done():
            self.failure = None
            self._become("queued")
            self._loading = asyncio.create_task(self._load(may_evict=may_evict))

    def take(self, spec: m.ModelVersion) -> None:
        """Go on with another configuration, as far as that needs no loading."""
        self.spec = spec
        self.limit()

    def limit(self) -> None:
        """Go on with the limits that the settings and the configuration give now."""
        if self._loaded:
            self._loaded.batcher.limit(self._limits())

    def infer(self, call: Call) -> None:
        """Answer a request of the Open Inference Protocol; see `services.candle.serving.kserve`.

        Raises:
            BusError: It cannot even wait for a run.
        """
        loaded = self._use()
        # The batcher counts what fails at its own.
        at_batcher = False
        try:
            request = loaded.codec.read(call.body, call.headers.get(HEADER_LENGTH))
            at_batcher = True
            deadline = _deadline(call, request.timeout_us)
            asked = loaded.batcher.put(
                request.tensors, deadline, partial(self._answer, call, loaded, request)
            )
        except Exception as error:
            if not at_batcher and isinstance(error, BusError):
                self.statistics.failed(error.code)
            self._used()
            raise
        call.on_cancel = partial(self._drop, call, loaded, asked)

    def _answer(
        self, call: Call, loaded: _Loaded, request: Request, outcome: Ran | BusError
    ) -> BusError | None:
        try:
            if isinstance(outcome, BusError):
                call.fail(outcome)
                return None
            body, headers = loaded.codec.write(request, outcome.outputs)
            headers.update(self._about)
            return call.answer(body, headers)
        except Exception as error:  # noqa: BLE001 - whatever it is belongs to who asked
            call.fail(error)
            return error if isinstance(error, BusError) else Internal(str(error))
        finally:
            self._used()

    def _drop(self, call: Call, loaded: _Loaded, asked: Asked) -> None:
        """Let go of a request whose caller has gone."""
        if not asked.over:
            loaded.batcher.drop(asked)
            call.drop()
            self._used()

    async def run_rows(self, request: m.RunModel, instance: str) -> m.ModelOutput:
        """Answer a request of the contract: rows in, rows out."""
        loaded = self._use()
        at_batcher = False
        try:
            given = rows.as_rows(request.inputs, loaded.runtime)
            began, at_batcher = time.perf_counter(), True
            outputs = await _in_steps(loaded.batcher, loaded.runtime, given)
            took_ms = 1e3 * (time.perf_counter() - began)
            reply = rows.output_of(self.model, outputs, took_ms, self.spec, instance)
        except BusError as error:
            if not at_batcher:
                self.statistics.failed(error.code)
            raise
        finally:
            self._used()
        log.debug("model.run", model=self.model, rows=len(given), execution_ms=took_ms)
        return reply

    async def leave(self, state: m.ModelState, reason: str | None) -> None:
        """Leave memory when the last request is answered; nobody may send new ones any more.

        Args:
            state: What it is then: `cold`, `failed` or `leaving`.
            reason: Why.
        """
        if self._loading and not self._loading.done():
            self._loading.cancel()
            await asyncio.gather(self._loading, return_exceptions=True)
        if self.state == "ready":
            self._become("leaving", reason)
        try:
            async with asyncio.timeout(DRAIN_S):
                while self._using:
                    self._unused.clear()
                    await self._unused.wait()
        except TimeoutError:
            log.warning("model.cut_off", model=self.model, requests=self._using)
        await self._free()
        self._become(state, reason)

    def counted(self) -> m.ModelStatistics:
        """Return what it has done, as it travels."""
        return self.statistics.message(
            queue_rows=self.rows_waiting,
            threads=self.threads,
            instances=self._instances,
        )

    def told(self, names: list[str], revision: int) -> m.ServedModel:
        """Return it as others see it, at a revision of the model's wish."""
        config = self.spec.config
        kept = "pinned" if config.pinned else "keep-alive" if config.keep_alive_s else "room"
        return m.ServedModel(
            id=self.model,
            version=self.spec.version,
            state=self.state,
            since=self.since,
            names=names,
            progress=self._progress if self.state == "fetching" else None,
            reason=self.reason,
            memory_bytes=self.memory_bytes,
            threads=self.threads,
            last_used=self.last_used,
            kept=kept if self.state == "ready" else None,
            revision=revision,
            instances=self._instances if self._loaded else 0,
        )

    def as_loaded(self, names: list[str], revision: int) -> m.LoadedModel:
        """Return it as `candle.stats` tells it, at a revision of the model's wish.

        Raises:
            NotFound: It is not loaded.
        """
        if self._loaded is None:
            raise NotFound(f"there is no {self.label} here", field="id")
        runtime = self._loaded.runtime
        signature = runtime.signature
        inputs, outputs = tensors_of(signature)
        done = self.counted()
        return m.LoadedModel(
            id=self.model,
            input_dim=signature.input_dim,
            output_dim=signature.output_dim,
            checksum=self.spec.checksum,
            path=self.spec.path,
            loaded_at=self.spec.wanted_at or self.spec.added_at,
            metadata=dict(runtime.metadata),
            format=runtime.format,
            inputs=inputs,
            outputs=outputs,
            requests=done.inference_stats.success.count,
            rows=done.inference_count,
            version=self.spec.version,
            names=names,
            provider=runtime.provider,
            threads=self.threads,
            memory_bytes=self.memory_bytes,
            last_used=self.last_used,
            config=self.spec.config,
            revision=revision,
        )

    async def _load(self, *, may_evict: bool) -> None:
        """Load it; what may pass, such as a broker that is away, is tried again and again."""
        began, pause_s = time.perf_counter(), 1.0
        while True:
            try:
                await self._load_once(may_evict=may_evict)
            except Exception as error:
                # Not the error itself: it holds on to its frames, and they to the half-made model.
                self.failure = body_of(
                    error if isinstance(error, BusError) else Internal(str(error))
                )
                log.exception("model.failed", model=self.model, cause=self.failure.message)
                self.memory_bytes = 0
                await self._holding.aclose()
                if isinstance(error, NoRoom) or not isinstance(error, Unavailable):
                    cold = isinstance(error, NoRoom)
                    self._become("cold" if cold else "failed", self.failure.message)
                    return
                self._become("queued", self.failure.message)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, RETRY_MAX_S)
            else:
                break
        spec = self.spec
        took_ms = round(1e3 * (time.perf_counter() - began), 1)
        log.info(
            "model.loaded", model=self.model, version=spec.version, path=spec.path,
            format=spec.format, checksum=spec.checksum, took_ms=took_ms,
        )  # fmt: skip

    async def _load_once(self, *, may_evict: bool) -> None:
        around, spec = self._around, self.spec
        self._become("fetching")
        path = await self._holding.enter_async_context(
            around.repository.artefact(spec, self._tell_progress)
        )
        self._become("queued")
        # What it took the last time says more than the size of its file.
        need = self.memory_bytes or int(FACTOR * spec.size_bytes)
        async with around.memory.loading(self.label, need, may_evict=may_evict) as grown:
            self._become("loading")
            threads = around.threads(spec.config)
            provider = spec.config.provider or CPU
            # To its end: called off, it takes memory until then, and nobody else may load.
            runtime = await to_its_end(_opened, path, threads, provider)
            self.memory_bytes = max(grown(), spec.size_bytes)
        self.failure, self.threads = None, threads
        self._loaded = self._started(runtime)
        self.used_at = time.monotonic()
        self._become("ready")

    def _started(self, runtime: Runtime) -> _Loaded:
        limits = self._limits()
        # One is made when there is a run for it: the limit may rise later.
        threads = ThreadPoolExecutor(INSTANCES_MAX, f"run-{self.model}")
        batcher = Batcher(
            runtime.run,
            joins=runtime.signature.batched,
            limits=limits,
            name=self.label,
            statistics=self.statistics,
            threads=threads,
            # What computes elsewhere keeps nobody here from working meanwhile.
            pace=Pace(QUICK_NS if runtime.provider == CPU else 0),
        )
        codec = Codec(runtime.signature, self.model, self.spec.version)
        batching = asyncio.create_task(batcher.run())
        return _Loaded(runtime, codec, batcher, batching, threads)

    async def _free(self) -> None:
        """Give the memory back."""
        if loaded := self._loaded:
            loaded.batching.cancel()
            await asyncio.gather(loaded.batching, return_exceptions=True)
            loaded.threads.shutdown(wait=False)
            # The last reference to the runtime goes with it.
            del loaded
        self._loaded, self.memory_bytes = None, 0
        await self._holding.aclose()
        await asyncio.to_thread(give_back)

    def _use(self) -> _Loaded:
        if self._loaded is None:
            raise Unavailable(f"{self.label} has just left this instance; again", retry_after_s=1)
        self._using += 1
        self.used_at = time.monotonic()
        return self._loaded

    def _used(self) -> None:
        self._using -= 1
        if not self._using:
            self._unused.set()

    def _limits(self) -> Limits:
        config, settings = self.spec.config, self._around.settings()
        delay_ms = config.max_delay_ms if config.max_delay_ms is not None else settings.max_delay_ms
        return Limits(
            max_rows=config.max_batch_rows or settings.max_batch_rows,
            max_waiting_rows=config.max_waiting_rows or settings.max_waiting_rows,
            max_delay_s=delay_ms / 1e3,
            instances=self._instances,
        )

    @property
    def _instances(self) -> int:
        return instances_of(self.spec.config, max(1, self.threads), self._around.processors)

    def _tell_progress(self, share: float) -> None:
        # In steps that a person sees, so that nobody is told of every chunk.
        told = round(share, 2)
        if told != self._progress:
            self._progress = told
            self._around.changed()

    def _become(self, state: m.ModelState, reason: str | None = None) -> None:
        self.state, self.reason, self.since = state, reason, m.now()
        self._around.changed()


def _opened(path: Path, threads: int, provider: str) -> Runtime:
    """Open a model and warm it up, and leave no more in memory than it takes. Blocks."""
    try:
        runtime = open_model(path, threads=threads, provider=provider)
        runtime.warm_up()
    finally:
        # What parsing took is free now, but still in the allocator: it would be counted as the
        # model's.
        trim()
    return runtime


def _deadline(call: Call, timeout_us: int | None) -> float | None:
    """Return the earlier one of the caller's two deadlines, in the event loop's time."""
    allowed = [call.allowed_s, None if timeout_us is None else timeout_us / 1e6]
    given = [one for one in allowed if one is not None]
    return time.monotonic() + min(given) if given else None


async def _in_steps(batcher: Batcher, runtime: Runtime, given: Array) -> Mapping[str, Array]:
    """Run rows through a model: at once, or in steps where its first axis has a fixed length."""
    parts: list[Tensors] = rows.steps(given, runtime)
    done = [(await batcher.submit(part, check=rows.check_finite)).outputs for part in parts]
    return done[0] if len(done) == 1 else rows.joined(done)

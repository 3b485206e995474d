"""Jobs: work that outlives its request, done once by whichever instance has room.

A job is a document in a bucket, and whoever writes to it compares and sets. An instance that takes
one up says so with a lease, and renews it; it stops when somebody else has written that the job is
theirs. A lease has passed for an instance that has not seen it renewed for its length, by its own
steady clock: so the clocks of hosts need not agree.
"""

import asyncio
import contextlib
import hashlib
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final, Literal, Protocol

import msgspec
import structlog

from bus import messages as m
from bus.client import Client
from bus.errors import BusError, Conflict, NotFound, Overloaded, Unavailable
from bus.instance import Instance
from bus.subjects import JOB, JOB_CANCEL, JOB_RETRY, MODEL_IMPORT
from bus.tasks import beside
from services.candle.downloads import Progress, heals

LEASE_S: Final = 10.0
# Written when something has changed, but no more often; and otherwise as often as the lease needs.
TELL_S: Final = 1.0
RENEW_S: Final = 3.0
QUEUED_MAX: Final = 1_000
ENDED_MAX: Final = 1_000
# Tries in a row that bring nothing; one that brings some bytes begins the count anew.
FAILURES_MAX: Final = 8
BACKOFF_FIRST_S: Final = 1.0
BACKOFF_MAX_S: Final = 60.0
# Where a part of the file lies has the first chance to go on with it.
ELSEWHERE_S: Final = 3.0
LOOK_S: Final = 1.0
TIDY_S: Final = 3_600.0
GIVE_BACK_S: Final = 3.0
_WRITES: Final = 20
_ENDED: Final = ("done", "failed", "cancelled")

Stage = Literal["fetching", "storing", "validating", "loading"]
Told = Callable[[Stage, Progress | None], None]

log = structlog.get_logger("candle.jobs")


class UnsoundError(BusError):
    """What has come is no sound model; it is kept as `added`, to be looked at."""

    code = "unprocessable"
    number = 422

    def __init__(self, message: str, added: m.AddedModel) -> None:
        super().__init__(message)
        self.added = added


class Work(Protocol):
    """What jobs are about."""

    def checked(self, request: m.ImportModel) -> tuple[m.ImportModel, str | None]:
        """Return a request without the password in it, and that; refuse what can never be done."""

    async def carry(self, job: m.Job, secret: str | None, told: Told) -> m.AddedModel:
        """Do a job; what is there from an earlier try is gone on with."""

    async def tidy(self, live: set[str]) -> None:
        """Remove what jobs of old have left, but for these."""


class _LostError(Exception):
    """Somebody else has the job now."""


class _CancelledError(Exception):
    """Somebody wants the job to end."""


@dataclass
class _Seen:
    """A job as it was last read: `since` is when, by the steady clock."""

    job: m.Job
    revision: int
    since: float


@dataclass
class _Held:
    """A job that this instance does."""

    job: m.Job
    revision: int
    bytes_before: int
    stage: Stage | None = None
    progress: Progress | None = None
    told: bool = True
    cancel: asyncio.Event = field(default_factory=asyncio.Event)


class Jobs:
    """The jobs of a deployment, as far as this instance does them.

    Args:
        client: The bus.
        instance: This process's place on it.
        work: Does what a job is about.
        at_once: How many jobs this instance may do at a time, now.
    """

    def __init__(
        self, client: Client, instance: Instance, work: Work, at_once: Callable[[], int]
    ) -> None:
        self._client = client
        self._instance = instance
        self._jobs = client.store.jobs
        self._work = work
        self._at_once = at_once
        self._seen: dict[str, _Seen] = {}
        self._held: dict[str, _Held] = {}
        self._carrying: set[asyncio.Task[None]] = set()
        self._secrets: OrderedDict[str, str] = OrderedDict()
        self._caught_up = asyncio.Event()
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def serving(self) -> AsyncGenerator[None]:
        """Answer for jobs, and do them, while inside; left, what is unfinished is given back."""
        async with (
            self._instance.serving(MODEL_IMPORT, self.enter),
            self._instance.serving(JOB_CANCEL, self.cancel),
            self._instance.serving(JOB_RETRY, self.retry),
        ):
            try:
                async with beside(self._follow(), self._keep_taking(), self._keep_tidy()):
                    yield
            finally:
                await self._give_back()

    # --- What we are asked ------------------------------------------------------------------------

    async def enter(self, request: m.ImportModel) -> m.Job:
        """Queue a job; asked again with the same key, return the first one.

        Raises:
            BusError: It can never be done: a denied or malformed address.
            Conflict: The key was used for something else.
            Overloaded: Too many are queued.
        """
        request, secret = self._work.checked(request)
        await self._check_room()
        now = m.now()
        job = m.Job(
            job=_id_for(request),
            request=request,
            created_at=now,
            updated_at=now,
            only=self._instance.id if secret else None,
        )
        if secret:
            self._remember(job.job, secret)
        try:
            revision = await self._jobs.create(job, job.job)
        except Conflict:
            found = await self._jobs.get(job.job)
            if found is None or found.value is None:
                raise
            if found.value.request != request:
                raise Conflict(
                    f"the key {request.key!r} has been used for another import, job {job.job}"
                ) from None
            return found.value
        await self._is_now(job, revision)
        log.info("job.queued", job=job.job, model=request.id)
        return job

    async def cancel(self, request: m.NameJob) -> m.Job:
        """Have a job end; one that has ended stays as it is.

        Raises:
            NotFound: There is none.
        """
        return await self._change(request.job, cancelled)

    async def retry(self, request: m.NameJob) -> m.Job:
        """Queue a job again that failed or was cancelled.

        Raises:
            NotFound: There is none.
            Conflict: It has not ended, or is done.
            Overloaded: Too many are queued.
        """
        await self._check_room()
        return await self._change(request.job, again)

    async def _check_room(self) -> None:
        await self._caught_up.wait()
        queued = sum(1 for seen in self._seen.values() if seen.job.state == "queued")
        if queued >= QUEUED_MAX:
            raise Overloaded(
                f"{queued:,} jobs are queued already, {QUEUED_MAX:,} may be; cancel some, or wait",
                retry_after_s=60,
            )

    async def _change(self, name: str, change: Callable[[m.Job, datetime], m.Job]) -> m.Job:
        for _ in range(_WRITES):
            found = await self._jobs.get(name)
            if found is None or found.value is None:
                raise NotFound(f"there is no job {name!r}; jobs are kept for a week", field="job")
            job = change(found.value, m.now())
            if job is found.value:
                return job
            try:
                await self._is_now(job, await self._jobs.update(job, found.revision, name))
            except Conflict:
                continue
            return job
        raise Conflict(f"others keep changing job {name!r}; try again")

    # --- What there is ----------------------------------------------------------------------------

    async def _follow(self) -> None:
        async for changes in self._jobs.follow():
            for entry in changes.entries:
                if entry.value is None:
                    self._seen.pop(entry.names[0], None)
                else:
                    self._see(entry.value, entry.revision)
            if changes.caught_up:
                self._caught_up.set()
            self._changed.set()

    def _see(self, job: m.Job, revision: int) -> None:
        seen = self._seen.get(job.job)
        if seen is not None and seen.revision >= revision:
            return
        self._seen[job.job] = _Seen(job, revision, time.monotonic())
        held = self._held.get(job.job)
        if held is not None and job.cancelling and _same_try(job, held.job):
            held.cancel.set()

    async def _is_now(self, job: m.Job, revision: int) -> None:
        """Take down what was written, and tell of it."""
        self._see(job, revision)
        self._changed.set()
        with contextlib.suppress(BusError):
            await self._client.publish(JOB, job, job=job.job)

    # --- Taking jobs up ---------------------------------------------------------------------------

    async def _keep_taking(self) -> None:
        await self._caught_up.wait()
        while True:
            self._changed.clear()
            for seen in sorted(self._seen.values(), key=lambda one: one.job.created_at):
                if len(self._held) >= self._at_once():
                    break
                if self._may_take(seen):
                    await self._take(seen)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._changed.wait()
                # What changes in a rush is looked at once.
                await asyncio.sleep(0.05)

    def _may_take(self, seen: _Seen) -> bool:
        if seen.job.job in self._held:
            return False
        return takeable(
            seen.job,
            self._instance.id,
            self._instance.host,
            unchanged_s=time.monotonic() - seen.since,
            now=m.now(),
        )

    async def _take(self, seen: _Seen) -> None:
        job = taken(seen.job, self._instance.id, self._instance.host, m.now())
        try:
            revision = await self._jobs.update(job, seen.revision, job.job)
        except Conflict:
            # Somebody else was faster; what they wrote is on its way.
            return
        except BusError as error:
            log.warning("job.untaken", job=job.job, cause=error.message)
            return
        await self._is_now(job, revision)
        if job.state != "running":
            return
        log.info("job.taken", job=job.job, model=job.request.id, tries=job.tries)
        held = self._held[job.job] = _Held(job, revision, bytes_before=job.bytes)
        task = asyncio.create_task(self._carry(held))
        self._carrying.add(task)

        def let_go(task: asyncio.Task[None]) -> None:
            self._carrying.discard(task)
            del self._held[job.job]
            self._changed.set()

        task.add_done_callback(let_go)

    # --- Doing them -------------------------------------------------------------------------------

    async def _carry(self, held: _Held) -> None:
        """Do a job, and write down how it ended; unless it is no longer ours."""
        name = held.job.job

        def told(stage: Stage, progress: Progress | None) -> None:
            held.stage, held.told = stage, False
            held.progress = progress or held.progress

        try:
            result = None
            try:
                self._check_known(held.job)
                async with beside(self._keep_lease(held)):
                    result = await self._work.carry(held.job, self._secrets.get(name), told)
            except _CancelledError:
                await self._write(
                    held, lambda job: ended(renewed_by(job, held, m.now()), "cancelled", m.now())
                )
                log.info("job.cancelled", job=name)
            except BusError as error:
                failure, added = error, error.added if isinstance(error, UnsoundError) else None
                await self._write(held, lambda job: after(job, failure, added, held, m.now()))
                log.warning("job.failed", job=name, state=held.job.state, cause=error.message)
            except Exception as error:
                # Ours, and not what the job is about: said in the log with its traceback.
                log.exception("job.broken", job=name)
                why = f"{type(error).__name__}: the log of {self._instance.host} has the cause"
                await self._write(held, lambda job: ended(job, "failed", m.now(), error=why))
            else:
                done = result
                await self._write(
                    held,
                    lambda job: ended(
                        renewed_by(job, held, m.now()), "done", m.now(), result=done
                    ),
                )
                self._secrets.pop(name, None)
                log.info("job.done", job=name, version=result.version)
        except asyncio.CancelledError:
            with contextlib.suppress(TimeoutError, BusError, _LostError):
                async with asyncio.timeout(GIVE_BACK_S):
                    await self._write(held, lambda job: given_back(job, m.now()))
            raise
        except _LostError:
            log.warning("job.lost", job=name)
        except BusError as error:
            # It stays ours until the lease has passed; then somebody takes it up again.
            log.error("job.unwritten", job=name, cause=error.message)

    def _check_known(self, job: m.Job) -> None:
        if job.only is not None and job.job not in self._secrets:
            raise NotFound(
                "the address had a password in it, which is known nowhere any more; ask for it "
                "again, or put it into import_credentials",
                field="url",
            )

    async def _keep_lease(self, held: _Held) -> None:
        """Keep the job ours, and tell how far it is, until it is lost or somebody cancels it."""
        renewed = time.monotonic()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TELL_S):
                    await held.cancel.wait()
            if held.cancel.is_set() or held.job.cancelling:
                raise _CancelledError
            if held.told and time.monotonic() - renewed < RENEW_S:
                continue
            held.told = True
            try:
                await self._write(held, lambda job: renewed_by(job, held, m.now()))
                renewed = time.monotonic()
            except Unavailable as error:
                log.warning("job.untold", job=held.job.job, cause=error.message)

    async def _write(self, held: _Held, change: Callable[[m.Job], m.Job]) -> None:
        """Write to a job that is ours, whatever others have wished of it meanwhile.

        Raises:
            _LostError: It is no longer ours.
            Unavailable: The broker is away.
        """
        name = held.job.job
        for _ in range(_WRITES):
            job = change(held.job)
            try:
                revision = await self._jobs.update(job, held.revision, name)
            except Conflict:
                found = await self._jobs.get(name)
                if found is None or found.value is None or not _same_try(found.value, held.job):
                    raise _LostError from None
                held.job, held.revision = found.value, found.revision
                continue
            held.job, held.revision = job, revision
            await self._is_now(job, revision)
            return
        raise Unavailable(f"others keep changing job {name!r}")

    async def _give_back(self) -> None:
        carrying = list(self._carrying)
        for task in carrying:
            task.cancel()
        await asyncio.gather(*carrying, return_exceptions=True)

    # --- Keeping house ----------------------------------------------------------------------------

    async def _keep_tidy(self) -> None:
        await self._caught_up.wait()
        while True:
            live = {name for name, seen in self._seen.items() if seen.job.state not in _ENDED}
            await self._work.tidy(live)
            with contextlib.suppress(BusError):
                await self._forget_old()
            for _ in range(int(TIDY_S / RENEW_S)):
                with contextlib.suppress(BusError):
                    await self._end_orphans()
                await asyncio.sleep(RENEW_S)

    async def _forget_old(self) -> None:
        """Delete ended jobs beyond the last thousand: the bucket has a limit."""
        over = [one for one in self._seen.values() if one.job.state in _ENDED]
        over.sort(key=lambda one: one.job.updated_at)
        for one in over[: max(0, len(over) - ENDED_MAX)]:
            with contextlib.suppress(Conflict):
                await self._jobs.delete(one.job.job, revision=one.revision)

    async def _end_orphans(self) -> None:
        """End jobs that nobody can do any more: their password went with the only one who knew."""
        ours = self._instance.id
        found = [
            one
            for one in self._seen.values()
            if one.job.state not in _ENDED
            and one.job.only not in (None, ours)
            and time.monotonic() - one.since > LEASE_S
        ]
        if not found:
            return
        there = {
            entry.value.id for entry in await self._client.store.instances.all() if entry.value
        }
        for one in found:
            if one.job.only in there:
                continue
            why = (
                "the address had a password in it, and the instance that knew it is gone; ask for "
                "it again, or put it into import_credentials"
            )
            job = ended(one.job, "failed", m.now(), error=why)
            with contextlib.suppress(Conflict):
                await self._is_now(job, await self._jobs.update(job, one.revision, job.job))

    def _remember(self, name: str, secret: str) -> None:
        self._secrets[name] = secret
        while len(self._secrets) > QUEUED_MAX + ENDED_MAX:
            self._secrets.popitem(last=False)


# --- What becomes of a job ------------------------------------------------------------------------


def takeable(job: m.Job, instance: str, host: str, *, unchanged_s: float, now: datetime) -> bool:
    """Tell whether an instance may take up a job that was last seen to change so long ago."""
    if job.only not in (None, instance):
        return False
    elsewhere = job.host not in (None, host) and job.bytes > 0
    patience_s = ELSEWHERE_S if elsewhere else 0.0
    if job.state == "running":
        return unchanged_s > LEASE_S + patience_s
    if job.state != "queued":
        return False
    due = job.retry_at or job.updated_at
    return now >= due and unchanged_s >= patience_s


def taken(job: m.Job, instance: str, host: str, now: datetime) -> m.Job:
    """Return a job as it is when an instance takes it up.

    One whose worker died is counted as a try that failed, so that a job that kills its worker does
    not kill them all; one that was to be cancelled ends.
    """
    died = job.state == "running"
    if died and job.cancelling:
        return ended(job, "cancelled", now)
    failures = job.failures + 1 if died else job.failures
    if failures >= FAILURES_MAX:
        why = f"whoever took it up was gone before it was done, {failures} times"
        return ended(job, "failed", now, error=why)
    return msgspec.structs.replace(
        job,
        state="running",
        instance=instance,
        host=host,
        started_at=now,
        updated_at=now,
        lease_until=now + timedelta(seconds=LEASE_S),
        tries=job.tries + 1,
        failures=failures,
        retry_at=None,
        stage="fetching",
    )


def renewed_by(job: m.Job, held: _Held, now: datetime) -> m.Job:
    """Return a job with its lease renewed, and how far it is."""
    job = msgspec.structs.replace(
        job,
        updated_at=now,
        lease_until=now + timedelta(seconds=LEASE_S),
        stage=held.stage or job.stage,
    )
    if (progress := held.progress) is None:
        return job
    fetching = held.stage == "fetching"
    return msgspec.structs.replace(
        job,
        failures=0 if progress.bytes > held.bytes_before else job.failures,
        bytes=progress.bytes,
        total_bytes=progress.total_bytes,
        bytes_per_s=progress.bytes_per_s if fetching else None,
        eta_s=progress.eta_s if fetching else None,
    )


def after(
    job: m.Job, error: BusError, added: m.AddedModel | None, held: _Held, now: datetime
) -> m.Job:
    """Return a job whose try has failed: queued again where that may help, or failed."""
    job = renewed_by(job, held, now)
    if job.cancelling:
        return ended(job, "cancelled", now)
    failures = job.failures + 1
    job = msgspec.structs.replace(job, failures=failures)
    if not heals(error) or failures >= FAILURES_MAX:
        return ended(job, "failed", now, error=error.message, result=added)
    wait_s = max(backoff_s(failures), error.retry_after_s or 0.0)
    return msgspec.structs.replace(
        _free(job, now),
        state="queued",
        retry_at=now + timedelta(seconds=wait_s),
        error=error.message,
    )


def backoff_s(failures: int) -> float:
    """Return how long to wait after so many tries that brought nothing."""
    return min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0 ** (failures - 1))


def given_back(job: m.Job, now: datetime) -> m.Job:
    """Return a job that its worker leaves to others: it has not failed."""
    if job.cancelling:
        return ended(job, "cancelled", now)
    return msgspec.structs.replace(_free(job, now), state="queued", tries=job.tries - 1)


def cancelled(job: m.Job, now: datetime) -> m.Job:
    """Return a job that somebody wants to end; whoever does it sees that."""
    if job.state in _ENDED or job.cancelling:
        return job
    if job.state == "queued":
        return ended(job, "cancelled", now)
    return msgspec.structs.replace(job, cancelling=True, updated_at=now)


def again(job: m.Job, now: datetime) -> m.Job:
    """Return a job that failed or was cancelled as one to do.

    Raises:
        Conflict: It has not ended, or is done.
    """
    if job.state not in ("failed", "cancelled"):
        raise Conflict(
            f"job {job.job!r} is {job.state}; what failed or was cancelled can be tried again"
        )
    return msgspec.structs.replace(
        _free(job, now),
        state="queued",
        ended_at=None,
        retry_at=None,
        failures=0,
        cancelling=False,
        error=None,
        result=None,
    )


def ended(
    job: m.Job,
    state: Literal["done", "failed", "cancelled"],
    now: datetime,
    *,
    error: str | None = None,
    result: m.AddedModel | None = None,
) -> m.Job:
    """Return a job that has come to an end."""
    return msgspec.structs.replace(
        job,
        state=state,
        ended_at=now,
        updated_at=now,
        lease_until=None,
        retry_at=None,
        bytes_per_s=None,
        eta_s=None,
        cancelling=False,
        error=error,
        result=result,
    )


def _free(job: m.Job, now: datetime) -> m.Job:
    """Return a job that nobody has. Its host stays: a part of the file may lie there."""
    return msgspec.structs.replace(
        job,
        updated_at=now,
        instance=None,
        lease_until=None,
        started_at=None,
        stage=None,
        bytes_per_s=None,
        eta_s=None,
    )


def _same_try(one: m.Job, other: m.Job) -> bool:
    return (
        one.state == "running"
        and one.instance == other.instance
        and one.started_at == other.started_at
    )


def _id_for(request: m.ImportModel) -> str:
    """Return a job's id: the same one for the same key of the same caller."""
    if request.key is None:
        return secrets.token_hex(10)
    return hashlib.sha256(f"{request.by or ''}\0{request.key}".encode()).hexdigest()[:20]

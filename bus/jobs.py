"""Jobs: work that outlives its request, done once by whichever instance has room.

A job is a document in a bucket, and whoever writes to it compares and sets. An instance that takes
one up says so with a lease, and renews it; it stops when somebody else has written that the job is
theirs. A lease has passed for an instance that has not seen it renewed for its length, by its own
steady clock: so the clocks of hosts need not agree.

There are kinds of jobs, one for each plugin that does any; an instance sees those of its own kind.
"""

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Generic, Literal, Protocol, TypeVar

import structlog

from bus import job_rules as rules
from bus import messages as m
from bus.client import Client
from bus.errors import BusError, Conflict, NotFound, Overloaded, Unavailable
from bus.instance import Instance
from bus.job_rules import Advance, Progress, Result
from bus.subjects import JOB, JOB_CANCELS, JOB_RETRIES
from bus.tasks import beside

# Written when something has changed, but no more often; and otherwise as often as the lease needs.
TELL_S: Final = 1.0
RENEW_S: Final = 3.0
QUEUED_MAX: Final = 1_000
ENDED_MAX: Final = 1_000
LOOK_S: Final = 1.0
TIDY_S: Final = 3_600.0
GIVE_BACK_S: Final = 3.0
_WRITES: Final = 20
# What a job is about, for people.
_THING: Final = {"import": "import", "gallery": "job of a dataset"}

Told = Callable[[m.JobStage, Progress | None], None]
R = TypeVar("R", m.ImportModel, m.GalleryWork)

log = structlog.get_logger("bus.jobs")


class KeptError(Exception):
    """It failed, but has led to something that is kept; the job says what."""

    def __init__(self, cause: BusError, result: Result) -> None:
        super().__init__(cause.message)
        self.cause = cause
        self.result = result


class Work(Protocol[R]):
    """What jobs of a kind are about."""

    @property
    def kind(self) -> Literal["import", "gallery"]:
        """Which kind."""

    def checked(self, request: R) -> tuple[R, str | None]:
        """Return a request without the password in it, and that; refuse what can never be done."""

    async def carry(self, job: m.Job, secret: str | None, told: Told) -> Result:
        """Do a job; what is there from an earlier try is gone on with."""

    async def closed(self, job: m.Job) -> None:
        """Remove what a job has left that has come to its end; its retry may need some of it.

        Asked of one that is queued, too, when that was done but its result no longer counts.
        """

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
    advance: Advance
    told: bool = True
    cancel: asyncio.Event = field(default_factory=asyncio.Event)


class Jobs(Generic[R]):
    """The jobs of a kind, as far as this instance does them.

    Args:
        client: The bus.
        instance: This process's place on it.
        work: Does what a job is about.
        at_once: How many jobs this instance may do at a time, now.
    """

    def __init__(
        self, client: Client, instance: Instance, work: Work[R], at_once: Callable[[], int]
    ) -> None:
        self._client = client
        self._instance = instance
        self._jobs = client.store.jobs
        self._work: Work[R] = work
        self._at_once = at_once
        self._seen: dict[str, _Seen] = {}
        self._held: dict[str, _Held] = {}
        self._carrying: set[asyncio.Task[None]] = set()
        self._secrets: OrderedDict[str, str] = OrderedDict()
        self._caught_up = asyncio.Event()
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def serving(self) -> AsyncGenerator[None]:
        """Do jobs, cancel and retry them, while inside; left, what is unfinished is given back."""
        async with (
            self._instance.serving(JOB_CANCELS[self._work.kind], self.cancel),
            self._instance.serving(JOB_RETRIES[self._work.kind], self.retry),
        ):
            try:
                async with beside(self._follow(), self._keep_taking(), self._keep_tidy()):
                    yield
            finally:
                await self._give_back()

    # --- What we are asked ------------------------------------------------------------------------

    async def enter(self, request: R) -> m.Job:
        """Queue a job; asked again with the same key, return the first one.

        Raises:
            BusError: It can never be done: a denied or malformed address, for example.
            Conflict: The key was used for something else.
            Overloaded: Too many are queued.
        """
        request, secret = self._work.checked(request)
        await self._check_room()
        job = rules.new(request, m.now(), only=self._instance.id if secret else None)
        if secret:
            self._remember(job.job, secret)
        try:
            revision = await self._jobs.create(job, job.job)
        except Conflict:
            found = await self._jobs.get(job.job)
            if found is None or found.value is None:
                raise
            if rules.asked_of(found.value) != request:
                raise Conflict(
                    f"the key {request.key!r} has been used for another {_THING[job.kind]}, job "
                    f"{job.job}"
                ) from None
            return found.value
        await self._is_now(job, revision)
        log.info("job.queued", job=job.job, **_about(job))
        return job

    async def cancel(self, request: m.NameJob) -> m.Job:
        """Have a job end; one that has ended stays as it is.

        Raises:
            NotFound: There is none.
        """
        job = await self._change(request.job, rules.cancelled)
        if job.state == "cancelled":
            await self._close(job)
        return job

    async def retry(self, request: m.NameJob) -> m.Job:
        """Queue a job again that failed or was cancelled.

        Raises:
            NotFound: There is none.
            Conflict: It has not ended, or is done.
            Overloaded: Too many are queued.
        """
        await self._check_room()
        return await self._change(request.job, rules.again)

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
            if found is None or found.value is None or found.value.kind != self._work.kind:
                raise NotFound(
                    f"there is no job {name!r} of this kind; jobs are kept for a week", field="job"
                )
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
        if job.kind != self._work.kind:
            return
        seen = self._seen.get(job.job)
        if seen is not None and seen.revision >= revision:
            return
        self._seen[job.job] = _Seen(job, revision, time.monotonic())
        held = self._held.get(job.job)
        if held is not None and job.cancelling and rules.same_try(job, held.job):
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
        return rules.takeable(
            seen.job,
            self._instance.id,
            self._instance.host,
            unchanged_s=time.monotonic() - seen.since,
            now=m.now(),
        )

    async def _take(self, seen: _Seen) -> None:
        job = rules.taken(seen.job, self._instance.id, self._instance.host, m.now())
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
            await self._close(job)
            return
        log.info("job.taken", job=job.job, tries=job.tries, **_about(job))
        held = self._held[job.job] = _Held(job, revision, Advance.of(job))
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

        def told(stage: m.JobStage, progress: Progress | None) -> None:
            held.told = False
            held.advance.to(stage, progress)

        try:
            try:
                self._check_known(held.job)
                async with beside(self._keep_lease(held)):
                    result = await self._work.carry(held.job, self._secrets.get(name), told)
            except _CancelledError:
                await self._write(
                    held,
                    lambda job: rules.ended(
                        rules.renewed_by(job, held.advance, m.now()), "cancelled", m.now()
                    ),
                )
            except (KeptError, BusError) as error:
                failure = error.cause if isinstance(error, KeptError) else error
                kept = error.result if isinstance(error, KeptError) else None
                await self._write(
                    held, lambda job: rules.after(job, failure, kept, held.advance, m.now())
                )
                log.warning("job.failed", job=name, state=held.job.state, cause=failure.message)
            except Exception as error:
                # Ours, and not what the job is about: said in the log with its traceback.
                log.exception("job.broken", job=name)
                why = f"{type(error).__name__}: the log of {self._instance.host} has the cause"
                await self._write(held, lambda job: rules.ended(job, "failed", m.now(), error=why))
            else:
                done = result
                await self._write(
                    held, lambda job: rules.finished(job, done, held.advance, m.now())
                )
                self._secrets.pop(name, None)
                if held.job.state == "queued":
                    # What it has led to is no longer good enough: nobody may find it.
                    await self._close(held.job)
            if held.job.state in rules.ENDED:
                log.info("job.ended", job=name, state=held.job.state, **_led_to(held.job))
                await self._close(held.job)
        except asyncio.CancelledError:
            if held.job.state == "running":
                with contextlib.suppress(TimeoutError, BusError, _LostError):
                    async with asyncio.timeout(GIVE_BACK_S):
                        await self._write(held, lambda job: rules.given_back(job, m.now()))
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
                await self._write(held, lambda job: rules.renewed_by(job, held.advance, m.now()))
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
                if (
                    found is None
                    or found.value is None
                    or not rules.same_try(found.value, held.job)
                ):
                    raise _LostError from None
                held.job, held.revision = found.value, found.revision
                continue
            held.job, held.revision = job, revision
            await self._is_now(job, revision)
            return
        raise Unavailable(f"others keep changing job {name!r}")

    async def _close(self, job: m.Job) -> None:
        """Have what an ended job has left removed; what cannot be now, `tidy` removes later."""
        try:
            await self._work.closed(job)
        except (BusError, OSError) as error:
            log.warning("job.unclosed", job=job.job, cause=str(error))

    async def _give_back(self) -> None:
        carrying = list(self._carrying)
        for task in carrying:
            task.cancel()
        await asyncio.gather(*carrying, return_exceptions=True)

    # --- Keeping house ----------------------------------------------------------------------------

    async def _keep_tidy(self) -> None:
        await self._caught_up.wait()
        while True:
            live = {name for name, seen in self._seen.items() if seen.job.state not in rules.ENDED}
            await self._work.tidy(live)
            with contextlib.suppress(BusError):
                await self._forget_old()
            for _ in range(int(TIDY_S / RENEW_S)):
                with contextlib.suppress(BusError):
                    await self._end_orphans()
                await asyncio.sleep(RENEW_S)

    async def _forget_old(self) -> None:
        """Delete ended jobs beyond the last thousand: the bucket has a limit."""
        over = [one for one in self._seen.values() if one.job.state in rules.ENDED]
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
            if one.job.state not in rules.ENDED
            and one.job.only not in (None, ours)
            and time.monotonic() - one.since > rules.LEASE_S
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
            job = rules.ended(one.job, "failed", m.now(), error=why)
            with contextlib.suppress(Conflict):
                await self._is_now(job, await self._jobs.update(job, one.revision, job.job))

    def _remember(self, name: str, secret: str) -> None:
        self._secrets[name] = secret
        while len(self._secrets) > QUEUED_MAX + ENDED_MAX:
            self._secrets.popitem(last=False)


def _about(job: m.Job) -> dict[str, Any]:
    """Return what the log says of what a job is about."""
    if job.request is not None:
        return {"model": job.request.id}
    return {"dataset": job.gallery.dataset, "action": job.gallery.action} if job.gallery else {}


def _led_to(job: m.Job) -> dict[str, Any]:
    if job.result is not None:
        return {"version": job.result.version}
    return {"entries": job.gallery_result.entries} if job.gallery_result else {}

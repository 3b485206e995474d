"""What becomes of a job: pure functions from what it is and what happened to what it is then."""

import hashlib
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Literal

import msgspec

from bus import messages as m
from bus.errors import BusError, Conflict, Unavailable

LEASE_S: Final = 10.0
# Tries in a row that bring nothing; one that brings something begins the count anew.
FAILURES_MAX: Final = 8
BACKOFF_FIRST_S: Final = 1.0
BACKOFF_MAX_S: Final = 60.0
# Where a part of the file lies has the first chance to go on with it.
ELSEWHERE_S: Final = 3.0
ENDED: Final = ("done", "failed", "cancelled")
# With what a job begins when it is taken up.
FIRST_STAGE: Final[dict[str, m.JobStage]] = {"import": "fetching", "gallery": "reading"}

Result = m.AddedModel | m.GalleryWorkDone


@dataclass(frozen=True)
class Progress:
    """How far a job is, in bytes or in entries; what cannot be told is None."""

    bytes: int = 0
    total_bytes: int | None = None
    bytes_per_s: float | None = None
    eta_s: float | None = None
    entries: int = 0
    total_entries: int | None = None
    entries_per_s: float | None = None

    @property
    def done(self) -> int:
        """How much of it there is, in whatever it is counted in."""
        return self.entries or self.bytes


@dataclass
class Advance:
    """How far the present try of a job has come.

    Attributes:
        before: What earlier tries had brought, in bytes or in entries.
        stage: What it does now; None before its first word.
        progress: The last that was told.
        moving: Whether that is of this stage.
    """

    before: int
    stage: m.JobStage | None = None
    progress: Progress | None = None
    moving: bool = False

    @classmethod
    def of(cls, job: m.Job) -> "Advance":
        """Return where a try of a job begins."""
        return cls(before=job.entries or job.bytes)

    def to(self, stage: m.JobStage, progress: Progress | None) -> None:
        """Take down what was told; without progress the last one stands, but not its speed."""
        self.stage, self.moving = stage, progress is not None
        self.progress = progress or self.progress

    @property
    def brought(self) -> bool:
        """Whether it has come further than the tries before; to read again is not further."""
        told = self.progress
        return told is not None and self.stage != "reading" and told.done > self.before


def new(request: m.ImportModel | m.GalleryWork, now: datetime, *, only: str | None) -> m.Job:
    """Return a job that is to be done; the same key of the same caller gives the same id."""
    if isinstance(request, m.ImportModel):
        name = _id_for("", request.by, request.key)
        return m.Job(job=name, request=request, created_at=now, updated_at=now, only=only)
    name = _id_for("gallery\0", request.by, request.key)
    return m.Job(
        job=name, kind="gallery", gallery=request, created_at=now, updated_at=now, only=only
    )


def asked_of(job: m.Job) -> m.ImportModel | m.GalleryWork | None:
    """Return what a job is to do."""
    return job.request if job.kind == "import" else job.gallery


def heals(error: BusError) -> bool:
    """Tell whether another try may go better."""
    return isinstance(error, Unavailable)


def backoff_s(failures: int) -> float:
    """Return how long to wait after so many tries that brought nothing."""
    return min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0 ** (failures - 1))


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
        stage=FIRST_STAGE[job.kind],
    )


def renewed_by(job: m.Job, advance: Advance, now: datetime) -> m.Job:
    """Return a job with its lease renewed, and how far it is."""
    job = msgspec.structs.replace(
        job,
        updated_at=now,
        lease_until=now + timedelta(seconds=LEASE_S),
        stage=advance.stage or job.stage,
    )
    if (progress := advance.progress) is None:
        return job
    return msgspec.structs.replace(
        job,
        failures=0 if advance.brought else job.failures,
        bytes=progress.bytes,
        total_bytes=progress.total_bytes,
        entries=progress.entries,
        total_entries=progress.total_entries,
        bytes_per_s=progress.bytes_per_s if advance.moving else None,
        entries_per_s=progress.entries_per_s if advance.moving else None,
        eta_s=progress.eta_s if advance.moving else None,
    )


def finished(job: m.Job, result: Result, advance: Advance, now: datetime) -> m.Job:
    """Return a job that has done what it was for.

    An export that somebody wants to end is cancelled even so, and one is queued again from whose
    dataset something was deleted since it last looked: whoever deletes counts on it that no file
    goes out with that in it.
    """
    job = renewed_by(job, advance, now)
    if job.cancelling and job.gallery is not None and job.gallery.action == "export":
        return ended(job, "cancelled", now)
    if isinstance(result, m.GalleryWorkDone) and (result.revision or 0) < job.outdated:
        why = "something was deleted from the dataset just before the file was ready"
        return after(job, Unavailable(why), None, advance, now)
    return ended(job, "done", now, result=result)


def after(
    job: m.Job, error: BusError, result: Result | None, advance: Advance, now: datetime
) -> m.Job:
    """Return a job whose try has failed: queued again where that may help, or failed."""
    job = renewed_by(job, advance, now)
    if job.cancelling:
        return ended(job, "cancelled", now)
    failures = job.failures + 1
    job = msgspec.structs.replace(job, failures=failures)
    if not heals(error) or failures >= FAILURES_MAX:
        return ended(job, "failed", now, error=error.message, result=result)
    wait_s = max(backoff_s(failures), error.retry_after_s or 0.0)
    return msgspec.structs.replace(
        _free(job, now),
        state="queued",
        retry_at=now + timedelta(seconds=wait_s),
        error=error.message,
    )


def given_back(job: m.Job, now: datetime) -> m.Job:
    """Return a job that its worker leaves to others: it has not failed."""
    if job.cancelling:
        return ended(job, "cancelled", now)
    return msgspec.structs.replace(_free(job, now), state="queued", tries=job.tries - 1)


def cancelled(job: m.Job, now: datetime) -> m.Job:
    """Return a job that somebody wants to end; whoever does it sees that."""
    if job.state in ENDED or job.cancelling:
        return job
    if job.state == "queued":
        return ended(job, "cancelled", now)
    return msgspec.structs.replace(job, cancelling=True, updated_at=now)


def outdated(job: m.Job, revision: int) -> m.Job:
    """Return a running export that has to heed a deletion from its dataset, at that revision."""
    if job.state != "running" or job.outdated >= revision:
        return job
    return msgspec.structs.replace(job, outdated=revision)


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
        entries=0,
        total_entries=None,
        error=None,
        result=None,
        gallery_result=None,
    )


def ended(
    job: m.Job,
    state: Literal["done", "failed", "cancelled"],
    now: datetime,
    *,
    error: str | None = None,
    result: Result | None = None,
) -> m.Job:
    """Return a job that has come to an end; of one that was cancelled, what was said stays."""
    if state == "cancelled":
        error = error or job.error
    return msgspec.structs.replace(
        job,
        state=state,
        ended_at=now,
        updated_at=now,
        lease_until=None,
        retry_at=None,
        bytes_per_s=None,
        entries_per_s=None,
        eta_s=None,
        cancelling=False,
        error=error,
        result=result if isinstance(result, m.AddedModel) else None,
        gallery_result=result if isinstance(result, m.GalleryWorkDone) else None,
    )


def same_try(one: m.Job, other: m.Job) -> bool:
    """Tell whether nobody else has taken the job up in between."""
    return (
        one.state == "running"
        and one.instance == other.instance
        and one.started_at == other.started_at
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
        entries_per_s=None,
        eta_s=None,
    )


def _id_for(kind: str, by: str | None, key: str | None) -> str:
    if key is None:
        return secrets.token_hex(10)
    return hashlib.sha256(f"{kind}{by or ''}\0{key}".encode()).hexdigest()[:20]

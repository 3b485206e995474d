"""What becomes of a job: decisions without a broker and without a clock."""

from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus import messages as m
from bus.errors import NotFound, Unavailable, Unprocessable
from bus.job_rules import (
    ELSEWHERE_S,
    FAILURES_MAX,
    LEASE_S,
    Advance,
    Progress,
    after,
    again,
    backoff_s,
    cancelled,
    ended,
    finished,
    given_back,
    heals,
    new,
    outdated,
    renewed_by,
    takeable,
    taken,
)

NOW = datetime(2026, 11, 25, tzinfo=UTC)
FRESH = m.Job(
    job="j",
    request=m.ImportModel(id="m", url="https://example.org/m.json"),
    created_at=NOW,
    updated_at=NOW,
)
ERRORS = [NotFound("gone"), Unavailable("away"), Unavailable("busy", retry_after_s=300)]


def holds(job: m.Job) -> None:
    """Check what is true of every job, whatever has happened to it."""
    assert (job.ended_at is not None) == (job.state in ("done", "failed", "cancelled"))
    assert (job.lease_until is not None) == (job.state == "running")
    if job.state == "running":
        assert job.instance
        assert job.started_at
    if job.state == "queued":
        assert job.instance is None
    assert job.tries >= 0
    assert job.failures <= FAILURES_MAX
    assert job.state != "failed" or job.error


@given(
    st.lists(st.sampled_from(["take", "die", "fail", "gone", "cancel", "back", "again", "done"]))
)
def test_whatever_happens_to_a_job_it_stays_whole(steps):
    job, now = FRESH, NOW
    for step in steps:
        now += timedelta(hours=1)
        if step in ("take", "die") and takeable(job, "i", "h", unchanged_s=1e6, now=now):
            job = taken(job, "i", "h", now)
        elif step in ("fail", "gone") and job.state == "running":
            error = ERRORS[1] if step == "fail" else ERRORS[0]
            job = after(job, error, None, Advance.of(job), now)
        elif step == "cancel":
            job = cancelled(job, now)
        elif step == "back" and job.state == "running":
            job = given_back(job, now)
        elif step == "again" and job.state in ("failed", "cancelled"):
            job = again(job, now)
        elif step == "done" and job.state == "running":
            job = ended(job, "done", now)
        holds(job)


def test_a_job_is_taken_up_when_its_lease_has_passed_and_not_before():
    job = taken(FRESH, "i", "h", NOW)
    assert not takeable(job, "k", "h", unchanged_s=LEASE_S - 1, now=NOW)
    assert takeable(job, "k", "h", unchanged_s=LEASE_S + 1, now=NOW)


def test_the_host_that_has_a_part_of_the_file_goes_first():
    job = msgspec.structs.replace(FRESH, host="h", bytes=5)
    assert takeable(job, "k", "h", unchanged_s=0, now=NOW)
    assert not takeable(job, "k", "other", unchanged_s=0, now=NOW)
    assert takeable(job, "k", "other", unchanged_s=ELSEWHERE_S, now=NOW)


def test_a_job_waits_for_its_next_try_as_long_as_the_server_says():
    job = taken(FRESH, "i", "h", NOW)
    failed = after(job, ERRORS[2], None, Advance.of(job), NOW)
    assert failed.retry_at == NOW + timedelta(seconds=300)
    assert not takeable(failed, "i", "h", unchanged_s=1e6, now=NOW + timedelta(seconds=299))
    assert takeable(failed, "i", "h", unchanged_s=1e6, now=failed.retry_at)
    assert [backoff_s(n) for n in (1, 2, 3, 20)] == [1, 2, 4, 60]


def test_a_job_that_kills_whoever_takes_it_up_is_given_up():
    job = FRESH
    for _ in range(FAILURES_MAX + 1):
        job = taken(job, "i", "h", NOW)
    assert job.state == "failed"
    assert "was gone before it was done" in job.error


def test_only_what_passes_is_tried_again():
    assert heals(Unavailable("away"))
    assert not heals(Unprocessable("no model"))


# --- Jobs of datasets -----------------------------------------------------------------------------

EXPORT = new(m.GalleryWork(action="export", dataset="d"), NOW, only=None)


def test_a_key_is_one_job_for_each_kind_and_caller():
    def job(request):
        return new(request, NOW, only=None).job

    model = m.ImportModel(id="m", url="https://example.org/m.json", key="k", by="ann")
    work = m.GalleryWork(action="export", dataset="d", key="k", by="ann")
    assert job(work) == job(msgspec.structs.replace(work, dataset="e"))
    others = [
        model,
        msgspec.structs.replace(work, by="bob"),
        msgspec.structs.replace(work, key=None),
    ]
    assert len({job(work), *map(job, others)}) == 4


def test_a_job_of_a_dataset_begins_with_reading_and_waits_for_no_host():
    job = taken(EXPORT, "i", "h", NOW)
    assert (job.kind, job.stage, job.gallery) == ("gallery", "reading", EXPORT.gallery)
    back = given_back(msgspec.structs.replace(job, entries=5), NOW)
    assert takeable(back, "k", "other", unchanged_s=0, now=NOW)


@pytest.mark.parametrize(("stage", "failures"), [("reading", 3), ("writing", 0)])
def test_to_read_the_file_again_is_no_progress(stage, failures):
    job = msgspec.structs.replace(taken(EXPORT, "i", "h", NOW), failures=3)
    advance = Advance.of(job)
    advance.to(stage, Progress(entries=10, total_entries=20, entries_per_s=5, eta_s=2))
    told = renewed_by(job, advance, NOW)
    assert (told.failures, told.entries, told.total_entries) == (failures, 10, 20)
    assert (told.entries_per_s, told.eta_s) == (5, 2)


def test_the_speed_of_one_stage_is_not_told_of_the_next():
    job = taken(EXPORT, "i", "h", NOW)
    advance = Advance.of(job)
    advance.to("reading", Progress(entries=10, entries_per_s=5, eta_s=2))
    advance.to("writing", None)
    told = renewed_by(job, advance, NOW)
    assert (told.stage, told.entries, told.entries_per_s, told.eta_s) == ("writing", 10, None, None)


def test_an_export_that_nobody_wants_any_more_is_not_handed_out():
    job = cancelled(taken(EXPORT, "i", "h", NOW), NOW)
    job = msgspec.structs.replace(job, error="somebody was deleted")
    done = m.GalleryWorkDone(entries=1, artefact="ab" * 32)
    end = finished(job, done, Advance.of(job), NOW)
    assert (end.state, end.gallery_result) == ("cancelled", None)
    assert end.error == "somebody was deleted"
    wanted = finished(taken(EXPORT, "i", "h", NOW), done, Advance.of(job), NOW)
    assert (wanted.state, wanted.gallery_result, wanted.result) == ("done", done, None)


@pytest.mark.parametrize(("looked_at", "state"), [(7, "queued"), (8, "done"), (9, "done")])
def test_an_export_that_has_what_was_deleted_since_is_not_handed_out(looked_at, state):
    job = outdated(outdated(taken(EXPORT, "i", "h", NOW), 8), 3)
    done = m.GalleryWorkDone(entries=1, artefact="ab" * 32, revision=looked_at)
    end = finished(job, done, Advance.of(job), NOW)
    assert (end.state, end.gallery_result) == (state, done if state == "done" else None)
    if state == "queued":
        assert end.error == "something was deleted from the dataset just before the file was ready"
        assert (end.failures, end.retry_at) == (1, NOW + timedelta(seconds=1))


def test_an_export_that_does_not_run_heeds_no_deletion():
    ended_job = cancelled(EXPORT, NOW)
    assert outdated(EXPORT, 8) is EXPORT
    assert outdated(ended_job, 8) is ended_job

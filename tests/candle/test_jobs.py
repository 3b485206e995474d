"""Imports: done once, whoever dies; told of, cancelled, tried again."""

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import signal
import sys
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from bus import codec, job_rules
from bus import jobs as jobs_module
from bus import messages as m
from bus.client import connect
from bus.errors import (
    Conflict,
    InvalidRequest,
    NotAllowed,
    NotFound,
    Overloaded,
    Unprocessable,
)
from bus.instance import join
from bus.job_rules import FAILURES_MAX
from bus.masking import masked_settings
from bus.subjects import JOB, JOB_CANCEL, JOB_RETRY, MODEL_IMPORT, MODEL_RUN
from bus.testing import until
from services.candle.intake import taking_in
from services.candle.repository.cache import Cache
from services.candle.repository.repository import Repository
from services.candle.service import SERVED, Candle
from services.candle.settings import CandleSettings

REPOSITORY = Path(__file__).parents[2]


def model(weights=(1, 1), padding: int = 0, outputs: int = 1) -> bytes:
    """Return a linear model that takes two numbers, as large as wanted."""
    metadata = {"padding": "x" * padding}
    content = {"input_dim": 2, "output_dim": outputs, "weights": weights, "bias": [0] * outputs}
    return json.dumps({**content, "metadata": metadata}).encode()


LARGE = model(padding=2_000_000)


@pytest.fixture(autouse=True)
def as_it_is_outside(no_proxy_from_outside, source):
    source.name, source.content = "m.json", model()


@pytest.fixture
def hurried(monkeypatch):
    """Tries follow each other without much waiting, and leases are short."""
    monkeypatch.setattr(job_rules, "BACKOFF_FIRST_S", 0.02)
    monkeypatch.setattr(job_rules, "LEASE_S", 1.5)
    monkeypatch.setattr(jobs_module, "RENEW_S", 0.3)
    monkeypatch.setattr(jobs_module, "TELL_S", 0.1)
    monkeypatch.setattr(job_rules, "ELSEWHERE_S", 0.2)


async def configure(client, **settings: object) -> None:
    config = m.PluginConfig(
        name="candle",
        description="",
        entrypoint="services.candle",
        capabilities=[],
        settings={"import_allow": ["127.0.0.0/8"], "watch_folder": False, **settings},
    )
    desired = m.DesiredState(
        config=config, enabled=True, generation=1, changed_by="t", changed_at=m.now()
    )
    await client.store.desired.put(desired, "candle")


@pytest.fixture
def importer(client, settings, models_dir):
    """Start a worker that does imports."""

    @asynccontextmanager
    async def start(slot: int = 0, host: str = "test-host", **changes) -> AsyncGenerator[Candle]:
        await configure(client, **changes)
        here = msgspec.structs.replace(settings, slot=slot, host=host)
        async with AsyncExitStack() as stack:
            own = await stack.enter_async_context(
                connect(here.nats_url, name="candle", root=here.root)
            )
            instance = await stack.enter_async_context(
                join(own, here, plugin="candle", description="a test")
            )
            folder = models_dir.parent / host
            repository = Repository(own.store, models_dir, Cache(folder / "artefacts", 1 << 30))
            candle = Candle(
                instance, repository, instance.settings(CandleSettings), own.store.served
            )

            async def work() -> None:
                async with taking_in(own, instance, repository, folder, models_dir):
                    await candle.run()

            working = asyncio.create_task(work())
            await until(lambda: instance._registration.status == "running" or working.done())
            try:
                yield candle
            finally:
                working.cancel()
                await asyncio.gather(working, return_exceptions=True)

    return start


async def ask(client, source, **more: object) -> m.Job:
    request = {"id": "m", "url": str(source.url), **more}
    return await client.call(MODEL_IMPORT, m.ImportModel(**request))


async def now_of(client, job: m.Job) -> m.Job:
    found = await client.store.jobs.get(job.job)
    return found.value


async def ended_as(client, job: m.Job, state: str, timeout_s: float = 40) -> m.Job:
    async def has_ended() -> bool:
        return (await now_of(client, job)).state in ("done", "failed", "cancelled")

    await until(has_ended, timeout_s)
    found = await now_of(client, job)
    assert found.state == state, found.error
    return found


async def running(client, job: m.Job) -> m.Job:
    async def has_bytes() -> bool:
        now = await now_of(client, job)
        return now.state == "running" and now.bytes > 0

    await until(has_bytes, 30)
    return await now_of(client, job)


# --- From the address to the version --------------------------------------------------------------


async def test_a_model_comes_becomes_a_version_and_is_not_served(client, importer, source):
    async with importer(), client.follow(JOB) as told:
        job = await ask(client, source, by="ann", url=f"{source.url}?sig=geheim")
        assert (job.state, job.tries) == ("queued", 0)
        done = await ended_as(client, job, "done")
        heard = [(await anext(told)).payload.state for _ in range(3)]
    assert heard[:2] == ["queued", "running"]
    assert (done.tries, done.error, done.lease_until) == (1, None, None)
    assert done.result.created
    assert done.result.report.sound
    assert (done.bytes, done.total_bytes) == (len(source.content), len(source.content))
    spec = (await client.store.models.get("m")).value
    (version,) = spec.versions
    assert (version.version, version.wanted, version.sound) == ("1", False, True)
    assert version.checksum == hashlib.sha256(source.content).hexdigest()
    assert version.source == m.ModelSource(
        kind="import", file_name="m.json", by="ann", url=str(source.url)
    )


async def test_a_model_is_served_when_it_has_come_where_that_is_asked(client, importer, source):
    async with importer():
        await ended_as(client, await ask(client, source, load=True, version="7"), "done")
        reply = await client.call(MODEL_RUN, m.RunModel(id="m", inputs=[[1, 2]]))
    assert reply.outputs == [[3]]


async def test_the_same_file_imported_twice_is_there_once(client, importer, source):
    async with importer():
        await ended_as(client, await ask(client, source), "done")
        second = await ended_as(client, await ask(client, source), "done")
    assert not second.result.created
    assert len((await client.store.models.get("m")).value.versions) == 1


async def test_a_model_that_is_not_sound_fails_and_is_kept_to_be_looked_at(
    client, importer, source
):
    source.content = model(weights=(1, 1, 1))
    async with importer():
        failed = await ended_as(client, await ask(client, source, load=True), "failed")
    assert "no sound model" in failed.error
    assert not failed.result.report.sound
    (version,) = (await client.store.models.get("m")).value.versions
    assert (version.sound, version.wanted) == (False, False)


async def test_a_model_that_cannot_be_loaded_fails_and_is_kept(
    client, importer, source, monkeypatch
):
    monkeypatch.setattr(job_rules, "FAILURES_MAX", 1)
    source.content = model(weights=[1] * 2_000_000, outputs=1_000_000)
    async with importer(memory_budget_mb=1):
        failed = await ended_as(client, await ask(client, source, load=True), "failed")
    assert "budget" in failed.error
    assert failed.result.report.sound
    assert len((await client.store.models.get("m")).value.versions) == 1


async def test_a_version_that_has_other_bytes_is_left_as_it_is(client, importer, source):
    async with importer():
        await ended_as(client, await ask(client, source, version="1"), "done")
        source.content, source.etag = model(weights=(5, 5)), '"two"'
        failed = await ended_as(client, await ask(client, source, version="1"), "failed")
    assert failed.tries == 1
    assert "1" in failed.error


# --- What goes wrong ------------------------------------------------------------------------------


async def test_what_breaks_off_is_tried_again_and_goes_on(client, importer, source, hurried):
    source.content, source.break_after = LARGE, 600_000
    async with importer():
        done = await ended_as(client, await ask(client, source), "done")
    assert done.tries >= 3
    assert [one.get("Range") is not None for one in source.asked[:2]] == [False, True]


async def test_a_busy_server_is_asked_again(client, importer, source, hurried):
    source.refusals = [(503, {}), (429, {"Retry-After": "0"}), (500, {})]
    async with importer():
        assert (await ended_as(client, await ask(client, source), "done")).tries == 4


async def test_what_will_not_heal_is_not_tried_again_until_somebody_asks(client, importer, source):
    source.refusals = [(404, {})]
    async with importer():
        failed = await ended_as(client, await ask(client, source), "failed")
        assert (failed.tries, failed.ended_at is not None) == (1, True)
        assert "404" in failed.error
        queued = await client.call(JOB_RETRY, m.NameJob(job=failed.job))
        assert (queued.state, queued.error) == ("queued", None)
        done = await ended_as(client, failed, "done")
        with pytest.raises(Conflict, match="is done"):
            await client.call(JOB_RETRY, m.NameJob(job=done.job))


async def test_a_server_that_stays_away_is_given_up(client, importer, source, hurried):
    source.refusals = [(500, {})] * 50
    async with importer():
        failed = await ended_as(client, await ask(client, source), "failed")
    assert failed.tries == FAILURES_MAX
    assert "answered 500" in failed.error


async def test_another_digest_than_the_asked_one_is_refused(client, importer, source):
    async with importer():
        failed = await ended_as(client, await ask(client, source, sha256="0" * 64), "failed")
    assert "not 0000" in failed.error
    assert await client.store.models.get("m") is None


async def test_what_can_never_be_done_is_refused_at_once(client, importer, source):
    async with importer(import_allow=[]) as candle:
        with pytest.raises(NotAllowed, match="import_allow"):
            await ask(client, source)
        with pytest.raises(InvalidRequest, match="allowed are https://"):
            await ask(client, source, url="file:///etc/passwd")
        with pytest.raises(InvalidRequest, match="hf://owner/repo/file@revision"):
            await ask(client, source, url="hf://nothing")
        await configure(client, import_offline=True)
        await until(lambda: candle._instance.config.settings.get("import_offline"))
        with pytest.raises(NotAllowed, match="import_offline"):
            await ask(client, source)
    assert source.asked == []


async def test_without_its_package_nothing_of_the_hub_is_imported(
    client, importer, source, monkeypatch
):
    """Neither what is asked for here, nor what an instance queued that has the package."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    address = "hf://owner/repo/m.onnx"
    async with importer():
        with pytest.raises(Unprocessable, match=r"pip install 'bkg\[hub\]'") as refused:
            await ask(client, source, url=address)
        assert refused.value.field == "url"
        queued = m.Job(
            job="a1", request=m.ImportModel(id="m", url=address), created_at=m.now(),
            updated_at=m.now(),
        )  # fmt: skip
        await client.store.jobs.put(queued, "a1")
        failed = await ended_as(client, queued, "failed")
    assert failed.tries == 1
    assert "pip install 'bkg[hub]'" in failed.error


async def test_nobody_is_asked_once_the_settings_forbid_it(client, importer, source):
    """A job that was queued before the settings changed."""
    async with importer(import_jobs=0) as candle:
        job = await ask(client, source)
        await configure(client, import_allow=[])
        await until(lambda: not candle._instance.config.settings["import_allow"])
        failed = await ended_as(client, job, "failed")
    assert "import_allow" in failed.error
    assert source.asked == []


async def test_a_setting_that_cannot_be_meant_is_not_taken(client, importer, source):
    async with importer() as candle:
        await configure(client, import_allow=["10.0.0.0/99"])
        await configure(client, import_jobs=7)
        await until(lambda: candle._instance.config.settings.get("import_jobs") == 7)
        await ended_as(client, await ask(client, source), "done")


# --- Who asks, and how often ----------------------------------------------------------------------


async def test_a_key_makes_two_requests_one_job(client, importer, source):
    async with importer():
        first = await ask(client, source, key="k", by="ann")
        second = await ask(client, source, key="k", by="ann")
        assert second.job == first.job
        with pytest.raises(Conflict, match="has been used for another import"):
            await ask(client, source, key="k", by="ann", version="2")
        assert (await ask(client, source, key="k", by="bob")).job != first.job


async def test_a_password_is_shown_to_its_host_and_kept_nowhere(client, importer, source, caplog):
    async with importer():
        url = source.url.with_user("ann").with_password("geheim")
        job = await ask(client, source, url=str(url))
        assert (job.request.url, job.only is not None) == (str(source.url), True)
        done = await ended_as(client, job, "done")
    assert "geheim" not in codec.encode(done).decode()
    shown = source.asked[0]["Authorization"].removeprefix("Basic ")
    assert base64.b64decode(shown) == b"ann:geheim"


async def test_credentials_of_the_settings_are_shown_to_their_host(client, importer, source):
    async with importer(import_credentials={"127.0.0.1": "Bearer geheim"}):
        await ended_as(client, await ask(client, source), "done")
    assert source.asked[0]["Authorization"] == "Bearer geheim"


async def test_secrets_are_told_from_other_settings():
    settings = {"hf_token": "a", "import_credentials": {"b.org": "c"}, "import_jobs": 2}
    told = masked_settings(settings, codec.schema(CandleSettings))
    assert told == {
        "hf_token": "********",
        "import_credentials": {"b.org": "********"},
        "import_jobs": 2,
    }


async def test_a_password_that_went_with_its_worker_ends_the_job(client, importer, source, hurried):
    async with importer(import_jobs=0):
        url = source.url.with_user("ann").with_password("geheim")
        job = await ask(client, source, url=str(url))
    async with importer(slot=1):
        failed = await ended_as(client, job, "failed")
    assert "import_credentials" in failed.error
    assert source.asked == []


async def test_more_than_may_be_queued_are_refused(client, importer, source, monkeypatch):
    monkeypatch.setattr(jobs_module, "QUEUED_MAX", 2)
    async with importer(import_jobs=0):
        for _ in range(2):
            await ask(client, source)
        with pytest.raises(Overloaded, match="2 jobs are queued already, 2 may be"):
            await ask(client, source)


async def test_no_more_run_at_a_time_than_the_settings_say(client, importer, source):
    source.content, source.slow_s = LARGE, 0.02
    async with importer(import_jobs=1):
        jobs = [await ask(client, source, id=f"m{i}") for i in range(3)]
        most, now = 0, [await now_of(client, job) for job in jobs]
        while any(one.state != "done" for one in now):
            now = [await now_of(client, job) for job in jobs]
            assert not [one.error for one in now if one.state == "failed"]
            most = max(most, [one.state for one in now].count("running"))
            await asyncio.sleep(0.02)
    assert most == 1
    assert [one.started_at for one in now] == sorted(one.started_at for one in now)


# --- Ends -----------------------------------------------------------------------------------------


async def test_a_job_that_waits_is_cancelled_at_once(client, importer, source):
    async with importer(import_jobs=0):
        job = await ask(client, source)
        gone = await client.call(JOB_CANCEL, m.NameJob(job=job.job))
        assert (gone.state, gone.ended_at is not None) == ("cancelled", True)
        assert await client.call(JOB_CANCEL, m.NameJob(job=job.job)) == gone
        with pytest.raises(NotFound, match="no job 'x'"):
            await client.call(JOB_CANCEL, m.NameJob(job="x"))


async def test_a_job_that_runs_is_cancelled_and_can_be_taken_up_again(client, importer, source):
    source.content, source.slow_s = LARGE, 0.1
    async with importer():
        job = await ask(client, source)
        await running(client, job)
        await client.call(JOB_CANCEL, m.NameJob(job=job.job))
        await ended_as(client, job, "cancelled")
        assert await client.store.models.get("m") is None
        source.slow_s = 0
        assert (await client.call(JOB_RETRY, m.NameJob(job=job.job))).state == "queued"
        await ended_as(client, job, "done")
    assert "Range" in source.asked[-1]


async def test_a_worker_that_leaves_gives_its_jobs_back(client, importer, source):
    source.content, source.slow_s = LARGE, 0.1
    async with importer():
        job = await ask(client, source)
        await running(client, job)
    left = await now_of(client, job)
    assert (left.state, left.instance, left.lease_until, left.tries) == ("queued", None, None, 0)
    source.slow_s = 0
    async with importer(slot=1):
        done = await ended_as(client, job, "done")
    assert done.tries == 1
    assert "Range" in source.asked[-1]


async def test_a_worker_that_lost_its_job_stops_and_leaves_no_trace(
    client, importer, source, hurried
):
    source.content, source.slow_s = LARGE, 0.1
    async with importer():
        job = await ask(client, source)
        await running(client, job)
        while True:
            entry = await client.store.jobs.get(job.job)
            other = msgspec.structs.replace(
                entry.value, instance="another", started_at=m.now(), bytes=0
            )
            with contextlib.suppress(Conflict):
                await client.store.jobs.update(other, entry.revision, job.job)
                break
        asked = len(source.asked)
        # Whoever took it is gone; the lease passes, and it is taken up again.
        done = await ended_as(client, job, "done")
    assert len(source.asked) == asked + 1
    assert done.tries == other.tries + 1
    assert len((await client.store.models.get("m")).value.versions) == 1


async def test_a_job_of_a_worker_that_is_killed_is_taken_up_by_another(
    client, settings, source, tmp_path
):
    """Two real processes; the one that carries the job is killed with SIGKILL."""
    await configure(client)
    source.content, source.slow_s = LARGE, 0.15
    environment = {
        **os.environ,
        "BKG_NATS_URL": settings.nats_url,
        "BKG_ROOT": settings.root,
        "BKG_DATA_DIR": str(tmp_path / "data"),
        "BKG_HOST_NAME": "test-host",
        "PYTHONPATH": str(REPOSITORY),
    }
    workers = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.candle", env={**environment, "BKG_SLOT": str(slot)}
        )
        for slot in range(2)
    ]
    try:

        async def all_ready() -> bool:
            found = [one.value.status for one in await client.store.instances.all()]
            return found == ["running"] * 2

        await until(all_ready, 60)
        job = await ask(client, source, load=True)
        held = await running(client, job)
        registered = [one.value for one in await client.store.instances.all()]
        victim = next(one for one in registered if one.id == held.instance)
        os.kill(victim.pid, signal.SIGKILL)
        source.slow_s = 0
        done = await ended_as(client, job, "done", timeout_s=90)
    finally:
        for one in workers:
            if one.returncode is None:
                one.terminate()
        await asyncio.gather(*(one.wait() for one in workers))
    assert done.instance != held.instance
    assert done.tries == 2
    assert "Range" in source.asked[-1]
    (version,) = (await client.store.models.get("m")).value.versions
    assert version.wanted


def test_what_these_instances_serve_has_the_jobs_in_it():
    assert {MODEL_IMPORT, JOB_CANCEL, JOB_RETRY} <= set(SERVED)

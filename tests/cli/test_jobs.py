"""`bkg jobs` on a real broker: what is told of jobs, by whoever does them."""

import asyncio
import secrets
import signal
import subprocess
import sys
from datetime import timedelta
from typing import Any

import msgspec
import pytest
import typer

from bus.client import Client
from bus.instance import join
from bus.messages import (
    AddedModel,
    GalleryWork,
    GalleryWorkDone,
    ImportModel,
    Job,
    ModelProblem,
    ModelReport,
    NameJob,
    now,
)
from bus.settings import Settings
from bus.subjects import DATASET_JOB_CANCEL, DATASET_JOB_RETRY, JOB
from services.cli.jobs import name_in

BKG = (sys.executable, "-m", "services.cli")
URL = "https://example.org/iris.onnx"


@pytest.fixture
def jobs(bkg: Any, env: dict[str, str], root: str, settings: Settings) -> Any:
    """Run `bkg jobs ...` to its end."""
    env.update(BKG_ROOT=root, BKG_NATS_URL=settings.nats_url)

    async def run(*args: str) -> Any:
        return await bkg("jobs", *args)

    return run


def job(name: str = "a1", **more: Any) -> Job:
    asked = ImportModel(id="iris", url=URL, by="somebody")
    return Job(job=name, request=asked, created_at=now(), updated_at=now(), **more)


async def tell(client: Client, one: Job) -> None:
    """Write a job down, and say so, as whoever does it."""
    await client.store.jobs.put(one, one.job)
    await client.publish(JOB, one, job=one.job)


def result(*problems: ModelProblem) -> AddedModel:
    report = ModelReport(
        checksum="ab" * 32, sound=not problems, validated_at=now(), problems=list(problems),
        format="onnx", size_bytes=100,
    )  # fmt: skip
    return AddedModel(id="iris", version="3", checksum="ab" * 32, created=True, report=report)


async def test_jobs_are_listed_the_newest_first(client: Client, jobs: Any):
    before = now() - timedelta(hours=2)
    old = msgspec.structs.replace(job("old", state="failed", error="404 Not Found"),
                                  created_at=before)  # fmt: skip
    await tell(client, old)
    await tell(client, job("new", state="running", bytes=512, total_bytes=2_048))
    ended = await jobs("list")
    assert ended.status == 0, ended.err
    rows = ended.out.splitlines()
    assert rows[1].split()[:3] == ["new", "running", "iris"]
    assert "512 bytes of 2.0 kB" in rows[1]
    assert rows[2].split()[:3] == ["old", "failed", "iris"]
    assert "404 Not Found" in rows[3]
    assert [one["job"] for one in (await jobs("list", "--json")).json] == ["new", "old"]
    told = (await jobs("list", "--state", "failed", "--json")).json
    assert [one["job"] for one in told] == ["old"]


async def test_ids_stand_whole_in_a_line_of_80_columns(
    client: Client, jobs: Any, env: dict[str, str]
):
    env["COLUMNS"] = "80"
    names = [secrets.token_hex(10) for _ in range(3)]
    for i, name in enumerate(names):
        asked = ImportModel(id=f"{'a-model-with-a-long-name-' * 3}{i}", url=URL, by="somebody")
        one = job(
            name, state="running", bytes=1_500_000, total_bytes=9_000_000_000, bytes_per_s=2e6,
            eta_s=4_500.0, error="the server said 503 Service Unavailable; it is tried again",
        )  # fmt: skip
        await tell(client, msgspec.structs.replace(one, request=asked))
    ended = await jobs("list")
    assert ended.status == 0, ended.err
    table = [row for row in ended.out.splitlines() if "the server said" not in row]
    assert max(map(len, table)) <= 80
    assert {row.split()[0] for row in table if "running" in row} == set(names)
    for name in names:
        assert f"{name}: the server said 503 Service Unavailable; it is tried again" in ended.out


async def test_the_query_of_an_address_is_shown_nowhere(client: Client, jobs: Any):
    asked = ImportModel(id="iris", url=f"{URL}?X-Amz-Signature=geheim")
    ended_job = msgspec.structs.replace(job(state="failed", error="403"), request=asked)
    await tell(client, ended_job)
    for command in (("list",), ("show", "a1"), ("watch", "a1")):
        for more in ((), ("--json",)):
            ended = await jobs(*command, *more)
            assert "a1" in ended.out
            assert "geheim" not in ended.out + ended.err
    assert f"{URL}?..." in (await jobs("show", "a1")).out


async def test_a_job_is_shown_and_one_that_is_not_there_is_named(client: Client, jobs: Any):
    await tell(client, job("a1", state="queued", retry_at=now() + timedelta(hours=1), tries=2))
    ended = await jobs("show", "a1")
    assert ended.status == 0, ended.err
    assert URL in ended.out
    assert "again in" in ended.out
    assert (await jobs("show", "a1", "--json")).json["tries"] == 2
    ended = await jobs("watch", "b2")
    assert ended.status == 1
    assert "there is no job 'b2'" in ended.err


async def test_a_job_is_watched_to_its_end(client: Client, jobs: Any):
    running = job(state="running", stage="fetching", bytes=10, total_bytes=100)
    await tell(client, running)
    watching = asyncio.create_task(jobs("watch", "a1"))
    while not watching.done():
        # Whenever it begins to listen, it hears the end.
        await asyncio.sleep(0.2)
        ended_job = msgspec.structs.replace(
            running, state="done", bytes=100, updated_at=now(), result=result()
        )
        await tell(client, ended_job)
    ended = await watching
    assert ended.status == 0, ended.err
    assert "iris:3 is in the repository" in ended.out
    assert "100 bytes of 100 bytes" in ended.err


def gallery_job(name: str = "g1", **more: Any) -> Job:
    work = GalleryWork(action="import", dataset="people", artefact="ab" * 32, by="ann")
    return Job(job=name, kind="gallery", gallery=work, created_at=now(), updated_at=now(), **more)


async def test_a_job_of_a_dataset_is_told_in_entries(client: Client, jobs: Any):
    running = gallery_job(
        state="running", stage="writing", entries=1_500, total_entries=6_000, entries_per_s=500.0,
        eta_s=9.0,
    )  # fmt: skip
    await tell(client, running)
    row = (await jobs("list")).out.splitlines()[1]
    assert row.split()[:4] == ["g1", "running", "import", "people"]
    assert "1,500 of 6,000 entries, 500/s, 9 s left" in row
    failed = ["e7: its image was not kept"]
    result = GalleryWorkDone(
        entries=6_000, added=5_999, skipped=1, failed=failed, artefact="cd" * 32, size_bytes=2_048,
        file_name="people.json",
    )  # fmt: skip
    await tell(client, msgspec.structs.replace(running, state="done", gallery_result=result))
    ended = await jobs("watch", "g1")
    assert ended.status == 0, ended.err
    for said in (
        "import people",
        "6,000 of 6,000 entries",
        "5,999",
        "people.json, 2.0 kB",
        *failed,
    ):
        assert said in ended.out


async def test_a_job_of_a_dataset_is_ended_by_whoever_does_it(
    client: Client, jobs: Any, settings: Settings
):
    await tell(client, gallery_job())

    async def cancel(request: NameJob) -> Job:
        return gallery_job(request.job, state="cancelled")

    async def retry(request: NameJob) -> Job:
        return gallery_job(request.job)

    async with (
        join(client, settings, plugin="rustyface", description="Does no jobs.") as instance,
        instance.serving(DATASET_JOB_CANCEL, cancel),
        instance.serving(DATASET_JOB_RETRY, retry),
    ):
        assert (await jobs("cancel", "g1", "--json")).json["state"] == "cancelled"
        assert (await jobs("retry", "g1", "--json")).json["state"] == "queued"


async def test_a_lost_word_of_the_end_is_found_in_the_bucket(client: Client, jobs: Any):
    await tell(client, job(state="running"))
    watching = asyncio.create_task(jobs("watch", "a1", "--json"))
    await client.store.jobs.put(job(state="cancelled"), "a1")
    ended = await watching
    assert (ended.status, ended.json["state"]) == (1, "cancelled")


async def test_a_job_that_failed_ends_with_its_reason(client: Client, jobs: Any):
    await tell(client, job(state="failed", error="the server said 404 Not Found"))
    ended = await jobs("watch", "a1")
    assert ended.status == 1
    assert "the server said 404 Not Found" in ended.out


async def test_a_job_that_brought_something_unsound_ends_with_every_problem(
    client: Client, jobs: Any
):
    problems = [
        ModelProblem(where="node 3", what="no such operator Foo"),
        ModelProblem(where="", what="the file is cut off"),
    ]
    await tell(client, job(state="done", result=result(*problems)))
    ended = await jobs("watch", "a1")
    assert ended.status == 1
    assert "not sound: 2 problem(s)" in ended.out
    assert "node 3: no such operator Foo" in ended.out
    assert "the file is cut off" in ended.out


async def test_an_interrupted_watch_leaves_the_job_running_and_says_how_to_go_on(
    client: Client, jobs: Any, env: dict[str, str]
):
    running = job(state="running", bytes=1)
    await tell(client, running)
    process = await asyncio.create_subprocess_exec(
        *BKG, "jobs", "watch", "a1", env=env, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    said = b""
    while b"running" not in said:
        # A line is said after some seconds; then it surely listens.
        await tell(client, msgspec.structs.replace(running, updated_at=now(), bytes=2))
        with_line = asyncio.create_task(process.stderr.readline())
        await asyncio.wait({with_line}, timeout=30)
        said += await with_line if with_line.done() else b""
    process.send_signal(signal.SIGINT)
    _, rest = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 130
    assert b"`bkg jobs watch a1` follows it, `bkg jobs cancel a1` ends it" in rest
    entry = await client.store.jobs.get("a1")
    assert entry
    assert entry.value
    assert not entry.value.cancelling


@pytest.mark.parametrize(("url", "name"), [
    ("https://example.org/models/iris.onnx", "iris"),
    ("https://example.org/a%20b.onnx?download=true", "a b"),
    ("https://example.org/squeezenet1.1-7.onnx", "squeezenet1.1-7"),
    ("hf://owner/repo/net.onnx@main", "net"),
    ("hf://owner/repo/onnx/model.onnx", "repo"),
    ("hf://owner/repo/model.onnx@v1.0", "repo"),
])  # fmt: skip
def test_a_model_is_named_as_its_address_suggests(url: str, name: str):
    assert name_in(url) == name


@pytest.mark.parametrize("url", ["https://example.org/", "https://example.org/model.onnx"])
def test_an_address_that_suggests_no_name_asks_for_one(url: str):
    with pytest.raises(typer.BadParameter, match="give NAME"):
        name_in(url)

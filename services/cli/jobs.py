"""The commands about jobs: `bkg models import` and `bkg jobs`."""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path, PurePosixPath
from typing import Final
from urllib.parse import unquote, urlsplit

import typer
from rich.filesize import decimal
from rich.text import Text

from bus import codec
from bus import messages as m
from bus.client import Client
from bus.errors import NotFound
from bus.masking import without_query
from bus.subjects import JOB, JOB_CANCELS, JOB_RETRIES, MODEL_IMPORT
from services.cli.console import age, out, plain_table, show_json
from services.cli.models import end_unsound
from services.cli.options import Platform, named
from services.cli.plugins import connected
from services.cli.progress import Meter
from services.cli.transfers import push, show_added

ENDED: Final = {"done", "failed", "cancelled"}
COLOURS: Final = {
    "queued": "yellow",
    "running": "yellow",
    "done": "green",
    "failed": "red",
    "cancelled": "dim",
}
# News can be lost while the broker is away; the bucket has the truth.
LOOK_S: Final = 2.0
# Names that say nothing about the model in a file.
_ANY: Final = {"model", "pytorch_model", "weights"}


async def bring(
    url: str,
    model: str | None,
    at: Platform,
    *,
    version: str | None,
    sha256: str | None,
    load: bool,
    detach: bool,
    timeout_s: float,
) -> None:
    """Have a model fetched from elsewhere, and follow the job; a file here is pushed.

    Raises:
        typer.Exit: The job failed or was cancelled, or what it brought is not sound.
    """
    if "://" not in url:
        if sha256 or detach:
            what = "--sha256" if sha256 else "--detach"
            raise typer.BadParameter(f"{what} is for what is fetched, {url} is a file here")
        await push(
            Path(url), model, at, version=version, description=None, labels=None, licence=None,
            load=load, timeout_s=timeout_s,
        )  # fmt: skip
        return
    name, version = named(model or name_in(url), version)
    said = {"id": name, "url": url, "version": version, "sha256": sha256}
    given = {key: value for key, value in said.items() if value is not None}
    ask = codec.convert(given | {"load": load, "by": "cli"}, m.ImportModel)
    async with connected(at.nats, at.data_dir) as client:
        job = await client.call(MODEL_IMPORT, ask)
        if not detach:
            job = await watched(client, job.job, at)
    if detach and not at.as_json:
        out.print(f"job {job.job} brings {name}; `bkg jobs watch {job.job}` follows it")
        return
    end(job, at)


async def list_all(at: Platform, *, state: str | None) -> None:
    """Print the jobs that are kept, the newest first, or those in one state."""
    async with connected(at.nats, at.data_dir) as client:
        entries = await client.store.jobs.all()
    jobs = [
        without_query(one.value)
        for one in entries
        if one.value and state in {None, one.value.state}
    ]
    jobs.sort(key=lambda job: job.created_at, reverse=True)
    if at.as_json:
        show_json(jobs)
        return
    table = plain_table("job", "state", "what", "how far", "began")
    for column in table.columns:
        # The other commands ask for the id; where the line is short, the rest is folded.
        column.no_wrap = column.header in {"job", "state", "began"}
    for job in jobs:
        table.add_row(
            Text(job.job, "cyan"),
            Text(job.state, COLOURS[job.state]),
            Text(about(job), overflow="fold"),
            how_far(job),
            f"{age((m.now() - job.created_at).total_seconds())} ago",
        )
    out.print(table, soft_wrap=False)
    for job in jobs:
        if job.error:
            said = Text(job.error, "red" if job.state == "failed" else "dim")
            out.print(Text(f"{job.job}: ", "cyan").append(said))


async def show(job_id: str, at: Platform) -> None:
    """Print a job."""
    async with connected(at.nats, at.data_dir) as client:
        _show(await _job(client, job_id), at)


async def watch(job_id: str, at: Platform) -> None:
    """Follow a job to its end.

    Raises:
        typer.Exit: It failed or was cancelled, or what it brought is not sound.
    """
    async with connected(at.nats, at.data_dir) as client:
        job = await watched(client, job_id, at)
    end(job, at)


async def cancel(job_id: str, at: Platform) -> None:
    """End a job."""
    async with connected(at.nats, at.data_dir) as client:
        job = await _job(client, job_id)
        _show(await client.call(JOB_CANCELS[job.kind], _named(job_id)), at)


async def retry(job_id: str, at: Platform) -> None:
    """Take up a job that failed or was cancelled."""
    async with connected(at.nats, at.data_dir) as client:
        job = await _job(client, job_id)
        _show(await client.call(JOB_RETRIES[job.kind], _named(job_id)), at)


def name_in(url: str) -> str:
    """Return the model's name that an address suggests: its file's, or else its repository's.

    Raises:
        typer.BadParameter: It suggests none.
    """
    parts = urlsplit(url)
    path = PurePosixPath(unquote(parts.path))
    name = path.name.partition("@")[0] if parts.scheme == "hf" else path.name
    stem = PurePosixPath(name).stem
    if stem.lower() in _ANY or not stem:
        # hf://owner/repo/model.onnx: there the repository has the name.
        above = path.parts[1] if parts.scheme == "hf" and len(path.parts) > 2 else ""
        stem = above.partition("@")[0]
    if not stem:
        raise typer.BadParameter(f"{url} suggests no name; give NAME behind it")
    return stem


async def told_of(client: Client, job_id: str) -> AsyncIterator[m.Job]:
    """Give a job as it is, and then its news, to its end.

    Raises:
        NotFound: There is no such job.
    """
    async with client.follow(JOB, job=job_id) as live:
        last = await _job(client, job_id)
        yield last
        while last.state not in ENDED:
            try:
                async with asyncio.timeout(LOOK_S):
                    news = (await anext(live)).payload
            except TimeoutError:
                news = await _job(client, job_id)
            if news.updated_at >= last.updated_at:
                last = news
                yield last


async def watched(client: Client, job_id: str, at: Platform) -> m.Job:
    """Show a job's progress until it ends; whoever stops watching leaves it running."""
    last: m.Job | None = None
    try:
        with Meter(f"job {job_id}", quiet=at.as_json) as meter:
            async for job in told_of(client, job_id):
                if job.kind == "gallery":
                    # A bar of bytes says nothing about entries.
                    meter.say(f"{about(job)}: {_stage(job)}, {how_far(job)}")
                else:
                    if last is None and job.state not in ENDED:
                        meter.begin_at(job.bytes)
                    meter.to(_bytes(job), job.total_bytes, f"{about(job)}: {_stage(job)}")
                last = job
    except asyncio.CancelledError:
        sys.stderr.write(
            f"the job goes on: `bkg jobs watch {job_id}` follows it, "
            f"`bkg jobs cancel {job_id}` ends it\n"
        )
        raise
    assert last is not None  # noqa: S101 - `told_of` gives one, or raises
    return last


def end(job: m.Job, at: Platform) -> None:
    """Print what a job led to, and end with status 1 where it did not go well."""
    if at.as_json:
        show_json(without_query(job))
    elif job.result:
        show_added(job.result)
    else:
        _show(job, at)
    if job.state in {"failed", "cancelled"}:
        raise typer.Exit(1)
    if job.result:
        end_unsound(job.result.report)


def _show(job: m.Job, at: Platform) -> None:
    job = without_query(job)
    if at.as_json:
        show_json(job)
        return
    line = Text(job.job, "cyan").append(f"  {_stage(job)}", COLOURS[job.state])
    out.print(line.append(", is to be cancelled" if job.cancelling else "", "yellow"))
    facts = [
        ("what" if job.gallery else "model", about(job)),
        ("from", _source(job)),
        ("how far", how_far(job)),
        ("on", f"{job.instance} on {job.host}" if job.instance and job.host else ""),
        ("tries", str(job.tries) if job.tries > 1 else ""),
        ("by", _by(job)),
        ("error", job.error or ""),
    ]
    if job.retry_at:
        left_s = (job.retry_at - m.now()).total_seconds()
        facts.append(("again in", f"{max(0, left_s):.0f} s"))
    if job.result:
        facts.append(("became", f"{job.result.id}:{job.result.version}"))
    if job.gallery_result:
        facts += _led_to(job.gallery_result)
    for title, text in facts:
        if text:
            out.print(Text(f"{title:<10} ", "dim").append(text, ""))


def _stage(job: m.Job) -> str:
    return job.stage if job.stage and job.state == "running" else job.state


def _bytes(job: m.Job) -> int:
    """Return what has come; what came in a moment was never counted on its way."""
    return max(job.bytes, job.result.report.size_bytes if job.result else 0)


def about(job: m.Job) -> str:
    """Return what a job is about: a model and its version, or what is done with a dataset."""
    if (work := job.gallery) is not None:
        into = f" into {work.into}" if work.into else ""
        return f"{work.action} {work.dataset}{into}"
    if job.request is None:
        return "-"
    return job.request.id + (f":{job.request.version}" if job.request.version else "")


def how_far(job: m.Job) -> str:
    """Return what of a job is done, of how much, how fast and how long yet, as far as is known."""
    if job.kind == "gallery":
        done = max(job.entries, job.gallery_result.entries if job.gallery_result else 0)
        text = f"{done:,} entries"
        if job.total_entries:
            text = f"{done:,} of {job.total_entries:,} entries"
    else:
        text = decimal(_bytes(job))
        if job.total_bytes:
            text += f" of {decimal(job.total_bytes)}"
    if job.state == "running" and job.bytes_per_s:
        text += f", {decimal(int(job.bytes_per_s))}/s"
    if job.state == "running" and job.entries_per_s:
        text += f", {job.entries_per_s:,.0f}/s"
    if job.state == "running" and job.eta_s is not None:
        text += f", {job.eta_s:.0f} s left"
    return text


def _source(job: m.Job) -> str:
    if job.request is not None:
        return job.request.url
    return job.gallery.artefact or "" if job.gallery else ""


def _by(job: m.Job) -> str:
    asked = job.gallery or job.request
    return (asked.by if asked else None) or ""


def _led_to(done: m.GalleryWorkDone) -> list[tuple[str, str]]:
    counts = (
        ("added", done.added),
        ("replaced", done.replaced),
        ("skipped", done.skipped),
        ("rejections", done.rejections),
    )
    facts = [(title, f"{count:,}") for title, count in counts if count]
    if done.settings:
        facts.append(("settings", done.settings))
    facts += [("note", sentence) for sentence in done.notes]
    if done.artefact:
        size = decimal(done.size_bytes or 0)
        facts.append(("file", f"{done.file_name}, {size}, {done.artefact}, kept for an hour"))
    return facts + [("not taken", sentence) for sentence in done.failed]


async def _job(client: Client, job_id: str) -> m.Job:
    entry = await client.store.jobs.get(_named(job_id).job)
    if entry is None or entry.value is None:
        raise NotFound(f"there is no job {job_id!r}; `bkg jobs list` shows those that are kept")
    return entry.value


def _named(job_id: str) -> m.NameJob:
    return codec.convert({"job": job_id}, m.NameJob)

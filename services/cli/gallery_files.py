"""The commands that move datasets: import, export, reembed. Each follows the job that does it."""

from pathlib import Path
from typing import Final

import msgspec
import typer
from rich.filesize import decimal
from rich.text import Text

from bus import messages as m
from bus.client import Client
from bus.errors import Internal, NotFound, Unprocessable
from services.cli import jobs
from services.cli.console import out, show_json
from services.cli.galleries import ask_dataset, have
from services.cli.options import Platform
from services.cli.plugins import connected
from services.cli.progress import Meter
from services.cli.transfers import appearing, copy, digest_of, readable, store, target_of

NAME_MAX: Final = 255
FORMATS: Final = {".json": "json", ".npz": "npz", ".parquet": "parquet"}


async def bring_in(
    file: Path,
    dataset: str,
    at: Platform,
    *,
    create: bool,
    kind: str | None,
    existing: str,
    settings: str | None,
    detach: bool,
) -> None:
    """Bring a file of entries into a dataset: it is uploaded, and a job takes it in.

    Raises:
        typer.BadParameter: The file cannot be read.
        typer.Exit: The job failed or was cancelled, or entries could not be taken.
    """
    file = readable(file, "a file of entries: JSON, .npz or Parquet")
    before = file.stat()
    digest = await digest_of(file, before.st_size, quiet=at.as_json)
    async with connected(at.nats, at.data_dir) as client:
        # Before anything is sent: it may not be there, or nobody be who could take it in. What is
        # not there and may be made is made by the import, as its file says.
        if create:
            await ask_dataset(client, "list", dataset=dataset)
        else:
            await have(client, dataset, create=False)
        faces = client.store.faces
        await store(faces, f"{client.root}|faces", file, before, digest, quiet=at.as_json)
        answer = await ask_dataset(
            client,
            "import",
            dataset=dataset,
            artefact=digest,
            # On disk a name may be bytes that are no text.
            file_name=file.name.encode(errors="replace").decode()[-NAME_MAX:],
            format=kind,
            existing=existing,
            file_settings=settings,
        )
        job = _job_of(answer)
        if detach:
            _show_detached(job, f"takes {file.name} into {dataset}", at)
            return
        job = await jobs.watched(client, job.job, at)
    _end(job, at)


async def bring_out(
    dataset: str, target: str, at: Platform, *, kind: str | None, force: bool
) -> None:
    """Write a dataset to a file, whole and sound or not at all.

    Raises:
        typer.BadParameter: The file's name does not say in which format, or it is there already.
        typer.Exit: The job failed or was cancelled.
    """
    path = target_of(target, f"{dataset}.{kind or 'json'}", force=force)
    kind = kind or FORMATS.get(path.suffix.lower())
    if kind is None:
        raise typer.BadParameter(
            f"{path} does not say in which format: its name ends in {', '.join(FORMATS)}, or give "
            "--format"
        )
    async with connected(at.nats, at.data_dir) as client:
        answer = await ask_dataset(client, "export", dataset=dataset, format=kind)
        job = await jobs.watched(client, _job_of(answer).job, at)
        if job.state == "done":
            await _fetch(client, job, path, at, force=force)
    if job.state != "done" or job.gallery_result is None:
        _end(job, at)
        return
    done = job.gallery_result
    if at.as_json:
        show_json({"path": str(path), "job": job.job} | msgspec.to_builtins(done))
    else:
        size = decimal(path.stat().st_size)
        parts = f"{done.entries:,} entries, {done.rejections:,} rejections, its settings"
        out.print(Text(f"{dataset} is in {path}: {parts}, {size}"))


async def reembed(dataset: str, into: str, at: Platform, *, detach: bool) -> None:
    """Have the kept images of a dataset embedded anew, into another dataset.

    Raises:
        typer.Exit: The job failed or was cancelled, or entries could not be taken.
    """
    async with connected(at.nats, at.data_dir) as client:
        answer = await ask_dataset(client, "reembed", dataset=dataset, into=into)
        job = _job_of(answer)
        if detach:
            _show_detached(job, f"embeds {dataset} anew into {into}", at)
            return
        job = await jobs.watched(client, job.job, at)
    _end(job, at)


async def _fetch(client: Client, job: m.Job, path: Path, at: Platform, *, force: bool) -> None:
    done = job.gallery_result
    if done is None or done.artefact is None:
        raise Internal(f"the job {job.job} is done, but does not say where its file is")
    faces = client.store.faces
    try:
        with (
            appearing(path, force=force) as file,
            Meter(f"downloading {path.name}", done.size_bytes, quiet=at.as_json) as meter,
        ):
            await copy(faces, done.artefact, f"the export {job.job}", file, meter)
    except (NotFound, Unprocessable):
        if await faces.size(done.artefact) is not None:
            raise
        raise NotFound(
            f"the file of the export {job.job} was deleted before all of it was here: something "
            "was deleted from the dataset, or its hour had passed; export it again"
        ) from None


def _job_of(answer: m.DatasetList) -> m.Job:
    if answer.job is None:
        raise Internal("the worker did not tell which job does it; its version is another one")
    return answer.job


def _show_detached(job: m.Job, does: str, at: Platform) -> None:
    if at.as_json:
        show_json(job)
    else:
        out.print(Text(f"job {job.job} {does}; `bkg jobs watch {job.job}` follows it"))


def _end(job: m.Job, at: Platform) -> None:
    """Print what a job led to, and end with status 1 where not all of it went well."""
    jobs.end(job, at)
    if job.gallery_result and job.gallery_result.failed:
        raise typer.Exit(1)

"""`bkg models` and `bkg jobs`: the parser. Each command imports its file only when it is called."""
# ruff: noqa: PLC0415 - late imports keep `bkg --help` fast

from pathlib import Path
from typing import Annotated, Literal

import typer

from services.cli.options import (
    Description,
    DryRun,
    JobId,
    Labels,
    Licence,
    LoadTimeout,
    ModelName,
    Platform,
    pairs,
    reaching,
)

models_app = typer.Typer(
    no_args_is_help=True, help="Bring models in, look at them, and have them served."
)
jobs_app = typer.Typer(
    no_args_is_help=True, help="Look at jobs of models and datasets, end them, try them again."
)

Version = Annotated[str | None, typer.Option(help="The version.", show_default="the next number")]
Load = Annotated[bool, typer.Option("--load", help="Have it served, if it is sound.")]


@models_app.command("list")
@reaching
def list_models(*, label: Labels = None, at: Platform) -> None:
    """Show every model of the repository, or those with these labels.

    Example: bkg models list --label team=vision
    """
    from services.cli import models, plugins

    plugins.run(models.list_all(at, labels=pairs(label, "--label")))


@models_app.command()
@reaching
def show(model: ModelName, *, at: Platform) -> None:
    """Show a model: signature, versions, report, where it is served, and how to ask it.

    Example: bkg models show iris:2
    """
    from services.cli import models, plugins

    plugins.run(models.show(model, at))


@models_app.command()
@reaching
def push(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A model's file.")],
    model: Annotated[
        str | None,
        typer.Argument(metavar="NAME[:VERSION]", help="The model.", show_default="the file's name"),
    ] = None,
    *,
    version: Version = None,
    description: Description = None,
    label: Labels = None,
    licence: Licence = None,
    load: Load = False,
    timeout: LoadTimeout = 300.0,
    at: Platform,
) -> None:
    """Bring a file into the repository, and say whether it is sound.

    What was broken off goes on where it was: give the same command again.

    Example: bkg models push iris.onnx iris:2 --licence Apache-2.0 --load
    """
    from services.cli import plugins, transfers

    plugins.run(
        transfers.push(
            file,
            model,
            at,
            version=version,
            description=description,
            labels=pairs(label, "--label"),
            licence=licence,
            load=load,
            timeout_s=timeout,
        )
    )


@models_app.command()
@reaching
def pull(
    model: ModelName,
    *,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="Where to; - is stdout.",
            show_default="NAME with its format's ending, here",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file.")] = False,
    at: Platform,
) -> None:  # fmt: skip
    """Write a version's artefact to a file, its digest checked.

    Example: bkg models pull iris:2 -o iris-2.onnx
    """
    from services.cli import plugins, transfers

    plugins.run(transfers.pull(model, output, at, force=force))


@models_app.command("import")
@reaching
def import_model(
    url: Annotated[
        str,
        typer.Argument(
            metavar="URL", help="https://..., hf://OWNER/REPO/FILE[@REVISION], or a file here."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Argument(metavar="NAME[:VERSION]", help="The model.", show_default="as in the URL"),
    ] = None,
    *,
    version: Version = None,
    sha256: Annotated[
        str | None,
        typer.Option(metavar="HEX", help="What the bytes must come to.", show_default="anything"),
    ] = None,
    load: Load = False,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Do not wait for the job that does it.")
    ] = False,
    timeout: LoadTimeout = 300.0,
    at: Platform,
) -> None:
    """Fetch a model from elsewhere, and follow the job that does it; Ctrl-C leaves it running.

    Example: bkg models import https://example.org/iris.onnx iris --load
    """
    from services.cli import jobs, plugins

    plugins.run(
        jobs.bring(
            url,
            model,
            at,
            version=version,
            sha256=sha256,
            load=load,
            detach=detach,
            timeout_s=timeout,
        )
    )


@models_app.command()
@reaching
def validate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="FILE|NAME[:VERSION]", help="A file here, or a version of the repository."
        ),
    ],
    *,
    sample: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="An inference request in JSON to try it with.",
            show_default="zeros",
        ),
    ] = None,
    timeout: LoadTimeout = 600.0,
    at: Platform,
) -> None:
    """Say whether a model is sound; a file is looked at here, and sent nowhere.

    Example: bkg models validate iris.onnx
    """
    from services.cli import models, plugins

    plugins.run(models.validate(target, at, sample=sample, timeout_s=timeout))


@models_app.command()
@reaching
def load(
    model: ModelName,
    *,
    path: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="A file of the models folder.",
            show_default="what the repository has",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="How it is run; several times."),
    ] = None,
    timeout: LoadTimeout = 300.0,
    at: Platform,
) -> None:
    """Have a model served, and wait until it is.

    Example: bkg models load iris:2 --set pinned=true --set threads=2
    """
    from services.cli import models, plugins

    plugins.run(models.load(model, at, path=path, settings=settings, timeout_s=timeout))


@models_app.command()
@reaching
def unload(model: ModelName, *, timeout: LoadTimeout = 60.0, at: Platform) -> None:
    """Have a model, or one version of it, served no longer; it stays in the repository.

    Example: bkg models unload iris:1
    """
    from services.cli import models, plugins

    plugins.run(models.unload(model, at, timeout_s=timeout))


@models_app.command()
@reaching
def alias(
    model: ModelName,
    name: Annotated[str, typer.Argument(metavar="ALIAS", help="The name, such as default.")],
    *,
    remove: Annotated[bool, typer.Option("--remove", help="Take the name away.")] = False,
    timeout: LoadTimeout = 60.0,
    at: Platform,
) -> None:
    """Let a name stand for a version, for every request from then on.

    Example: bkg models alias iris:2 champion
    """
    from services.cli import models, plugins

    plugins.run(models.alias(model, name, at, remove=remove, timeout_s=timeout))


@models_app.command()
@reaching
def describe(
    model: Annotated[str, typer.Argument(metavar="NAME", help="The model.")],
    *,
    description: Description = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label", metavar="KEY=VALUE", help="All labels that it shall have; several times."
        ),
    ] = None,
    licence: Licence = None,
    at: Platform,
) -> None:
    """Change what people read about a model; what is not given stays.

    Example: bkg models describe iris --description "Iris species" --label team=vision
    """
    from services.cli import models, plugins

    plugins.run(
        models.describe(
            model, at, description=description, labels=pairs(label, "--label"), licence=licence
        )
    )


@models_app.command()
@reaching
def ps(*, at: Platform) -> None:
    """Show what is loaded where, since when, with its memory, and why it stays.

    Example: bkg models ps
    """
    from services.cli import models, plugins

    plugins.run(models.ps(at))


@models_app.command()
@reaching
def rm(
    model: ModelName,
    *,
    force: Annotated[bool, typer.Option("--force", help="Also what is served or named.")] = False,
    dry_run: DryRun = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    at: Platform,
) -> None:
    """Delete a model, or one version of it, with what only it needs; asks before.

    Example: bkg models rm iris:1 --dry-run
    """
    from services.cli import models, plugins

    plugins.run(models.remove(model, at, force=force, dry_run=dry_run, yes=yes))


@models_app.command()
@reaching
def gc(*, dry_run: DryRun = False, at: Platform) -> None:
    """Delete artefacts that no version needs, and what broken uploads left.

    Example: bkg models gc --dry-run
    """
    from services.cli import models, plugins

    plugins.run(models.collect(at, dry_run=dry_run))


@models_app.command()
@reaching
def shipped(*, at: Platform) -> None:
    """Show the weights that come with the plugins that run, and their licences.

    Example: bkg models shipped
    """
    from services.cli import models, plugins

    plugins.run(models.shipped(at))


@jobs_app.command("list")
@reaching
def list_jobs(
    *,
    state: Annotated[
        Literal["queued", "running", "done", "failed", "cancelled"] | None,
        typer.Option(help="Only those in this state.", show_default="all"),
    ] = None,
    at: Platform,
) -> None:
    """Show the jobs that are kept, the newest first.

    Example: bkg jobs list --state running
    """
    from services.cli import jobs, plugins

    plugins.run(jobs.list_all(at, state=state))


@jobs_app.command("show")
@reaching
def show_job(job: JobId, *, at: Platform) -> None:
    """Show a job.

    Example: bkg jobs show k3f9
    """
    from services.cli import jobs, plugins

    plugins.run(jobs.show(job, at))


@jobs_app.command()
@reaching
def watch(job: JobId, *, at: Platform) -> None:
    """Follow a job to its end; Ctrl-C leaves it running.

    Example: bkg jobs watch k3f9
    """
    from services.cli import jobs, plugins

    plugins.run(jobs.watch(job, at))


@jobs_app.command()
@reaching
def cancel(job: JobId, *, at: Platform) -> None:
    """End a job.

    Example: bkg jobs cancel k3f9
    """
    from services.cli import jobs, plugins

    plugins.run(jobs.cancel(job, at))


@jobs_app.command()
@reaching
def retry(job: JobId, *, at: Platform) -> None:
    """Take up a job that failed or was cancelled, from where it was.

    Example: bkg jobs retry k3f9
    """
    from services.cli import jobs, plugins

    plugins.run(jobs.retry(job, at))

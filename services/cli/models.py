"""The commands about the repository of models: list, show, ps, load, validate, rm and so on."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import typer
from rich.filesize import decimal
from rich.text import Text

from bus import codec
from bus import messages as m
from bus.client import Client
from bus.errors import BusError, Internal, InvalidRequest, NotFound
from bus.models import follow_models, shipped_by, version_of
from bus.subjects import (
    MODEL_ALIAS,
    MODEL_DESCRIBE,
    MODEL_GC,
    MODEL_LOAD,
    MODEL_REMOVE,
    MODEL_UNLOAD,
    MODEL_VALIDATE,
)
from services.cli.console import out, show_json
from services.cli.models_shown import (
    aliases_in_words,
    show_examples,
    show_list,
    show_loaded,
    show_model,
    show_removed,
    show_report,
    show_served,
    show_shipped,
    show_versions,
    some_of,
)
from services.cli.options import Platform, named
from services.cli.plugins import connected
from services.cli.running import read_run_file

# A large model takes its time to be fetched and tried.
VALIDATE_S: Final = 600.0
GATEWAY: Final = "http://127.0.0.1:43119"


async def list_all(at: Platform, *, labels: Mapping[str, str] | None) -> None:
    """Print every model, or those with all of these labels."""
    async with connected(at.nats, at.data_dir) as client, follow_models(client.store) as view:
        wanted = (labels or {}).items()
        specs = [spec for spec in view.specs() if wanted <= spec.labels.items()]
        if at.as_json:
            show_json(specs)
            return
        show_list(view, specs)


async def show(model: str, at: Platform) -> None:
    """Print all that is known of a model: signature, versions, report, where it is served."""
    async with connected(at.nats, at.data_dir) as client, follow_models(client.store) as view:
        spec, version = await look_up(client, model)
        report = await client.store.reports.get(version.checksum)
        found = report.value if report else None
        here = [
            msgspec.structs.replace(told, models=[one for one in told.models if one.id == spec.id])
            for told in view.instances()
        ]
        served = [told for told in here if told.models]
        if at.as_json:
            show_json({"model": spec, "version": version, "report": found, "served": served})
            return
        show_model(spec, version)
        show_versions(view, spec)
        out.print()
        if found:
            show_report(found)
        else:
            out.print(Text("not validated yet; `bkg models validate` does it", "dim"))
        out.print()
        show_served(served)
        run = None if at.nats else read_run_file(at.data_dir)
        show_examples(spec, version, run.url if run else GATEWAY, at.data_dir, client.root)


async def ps(at: Platform) -> None:
    """Print what is loaded where, since when, with its memory, and why it stays."""
    async with connected(at.nats, at.data_dir) as client, follow_models(client.store) as view:
        instances = view.instances()
    if at.as_json:
        show_json(instances)
        return
    show_served(instances)
    for told in instances:
        took = sum(one.memory_bytes for one in told.models)
        budget = f" of {decimal(told.budget_bytes)}" if told.budget_bytes else ""
        out.print(
            Text(f"{told.plugin}/{told.slot} on {told.host}: ", "dim").append(
                f"{decimal(took)}{budget} in use"
            )
        )


async def load(
    model: str,
    at: Platform,
    *,
    path: str | None,
    settings: Sequence[str] | None,
    timeout_s: float,
) -> None:
    """Have a model served, and wait until an instance does."""
    name, version = named(model)
    said: dict[str, Any] = {"id": name, "version": version, "path": path}
    if settings:
        said["config"] = dict(_setting(text) for text in settings)
    ask = codec.convert({k: v for k, v in said.items() if v is not None}, m.LoadModel)
    async with connected(at.nats, at.data_dir) as client:
        loaded = await client.call(MODEL_LOAD, ask, timeout_s=timeout_s)
    show_json(loaded) if at.as_json else show_loaded(loaded)


async def unload(model: str, at: Platform, *, timeout_s: float) -> None:
    """Have a model, or one version of it, served no longer."""
    name, version = named(model)
    ask = codec.convert({"id": name, "version": version}, m.UnloadModel)
    async with connected(at.nats, at.data_dir) as client:
        unloaded = await client.call(MODEL_UNLOAD, ask, timeout_s=timeout_s)
    if at.as_json:
        show_json(unloaded)
    else:
        out.print(f"{model} is served no longer; its artefacts stay")


async def alias(model: str, name: str, at: Platform, *, remove: bool, timeout_s: float) -> None:
    """Let a name stand for a version, or take the name away.

    Raises:
        typer.BadParameter: No version is named, or one although the name goes.
    """
    own, version = named(model)
    if remove == bool(version):
        what = "--remove takes a model without a version" if remove else "a version is missing"
        raise typer.BadParameter(f"{what}; examples: iris:2 champion, iris champion --remove")
    ask = codec.convert({"id": own, "alias": name, "version": version}, m.AliasModel)
    async with connected(at.nats, at.data_dir) as client:
        found = await client.call(MODEL_ALIAS, ask, timeout_s=timeout_s)
    if at.as_json:
        show_json(found)
    else:
        out.print(f"{own}: {aliases_in_words(found.aliases) or 'no aliases'}")


async def describe(
    model: str,
    at: Platform,
    *,
    description: str | None,
    labels: Mapping[str, str] | None,
    licence: str | None,
) -> None:
    """Change what people read about a model.

    Raises:
        typer.BadParameter: Nothing is to be changed.
    """
    more = {"description": description, "labels": labels, "licence": licence}
    given = {key: value for key, value in more.items() if value is not None}
    if not given:
        raise typer.BadParameter("nothing to change: give --description, --label or --licence")
    name, _ = named(model)
    ask = codec.convert({"id": name, **given}, m.DescribeModel)
    async with connected(at.nats, at.data_dir) as client:
        spec = await client.call(MODEL_DESCRIBE, ask)
    if at.as_json:
        show_json(spec)
    elif default := version_of(spec):
        show_model(spec, default)


async def validate(target: str, at: Platform, *, sample: Path | None, timeout_s: float) -> None:
    """Print what the validation of a file here, or of a version of the repository, finds.

    Raises:
        typer.Exit: It is not sound.
    """
    if await asyncio.to_thread(Path(target).is_file):
        report = await _validated_here(Path(target), sample)
    else:
        if "/" in target or target.endswith((".onnx", ".json")):
            raise typer.BadParameter(f"{target} is no file here, and can be no model's name")
        name, version = named(target)
        said: dict[str, Any] = {"id": name, "version": version}
        if sample:
            said["sample"] = _sample(sample)
        ask = codec.convert(said, m.ValidateModel)
        async with connected(at.nats, at.data_dir) as client:
            report = await client.call(MODEL_VALIDATE, ask, timeout_s=timeout_s)
    if at.as_json:
        show_json(report)
    else:
        show_report(report)
    end_unsound(report)


async def remove(model: str, at: Platform, *, force: bool, dry_run: bool, yes: bool) -> None:
    """Delete a model, or one version of it; says what would go, and asks, before it does.

    Raises:
        typer.Exit: It is still used and not forced, or the answer was no.
    """
    name, version = named(model)
    ask = codec.convert({"id": name, "version": version, "force": force}, m.RemoveModel)
    if not (dry_run or yes) and not (sys.stdin.isatty() and not at.as_json):
        raise typer.BadParameter("nobody can be asked here: give --yes, or --dry-run to see first")
    async with connected(at.nats, at.data_dir) as client:
        # With force, so that what uses it is told, and does not end the question.
        trial = msgspec.structs.replace(ask, dry_run=True, force=True)
        plan = await client.call(MODEL_REMOVE, trial)
    if dry_run or not at.as_json:
        show_json(plan) if at.as_json else show_removed(plan)
    if dry_run:
        return
    if plan.used_by and not force:
        sys.stderr.write(
            f"bkg: {model} is still used: {', '.join(plan.used_by)}; "
            "nothing was removed, --force removes it all the same\n"
        )
        raise typer.Exit(1)
    # Not inside: a connection does not wait for somebody who thinks about it.
    if not yes and not typer.confirm("Remove it?", err=True):
        raise typer.Exit(1)
    async with connected(at.nats, at.data_dir) as client:
        removed = await client.call(MODEL_REMOVE, ask, timeout_s=60.0)
    if at.as_json:
        show_json(removed)
    else:
        out.print(f"removed; {decimal(removed.freed_bytes)} are free again")


async def collect(at: Platform, *, dry_run: bool) -> None:
    """Delete what nobody needs of the object store."""
    async with connected(at.nats, at.data_dir) as client:
        found = await client.call(MODEL_GC, m.CollectGarbage(dry_run=dry_run), timeout_s=120.0)
    if at.as_json:
        show_json(found)
        return
    would = "would go" if found.dry_run else "went"
    for digest in found.artefacts:
        out.print(f"artefact {digest} {would}")
    for upload in found.uploads:
        out.print(f"unfinished upload {upload} {would}")
    free = "would be" if found.dry_run else "are"
    out.print(f"{decimal(found.freed_bytes)} {free} free again")


async def shipped(at: Platform) -> None:
    """Print the weights that come with the plugins that run, and their licences."""
    async with connected(at.nats, at.data_dir) as client:
        told = [entry.value for entry in await client.store.instances.all() if entry.value]
    found = shipped_by(told)
    if at.as_json:
        show_json(found.models)
    else:
        show_shipped(found.models)


async def look_up(client: Client, model: str) -> tuple[m.ModelSpec, m.ModelVersion]:
    """Return a model of the repository, and the version that `NAME[:VERSION]` stands for.

    Raises:
        NotFound: There is none; says which there are.
    """
    name, wanted = named(model)
    entry = await client.store.models.get(codec.convert({"id": name}, m.DescribeModel).id)
    spec = entry.value if entry else None
    if spec is None:
        known = sorted(e.names[0] for e in await client.store.models.all())
        raise NotFound(f"there is no model {name!r}; there are: {some_of(known)}")
    version = version_of(spec, wanted)
    if version is None:
        known = [one.version for one in spec.versions]
        which = f"version {wanted!r} of {name!r}" if wanted else f"version of {name!r}"
        raise NotFound(f"there is no {which}; there are: {some_of(known)}")
    return spec, version


def end_unsound(report: m.ModelReport) -> None:
    """End with status 1 where an artefact is not sound."""
    if not report.sound:
        raise typer.Exit(1)


async def _validated_here(file: Path, sample: Path | None) -> m.ModelReport:
    """Return the report of candle's own validation, run as a process on this machine."""
    # -P: a folder `services` where the user stands must not be taken for ours.
    command = [
        sys.executable,
        "-P",
        "-m",
        "services.candle.repository.validation",
        str(file),
        "--json",
    ]
    if sample:
        command += ["--sample", str(sample)]
    process = await asyncio.create_subprocess_exec(
        *command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        told, said = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    try:
        return codec.decode(told, m.ModelReport)
    except BusError:
        lines = said.decode(errors="replace").strip().splitlines()
        why = lines[-1] if lines else "it said nothing"
        raise Internal(f"the validation ended with status {process.returncode}: {why}") from None


def _sample(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except OSError as error:
        raise typer.BadParameter(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InvalidRequest(f"the sample {file} is not JSON: {error}") from None


def _setting(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not (name and sign):
        raise typer.BadParameter(f"{text!r} is not NAME=VALUE", param_hint="--set")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value

"""The commands about the repository of models: list, show, ps, load, validate, rm and so on."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
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
from bus.models import ModelsView, follow_models, names_of, shipped_by, version_of
from bus.subjects import (
    MODEL_ALIAS,
    MODEL_DESCRIBE,
    MODEL_GC,
    MODEL_LOAD,
    MODEL_REMOVE,
    MODEL_UNLOAD,
    MODEL_VALIDATE,
)
from services.cli.console import age, out, plain_table, show_json
from services.cli.examples import examples_of
from services.cli.options import Platform, named
from services.cli.plugins import connected
from services.cli.running import read_run_file

# A large model takes its time to be fetched and tried.
VALIDATE_S: Final = 600.0
GATEWAY: Final = "http://127.0.0.1:43119"
STATE_COLOURS: Final = {
    "ready": "green",
    "queued": "yellow",
    "fetching": "yellow",
    "loading": "yellow",
    "leaving": "yellow",
    "cold": "dim",
    "stored": "dim",
    "failed": "red",
    "unsound": "red",
}
# Of an operator's or a problem's list this many are shown to people; `--json` has all.
SHOWN_MAX: Final = 20


async def list_all(at: Platform, *, labels: Mapping[str, str] | None) -> None:
    """Print every model, or those with all of these labels."""
    async with connected(at.nats, at.data_dir) as client, follow_models(client.store) as view:
        wanted = (labels or {}).items()
        specs = [spec for spec in view.specs() if wanted <= spec.labels.items()]
        if at.as_json:
            show_json(specs)
            return
        table = plain_table("model", "default", "state", "versions", "size", "licence", "about")
        for spec in specs:
            default = version_of(spec)
            state = state_of(view, spec, default) if default else "stored"
            about = [spec.description] if spec.description else []
            about += [f"{key}={value}" for key, value in sorted(spec.labels.items())]
            table.add_row(
                Text(spec.id, "cyan"),
                default.version if default else "-",
                Text(state, STATE_COLOURS[state]),
                Text(", ".join(v.version for v in spec.versions), overflow="fold"),
                decimal(sum({v.checksum: v.size_bytes for v in spec.versions}.values())),
                spec.licence or "-",
                Text("; ".join(about) or "-", overflow="fold"),
            )
    out.print(table, soft_wrap=False)


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
        _show_model(spec, version)
        _show_versions(view, spec)
        out.print()
        if found:
            show_report(found)
        else:
            out.print(Text("not validated yet; `bkg models validate` does it", "dim"))
        out.print()
        _show_served(served)
        run = None if at.nats else read_run_file(at.data_dir)
        _show_examples(spec, version, run.url if run else GATEWAY, at.data_dir, client.root)


async def ps(at: Platform) -> None:
    """Print what is loaded where, since when, with its memory, and why it stays."""
    async with connected(at.nats, at.data_dir) as client, follow_models(client.store) as view:
        instances = view.instances()
    if at.as_json:
        show_json(instances)
        return
    _show_served(instances)
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
        out.print(f"{own}: {_aliases(found.aliases) or 'no aliases'}")


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
        _show_model(spec, default)


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
        show_json(plan) if at.as_json else _show_removed(plan)
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
        return
    table = plain_table("plugin", "file", "version", "licence", "size", "used for", "from")
    for one in found.models:
        table.add_row(
            one.plugin,
            Text(one.name, "cyan", overflow="fold"),
            one.version,
            one.licence,
            decimal(one.size_bytes),
            one.used_for,
            Text(one.source, overflow="fold"),
        )
    out.print(table, soft_wrap=False)


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
        raise NotFound(f"there is no model {name!r}; there are: {_some(known)}")
    version = version_of(spec, wanted)
    if version is None:
        known = [one.version for one in spec.versions]
        which = f"version {wanted!r} of {name!r}" if wanted else f"version of {name!r}"
        raise NotFound(f"there is no {which}; there are: {_some(known)}")
    return spec, version


def state_of(view: ModelsView, spec: m.ModelSpec, version: m.ModelVersion) -> str:
    """Return how a version is: as the instance that is nearest to serving it has it."""
    for _, one in view.served(spec.id, version.version):
        return one.state
    if version.sound is False:
        return "unsound"
    return "queued" if version.wanted else "stored"


def end_unsound(report: m.ModelReport) -> None:
    """End with status 1 where an artefact is not sound."""
    if not report.sound:
        raise typer.Exit(1)


def show_report(report: m.ModelReport) -> None:
    """Print what a validation found: a line for each fact, or for each problem."""
    if not report.sound:
        count = len(report.problems)
        out.print(Text("not sound", "bold red").append(f": {count} problem(s)", ""))
        for problem in report.problems:
            where = f"{problem.where}: " if problem.where else ""
            out.print(Text("  ").append(where, "cyan").append(problem.what))
    else:
        out.print(Text("sound", "green").append(f"  {_made(report)}", ""))
        for title, text in _facts(report):
            out.print(Text(f"{title:<10} ", "dim").append(text, ""))
    for advice in report.advice:
        out.print(Text("advice     ", "yellow").append(advice, ""))


def show_loaded(loaded: m.LoadedModel) -> None:
    """Print a version that is served now."""
    names = f", as {', '.join(loaded.names)}" if loaded.names else ""
    memory = f", {decimal(loaded.memory_bytes)} of memory" if loaded.memory_bytes else ""
    out.print(f"{loaded.id}:{loaded.version} is served{names}{memory}")


def _made(report: m.ModelReport) -> str:
    parts = [report.format]
    if report.opset is not None:
        parts.append(f"opset {report.opset}")
    if report.producer:
        parts.append(f"made by {report.producer}")
    if report.parameters is not None:
        parts.append(f"{report.parameters:,} parameters")
    parts.append(decimal(report.size_bytes))
    return ", ".join(part for part in parts if part)


def _facts(report: m.ModelReport) -> Iterable[tuple[str, str]]:
    for title, tensors in (("takes", report.inputs), ("gives", report.outputs)):
        for tensor in tensors:
            yield title, _tensor(tensor)
    runs_alone = "each request runs alone"
    yield "batched", "rows of several requests run together" if report.batched else runs_alone
    if report.operators:
        often = sorted(report.operators.items(), key=lambda one: (-one[1], one[0]))
        yield "operators", _some([f"{name} x{count}" for name, count in often])
    measured = []
    if report.load_ms is not None:
        measured.append(f"loaded in {report.load_ms:.1f} ms")
    if report.run_ms is not None:
        shapes = ", ".join(f"{name} {shape}" for name, shape in report.sample_shapes.items())
        measured.append(f"ran in {report.run_ms:.1f} ms" + (f" on {shapes}" if shapes else ""))
    if report.peak_memory_bytes is not None:
        measured.append(f"at most {decimal(report.peak_memory_bytes)} of memory")
    if measured:
        yield "measured", ", ".join(measured)
    if report.runtime:
        yield "runtime", report.runtime
    if report.confined:
        yield "confined", ", ".join(report.confined)
    yield "validated", _moment(report.validated_at)


def _show_model(spec: m.ModelSpec, version: m.ModelVersion) -> None:
    out.print(Text(f"{spec.id}:{version.version}", "bold cyan").append(
        f"  {spec.description}" if spec.description else "", ""
    ))  # fmt: skip
    facts = [
        ("licence", spec.licence),
        ("labels", ", ".join(f"{k}={v}" for k, v in sorted(spec.labels.items()))),
        ("names", _aliases({name: v.version for name, v in names_of(spec).items()
                            if name != v.version})),
        *(("takes", _tensor(one)) for one in version.inputs),
        *(("gives", _tensor(one)) for one in version.outputs),
    ]  # fmt: skip
    for title, text in facts:
        if text:
            out.print(Text(f"{title:<10} ", "dim").append(text, ""))


def _show_versions(view: ModelsView, spec: m.ModelSpec) -> None:
    table = plain_table("version", "state", "sound", "format", "size", "came", "from", "sha256")
    for version in spec.versions:
        state = state_of(view, spec, version)
        sound = {True: "yes", False: "no", None: "-"}[version.sound]
        table.add_row(
            version.version,
            Text(state, STATE_COLOURS[state]),
            Text(sound, "red" if version.sound is False else ""),
            version.format,
            decimal(version.size_bytes),
            _moment(version.added_at),
            Text(_source(version), overflow="fold"),
            version.checksum[:16],
        )
    out.print()
    out.print(table, soft_wrap=False)


def _show_served(instances: Iterable[m.ServedModels]) -> None:
    table = plain_table("model", "on", "state", "since", "memory", "last used", "kept by", "names")
    rows = 0
    for told in instances:
        for one in told.models:
            rows += 1
            state = Text(one.state, STATE_COLOURS[one.state])
            if one.progress is not None:
                state.append(f" {one.progress:.0%}")
            table.add_row(
                Text(f"{one.id}:{one.version}", "cyan"),
                f"{told.plugin}/{told.slot} on {told.host}",
                state,
                _ago(one.since),
                decimal(one.memory_bytes) if one.memory_bytes else "-",
                _ago(one.last_used),
                one.kept or "-",
                Text(", ".join(one.names) or "-", overflow="fold"),
            )
            if one.reason:
                table.add_row("", Text(one.reason, "red" if one.state == "failed" else "dim"))
    if rows:
        out.print(table, soft_wrap=False)
    else:
        out.print(Text("served nowhere", "dim"))


def _show_examples(
    spec: m.ModelSpec, version: m.ModelVersion, url: str, data_dir: Path, root: str
) -> None:
    if not version.inputs or version.sound is False:
        return
    told = examples_of(spec.id, version, url=url, key_file=data_dir / "admin.key", root=root)
    if not version.wanted:
        out.print()
        out.print(Text(f"# first: bkg models load {spec.id}:{version.version}", "dim"))
    for title, text in (("curl", told.curl), ("Python", told.python), ("nats", told.nats)):
        out.print()
        out.print(Text(f"# {title}", "dim"))
        out.print(Text(text))


def _show_removed(plan: m.RemovedModel) -> None:
    named_versions = ", ".join(plan.versions) or "none"
    out.print(f"{plan.id}: versions {named_versions}; {decimal(plan.freed_bytes)} would be free")
    for digest in plan.artefacts:
        out.print(Text(f"  artefact {digest}", "dim"))
    for user in plan.used_by:
        out.print(Text(f"  used: {user}", "yellow"))


async def _validated_here(file: Path, sample: Path | None) -> m.ModelReport:
    """Return the report of candle's own validation, run as a process on this machine."""
    # -P: a folder `services` where the user stands must not be taken for ours.
    command = [sys.executable, "-P", "-m", "services.candle.validation", str(file), "--json"]
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


def _source(version: m.ModelVersion) -> str:
    source = version.source
    if source is None:
        return version.path or "-"
    where = source.url or source.file_name
    by = f" by {source.by}" if source.by else ""
    return f"{source.kind}{by}" + (f": {where}" if where else "")


def _tensor(tensor: m.TensorInfo) -> str:
    return f"{tensor.name} {tensor.datatype} {tensor.shape}"


def _aliases(aliases: Mapping[str, str]) -> str:
    return ", ".join(f"{name} -> {version}" for name, version in sorted(aliases.items()))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN_MAX} more" if len(names) > SHOWN_MAX else ""
    return (", ".join(names[:SHOWN_MAX]) or "none") + more


def _moment(moment: datetime) -> str:
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _ago(moment: datetime | None) -> str:
    return age((m.now() - moment).total_seconds()) if moment else "-"

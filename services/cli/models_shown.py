"""Models as people see them in a terminal: tables, reports, requests to copy."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Final

from rich.filesize import decimal
from rich.text import Text

from bus import messages as m
from bus.models import ModelsView, names_of, version_of
from services.cli.console import age, out, plain_table
from services.cli.examples import examples_of

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


def show_list(view: ModelsView, specs: Iterable[m.ModelSpec]) -> None:
    """Print models, a line for each."""
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


def show_model(spec: m.ModelSpec, version: m.ModelVersion) -> None:
    """Print what a model is, and what one of its versions takes and gives."""
    out.print(Text(f"{spec.id}:{version.version}", "bold cyan").append(
        f"  {spec.description}" if spec.description else "", ""
    ))  # fmt: skip
    facts = [
        ("licence", spec.licence),
        ("labels", ", ".join(f"{k}={v}" for k, v in sorted(spec.labels.items()))),
        ("names", aliases_in_words({name: v.version for name, v in names_of(spec).items()
                                    if name != v.version})),
        *(("takes", _tensor(one)) for one in version.inputs),
        *(("gives", _tensor(one)) for one in version.outputs),
    ]  # fmt: skip
    for title, text in facts:
        if text:
            out.print(Text(f"{title:<10} ", "dim").append(text, ""))


def show_versions(view: ModelsView, spec: m.ModelSpec) -> None:
    """Print a model's versions, a line for each."""
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


def show_served(instances: Iterable[m.ServedModels]) -> None:
    """Print what is loaded where, since when, with its memory, and why it stays."""
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


def show_examples(
    spec: m.ModelSpec, version: m.ModelVersion, url: str, data_dir: Path, root: str
) -> None:
    """Print requests to copy, where the version can be asked."""
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


def show_removed(plan: m.RemovedModel) -> None:
    """Print what removing a model takes with it, and what uses it."""
    named_versions = ", ".join(plan.versions) or "none"
    out.print(f"{plan.id}: versions {named_versions}; {decimal(plan.freed_bytes)} would be free")
    for digest in plan.artefacts:
        out.print(Text(f"  artefact {digest}", "dim"))
    for user in plan.used_by:
        out.print(Text(f"  used: {user}", "yellow"))


def show_shipped(found: Iterable[m.ShippedModel]) -> None:
    """Print the weights that come with plugins, and their licences."""
    table = plain_table("plugin", "file", "version", "licence", "size", "used for", "from")
    for one in found:
        table.add_row(
            one.plugin,
            Text(one.name, "cyan", overflow="fold"),
            one.version,
            one.licence,
            decimal(one.size_bytes),
            Text(one.used_for, overflow="fold"),
            Text(one.source, overflow="fold"),
        )
    out.print(table, soft_wrap=False)


def state_of(view: ModelsView, spec: m.ModelSpec, version: m.ModelVersion) -> str:
    """Return how a version is: as the instance that is nearest to serving it has it."""
    for _, one in view.served(spec.id, version.version):
        return one.state
    if version.sound is False:
        return "unsound"
    return "queued" if version.wanted else "stored"


def aliases_in_words(aliases: Mapping[str, str]) -> str:
    """Return aliases and what they stand for, in words."""
    return ", ".join(f"{name} -> {version}" for name, version in sorted(aliases.items()))


def some_of(names: Sequence[str]) -> str:
    """Return names with commas between, the first of many."""
    more = f" and {len(names) - SHOWN_MAX} more" if len(names) > SHOWN_MAX else ""
    return (", ".join(names[:SHOWN_MAX]) or "none") + more


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
        yield "operators", some_of([f"{name} x{count}" for name, count in often])
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


def _source(version: m.ModelVersion) -> str:
    source = version.source
    if source is None:
        return version.path or "-"
    where = source.url or source.file_name
    by = f" by {source.by}" if source.by else ""
    return f"{source.kind}{by}" + (f": {where}" if where else "")


def _tensor(tensor: m.TensorInfo) -> str:
    return f"{tensor.name} {tensor.datatype} {tensor.shape}"


def _moment(moment: datetime) -> str:
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _ago(moment: datetime | None) -> str:
    return age((m.now() - moment).total_seconds()) if moment else "-"

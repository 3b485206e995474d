"""The figures for people: tables on the terminal, and the marked section of a page."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec
from rich.console import Console
from rich.table import Table

from tests.bench.models import SHAPES
from tests.bench.results import Results
from tests.bench.roster import BKG, IN_PROCESS, PEERS
from tests.bench.tables import Cell, Key, Verdict, cells, ratio, starts, verdicts

BEGIN: Final = "<!-- figures: made by `make bench` -->"
END: Final = "<!-- end of figures -->"
_MISSING: Final = "-"


class Sheet(msgspec.Struct, frozen=True):
    """A table before it is drawn."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def show(results: Results, console: Console) -> None:
    """Draw all tables on a terminal."""
    draw(sheets(results), remarks(results), console)


def draw(tables: Sequence[Sheet], remarks: Sequence[str], console: Console) -> None:
    """Draw tables and remarks on a terminal."""
    for sheet in tables:
        table = Table(title=sheet.title, title_justify="left", title_style="bold")
        for i, column in enumerate(sheet.columns):
            table.add_column(column, justify="left" if i == 0 else "right")
        for row in sheet.rows:
            table.add_row(*row)
        console.print(table)
    for remark in remarks:
        console.print(f"- {remark}", markup=False)


def write(results: Results, page: Path) -> None:
    """Put the tables into the marked section of a page.

    Raises:
        ValueError: The page has no such section.
    """
    fill(page, BEGIN, END, markdown(results))


def fill(page: Path, begin: str, end: str, content: str) -> None:
    """Put Markdown between two marks of a page, in place of what is there.

    Raises:
        ValueError: The page does not have them.
    """
    text = page.read_text()
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{page} has no section between {begin!r} and {end!r}")
    made = f"{begin}\n\n{content}\n{end}"
    page.write_text(pattern.sub(lambda _: made, text, count=1))


def markdown(results: Results) -> str:
    """Return machine, tables and remarks as Markdown."""
    options = results.options
    said = (
        f"{measured_on(results.made_at, results.machine)}: rounds: {options['rounds']}, windows of "
        f"{options['seconds']} s."
    )
    return as_markdown(said, sheets(results), remarks(results))


def measured_on(made_at: str, machine: Mapping[str, str]) -> str:
    """Return when and on what a run was made, as the beginning of a sentence."""
    return (
        f"Measured {made_at[:10]} on {machine['cores']} cores ({machine['processor']}, "
        f"{machine['memory']}, {machine['system']}), Python {machine['python']}"
    )


def as_markdown(said: str, tables: Sequence[Sheet], remarks: Sequence[str]) -> str:
    """Return a sentence, tables and remarks as Markdown."""
    lines = [said, ""]
    for sheet in tables:
        lines += [f"### {sheet.title}", "", _line(sheet.columns)]
        lines += [_line(["---", *["---:"] * (len(sheet.columns) - 1)])]
        lines += [*(_line(row) for row in sheet.rows), ""]
    if remarks:
        lines += ["### Remarks", "", *(f"- {_escaped(remark)}" for remark in remarks), ""]
    return "\n".join(lines)


def sheets(results: Results) -> list[Sheet]:
    """Return all tables."""
    table = cells(results.windows)
    every = [*_throughput(table), *_latency(table), _at_rest(results), goals(verdicts(results))]
    return [sheet for sheet in every if sheet.rows]


def remarks(results: Results) -> list[str]:
    """Return what a reader must know of single figures."""
    table = cells(results.windows)
    said = list(dict.fromkeys(results.failures))
    said += [f"{_cell_name(key)}: {cell.failure}" for key, cell in table.items() if cell.failure]
    if noisy := [_cell_name(key) for key, cell in table.items() if cell.noisy]:
        said.append(f"~ marks {len(noisy)} cells without a quiet window: something else ran then")
    if missing := sum(one.met is None for one in verdicts(results)):
        said.append(f"{missing} goals were not measured in this run")
    return said


def goals(found: Sequence[Verdict]) -> Sheet:
    """Return the goals that were measured, and by how much each was met."""
    return Sheet(
        "Goals",
        ("goal", "wanted", "measured", "met"),
        [
            (
                one.goal,
                f"{'at most' if one.at_most else 'at least'} {one.wanted:g}",
                f"{one.measured:.2f}",
                _met(one),
            )
            for one in found
            if one.met is not None
        ],
    )


def _throughput(table: dict[Key, Cell]) -> list[Sheet]:
    return [
        Sheet(
            f"{model}, {_KINDS[kind]}: requests per second (bkg's as a multiple)",
            ("server", *(f"c={c}" for c in connections), f"CPU per request, c={connections[-1]}"),
            [
                (
                    _title(peer),
                    *(_rate(table, (peer, model, kind, c)) for c in connections),
                    _us(table.get((peer, model, kind, connections[-1]))),
                )
                for peer in peers
            ],
        )
        for model, kind, connections, peers in _groups(table)
    ]


def _latency(table: dict[Key, Cell]) -> list[Sheet]:
    return [
        Sheet(
            f"{model}, {_KINDS[kind]}: p50 / p99 in ms",
            ("server", *(f"c={c}" for c in connections)),
            [
                (_title(peer), *(_ms(table.get((peer, model, kind, c))) for c in connections))
                for peer in peers
            ],
        )
        for model, kind, connections, peers in _groups(table)
        if kind != "array"
    ]


_KINDS: Final = {"json": "JSON", "binary": "raw tensors", "array": "in process, c rows a batch"}


def _groups(table: dict[Key, Cell]) -> list[tuple[str, str, list[int], list[str]]]:
    """Return what stands together in a table: model, kind, concurrencies, servers."""
    order = [*(peer.name for peer in PEERS), IN_PROCESS]
    groups = dict.fromkeys((model, kind) for _, model, kind, _ in table)
    found = []
    models, kinds = list(SHAPES), list(_KINDS)
    for model, kind in sorted(groups, key=lambda g: (models.index(g[0]), kinds.index(g[1]))):
        keys = [key for key in table if key[1:3] == (model, kind)]
        peers = sorted({key[0] for key in keys}, key=order.index)
        found.append((model, kind, sorted({key[3] for key in keys}), peers))
    return found


def _at_rest(results: Results) -> Sheet:
    return Sheet(
        "At rest",
        ("server", "version", "first right answer, s", "idle, MiB", "after load, MiB", "processes"),
        [
            (
                _title(peer),
                results.versions.get(peer, _MISSING),
                f"{one.ready_s:.1f}",
                f"{one.idle_mib:.0f}",
                f"{one.loaded_mib:.0f}",
                str(one.processes),
            )
            for peer, one in starts(results).items()
        ],
    )


def _met(one: Verdict) -> str:
    return f"{'yes' if one.met else 'NO'}, {one.margin:+.0%}"


def _rate(table: dict[Key, Cell], key: Key) -> str:
    cell = table.get(key)
    if cell is None:
        return _MISSING
    if cell.failure:
        return "failed"
    mark = "~" if cell.noisy else ""
    figure = f"{cell.per_s:,.0f}" if cell.per_s >= 100 else f"{cell.per_s:,.1f}"
    times = ratio(table, key)
    is_ours = key[0] == BKG or math.isnan(times)
    return f"{mark}{figure}" if is_ours else f"{mark}{figure} ({times:.2f})"


def _ms(cell: Cell | None) -> str:
    if cell is None or math.isnan(cell.p50_ms):
        return _MISSING
    return f"{'~' if cell.noisy else ''}{_short(cell.p50_ms)} / {_short(cell.p99_ms)}"


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def _us(cell: Cell | None) -> str:
    return _MISSING if cell is None or math.isnan(cell.cpu_us) else f"{_short(cell.cpu_us)} us"


def _title(peer: str) -> str:
    titles = {one.name: one.title for one in PEERS} | {IN_PROCESS: "onnxruntime in process"}
    return titles.get(peer, peer)


def _cell_name(key: Key) -> str:
    peer, model, kind, connections = key
    return f"{_title(peer)}, {model}, {kind}, c={connections}"


def _line(parts: Sequence[str]) -> str:
    return f"| {' | '.join(parts)} |"


def _escaped(text: str) -> str:
    """Return a server's own words as text: no tag or table of theirs gets into the page."""
    return re.sub(r"([<>|`*_\[\]])", r"\\\1", text.replace("\n", " "))

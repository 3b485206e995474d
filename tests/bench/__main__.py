"""`python -m tests.bench`: the parser; each part is a command, and README.md says what it does."""

import dataclasses
import os
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from tests.bench import faces as of_faces
from tests.bench import report, roster, wrk
from tests.bench.balance import Shared
from tests.bench.balance import balance as share
from tests.bench.contest import KINDS, Plan, measure
from tests.bench.memory import Trend, rest
from tests.bench.memory import cycles as cycle
from tests.bench.memory import soak as keep_loaded
from tests.bench.models import SHAPES
from tests.bench.processes import nothing_left
from tests.bench.results import Results, describe_machine, now
from tests.bench.roster import BKG, CACHE, IN_PROCESS, PEERS, Peer
from tests.bench.running import ServerFailed
from tests.bench.uploads import GROWTH_MAX_MIB, Grown, passages

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
# Those that put no load on the gateway.
_WITHOUT_WRK = ("show", "show-faces", "faces", "idle")

Seconds = Annotated[int, typer.Option(min=1, help="Length of a window.")]
Connections = Annotated[str, typer.Option("--concurrency", help="Requests under way at a time.")]
Route = Annotated[
    str, typer.Option(help="`bkg`: the Open Inference Protocol; `bkg-capability`: rows.")
]


@app.callback()
def check(context: typer.Context) -> None:
    """Measures bkg, alone and beside its peers. Figures go to .cache/bench/."""
    if context.invoked_subcommand not in _WITHOUT_WRK and (why := wrk.missing()):
        raise ServerFailed(why)


@app.command()
def servers(
    seconds: Seconds = 4,
    rounds: Annotated[int, typer.Option(min=1, help="How often each cell is measured.")] = 3,
    repeats: Annotated[int, typer.Option(min=0, help="How often a noisy window is redone.")] = 2,
    peers: Annotated[
        str | None, typer.Option(help="Names with commas between.", show_default="all")
    ] = None,
    models: Annotated[str, typer.Option(help="Of tiny, mlp, conv.")] = "tiny,mlp,conv",
    kinds: Annotated[str, typer.Option(help="Of json, binary.")] = "json,binary",
    concurrency: Connections = "1,16,64",
    quick: Annotated[
        bool, typer.Option("--quick", help="One round, windows of 2 s, c=1 and 64: a first look.")
    ] = False,
    write: Annotated[
        Path | None, typer.Option(help="Put the tables into this page, too.", dir_okay=False)
    ] = None,
) -> None:
    """Measure bkg beside its peers, and say which goals are met."""
    plan = Plan(
        peers=_names(peers, [*(p.name for p in PEERS), IN_PROCESS], "peers") or _defaults(),
        models=_names(models, list(SHAPES), "models"),
        kinds=_names(kinds, list(KINDS), "kinds"),
        connections=[1, 64] if quick else _numbers(concurrency),
        seconds=2 if quick else seconds,
        rounds=1 if quick else rounds,
        repeats=0 if quick else repeats,
    )
    with nothing_left():
        results = Results(
            made_at=now(),
            machine=describe_machine(),
            options={"seconds": plan.seconds, "rounds": plan.rounds},
            versions={},
        )
        plan = _installed(plan, results)
        try:
            measure(plan, results, _say)
        except KeyboardInterrupt:
            results.failures.append("the run was stopped before its end")
            raise
        finally:
            _keep("servers", results)
            report.show(results, console)
    if write:
        report.write(results, write)
        _say(f"the tables stand in {write}")


@app.command()
def show(
    file: Annotated[Path, typer.Argument(exists=True, help="What `servers` has kept.")],
    write: Annotated[
        Path | None, typer.Option(help="Put the tables into this page, too.", dir_okay=False)
    ] = None,
) -> None:
    """Show the tables of an earlier run."""
    results = msgspec.json.decode(file.read_bytes(), type=Results)
    report.show(results, console)
    if write:
        report.write(results, write)


@app.command()
def soak(
    seconds: Annotated[int, typer.Option(min=4, help="How long.")] = 600,
    connections: Annotated[int, typer.Option("--concurrency", min=1)] = 64,
    route: Route = BKG,
) -> None:
    """Keep bkg at full load, and see whether the memory of its processes is flat."""
    with nothing_left():
        done = keep_loaded(_route(route), seconds, connections, _say)
    _keep("soak", done)
    _draw(
        f"{done.seconds} s at c={connections}: {done.per_s:,.0f} requests/s, "
        f"p99 {done.p99_ms:.1f} ms, {done.failure or 'no errors'}",
        ("process", "first, MiB", "last, MiB", "MiB per hour", "flat"),
        [_trend(one) for one in done.trends],
    )


@app.command()
def cycles(
    count: Annotated[int, typer.Option(min=4, help="How often.")] = 200,
    route: Route = BKG,
    *,
    hostile: Annotated[
        bool, typer.Option(help="With requests meanwhile, ever new versions, loads called off.")
    ] = False,
) -> None:
    """Load and unload models of 41 MB and of 400 bytes, and see whether the memory comes back."""
    with nothing_left():
        done = cycle(_route(route), count, _say, hostile=hostile)
    _keep("cycles", done)
    figures = (done.before_mib, done.first_mib, done.last_mib, done.peak_mib, done.loaded_mib)
    _draw(
        f"candle's memory over {done.cycles} cycles, MiB; "
        f"open files {done.files_first}, then {done.files_last}",
        ("before", "after the first", "later half", "peak", "large model loaded", "comes back"),
        [(*(f"{mib:.0f}" for mib in figures), "yes" if done.comes_back else "NO")],
    )


@app.command()
def idle(
    seconds: Annotated[int, typer.Option(min=4, help="How long.")] = 30,
) -> None:
    """Start bkg without models, ask it nothing, and see what its processes use."""
    with nothing_left():
        found = rest(seconds)
    _keep("idle", found)
    rows = [(one.name, f"{one.mib:.1f}", f"{one.cpu:.2%}") for one in found]
    total = ("together", f"{sum(o.mib for o in found):.1f}", f"{sum(o.cpu for o in found):.2%}")
    _draw(f"idle for {seconds} s", ("process", "MiB", "of a processor"), [*rows, total])


@app.command()
def balance(
    seconds: Seconds = 5,
    concurrency: Connections = "1,16,64",
    model: Annotated[str, typer.Option(help="Which model.")] = "mlp",
    route: Route = BKG,
) -> None:
    """Serve with two replicas of which one is ten times slower, beside the fast one alone."""
    with nothing_left():
        found = share(_route(route), model, _numbers(concurrency), seconds, _say)
    _keep("balance", found)
    _draw(
        f"{model}, one replica slowed",
        ("replicas", "c", "requests/s", "p50, ms", "p99, ms", "others", "errors"),
        [_shared(one) for one in found],
    )


@app.command()
def uploads(
    mib: Annotated[int, typer.Option(min=1, max=2_000, help="Size of the large file.")] = 1_024,
    small: Annotated[int, typer.Option(min=1, max=2_000, help="Of the one beside it.")] = 64,
) -> None:
    """Send a small and a large file of zeros through bkg, and see what its processes take."""
    with nothing_left():
        found = passages(sorted({small, mib}), _say)
    _keep("uploads", found)
    for one in found:
        _draw(
            f"{one.mib:,} MiB {one.way} in {one.seconds:.1f} s; {one.said}",
            ("process", "before, MiB", "peak, MiB", "growth", f"within {GROWTH_MAX_MIB:.0f} MiB"),
            [_grown(process) for process in one.processes],
        )


@app.command()
def faces(
    seconds: Seconds = 4,
    rounds: Annotated[int, typer.Option(min=1, help="How often each has its turn.")] = 3,
    parts: Annotated[str, typer.Option(help=f"Of {', '.join(of_faces.PARTS)}.")] = ",".join(
        of_faces.PARTS
    ),
    photos: Annotated[
        Path | None,
        typer.Option(
            help="Labelled photos: a folder for each person, and perhaps LFW's pairs.txt.",
            exists=True,
            file_okay=False,
            show_default="what packages ship",
        ),
    ] = None,
    sizes: Annotated[
        str, typer.Option(help="Entries of galleries, with commas between.")
    ] = "10000,100000,1000000",
    images: Annotated[
        int, typer.Option(min=100, help="How many a worker's memory is watched for.")
    ] = 10_000,
    threads: Annotated[
        int, typer.Option(min=1, help="Of each engine that searches.", show_default="processors")
    ] = os.cpu_count() or 1,
    quick: Annotated[
        bool, typer.Option("--quick", help="One round of 1 s, 10,000 entries, 300 images.")
    ] = False,
    write: Annotated[
        Path | None, typer.Option(help="Put the tables into this page, too.", dir_okay=False)
    ] = None,
) -> None:
    """Measure accuracy, encoding, search, galleries and memory of faces, beside libraries."""
    plan = of_faces.Plan(
        parts=_names(parts, list(of_faces.PARTS), "parts"),
        photos=photos,
        sizes=[10_000] if quick else _numbers(sizes, "sizes", 100, 10_000_000),
        images=300 if quick else images,
        seconds=1 if quick else seconds,
        rounds=1 if quick else rounds,
        threads=threads,
    )
    found = of_faces.begun()
    with nothing_left():
        try:
            of_faces.measure(plan, found, _say)
        finally:
            _keep("faces", found)
            report.draw(of_faces.sheets(found), of_faces.remarks(found), console)
    if write:
        report.fill(write, of_faces.BEGIN, of_faces.END, of_faces.markdown(found))
        _say(f"the tables stand in {write}")


@app.command("show-faces")
def show_faces(
    files: Annotated[
        list[Path],
        typer.Argument(exists=True, help="What `faces` has kept; later ones add their parts."),
    ],
    write: Annotated[
        Path | None, typer.Option(help="Put the tables into this page, too.", dir_okay=False)
    ] = None,
) -> None:
    """Show the tables of earlier runs of `faces`."""
    found = of_faces.joined(
        [msgspec.json.decode(file.read_bytes(), type=of_faces.Found) for file in files]
    )
    report.draw(of_faces.sheets(found), of_faces.remarks(found), console)
    if write:
        report.fill(write, of_faces.BEGIN, of_faces.END, of_faces.markdown(found))


def main() -> None:
    """Run one part; what is expected to fail fails in one sentence."""
    try:
        app()
    except (ServerFailed, ValueError) as error:
        raise SystemExit(f"bench: {error}") from None


def _installed(plan: Plan, results: Results) -> Plan:
    """Install the peers of a plan; return the plan without those that cannot be."""
    there = []
    by_name = {peer.name: peer for peer in PEERS}
    for name in plan.peers:
        if name == IN_PROCESS:
            there.append(name)
            continue
        try:
            roster.install(by_name[name])
            results.versions[name] = roster.version(by_name[name])
            there.append(name)
        except ValueError as error:
            results.failures.append(str(error))
            _say(str(error))
    return dataclasses.replace(plan, peers=there)


def _defaults() -> list[str]:
    return [*(peer.name for peer in PEERS if peer.default), IN_PROCESS]


def _route(name: str) -> Peer:
    ours = {peer.name: peer for peer in PEERS if peer.module == roster.BKG_MODULE}
    if name not in ours:
        raise typer.BadParameter(f"{name!r} is no route of bkg; there are: {', '.join(ours)}")
    return ours[name]


def _names(given: str | None, allowed: list[str], option: str) -> list[str]:
    names = [name.strip() for name in (given or "").split(",") if name.strip()]
    if unknown := [name for name in names if name not in allowed]:
        raise typer.BadParameter(
            f"--{option}: there is no {', '.join(unknown)}; there are: {', '.join(allowed)}"
        )
    return names


def _numbers(
    given: str, option: str = "concurrency", least: int = 1, most: int = 1024
) -> list[int]:
    try:
        numbers = sorted({int(part) for part in given.split(",")})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < least or numbers[-1] > most:
        raise typer.BadParameter(
            f"--{option}: {given!r}; give numbers from {least} to {most} with commas between"
        )
    return numbers


def _keep(part: str, what: object) -> None:
    path = CACHE / f"{part}-{now().replace(':', '').replace('+0000', 'Z')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(what)))
    _say(f"the figures are kept in {path}")


def _trend(one: Trend) -> tuple[str, ...]:
    verdict = "yes" if one.flat else "NO"
    return (one.name, f"{one.first:.1f}", f"{one.last:.1f}", f"{one.slope:+.1f}", verdict)


def _grown(one: Grown) -> tuple[str, ...]:
    verdict = {True: "yes", False: "NO", None: ""}[one.bounded]
    figures = (f"{one.before_mib:.1f}", f"{one.peak_mib:.1f}", f"{one.growth_mib:+.1f}")
    return (one.name, *figures, verdict)


def _shared(one: Shared) -> tuple[str, ...]:
    figures = (f"{one.per_s:,.0f}", f"{one.p50_ms:.2f}", f"{one.p99_ms:.2f}", f"{one.others:.0%}")
    return (one.replicas, str(one.connections), *figures, one.failure or "none")


def _draw(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _say(text: str) -> None:
    console.print(text, markup=False, highlight=False)


if __name__ == "__main__":
    main()

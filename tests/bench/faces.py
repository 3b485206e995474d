"""Faces, measured: accuracy, encoding, search, galleries, memory; and the tables of it."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from tests.bench import report
from tests.bench.faces_accuracy import Accuracy, AtThreshold, accuracy
from tests.bench.faces_encode import Encoded, Steady, encode, steady
from tests.bench.faces_replay import Enrolled, Replayed, enrol, replay
from tests.bench.faces_search import Searched, search
from tests.bench.memory import FLAT_SHARE
from tests.bench.report import Sheet
from tests.bench.results import describe_machine, now
from tests.bench.tables import Verdict

PARTS: Final = ("accuracy", "encode", "search", "galleries", "memory")
BEGIN: Final = "<!-- faces: made by `python -m tests.bench faces` -->"
END: Final = "<!-- end of faces -->"
# Bytes, of an entry with a person and without metadata; 512 of them are its vector.
_ENTRY_MAX: Final = 1_229
_REPLAY_MAX_S: Final = {100_000: 5.0, 1_000_000: 60.0}
# With fewer calls the slowest is all that there is to say.
_CALLS_FOR_P99: Final = 50
_MISSING: Final = "-"
_WAYS: Final = {
    "opencv": "OpenCV's own nets, in one process",
    "ours": "our pipeline, in one process",
    "json": "faces.encode over NATS, JSON",
    "msgpack": "faces.encode over NATS, MessagePack",
}
_ENGINES: Final = {
    "read": "one pass over the memory",
    "numpy": "numpy, product and threshold",
    "numpy-partition": "numpy, product and partition",
    "ours": "ours, threshold 0.35",
    "ours-open": "ours, threshold 0",
    "faiss": "faiss IndexFlatIP",
    "usearch": "usearch exact",
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be measured.

    Attributes:
        parts: Of `PARTS`.
        photos: A folder with a folder for each person; what packages ship if None.
        sizes: Entries of galleries, in a search and in a replay.
        images: How many a worker's memory is watched for.
        seconds: Length of a window.
        rounds: How often what is compared has its turn.
        threads: Of each engine that searches.
    """

    parts: Sequence[str]
    photos: Path | None
    sizes: Sequence[int]
    images: int
    seconds: int
    rounds: int
    threads: int


class Found(msgspec.Struct, kw_only=True):
    """All that a run has measured; of parts that were left out, nothing.

    Attributes:
        made_at: When it began, UTC, RFC 3339.
        machine: What it ran on.
        versions: Of the libraries.
        threads: Of each engine that searches.
    """

    made_at: str
    machine: dict[str, str]
    versions: dict[str, str] = {}
    threads: int = 1
    accuracy: list[Accuracy] = []
    encoded: list[Encoded] = []
    searched: list[Searched] = []
    replayed: list[Replayed] = []
    enrolled: list[Enrolled] = []
    steady: Steady | None = None


def measure(plan: Plan, found: Found, say: Callable[[str], None]) -> None:
    """Carry out a plan; `found` grows as it goes, so that a stopped run has what it has.

    Raises:
        ServerFailed: Something that was started failed.
        ValueError: There are no photos, or a library cannot be installed.
    """
    if "accuracy" in plan.parts:
        found.accuracy = accuracy(plan.photos, say)
    if "encode" in plan.parts:
        found.encoded = encode(plan.seconds, plan.rounds, say)
    if "search" in plan.parts:
        found.threads = plan.threads
        found.searched, found.versions = search(
            plan.sizes, plan.threads, plan.seconds, plan.rounds, say
        )
    if "galleries" in plan.parts:
        found.enrolled = enrol(min(plan.sizes), plan.seconds, say)
        found.replayed = replay(plan.sizes, plan.seconds, say)
    if "memory" in plan.parts:
        found.steady = steady(plan.images, say)


def begun() -> Found:
    """Return what a run has before it has measured anything."""
    return Found(made_at=now(), machine=describe_machine())


def joined(runs: Sequence[Found]) -> Found:
    """Return the parts of several runs as one; of a part that more than one has, the last."""
    whole = runs[0]
    for run in runs[1:]:
        measured = {
            name: value
            for name in run.__struct_fields__
            if (value := getattr(run, name)) and name not in {"made_at", "machine", "threads"}
        }
        whole = msgspec.structs.replace(
            whole, **measured, threads=run.threads if run.searched else whole.threads
        )
    return whole


def markdown(found: Found) -> str:
    """Return machine, tables and remarks as Markdown."""
    libraries = "".join(f", {name} {version}" for name, version in found.versions.items())
    said = f"{report.measured_on(found.made_at, found.machine)}{libraries}."
    return report.as_markdown(said, sheets(found), remarks(found))


def sheets(found: Found) -> list[Sheet]:
    """Return all tables."""
    every = [
        _accuracy(found.accuracy),
        _encoded(found.encoded),
        *_searched(found.searched, found.threads),
        _replayed(found.replayed),
        _joined(found.replayed),
        _enrolled(found.enrolled),
        _steady(found.steady),
        report.goals(verdicts(found)),
    ]
    return [sheet for sheet in every if sheet.rows]


def remarks(found: Found) -> list[str]:
    """Return what a reader must know of the figures."""
    said = []
    for one in found.accuracy[:1]:
        said.append(
            f"accuracy: {one.photos} photos of {one.persons} persons ({one.source}), "
            f"{one.rates.same:,} pairs of one person and {one.rates.different:,} of strangers; "
            "in brackets where the rate lies with 95 %"
        )
        if one.rates.same < 300:
            said.append(
                "accuracy: so few pairs show that the pipeline works, not how well; with LFW, or "
                "photos of your own, --photos DIR says more"
            )
    wrong = [one for one in found.searched if one.recall is not None and one.recall < 1]
    said += [f"search: {one.engine}, {one.entries:,}: recall {one.recall:.4f}" for one in wrong]
    if found.searched and not wrong:
        said.append("search: every engine found all of the exact ten nearest (numpy, float64)")
    return said


def verdicts(found: Found) -> list[Verdict]:
    """Return all goals, with what was measured."""
    return [
        *_goals_of_accuracy(found.accuracy),
        *_goals_of_encoding(found.encoded),
        *_goals_of_search(found.searched),
        *_goals_of_galleries(found.replayed),
        *_goals_of_memory(found.steady),
    ]


def _goals_of_accuracy(found: Sequence[Accuracy]) -> Iterator[Verdict]:
    for one in found:
        if one.embedder != "sface":
            continue
        yield Verdict(goal="sface: area under the curve", wanted=0.999, measured=one.rates.auc)
        for rate in one.rates.at_rates:
            yield Verdict(
                goal=f"sface: true matches at a false-match rate of {rate.false_match_rate:g}",
                wanted=0.98,
                measured=rate.true_match_rate,
            )
        for at in one.rates.at_thresholds[:1]:
            yield Verdict(
                goal=f"sface: false matches at {at.threshold:g}",
                wanted=0.01,
                measured=at.false_match_rate,
                at_most=True,
            )


def _goals_of_encoding(found: Sequence[Encoded]) -> Iterator[Verdict]:
    (opencv, opencv_ms), (ours, ours_ms), (product, product_ms) = (
        (
            max((one.per_s for one in found if one.way in ways), default=math.nan),
            min((one.cpu_ms for one in found if one.way in ways), default=math.nan),
        )
        for ways in (("opencv",), ("ours",), ("json", "msgpack"))
    )
    for name, per_s, cpu_ms in (
        ("OpenCV's own", opencv, opencv_ms),
        ("our pipeline in process", ours, ours_ms),
    ):
        yield Verdict(
            goal=f"faces.encode: images/s, times {name}", wanted=0.9, measured=product / per_s
        )
        yield Verdict(
            goal=f"faces.encode: CPU per image, times {name}",
            wanted=1.1,
            measured=product_ms / cpu_ms,
            at_most=True,
        )


def _goals_of_search(found: Sequence[Searched]) -> Iterator[Verdict]:
    cells = {(one.engine, one.entries, one.batch): one for one in found}
    for entries, batch in sorted({key[1:] for key in cells}):
        ours = cells["ours", entries, batch]
        for engine, wanted in (("numpy", 1.15), ("faiss", 1.0), ("usearch", 1.0)):
            other = cells[engine, entries, batch]
            yield Verdict(
                goal=f"search, {entries:,}, batch {batch}: CPU of a call, times {engine}",
                wanted=wanted,
                measured=ours.cpu_ms / other.cpu_ms,
                at_most=True,
            )


def _goals_of_galleries(found: Sequence[Replayed]) -> Iterator[Verdict]:
    for one in found:
        if one.entries in _REPLAY_MAX_S:
            yield Verdict(
                goal=f"replay of {one.entries:,} entries, s",
                wanted=_REPLAY_MAX_S[one.entries],
                measured=one.replay_s,
                at_most=True,
            )
            yield Verdict(
                goal=f"memory per entry of {one.entries:,}, bytes",
                wanted=_ENTRY_MAX,
                measured=one.bytes_per_entry,
                at_most=True,
            )


def _goals_of_memory(found: Steady | None) -> Iterator[Verdict]:
    if found is not None:
        first, last = found.trend.first, found.trend.last
        yield Verdict(
            goal=f"memory over {found.images:,} images: last, times first",
            wanted=1 + FLAT_SHARE,
            measured=last / first,
            at_most=True,
        )


def _accuracy(found: Sequence[Accuracy]) -> Sheet:
    rates = [rate.false_match_rate for rate in found[0].rates.at_rates] if found else []
    thresholds = [at.threshold for at in found[0].rates.at_thresholds] if found else []
    return Sheet(
        "Accuracy: pairs of photos",
        (
            "embedder",
            "no face",
            "AUC",
            "balanced accuracy",
            *(f"true matches at {rate:g} false" for rate in rates),
            *(f"at {threshold:g}: true / false" for threshold in thresholds),
        ),
        [
            (
                one.embedder,
                str(one.missed),
                f"{one.rates.auc:.4f}",
                f"{one.rates.balanced:.3f}",
                *(
                    f"{at.true_match_rate:.3f} (from {at.threshold:.2f})"
                    for at in one.rates.at_rates
                ),
                *(_both_rates(at) for at in one.rates.at_thresholds),
            )
            for one in found
        ],
    )


def _both_rates(at: AtThreshold) -> str:
    true, false = at.true_match_interval, at.false_match_interval
    return (
        f"{at.true_match_rate:.3f} ({true[0]:.2f} to {true[1]:.2f}) / "
        f"{at.false_match_rate:.4f} (to {false[1]:.4f})"
    )


def _encoded(found: Sequence[Encoded]) -> Sheet:
    return Sheet(
        "Encoding: a photo of 640 x 480 pixels with one face",
        ("way", "threads or callers", "images/s", "CPU per image, ms", "p50 / p99, ms"),
        [
            (
                _WAYS[one.way],
                str(one.side_by_side),
                f"{one.per_s:.1f}",
                f"{one.cpu_ms:.1f}",
                _MISSING if one.p50_ms is None else f"{one.p50_ms:.0f} / {one.p99_ms:.0f}",
            )
            for one in found
        ],
    )


def _searched(found: Sequence[Searched], threads: int) -> Iterator[Sheet]:
    batches = sorted({one.batch for one in found})
    for entries in sorted({one.entries for one in found}):
        cells = {(one.engine, one.batch): one for one in found if one.entries == entries}
        yield Sheet(
            f"Search: {entries:,} vectors of 128 values, threads: {threads}; ms of a call",
            (
                "engine",
                *(f"{batch} at once: fastest / p50 / p99" for batch in batches),
                *(f"CPU of {batch} at once" for batch in batches),
                "recall",
            ),
            [
                (
                    title,
                    *(_ms(cells[engine, batch]) for batch in batches),
                    *(_short(cells[engine, batch].cpu_ms) for batch in batches),
                    _recall(cells[engine, batches[-1]].recall),
                )
                for engine, title in _ENGINES.items()
                if (engine, batches[-1]) in cells
            ],
        )


def _ms(one: Searched) -> str:
    slowest = _short(one.p99_ms) if one.calls >= _CALLS_FOR_P99 else _MISSING
    return f"{_short(one.best_ms)} / {_short(one.p50_ms)} / {slowest}"


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def _recall(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.4f}"


def _replayed(found: Sequence[Replayed]) -> Sheet:
    return Sheet(
        "Replay: a new replica reads a gallery from the broker",
        ("entries", "s", "CPU, s", "entries/s", "memory per entry, bytes", "at its most"),
        [
            (
                f"{one.entries:,}",
                f"{one.replay_s:.1f}",
                f"{one.replay_cpu_s:.1f}",
                f"{one.entries / one.replay_s:,.0f}",
                f"{one.bytes_per_entry:,.0f}",
                _MISSING
                if one.peak_bytes_per_entry is None
                else f"{one.peak_bytes_per_entry:,.0f}",
            )
            for one in found
        ],
    )


def _joined(found: Sequence[Replayed]) -> Sheet:
    return Sheet(
        "Search in that replica: callers at a time, each waiting for its answer",
        ("entries", "callers", "asks the broker", "searches/s", "p50 / p99, ms"),
        [
            (
                f"{one.entries:,}",
                str(window.callers),
                "yes" if window.asks_broker else "no",
                f"{window.per_s:,.0f}",
                f"{_short(window.p50_ms)} / {_short(window.p99_ms)}",
            )
            for one in found
            for window in one.searches
        ],
    )


def _enrolled(found: Sequence[Enrolled]) -> Sheet:
    return Sheet(
        "Enrolment: acknowledged by the broker, each on the disk by then",
        ("callers", "entries/s", "p50 / p99, ms"),
        [
            (
                str(one.callers) if one.callers else "an import",
                f"{one.per_s:,.0f}",
                _MISSING if one.p50_ms is None else f"{one.p50_ms:.1f} / {one.p99_ms:.1f}",
            )
            for one in found
        ],
    )


def _steady(found: Steady | None) -> Sheet:
    return Sheet(
        "Memory of a worker over images of changing sizes",
        (
            "images",
            "with a face",
            "images/s",
            "first, MiB",
            "last, MiB",
            "per 1,000 images",
            "flat",
        ),
        [
            (
                f"{one.images:,}",
                f"{one.faces:,}",
                f"{one.per_s:.1f}",
                f"{one.trend.first:.1f}",
                f"{one.trend.last:.1f}",
                f"{one.trend.slope:+.2f}",
                "yes" if one.trend.flat else "NO",
            )
            for one in ([found] if found else [])
        ],
    )

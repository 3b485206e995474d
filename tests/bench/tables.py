"""What the windows come to: medians, ratios, and whether the goals are met. Pure."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from tests.bench.results import Results, Start, Window
from tests.bench.roster import BKG, DOOR, IN_PROCESS

Key = tuple[str, str, str, int]
_MIB_IDLE_MAX: Final = 250
_READY_MAX_S: Final = 2.0


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A place in the tables: medians over the windows that count.

    Attributes:
        per_s: Requests per second.
        p50_ms: Milliseconds.
        p99_ms: Milliseconds.
        cpu_us: Processor time per request, of the server.
        windows: How many windows count.
        noisy: Whether none of them was quiet.
        failure: Why there are no figures.
    """

    per_s: float = math.nan
    p50_ms: float = math.nan
    p99_ms: float = math.nan
    cpu_us: float = math.nan
    windows: int = 0
    noisy: bool = False
    failure: str | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A goal, and what was measured.

    Attributes:
        goal: What is asked for.
        wanted: The bound.
        measured: What there was; not a number where it was not measured.
        at_most: Whether the bound is one from above.
    """

    goal: str
    wanted: float
    measured: float
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        """Whether it is met; None where it was not measured."""
        if math.isnan(self.measured):
            return None
        if self.at_most:
            return self.measured <= self.wanted
        return self.measured >= self.wanted

    @property
    def margin(self) -> float:
        """By how much, as a share of the bound; below zero where it is missed."""
        distance = self.measured / self.wanted - 1
        return -distance if self.at_most else distance


def cells(windows: Sequence[Window]) -> dict[Key, Cell]:
    """Return the cell of each server, model, kind and concurrency.

    Noisy windows count only where there is no quiet one. A single failed window fails its cell:
    figures of a server that drops requests are no figures.
    """
    grouped: dict[Key, list[Window]] = defaultdict(list)
    for one in windows:
        grouped[one.peer, one.model, one.kind, one.connections].append(one)
    return {key: _cell(group) for key, group in grouped.items()}


def ratio(table: Mapping[Key, Cell], key: Key, reference: str = BKG) -> float:
    """Return requests per second of the reference over those of a cell's server.

    Not a number where one of the two has no figure.
    """
    other = table.get((reference, *key[1:]))
    mine = table.get(key)
    if other is None or mine is None or not mine.per_s > 0:
        return math.nan
    return other.per_s / mine.per_s


def starts(results: Results) -> dict[str, Start]:
    """Return the median start of each server."""
    grouped: dict[str, list[Start]] = defaultdict(list)
    for one in results.starts:
        grouped[one.peer].append(one)
    return {
        peer: Start(
            peer=peer,
            round=len(group),
            ready_s=median(one.ready_s for one in group),
            idle_mib=median(one.idle_mib for one in group),
            loaded_mib=median(one.loaded_mib for one in group),
            processes=round(median(one.processes for one in group)),
        )
        for peer, group in grouped.items()
    }


def verdicts(results: Results) -> list[Verdict]:
    """Return all goals for one worker and one gateway, with what was measured."""
    table = cells(results.windows)
    return [
        *_against_peers(table),
        *_images(table),
        *_door_and_latency(table),
        *_at_rest(results),
    ]


def _cell(group: Sequence[Window]) -> Cell:
    if failed := [one.failure for one in group if one.failure]:
        return Cell(windows=len(group), failure=failed[0])
    quiet = [one for one in group if not one.noisy]
    counted = quiet or list(group)
    return Cell(
        per_s=median(one.per_s for one in counted),
        p50_ms=_median(one.p50_ms for one in counted),
        p99_ms=_median(one.p99_ms for one in counted),
        cpu_us=_median(one.cpu_us for one in counted),
        windows=len(counted),
        noisy=not quiet,
    )


def _median(values: Iterable[float | None]) -> float:
    there = [value for value in values if value is not None]
    return median(there) if there else math.nan


def _against_peers(table: Mapping[Key, Cell]) -> list[Verdict]:
    wanted = {
        "fastapi": 2.5, "pytriton": 3.0, "mlserver": 8.0, "kserve": 8.0,
        "litserve": 15.0, "bentoml": 15.0, "ray": 15.0,
    }  # fmt: skip
    found = [
        _times(table, peer, model, connections, bound)
        for peer, bound in wanted.items()
        for model in ("tiny", "mlp")
        for connections in (16, 64)
    ]
    found += [
        _times(table, "mosec", model, connections, 1.0)
        for model in ("tiny", "mlp", "conv")
        for connections in (1, 16)
    ]
    return [
        *found,
        _times(table, "mosec", "mlp", 64, 1.0),
        _times(table, "mosec", "tiny", 64, 0.75),
    ]


def _times(
    table: Mapping[Key, Cell], peer: str, model: str, connections: int, wanted: float
) -> Verdict:
    return Verdict(
        goal=f"{model}, c={connections}: requests/s, times {peer}",
        wanted=wanted,
        measured=ratio(table, (peer, model, "json", connections)),
    )


def _images(table: Mapping[Key, Cell]) -> list[Verdict]:
    found = []
    for connections in (16, 64):
        ours = _per_s(table, (BKG, "conv", "binary", connections))
        peers = [
            cell.per_s
            for (peer, model, _, c), cell in table.items()
            if model == "conv" and c == connections and _is_peer(peer) and cell.per_s > 0
        ]
        alone = _per_s(table, (IN_PROCESS, "conv", "array", connections))
        found += [
            Verdict(
                goal=f"conv, raw tensors, c={connections}: requests/s, times the best peer",
                wanted=1.2,
                measured=ours / max(peers, default=math.nan),
            ),
            Verdict(
                goal=f"conv, raw tensors, c={connections}: share of onnxruntime in process",
                wanted=0.9,
                measured=ours / alone,
            ),
        ]
    return found


def _door_and_latency(table: Mapping[Key, Cell]) -> list[Verdict]:
    at_64, at_1 = (BKG, "tiny", "json", 64), (BKG, "tiny", "json", 1)
    door = _per_s(table, (DOOR, "tiny", "json", 64))
    return [
        Verdict(
            goal="tiny, c=64: share of the door's limit",
            wanted=0.65,
            measured=_per_s(table, at_64) / door,
        ),
        Verdict(
            goal="tiny, c=1: p50 in ms",
            wanted=0.6,
            measured=table[at_1].p50_ms if at_1 in table else math.nan,
            at_most=True,
        ),
        Verdict(
            goal="tiny, c=64: p99 in ms",
            wanted=10.0,
            measured=table[at_64].p99_ms if at_64 in table else math.nan,
            at_most=True,
        ),
    ]


def _at_rest(results: Results) -> list[Verdict]:
    ours = starts(results).get(BKG)
    return [
        Verdict(
            goal="idle with the models loaded: memory in MiB",
            wanted=_MIB_IDLE_MAX,
            measured=ours.idle_mib if ours else math.nan,
            at_most=True,
        ),
        Verdict(
            goal="seconds to the first right answer",
            wanted=_READY_MAX_S,
            measured=ours.ready_s if ours else math.nan,
            at_most=True,
        ),
    ]


def _is_peer(name: str) -> bool:
    return not name.startswith(BKG) and name not in {DOOR, IN_PROCESS}


def _per_s(table: Mapping[Key, Cell], key: Key) -> float:
    return table[key].per_s if key in table else math.nan

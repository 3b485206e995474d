"""Snapshots put together: what a plugin uses and holds as a whole, and how it was before."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from math import fsum
from typing import Any, Final

from bus.messages import BrokerTelemetry, HostTelemetry, PluginState, TelemetrySnapshot

SILENT_S: Final = 30.0


def summed(
    snapshots: Sequence[TelemetrySnapshot], state: PluginState | None
) -> TelemetrySnapshot | None:
    """Return a plugin's snapshot: the sum over the instances that live.

    Slots that nobody fills any more keep their last snapshot in the stream; they count only
    when nothing lives, and then only the newest of them. None when there is no snapshot.
    """
    slots = {place.slot for place in state.instances if place.pid} if state else set[int]()
    living = [snapshot for snapshot in snapshots if snapshot.slot in slots]
    newest = max(living or snapshots, key=lambda s: s.timestamp, default=None)
    if newest is None:
        return None
    counted = living or [newest]
    if len(counted) == 1:
        return newest
    return TelemetrySnapshot(
        plugin=newest.plugin,
        cpu=round(sum(s.cpu for s in counted), 3),
        mem_bytes=sum(s.mem_bytes for s in counted),
        timestamp=newest.timestamp,
        # What replicas share is not added up.
        models_loaded=_most(s.models_loaded for s in counted),
        datasets=_most(s.datasets for s in counted),
        entries=_most(s.entries for s in counted),
        gauges=_gauges(counted),
    )


def _most(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _gauges(snapshots: Sequence[TelemetrySnapshot]) -> dict[str, float]:
    """Add up counts; of durations, which end in their unit, take the longest."""
    names = {name for snapshot in snapshots for name in snapshot.gauges}
    return {
        name: (max if name.endswith(("_ms", "_s")) else sum)(
            snapshot.gauges[name] for snapshot in snapshots if name in snapshot.gauges
        )
        for name in sorted(names)
    }


# --- History ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Numbers of one moment.

    Attributes:
        at: When.
        numbers: Those of which a bucket gives the mean and, as `nameMax`, the largest.
        last: Gives what a bucket has of its last moment only; asked for no other.
    """

    at: datetime
    numbers: Mapping[str, float]
    last: Callable[[], Mapping[str, Any]] = dict


def downsampled(
    measured: Iterable[Measured], since: datetime, until: datetime, points: int
) -> list[dict[str, Any]]:
    """Return what was measured from `since` up to `until` in at most `points` buckets, in order.

    The buckets are equally long, and those in which nothing was measured are left out: a gap is
    shown as one. Each has `timestamp` (its beginning), `samples` (how many), the mean and the
    largest of each number, and the last of what is not averaged. What was measured outside the
    time is left out.
    """
    length = (until - since) / points
    if length <= timedelta(0):
        return []
    buckets: dict[int, list[Measured]] = {}
    for one in measured:
        if since <= one.at <= until:
            # What was measured at the very end belongs to the last bucket.
            place = min(int((one.at - since) / length), points - 1)
            buckets.setdefault(place, []).append(one)
    return [_bucket(since + place * length, buckets[place]) for place in sorted(buckets)]


def of_plugin(snapshots: Iterable[TelemetrySnapshot]) -> list[Measured]:
    """Return what a plugin used as a whole, at each moment that one of its instances told.

    To each is added what the others told last, unless they have been silent for three times as
    long as they were before, and for `SILENT_S`: those are gone.
    """
    told: dict[int | None, tuple[TelemetrySnapshot, timedelta]] = {}
    measured = []
    for snapshot in sorted(snapshots, key=lambda one: one.timestamp):
        before = told.get(snapshot.slot)
        gap = snapshot.timestamp - before[0].timestamp if before else timedelta(0)
        told[snapshot.slot] = (snapshot, max(3 * gap, timedelta(seconds=SILENT_S)))
        told = {
            slot: one
            for slot, one in told.items()
            if one[0].timestamp + one[1] >= snapshot.timestamp
        }
        living = [one for one, _ in told.values()]
        measured.append(
            Measured(
                at=snapshot.timestamp,
                numbers={
                    "cpu": sum(one.cpu for one in living),
                    "memBytes": sum(one.mem_bytes for one in living),
                },
                last=partial(_shared, living),
            )
        )
    return measured


def _shared(living: Sequence[TelemetrySnapshot]) -> dict[str, Any]:
    counts = {
        "modelsLoaded": _most(one.models_loaded for one in living),
        "datasets": _most(one.datasets for one in living),
        "entries": _most(one.entries for one in living),
    }
    return {
        **{name: count for name, count in counts.items() if count is not None},
        "instances": len(living),
        "gauges": _gauges(living),
    }


def of_host(snapshots: Iterable[HostTelemetry]) -> list[Measured]:
    """Return what a host used at each moment that it told."""
    return [
        Measured(
            at=one.timestamp,
            numbers={
                "cpu": one.cpu,
                "memUsedBytes": one.mem_total_bytes - one.mem_available_bytes,
                "load": one.load[0] if one.load else 0.0,
            },
            last=partial(
                dict,
                processors=one.processors,
                memTotalBytes=one.mem_total_bytes,
                memAvailableBytes=one.mem_available_bytes,
                diskTotalBytes=one.disk_total_bytes,
                diskFreeBytes=one.disk_free_bytes,
            ),
        )
        for one in snapshots
    ]


def of_broker(snapshots: Iterable[BrokerTelemetry]) -> list[Measured]:
    """Return what the broker kept, and how fast it was, at each moment that somebody told."""
    return [
        Measured(
            at=one.timestamp,
            numbers={"roundTripMs": one.round_trip_ms, "storedBytes": one.stored_bytes},
            last=partial(
                dict, streams=one.streams, consumers=one.consumers, limitBytes=one.limit_bytes
            ),
        )
        for one in snapshots
    ]


def _bucket(begins: datetime, measured: list[Measured]) -> dict[str, Any]:
    bucket: dict[str, Any] = {"timestamp": begins, "samples": len(measured)}
    for name in measured[0].numbers:
        values = [one.numbers[name] for one in measured]
        largest = max(values)
        # Rounding must not lift a mean above its largest value.
        bucket[name] = min(round(fsum(values) / len(values), 3), largest)
        bucket[f"{name}Max"] = largest
    newest = max(measured, key=lambda one: one.at)
    return bucket | dict(newest.last())

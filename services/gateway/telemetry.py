"""Snapshots of instances put together: what a plugin uses and holds as a whole."""

from collections.abc import Iterable, Sequence

from bus.messages import PluginState, TelemetrySnapshot


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

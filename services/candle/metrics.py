"""What models have done and hold, as series for Prometheus."""

from collections.abc import Callable, Sequence
from typing import Final

from bus.messages import ModelStatistics
from bus.metrics import Series
from services.candle.version import Version

_LABELS: Final = ("model", "version")

# Of a batch each request waited for the whole run; here a run counts once.
_COUNTED: Final[Sequence[tuple[str, str, Callable[[ModelStatistics], float]]]] = (
    ("requests", "Requests answered with outputs.", lambda m: m.inference_stats.success.count),
    ("rows", "Rows that ran.", lambda m: m.inference_count),
    ("runs", "Runs; rows by runs is the mean size of a batch.", lambda m: m.execution_count),
    (
        "queue_seconds",
        "Time that requests waited, added up.",
        lambda m: m.inference_stats.queue.ns / 1e9,
    ),
    (
        "compute_seconds",
        "Time that runs took, added up.",
        lambda m: sum(batch.compute_infer.ns for batch in m.batch_stats) / 1e9,
    ),
)
_MEASURED: Final[Sequence[tuple[str, str, Callable[[Version], float]]]] = (
    ("rows_waiting", "Rows that wait.", lambda v: v.rows_waiting),
    ("memory_bytes", "What loading it took.", lambda v: v.memory_bytes),
    ("threads", "Threads of one run.", lambda v: v.threads),
    ("ready", "Whether it answers.", lambda v: v.state == "ready"),
)


def series_of(versions: Sequence[Version]) -> list[Series]:
    """Return what these versions have done since they were loaded, and what they hold."""
    done = [(v, (v.model, v.spec.version), v.counted()) for v in versions]
    counted = [
        Series(f"model_{name}", says, _LABELS, [(key, figure(one)) for _, key, one in done])
        for name, says, figure in _COUNTED
    ]
    causes = [
        ((*key, cause), float(count))
        for _, key, one in done
        for cause, count in sorted(one.failures.items())
    ]
    failures = Series(
        "model_failures", "Requests that failed, by cause.", (*_LABELS, "cause"), causes
    )
    measured = [
        Series(
            f"model_{name}", says, _LABELS, [(key, figure(v)) for v, key, _ in done], counts=False
        )
        for name, says, figure in _MEASURED
    ]
    return [*counted, failures, *measured]

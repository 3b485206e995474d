"""What models have done and hold, as series for Prometheus and as gauges of telemetry."""

from collections.abc import Callable, Sequence
from typing import Final

from bus.messages import ModelStatistics
from bus.metrics import Series
from bus.statistics import sum_statistics
from services.candle.serving.version import Version

# In telemetry, which travels every few seconds: the models that were asked last.
TOLD_MODELS: Final = 20
PREFIX: Final = "model."

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
_MEASURED: Final[Sequence[tuple[str, str, Callable[[Sequence[Version]], float]]]] = (
    ("rows_waiting", "Rows that wait.", lambda vs: sum(v.rows_waiting for v in vs)),
    ("memory_bytes", "What loading it took.", lambda vs: sum(v.memory_bytes for v in vs)),
    ("threads", "Threads of one run.", lambda vs: max(v.threads for v in vs)),
    ("ready", "Whether it answers.", lambda vs: any(v.state == "ready" for v in vs)),
)


def series_of(versions: Sequence[Version]) -> list[Series]:
    """Return what these versions have done since they were loaded, and what they hold.

    A version can be here twice, when it is loaded anew beside itself: labels must not be.
    """
    here: dict[tuple[str, str], list[Version]] = {}
    for version in versions:
        here.setdefault((version.model, version.spec.version), []).append(version)
    done = {key: sum_statistics([v.counted() for v in same]) for key, same in here.items()}
    counted = [
        Series(f"model_{name}", says, _LABELS, [(key, figure(one)) for key, one in done.items()])
        for name, says, figure in _COUNTED
    ]
    causes = [
        ((*key, cause), float(count))
        for key, one in done.items()
        for cause, count in sorted(one.failures.items())
    ]
    failures = Series(
        "model_failures", "Requests that failed, by cause.", (*_LABELS, "cause"), causes
    )
    measured = [
        Series(
            f"model_{name}",
            says,
            _LABELS,
            [(key, figure(same)) for key, same in here.items()],
            counts=False,
        )
        for name, says, figure in _MEASURED
    ]
    return [*counted, failures, *measured]


def gauges_of(versions: Sequence[Version]) -> dict[str, float]:
    """Return what each model has done, all its versions together, under `model.<id>.<what>`.

    Of the `TOLD_MODELS` that were asked last. Times are milliseconds, added up.
    """
    # A model that is met again goes to the end.
    latest_last: dict[str, None] = {}
    for version in sorted(versions, key=lambda v: v.used_at):
        latest_last.pop(version.model, None)
        latest_last[version.model] = None
    gauges: dict[str, float] = {}
    for model in [*latest_last][-TOLD_MODELS:]:
        one = sum_statistics([v.counted() for v in versions if v.model == model])
        stats, name = one.inference_stats, f"{PREFIX}{model}"
        gauges[f"{name}.requests"] = stats.success.count
        gauges[f"{name}.failures"] = stats.fail.count
        gauges[f"{name}.queue_ms"] = round(stats.queue.ns / 1e6, 1)
        gauges[f"{name}.compute_ms"] = round(stats.compute_infer.ns / 1e6, 1)
        gauges[f"{name}.batch_rows"] = round(one.inference_count / max(1, one.execution_count), 2)
    return gauges

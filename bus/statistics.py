"""Statistics of models from several instances, made into one."""

from collections import Counter
from collections.abc import Iterable

from bus import messages as m


def sum_statistics(statistics: list[m.ModelStatistics]) -> m.ModelStatistics:
    """Return what several instances, or several versions, counted together.

    The name and the version stay where all agree, and are empty where they do not. The last
    inference is the latest of all. Nothing to add up gives zeros.
    """
    inference = [one.inference_stats for one in statistics]
    sizes: dict[int, list[m.BatchStat]] = {}
    failures: Counter[str] = Counter()
    for one in statistics:
        failures.update(one.failures)
        for batch in one.batch_stats:
            sizes.setdefault(batch.batch_size, []).append(batch)
    return m.ModelStatistics(
        name=_agreed(one.name for one in statistics),
        version=_agreed(one.version for one in statistics),
        last_inference=max((one.last_inference for one in statistics), default=0),
        inference_count=sum(one.inference_count for one in statistics),
        execution_count=sum(one.execution_count for one in statistics),
        inference_stats=m.InferenceStats(
            success=_sum(one.success for one in inference),
            fail=_sum(one.fail for one in inference),
            queue=_sum(one.queue for one in inference),
            compute_input=_sum(one.compute_input for one in inference),
            compute_infer=_sum(one.compute_infer for one in inference),
            compute_output=_sum(one.compute_output for one in inference),
        ),
        batch_stats=[
            m.BatchStat(
                batch_size=size,
                compute_input=_sum(one.compute_input for one in batches),
                compute_infer=_sum(one.compute_infer for one in batches),
                compute_output=_sum(one.compute_output for one in batches),
            )
            for size, batches in sorted(sizes.items())
        ],
        failures=dict(failures),
        queue_rows=sum(one.queue_rows for one in statistics),
        threads=sum(one.threads for one in statistics),
        instances=sum(one.instances for one in statistics),
    )


def _agreed(names: Iterable[str]) -> str:
    different = set(names)
    return different.pop() if len(different) == 1 else ""


def _sum(durations: Iterable[m.DurationStat]) -> m.DurationStat:
    each = list(durations)
    return m.DurationStat(count=sum(one.count for one in each), ns=sum(one.ns for one in each))

"""What one version of a model was asked, and what its time went into."""

import time
from typing import Final

from bus import messages as m

# Sizes up to here are told as they are, larger ones by the next power of two: whatever callers
# send, there are few of them.
EXACT_ROWS: Final = 256


class Duration:
    """A number of times, and the time that they took."""

    __slots__ = ("count", "ns")

    def __init__(self) -> None:
        self.count = 0
        self.ns = 0

    def add(self, ns: int, count: int = 1) -> None:
        """Count `count` times that took `ns` together."""
        self.count += count
        self.ns += ns

    def message(self) -> m.DurationStat:
        """Return it as it travels."""
        return m.DurationStat(count=self.count, ns=self.ns)


class Statistics:
    """Counts for one version of a model, since it was loaded here.

    The counts mean what they mean in Triton's statistics extension, so its clients can read them:
    of a batch each request counts, and each waited for the whole of it, so the time of a run
    counts once for each request in `inference_stats` and once in `batch_stats`. A run that failed
    is no inference and no execution. Not thread-safe: it belongs to the event loop.

    Args:
        name: The model.
        version: Which of its versions.

    Attributes:
        inference_count: Rows that ran.
        execution_count: Runs.
        last_inference: When the last run ended, in milliseconds since 1970.
        failures: Requests that got an error, by its code; `cancelled` are those whose caller left.
    """

    def __init__(self, name: str, version: str = "") -> None:
        self.name = name
        self.version = version
        self.inference_count = 0
        self.execution_count = 0
        self.last_inference = 0
        self.failures: dict[str, int] = {}
        self._success = Duration()
        self._fail = Duration()
        self._queue = Duration()
        self._compute = Duration(), Duration(), Duration()
        self._batches: dict[int, tuple[int, int, int, int]] = {}

    def ran(
        self, *, requests: int, rows: int, queue_ns: int, steps_ns: tuple[int, int, int]
    ) -> None:
        """Count a run that gave outputs.

        Args:
            requests: How many requests it was for.
            rows: How many rows they had together.
            queue_ns: How long they had waited, all added up.
            steps_ns: Time to put inputs together, to run the model, to take outputs apart.
        """
        self.inference_count += rows
        self.execution_count += 1
        self.last_inference = time.time_ns() // 1_000_000
        self._success.add(queue_ns + requests * sum(steps_ns), requests)
        self._queue.add(queue_ns, requests)
        for step, ns in zip(self._compute, steps_ns, strict=True):
            step.add(requests * ns, requests)
        size = rows if rows <= EXACT_ROWS else 1 << (rows - 1).bit_length()
        runs, input_ns, infer_ns, output_ns = self._batches.get(size, (0, 0, 0, 0))
        self._batches[size] = (
            runs + 1,
            input_ns + steps_ns[0],
            infer_ns + steps_ns[1],
            output_ns + steps_ns[2],
        )

    def failed(self, code: str, ns: int = 0) -> None:
        """Count a request that got an error, or whose caller left, after `ns`."""
        self._fail.add(ns)
        self.failures[code] = self.failures.get(code, 0) + 1

    def message(
        self, *, queue_rows: int = 0, threads: int = 0, instances: int = 0
    ) -> m.ModelStatistics:
        """Return all of it as it travels, with what is so just now."""
        compute_input, compute_infer, compute_output = self._compute
        return m.ModelStatistics(
            name=self.name,
            version=self.version,
            last_inference=self.last_inference,
            inference_count=self.inference_count,
            execution_count=self.execution_count,
            inference_stats=m.InferenceStats(
                success=self._success.message(),
                fail=self._fail.message(),
                queue=self._queue.message(),
                compute_input=compute_input.message(),
                compute_infer=compute_infer.message(),
                compute_output=compute_output.message(),
            ),
            batch_stats=[
                m.BatchStat(
                    batch_size=size,
                    compute_input=m.DurationStat(count=runs, ns=input_ns),
                    compute_infer=m.DurationStat(count=runs, ns=infer_ns),
                    compute_output=m.DurationStat(count=runs, ns=output_ns),
                )
                for size, (runs, input_ns, infer_ns, output_ns) in sorted(self._batches.items())
            ],
            failures=dict(self.failures),
            queue_rows=queue_rows,
            threads=threads,
            instances=instances,
        )

"""What one version of a model was asked, and what its time went into."""

import time
from typing import Final

from bus import messages as m

# Sizes up to here are told as they are, larger ones by the next power of two: whatever callers
# send, there are few of them.
EXACT_ROWS: Final = 256


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
        # Plain numbers: a run of a small model takes little longer than counting it.
        self._requests = 0
        self._queue_ns = 0
        self._input_ns = 0
        self._infer_ns = 0
        self._output_ns = 0
        self._failed_ns = 0
        # By size: runs, and the time of their steps.
        self._batches: dict[int, list[int]] = {}

    def ran(
        self,
        *,
        requests: int,
        rows: int,
        queue_ns: int,
        input_ns: int,
        infer_ns: int,
        output_ns: int,
    ) -> None:
        """Count a run that gave outputs.

        Args:
            requests: How many requests it was for.
            rows: How many rows they had together.
            queue_ns: How long they had waited, all added up.
            input_ns: Time to put their inputs together.
            infer_ns: Time of the model.
            output_ns: Time to take the outputs apart.
        """
        self.inference_count += rows
        self.execution_count += 1
        self.last_inference = time.time_ns() // 1_000_000
        self._requests += requests
        self._queue_ns += queue_ns
        self._input_ns += requests * input_ns
        self._infer_ns += requests * infer_ns
        self._output_ns += requests * output_ns
        size = rows if rows <= EXACT_ROWS else 1 << (rows - 1).bit_length()
        batches = self._batches.get(size)
        if batches is None:
            batches = self._batches[size] = [0, 0, 0, 0]
        batches[0] += 1
        batches[1] += input_ns
        batches[2] += infer_ns
        batches[3] += output_ns

    def failed(self, code: str, ns: int = 0) -> None:
        """Count a request that got an error, or whose caller left, after `ns`."""
        self._failed_ns += ns
        self.failures[code] = self.failures.get(code, 0) + 1

    def message(
        self, *, queue_rows: int = 0, threads: int = 0, instances: int = 0
    ) -> m.ModelStatistics:
        """Return all of it as it travels, with what is so just now."""
        done = self._requests
        done_ns = self._queue_ns + self._input_ns + self._infer_ns + self._output_ns
        return m.ModelStatistics(
            name=self.name,
            version=self.version,
            last_inference=self.last_inference,
            inference_count=self.inference_count,
            execution_count=self.execution_count,
            inference_stats=m.InferenceStats(
                success=m.DurationStat(count=done, ns=done_ns),
                fail=m.DurationStat(count=sum(self.failures.values()), ns=self._failed_ns),
                queue=m.DurationStat(count=done, ns=self._queue_ns),
                compute_input=m.DurationStat(count=done, ns=self._input_ns),
                compute_infer=m.DurationStat(count=done, ns=self._infer_ns),
                compute_output=m.DurationStat(count=done, ns=self._output_ns),
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

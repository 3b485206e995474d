"""What an instance counts, and its figures in Prometheus' words."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import psutil
from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


@dataclass
class Calls:
    """What a capability was asked, counted since the process began.

    Attributes:
        requests: All of them.
        errors: Those that were refused or failed.
        busy_ns: Time that they took, all added up.
        in_flight: Those being worked on.
    """

    requests: int = 0
    errors: int = 0
    busy_ns: int = 0
    in_flight: int = 0


@dataclass(frozen=True)
class Series:
    """A metric of a plugin's own, with one value for each set of labels.

    Attributes:
        name: Its name behind `bkg_`, without `_total`.
        description: What it counts or measures.
        labels: The names of its labels.
        values: The values of the labels, and the figure.
        counts: Whether it only ever grows while the process lives.
    """

    name: str
    description: str
    labels: tuple[str, ...]
    values: Sequence[tuple[tuple[str, ...], float]]
    counts: bool = True


@dataclass(frozen=True)
class Figures(Collector):
    """What an instance counts and measures.

    Attributes:
        labels: On every metric: plugin and slot.
        identity: Who tells, in words.
        ready: Whether it can do its work just now.
        connected: Whether the broker is connected.
        lag_s: How late the event loop was at the last heartbeat.
        oldest_s: Age of the oldest request being worked on.
        counts: What the instance holds, by its own names.
        gauges: Its further numbers, by its own names.
        calls: What each capability was asked.
        series: Metrics of the plugin's own.
    """

    labels: Mapping[str, str]
    identity: Mapping[str, str]
    ready: bool
    connected: bool
    lag_s: float
    oldest_s: float
    counts: Mapping[str, float]
    gauges: Mapping[str, float]
    calls: Mapping[str, Calls]
    series: Sequence[Series] = ()

    def text(self) -> bytes:
        """Return all of it, and what the process uses, in Prometheus' text format."""
        return generate_latest(self)

    def collect(self) -> Iterable[Metric]:
        """Return the metrics. Their names are relied upon: add, never rename."""
        by_capability = {
            name: [(capability, getattr(made, name)) for capability, made in self.calls.items()]
            for name in ("requests", "errors", "in_flight")
        }
        seconds = [(capability, made.busy_ns / 1e9) for capability, made in self.calls.items()]
        yield self._info()
        yield from self._process()
        yield self._gauge("ready", "Whether it can do its work just now.", self.ready)
        yield self._gauge("broker_connected", "Whether the broker is connected.", self.connected)
        yield self._gauge("event_loop_lag_seconds", "How late the event loop was.", self.lag_s)
        yield self._gauge("oldest_request_seconds", "Age of the oldest request.", self.oldest_s)
        yield self._each(
            CounterMetricFamily, "requests", "Requests that came.",
            "capability", by_capability["requests"],
        )  # fmt: skip
        yield self._each(
            CounterMetricFamily, "request_errors", "Requests that were refused or failed.",
            "capability", by_capability["errors"],
        )  # fmt: skip
        yield self._each(
            CounterMetricFamily, "request_seconds", "Time that requests took, added up.",
            "capability", seconds,
        )  # fmt: skip
        yield self._each(
            GaugeMetricFamily, "requests_in_flight", "Requests being worked on.",
            "capability", by_capability["in_flight"],
        )  # fmt: skip
        # The instance's own names are values of a label: whatever they are, no metric breaks.
        yield self._each(
            GaugeMetricFamily, "count", "What it holds.", "name", self.counts.items()
        )  # fmt: skip
        yield self._each(
            GaugeMetricFamily, "gauge", "Further numbers.", "name", self.gauges.items()
        )  # fmt: skip
        for series in self.series:
            kind = CounterMetricFamily if series.counts else GaugeMetricFamily
            family = kind(
                f"bkg_{series.name}", series.description, labels=[*self.labels, *series.labels]
            )
            for values, figure in series.values:
                family.add_metric([*self.labels.values(), *values], figure)
            yield family

    def _process(self) -> Iterator[Metric]:
        process = psutil.Process()
        with process.oneshot():
            times = process.cpu_times()
            cpu = CounterMetricFamily(
                "bkg_process_cpu_seconds", "Processor time of the process.", labels=[*self.labels]
            )
            cpu.add_metric([*self.labels.values()], times.user + times.system)
            yield cpu
            yield self._gauge(
                "process_resident_memory_bytes", "Resident memory.", process.memory_info().rss
            )
            yield self._gauge(
                "process_start_time_seconds", "Seconds since 1970.", process.create_time()
            )
            yield self._gauge("process_threads", "Its threads.", process.num_threads())
            # Windows counts something else.
            if hasattr(process, "num_fds"):
                yield self._gauge(
                    "process_open_fds", "Its open files and sockets.", process.num_fds()
                )

    def _info(self) -> Metric:
        info = GaugeMetricFamily(
            "bkg_instance_info", "Who tells.", labels=[*self.labels, *self.identity]
        )
        info.add_metric([*self.labels.values(), *self.identity.values()], 1)
        return info

    def _gauge(self, name: str, help_text: str, value: float) -> Metric:
        gauge = GaugeMetricFamily(f"bkg_{name}", help_text, labels=[*self.labels])
        gauge.add_metric([*self.labels.values()], value)
        return gauge

    def _each(
        self,
        kind: type[CounterMetricFamily] | type[GaugeMetricFamily],
        name: str,
        help_text: str,
        label: str,
        values: Iterable[tuple[str, float]],
    ) -> Metric:
        family = kind(f"bkg_{name}", help_text, labels=[*self.labels, label])
        for key, value in values:
            family.add_metric([*self.labels.values(), key], value)
        return family

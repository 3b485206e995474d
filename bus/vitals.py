"""How an instance is: heartbeats, telemetry, and what its probes tell."""

import asyncio
import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any, Final

from bus import messages as m
from bus.client import Client
from bus.errors import Unavailable
from bus.metrics import Figures, Series
from bus.serving import Serving
from bus.subjects import HEALTH, TELEMETRY
from bus.telemetry import Sampler

HEARTBEAT_S: Final = 1.0


class Vitals:
    """The signs of life of one instance.

    Args:
        client: The connection.
        asked: What it serves, and works on.
        registration: Gives what it is registered as, as that is now.
        telemetry_s: Time between snapshots.

    Attributes:
        counts: `models_loaded`, `datasets` or `entries`, for telemetry.
        gauges: Further numbers for telemetry.
        series: Give further metrics for Prometheus, whenever somebody asks.
    """

    def __init__(
        self,
        client: Client,
        asked: Serving,
        registration: Callable[[], m.Registration],
        telemetry_s: float,
    ) -> None:
        self.counts: dict[str, int] = {}
        self.gauges: dict[str, float] = {}
        self.series: list[Callable[[], Sequence[Series]]] = []
        self._client = client
        self._asked = asked
        self._registration = registration
        self._telemetry_s = telemetry_s
        self._telemetry_changed = asyncio.Event()
        self._lag_ms = 0.0
        self._worst_lag_ms = 0.0

    def report_every(self, telemetry_s: float) -> None:
        """Go on with another time between snapshots, at once."""
        self._telemetry_s = telemetry_s
        self._telemetry_changed.set()

    async def beat(self) -> None:
        """Say once a second that the instance lives, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + HEARTBEAT_S
            await asyncio.sleep(HEARTBEAT_S)
            self._lag_ms = max(0.0, 1e3 * (loop.time() - due))
            self._worst_lag_ms = max(self._worst_lag_ms, self._lag_ms)
            who = self._registration()
            beat = m.Heartbeat(
                plugin=who.plugin,
                slot=who.slot,
                id=who.id,
                host=who.host,
                pid=os.getpid(),
                status=who.status,
                in_flight=self._asked.in_flight,
                oldest_s=self._asked.oldest_s(),
                lag_ms=round(self._lag_ms, 1),
                generation=who.generation,
                timestamp=m.now(),
            )
            if self._client.connected:
                with contextlib.suppress(Unavailable):
                    await self._client.publish(HEALTH, beat, plugin=who.plugin, slot=who.slot)

    async def report(self) -> None:
        """Send telemetry, for ever."""
        sampler = Sampler()
        while True:
            # Half a period first, so that a new instance shows up early.
            await self._half_a_period()
            if self._client.connected:
                who, snapshot = self._registration(), self._snapshot(sampler)
                with contextlib.suppress(Unavailable):
                    await self._client.publish(
                        TELEMETRY, snapshot, plugin=who.plugin, slot=who.slot
                    )
            await self._half_a_period()

    def missing(self) -> list[str]:
        """Return why this instance is not ready; nothing when it is."""
        status = self._registration().status
        found = [] if status == "running" else [f"the instance is {status}"]
        return found if self._client.connected else [*found, "the broker is away"]

    def about(self) -> dict[str, Any]:
        """Return who this is, and how busy."""
        who = self._registration()
        return {
            "plugin": who.plugin,
            "slot": who.slot,
            "instance": who.id,
            "version": who.version,
            "state": who.status,
            "in_flight": self._asked.in_flight,
            "oldest_s": self._asked.oldest_s(),
        }

    def metrics(self) -> bytes:
        """Return the figures for Prometheus."""
        who = self._registration()
        return Figures(
            labels={"plugin": who.plugin, "slot": str(who.slot)},
            identity={"instance": who.id, "host": who.host, "version": who.version},
            ready=not self.missing(),
            connected=self._client.connected,
            lag_s=self._lag_ms / 1e3,
            oldest_s=self._asked.oldest_s(),
            counts=self.counts,
            gauges=self.gauges,
            calls=self._asked.calls,
            series=[one for give in self.series for one in give()],
        ).text()

    async def _half_a_period(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._telemetry_s / 2):
                # A long period ends when a shorter one is wanted.
                await self._telemetry_changed.wait()
        self._telemetry_changed.clear()

    def _snapshot(self, sampler: Sampler) -> m.TelemetrySnapshot:
        who, used = self._registration(), sampler.sample()
        lag_ms, self._worst_lag_ms = self._worst_lag_ms, 0.0
        return m.TelemetrySnapshot(
            plugin=who.plugin,
            cpu=used.cpu,
            mem_bytes=used.mem_bytes,
            timestamp=m.now(),
            slot=who.slot,
            instance=who.id,
            host=who.host,
            gauges={
                "in_flight": self._asked.in_flight,
                "requests": sum(served.requests for served in self._asked.served.values()),
                "errors": sum(served.errors for served in self._asked.served.values()),
                "loop_lag_ms": round(lag_ms, 1),
                **used.gauges,
                **self.gauges,
            },
            models_loaded=self.counts.get("models_loaded"),
            datasets=self.counts.get("datasets"),
            entries=self.counts.get("entries"),
        )

"""What workers print, and what is to be said of them, on its way into their logs."""

import asyncio
import contextlib

import structlog

from bus import messages as m
from bus.client import Client
from bus.errors import BusError
from bus.logs import publish_log
from services.supervisor.reconcile import Key

LINES_WAITING = 10_000

log = structlog.get_logger("supervisor.lines")


class Lines:
    """A bounded queue of log records, shipped in their order; what it cannot hold is counted.

    Args:
        client: The connection.
        host: This host.
    """

    def __init__(self, client: Client, host: str) -> None:
        self._client = client
        self._host = host
        self._waiting: asyncio.Queue[m.LogEvent] = asyncio.Queue(LINES_WAITING)
        self._lost = 0

    def put(
        self,
        key: Key,
        level: m.Level,
        message: str,
        *,
        logger: str,
        fields: dict[str, object] | None = None,
    ) -> None:
        """Queue a record for the log of a place."""
        record = m.LogEvent(
            plugin=key.plugin,
            level=level,
            message=message,
            timestamp=m.now(),
            slot=key.slot,
            host=self._host,
            logger=logger,
            fields=fields or {},
        )
        try:
            self._waiting.put_nowait(record)
        except asyncio.QueueFull:
            self._lost += 1

    async def ship(self) -> None:
        """Bring records into the log, for ever."""
        while True:
            record = await self._waiting.get()
            try:
                with contextlib.suppress(BusError):
                    await publish_log(self._client, record)
            finally:
                self._waiting.task_done()
            if self._lost:
                lost, self._lost = self._lost, 0
                log.warning("lines.dropped", dropped=lost)

    async def shipped(self) -> None:
        """Wait until nothing is left."""
        await self._waiting.join()

"""The log stream: records by plugin, slot and level, searched by its newest or its oldest."""

import asyncio
import contextlib
from datetime import datetime
from typing import Final

import msgspec

from bus import codec
from bus import messages as m
from bus.errors import InvalidRequest
from bus.log_search import LEVELS, LogPage, LogQuery
from bus.streams import Stored, Stream, nanoseconds
from bus.subjects import LOG

# The newest records are looked for in pieces of the stream, the last piece first.
PIECE_RECORDS: Final = 5_000
PIECE_MAX_RECORDS: Final = 50_000
# A search that takes longer answers with what it has, and where to go on.
SEARCH_S: Final = 5.0


class LogStream:
    """What of log records is kept in the broker.

    Args:
        stream: The stream behind it.
        root: The deployment's root token.
    """

    def __init__(self, stream: Stream, root: str) -> None:
        self.name = stream.name
        self._stream = stream
        self._root = root

    async def search(self, query: LogQuery) -> LogPage:
        """Return the records that somebody looks for: the newest or the oldest of them.

        A search that has taken `SEARCH_S` ends with what it has found, and says where to go on.
        """
        deadline = asyncio.get_running_loop().time() + SEARCH_S
        if query.oldest:
            return await self._first_logs(query, deadline)
        return await self._newest_logs(query, deadline)

    async def _newest_logs(self, query: LogQuery, deadline: float) -> LogPage:
        """Read the stream in pieces, the last one first, until enough was found."""
        loop = asyncio.get_running_loop()
        first, last = await self._stream.bounds()
        below = min(last + 1, query.before) if query.before is not None else last + 1
        floor, next_after = max(query.after or 0, first - 1), below - 1
        if query.since is not None:
            floor = max(floor, await self._before(query.since, last))
        found: list[m.LogEvent] = []
        piece = max(PIECE_RECORDS, query.limit)
        while below - 1 > floor and len(found) < query.limit:
            start = max(floor, below - 1 - piece)
            more, examined = await self._piece(query, start, below)
            found = more + found
            below = start + 1
            # The rings leave wide holes in the numbers: pieces grow while little is in them.
            if examined < PIECE_MAX_RECORDS:
                piece *= 16 if examined < piece // 16 else 4
            # Behind the first piece, so that the one who asks again gets on.
            if loop.time() > deadline:
                break
        if len(found) > query.limit:
            found = found[-query.limit :]
            below = found[0].seq or below
        if query.until is not None and found:
            next_after = found[-1].seq or next_after
        complete = below - 1 <= floor
        return LogPage(found, next_after, None if complete else below, complete)

    async def _first_logs(self, query: LogQuery, deadline: float) -> LogPage:
        loop = asyncio.get_running_loop()
        found: list[m.LogEvent] = []
        since, until = nanoseconds(query.since), nanoseconds(query.until)
        after = query.after or 0
        reading = self._stream.read(self._log_subjects(query), after=after, since=query.since)
        async with contextlib.aclosing(reading) as messages:  # type: ignore[type-var]
            async for stored in messages:
                if query.before is not None and stored.seq >= query.before:
                    break
                if until is not None and stored.at >= until:
                    break
                after = stored.seq
                record = _record(stored)
                if record and (since is None or stored.at >= since) and query.matches(record):
                    found.append(record)
                if len(found) == query.limit or loop.time() > deadline:
                    return LogPage(found, next_after=after, complete=False)
        return LogPage(found, next_after=after)

    async def _piece(self, query: LogQuery, after: int, below: int) -> tuple[list[m.LogEvent], int]:
        """Return what fits between two sequences, both left out, and how much was looked at."""
        until = nanoseconds(query.until)
        found: list[m.LogEvent] = []
        examined = 0
        reading = self._stream.read(self._log_subjects(query), after=after)
        async with contextlib.aclosing(reading) as messages:  # type: ignore[type-var]
            async for stored in messages:
                if stored.seq >= below or (until is not None and stored.at >= until):
                    break
                examined += 1
                if (record := _record(stored)) is not None and query.matches(record):
                    found.append(record)
        return found, examined

    async def _before(self, since: datetime, last: int) -> int:
        """Return the sequence of the last record that was stored before a moment."""
        reading = self._stream.read(LOG.subject(self._root), since=since)
        async with contextlib.aclosing(reading) as messages:  # type: ignore[type-var]
            async for stored in messages:
                return stored.seq - 1
        return last

    def _log_subjects(self, query: LogQuery) -> str | list[str]:
        named: dict[str, str | int] = {}
        if query.plugin is not None:
            named["plugin"] = query.plugin
        if query.slot is not None:
            named["slot"] = query.slot
        if len(query.levels) == len(LEVELS):
            return LOG.subject(self._root, **named)
        return [LOG.subject(self._root, level=level, **named) for level in query.levels]

    async def append(self, record: m.LogEvent, *, once: str) -> None:
        """Store a record and wait until it is; under the same name again, it is there once.

        Raises:
            Unavailable: The broker did not store it in time.
        """
        subject = LOG.subject(
            self._root, plugin=record.plugin, slot=record.slot or 0, level=record.level
        )
        await self._stream.append(subject, codec.encode(record), headers={"Nats-Msg-Id": once})


def _record(stored: Stored) -> m.LogEvent | None:
    """Return a stored log record; None for what somebody published by hand: it may be anything."""
    try:
        record = codec.decode(stored.body, m.LogEvent)
    except InvalidRequest:
        return None
    return msgspec.structs.replace(record, seq=stored.seq)

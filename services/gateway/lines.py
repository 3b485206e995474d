"""Log records on their way to listeners: encoded once, framed once for all who want the same."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from bus import codec
from bus.log_search import LEVELS
from bus.messages import Level, LogEvent

# Whose records (None: everybody's), and the least level.
Wanted = tuple[str | None, Level]


@dataclass(frozen=True, slots=True)
class Line:
    """A log record, encoded; or a hole in the sequence, which concerns every listener.

    Attributes:
        seq: The stream's number.
        plugin: Who speaks.
        level: How bad.
        json: The `LogEvent`, or the `Gap`.
        is_gap: Which of the two.
    """

    seq: int
    plugin: str
    level: Level
    json: bytes
    is_gap: bool = False

    def fits(self, wanted: Iterable[Wanted]) -> bool:
        """Tell whether one of several wishes is for this record."""
        return self.is_gap or any(
            plugin in (None, self.plugin) and LEVELS.index(self.level) >= LEVELS.index(level)
            for plugin, level in wanted
        )


class Gap(msgspec.Struct, frozen=True, omit_defaults=True):
    """Records from one sequence to another, both included, may be missing; of logs if not said."""

    first: int = msgspec.field(name="from")
    last: int = msgspec.field(name="to")
    topic: str | None = None


class Framing(Protocol):
    """How events become the bytes of a connection."""

    def event(self, kind: bytes, payload: bytes) -> bytes:
        """Return one event."""

    def lines(self, lines: Iterable[Line], *, batch: bool) -> bytes:
        """Return log records and gaps; with `batch` records may share a frame."""


@dataclass
class Tick:
    """The log records of one tick, and what was already made of them."""

    lines: list[Line]
    _selected: dict[frozenset[Wanted], list[Line]] = field(default_factory=dict)
    _framed: dict[tuple[frozenset[Wanted], Framing, bool], bytes] = field(default_factory=dict)

    def select(self, wanted: frozenset[Wanted]) -> list[Line]:
        """Return the records that a listener wants."""
        if wanted not in self._selected:
            self._selected[wanted] = [line for line in self.lines if line.fits(wanted)]
        return self._selected[wanted]

    def framed(self, wanted: frozenset[Wanted], framing: Framing, *, batch: bool) -> bytes:
        """Return them as bytes, the same object for all listeners that want the same."""
        key = (wanted, framing, batch)
        if key not in self._framed:
            self._framed[key] = framing.lines(self.select(wanted), batch=batch)
        return self._framed[key]


@dataclass
class Tail:
    """A listener's wish for log records.

    Attributes:
        wanted: Whose, and from which level.
        batch: Whether several may come in one frame.
        asked: The wish as it was said, to recognise it when it is said again.
        pending: What came while the back-fill is read; None once the two are joined.
    """

    wanted: Wanted
    batch: bool
    asked: object
    pending: list[Line] | None = field(default_factory=list)


def line_of(event: LogEvent, seq: int) -> Line:
    """Return a log record as it is told, with the stream's number."""
    if event.seq != seq:
        event = msgspec.structs.replace(event, seq=seq)
    return Line(seq, event.plugin, event.level, codec.encode(event))


def hole(first: int, last: int) -> Line:
    """Return the word that records from one sequence to another, both included, may be missing."""
    return Line(last, "", "error", codec.encode(Gap(first, last)), is_gap=True)

"""One connection that follows feeds: what it wants, and what it is owed while it is too slow.

It has a budget of bytes that wait in its connection: above it, log records are dropped and named in
a `gap`, and of states and telemetry only the newest is sent later. Where a back-fill meets what is
new, the two are joined by sequence: each record comes once, in order.
"""

from collections import deque
from collections.abc import Callable
from typing import Final

from bus import codec
from bus.messages import Event
from services.gateway.lines import Framing, Gap, Line, Tail, Tick, Wanted

BUDGET_BYTES: Final = 4 * 1024 * 1024
# A listener that asks without reading is cut off when this many budgets wait for it.
BUDGETS_MAX: Final = 4
PENDING_MAX: Final = 20_000
EVENTS_PENDING_MAX: Final = 1_000
EVENTS_OWED_MAX: Final = 200


class Listener:
    """A connection that follows feeds.

    Args:
        write: Puts bytes into the connection's buffer.
        waiting: Tells how many bytes wait there.
        abort: Cuts the connection.
        framing: How events become bytes.
        budget_bytes: How many may wait before it counts as too slow.

    Attributes:
        states: Plugins whose states it wants; None in it: all.
        telemetry: The same for telemetry.
        tails: Its wishes for log records, by plugin.
        events: Plugins whose events it wants; None in it: all, those of hosts too.
        jobs: Whether it wants jobs.
    """

    def __init__(
        self,
        *,
        write: Callable[[bytes], None],
        waiting: Callable[[], int],
        abort: Callable[[], None],
        framing: Framing,
        budget_bytes: int = BUDGET_BYTES,
    ) -> None:
        self.states: set[str | None] = set()
        self.telemetry: set[str | None] = set()
        self.tails: dict[str | None, Tail] = {}
        self.events: set[str | None] = set()
        self.jobs = False
        self._write = write
        self._waiting = waiting
        self._abort = abort
        self._framing = framing
        self._budget_bytes = budget_bytes
        self._live: frozenset[Wanted] = frozenset()
        self._batch = False
        # Sequences that a back-fill brought before the live feed did, and where a back-fill that
        # was cut to its limit begins: what is older was not asked for.
        self._seen: set[int] = set()
        self._cut: dict[Wanted, int] = {}
        self._lost: tuple[int, int] | None = None
        self._owed: dict[tuple[bytes, str], bytes] = {}
        # Events that wait: while a back-fill is read, and while it is too slow.
        self._events_pending: deque[Event] | None = None
        self._events_owed: deque[Event] = deque()
        self._events_lost: tuple[int, int] | None = None
        self._events_told: set[int] = set()

    @property
    def slow(self) -> bool:
        """Whether more bytes wait than it may have."""
        return self._waiting() > self._budget_bytes

    @property
    def behind(self) -> bool:
        """Whether it has not been told everything, because it was slow."""
        return self._lost is not None or bool(self._owed or self._events_owed)

    @property
    def listens(self) -> bool:
        """Whether it asked for anything."""
        return bool(self.states or self.telemetry or self.tails or self.events or self.jobs)

    def send(self, kind: bytes, payload: bytes) -> None:
        """Send one event, however much waits."""
        self._put(self._framing.event(kind, payload))

    def tell(self, kind: bytes, name: str, payload: bytes) -> None:
        """Send the newest of a plugin's state or telemetry, or of a job, now or when there is room.

        Of what is owed only the newest is kept: as much as there are plugins and jobs.
        """
        if self.slow:
            self._owed[kind, name] = payload
        else:
            self._owed.pop((kind, name), None)
            self.send(kind, payload)

    def tell_lines(self, tick: Tick) -> None:
        """Send a tick's log records as far as they are wanted, or remember that they are lost."""
        for tail in self.tails.values():
            if tail.pending is not None:
                tail.pending += [
                    line for line in tick.select(frozenset([tail.wanted]))
                    if line.is_gap or not line.fits(self._live)
                ]  # fmt: skip
                if len(tail.pending) > PENDING_MAX:
                    self._lose(tail.pending[0].seq, tail.pending[-PENDING_MAX].seq)
                    del tail.pending[:-PENDING_MAX]
        if not self._live:
            return
        lines = tick.select(self._live)
        if self._seen:
            lines = [line for line in lines if line.is_gap or not self._is_told(line)]
            if tick.lines[-1].seq >= max(self._seen):
                self._seen.clear()
                self._cut.clear()
        if not lines:
            return
        if self.slow:
            self._lose(lines[0].seq, lines[-1].seq)
            return
        self.catch_up()
        if len(lines) == len(tick.select(self._live)):
            self._put(tick.framed(self._live, self._framing, batch=self._batch))
        else:
            self._put(self._framing.lines(lines, batch=self._batch))

    def tell_event(self, event: Event) -> None:
        """Send an event, if it is wanted: now, or when the back-fill is there, or there is room."""
        if not wants_event(self.events, event):
            return
        seq = event.seq or 0
        if self._events_pending is not None:
            self._events_pending.append(event)
        elif seq in self._events_told:
            self._events_told.discard(seq)
        elif self.slow:
            self._events_owed.append(event)
            if len(self._events_owed) > EVENTS_OWED_MAX:
                lost = self._events_owed.popleft().seq or 0
                self._events_lost = (self._events_lost[0] if self._events_lost else lost, lost)
        else:
            self.catch_up()
            self.send(b"events", codec.encode(event))

    def hold_events(self) -> None:
        """Let events wait until `join_events`."""
        self._events_pending = deque(maxlen=EVENTS_PENDING_MAX)

    def join_events(self, history: list[Event]) -> None:
        """Send a back-fill of events, and what came meanwhile, each once and in order."""
        pending, self._events_pending = self._events_pending or (), None
        joined = {event.seq or 0: event for event in (*history, *pending)}
        for seq in sorted(joined):
            self.send(b"events", codec.encode(joined[seq]))
        # The feed may bring some of them yet: the stream was read faster than it is followed.
        self._events_told = {e.seq or 0 for e in history} - {e.seq or 0 for e in pending}

    def catch_up(self) -> None:
        """Say what it was too slow for, when there is room again."""
        if self.slow or not self.behind:
            return
        if self._lost is not None:
            self.send(b"gap", codec.encode(Gap(*self._lost)))
            self._lost = None
        owed, self._owed = self._owed, {}
        for (kind, _), payload in owed.items():
            self.send(kind, payload)
        if self._events_lost is not None:
            self.send(b"gap", codec.encode(Gap(*self._events_lost, topic="events")))
            self._events_lost = None
        events, self._events_owed = self._events_owed, deque()
        for event in events:
            self.send(b"events", codec.encode(event))

    def start(self, tail: Tail) -> None:
        """Take up a wish; what comes from now on waits for `join`."""
        self.tails[tail.wanted[0]] = tail
        self._rework()

    def join(self, tail: Tail, history: list[Line], told: int, *, cut: bool = False) -> None:
        """Send a wish's back-fill and what came meanwhile, each record once, in order.

        Args:
            tail: The wish.
            history: The back-fill.
            told: The last sequence that the live feed has brought to listeners.
            cut: Whether there was more than the back-fill may have.
        """
        pending, tail.pending = tail.pending or [], None
        self._rework()
        if cut:
            first = next(line.seq for line in history if not line.is_gap)
            self._cut[tail.wanted] = first
            pending = [line for line in pending if line.seq >= first]
        # A gap stands before the record that follows it.
        joined = {(line.seq, not line.is_gap): line for line in (*history, *pending)}
        self._seen.update(line.seq for line in history if line.seq > told)
        lines = [joined[place] for place in sorted(joined)]
        self._put(self._framing.lines(lines, batch=tail.batch))

    def stop(self, plugin: str | None) -> None:
        """Give up a wish for a plugin's log records; for None, all of them."""
        if plugin is None:
            self.tails.clear()
        else:
            self.tails.pop(plugin, None)
        self._rework()

    def _is_told(self, line: Line) -> bool:
        if line.seq in self._seen:
            return True
        cut = {wanted for wanted, first in self._cut.items() if line.seq < first}
        return bool(cut) and not line.fits(self._live - cut)

    def _rework(self) -> None:
        live = [tail for tail in self.tails.values() if tail.pending is None]
        self._live = frozenset(tail.wanted for tail in live)
        self._batch = any(tail.batch for tail in live)

    def _lose(self, first: int, last: int) -> None:
        self._lost = (self._lost[0] if self._lost else first, last)

    def _put(self, frames: bytes) -> None:
        if not frames:
            return
        if self._waiting() > BUDGETS_MAX * self._budget_bytes:
            self._abort()
        else:
            self._write(frames)


def wants_event(wanted: set[str | None], event: Event) -> bool:
    """Tell whether somebody who wants the events of these plugins (None: all) wants this one."""
    return None in wanted or (event.kind == "plugin" and event.name in wanted)

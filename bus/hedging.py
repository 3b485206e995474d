"""Whom a request goes to; and those that may be asked twice.

Some of it cannot be known without asking: how fast a slow instance is by now, whether there are
others. What its workers say may be asked twice is sent there as a copy, whose answer nobody waits
for. And when an answer is late somebody else is asked for it as well: the hedged requests of Dean
and Barroso, "The Tail at Scale" (2013). `bus.balance` decides who, when, and how many.
"""

import time
from collections.abc import Mapping
from typing import Final

from bus.answers import Answer
from bus.balance import Choice
from bus.bodies import Reference
from bus.errors import BusError, NobodyListens
from bus.relay import Asked, Asker, Done

# What is larger is sent once.
COPIED_MAX_BYTES: Final = 1024 * 1024
# Numbers of errors that somebody else may not have.
PASSING: Final = {429, 500, 503, 504, 507}


def ask(
    asker: Asker,
    subject: str,
    body: bytes | Reference,
    headers: Mapping[str, str],
    timeout_s: float,
    done: Done,
) -> Asked:
    """Ask whoever answers a subject, and have `done` called when that is over.

    That may be before this returns.

    Args:
        asker: What is asked with.
        subject: What is asked.
        body: The question; or where it is, to be deleted when this is over.
        headers: Its headers, without those that say how long there is time.
        timeout_s: How long the answer may take.
        done: Takes the answer, or why there is none.
    """
    choice = None
    if subject.startswith(asker.calls):
        size = len(body) if type(body) is bytes else None
        if size is not None and size > COPIED_MAX_BYTES:
            size = None
        choice = asker.balance.choose(subject, time.perf_counter(), size)
    asked: Asked
    if choice is None or choice.late_s is None:
        asked = Asked(asker, subject, body, headers, timeout_s, done)
    else:
        asked = Hedged(asker, subject, body, headers, timeout_s, done, choice)
    if choice is not None:
        asked.slot = choice.slot
    asked.begin()
    return asked


class Hedged(Asked):
    """A request that may be asked twice: another one is asked as well when the answer is late.

    The first answer counts. What comes of the other only tells how fast that one is. It is not told
    to stop: every instance would hear that, and how slow is slow would stay unknown.
    """

    __slots__ = ("_choice", "_failed", "_more")

    def __init__(
        self,
        asker: Asker,
        subject: str,
        body: bytes | Reference,
        headers: Mapping[str, str],
        timeout_s: float,
        done: Done,
        choice: Choice,
    ) -> None:
        super().__init__(asker, subject, body, headers, timeout_s, done)
        self._choice = choice
        # The other one, as long as its answer is waited for.
        self._more: Copy | None = None
        # Why there is no answer to this one, as long as there may be one to the other.
        self._failed: BusError | None = None

    def begin(self) -> None:
        """Ask for the first time."""
        super().begin()
        copy, late_s = self._choice.copy, self._choice.late_s
        if copy is not None:
            self._copy(copy or None, _nobody_waits)
        if late_s is not None and not self.over:
            self._asker.late.watch(self, late_s)

    def is_late(self) -> float | None:
        """Ask somebody else as well, if that is likely to help; return when to look again."""
        if self._again or self._aside or not self.inbox or self.slot is None:
            return None
        now = time.perf_counter()
        waited_s = now - self._sent_at
        weight = self._choice.weight
        slot = self._asker.balance.more(self._subject, self.slot, waited_s, now, weight)
        if slot is None:
            return waited_s
        self._again = True
        more = self._copy(slot, self._take_other)
        self._more = None if more.over else more
        return None

    def cancel(self) -> None:
        """Wait no longer; `done` is not called any more."""
        if self._more:
            self._more.cancel()
        self._asker.late.forget(self)
        if self._failed:
            # There is nothing else to stop.
            self.over = True
        super().cancel()

    def _copy(self, slot: str | None, done: Done) -> "Copy":
        """Ask the same of somebody else; None: the group."""
        left_s = max(0.001, self.deadline - self._asker.loop.time())
        copy = Copy(self._asker, self._subject, self._body, self._headers, left_s, done)
        copy.slot = slot
        copy.begin()
        return copy

    def _take_other(self, outcome: Answer | BusError) -> None:
        self._more = None
        if isinstance(outcome, Answer):
            self._end(outcome)
            # Nobody is asked again.
            self._body = b""
        elif self._failed:
            self._end(self._failed)

    def _nobody(self, said: str) -> None:
        if self.over:
            self._tell("gone")
        else:
            super()._nobody(said)

    def _end(self, outcome: Answer | BusError) -> None:
        if self._more and isinstance(outcome, BusError) and outcome.number in PASSING:
            self._failed = outcome
            return
        self._asker.late.forget(self)
        super()._end(outcome)


class Copy(Asked):
    """The same request to somebody else: asked once, whatever comes of it."""

    __slots__ = ()

    def begin(self) -> None:
        """Ask for the only time."""
        self._again = True
        self._send()

    def _nobody(self, said: str) -> None:
        self._tell("gone")
        self._end(NobodyListens(said, retry_after_s=2))


def _nobody_waits(_outcome: Answer | BusError) -> None:
    """Take what became of a copy that was sent to find out how fast somebody is."""

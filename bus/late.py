"""Requests whose answers may come late, and one timer for all of them."""

import asyncio
import math
from typing import Final, Protocol

# How late the timer may be until that says that this process was held up, not who is asked.
HELD_UP_S: Final = 0.002
# How soon it looks again at the earliest; uvloop's clock has steps of a millisecond.
AGAIN_S: Final = 0.001


class Patient(Protocol):
    """Who waits for an answer."""

    def is_late(self) -> float | None:
        """Do something about it; return when to look again, in seconds, or None: no more."""


class Late:
    """Tells requests when their answers are late.

    A timer for each would cost more than all else about a request that is answered in time.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._due: dict[Patient, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._at = math.inf
        self._held_up = False

    def watch(self, asked: Patient, late_s: float) -> None:
        """Tell a request when its answer has not come after so long."""
        self._due[asked] = due = self._loop.time() + late_s
        if due < self._at:
            self._look_at(due)

    def forget(self, asked: Patient) -> None:
        """Tell a request nothing more."""
        self._due.pop(asked, None)

    def close(self) -> None:
        """Tell nobody anything more."""
        self._due.clear()
        if self._timer:
            self._timer.cancel()

    def _look_at(self, at: float) -> None:
        if self._timer:
            self._timer.cancel()
        self._at, self._timer = at, self._loop.call_at(at, self._look)

    def _look(self) -> None:
        now, at = self._loop.time(), self._at
        self._timer, self._at = None, math.inf
        self._held_up = now - at > HELD_UP_S and not self._held_up
        if self._held_up:
            # Answers that came meanwhile are read first.
            self._look_at(now + AGAIN_S)
            return
        for asked in [one for one, due in self._due.items() if due <= now]:
            again_s = asked.is_late()
            if again_s is None:
                self._due.pop(asked, None)
            else:
                self._due[asked] = now + again_s
        if self._due:
            self._look_at(max(min(self._due.values()), now + AGAIN_S))

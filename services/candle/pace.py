"""Whether a run is over sooner than a thread is reached, as earlier runs tell. Pure."""

from collections import deque
from typing import Final

# A run that computes so long holds the event loop up for about as long as the hop to a thread and
# back costs in all: two wake-ups, and the wait for Python's lock on each side.
QUICK_NS: Final = 200_000
# So many runs of a size are looked at, once there are some. The quickest one counts.
_REMEMBERED: Final = 8
_KNOWN: Final = 3
# What waits, and does not compute, is for a thread; but any run may be interrupted for a while.
_WAITS: Final = 20
# A run that held everybody up for so much longer must not become a habit.
_SLOW: Final = 100
_REPENTED_RUNS: Final = 200


class Pace:
    """What is known of a model's runs, by their size.

    The time that a run computes is what counts, not the time that passes: a busy machine makes any
    run look slow, and those in threads most of all, which wait for Python's lock.

    Args:
        quick_ns: How long a quick run computes at most; 0: none is quick.
    """

    def __init__(self, quick_ns: int = QUICK_NS) -> None:
        self._quick_ns = quick_ns
        # By the power of two of their rows: what they computed, and what passed.
        self._took: dict[int, deque[tuple[int, int]]] = {}
        self._not_before: dict[int, int] = {}
        self._runs = 0

    def quick(self, rows: int) -> bool:
        """Tell whether a run of so many rows is expected to be quick."""
        size = rows.bit_length()
        took = self._took.get(size)
        if took is None or len(took) < _KNOWN or self._runs < self._not_before.get(size, 0):
            return False
        # Of several runs the one that computed least.
        computed_ns, passed_ns = min(took)
        return computed_ns <= self._quick_ns and passed_ns <= _WAITS * self._quick_ns

    def ran(self, rows: int, computed_ns: int, passed_ns: int) -> None:
        """Take note of a run.

        Args:
            rows: Its rows.
            computed_ns: The processor time of the thread that ran it.
            passed_ns: The time from its beginning to its end.
        """
        if not self._quick_ns:
            return
        self._runs += 1
        size = rows.bit_length()
        took = self._took.get(size)
        if took is None:
            took = self._took[size] = deque(maxlen=_REMEMBERED)
        took.append((computed_ns, passed_ns))
        if passed_ns > _SLOW * self._quick_ns:
            self._not_before[size] = self._runs + _REPENTED_RUNS

"""Whether a run is over sooner than a thread is reached, as earlier runs tell. Pure."""

from collections import deque
from typing import Final

# A run up to here holds the event loop up less than what the hop to a thread and back costs all:
# two wake-ups, and the wait for Python's lock on each side.
QUICK_NS: Final = 150_000
# So many runs of a size are looked at. The quickest one counts: what else the machine does makes
# runs look slow, and nothing makes them look quick.
_REMEMBERED: Final = 8
_KNOWN: Final = 3
# A run that took so much longer was an exception; it must not become a habit.
_SLOW: Final = 10
_REPENTED_RUNS: Final = 200


class Pace:
    """What is known of a model's runs, by their size.

    Args:
        quick_ns: How long a quick run takes at most; 0: none is quick.
    """

    def __init__(self, quick_ns: int = QUICK_NS) -> None:
        self._quick_ns = quick_ns
        # By the power of two of their rows.
        self._took: dict[int, deque[int]] = {}
        self._not_before: dict[int, int] = {}
        self._runs = 0

    def quick(self, rows: int) -> bool:
        """Tell whether a run of so many rows is expected to be quick."""
        size = rows.bit_length()
        took = self._took.get(size)
        return (
            took is not None
            and len(took) >= _KNOWN
            and min(took) <= self._quick_ns
            and self._runs >= self._not_before.get(size, 0)
        )

    def ran(self, rows: int, took_ns: int, *, quick: bool) -> None:
        """Take note of a run.

        Args:
            rows: Its rows.
            took_ns: Its time.
            quick: Whether it was expected to be quick.
        """
        if not self._quick_ns:
            return
        self._runs += 1
        size = rows.bit_length()
        took = self._took.get(size)
        if took is None:
            took = self._took[size] = deque(maxlen=_REMEMBERED)
        took.append(took_ns)
        if quick and took_ns > _SLOW * self._quick_ns:
            self._not_before[size] = self._runs + _REPENTED_RUNS

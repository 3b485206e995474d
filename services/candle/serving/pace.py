"""Whether a run is over sooner than a thread is reached, as earlier runs tell. Pure."""

from collections import deque
from typing import Final, NamedTuple

# A run that computes so long holds the event loop up for about as long as the hop to a thread and
# back costs in all: two wake-ups, and the wait for Python's lock on each side.
QUICK_NS: Final = 200_000
# So many runs of a size are looked at, once there are some. The slowest one but one counts: one
# may have met what is no matter of the model, such as a page that had to be fetched.
_REMEMBERED: Final = 8
_KNOWN: Final = 3
# What waits, and does not compute, is for a thread; but any run may be interrupted for a while.
_WAITS: Final = 20
# A run that computed, or held everybody up, for so much longer must not become a habit.
_HEAVY: Final = 25
_SLOW: Final = 100
_REPENTED_RUNS: Final = 200


class _Took(NamedTuple):
    """What the latest runs of a size computed, and what passed meanwhile, in nanoseconds."""

    computed: deque[int]
    passed: deque[int]


class Pace:
    """What is known of a model's runs, by the size of what they are given.

    The time that a run computes is what counts, not the time that passes: a busy machine makes any
    run look slow, and those in threads most of all, which wait for Python's lock. The size is all
    elements of all inputs, not the rows: where other axes are dynamic, one row can be anything.

    Args:
        quick_ns: How long a quick run computes at most; 0: none is quick.
    """

    def __init__(self, quick_ns: int = QUICK_NS) -> None:
        self._quick_ns = quick_ns
        # By the power of two of their elements.
        self._took: dict[int, _Took] = {}
        self._not_before: dict[int, int] = {}
        self._runs = 0

    def quick(self, elements: int) -> bool:
        """Tell whether a run on so many elements is expected to be quick."""
        size = elements.bit_length()
        took = self._took.get(size)
        if took is None or len(took.computed) < _KNOWN:
            return False
        if self._runs < self._not_before.get(size, 0):
            return False
        slowest_but_one = sorted(took.computed)[-2]
        return slowest_but_one <= self._quick_ns and min(took.passed) <= _WAITS * self._quick_ns

    def ran(self, elements: int, computed_ns: int, passed_ns: int) -> None:
        """Take note of a run.

        Args:
            elements: The elements that it was given.
            computed_ns: The processor time of the thread that ran it.
            passed_ns: The time from its beginning to its end.
        """
        if not self._quick_ns:
            return
        self._runs += 1
        size = elements.bit_length()
        took = self._took.get(size)
        if took is None:
            took = self._took[size] = _Took(deque(maxlen=_REMEMBERED), deque(maxlen=_REMEMBERED))
        took.computed.append(computed_ns)
        took.passed.append(passed_ns)
        if computed_ns > _HEAVY * self._quick_ns or passed_ns > _SLOW * self._quick_ns:
            self._not_before[size] = self._runs + _REPENTED_RUNS

"""Threads that images are worked on in, and the bounded queue before them."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from bus.errors import Overloaded
from bus.telemetry import allowed

T = TypeVar("T")


class Workers:
    """As many threads as processors: onnxruntime runs with one thread, and without the GIL.

    Args:
        max_waiting: Images that may wait or be worked on; more are refused.

    Attributes:
        max_waiting: May be changed at any time.
        waiting: How many there are.
    """

    def __init__(self, max_waiting: int) -> None:
        self.max_waiting = max_waiting
        self.waiting = 0
        self._threads = ThreadPoolExecutor(processors(), "faces")

    async def run(self, work: Callable[[], T]) -> T:
        """Do work on one of the threads.

        Raises:
            Overloaded: Too many images wait already.
        """
        if self.waiting >= self.max_waiting:
            raise Overloaded(
                f"{self.waiting} images wait for this worker; max_waiting allows "
                f"{self.max_waiting}",
                retry_after_s=1,
            )
        self.waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self.waiting -= 1

    def close(self) -> None:
        """Take no more work, and drop what waits; what is being done ends by itself."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def processors() -> int:
    """Return how many processors this process may use, its control group's limit included."""
    found, _ = allowed()
    return max(1, int(found))

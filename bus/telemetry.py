"""What a process uses: processor time and memory."""

import psutil


class Sampler:
    """Reads this process."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._process.cpu_percent()

    def sample(self) -> tuple[float, int]:
        """Return percent of one core since the last call, and resident bytes."""
        with self._process.oneshot():
            return self._process.cpu_percent(), int(self._process.memory_info().rss)

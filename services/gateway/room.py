"""Room for requests whose answers are waited for: places, and memory for their bodies."""

from typing import Self

from bus.errors import Overloaded
from services.gateway.parts import Parts


class Room:
    """A place for one request while inside, and as much memory as its body turns out to need.

    Args:
        at: The gateway's parts, which count.
        places: How many requests may be waited for.
        max_bytes: What the bodies of all of them may hold.
    """

    def __init__(self, at: Parts, places: int, max_bytes: int) -> None:
        self._at = at
        self._places = places
        self._max_bytes = max_bytes
        self._held_bytes = 0

    def __enter__(self) -> Self:
        """Take the place.

        Raises:
            Overloaded: There is none.
        """
        if self._at.relaying >= self._places:
            raise full(self._at, self._places, self._max_bytes)
        self._at.relaying += 1
        return self

    def __exit__(self, *_: object) -> None:
        """Give back place and memory."""
        self._at.relaying -= 1
        self.hold(0)

    def hold(self, size: int) -> None:
        """Hold so many bytes from now on.

        Raises:
            Overloaded: There is no room for more.
        """
        more = size - self._held_bytes
        if more > 0 and self._at.relaying_bytes + more > self._max_bytes:
            raise full(self._at, self._places, self._max_bytes)
        self._at.relaying_bytes += more
        self._held_bytes = size

    def hold_at_least(self, size: int) -> None:
        """Hold so many bytes, if it is not more already; raises as `hold` does."""
        if size > self._held_bytes:
            self.hold(size)


def full(at: Parts, places: int, max_bytes: int) -> Overloaded:
    """Return what is told when there is no room."""
    return Overloaded(
        f"this gateway waits for {at.relaying} answers already; {places}, and "
        f"{max_bytes >> 20} MiB of bodies, are allowed",
        retry_after_s=1,
    )

"""What the broker keeps, for somebody who waits for an answer: soon or not at all."""

import asyncio
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from bus.client import Client
from bus.errors import Unavailable

PATIENCE_S: Final = 10.0

T = TypeVar("T")


async def stored(client: Client, asked: Coroutine[Any, Any, T], what: str) -> T:
    """Return what the broker keeps.

    Args:
        client: The connection.
        asked: Asks for it; it is not begun while the broker is away.
        what: What is asked for, in words.

    Raises:
        Unavailable: The broker is away, or did not bring it in time.
    """
    if not client.connected:
        asked.close()
        raise Unavailable(f"the broker is away, and the {what} with it", retry_after_s=2)
    try:
        async with asyncio.timeout(PATIENCE_S):
            return await asked
    except TimeoutError:
        raise Unavailable(
            f"the broker did not bring the {what} within {PATIENCE_S:g} s", retry_after_s=2
        ) from None

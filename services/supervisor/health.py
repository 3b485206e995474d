"""Asks an instance for its health on its loopback port, and says when it is to be replaced."""

import asyncio
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

import aiohttp

from bus.messages import Healthcheck

HOST: Final = "127.0.0.1"
# As long as this beyond its time-out, a check was not held up by the instance, but by us.
HELD_UP_S: Final = 1.0


@dataclass(frozen=True)
class Checked:
    """One check that is over.

    Attributes:
        age_s: Age of the instance when the check began.
        took_s: How long it took.
        failure: What was wrong, in words; None for a healthy answer.
    """

    age_s: float
    took_s: float
    failure: str | None = None


def failures_after(check: Healthcheck, failures: int, last: Checked) -> int:
    """Return how many checks in a row have failed, now that one more is over.

    A failure in the start-up grace does not count, nor does a time-out that came much later than
    it was due: then this process was held up, and knows nothing about the instance.
    """
    if last.failure is None:
        return 0
    if last.age_s < check.startup_grace_seconds:
        return failures
    if last.took_s > check.timeout_seconds + HELD_UP_S:
        return failures
    return failures + 1


async def watch(check: Healthcheck, port: int, started_at: float) -> str:
    """Check an instance again and again; return, in words, why it is to be replaced.

    Runs until then, or until cancelled: for as long as the instance's process lives.

    Args:
        check: How it is asked.
        port: Its loopback HTTP port, from its registration.
        started_at: When its process was started, by the event loop's clock.
    """
    loop = asyncio.get_running_loop()
    failures = 0
    async with aiohttp.ClientSession(
        # A new connection each time: one that is kept says nothing about who listens.
        connector=aiohttp.TCPConnector(force_close=True),
        cookie_jar=aiohttp.DummyCookieJar(),
        # `asyncio.timeout` keeps the time; aiohttp would round it up.
        timeout=aiohttp.ClientTimeout(total=None),
    ) as http:
        while True:
            began = loop.time()
            failure = await ask(http, check, port)
            last = Checked(began - started_at, loop.time() - began, failure)
            failures = failures_after(check, failures, last)
            if failures >= check.failure_threshold:
                return in_words(check, failures, failure or "")
            await asyncio.sleep(max(0.0, check.interval_seconds - last.took_s))


async def ask(http: aiohttp.ClientSession, check: Healthcheck, port: int) -> str | None:
    """Ask once; return what is wrong, in words, or None for an answer below 400."""
    try:
        async with (
            asyncio.timeout(check.timeout_seconds),
            http.get(f"http://{HOST}:{port}{check.path}", allow_redirects=False) as response,
        ):
            return None if response.status < 400 else f"was answered {_status(response.status)}"
    except TimeoutError:
        return f"gave no answer within {check.timeout_seconds:g} s"
    except aiohttp.ClientConnectorError as error:
        return f"cannot be sent to port {port}: {error.os_error.strerror or error.os_error}"
    # ValueError: a path that no request can be made of.
    except (aiohttp.ClientError, OSError, ValueError) as error:
        return f"gave no HTTP answer: {type(error).__name__}"


def in_words(check: Healthcheck, failures: int, failure: str) -> str:
    """Return why an instance is to be replaced, as a sentence for its log."""
    count = "1 health check" if failures == 1 else f"{failures} health checks in a row"
    return f"{count} failed: GET {check.path} {failure}"


def _status(status: int) -> str:
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)

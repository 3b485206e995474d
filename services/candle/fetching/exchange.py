"""One exchange over HTTP: asked of whom the rules allow, led on by redirects, read in blocks.

What goes wrong becomes an error of ours, without the address' query in it: that may be a secret.
"""

import asyncio
import contextlib
import email.message
import email.utils
import time
from collections.abc import AsyncGenerator, Collection, Iterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Final

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

from bus.errors import (
    BusError,
    InvalidRequest,
    NotAllowed,
    NotFound,
    Unavailable,
    Unprocessable,
)
from services.candle.fetching.outside import (
    Door,
    Rules,
    name_in,
    parsed,
    proxy_for,
    shown,
    trusted,
)

REDIRECTS_MAX: Final = 5
CONNECT_S: Final = 15.0
# Given on in one piece: so much, or what has come in so long.
BLOCK_BYTES: Final = 1024 * 1024
BLOCK_S: Final = 0.5
RETRY_AFTER_MAX_S: Final = 3_600.0

_REDIRECTS: Final = {301, 302, 303, 307, 308}
_HEALING: Final = {408, 425, 429}


class AnewError(Unavailable):
    """What has come before is of no use any more."""


class Exchange:
    """Asks servers for files.

    Args:
        rules: Who may be asked.
        ca_file: Further authorities to trust.
        resolver: Turns names into addresses; the system's, if not given.
    """

    def __init__(
        self, rules: Rules, ca_file: str | None = None, resolver: AbstractResolver | None = None
    ) -> None:
        self._rules = rules
        self._ca_file = ca_file
        self._resolver = resolver

    @asynccontextmanager
    async def asking(
        self, url: URL, headers: Mapping[str, str], own: Mapping[str, str], stall_s: float
    ) -> AsyncGenerator[tuple[aiohttp.ClientResponse, Mapping[str, str]]]:
        """Ask, follow redirects, and give the answer that has the file, while inside.

        Gives also the headers of the first answer, which may be a redirect.

        Args:
            url: Whom to ask for what.
            headers: Sent to whoever is asked.
            own: Sent to the host of `url` alone, with any redirect to another one left behind.
            stall_s: How long nothing may come.

        Raises:
            BusError: Nobody answered, or nobody may be asked.
        """
        at, first = url, None
        for _ in range(REDIRECTS_MAX + 1):
            sent = {"Accept-Encoding": "identity", "User-Agent": "bkg", **headers}
            if _origin(at) == _origin(url):
                sent |= own
            async with self._answer(at, sent, stall_s) as response:
                first = first or response.headers
                if response.status not in _REDIRECTS:
                    yield response, first
                    return
                at = _next(at, response)
        raise Unprocessable(f"{shown(url)} leads on more than {REDIRECTS_MAX} times")

    @asynccontextmanager
    async def _answer(
        self, url: URL, headers: Mapping[str, str], stall_s: float
    ) -> AsyncGenerator[aiohttp.ClientResponse]:
        self._rules.check_url(url)
        proxy = proxy_for(url)
        door = Door(self._rules, name_in(url))
        connector = aiohttp.TCPConnector(
            ssl=await asyncio.to_thread(trusted, self._ca_file),
            force_close=True,
            use_dns_cache=False,
            resolver=self._resolver,
            # A proxy looks names up itself, and has an address of the house.
            socket_factory=None if proxy else door.socket,
        )
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=stall_s)
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, auto_decompress=False, trust_env=False
        ) as session:
            with _in_words(url, door, stall_s):
                answering = session.get(url, headers=headers, allow_redirects=False, proxy=proxy)
                async with answering as response:
                    yield response


async def blocks_of(response: aiohttp.ClientResponse) -> AsyncGenerator[list[bytes]]:
    """Give what comes, some blocks at a time; also the last ones before it breaks off."""
    blocks: list[bytes] = []
    size, since = 0, time.monotonic()
    try:
        async for block in response.content.iter_any():
            blocks.append(block)
            size += len(block)
            if size >= BLOCK_BYTES or time.monotonic() - since >= BLOCK_S:
                yield blocks
                blocks, size, since = [], 0, time.monotonic()
    except aiohttp.ClientError:
        if blocks:
            yield blocks
        raise
    if blocks:
        yield blocks


def file_name(response: aiohttp.ClientResponse, url: URL, suffixes: Collection[str]) -> str:
    """Return what the file is called: by its address, or by what the server says.

    Raises:
        Unprocessable: None of these names ends in one of the suffixes.
    """
    disposition = email.message.Message()
    disposition["Content-Disposition"] = response.headers.get("Content-Disposition", "")
    with contextlib.suppress(UnicodeError, ValueError, LookupError):
        named = disposition.get_filename() or ""
        for path in (url.path, named, response.url.path):
            name = PurePosixPath(path.replace("\\", "/")).name
            fits = not suffixes or PurePosixPath(name).suffix.lower() in suffixes
            if name and fits and name.isprintable():
                return name[-200:]
    raise Unprocessable(
        f"{shown(url)}: the format is told by the end of the file's name; served are "
        f"{', '.join(suffixes)}",
        field="url",
    )


def refusal(response: aiohttp.ClientResponse, url: URL) -> BusError:
    """Return the error that an answer other than the file is."""
    status, where = response.status, shown(url)
    if status in (404, 410):
        return NotFound(f"{where} is not there ({status})", field="url")
    if status in (401, 403, 407):
        return NotAllowed(
            f"{where} wants other credentials ({status}); import_credentials and hf_token hold "
            "them",
            field="url",
        )
    if status == 416:
        return anew(url)
    if status in _HEALING or status >= 500:
        return Unavailable(
            f"{where} answered {status}", retry_after_s=_retry_after_s(response.headers)
        )
    return Unprocessable(f"{where} answered {status}", field="url")


def anew(url: URL) -> Unavailable:
    """Return the error for what no longer fits what has come before."""
    return AnewError(
        f"{shown(url)} has changed, or does not go on where it should; it is fetched anew",
        retry_after_s=1,
    )


def _origin(url: URL) -> tuple[str, str, int | None]:
    return url.scheme, name_in(url), url.port


def _next(url: URL, response: aiohttp.ClientResponse) -> URL:
    """Return where a redirect leads.

    Raises:
        Unprocessable: It names no place.
        NotAllowed: It leads from https to http.
    """
    try:
        to, _ = parsed(str(url.join(URL(response.headers["Location"]))))
    except (KeyError, ValueError, InvalidRequest):
        raise Unprocessable(f"{shown(url)} leads on to no address") from None
    if url.scheme == "https" and to.scheme != "https":
        raise NotAllowed(f"{shown(url)} leads from https to {shown(to)}", field="url")
    return to


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return what `Retry-After` says, in seconds or as a date."""
    said = headers.get("Retry-After", "").strip()
    if said.isascii() and said.isdecimal():
        return min(float(said[:9]), RETRY_AFTER_MAX_S)
    try:
        moment = email.utils.parsedate_to_datetime(said)
    except ValueError:
        return None
    moment = moment.replace(tzinfo=moment.tzinfo or UTC)
    wait_s = (moment - datetime.now(UTC)).total_seconds()
    return min(max(0.0, wait_s), RETRY_AFTER_MAX_S)


def _stalled(url: URL, stall_s: float) -> Unavailable:
    return Unavailable(
        f"{shown(url)} sent nothing for {stall_s:g} s (import_stall_s)", retry_after_s=1
    )


@contextlib.contextmanager
def _in_words(url: URL, door: Door, stall_s: float) -> Iterator[None]:
    """Turn what aiohttp raises into errors of ours, without the address' query in them."""
    where = shown(url)
    try:
        yield
    except aiohttp.ClientConnectorCertificateError as error:
        why = getattr(error.certificate_error, "verify_message", "") or "it is not trusted"
        raise NotAllowed(
            f"{where}: its certificate is refused: {why}; import_ca_file names further authorities",
            field="url",
        ) from None
    except (aiohttp.ServerTimeoutError, aiohttp.ConnectionTimeoutError):
        raise _stalled(url, stall_s) from None
    except aiohttp.InvalidURL:
        why = f"url: {where} is no address that can be fetched"
        raise InvalidRequest(why, field="url") from None
    except aiohttp.ClientConnectorDNSError as error:
        raise Unavailable(f"{where}: its name leads nowhere: {error.strerror}") from None
    except aiohttp.ClientConnectorError as error:
        if door.denied is not None and not door.passed:
            raise door.denied from None
        raise Unavailable(
            f"{where} cannot be reached: {error.strerror or 'refused'}", retry_after_s=1
        ) from None
    except (aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError):
        raise Unavailable(f"{where}: the connection broke off", retry_after_s=1) from None
    except aiohttp.ClientHttpProxyError as error:
        raise Unavailable(f"{where}: the proxy answered {error.status}") from None
    except aiohttp.ClientError as error:
        raise Unavailable(f"{where}: {type(error).__name__}") from None

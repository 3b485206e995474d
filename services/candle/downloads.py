"""A file fetched over HTTP to the disk: resumed where it broke off, limited, and checked.

What has come stands in a partial file, and beside it what the server called it (ETag or time of
change). The next try asks for the rest of exactly that; a server that has something else by now
sends all of it. Errors that may heal are `Unavailable`; any other one is for good.
"""

import asyncio
import contextlib
import email.message
import email.utils
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import IO, Final, Self

import aiohttp
import msgspec
from aiohttp.abc import AbstractResolver
from yarl import URL

from bus.errors import (
    BusError,
    InvalidRequest,
    NotAllowed,
    NotFound,
    TooLarge,
    Unavailable,
    Unprocessable,
)
from bus.job_rules import Progress
from bus.tasks import to_its_end
from services.candle.outside import (
    Door,
    Rules,
    name_in,
    parsed,
    proxy_for,
    shown,
    trusted,
)

MIB: Final = 1024 * 1024
REDIRECTS_MAX: Final = 5
CONNECT_S: Final = 15.0
# Written to the disk in one piece, in a thread.
BLOCK_BYTES: Final = MIB
BLOCK_S: Final = 0.5
# Left free on the disk, beside what is fetched.
ROOM_BYTES: Final = 64 * MIB
# What a job that failed has left waits so long for somebody to try again.
KEPT_S: Final = 86_400
# The rate is that of about the last seconds, and told only when there is enough to tell it from.
RATE_S: Final = 5.0
RATE_FIRST_S: Final = 2.0
RETRY_AFTER_MAX_S: Final = 3_600.0

_RANGE: Final = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_UNMET_RANGE: Final = re.compile(r"bytes \*/(\d+)")
_SHA256: Final = re.compile(r'"?([0-9a-f]{64})"?')
_REDIRECTS: Final = {301, 302, 303, 307, 308}
_HEALING: Final = {408, 425, 429}


@dataclass(frozen=True)
class Limits:
    """What a download may take.

    Attributes:
        max_bytes: Its size.
        total_s: The time of one try.
        stall_s: The time in which nothing comes.
        suffixes: How a file's name may end; any, if there are none.
    """

    max_bytes: int = 2 * 1024 * MIB
    total_s: float = 3_600.0
    stall_s: float = 30.0
    suffixes: Collection[str] = ()


@dataclass(frozen=True)
class Wanted:
    """What is to be fetched.

    Attributes:
        url: From where; may not have a password in it.
        headers: Sent to the host of `url` alone, with any redirect to another one left behind.
        sha256: What the bytes must come to.
        digest_header: A header of the first answer that may say what they must come to.
    """

    url: URL
    headers: Mapping[str, str] = field(default_factory=dict)
    sha256: str | None = None
    digest_header: str | None = None


@dataclass(frozen=True)
class Fetched:
    """A file that has come.

    Attributes:
        path: Where it lies.
        file_name: What it is called at its source.
        checksum: Its SHA-256.
        size_bytes: Its size.
    """

    path: Path
    file_name: str
    checksum: str
    size_bytes: int


class _Mark(msgspec.Struct, frozen=True):
    """What a partial file is a part of; stands beside it."""

    url: str
    etag: str | None = None
    modified: str | None = None
    total: int | None = None
    name: str = ""

    @property
    def condition(self) -> str | None:
        """What `If-Range` may carry: a strong ETag, or else the time of change.

        RFC 9110, 13.1.5.
        """
        if self.etag is not None:
            return None if self.etag.startswith("W/") else self.etag
        return self.modified


class Downloads:
    """Fetches files into a folder.

    Args:
        folder: Where partial files lie; made when it is missing.
        rules: Who may be asked.
        ca_file: Further authorities to trust.
        resolver: Turns names into addresses; the system's, if not given.
    """

    def __init__(
        self,
        folder: Path,
        rules: Rules,
        *,
        ca_file: str | None = None,
        resolver: AbstractResolver | None = None,
    ) -> None:
        self._folder = folder
        self._rules = rules
        self._ca_file = ca_file
        self._resolver = resolver

    async def fetch(
        self,
        name: str,
        wanted: Wanted,
        limits: Limits,
        told: Callable[[Progress], None] = lambda _progress: None,
    ) -> Fetched:
        """Fetch a file, going on from what an earlier try under the same name has left.

        What has come stays when this fails or is cancelled, unless it is of no use; `discard`
        removes it.

        Args:
            name: The name of the partial file.
            wanted: What.
            limits: How much, and for how long.
            told: Is called with the progress, some times a second.

        Raises:
            Unavailable: It may go better later: the connection broke or stalled, the server was
                busy, the disk is full.
            NotFound, NotAllowed, TooLarge, Unprocessable, InvalidRequest: It will not.
        """
        await to_its_end(self._folder.mkdir, parents=True, exist_ok=True)
        try:
            with _Part(self._folder / f"{name}.part") as part:
                try:
                    async with asyncio.timeout(limits.total_s):
                        return await self._fetch(part, wanted, limits, told)
                except _AnewError:
                    part.discard()
                    raise
        except TimeoutError:
            raise Unprocessable(
                f"{shown(wanted.url)} did not come within {limits.total_s:g} s "
                "(import_timeout_s); it goes on from there when it is asked for again"
            ) from None
        except OSError as error:
            raise Unavailable(
                f"the disk of {self._folder} does not take it: {error.strerror or error}"
            ) from None

    def discard(self, name: str) -> None:
        """Remove what has come under a name. Blocks."""
        part = self._folder / f"{name}.part"
        for path in (part, _mark_of(part)):
            path.unlink(missing_ok=True)

    def tidy(self, live: Collection[str]) -> None:
        """Remove what nobody has touched for a day, but for these names. Blocks."""
        for path in self._folder.glob("*"):
            with contextlib.suppress(OSError):
                if path.stem not in live and path.stat().st_mtime < time.time() - KEPT_S:
                    path.unlink()

    async def _fetch(
        self, part: "_Part", wanted: Wanted, limits: Limits, told: Callable[[Progress], None]
    ) -> Fetched:
        mark = part.mark()
        if mark is None or mark.url != str(wanted.url) or mark.condition is None:
            mark = None
        sha, have = await to_its_end(part.begin, mark is not None)
        resumed = have > 0
        headers = {"Range": f"bytes={have}-", "If-Range": mark.condition or ""} if (
            mark and resumed
        ) else {}  # fmt: skip
        async with self._asked(wanted, headers, limits) as (response, expected):
            if response.status == 416 and mark is not None and _whole(response, have):
                total: int | None = have
            else:
                mark, have, total = _placed(response, wanted, limits, mark, have)
                if resumed and have == 0:
                    sha, _ = await to_its_end(part.begin, False)
                    resumed = False
                await to_its_end(part.set_mark, mark)
                self._check_room(total, have)
                meter = Meter(have, total, time.monotonic())
                told(meter.progress(time.monotonic()))
                async for blocks in _blocks(response):
                    have += sum(map(len, blocks))
                    if have > limits.max_bytes:
                        part.discard()
                        raise _too_large(wanted.url, have, limits)
                    if total is not None and have > total:
                        raise Unavailable(
                            f"{shown(wanted.url)} sent more than the {total:,} bytes that it "
                            "promised"
                        )
                    self._check_room(None, 0)
                    await to_its_end(part.append, blocks, sha)
                    meter.count(have, time.monotonic())
                    told(meter.progress(time.monotonic()))
        if total is not None and have != total:
            raise Unavailable(
                f"{shown(wanted.url)} ended after {have:,} of {total:,} bytes", retry_after_s=1
            )
        self._check_digest(part, wanted, expected, sha.hexdigest(), resumed=resumed)
        return Fetched(part.path, mark.name, sha.hexdigest(), have)

    def _check_digest(
        self, part: "_Part", wanted: Wanted, expected: str | None, found: str, *, resumed: bool
    ) -> None:
        for digest in filter(None, (wanted.sha256, expected)):
            if digest == found:
                continue
            part.discard()
            if resumed:
                # The part may have been spoilt, by a power cut for example: all of it, once.
                raise Unavailable(
                    f"{shown(wanted.url)} came in parts that do not fit; it is fetched anew",
                    retry_after_s=1,
                )
            raise Unprocessable(
                f"{shown(wanted.url)} has the SHA-256 {found}, not {digest}", field="sha256"
            )

    def _check_room(self, total: int | None, have: int) -> None:
        """Raise Unavailable where the disk lacks room for the rest, and for the copy to keep."""
        needed = 0 if total is None else total - have + total
        missing = needed + ROOM_BYTES - shutil.disk_usage(self._folder).free
        if missing > 0:
            raise Unavailable(
                f"the disk of {self._folder} has no room for it: {missing:,} bytes are missing",
                retry_after_s=60,
            )

    @asynccontextmanager
    async def _asked(
        self, wanted: Wanted, headers: Mapping[str, str], limits: Limits
    ) -> AsyncGenerator[tuple[aiohttp.ClientResponse, str | None]]:
        """Ask, follow redirects, and give the answer that has the file, while inside."""
        url, expected = wanted.url, None
        for _ in range(REDIRECTS_MAX + 1):
            sent = {"Accept-Encoding": "identity", "User-Agent": "bkg", **headers}
            if _origin(url) == _origin(wanted.url):
                sent |= wanted.headers
            async with self._answer(url, sent, limits) as response:
                if wanted.digest_header and url == wanted.url:
                    said = _SHA256.fullmatch(response.headers.get(wanted.digest_header, ""))
                    expected = said[1] if said else None
                if response.status not in _REDIRECTS:
                    yield response, expected
                    return
                url = _next(url, response)
        raise Unprocessable(f"{shown(wanted.url)} leads on more than {REDIRECTS_MAX} times")

    @asynccontextmanager
    async def _answer(
        self, url: URL, headers: Mapping[str, str], limits: Limits
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
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_S, sock_read=limits.stall_s
        )
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, auto_decompress=False, trust_env=False
        ) as session:
            with _in_words(url, door, limits.stall_s):
                answering = session.get(url, headers=headers, allow_redirects=False, proxy=proxy)
                async with answering as response:
                    yield response


class Meter:
    """How fast bytes come, smoothed, and how long the rest takes.

    Args:
        have: Bytes that were there before.
        total: Bytes that there should be.
        now: The time.
    """

    def __init__(self, have: int, total: int | None, now: float) -> None:
        self._have = have
        self._total = total
        self._began = self._at = now
        self._rate: float | None = None
        self._since = have

    def count(self, have: int, now: float) -> None:
        """Take down how many bytes there are."""
        self._have = have
        passed = now - self._at
        if passed < BLOCK_S / 2:
            return
        rate = (have - self._since) / passed
        weight = min(1.0, passed / RATE_S)
        self._rate = rate if self._rate is None else (1 - weight) * self._rate + weight * rate
        self._since, self._at = have, now

    def progress(self, now: float) -> Progress:
        """Return what can be told: no rate from less than two seconds, no end without a rate."""
        rate = self._rate if now - self._began >= RATE_FIRST_S else None
        eta = None
        if rate is not None and self._total is not None and rate > 0:
            eta = round((self._total - self._have) / rate, 1)
        return Progress(self._have, self._total, None if rate is None else round(rate, 1), eta)


class _Part:
    """A partial file that is written to while inside, by one process alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        """Open it.

        Raises:
            Unavailable: Another process writes to it.
        """
        file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise Unavailable(
                f"{self.path.name} is still being written by another process", retry_after_s=2
            ) from None
        self._file = file
        return self

    def __exit__(self, *_error: object) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def _open(self) -> IO[bytes]:
        assert self._file is not None  # noqa: S101 - used inside only
        return self._file

    def mark(self) -> _Mark | None:
        """Return what the file is a part of, if that is known."""
        try:
            return msgspec.json.decode(_mark_of(self.path).read_bytes(), type=_Mark)
        except (OSError, msgspec.MsgspecError):
            return None

    def set_mark(self, mark: _Mark) -> None:
        """Write down what the file is a part of. Blocks."""
        path = _mark_of(self.path)
        made = path.with_suffix(".new")
        made.write_bytes(msgspec.json.encode(mark))
        made.replace(path)

    def begin(self, keep: bool) -> "tuple[hashlib._Hash, int]":
        """Go to the end of what is kept; return its hash so far and its size. Blocks."""
        file = self._open
        file.seek(0)
        if not keep:
            _mark_of(self.path).unlink(missing_ok=True)
            file.truncate()
        sha, size = hashlib.sha256(), 0
        while block := file.read(BLOCK_BYTES):
            sha.update(block)
            size += len(block)
        return sha, size

    def append(self, blocks: list[bytes], sha: "hashlib._Hash") -> None:
        """Write what has come. Blocks."""
        for block in blocks:
            self._open.write(block)
            sha.update(block)
        self._open.flush()

    def discard(self) -> None:
        """Forget what has come."""
        self._open.seek(0)
        self._open.truncate()
        _mark_of(self.path).unlink(missing_ok=True)


def _mark_of(part: Path) -> Path:
    return part.with_suffix(".json")


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


def _placed(
    response: aiohttp.ClientResponse, wanted: Wanted, limits: Limits, mark: _Mark | None, have: int
) -> tuple[_Mark, int, int | None]:
    """Return what an answer is, how much of it is there already, and how much there will be.

    Raises:
        BusError: It is not the file, or not as much of it as it may be.
    """
    if response.status not in (200, 206):
        raise _refusal(response, wanted.url)
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise Unprocessable(f"{shown(wanted.url)} comes compressed, which nobody had asked for")
    headers, total = response.headers, response.content_length
    found = _Mark(
        url=str(wanted.url),
        etag=headers.get("ETag"),
        modified=headers.get("Last-Modified"),
        name=_file_name(response, wanted.url, limits.suffixes),
    )
    if response.status == 206:
        said = _RANGE.fullmatch(headers.get("Content-Range", ""))
        if mark is None or said is None or int(said[1]) != have or not _same(mark, found):
            # Not what was asked for. The next try begins anew: what is there fits nothing.
            raise _anew(wanted.url)
        total = None if said[3] == "*" else int(said[3])
        if total is not None and (
            int(said[2]) != total - 1 or (mark.total is not None and mark.total != total)
        ):
            raise _anew(wanted.url)
        found = msgspec.structs.replace(mark, total=total)
    else:
        have, found = 0, msgspec.structs.replace(found, total=total)
    if total is not None and total > limits.max_bytes:
        raise _too_large(wanted.url, total, limits)
    return found, have, total


class _AnewError(Unavailable):
    """What is there is of no use any more."""


def _anew(url: URL) -> Unavailable:
    return _AnewError(
        f"{shown(url)} has changed, or does not go on where it should; it is fetched anew",
        retry_after_s=1,
    )


def _same(mark: _Mark, found: _Mark) -> bool:
    if found.etag is not None and mark.etag is not None:
        return found.etag == mark.etag
    return mark.modified == found.modified or found.modified is None


def _whole(response: aiohttp.ClientResponse, have: int) -> bool:
    said = _UNMET_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    return said is not None and int(said[1]) == have


def _too_large(url: URL, size: int, limits: Limits) -> TooLarge:
    return TooLarge(
        f"{shown(url)} has {size:,} bytes or more; allowed are {limits.max_bytes:,} (import_max_mb)"
    )


def _refusal(response: aiohttp.ClientResponse, url: URL) -> BusError:
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
        return _anew(url)
    if status in _HEALING or status >= 500:
        return Unavailable(
            f"{where} answered {status}", retry_after_s=_retry_after_s(response.headers)
        )
    return Unprocessable(f"{where} answered {status}", field="url")


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


def _file_name(response: aiohttp.ClientResponse, url: URL, suffixes: Collection[str]) -> str:
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


async def _blocks(response: aiohttp.ClientResponse) -> AsyncGenerator[list[bytes]]:
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

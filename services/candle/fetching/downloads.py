"""A file fetched over HTTP to the disk: resumed where it broke off, limited, and checked.

What has come stands in a partial file, and beside it what the server called it (ETag or time of
change). The next try asks for the rest of exactly that; a server that has something else by now
sends all of it. Errors that may heal are `Unavailable`; any other one is for good.
"""

import asyncio
import contextlib
import re
import shutil
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import aiohttp
import msgspec
from aiohttp.abc import AbstractResolver
from yarl import URL

from bus.errors import NoSpace, TooLarge, Unavailable, Unprocessable
from bus.job_rules import Progress
from bus.tasks import to_its_end
from services.candle.fetching.exchange import (
    BLOCK_S,
    AnewError,
    Exchange,
    anew,
    blocks_of,
    file_name,
    refusal,
)
from services.candle.fetching.outside import Rules, shown
from services.candle.fetching.partial import Mark, Part, mark_of

MIB: Final = 1024 * 1024
# Left free on the disk, beside what is fetched.
ROOM_BYTES: Final = 64 * MIB
# What a job that failed has left waits so long for somebody to try again.
KEPT_S: Final = 86_400
# The rate is that of about the last seconds, and told only when there is enough to tell it from.
RATE_S: Final = 5.0
RATE_FIRST_S: Final = 2.0

_RANGE: Final = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_UNMET_RANGE: Final = re.compile(r"bytes \*/(\d+)")
_SHA256: Final = re.compile(r'"?([0-9a-f]{64})"?')

# Raises where a file of so many bytes, and perhaps of a known SHA-256, could not be kept.
CheckRoom = Callable[[int, str | None], Awaitable[None]]


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


class Downloads:
    """Fetches files into a folder.

    Args:
        folder: Where partial files lie; made when it is missing.
        rules: Who may be asked.
        ca_file: Further authorities to trust.
        resolver: Turns names into addresses; the system's, if not given.
        check_room: Is asked before a file of known size is fetched, whether it could be kept.
    """

    def __init__(
        self,
        folder: Path,
        rules: Rules,
        *,
        ca_file: str | None = None,
        resolver: AbstractResolver | None = None,
        check_room: CheckRoom | None = None,
    ) -> None:
        self._folder = folder
        self._exchange = Exchange(rules, ca_file, resolver)
        self._check_kept = check_room

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
                busy.
            NoSpace: The disk, or where it is to be kept, has no room for it; where its size is
                known, that is said before it is fetched.
            NotFound, NotAllowed, TooLarge, Unprocessable, InvalidRequest: It will not.
        """
        await to_its_end(self._folder.mkdir, parents=True, exist_ok=True)
        try:
            with Part(self._folder / f"{name}.part") as part:
                try:
                    async with asyncio.timeout(limits.total_s):
                        return await self._fetch(part, wanted, limits, told)
                except AnewError:
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
        for path in (part, mark_of(part)):
            path.unlink(missing_ok=True)

    def tidy(self, live: Collection[str]) -> None:
        """Remove what nobody has touched for a day, but for these names. Blocks."""
        for path in self._folder.glob("*"):
            with contextlib.suppress(OSError):
                if path.stem not in live and path.stat().st_mtime < time.time() - KEPT_S:
                    path.unlink()

    async def _fetch(
        self, part: Part, wanted: Wanted, limits: Limits, told: Callable[[Progress], None]
    ) -> Fetched:
        mark = part.mark()
        if mark is None or mark.url != str(wanted.url) or mark.condition is None:
            mark = None
        sha, have = await to_its_end(part.begin, mark is not None)
        resumed = have > 0
        headers = {"Range": f"bytes={have}-", "If-Range": mark.condition or ""} if (
            mark and resumed
        ) else {}  # fmt: skip
        asking = self._exchange.asking(wanted.url, headers, wanted.headers, limits.stall_s)
        async with asking as (response, first):
            expected = _digest_in(first, wanted.digest_header)
            if response.status == 416 and mark is not None and _whole(response, have):
                total: int | None = have
            else:
                mark, have, total = _placed(response, wanted, limits, mark, have)
                if resumed and have == 0:
                    sha, _ = await to_its_end(part.begin, False)
                    resumed = False
                await to_its_end(part.set_mark, mark)
                self._check_disk(wanted.url, total, have)
                if total is not None and self._check_kept is not None:
                    await self._check_kept(total, wanted.sha256 or expected)
                meter = Meter(have, total, time.monotonic())
                told(meter.progress(time.monotonic()))
                async for blocks in blocks_of(response):
                    have += sum(map(len, blocks))
                    if have > limits.max_bytes:
                        part.discard()
                        raise _too_large(wanted.url, have, limits)
                    if total is not None and have > total:
                        raise Unavailable(
                            f"{shown(wanted.url)} sent more than the {total:,} bytes that it "
                            "promised"
                        )
                    self._check_disk(wanted.url, None, have)
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
        self, part: Part, wanted: Wanted, expected: str | None, found: str, *, resumed: bool
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

    def _check_disk(self, url: URL, total: int | None, have: int) -> None:
        """Raise NoSpace where the disk lacks room for the rest, and for the copy to serve from."""
        needed = 0 if total is None else total - have + total
        free = shutil.disk_usage(self._folder).free
        if needed + ROOM_BYTES > free:
            raise NoSpace(
                f"{shown(url)} needs {needed:,} bytes more on the disk of {self._folder}, and "
                f"{ROOM_BYTES:,} stay free there; {free:,} bytes are free: make room, or put the "
                "data directory (BKG_DATA_DIR) on a larger disk",
                retry_after_s=60,
            )


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


def _placed(
    response: aiohttp.ClientResponse, wanted: Wanted, limits: Limits, mark: Mark | None, have: int
) -> tuple[Mark, int, int | None]:
    """Return what an answer is, how much of it is there already, and how much there will be.

    Raises:
        BusError: It is not the file, or not as much of it as it may be.
    """
    if response.status not in (200, 206):
        raise refusal(response, wanted.url)
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise Unprocessable(f"{shown(wanted.url)} comes compressed, which nobody had asked for")
    headers, total = response.headers, response.content_length
    found = Mark(
        url=str(wanted.url),
        etag=headers.get("ETag"),
        modified=headers.get("Last-Modified"),
        name=file_name(response, wanted.url, limits.suffixes),
    )
    if response.status == 206:
        said = _RANGE.fullmatch(headers.get("Content-Range", ""))
        if mark is None or said is None or int(said[1]) != have or not _same(mark, found):
            # Not what was asked for. The next try begins anew: what is there fits nothing.
            raise anew(wanted.url)
        total = None if said[3] == "*" else int(said[3])
        if total is not None and (
            int(said[2]) != total - 1 or (mark.total is not None and mark.total != total)
        ):
            raise anew(wanted.url)
        found = msgspec.structs.replace(mark, total=total)
    else:
        have, found = 0, msgspec.structs.replace(found, total=total)
    if total is not None and total > limits.max_bytes:
        raise _too_large(wanted.url, total, limits)
    return found, have, total


def _digest_in(headers: Mapping[str, str], name: str | None) -> str | None:
    said = _SHA256.fullmatch(headers.get(name, "")) if name else None
    return said[1] if said else None


def _same(mark: Mark, found: Mark) -> bool:
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

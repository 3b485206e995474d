"""`bkg faces enrol`: a folder of photos into a dataset.

A photo's entry is named by its bytes: by half of their SHA-256, 128 bits. So a run that was broken
off is taken up by the same command: what the dataset has is asked for and skipped, and a photo that
was sent twice, because the answer to the first try was lost, is there once.
"""

import asyncio
import contextlib
import hashlib
import random
import stat
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import typer
from rich.text import Text

from bus import codec
from bus import messages as m
from bus.client import Client
from bus.errors import (
    BusError,
    Conflict,
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    NotFound,
    Overloaded,
    TooLarge,
    Unavailable,
    Unprocessable,
)
from bus.settings import BODY_MAX_BYTES
from bus.subjects import FACES_DETECT, FACES_ENCODE, RUSTYFACE
from bus.tasks import beside
from services.cli.console import out, show_json
from services.cli.galleries import ask_dataset, have
from services.cli.options import Platform
from services.cli.photos import (
    PHOTOS,
    Outcome,
    SubjectFrom,
    Tally,
    files_in,
    shown,
    subject_of,
    written,
)
from services.cli.plugins import connected
from services.cli.progress import Meter

# So long an answer is waited for, and longer for a large photo on a slow line; and so often a photo
# is sent again that got none.
TRY_S: Final = 20.0
LINE_BYTES_PER_S: Final = 1_000_000
TRIES: Final = 4
# How long a platform may be busy or away before the run ends; the same command goes on.
PATIENCE_S: Final = 120.0
# Replicas come and go; so often they are counted again.
LOOK_S: Final = 5.0
WIDTH_MAX: Final = 128
# What the photos that are sent at a time may have together.
HELD_MAX_BYTES: Final = 256 * 1024**2
# What a request may have beside its photo.
BESIDE_PHOTO_BYTES: Final = 64 * 1024
ID_LENGTH: Final = 32


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the command line asks for.

    Attributes:
        folder: Where the photos lie, at any depth.
        dataset: Where they go.
        create: Whether it is made if it is not there.
        subject_from: What says whom a photo shows: the first folder below `folder`, its own name
            without a number at the end, or nothing.
        metadata: Kept with each, beside the file's name.
        quality: What a face below the dataset's bounds leads to; None: as the dataset has it.
        one_face: Whether a photo that shows several faces is refused.
        again: Whether what is there is enrolled anew.
        width: How many photos are sent at a time; None: as many as the workers have use for.
        report: Where each photo's outcome is written to.
    """

    folder: Path
    dataset: str
    create: bool
    subject_from: SubjectFrom
    metadata: Mapping[str, Any]
    quality: str | None
    one_face: bool
    again: bool
    width: int | None
    report: Path | None


class _EndError(Exception):
    """Something that would happen to every further photo, too."""

    def __init__(self, cause: BusError) -> None:
        super().__init__(cause.message)
        self.cause = cause


async def enrol(wanted: Wanted, at: Platform) -> None:
    """Enrol every photo below a folder, and say what became of each.

    Raises:
        typer.BadParameter: The folder cannot be read, or has no photo.
        typer.Exit: A photo could not be enrolled.
        BusError: The platform cannot be used, or the dataset is not there.
    """
    photos, others = await asyncio.to_thread(files_in, wanted.folder)
    if not photos and not any(one.status == "failed" for one in others):
        raise typer.BadParameter(
            f"{wanted.folder} has no photo, at any depth; looked for {' '.join(sorted(PHOTOS))}"
        )
    with written(wanted.report) as report:
        tally = Tally(len(photos), report)
        for one in others:
            tally.add(one)
        run = None
        try:
            async with connected(at.nats, at.data_dir) as client:
                before = await have(client, wanted.dataset, create=wanted.create)
                with Meter(
                    f"enrolling into {wanted.dataset}", len(photos), quiet=at.as_json,
                    count="photos",
                ) as meter:  # fmt: skip
                    run = _Run(client, wanted, tally, meter, ask_first=before.entries > 0)
                    await run.all(photos)
        except (asyncio.CancelledError, BusError):
            if run is not None:
                _show(tally, wanted, at)
                left = len(photos) - tally.done
                sys.stderr.write(
                    f"{left:,} photos are left; the same command goes on with them, and loses "
                    "nothing of what is enrolled\n"
                )
            raise
    _show(tally, wanted, at)
    if tally.counts["failed"]:
        raise typer.Exit(1)


class _Run:
    """Photos on their way into a dataset, several at a time.

    Args:
        client: Whose workers do it.
        wanted: What the command line asks for.
        tally: Takes what becomes of each.
        meter: Shows how far it is.
        ask_first: Whether the dataset may have some of them.
    """

    def __init__(
        self, client: Client, wanted: Wanted, tally: Tally, meter: Meter, *, ask_first: bool
    ) -> None:
        self._client = client
        self._wanted = wanted
        self._tally = tally
        self._meter = meter
        self._ask_first = ask_first and not wanted.again
        self._width = wanted.width or 2
        # The entry of each photo that was seen, to the first file that had these bytes, and to
        # whether that one is in the dataset.
        self._seen: dict[str, tuple[Path, asyncio.Future[bool]]] = {}

    async def all(self, photos: Iterable[Path]) -> None:
        """Enrol every photo.

        Raises:
            BusError: The platform was away or busy for too long, or the dataset went.
        """
        under_way: dict[asyncio.Task[None], int] = {}
        cause: BusError | None = None
        try:
            async with beside(self._keep_width()), asyncio.TaskGroup() as tasks:
                for photo in photos:
                    size = _size_of(photo)
                    while len(under_way) >= self._width or (
                        under_way and sum(under_way.values()) + size > HELD_MAX_BYTES
                    ):
                        await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                    task = tasks.create_task(self._one(photo))
                    under_way[task] = size
                    task.add_done_callback(under_way.pop)
        except* _EndError as group:
            # Raised here it would come out in a group.
            cause = next(one.cause for one in group.exceptions if isinstance(one, _EndError))
        if cause is not None:
            raise cause

    async def _keep_width(self) -> None:
        """Send as many at a time as there are processors to work on them, and some to wait."""
        while self._wanted.width is None:
            with contextlib.suppress(BusError):
                self._width = await _width_for(self._client)
            await asyncio.sleep(LOOK_S)

    async def _one(self, photo: Path) -> None:
        file = photo.relative_to(self._wanted.folder)
        subject = None
        try:
            subject = subject_of(file, self._wanted.subject_from)
            outcome = await self._outcome(photo, file, subject)
        except (Unprocessable, InvalidRequest, TooLarge, Internal, DeadlineExceeded) as error:
            outcome = Outcome(
                file=shown(file), status="failed", subject=subject, reason=error.message
            )
        except OSError as error:
            reason = f"it cannot be read: {error.strerror or error}"
            outcome = Outcome(file=shown(file), status="failed", subject=subject, reason=reason)
        except BusError as error:
            raise _EndError(error) from None
        self._tally.done += 1
        self._tally.add(outcome)
        self._meter.to(self._tally.done)

    async def _outcome(self, photo: Path, file: Path, subject: str | None) -> Outcome:
        max_bytes = self._client.body_max_bytes - BESIDE_PHOTO_BYTES
        data = await asyncio.to_thread(_read, photo, max_bytes)
        entry = hashlib.sha256(data).hexdigest()[:ID_LENGTH]
        if entry in self._seen:
            return await self._double(file, entry, subject)
        is_there = asyncio.get_running_loop().create_future()
        self._seen[entry] = file, is_there
        went_well = False
        try:
            outcome = await self._sent(data, file, entry, subject)
            went_well = True
        finally:
            # It is done where a double that waited for it was cancelled.
            if not is_there.done():
                is_there.set_result(went_well)
        return outcome

    async def _sent(self, data: bytes, file: Path, entry: str, subject: str | None) -> Outcome:
        if self._ask_first and (before := await self._entry(entry)) is not None:
            odd = None
            if before.subject != subject and self._wanted.subject_from != "none":
                odd = f"it is there as {before.subject or 'nobody'}; `bkg faces move` changes that"
            return Outcome(
                file=shown(file), status="there", entry=entry, subject=before.subject, reason=odd
            )
        if self._wanted.one_face:
            ask = m.DetectFaces(image=data, faces_max=2)
            found = await self._patiently(FACES_DETECT, ask)
            if len(found.faces) > 1:
                raise Unprocessable("it shows several faces")
        said = {
            "image": data,
            "dataset": self._wanted.dataset,
            "entry_id": entry,
            "metadata": {"file": shown(file), **self._wanted.metadata},
            "subject": subject,
            "quality": self._wanted.quality,
            "by": "cli",
        }
        given = {key: value for key, value in said.items() if value is not None}
        face = await self._patiently(FACES_ENCODE, codec.convert(given, m.EncodeFace))
        warnings = list(face.warnings)
        if len(face.faces) > 1:
            warnings.append(f"it shows {len(face.faces)} faces; the largest was taken")
        return Outcome(
            file=shown(file),
            status="enrolled",
            entry=face.id,
            subject=subject,
            warnings=warnings,
            faces=len(face.faces),
        )

    async def _double(self, file: Path, entry: str, subject: str | None) -> Outcome:
        first, is_there = self._seen[entry]
        other = subject_of(first, self._wanted.subject_from)
        if other != subject:
            raise Unprocessable(
                f"it is the same photo as {shown(first)}, which shows {other or 'nobody'}; one "
                "photo cannot be two persons"
            )
        same = f"it is the same photo as {shown(first)}"
        if not await is_there:
            raise Unprocessable(f"{same}, which failed")
        return Outcome(file=shown(file), status="there", entry=entry, subject=subject, reason=same)

    async def _entry(self, entry: str) -> m.EntryInfo | None:
        ask = {"dataset": self._wanted.dataset, "entry_id": entry, "limit": 1}

        async def look() -> m.DatasetList:
            return await ask_dataset(self._client, "entries", **ask)

        try:
            found = (await _patient(look)).entries
        except NotFound as error:
            if error.field != "entry_id":
                raise
            return None
        return found[0] if found else None

    async def _patiently(self, endpoint: Any, ask: Any) -> Any:
        timeout_s = TRY_S + len(ask.image) / LINE_BYTES_PER_S

        async def call() -> Any:
            return await self._client.call(
                endpoint, ask, timeout_s=timeout_s, content_type=codec.MSGPACK
            )

        return await _patient(call)


async def _patient(call: Any) -> Any:
    """Ask until there is an answer.

    What is busy or away is asked again for `PATIENCE_S`. A replica that died took its requests
    with it: what got no answer in time is sent again, but not for ever, for it may be the cause.

    Raises:
        BusError: What the answer is; `Overloaded` and `Unavailable` when patience is at its end.
    """
    loop = asyncio.get_running_loop()
    until, lost = loop.time() + PATIENCE_S, 0
    wait_s = 0.1
    while True:
        try:
            return await call()
        except (DeadlineExceeded, Conflict) as error:
            lost += 1
            if lost == TRIES:
                raise type(error)(f"{error.message} ({TRIES} times)") from None
        except (Overloaded, Unavailable) as error:
            if loop.time() > until:
                raise
            # Apart from each other, so that they do not come back all at once.
            wait_s = min(2 * wait_s, 5.0)
            wait_s = max(wait_s, error.retry_after_s or 0)
            await asyncio.sleep(wait_s * random.uniform(0.5, 1))  # noqa: S311


async def _width_for(client: Client) -> int:
    """Return how many photos are worth having under way.

    One for each processor of the hosts that rustyface runs on, and as many again that wait: so
    none is idle while an answer travels, and a search of somebody else's does not wait for long.
    """
    told = [entry.value for entry in await client.store.instances.all()]
    hosts = {
        one.host for one in told if one and one.plugin == RUSTYFACE and one.status == "running"
    }
    known = [entry.value for entry in await client.store.hosts.all()]
    processors = {one.name: one.processors for one in known if one}
    # A worker that somebody started by hand may run on a host that has no supervisor.
    return min(2 * sum(processors.get(host, 2) for host in hosts) or 2, WIDTH_MAX)


def _size_of(photo: Path) -> int:
    """Return how many bytes a photo has; one that cannot be asked fails when it is read."""
    with contextlib.suppress(OSError):
        return photo.stat().st_size
    return 0


def _read(photo: Path, max_bytes: int) -> bytes:
    told = photo.stat()
    if not stat.S_ISREG(told.st_mode):
        # Whoever reads a pipe may wait for ever.
        raise Unprocessable("it is no file, but a folder, a pipe, a socket or a device")
    size = told.st_size
    if size > max_bytes:
        raise TooLarge(
            f"it has {size:,} bytes, {max_bytes:,} can be sent; make it smaller, or raise "
            f"{BODY_MAX_BYTES} here and for the workers"
        )
    data = photo.read_bytes()
    if not data:
        raise Unprocessable("it has no bytes")
    return data


def _show(tally: Tally, wanted: Wanted, at: Platform) -> None:
    counts = tally.counts
    if at.as_json:
        show_json(
            {
                "dataset": wanted.dataset,
                "photos": tally.photos,
                "enrolled": counts["enrolled"],
                "there": counts["there"],
                "failed": tally.failed,
                "left_out": tally.left_out,
                "warnings": tally.odd,
                "left": tally.photos - tally.done,
            }
        )
        return
    tally.show()
    line = Text(f"{wanted.dataset}: {counts['enrolled']:,} enrolled", "green")
    line.append(f", {counts['there']:,} were there", "")
    line.append(f", {counts['failed']:,} failed", "red" if counts["failed"] else "")
    line.append(f", {counts['left out']:,} left out", "")
    out.print(line)
    if wanted.report:
        out.print(Text(f"{wanted.report} says what became of each file", "dim"))

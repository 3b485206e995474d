"""The photos below a folder, and what became of each of them."""

import contextlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final, Literal

import msgspec
import typer
from rich.text import Text

from bus import codec
from bus.errors import Unprocessable
from services.cli.console import out, plain_table

# What is sent as a photo. The workers look at the bytes, not at the name: of those that they
# cannot read each is refused with a sentence that says what to do.
PHOTOS: Final = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif",
    ".heic", ".heif", ".avif", ".jp2", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".psd",
    ".svg",
})  # fmt: skip
# Of a list this many are shown to people; the report and `--json` have all.
SHOWN_MAX: Final = 20
# George_Bush_0001.jpg, "anna (2).png": who it is stands before the number.
_NUMBERED: Final = re.compile(r"[\s_.-]*(?:\(\d+\)|\d+)\Z")

Status = Literal["enrolled", "there", "failed", "left out"]
SubjectFrom = Literal["folder", "file", "none"]


class Outcome(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of a file.

    Attributes:
        file: Its path below the folder.
        status: `enrolled`; `there` already; `failed`; `left out`, because it is no photo.
        entry: The entry.
        subject: Whom it shows.
        reason: Why it failed or was left out, or what is odd.
        warnings: What makes its face hard to recognise.
        faces: How many faces it shows.
    """

    file: str
    status: Status
    entry: str | None = None
    subject: str | None = None
    reason: str | None = None
    warnings: list[str] = []
    faces: int | None = None


def files_in(folder: Path) -> tuple[list[Path], list[Outcome]]:
    """Return the photos below a folder, sorted, and what became of everything else.

    What begins with a dot is left out with all below it: systems keep their own things there.

    Raises:
        typer.BadParameter: It is no folder, or cannot be read.
    """
    if not folder.is_dir():
        what = "a file" if folder.exists() else "not there"
        raise typer.BadParameter(f"{folder} is {what}; give a folder of photos")
    photos: list[Path] = []
    others: list[Outcome] = []

    def unreadable(error: OSError) -> None:
        path = Path(error.filename)
        if path == folder:
            raise typer.BadParameter(f"{folder} cannot be read: {error.strerror}")
        others.append(
            Outcome(
                file=shown(path.relative_to(folder)),
                status="failed",
                reason=f"the folder cannot be read: {error.strerror}",
            )
        )

    for place, folders, names in os.walk(folder, onerror=unreadable):
        inside = Path(place)
        hidden = [name for name in folders if name.startswith(".")]
        folders[:] = sorted(set(folders) - set(hidden))
        for name in sorted([*hidden, *names]):
            path = inside / name
            if name.startswith("."):
                reason = "its name begins with a dot"
            elif path.suffix.lower() in PHOTOS:
                photos.append(path)
                continue
            else:
                ending = shown(Path(path.suffix)) if path.suffix else "no ending"
                reason = f"it is no photo by its name ({ending})"
            file = shown(path.relative_to(folder))
            others.append(Outcome(file=file, status="left out", reason=reason))
    return photos, others


def shown(path: Path) -> str:
    r"""Return a path as text; bytes of it that are no UTF-8 as numbers, such as ``\xff``."""
    return str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def subject_of(file: Path, source: SubjectFrom) -> str | None:
    """Return whom a photo shows, by its path below the folder; None where that says nothing.

    A letter and its accent are one character afterwards (NFC): some systems write them as two, and
    one person would be two who look the same in every list.

    Raises:
        Unprocessable: The name is no UTF-8.
    """
    if source == "folder" and len(file.parts) > 1:
        name = file.parts[0]
    elif source == "file":
        name = _NUMBERED.sub("", file.stem) or file.stem
    else:
        return None
    if not name.isascii() and shown(Path(name)) != name:
        raise Unprocessable(
            f"nobody can be called {shown(Path(name))!r}: the name is no UTF-8; give the {source} "
            "another one"
        )
    return unicodedata.normalize("NFC", name)


class Tally:
    """What became of each file, so far.

    Attributes:
        photos: How many there are.
        done: How many of them have an outcome.
        counts: How many files came to which.
        failed: Those that failed.
        left_out: Those that are no photos.
        odd: Those that went well, but with a warning.

    Args:
        photos: How many there are.
        report: Where each outcome is written to.
    """

    def __init__(self, photos: int, report: IO[str] | None) -> None:
        self.photos = photos
        self.done = 0
        self.counts: Counter[Status] = Counter()
        self.failed: list[Outcome] = []
        self.left_out: list[Outcome] = []
        self.odd: list[Outcome] = []
        self._report = report

    def add(self, one: Outcome) -> None:
        """Take an outcome, and write it down."""
        self.counts[one.status] += 1
        if one.status == "failed":
            self.failed.append(one)
        elif one.status == "left out":
            self.left_out.append(one)
        elif one.warnings or one.reason:
            self.odd.append(one)
        if self._report:
            self._report.write(codec.encode(one).decode() + "\n")
            self._report.flush()

    def show(self) -> None:
        """Print what failed and why, and what else should be looked at."""
        for title, colour, outcomes in (
            ("left out", "dim", self.left_out),
            ("worth a look", "yellow", self.odd),
            ("failed", "red", self.failed),
        ):
            _show_files(title, colour, outcomes)


@contextlib.contextmanager
def written(path: Path | None) -> Iterator[IO[str] | None]:
    """Have a report open while inside, if one is wanted.

    Raises:
        typer.BadParameter: It cannot be written.
    """
    if path is None:
        yield None
        return
    try:
        file = path.open("w", encoding="utf-8")
    except OSError as error:
        raise typer.BadParameter(
            f"{path} cannot be written to: {error.strerror}", param_hint="--report"
        ) from None
    with file:
        yield file


def _show_files(title: str, colour: str, outcomes: list[Outcome]) -> None:
    if not outcomes:
        return
    table = plain_table(title, "why")
    for one in outcomes[:SHOWN_MAX]:
        why = "; ".join(filter(None, [one.reason, *one.warnings]))
        table.add_row(Text(one.file, overflow="fold"), Text(why, colour, overflow="fold"))
    out.print(table, soft_wrap=False)
    if len(outcomes) > SHOWN_MAX:
        out.print(Text(f"and {len(outcomes) - SHOWN_MAX:,} more; --report FILE has all", "dim"))
    out.print()

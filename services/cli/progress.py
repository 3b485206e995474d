"""How far work has come, said on stderr: so a program can read the answer on stdout."""

import sys
import time
from types import TracebackType
from typing import Final, Self

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

# Where lines do not change in their place, one is said so often.
LINE_S: Final = 5.0


class Meter:
    """A bar with amount, rate and time left; where stderr is no terminal, a line now and then.

    Args:
        what: What is done, and to what: `pushing iris.onnx`.
        total: How much there will be, if that is known.
        quiet: Whether lines are left out; a bar is for people, and shown to them.
        sums_up: Whether a line at the end says what came of it.
        count: What is counted, such as `photos`; bytes if absent.
    """

    def __init__(
        self,
        what: str,
        total: int | None = None,
        *,
        quiet: bool = False,
        sums_up: bool = True,
        count: str | None = None,
    ) -> None:
        console = Console(stderr=True, highlight=False)
        self._what = what
        self._total = total
        self._done = self._before = 0
        self._quiet = quiet
        self._sums_up = sums_up
        self._count = count
        self._began = self._said = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn() if count else DownloadColumn(),
                _CountSpeedColumn(count) if count else TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task(what, total=total)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif self._done and self._sums_up:
            self._say()

    def begin_at(self, done: int) -> None:
        """Say how much was there already: it does not count into the rate."""
        self._done = self._before = done
        self._began = time.monotonic()
        if self._bar:
            self._bar.reset(self._task, completed=done, total=self._total)

    def to(self, done: int, total: int | None = None, what: str | None = None) -> None:
        """Say how far it is now."""
        self._done = done
        self._total = total if total is not None else self._total
        self._what = what or self._what
        if self._bar:
            self._bar.update(self._task, completed=done, total=self._total, description=self._what)
        elif time.monotonic() - self._said >= LINE_S:
            self._said = time.monotonic()
            self._say()

    def say(self, line: str) -> None:
        """Say how far it is where that is not counted in bytes, as a whole line."""
        self._sums_up = False
        if self._bar:
            self._bar.update(self._task, description=line)
        elif not self._quiet and time.monotonic() - self._said >= LINE_S:
            self._said = time.monotonic()
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()

    def _say(self) -> None:
        if not self._quiet:
            spent_s = time.monotonic() - self._began
            line = line_of(self._what, self._done, self._total, self._before, spent_s, self._count)
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()


class _CountSpeedColumn(ProgressColumn):
    """How many there are in a second."""

    def __init__(self, count: str) -> None:
        super().__init__()
        self._count = count

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f} {self._count}/s" if speed else "", "progress.data.speed")


def line_of(
    what: str,
    done: int,
    total: int | None,
    before: int,
    spent_s: float,
    count: str | None = None,
) -> str:
    """Return how far work has come as a line: how much of how much, how fast, how long yet.

    Args:
        what: What is done.
        done: Bytes that are there, or things.
        total: How many there will be, if known.
        before: How many were there at the beginning.
        spent_s: Seconds since then.
        count: The things that are counted; bytes if absent.
    """
    rate = (done - before) / spent_s if spent_s > 0 else 0.0
    if count:
        amount = f"{done:,}" if total is None else f"{done:,} of {total:,}"
        amount, speed = f"{amount} {count}", f", {rate:.1f}/s" if rate > 0 else ""
    else:
        amount = decimal(done) if total is None else f"{decimal(done)} of {decimal(total)}"
        speed = f", {decimal(int(rate))}/s" if rate >= 1 else ""
    left = ""
    if speed and total is not None and done < total:
        left = f", {(total - done) / rate:.0f} s left"
    return f"{what}: {amount}{speed}{left}"

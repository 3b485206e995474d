"""Which log records somebody looks for: from when to when, how bad, with what in them."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final

from bus import codec
from bus.errors import InvalidRequest
from bus.messages import Level, LogEvent

LEVELS: Final[tuple[Level, ...]] = ("debug", "info", "warn", "error")
PATTERN_MAX_CHARS: Final = 1_000
_REGEX_MAX_BYTES: Final = 8 * 1024 * 1024
_UNITS_S: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}

Matches = Callable[[LogEvent], bool]


@dataclass(frozen=True)
class LogQuery:
    """What is looked for in the log stream.

    Attributes:
        limit: How many records at most.
        plugin: Whose; None for all.
        slot: Of which of its instances; None for all.
        levels: Of which levels.
        after: Only those with a greater sequence.
        before: Only those with a smaller sequence.
        since: Only those stored from this moment on.
        until: Only those stored before this moment.
        matches: Which of them.
        oldest: The first of them instead of the newest.
    """

    limit: int
    plugin: str | None = None
    slot: int | None = None
    levels: tuple[Level, ...] = LEVELS
    after: int | None = None
    before: int | None = None
    since: datetime | None = None
    until: datetime | None = None
    matches: Matches = field(default=lambda _: True)
    oldest: bool = False


@dataclass(frozen=True)
class LogPage:
    """What was found.

    Attributes:
        records: The oldest first, with their sequence.
        next_after: The sequence after which to look for later ones.
        next_before: The sequence before which to look for earlier ones; None where there are none.
        complete: Whether there is no more to be had that way round.
    """

    records: list[LogEvent]
    next_after: int
    next_before: int | None = None
    complete: bool = True


def at_least(level: Level) -> tuple[Level, ...]:
    """Return a level and the worse ones."""
    return LEVELS[LEVELS.index(level) :]


def seconds_in(text: str, name: str) -> float:
    """Return how long `90s`, `15m`, `2h`, `1d` or `1w` is.

    Raises:
        InvalidRequest: It is no duration; `name` says of what.
    """
    found = _DURATION.fullmatch(text.strip())
    if found is None:
        raise InvalidRequest(
            f"{name} is {text[:40]!r}; allowed is a number with its unit: 90s, 15m, 2h, 1d, 1w",
            field=name,
        )
    return float(found[1]) * _UNITS_S[found[2]]


def moment_in(text: str, name: str, now: datetime) -> datetime:
    """Return the moment that a text names: RFC 3339, or so long ago as `15m`, `2h`, `1d` say.

    Raises:
        InvalidRequest: It names none; `name` says of what.
    """
    text = text.strip()
    if _DURATION.fullmatch(text):
        try:
            return now - timedelta(seconds=seconds_in(text, name))
        except OverflowError:
            return datetime.min.replace(tzinfo=UTC)
    # A plus sign in a URL that was not escaped arrives as a space.
    stamp = re.sub(r" (\d\d:\d\d)$", r"+\1", text)
    stamp = re.sub(r"(\.\d{6})\d+", r"\1", stamp.upper())
    try:
        moment = datetime.fromisoformat(stamp).astimezone(UTC) if _STAMP.fullmatch(stamp) else None
    except (ValueError, OverflowError):
        moment = None
    if moment is None:
        raise InvalidRequest(
            f"{name} is {text[:40]!r}; allowed is a time with its zone, as 2026-01-31T12:00:00Z, "
            "or how long ago, as 15m, 2h, 1d",
            field=name,
        )
    return moment


def text_of(record: LogEvent) -> str:
    """Return what is searched of a record: its message, its fields, its logger and its trace."""
    parts = [record.message]
    for name, value in record.fields.items():
        shown = value if isinstance(value, str) else codec.encode(value).decode()
        parts.append(f"{name}={shown}")
    if record.logger:
        parts.append(f"logger={record.logger}")
    if record.trace:
        parts.append(f"trace={record.trace}")
    return "\n".join(parts)


def matcher(text: str | None = None, regex: str | None = None) -> Matches:
    """Return what tells whether a record has a text, in any case, and matches an expression.

    The expression has RE2's syntax, whose matching takes linear time whatever is asked: nobody
    can hang a process with it.

    Raises:
        InvalidRequest: The expression cannot be read, or is too long.
    """
    for name, given in (("q", text), ("regex", regex)):
        if given is not None and len(given) > PATTERN_MAX_CHARS:
            raise InvalidRequest(
                f"{name} has {len(given):,} characters, allowed are {PATTERN_MAX_CHARS:,}",
                field=name,
            )
    needle = text.casefold() if text else None
    found = _searcher(regex) if regex else None
    if needle is None and found is None:
        return lambda _: True

    def matches(record: LogEvent) -> bool:
        searched = text_of(record)
        if needle is not None and needle not in searched.casefold():
            return False
        return found is None or found(searched)

    return matches


def _searcher(regex: str) -> Callable[[str], bool]:
    # Here, because it is loaded only for those who look for an expression.
    import re2  # noqa: PLC0415

    options = re2.Options()
    options.log_errors = False
    options.max_mem = _REGEX_MAX_BYTES
    try:
        # `^` and `$` stand at each line: a record has several.
        pattern = re2.compile(b"(?m)" + regex.encode(), options)
    except (re2.error, UnicodeEncodeError) as error:
        cause = error.args[0] if error.args else error
        said = cause.decode(errors="replace") if isinstance(cause, bytes) else str(cause)
        raise InvalidRequest(
            f"the expression {regex[:100]!r} cannot be read (RE2 syntax): {said}", field="regex"
        ) from None
    return lambda text: pattern.search(text.encode(errors="replace")) is not None


_DURATION: Final = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)([smhdw])", re.ASCII)
_STAMP: Final = re.compile(
    r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:\.\d{1,9})?(?:Z|[+-]\d\d:\d\d)", re.ASCII
)

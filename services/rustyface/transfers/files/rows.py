"""The rows of dataset files, whatever the format, and what has to be true of them."""

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Literal, NamedTuple, NoReturn, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from bus import messages as m
from bus.errors import BusError, Unprocessable
from services.rustyface.galleries.galleries import check_metadata

Floats = npt.NDArray[np.float32]
# What a row is: an entry, or a rejection.
Kind = Literal["entry", "rejection"]

# So many rows are read, checked and stored at a time: some megabytes.
BATCH: Final = 1_000
ENTRIES_MAX: Final = 10_000_000
TEXT_MAX: Final = 256
QUALITY_MAX: Final = 32
# A vector that is this near to length 1 stays as it is, to the last bit.
UNIT_WITHIN: Final = 1e-6


class Row(NamedTuple):
    """One entry of a dataset file.

    Attributes:
        id: Its id.
        vector: Of length 1, shape ``[dimensions]``.
        metadata: Whatever JSON can carry.
        subject: The person, if it says.
        last_seen: In UTC, if it says.
        quality: Of the face, by measure.
    """

    id: str
    vector: Floats
    metadata: Any = None
    subject: str | None = None
    last_seen: datetime | None = None
    quality: dict[str, float] = {}  # noqa: RUF012 - never changed


class RejectionRow(NamedTuple):
    """A face that is not somebody, of a dataset file.

    Attributes:
        id: Its own.
        subject: Who it is not.
        vector: Of length 1, shape ``[dimensions]``; None: it is the entry's.
        entry: The entry that it was, if it was one.
    """

    id: str
    subject: str
    vector: Floats | None
    entry: str | None = None


@dataclass(frozen=True)
class Head:
    """What a dataset file says of itself; the original's files name no embedder and no settings.

    Attributes:
        id: The dataset that it was.
        created_at: When that was created.
        embedder: What made the vectors.
        embedder_digest: Which version of it.
        settings: What the dataset was set to.
    """

    id: str | None = None
    created_at: datetime | None = None
    embedder: str | None = None
    embedder_digest: str | None = None
    settings: m.DatasetSettings | None = None


class Reader(Protocol):
    """A dataset file that is read once, from the first row to the last."""

    @property
    def head(self) -> Head:
        """What the file says of itself; certain once all its batches were given."""

    @property
    def total(self) -> int | None:
        """How many rows there are, where the format says so."""

    def batches(self) -> Iterator[list[Row]]:
        """Give the rows, up to `BATCH` at a time.

        Raises:
            Unprocessable: The file is broken, or a row cannot be taken; says which, and why.
        """

    def rejections(self) -> Iterator[list[RejectionRow]]:
        """Give the rejections, up to `BATCH` at a time, once all batches were given.

        Raises:
            Unprocessable: One cannot be taken; says which, and why.
        """


class Writer(Protocol):
    """A dataset file in the making: its rows wait beside it until it is written."""

    def add(self, rows: Sequence[Row]) -> None:
        """Take rows, which are numbered from 0 in the order in which they come."""

    def finish(
        self, rejections: Sequence[RejectionRow] = (), without: AbstractSet[int] = frozenset()
    ) -> None:
        """Write the file, or write it anew: all rows so far, and rejections.

        Args:
            rejections: All of them have their vector.
            without: The numbers of rows that are left out; not a byte of them is in the file.

        Raises:
            Unprocessable: What was added cannot be said in this format; says what.
        """

    def close(self) -> None:
        """Delete what lies beside the file; it can be done at any time, and again."""


def refuse(index: int, name: str | None, sentence: str, *, what: Kind = "entry") -> NoReturn:
    """Raise Unprocessable for a row, numbered from 0."""
    named = f" ({name[:80]!r})" if name else ""
    place = "entries" if what == "entry" else "rejections"
    raise Unprocessable(f"{what} {index:,}{named}: {sentence}", field=f"{place}[{index}]")


def text_in(
    value: object,
    index: int,
    name: str | None,
    field: str,
    *,
    most: int = TEXT_MAX,
    what: Kind = "entry",
) -> str:
    """Return a text of 1 to `most` characters, such as an id.

    Raises:
        Unprocessable: It is none.
    """
    if not isinstance(value, str) or not 1 <= len(value) <= most:
        found = f"{len(value):,} characters" if isinstance(value, str) else _kind_of(value)
        said = f"{field} must be a text of 1 to {most} characters, it is {found}"
        refuse(index, name, said, what=what)
    try:
        value.encode()
    except UnicodeEncodeError:
        refuse(index, None, f"{field} has half a character in it", what=what)
    return value


def unit_rows(
    block: npt.NDArray[Any], first: int, names: Sequence[str | None], *, what: Kind = "entry"
) -> Floats:
    """Return vectors at length 1, those that are already as they are.

    Args:
        block: Shape ``[n, dimensions]``, of any numbers.
        first: Which row of the file is the first one.
        names: Of the rows.
        what: They are.

    Raises:
        Unprocessable: One has a value that is not finite, or is all zeros; says which.
    """
    wide = np.asarray(block, np.float64)
    if len(bad := np.flatnonzero(~np.isfinite(wide).all(axis=1))):
        at = int(bad[0])
        place = int(np.flatnonzero(~np.isfinite(wide[at]))[0])
        said = f"embedding[{place}] is {wide[at, place]}, not a finite number"
        refuse(first + at, names[at], said, what=what)
    largest = np.abs(wide).max(axis=1, initial=0)
    if len(bad := np.flatnonzero(largest == 0)):
        at = int(bad[0])
        said = "its embedding is all zeros: it has no direction"
        refuse(first + at, names[at], said, what=what)
    # First by the largest value: the squares of huge or tiny ones leave what float64 can hold.
    scaled = wide / largest[:, None]
    lengths = np.linalg.norm(scaled, axis=1) * largest
    close = np.abs(lengths - 1) <= UNIT_WITHIN
    units = scaled / np.linalg.norm(scaled, axis=1, keepdims=True)
    units[close] = wide[close]
    return np.asarray(units, np.float32)


def check_length(
    found: int, dimensions: int, index: int, name: str | None, *, what: Kind = "entry"
) -> None:
    """Raise Unprocessable unless an embedding is as long as those of the dataset."""
    if found != dimensions:
        said = f"its embedding has {found:,} values, the dataset has vectors of {dimensions}"
        refuse(index, name, said, what=what)


def metadata_in(value: Any, index: int, entry: str) -> Any:
    """Return metadata; raises Unprocessable if they cannot be stored."""
    try:
        check_metadata(value)
    except BusError as error:
        refuse(index, entry, error.message)
    return value


def moment_in(value: object, index: int, entry: str) -> datetime | None:
    """Return a time in UTC; one without a zone is taken as that.

    Raises:
        Unprocessable: It is no time, or beyond what can be said in UTC.
    """
    if value is None:
        return None
    try:
        if isinstance(value, str):
            value = msgspec.convert(value, datetime)
        if not isinstance(value, datetime):
            refuse(index, entry, f"last_seen must be a time (RFC 3339), it is {_kind_of(value)}")
        return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)
    except (ValueError, OverflowError, msgspec.ValidationError):
        refuse(index, entry, f"last_seen: {str(value)[:40]!r} is no time that there can be")


def quality_in(value: object, index: int, entry: str) -> dict[str, float]:
    """Return the measures of a face; raises Unprocessable unless they are numbers by name."""
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > QUALITY_MAX:
        refuse(index, entry, f"quality must be up to {QUALITY_MAX} numbers by name")
    for name, measure in value.items():
        number = isinstance(measure, int | float) and not isinstance(measure, bool)
        if not isinstance(name, str) or not number or not np.isfinite(float(measure)):
            refuse(index, entry, f"quality: {str(name)[:40]!r} is no finite number")
    return {name: float(measure) for name, measure in value.items()}


def from_json(text: object, index: int, entry: str, name: str) -> Any:
    """Return what a column says that has JSON in it; None where it says nothing.

    Raises:
        Unprocessable: It is no JSON.
    """
    if text is None or text == "":
        return None
    if not isinstance(text, str):
        refuse(index, entry, f"{name} must be a text with JSON in it, it is {_kind_of(text)}")
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        refuse(index, entry, f"{name} is no JSON: {error}")


def as_json(value: Any) -> str:
    """Return a value as such a column has it; empty for nothing."""
    return "" if value is None or value == {} else msgspec.json.encode(value).decode()


def check_total(total: int) -> None:
    """Raise Unprocessable if a file says that it has more rows than any dataset."""
    if not 0 <= total <= ENTRIES_MAX:
        raise Unprocessable(
            f"the file says that it has {total:,} entries; allowed are {ENTRIES_MAX:,}",
            field="entries",
        )


def _kind_of(value: object) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"

"""What entries' metadata must be to be searched: fields, kept as columns once asked for."""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from bus.errors import InvalidRequest

COLUMNS_MAX: Final = 16
# What MessagePack can carry.
_INTEGERS: Final = (-(2**63), 2**64 - 1)
VALUES_MAX: Final = 1_000
SUBJECT: Final = "subject"

Hashes = npt.NDArray[np.uint64]

# Of an entry that has no such field; no value is given it.
_ABSENT: Final = 0


@dataclass(frozen=True)
class Wanted:
    """A field, and the hashes of which its value has to have one."""

    path: str
    hashes: frozenset[int]


@dataclass
class _Column:
    """One field of all rows.

    Attributes:
        hashes: Of each row's value; the first ones may be all that there are so far.
        within: The hash of something in a list to those of the lists that have it.
    """

    hashes: Hashes = field(default_factory=lambda: np.empty(0, np.uint64))
    within: dict[int, set[int]] = field(default_factory=dict)


class Columns:
    """The fields that searches have filtered by lately, as hashes of 64 bits for each row.

    Reading a million entries' metadata takes a second, comparing a million numbers less than a
    millisecond. Used by one thread at a time; whoever moves rows says so.
    """

    def __init__(self) -> None:
        self._columns: OrderedDict[str, _Column] = OrderedDict()

    def fits(self, wanted: Wanted, metadata: Sequence[bytes], n: int) -> npt.NDArray[np.bool_]:
        """Return which of the first `n` rows have one of the wanted values."""
        column = self._columns.setdefault(wanted.path, _Column())
        self._columns.move_to_end(wanted.path)
        if len(self._columns) > COLUMNS_MAX:
            self._columns.popitem(last=False)
        known = len(column.hashes)
        if known < n:
            path = wanted.path.split(".")
            more = [_read(raw, path, column) for raw in metadata[known:n]]
            column.hashes = np.concatenate([column.hashes, np.array(more, np.uint64)])
        hashes = set(wanted.hashes)
        for one in wanted.hashes:
            hashes |= column.within.get(one, set())
        values = np.array(sorted(hashes), np.uint64)
        if len(values) > 8:
            return np.isin(column.hashes[:n], values)
        mask = np.zeros(n, np.bool_)
        for value in values:
            mask |= column.hashes[:n] == value
        return mask

    def move(self, holes: npt.NDArray[np.int64], movers: npt.NDArray[np.int64], n: int) -> None:
        """Follow the rows `movers` to their new places `holes`; `n` rows are left."""
        for column in self._columns.values():
            known = len(column.hashes)
            if len(movers) and movers[-1] >= known:
                # Some of what moves has not been read yet: it is, when it is asked for again.
                column.hashes = column.hashes[: min(known, n, int(holes[0]))].copy()
            else:
                column.hashes[holes] = column.hashes[movers]
                column.hashes = column.hashes[:n].copy()


def compiled(asked: Mapping[str, Any]) -> tuple[tuple[Wanted, ...], frozenset[str] | None]:
    """Turn a filter into what is wanted of metadata, and whose entries; None for anybody's.

    Raises:
        InvalidRequest: A field has no name, too many values, or one that cannot be there; or a
            person is no text.
    """
    wanted: list[Wanted] = []
    subjects: frozenset[str] | None = None
    for path, value in asked.items():
        values = value if isinstance(value, list) else [value]
        place = f"filter.{path}"
        if not all(path.split(".")):
            raise InvalidRequest(
                f"filter: {path!r} names no field; dots stand between the names of fields",
                field="filter",
            )
        if len(values) > VALUES_MAX:
            raise InvalidRequest(
                f"{place} has {len(values):,} values, allowed are {VALUES_MAX:,}", field=place
            )
        if not all(_INTEGERS[0] <= one <= _INTEGERS[1] for one in values if isinstance(one, int)):
            raise InvalidRequest(
                f"{place}: metadata have no numbers of more than 64 bits", field="filter"
            )
        if path == SUBJECT:
            if not all(isinstance(one, str) for one in values):
                raise InvalidRequest(f"{place}: persons are named by texts", field=place)
            subjects = frozenset(values)
        else:
            wanted.append(Wanted(path, frozenset(_hash(one) for one in values)))
    return tuple(wanted), subjects


def _read(raw: bytes, path: list[str], column: _Column) -> int:
    value = read(raw)
    for name in path:
        if not isinstance(value, dict) or name not in value:
            return _ABSENT
        value = value[name]
    whole = _hash(value)
    if isinstance(value, list):
        for one in value:
            column.within.setdefault(_hash(one), set()).add(whole)
    return whole


def read(raw: bytes) -> Any:
    """Return metadata as they were enrolled; None where an event carried what cannot be read."""
    if not raw:
        return None
    try:
        return msgspec.msgpack.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, OverflowError, RecursionError, ValueError):
        return None


def measures(raw: bytes) -> dict[str, float]:
    """Return a face's measures as they were enrolled; none where they cannot be read."""
    value = read(raw)
    try:
        return msgspec.convert(value, dict[str, float]) if value is not None else {}
    except msgspec.ValidationError:
        return {}


def _hash(value: Any) -> int:
    """Return what stands for a value: equal ones have the same, whole numbers of any type too.

    64 bits: among a million entries two different values are taken for each other with a
    probability of one to ten million millions.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    try:
        text = msgspec.json.encode(value, order="sorted")
    except (TypeError, ValueError, OverflowError):
        # A number that JSON cannot carry; it was enrolled by MessagePack.
        text = repr(value).encode()
    made = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    return made or 1

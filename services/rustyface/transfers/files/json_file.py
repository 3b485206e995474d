"""Dataset files in JSON, as the original kept them, read piece by piece.

``{id, created_at, updated_at, entries: [{id, embedding, metadata, last_seen}]}``, and beside these
`embedder`, `settings` and `rejections` (``[{id, subject, entry, embedding}]``), and of an entry
`subject` and `quality`. A file may be larger than the memory: so the ends of its values are looked
for here, and each value is decoded by itself.
"""

import os
import re
from array import array
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Final

import msgspec
import numpy as np

from bus import codec, private
from bus.errors import BusError, Unprocessable
from services.rustyface.transfers.files.carried import (
    HEAD_KEYS,
    as_numbers,
    as_said,
    check_many,
    head_in,
    rejections_in,
)
from services.rustyface.transfers.files.rows import (
    BATCH,
    ENTRIES_MAX,
    Head,
    Kind,
    RejectionRow,
    Row,
    check_length,
    metadata_in,
    moment_in,
    quality_in,
    refuse,
    text_in,
    unit_rows,
)

# One value: an entry with the longest vector and the largest metadata has less.
PIECE_MAX_BYTES: Final = 2 * 1024 * 1024
_READ_BYTES: Final = 1024 * 1024
# Whole strings, so that brackets in them do not count; one that is cut off has no `end`. Lists of
# numbers are taken in one go, and what lies between as well: three times as fast as a search for
# the brackets alone.
_STRING: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+(?P<end>")?', re.DOTALL)
_TOKEN: Final = re.compile(
    rb'[^"\[\]{}]*+(?P<token>"(?:[^"\\]++|\\.)*+(?P<end>")?'
    rb'|(?P<flat>\[[^"\[\]{}]*+\])|[\[\]{}])',
    re.DOTALL,
)
_QUOTE: Final = ord('"')
_NEXT: Final = b",\n"
_SPACE: Final = re.compile(rb"[ \t\r\n]*")
_SCALAR: Final = re.compile(rb"[^,\[\]{}:\"\s]*")
_BOM: Final = b"\xef\xbb\xbf"


class _Entry(msgspec.Struct):
    id: str
    embedding: list[float]
    metadata: Any = None
    last_seen: str | None = None
    subject: str | None = None
    quality: dict[str, float] | None = None


class _Written(msgspec.Struct, omit_defaults=True):
    """An entry as it is written: `embedding` is JSON already."""

    id: str
    embedding: msgspec.Raw
    metadata: Any
    last_seen: datetime | None
    subject: str | None = None
    quality: dict[str, float] = {}


class JsonReader:
    """Reads a dataset file in JSON.

    Args:
        path: Where it lies.
        dimensions: How long its vectors have to be.
    """

    total = None

    def __init__(self, path: Path, dimensions: int) -> None:
        self._path = path
        self._dimensions = dimensions
        self._said: dict[str, Any] = {}
        # Where the list of rejections begins, behind its bracket.
        self._rejections_at: int | None = None
        self.head = Head()

    def batches(self) -> Iterator[list[Row]]:
        """See `Reader.batches`."""
        with self._path.open("rb") as file:
            waiting: list[_Entry] = []
            first = 0
            for index, piece in enumerate(self._entries(_Text(file))):
                if index >= ENTRIES_MAX:
                    refuse(index, None, f"a file may have {ENTRIES_MAX:,} entries")
                waiting.append(self._entry_in(piece, index))
                if len(waiting) == BATCH:
                    yield self._rows(waiting, first)
                    first += len(waiting)
                    waiting = []
            if waiting:
                yield self._rows(waiting, first)

    def rejections(self) -> Iterator[list[RejectionRow]]:
        """See `Reader.rejections`."""
        if self._rejections_at is None:
            return
        with self._path.open("rb") as file:
            file.seek(self._rejections_at)
            yield from rejections_in(_Text(file).listed("rejection"), self._dimensions)

    def _entries(self, text: "_Text") -> Iterator[bytes]:
        """Give the JSON of each entry; what else the file says goes to `head`, and rejections wait.

        They may stand before the entries, and there may be many of them.
        """
        text.take(b"{", "a dataset file is an object: {id, entries: [...]}")
        found = False
        more = text.peek() != b"}"
        while more:
            key = _decoded(text.value(), "a name")
            if not isinstance(key, str):
                raise Unprocessable(f"the file is no JSON: {str(key)[:40]!r} is no name of a field")
            text.take(b":", f"behind {key[:40]!r}")
            if key == "entries":
                if found:
                    raise Unprocessable("the file has entries twice", field="entries")
                found = True
                text.take(b"[", "entries must be a list")
                yield from text.listed("entry")
            elif key == "rejections":
                if self._rejections_at is not None:
                    raise Unprocessable("the file has rejections twice", field="rejections")
                text.take(b"[", "rejections must be a list")
                self._rejections_at = text.at
                for index, _ in enumerate(text.listed("rejection")):
                    check_many(index)
            else:
                said = _decoded(text.value(), key[:40])
                # Of others there may be as many as the file is long.
                if key in HEAD_KEYS:
                    self._said[key] = said
            more = text.comma_or(b"}", f"behind {key[:40]!r}")
        text.take(b"}", "the file ends so")
        if text.peek():
            raise Unprocessable("the file is no JSON: something stands behind its end")
        if not found:
            raise Unprocessable("the file has no entries: it is no dataset file", field="entries")
        self.head = head_in(self._said)

    def _entry_in(self, piece: bytes, index: int) -> _Entry:
        try:
            return codec.decode(piece, _Entry)
        except BusError as error:
            refuse(index, _id_in(piece), error.message)
        except (OverflowError, ValueError) as error:
            refuse(index, _id_in(piece), f"it cannot be read: {error}")

    def _rows(self, entries: list[_Entry], first: int) -> list[Row]:
        ids = [text_in(e.id, i, None, "id") for i, e in enumerate(entries, first)]
        for index, entry in enumerate(entries, first):
            check_length(len(entry.embedding), self._dimensions, index, entry.id)
        vectors = unit_rows(np.array([e.embedding for e in entries], np.float64), first, ids)
        return [
            Row(
                entry.id,
                vector,
                metadata_in(entry.metadata, index, entry.id),
                None
                if entry.subject is None
                else text_in(entry.subject, index, entry.id, "subject"),
                moment_in(entry.last_seen, index, entry.id),
                quality_in(entry.quality, index, entry.id),
            )
            for index, (entry, vector) in enumerate(zip(entries, vectors, strict=True), first)
        ]


class JsonWriter:
    """Writes a dataset file in JSON, an entry a line.

    Args:
        path: Where.
        head: What it says of itself.
        dimensions: How long the vectors are.
    """

    def __init__(self, path: Path, head: Head, dimensions: int) -> None:
        self._path = path
        self._head = head
        self._dimensions = dimensions
        self._beside = path.with_name(f"{path.name}.rows")
        self._rows = private.opened(self._beside)
        # Where each row ends in there.
        self._ends = array("Q")

    def add(self, rows: Sequence[Row]) -> None:
        """See `Writer.add`."""
        at = self._rows.seek(0, os.SEEK_END)
        for row in rows:
            vector = as_numbers(row.vector)
            entry = _Written(row.id, vector, row.metadata, row.last_seen, row.subject, row.quality)
            at += self._rows.write(msgspec.json.encode(entry) + _NEXT)
            self._ends.append(at)

    def finish(
        self, rejections: Sequence[RejectionRow] = (), without: AbstractSet[int] = frozenset()
    ) -> None:
        """See `Writer.finish`."""
        head = self._head
        said = {
            "id": head.id,
            "created_at": head.created_at,
            "updated_at": datetime.now(UTC),
            "embedder": head.embedder,
            "embedder_digest": head.embedder_digest,
            "dimensions": self._dimensions,
            "settings": head.settings,
        }
        with private.opened(self._path) as file:
            file.write(msgspec.json.encode(said)[:-1] + b',"entries":[\n')
            begins = file.tell()
            for start, end in self._kept(without):
                self._copy(start, end, file)
            _end_list(file, begins)
            if rejections:
                file.write(b',"rejections":[\n')
                begins = file.tell()
                for row in rejections:
                    file.write(as_said(row) + _NEXT)
                _end_list(file, begins)
            file.write(b"}\n")

    def close(self) -> None:
        """See `Writer.close`."""
        # What could not be written is tried once more, and the disk may still be full.
        try:
            self._rows.close()
        finally:
            self._beside.unlink(missing_ok=True)

    def _kept(self, without: AbstractSet[int]) -> Iterator[tuple[int, int]]:
        """Give from where to where rows are kept."""
        start = 0
        for row in sorted(without):
            yield start, self._ends[row - 1] if row else 0
            start = self._ends[row]
        yield start, self._ends[-1] if self._ends else 0

    def _copy(self, start: int, end: int, file: IO[bytes]) -> None:
        self._rows.seek(start)
        while start < end:
            block = self._rows.read(min(_READ_BYTES, end - start))
            file.write(block)
            start += len(block)


def _end_list(file: IO[bytes], begins: int) -> None:
    """End a list; what stands between two values is taken back behind the last one."""
    if file.tell() > begins:
        file.seek(-len(_NEXT), os.SEEK_CUR)
        file.write(b"\n")
        file.truncate()
    file.write(b"]")


class _Text:
    """JSON that is read from a file as far as it is needed."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._buffer = file.read(_READ_BYTES).removeprefix(_BOM)
        self._at = 0

    @property
    def at(self) -> int:
        """Where in the file the next character stands."""
        return self._file.tell() - len(self._buffer) + self._at

    def peek(self) -> bytes:
        """Return the next character that is no space; empty at the end."""
        while True:
            space = _SPACE.match(self._buffer, self._at)
            self._at = space.end() if space else self._at
            if self._at < len(self._buffer) or not self._more():
                return self._buffer[self._at : self._at + 1]

    def take(self, wanted: bytes, why: str) -> None:
        """Pass over a character that has to come next; raises Unprocessable if it does not."""
        if (found := self.peek()) != wanted:
            there = f"{found.decode(errors='replace')!r} stands" if found else "the file ends"
            raise Unprocessable(
                f"the file is no dataset in JSON: {there} where {wanted.decode()!r} should: {why}"
            )
        self._at += 1

    def comma_or(self, end: bytes, where: str) -> bool:
        """Tell whether a comma comes next, and pass over it; else `end` has to, and stays."""
        if self.peek() == b",":
            self._at += 1
            if self.peek() == end:
                raise Unprocessable(f"the file is no JSON: nothing follows the comma {where}")
            return True
        if self.peek() != end:
            self.take(end, where)
        return False

    def listed(self, what: Kind) -> Iterator[bytes]:
        """Give the values of a list whose first bracket was taken, and take the last one."""
        more = self.peek() != b"]"
        count = 0
        while more:
            yield self.value()
            count += 1
            more = self.comma_or(b"]", f"behind {what} {count - 1:,}")
        self.take(b"]", f"the list ends so behind {what} {count - 1:,}")

    def value(self) -> bytes:
        """Return the JSON of the next value, which may still be wrong inside.

        Raises:
            Unprocessable: The file ends in it, or it is larger than any that is allowed.
        """
        first = self.peek()
        if not first:
            raise Unprocessable("the file ends in the middle: a part of it is missing")
        if first in (b"{", b"["):
            return self._bracketed()
        pattern = _STRING if first == b'"' else _SCALAR
        while True:
            found = pattern.match(self._buffer, self._at)
            whole = found is not None and (
                found["end"] is not None if first == b'"' else found.end() < len(self._buffer)
            )
            if found is not None and (whole or not self._more()):
                return self._cut(max(found.end(), self._at + 1))

    def _bracketed(self) -> bytes:
        depth, scanned = 0, self._at
        while True:
            # Never a search: where no token follows it would begin anew at every character.
            while (token := _TOKEN.match(self._buffer, scanned)) is not None:
                sign = self._buffer[token.start("token")]
                if sign == _QUOTE:
                    if token["end"] is None:
                        break
                elif token["flat"] is None:
                    depth += 1 if sign in b"[{" else -1
                if depth == 0 and sign != _QUOTE:
                    return self._cut(token.end())
                scanned = token.end()
            ahead = scanned - self._at
            if not self._more():
                raise Unprocessable("the file ends in the middle of a value: a part is missing")
            scanned = self._at + ahead

    def _cut(self, end: int) -> bytes:
        piece = self._buffer[self._at : end]
        self._at = end
        return piece

    def _more(self) -> bool:
        """Read on, with what was passed over let go; tell whether there was anything."""
        if len(self._buffer) - self._at > PIECE_MAX_BYTES:
            raise Unprocessable(
                f"a value of the file has more than {PIECE_MAX_BYTES:,} bytes; an entry never has"
            )
        block = self._file.read(_READ_BYTES)
        self._buffer, self._at = self._buffer[self._at :] + block, 0
        return bool(block)


def _decoded(piece: bytes, what: str) -> Any:
    try:
        return msgspec.json.decode(piece)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise Unprocessable(f"the file is no JSON: {what}: {error}") from None


def _id_in(piece: bytes) -> str | None:
    """Return the id of an entry that cannot be read, if at least that can."""
    try:
        found = msgspec.json.decode(piece)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None
    name = found.get("id") if isinstance(found, dict) else None
    return name if isinstance(name, str) else None

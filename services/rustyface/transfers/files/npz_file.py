"""Dataset files of numpy: a zip of the arrays `embeddings`, `ids`, and what else there is.

| array | what it has |
| --- | --- |
| `embeddings` | shape ``[n, d]``, floating point |
| `ids` | n texts |
| `subjects` | n texts, empty for nobody; may be absent, as all below |
| `metadata`, `quality` | n texts with JSON in them, empty for none |
| `last_seen` | n times (``datetime64``, UTC, or texts) |
| `dataset`, `created_at` | one text: which dataset it was; when that was created |
| `updated_at` | one text: when the file was written |
| `embedder`, `embedder_digest` | one text: what made the vectors |
| `settings` | one text with JSON in it: what the dataset was set to |
| `rejection_embeddings` | shape ``[m, d]``, floating point: faces that are not somebody |
| `rejection_subjects` | m texts: who they are not |
| `rejection_entries`, `rejection_ids` | m texts: the entry that each was, empty for none; its id |

The arrays are read side by side, a batch of rows of each.
"""

import contextlib
import zipfile
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from bus import private
from bus.errors import Unprocessable
from services.rustyface.galleries.galleries import METADATA_MAX_BYTES
from services.rustyface.transfers.files.carried import check_many, head_in, rejection
from services.rustyface.transfers.files.npz_arrays import (
    Array,
    Columns,
    array_in,
    moments_in,
    one_text,
    put_text,
    reading,
    texts_in,
)
from services.rustyface.transfers.files.rows import (
    BATCH,
    TEXT_MAX,
    Head,
    Kind,
    RejectionRow,
    Row,
    as_json,
    check_length,
    check_total,
    from_json,
    metadata_in,
    moment_in,
    quality_in,
    text_in,
    unit_rows,
)

# Of the rows of one batch, in all arrays together.
BATCH_MAX_BYTES: Final = 32 * 1024 * 1024
SETTINGS_MAX_BYTES: Final = 64 * 1024
_HEAD: Final = ("dataset", "created_at", "embedder", "embedder_digest")
# Kept as UTF-8.
_PACKED: Final = ("metadata", "quality")


class _Table(NamedTuple):
    """Arrays whose rows belong together.

    Attributes:
        what: The rows are.
        vectors: The array of their vectors.
        needed: Those that have to be there, and have one text for each row.
        more: Those that may be there as well.
    """

    what: Kind
    vectors: str
    needed: str
    more: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return (self.vectors, self.needed, *self.more)


_ENTRIES: Final = _Table(
    "entry", "embeddings", "ids", ("subjects", "metadata", "quality", "last_seen")
)
_REJECTIONS: Final = _Table(
    "rejection",
    "rejection_embeddings",
    "rejection_subjects",
    ("rejection_entries", "rejection_ids"),
)


class NpzReader:
    """Reads a dataset file of numpy.

    Args:
        path: Where it lies.
        dimensions: How long its vectors have to be.

    Raises:
        Unprocessable: It is none.
    """

    def __init__(self, path: Path, dimensions: int) -> None:
        self._path = path
        self._dimensions = dimensions
        with reading(path) as archive, contextlib.ExitStack() as opened:
            entries = self._opened(archive, _ENTRIES, opened)
            self.total: int | None = entries["ids"].shape[0]
            there = set(archive.namelist())
            self._rejects = any(f"{name}.npy" in there for name in _REJECTIONS.names)
            if self._rejects:
                self._opened(archive, _REJECTIONS, opened)
            said: dict[str, Any] = {name: one_text(archive, name, 4 * TEXT_MAX) for name in _HEAD}
            settings = _settings_in(archive)
            self.head = head_in(said | {"id": said["dataset"], "settings": settings})

    def batches(self) -> Iterator[list[Row]]:
        """See `Reader.batches`."""
        for first, columns in self._columns(_ENTRIES):
            yield self._rows(columns, first)

    def rejections(self) -> Iterator[list[RejectionRow]]:
        """See `Reader.rejections`."""
        if not self._rejects:
            return
        for first, columns in self._columns(_REJECTIONS):
            yield self._rejection_rows(columns, first)

    def _columns(self, table: _Table) -> Iterator[tuple[int, dict[str, npt.NDArray[Any]]]]:
        """Give rows of arrays that belong together, and which is the first of them."""
        with reading(self._path) as archive, contextlib.ExitStack() as opened:
            arrays = self._opened(archive, table, opened)
            total = arrays[table.vectors].shape[0]
            row_bytes = sum(array.row_bytes for array in arrays.values())
            step = max(1, min(BATCH, BATCH_MAX_BYTES // max(1, row_bytes)))
            for first in range(0, total, step):
                count = min(step, total - first)
                yield first, {name: array.rows(count) for name, array in arrays.items()}
            for array in arrays.values():
                # At its end the zip compares the checksum.
                if array.file.read(1):
                    raise Unprocessable(f"the array {array.name} goes on behind its last row")

    def _rows(self, columns: dict[str, npt.NDArray[Any]], first: int) -> list[Row]:
        named = enumerate(texts_in(columns["ids"], first, "ids"), first)
        ids = [text_in(one, index, None, "id") for index, one in named]
        vectors = unit_rows(columns["embeddings"], first, ids)

        def texts(name: str) -> list[str]:
            if name not in columns:
                return [""] * len(ids)
            return texts_in(columns[name], first, name)

        subjects, metadata, quality = texts("subjects"), texts("metadata"), texts("quality")
        seen = (
            moments_in(columns["last_seen"], first) if "last_seen" in columns else [None] * len(ids)
        )
        rows = []
        for at, entry in enumerate(ids):
            index = first + at
            subject = text_in(subjects[at], index, entry, "subject") if subjects[at] else None
            row = Row(
                entry,
                vectors[at],
                metadata_in(from_json(metadata[at], index, entry, "metadata"), index, entry),
                subject,
                moment_in(seen[at], index, entry),
                quality_in(from_json(quality[at], index, entry, "quality"), index, entry),
            )
            rows.append(row)
        return rows

    def _rejection_rows(
        self, columns: dict[str, npt.NDArray[Any]], first: int
    ) -> list[RejectionRow]:
        def texts(name: str) -> list[str]:
            if name not in columns:
                return [""] * len(columns[_REJECTIONS.vectors])
            return texts_in(columns[name], first, name, what="rejection")

        subjects, entries = texts("rejection_subjects"), texts("rejection_entries")
        ids = texts("rejection_ids")
        faces = unit_rows(columns[_REJECTIONS.vectors], first, ids, what="rejection")
        return [
            rejection(first + at, ids[at] or None, subject, entries[at] or None, faces[at])
            for at, subject in enumerate(subjects)
        ]

    def _opened(
        self, archive: zipfile.ZipFile, table: _Table, opened: contextlib.ExitStack
    ) -> dict[str, Array]:
        """Open arrays whose rows belong together, their headers read and found to fit."""
        there = set(archive.namelist())
        needed = (table.vectors, table.needed)
        if missing := [name for name in needed if f"{name}.npy" not in there]:
            known = ", ".join(sorted(name.removesuffix(".npy")[:40] for name in there)) or "none"
            raise Unprocessable(
                f"the file has no array {missing[0]}; there are: {known}", field=missing[0]
            )
        arrays = {
            name: array_in(archive, name, opened) for name in table.names if f"{name}.npy" in there
        }
        vectors = arrays[table.vectors]
        if vectors.dtype.kind != "f" or len(vectors.shape) != 2:
            raise Unprocessable(
                f"{table.vectors} must be floating point numbers of shape "
                f"[n, {self._dimensions}], they are {vectors.dtype} of shape "
                f"{list(vectors.shape)}",
                field=table.vectors,
            )
        total = vectors.shape[0]
        if table is _ENTRIES:
            check_total(total)
        else:
            check_many(total - 1)
        check_length(vectors.shape[1], self._dimensions, 0, None, what=table.what)
        for name, array in arrays.items():
            if array.shape[:1] != (total,) or (name != table.vectors and len(array.shape) != 1):
                raise Unprocessable(
                    f"{name} has the shape {list(array.shape)}, {table.vectors} have {total:,} "
                    "rows",
                    field=name,
                )
            if name != table.vectors:
                _check_column(name, array.dtype)
        return arrays


class NpzWriter:
    """Writes a dataset file of numpy.

    Args:
        path: Where.
        head: What it says of itself.
        dimensions: How long the vectors are.
    """

    def __init__(self, path: Path, head: Head, dimensions: int) -> None:
        self._path = path
        self._head = head
        self._dimensions = dimensions
        self._entries = Columns(
            path,
            "entry",
            fixed={"embeddings": ("<f4", (dimensions,)), "last_seen": ("<M8[us]", ())},
            texts=("ids", "subjects", *_PACKED),
            packed=_PACKED,
        )

    def add(self, rows: Sequence[Row]) -> None:
        """See `Writer.add`."""
        for row in rows:
            seen = None if row.last_seen is None else row.last_seen.replace(tzinfo=None)
            self._entries.add(
                row.id,
                {
                    "embeddings": row.vector.astype("<f4").tobytes(),
                    "last_seen": np.array(seen, "<M8[us]").tobytes(),
                },
                {
                    "ids": row.id,
                    "subjects": row.subject or "",
                    "metadata": as_json(row.metadata),
                    "quality": as_json(row.quality),
                },
            )

    def finish(
        self, rejections: Sequence[RejectionRow] = (), without: AbstractSet[int] = frozenset()
    ) -> None:
        """See `Writer.finish`."""
        head = self._head
        said = {
            "embedder": head.embedder,
            "embedder_digest": head.embedder_digest,
            "dataset": head.id,
            "created_at": head.created_at.isoformat() if head.created_at else None,
            # No two files are the same: deleting one never takes another with it.
            "updated_at": datetime.now(UTC).isoformat(),
            "settings": msgspec.json.encode(head.settings).decode() if head.settings else None,
        }
        with (
            private.opened(self._path) as file,
            zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        ):
            self._entries.put_into(archive, without)
            if rejections:
                self._put_rejections(archive, rejections)
            for name, text in said.items():
                if text:
                    put_text(archive, name, text)

    def close(self) -> None:
        """See `Writer.close`."""
        self._entries.close()

    def _put_rejections(self, archive: zipfile.ZipFile, rejections: Sequence[RejectionRow]) -> None:
        columns = Columns(
            self._path,
            "rejection",
            fixed={_REJECTIONS.vectors: ("<f4", (self._dimensions,))},
            texts=(_REJECTIONS.needed, *_REJECTIONS.more),
        )
        with contextlib.closing(columns):
            for row in rejections:
                columns.add(
                    row.id,
                    {_REJECTIONS.vectors: np.asarray(row.vector, "<f4").tobytes()},
                    {
                        "rejection_subjects": row.subject,
                        "rejection_entries": row.entry or "",
                        "rejection_ids": row.id,
                    },
                )
            columns.put_into(archive)


def _check_column(name: str, dtype: np.dtype[Any]) -> None:
    if name == "last_seen":
        if dtype.kind not in "MUS":
            raise Unprocessable(f"last_seen must be datetime64 or texts, it is {dtype}", field=name)
        return
    wide = METADATA_MAX_BYTES if name in _PACKED else 4 * TEXT_MAX
    characters = dtype.itemsize // (4 if dtype.kind == "U" else 1)
    if dtype.kind not in "US" or characters > 6 * wide:
        raise Unprocessable(
            f"{name} must be texts of at most {wide:,} characters, they are {dtype}", field=name
        )


def _settings_in(archive: zipfile.ZipFile) -> Any:
    """Return what the file says of settings, as JSON has it.

    Raises:
        Unprocessable: It says something, but not so.
    """
    text = one_text(archive, "settings", SETTINGS_MAX_BYTES)
    if text is None and "settings.npy" in archive.namelist():
        raise Unprocessable(
            f"settings must be one text of at most {SETTINGS_MAX_BYTES:,} bytes with JSON in it",
            field="settings",
        )
    try:
        return None if text is None else msgspec.json.decode(text)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise Unprocessable(f"settings are no JSON: {error}", field="settings") from None

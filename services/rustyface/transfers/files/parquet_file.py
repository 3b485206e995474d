"""Dataset files in Parquet: `id`, `embedding`, and `subject`, `metadata`, `quality`, `last_seen`.

`embedding` is a list of floating point numbers, `metadata` and `quality` are texts with JSON in
them, `last_seen` is a timestamp. Beside the columns, the metadata of the file have under `bkg` what
it says of itself, settings included, and under `bkg.rejections` the rejections, both as JSON.
pyarrow is an extra: without it a file is refused in a sentence.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from bus import codec, private
from bus.errors import BusError, Unprocessable
from services.rustyface.transfers.files.carried import as_said, head_in, rejections_in
from services.rustyface.transfers.files.rows import (
    BATCH,
    Head,
    RejectionRow,
    Row,
    as_json,
    check_length,
    check_total,
    from_json,
    metadata_in,
    moment_in,
    quality_in,
    refuse,
    text_in,
    unit_rows,
)

NEEDED: Final = ("id", "embedding")
KNOWN: Final = (*NEEDED, "subject", "metadata", "quality", "last_seen")
# What one group of rows says that it unpacks to: it is held as a whole.
GROUP_MAX_BYTES: Final = 1024 * 1024 * 1024
GROUP_ROWS: Final = 10_000
# Metadata are read as a whole, when the file is opened.
REJECTIONS_MAX_BYTES: Final = 32 * 1024 * 1024
# Before each group of rows that waits.
_LENGTH_BYTES: Final = 8
_SAID: Final = b"bkg"
_REJECTIONS: Final = b"bkg.rejections"
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class ParquetReader:
    """Reads a dataset file in Parquet, a group of rows at a time.

    Args:
        path: Where it lies.
        dimensions: How long its vectors have to be.

    Raises:
        Unprocessable: It is none, or pyarrow is missing.
    """

    def __init__(self, path: Path, dimensions: int) -> None:
        self._path = path
        self._dimensions = dimensions
        with _reading(path) as file:
            self.total: int | None = int(file.metadata.num_rows)
            check_total(self.total)
            self._check(file)
            self.head = head_in(_object_in(file, _SAID, dict))

    def batches(self) -> Iterator[list[Row]]:
        """See `Reader.batches`."""
        first = 0
        with _reading(self._path) as file:
            columns = [name for name in KNOWN if name in file.schema_arrow.names]
            for batch in file.iter_batches(BATCH, columns=columns, use_threads=False):
                rows = self._rows(batch, first)
                first += len(rows)
                yield rows
        if first != self.total:
            raise Unprocessable(f"the file says that it has {self.total:,} rows, it has {first:,}")

    def rejections(self) -> Iterator[list[RejectionRow]]:
        """See `Reader.rejections`."""
        with _reading(self._path) as file:
            pieces: list[msgspec.Raw] = _object_in(file, _REJECTIONS, list[msgspec.Raw])
        yield from rejections_in((bytes(one) for one in pieces), self._dimensions)

    def _check(self, file: Any) -> None:
        schema, arrow = file.schema_arrow, _pyarrow()
        for name in NEEDED:
            if name not in schema.names:
                known = ", ".join(one[:40] for one in schema.names[:20]) or "none"
                raise Unprocessable(
                    f"the file has no column {name}; there are: {known}", field=name
                )
        for name in KNOWN:
            if schema.names.count(name) > 1:
                raise Unprocessable(f"the file has the column {name} twice", field=name)
            if name in schema.names:
                found = schema.field(name).type
                if not _fits(name, found, arrow.types):
                    wanted = {"embedding": "a list of floats", "last_seen": "a timestamp or texts"}
                    raise Unprocessable(
                        f"{name} must be {wanted.get(name, 'texts')}, it is {str(found)[:80]}",
                        field=name,
                    )
        for at in range(file.metadata.num_row_groups):
            size = file.metadata.row_group(at).total_byte_size
            if not 0 <= size <= GROUP_MAX_BYTES:
                raise Unprocessable(
                    f"row group {at} has {size:,} bytes, allowed are {GROUP_MAX_BYTES:,}; write "
                    "smaller groups of rows"
                )

    def _rows(self, batch: Any, first: int) -> list[Row]:
        said = {name: batch.column(name) for name in batch.schema.names}

        def column(name: str) -> list[Any]:
            if name not in said:
                return [None] * batch.num_rows
            found = said[name]
            if _pyarrow().types.is_timestamp(found.type):
                return _moments(found, first)
            values: list[Any] = found.to_pylist()
            return values

        ids = [text_in(one, i, None, "id") for i, one in enumerate(column("id"), first)]
        vectors = unit_rows(self._block(said["embedding"], first, ids), first, ids)
        subjects, metadata, quality = column("subject"), column("metadata"), column("quality")
        seen = column("last_seen")
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

    def _block(self, column: Any, first: int, ids: Sequence[str]) -> Any:
        """Return the vectors of a batch, shape ``[n, dimensions]``."""
        lengths = _pyarrow().compute.list_value_length(column).to_pylist()
        for at, length in enumerate(lengths):
            if length is None:
                refuse(first + at, ids[at], "its embedding is missing")
            check_length(length, self._dimensions, first + at, ids[at])
        values = column.flatten()
        if values.null_count:
            at = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
            row, place = divmod(at, self._dimensions)
            refuse(first + row, ids[row], f"embedding[{place}] is null, not a finite number")
        return values.to_numpy(zero_copy_only=False).reshape(len(ids), self._dimensions)


class ParquetWriter:
    """Writes a dataset file in Parquet.

    Args:
        path: Where.
        head: What it says of itself.
        dimensions: How long the vectors are.

    Raises:
        Unprocessable: pyarrow is missing.
    """

    def __init__(self, path: Path, head: Head, dimensions: int) -> None:
        arrow = _pyarrow()
        # No two files are the same: deleting one never takes another with it.
        said = codec.plain(head) | {"updated_at": datetime.now(UTC)}
        self._schema = arrow.schema(
            [
                arrow.field("id", arrow.string(), nullable=False),
                arrow.field("embedding", arrow.list_(arrow.float32()), nullable=False),
                arrow.field("subject", arrow.string()),
                arrow.field("metadata", arrow.string()),
                arrow.field("quality", arrow.string()),
                arrow.field("last_seen", arrow.timestamp("us", tz="UTC")),
            ],
            metadata={_SAID: msgspec.json.encode(said)},
        )
        self._path = path
        self._dimensions = dimensions
        self._waiting: list[Row] = []
        self._beside = path.with_name(f"{path.name}.rows")
        self._groups = private.opened(self._beside)

    def add(self, rows: Sequence[Row]) -> None:
        """See `Writer.add`."""
        self._waiting += rows
        if len(self._waiting) >= GROUP_ROWS:
            self._put()

    def finish(
        self, rejections: Sequence[RejectionRow] = (), without: AbstractSet[int] = frozenset()
    ) -> None:
        """See `Writer.finish`."""
        arrow = _pyarrow()
        if self._waiting:
            self._put()
        said = _listed(rejections)
        first = 0
        with (
            private.opened(self._path) as file,
            arrow.parquet.ParquetWriter(file, self._schema, compression="zstd") as written,
        ):
            for group in self._kept():
                rows = range(first, first + group.num_rows)
                first += len(rows)
                keep = arrow.array([row not in without for row in rows], arrow.bool_())
                written.write_table(arrow.Table.from_batches([group.filter(keep)]))
            if said is not None:
                written.add_key_value_metadata({_REJECTIONS: said})

    def close(self) -> None:
        """See `Writer.close`."""
        # What could not be written is tried once more, and the disk may still be full.
        try:
            self._groups.close()
        finally:
            self._beside.unlink(missing_ok=True)

    def _put(self) -> None:
        """Have rows wait in a group, with its length before it."""
        arrow, rows = _pyarrow(), self._waiting
        self._waiting = []
        values = np.concatenate([row.vector for row in rows]).astype(np.float32)
        offsets = np.arange(len(rows) + 1, dtype=np.int32) * self._dimensions
        columns = [
            arrow.array([row.id for row in rows], arrow.string()),
            arrow.ListArray.from_arrays(arrow.array(offsets), arrow.array(values)),
            arrow.array([row.subject for row in rows], arrow.string()),
            arrow.array([as_json(row.metadata) or None for row in rows], arrow.string()),
            arrow.array([as_json(row.quality) or None for row in rows], arrow.string()),
            arrow.array([row.last_seen for row in rows], arrow.timestamp("us", tz="UTC")),
        ]
        body = arrow.RecordBatch.from_arrays(columns, schema=self._schema).serialize()
        self._groups.seek(0, os.SEEK_END)
        self._groups.write(body.size.to_bytes(_LENGTH_BYTES, "little"))
        self._groups.write(body)

    def _kept(self) -> Iterator[Any]:
        """Give the groups of rows that wait."""
        arrow = _pyarrow()
        self._groups.seek(0)
        while size := self._groups.read(_LENGTH_BYTES):
            body = self._groups.read(int.from_bytes(size, "little"))
            yield arrow.ipc.read_record_batch(arrow.py_buffer(body), self._schema)


def _listed(rejections: Sequence[RejectionRow]) -> bytes | None:
    """Return rejections as one JSON; None of none.

    Raises:
        Unprocessable: They are more than the metadata of a file may have.
    """
    pieces: list[bytes] = []
    size = 0
    for row in rejections:
        pieces.append(as_said(row))
        size += len(pieces[-1]) + 1
        if size > REJECTIONS_MAX_BYTES:
            raise Unprocessable(
                f"the rejections would take more than the {REJECTIONS_MAX_BYTES:,} bytes that "
                "the metadata of a Parquet file may have here; export in json or npz instead",
                field="format",
            )
    return b"[" + b",".join(pieces) + b"]" if pieces else None


def _pyarrow() -> Any:
    """Return pyarrow with what is used of it, or say what is missing."""
    try:
        import pyarrow as pa  # noqa: PLC0415 - an extra, and half a second of loading
        import pyarrow.compute  # noqa: PLC0415
        import pyarrow.parquet  # noqa: PLC0415
    except ImportError:
        raise Unprocessable(
            "Parquet needs the package pyarrow, which is not installed on this host: "
            "pip install 'bkg[parquet]'; json and npz need nothing",
            field="format",
        ) from None
    return pa


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """Have the file open while inside; whatever is wrong with it comes out as Unprocessable."""
    arrow = _pyarrow()
    try:
        with arrow.parquet.ParquetFile(str(path)) as file:
            yield file
    except BusError:
        raise
    except (
        arrow.ArrowException,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        ArithmeticError,
        MemoryError,
    ) as error:
        said = str(error).partition("\n")[0][:200] or type(error).__name__
        raise Unprocessable(f"the file is no sound Parquet: {said}") from None


def _moments(column: Any, first: int) -> list[datetime | None]:
    """Return timestamps; Arrow keeps them in UTC, whatever zone it says."""
    per_s = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[column.type.unit]
    moments: list[datetime | None] = []
    for at, value in enumerate(column.view(_pyarrow().int64()).to_pylist()):
        try:
            micros = None if value is None else value * 10**6 // per_s
            moments.append(None if micros is None else _EPOCH + timedelta(microseconds=micros))
        except OverflowError:
            refuse(first + at, None, "last_seen is no time that there can be")
    return moments


def _fits(name: str, found: Any, types: Any) -> bool:
    if name == "embedding":
        listed = (
            types.is_list(found) or types.is_large_list(found) or types.is_fixed_size_list(found)
        )
        return bool(listed and types.is_floating(found.value_type))
    if types.is_dictionary(found):
        found = found.value_type
    text = types.is_string(found) or types.is_large_string(found) or types.is_null(found)
    return bool(text or (name == "last_seen" and types.is_timestamp(found)))


def _object_in(file: Any, key: bytes, kind: Any) -> Any:
    """Return the JSON that the file's metadata have under a key; empty if they have none.

    Raises:
        Unprocessable: It is none of that kind, or too large.
    """
    said = (file.metadata.metadata or {}).get(key)
    if said is None:
        return msgspec.json.decode(b"[]" if kind is not dict else b"{}", type=kind)
    if len(said) > REJECTIONS_MAX_BYTES:
        raise Unprocessable(
            f"the metadata {key.decode()} have {len(said):,} bytes, allowed are "
            f"{REJECTIONS_MAX_BYTES:,}"
        )
    try:
        return msgspec.json.decode(said, type=kind)
    except (msgspec.DecodeError, ValueError, RecursionError, OverflowError) as error:
        raise Unprocessable(f"the metadata {key.decode()} are no JSON that fits: {error}") from None

"""Dataset files of numpy: a zip of the arrays `embeddings`, `ids`, and what else there is.

| array | what it has |
| --- | --- |
| `embeddings` | shape ``[n, d]``, floating point |
| `ids` | n texts |
| `subjects` | n texts, empty for nobody; may be absent, as all below |
| `metadata`, `quality` | n texts with JSON in them, empty for none |
| `last_seen` | n times (``datetime64``, UTC, or texts) |
| `embedder`, `embedder_digest`, `dataset` | one text: what made the vectors; which dataset it was |

The arrays are read side by side, a batch of rows of each, straight from the zip: nothing is
unpickled, and of what a small file unpacks to no more than a batch is ever in memory.
"""

import contextlib
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from bus.errors import BusError, Unprocessable
from services.rustyface.galleries.galleries import METADATA_MAX_BYTES
from services.rustyface.transfers.files.rows import (
    BATCH,
    TEXT_MAX,
    Head,
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

NEEDED: Final = ("embeddings", "ids")
KNOWN: Final = (*NEEDED, "subjects", "metadata", "quality", "last_seen")
# A file with many more members is a bomb: each takes memory before any is opened.
MEMBERS_MAX: Final = 64
DIRECTORY_MAX_BYTES: Final = 64 * 1024
HEADER_MAX_BYTES: Final = 4_096
# Of the rows of one batch, in all arrays together.
BATCH_MAX_BYTES: Final = 32 * 1024 * 1024
# What a column of texts, all of them as wide as the widest, may come to when it is written.
COLUMN_MAX_BYTES: Final = 4 * 1024 * 1024 * 1024

_MAGIC: Final = b"\x93NUMPY"
_HEADER: Final = re.compile(
    r"\{'descr': '(?P<descr>[<>|=]?[fSUM][0-9]{1,7}(?:\[[0-9A-Za-z]{1,8}\])?)', "
    r"'fortran_order': (?P<fortran>True|False), 'shape': \((?P<shape>[0-9, ]*)\),? ?\}\s*"
)
_END: Final = b"PK\x05\x06"
_END64_PLACE: Final = b"PK\x06\x07"
_BROKEN: Final = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    OSError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    OverflowError,
    NotImplementedError,
    RuntimeError,
)


class _Array(NamedTuple):
    """An array of the zip, whose rows are read from `file` on."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    file: IO[bytes]

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))

    def rows(self, count: int) -> npt.NDArray[Any]:
        """Return the next rows.

        Raises:
            Unprocessable: The array ends before.
        """
        body = b""
        while len(body) < count * self.row_bytes:
            block = self.file.read(count * self.row_bytes - len(body))
            if not block:
                raise Unprocessable(f"the array {self.name} ends before its last row")
            body += block
        return np.frombuffer(body, self.dtype).reshape(count, *self.shape[1:])


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
        with _reading(path) as archive, contextlib.ExitStack() as opened:
            self.total: int | None = self._opened(archive, opened)["ids"].shape[0]
            self.head = Head(
                id=_one_text(archive, "dataset"),
                embedder=_one_text(archive, "embedder"),
                embedder_digest=_one_text(archive, "embedder_digest"),
            )

    def batches(self) -> Iterator[list[Row]]:
        """See `Reader.batches`."""
        with _reading(self._path) as archive, contextlib.ExitStack() as opened:
            arrays = self._opened(archive, opened)
            total = arrays["ids"].shape[0]
            row_bytes = sum(array.row_bytes for array in arrays.values())
            step = max(1, min(BATCH, BATCH_MAX_BYTES // max(1, row_bytes)))
            for first in range(0, total, step):
                count = min(step, total - first)
                # Errors of the caller, while it has the rows, are not the file's.
                rows = self._rows({n: a.rows(count) for n, a in arrays.items()}, first)
                yield rows
            for array in arrays.values():
                # At its end the zip compares the checksum.
                if array.file.read(1):
                    raise Unprocessable(f"the array {array.name} goes on behind its last row")

    def _rows(self, columns: dict[str, npt.NDArray[Any]], first: int) -> list[Row]:
        named = enumerate(_texts(columns["ids"], first, "ids"), first)
        ids = [text_in(one, index, None, "id") for index, one in named]
        vectors = unit_rows(columns["embeddings"], first, ids)

        def texts(name: str) -> list[str]:
            if name not in columns:
                return [""] * len(ids)
            return _texts(columns[name], first, name)

        subjects, metadata, quality = texts("subjects"), texts("metadata"), texts("quality")
        seen = (
            _moments(columns["last_seen"], first) if "last_seen" in columns else [None] * len(ids)
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

    def _opened(self, archive: zipfile.ZipFile, opened: contextlib.ExitStack) -> dict[str, _Array]:
        """Open every array of rows, its header read and found to fit."""
        there = set(archive.namelist())
        if missing := [name for name in NEEDED if f"{name}.npy" not in there]:
            known = ", ".join(sorted(name.removesuffix(".npy")[:40] for name in there)) or "none"
            raise Unprocessable(
                f"the file has no array {missing[0]}; there are: {known}", field=missing[0]
            )
        arrays = {
            name: _array_in(archive, name, opened) for name in KNOWN if f"{name}.npy" in there
        }
        embeddings = arrays["embeddings"]
        if embeddings.dtype.kind != "f" or len(embeddings.shape) != 2:
            raise Unprocessable(
                f"embeddings must be floating point numbers of shape [n, {self._dimensions}], they "
                f"are {embeddings.dtype} of shape {list(embeddings.shape)}",
                field="embeddings",
            )
        total = embeddings.shape[0]
        check_total(total)
        check_length(embeddings.shape[1], self._dimensions, 0, None)
        for name, array in arrays.items():
            if array.shape[0] != total or (name != "embeddings" and len(array.shape) != 1):
                raise Unprocessable(
                    f"{name} has the shape {list(array.shape)}, embeddings have {total:,} rows",
                    field=name,
                )
            if name != "embeddings":
                _check_column(name, array.dtype)
        return arrays


class NpzWriter:
    """Writes a dataset file of numpy; all waits in files beside it until their number is known.

    Args:
        path: Where.
        head: What it says of itself.
        dimensions: How long the vectors are.
    """

    def __init__(self, path: Path, head: Head, dimensions: int) -> None:
        self._path = path
        self._head = head
        self._dimensions = dimensions
        self._count = 0
        names = ("embeddings", "ids", "subjects", "metadata", "quality", "last_seen")
        self._beside = {name: path.with_name(f"{path.name}.{name}") for name in names}
        self._files = {name: beside.open("wb") for name, beside in self._beside.items()}
        self._widths = dict.fromkeys(("ids", "subjects", "metadata", "quality"), 1)

    def add(self, rows: Sequence[Row]) -> None:
        """See `Writer.add`."""
        for row in rows:
            self._files["embeddings"].write(row.vector.astype("<f4").tobytes())
            seen = None if row.last_seen is None else row.last_seen.replace(tzinfo=None)
            self._files["last_seen"].write(np.array(seen, "<M8[us]").tobytes())
            texts = {
                "ids": row.id,
                "subjects": row.subject or "",
                "metadata": as_json(row.metadata),
                "quality": as_json(row.quality),
            }
            for name, text in texts.items():
                if text.endswith("\0"):
                    refuse(self._count, row.id, f"numpy cannot keep the end of its {name}: a zero")
                # UTF-8, with its length before it; the arrays' width is that of the widest.
                body = text.encode()
                self._widths[name] = max(
                    self._widths[name], len(body) if name in _BYTES else len(text)
                )
                self._files[name].write(len(body).to_bytes(4, "little") + body)
            self._count += 1

    def finish(self) -> None:
        """See `Writer.finish`."""
        for file in self._files.values():
            file.close()
        self._check_widths()
        with zipfile.ZipFile(self._path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            shape = (self._count, self._dimensions)
            # Vectors are noise to a compressor.
            self._copy(archive, "embeddings", "<f4", shape, zipfile.ZIP_STORED)
            self._copy(archive, "last_seen", "<M8[us]", (self._count,), zipfile.ZIP_DEFLATED)
            for name, width in self._widths.items():
                self._put_texts(archive, name, width)
            said = {
                "embedder": self._head.embedder,
                "embedder_digest": self._head.embedder_digest,
                "dataset": self._head.id,
            }
            for name, text in said.items():
                if text:
                    with archive.open(f"{name}.npy", "w") as member:
                        np.lib.format.write_array(member, np.array(text), allow_pickle=False)
        self.abandon()

    def abandon(self) -> None:
        """See `Writer.abandon`."""
        for name, file in self._files.items():
            file.close()
            self._beside[name].unlink(missing_ok=True)

    def _check_widths(self) -> None:
        for name, width in self._widths.items():
            size = self._count * width * (1 if name in _BYTES else 4)
            if size > COLUMN_MAX_BYTES:
                raise Unprocessable(
                    f"{name} would take {size:,} bytes: numpy makes every text as wide as the "
                    f"widest, {width:,}; export in json or parquet instead",
                    field="format",
                )

    def _copy(
        self,
        archive: zipfile.ZipFile,
        name: str,
        descr: str,
        shape: tuple[int, ...],
        compression: int,
    ) -> None:
        with _member(archive, name, compression) as member, self._beside[name].open("rb") as file:
            _put_header(member, descr, shape)
            while block := file.read(1024 * 1024):
                member.write(block)

    def _put_texts(self, archive: zipfile.ZipFile, name: str, width: int) -> None:
        descr = f"|S{width}" if name in _BYTES else f"<U{width}"
        with (
            _member(archive, name, zipfile.ZIP_DEFLATED) as member,
            self._beside[name].open("rb") as file,
        ):
            _put_header(member, descr, (self._count,))
            while size := file.read(4):
                body = file.read(int.from_bytes(size, "little"))
                if name in _BYTES:
                    member.write(body.ljust(width, b"\0"))
                else:
                    member.write(body.decode().encode("utf-32-le").ljust(4 * width, b"\0"))


# Kept as UTF-8: of what is long a fourth of numpy's own texts.
_BYTES: Final = ("metadata", "quality")


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[zipfile.ZipFile]:
    """Have the zip open while inside; whatever is wrong with it comes out as Unprocessable."""
    try:
        _check_directory(path)
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if len(members) > MEMBERS_MAX:
                raise Unprocessable(f"the file has {len(members):,} members, at most {MEMBERS_MAX}")
            yield archive
    except BusError:
        raise
    except _BROKEN as error:
        said = str(error)[:200] or type(error).__name__
        raise Unprocessable(f"the file is no sound npz: {said}") from None


def _check_directory(path: Path) -> None:
    """Look at the size of the zip's directory, which is read at once, before it is."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - 65_557 - 76))
        tail = file.read()
        at = tail.rfind(_END)
        if at < 0 or len(tail) < at + 22:
            raise Unprocessable("the file is no npz: it is cut off, or no zip")
        directory = int.from_bytes(tail[at + 12 : at + 16], "little")
        if at >= 20 and tail[at - 20 : at - 16] == _END64_PLACE:
            # Beyond 2 GiB; the record is where its place says, or right before that.
            file.seek(int.from_bytes(tail[at - 12 : at - 4], "little"))
            said = file.read(56)
            before = tail[at - 76 : at - 20] if at >= 76 else b""
            directory = max(int.from_bytes(one[40:48], "little") for one in (said, before))
    if directory > DIRECTORY_MAX_BYTES:
        raise Unprocessable(
            f"the file's list of members has {directory:,} bytes, allowed are "
            f"{DIRECTORY_MAX_BYTES:,}"
        )


def _array_in(archive: zipfile.ZipFile, name: str, opened: contextlib.ExitStack) -> _Array:
    member = archive.getinfo(f"{name}.npy")
    if member.flag_bits & 1:
        raise Unprocessable(f"the array {name} is encrypted")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise Unprocessable(f"the array {name} is packed in a way that numpy does not use")
    file = opened.enter_context(archive.open(member))
    start = file.read(12)
    if start[:6] != _MAGIC or start[6:7] not in (b"\1", b"\2", b"\3"):
        raise Unprocessable(f"{name} is no array of numpy", field=name)
    wide = start[6] > 1
    length = int.from_bytes(start[8:12] if wide else start[8:10], "little")
    if not 2 <= length <= HEADER_MAX_BYTES:
        raise Unprocessable(f"the array {name} has a header of {length:,} bytes", field=name)
    rest = file.read(length - (0 if wide else 2))
    text = (start[12:] if wide else start[10:]) + rest
    said = _HEADER.fullmatch(text.decode("latin-1"))
    if said is None:
        raise Unprocessable(
            f"the array {name} is of a type that is not taken here: {text[:80]!r}; taken are "
            "floating point numbers, texts and datetime64, and no objects",
            field=name,
        )
    if said["fortran"] == "True" and said["shape"].count(",") and name == "embeddings":
        raise Unprocessable(
            "embeddings are stored column by column; write them with numpy.ascontiguousarray",
            field=name,
        )
    shape = tuple(int(n) for n in said["shape"].replace(" ", "").split(",") if n)
    if not shape and name in KNOWN:
        raise Unprocessable(f"{name} is a single value, not an array", field=name)
    dtype = np.dtype(said["descr"])
    if any(n > 1 << 40 for n in shape) or dtype.itemsize == 0:
        raise Unprocessable(f"the array {name} says that its shape is {list(shape)}", field=name)
    return _Array(name, dtype, shape, file)


def _check_column(name: str, dtype: np.dtype[Any]) -> None:
    if name == "last_seen":
        if dtype.kind not in "MUS":
            raise Unprocessable(f"last_seen must be datetime64 or texts, it is {dtype}", field=name)
        return
    wide = METADATA_MAX_BYTES if name in _BYTES else 4 * TEXT_MAX
    characters = dtype.itemsize // (4 if dtype.kind == "U" else 1)
    if dtype.kind not in "US" or characters > 6 * wide:
        raise Unprocessable(
            f"{name} must be texts of at most {wide:,} characters, they are {dtype}", field=name
        )


def _one_text(archive: zipfile.ZipFile, name: str) -> str | None:
    """Return a single text of the zip; None if there is none."""
    if f"{name}.npy" not in archive.namelist():
        return None
    with contextlib.ExitStack() as opened:
        array = _array_in(archive, name, opened)
        if array.shape not in ((), (1,)) or array.dtype.kind not in "US":
            return None
        if array.dtype.itemsize > 4 * TEXT_MAX:
            return None
        body = array.file.read(array.dtype.itemsize)
        return _texts(np.frombuffer(body, array.dtype), 0, name)[0] or None


def _texts(column: npt.NDArray[Any], first: int, name: str) -> list[str]:
    found: list[Any] = []
    for at in range(len(column)):
        try:
            value = column[at].item() if hasattr(column[at], "item") else column[at]
            found.append(value.decode() if isinstance(value, bytes) else str(value))
        except (ValueError, UnicodeDecodeError):
            refuse(first + at, None, f"{name} is no text that can be read")
    return found


def _moments(column: npt.NDArray[Any], first: int) -> list[Any]:
    if column.dtype.kind != "M":
        return [text or None for text in _texts(column, first, "last_seen")]
    unit, _ = np.datetime_data(column.dtype)
    fine = column if unit in ("us", "ns", "ps", "fs", "as") else None
    if fine is None:
        # Coarse units are widened only where they cannot run over.
        return [_widened(value, first + at) for at, value in enumerate(column)]
    return [None if np.isnat(v) else v.astype("M8[us]").item() for v in fine]


def _widened(value: np.datetime64, index: int) -> Any:
    if np.isnat(value):
        return None
    found = value.item()
    if isinstance(found, int):
        refuse(index, None, "last_seen is no time that there can be")
    return value.astype("M8[us]").item()


def _member(archive: zipfile.ZipFile, name: str, compression: int) -> IO[bytes]:
    info = zipfile.ZipInfo(f"{name}.npy")
    info.compress_type = compression
    return archive.open(info, "w", force_zip64=True)


def _put_header(member: IO[bytes], descr: str, shape: tuple[int, ...]) -> None:
    said = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, said)

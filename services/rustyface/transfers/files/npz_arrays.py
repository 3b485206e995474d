"""Arrays of numpy in a zip: their rows read straight from it, or written into one.

Nothing is unpickled, and of what a small file unpacks to no more than a batch is ever in memory.
"""

import contextlib
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from bus import private
from bus.errors import BusError, Unprocessable
from services.rustyface.transfers.files.rows import BATCH, Kind, refuse

# A file with many more members is a bomb: each takes memory before any is opened.
MEMBERS_MAX: Final = 64
DIRECTORY_MAX_BYTES: Final = 64 * 1024
HEADER_MAX_BYTES: Final = 4_096
# What a column of texts, all of them as wide as the widest, may come to when it is written.
COLUMN_MAX_BYTES: Final = 4 * 1024 * 1024 * 1024

# Before each text that waits.
_LENGTH_BYTES: Final = 4
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


class Array(NamedTuple):
    """An array of a zip, whose rows are read from `file` on."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    file: IO[bytes]

    @property
    def row_bytes(self) -> int:
        """What one row takes."""
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


class Columns:
    """Columns of one length, taken row by row; all wait in files until their number is known.

    Args:
        path: The npz; the files lie beside it.
        what: The rows are.
        fixed: By name, numpy's type and the shape of one row, where all take the same room.
        texts: Names of those that have texts.
        packed: Of these, which are kept as UTF-8: of what is long a fourth of numpy's own texts.
    """

    def __init__(
        self,
        path: Path,
        what: Kind,
        *,
        fixed: Mapping[str, tuple[str, tuple[int, ...]]],
        texts: Sequence[str],
        packed: Sequence[str] = (),
    ) -> None:
        self.count = 0
        self._what = what
        self._fixed = fixed
        self._texts = texts
        self._packed = frozenset(packed)
        self._beside = {name: path.with_name(f"{path.name}.{name}") for name in (*fixed, *texts)}
        self._files: dict[str, IO[bytes]] = {}
        try:
            for name, beside in self._beside.items():
                self._files[name] = private.opened(beside)
        except OSError:
            self.close()
            raise

    def add(self, name: str, fixed: Mapping[str, bytes], texts: Mapping[str, str]) -> None:
        """Take a row, which is called so, its values by column."""
        for column, text in texts.items():
            if text.endswith("\0"):
                said = f"numpy cannot keep the end of its {column}: a zero"
                refuse(self.count, name, said, what=self._what)
        for column, value in fixed.items():
            self._files[column].write(value)
        for column, text in texts.items():
            # UTF-8, with its length before it; the arrays' width is that of the widest.
            body = text.encode()
            self._files[column].write(len(body).to_bytes(_LENGTH_BYTES, "little") + body)
        self.count += 1

    def put_into(self, archive: zipfile.ZipFile, without: AbstractSet[int] = frozenset()) -> None:
        """Write the arrays, but for some rows.

        Raises:
            Unprocessable: A column of texts would be too large.
        """
        keep = np.ones(self.count, bool)
        keep[list(without)] = False
        count = int(keep.sum())
        widths = {name: self._width(name, keep) for name in self._texts}
        for name, width in widths.items():
            size = count * width * (1 if name in self._packed else 4)
            if size > COLUMN_MAX_BYTES:
                raise Unprocessable(
                    f"{name} would take {size:,} bytes: numpy makes every text as wide as the "
                    f"widest, {width:,}; export in json or parquet instead",
                    field="format",
                )
        for name, (descr, shape) in self._fixed.items():
            # Vectors are noise to a compressor.
            compression = zipfile.ZIP_STORED if shape else zipfile.ZIP_DEFLATED
            with _member(archive, name, compression) as member:
                _put_header(member, descr, (count, *shape))
                for rows in self._fixed_rows(name, keep):
                    member.write(rows)
        for name, width in widths.items():
            is_packed = name in self._packed
            with _member(archive, name, zipfile.ZIP_DEFLATED) as member:
                _put_header(member, f"|S{width}" if is_packed else f"<U{width}", (count,))
                for body in self._text_rows(name, keep):
                    if is_packed:
                        member.write(body.ljust(width, b"\0"))
                    else:
                        member.write(body.decode().encode("utf-32-le").ljust(4 * width, b"\0"))

    def close(self) -> None:
        """Delete the files."""
        # What could not be written is tried once more, and the disk may still be full.
        with contextlib.ExitStack() as closing:
            for beside in self._beside.values():
                closing.callback(beside.unlink, missing_ok=True)
            for file in self._files.values():
                closing.callback(file.close)

    def _fixed_rows(self, name: str, keep: npt.NDArray[np.bool_]) -> Iterator[bytes]:
        """Give those rows of a column that are kept, many at a time."""
        descr, shape = self._fixed[name]
        size = np.dtype(descr).itemsize * int(np.prod(shape, dtype=np.int64))
        file = self._from_start(name)
        for first in range(0, self.count, BATCH):
            kept = keep[first : first + BATCH]
            block = np.frombuffer(file.read(size * len(kept)), np.uint8).reshape(len(kept), size)
            yield block[kept].tobytes()

    def _text_rows(self, name: str, keep: npt.NDArray[np.bool_]) -> Iterator[bytes]:
        """Give those rows of a column of texts that are kept, as UTF-8."""
        file = self._from_start(name)
        for kept in keep.tolist():
            size = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            body = file.read(size)
            if kept:
                yield body

    def _width(self, name: str, keep: npt.NDArray[np.bool_]) -> int:
        """Return how wide the widest text is that is kept: in characters, or bytes if packed."""
        rows = self._text_rows(name, keep)
        if name in self._packed:
            return max(1, max(map(len, rows), default=1))
        return max(1, max((len(body.decode()) for body in rows), default=1))

    def _from_start(self, name: str) -> IO[bytes]:
        file = self._files[name]
        file.seek(0)
        return file


def put_text(archive: zipfile.ZipFile, name: str, text: str) -> None:
    """Write an array that is one text."""
    with archive.open(f"{name}.npy", "w") as member:
        np.lib.format.write_array(member, np.array(text), allow_pickle=False)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[zipfile.ZipFile]:
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


def array_in(archive: zipfile.ZipFile, name: str, opened: contextlib.ExitStack) -> Array:
    """Open an array and read its header; raises Unprocessable if it is none that is taken here."""
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
    shape = tuple(int(n) for n in said["shape"].replace(" ", "").split(",") if n)
    if said["fortran"] == "True" and len(shape) > 1:
        raise Unprocessable(
            f"{name} are stored column by column; write them with numpy.ascontiguousarray",
            field=name,
        )
    dtype = np.dtype(said["descr"])
    if any(n > 1 << 40 for n in shape) or dtype.itemsize == 0:
        raise Unprocessable(f"the array {name} says that its shape is {list(shape)}", field=name)
    return Array(name, dtype, shape, file)


def one_text(archive: zipfile.ZipFile, name: str, most: int) -> str | None:
    """Return a single text of the zip; None if there is none, or it has more than `most` bytes."""
    if f"{name}.npy" not in archive.namelist():
        return None
    with contextlib.ExitStack() as opened:
        array = array_in(archive, name, opened)
        if array.shape not in ((), (1,)) or array.dtype.kind not in "US":
            return None
        if array.dtype.itemsize > most:
            return None
        body = array.file.read(array.dtype.itemsize)
        return texts_in(np.frombuffer(body, array.dtype), 0, name)[0] or None


def texts_in(column: npt.NDArray[Any], first: int, name: str, *, what: Kind = "entry") -> list[str]:
    """Return the texts of rows; raises Unprocessable if one cannot be read, and says which."""
    found: list[Any] = []
    for at in range(len(column)):
        try:
            value = column[at].item() if hasattr(column[at], "item") else column[at]
            found.append(value.decode() if isinstance(value, bytes) else str(value))
        except (ValueError, UnicodeDecodeError):
            refuse(first + at, None, f"{name} is no text that can be read", what=what)
    return found


def moments_in(column: npt.NDArray[Any], first: int) -> list[Any]:
    """Return the times of rows, as times or as texts; raises Unprocessable if one cannot be."""
    if column.dtype.kind != "M":
        return [text or None for text in texts_in(column, first, "last_seen")]
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

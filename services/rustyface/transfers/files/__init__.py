"""Dataset files: which format one is in, what reads it, and what writes one."""

from pathlib import Path

from bus.errors import Unprocessable
from bus.messages import FileFormat
from services.rustyface.transfers.files.json_file import JsonReader, JsonWriter
from services.rustyface.transfers.files.npz_file import NpzReader, NpzWriter
from services.rustyface.transfers.files.parquet_file import ParquetReader, ParquetWriter
from services.rustyface.transfers.files.rows import BATCH, Head, Reader, RejectionRow, Row, Writer

__all__ = [
    "BATCH",
    "Head",
    "Reader",
    "RejectionRow",
    "Row",
    "Writer",
    "format_of",
    "reader",
    "writer",
]


def format_of(path: Path) -> FileFormat:
    """Return the format of a file, by its first bytes.

    Raises:
        Unprocessable: It is none that is known.
    """
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"PAR1"):
        return "parquet"
    if start.startswith(b"PK"):
        return "npz"
    if start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{":
        return "json"
    shown = repr(start[:16]) if start else "it is empty"
    raise Unprocessable(
        f"the file is no dataset: it begins with {shown}; allowed are json (an object), npz (a "
        "zip of numpy arrays) and parquet"
    )


def reader(path: Path, kind: FileFormat, dimensions: int) -> Reader:
    """Return what reads a file once.

    Raises:
        Unprocessable: It is not in that format.
    """
    if kind == "json":
        return JsonReader(path, dimensions)
    return NpzReader(path, dimensions) if kind == "npz" else ParquetReader(path, dimensions)


def writer(path: Path, kind: FileFormat, head: Head, dimensions: int) -> Writer:
    """Return what writes a file once."""
    if kind == "json":
        return JsonWriter(path, head, dimensions)
    if kind == "npz":
        return NpzWriter(path, head, dimensions)
    return ParquetWriter(path, head, dimensions)

"""The values of one tensor, as the Open Inference Protocol carries them: to an array and back.

From JSON they come as a list, flat or nested like the shape; as binary data they come as they lie
in memory, little-endian, which is how the machines do that this runs on.
"""

import math
import struct
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, Final

import numpy as np

from bus.errors import InvalidRequest, Unprocessable
from services.candle.runtimes.base import ANY_LENGTH, DTYPES, Array, TensorSpec

DATATYPES: Final = {dtype: datatype for datatype, dtype in DTYPES.items()}

# What `struct` calls the numbers of a datatype; of BYTES there are none.
_CODES: Final = {
    "BOOL": "?", "UINT8": "B", "UINT16": "H", "UINT32": "I", "UINT64": "Q", "INT8": "b",
    "INT16": "h", "INT32": "i", "INT64": "q", "FP16": "e", "FP32": "f", "FP64": "d", "BYTES": "",
}  # fmt: skip
_BYTES_LENGTH: Final = struct.Struct("<I")


class TensorReader:
    """Reads the values of one input; all that can be worked out before they come is.

    Args:
        spec: The input.

    Attributes:
        spec: The same.
        kind: What Python calls its values when they come as JSON.
    """

    def __init__(self, spec: TensorSpec) -> None:
        self.spec = spec
        self._dtype = DTYPES[spec.datatype]
        self._code = _CODES[spec.datatype]
        self._fixed = [(axis, n) for axis, n in enumerate(spec.shape) if n != ANY_LENGTH]
        self.kind: Any = {"b": bool, "f": float, "O": str}.get(self._dtype.kind, int)
        self._types = {int, float} if self.kind is float else {self.kind}
        # These are made into an array by their truth or as they are, so each must be looked at.
        self._lenient = self.kind in {bool, str}

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether the model takes this shape."""
        return (
            len(shape) == len(self.spec.shape)
            and (not self._fixed or all(shape[axis] == length for axis, length in self._fixed))
        ) or self.spec.any_rank

    def from_json(self, values: list[Any], shape: list[int], i: int, *, typed: bool) -> Array:
        """Return an array of the values of input `i`.

        Args:
            values: Flat, or nested like the shape.
            shape: One that fits.
            i: Which of the request's inputs this is, for errors.
            typed: Whether each value is known to be of `kind`, or a list of such.

        Raises:
            InvalidRequest: They are too many or too few, or one is of another type or too large.
        """
        if values and type(values[0]) is list:
            values = _flat(values, shape, i)
        count = math.prod(shape)
        if len(values) != count:
            raise invalid(
                f"inputs[{i}].data",
                f"has {len(values)} values, but the shape {short(shape)} asks for {count}",
            )
        if (self._lenient or not typed) and not self._types.issuperset(map(type, values)):
            raise self._wrong_value(values, i)
        if not count:
            return _empty(shape, self._dtype, i)
        if self.kind is str:
            return np.fromiter(values, np.object_, count).reshape(shape)
        try:
            # Not numpy's own conversion: it turns what is too large for a float into infinity.
            packed = struct.pack(f"={count}{self._code}", *values)
        except (struct.error, OverflowError):
            raise self._wrong_value(values, i) from None
        return np.ndarray(shape, self._dtype, packed)

    def from_binary(self, raw: memoryview, shape: list[int], i: int) -> Array:
        """Return an array of the binary data of input `i`: a view, but for BYTES.

        Raises:
            InvalidRequest: It is too long or too short, or not of the datatype.
        """
        count = math.prod(shape)
        if self.kind is str:
            return _unpacked_texts(raw, shape, count, i)
        expected = count * self._dtype.itemsize
        if len(raw) != expected:
            raise invalid(
                f"inputs[{i}].parameters.binary_data_size",
                f"is {len(raw)}, but {self.spec.datatype} of the shape {short(shape)} takes "
                f"{expected} bytes",
            )
        if not count:
            return _empty(shape, self._dtype, i)
        array: Array = np.ndarray(shape, self._dtype, raw)
        if self.kind is bool and (highest := array.view(np.uint8).max()) > 1:
            raise invalid(
                f"inputs[{i}]", f"has a byte {highest} in its binary data; BOOL takes 0 and 1"
            )
        return array

    def _wrong_value(self, values: Iterable[Any], i: int) -> InvalidRequest:
        at, value = next((at, value) for at, value in enumerate(values) if not self._takes(value))
        found = {list: "an array", dict: "an object", bool: str(value).lower(), type(None): "null"}
        return invalid(
            f"inputs[{i}].data",
            f"has {found.get(type(value), short(value))} as value {at}; {self.spec.datatype} takes "
            f"{self._range()}",
        )

    def _takes(self, value: Any) -> bool:
        if type(value) not in self._types:
            return False
        try:
            struct.pack(f"={self._code}", *[value] * len(self._code))
        except (struct.error, OverflowError):
            return False
        return True

    def _range(self) -> str:
        if self._dtype.kind == "f":
            highest = float(np.finfo(self._dtype).max)
            return f"numbers from {-highest:.6g} to {highest:.6g}"
        if self._dtype.kind in "iu":
            lengths = np.iinfo(self._dtype)
            return f"whole numbers from {lengths.min} to {lengths.max}"
        return "true and false" if self.kind is bool else "strings"


def packed_texts(array: Array) -> bytes:
    """Return BYTES as binary data; text as UTF-8."""
    parts: list[bytes] = []
    for text in array.ravel():
        raw = text if isinstance(text, bytes) else str(text).encode()
        parts += (_BYTES_LENGTH.pack(len(raw)), raw)
    return b"".join(parts)


def json_texts(flat: Array, name: str) -> list[str]:
    """Return BYTES as strings.

    Raises:
        Unprocessable: One is not UTF-8.
    """
    try:
        return [text.decode() if isinstance(text, bytes) else str(text) for text in flat]
    except UnicodeDecodeError:
        raise Unprocessable(
            f"output {name!r} has bytes that are not UTF-8, which JSON needs; ask for it as binary "
            "data (parameters.binary_data)"
        ) from None


def classified(array: Array, classes: int, *, batched: bool) -> Array:
    """Return the highest values as texts `value:index`, highest first, for each row of a batch.

    After Triton's classification extension: an index counts through all values of a row, whatever
    its shape, and where there are fewer values than asked for, there are fewer texts. Of equal
    values the one with the lower index comes first, and NaN comes last.
    """
    rows = len(array) if batched and array.ndim else 1
    table = array.reshape(rows, math.prod(array.shape[1:]) if batched else array.size)
    if table.dtype.kind == "b":
        table = table.view(np.uint8)
    ranked = np.where(np.isnan(table), -np.inf, table) if table.dtype.kind == "f" else table
    # A stable sort from the far end: reversed, equal values stand in the order of their indices.
    last = table.shape[1] - 1
    best = last - np.argsort(ranked[:, ::-1], axis=1, kind="stable")[:, ::-1][:, :classes]
    texts = np.empty(best.shape, np.object_)
    for at, index in np.ndenumerate(best):
        # As numpy writes its own: a float32 of 0.1 as 0.1.
        texts[at] = f"{table[at[0], index]!s}:{index}"
    return texts if batched and array.ndim else texts[0]


def short(found: object) -> str:
    """Return how a value of the caller's stands in an error: cut where it is long."""
    text = repr(found)
    return text if len(text) <= 80 else f"{text[:80]}..."


def invalid(place: str, said: str) -> InvalidRequest:
    """Return the error about a place in a request, and what is wrong there."""
    return InvalidRequest(f"{place} {said}", field=place)


def _flat(values: list[Any], shape: Sequence[int], i: int) -> list[Any]:
    """Return nested values in one row, once their nesting is found to be the shape."""
    fits = len(values) == shape[0] if shape else False
    for length in shape[1:]:
        fits = fits and set(map(type, values)) <= {list} and set(map(len, values)) <= {length}
        if not fits:
            break
        values = list(chain.from_iterable(values))
    if fits:
        return values
    raise invalid(
        f"inputs[{i}].data",
        f"is nested in another way than the shape {short(shape)} says; it may be nested like the "
        "shape, or flat",
    )


def _empty(shape: Sequence[int], dtype: "np.dtype[Any]", i: int) -> Array:
    try:
        return np.empty(shape, dtype)
    except (ValueError, OverflowError):
        raise invalid(
            f"inputs[{i}].shape", f"is {short(shape)}, longer than an array can be"
        ) from None


def _unpacked_texts(raw: memoryview, shape: list[int], count: int, i: int) -> Array:
    """Read BYTES in binary: for each element 4 bytes of length, and that many bytes."""
    texts: list[bytes] = []
    at, end = 0, len(raw)
    while at < end:
        start = at + 4
        if start > end or (at := start + _BYTES_LENGTH.unpack_from(raw, start - 4)[0]) > end:
            raise invalid(
                f"inputs[{i}]",
                f"has binary data that ends within element {len(texts)}; each of BYTES is 4 bytes "
                "of length (little-endian), and that many bytes",
            )
        texts.append(bytes(raw[start:at]))
    if len(texts) != count:
        raise invalid(
            f"inputs[{i}]",
            f"has {len(texts)} elements in its binary data, but the shape {short(shape)} asks for "
            f"{count}",
        )
    if not count:
        return _empty(shape, DTYPES["BYTES"], i)
    return np.fromiter(texts, np.object_, count).reshape(shape)

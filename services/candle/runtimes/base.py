"""What executes a format: the shape that every runtime has."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from bus.errors import InvalidRequest, Unprocessable

Array = npt.NDArray[Any]
Tensors = Mapping[str, Array]

ANY_LENGTH: Final = -1
CPU: Final = "cpu"

# What `blank` makes at most: a model may state any fixed length.
MAX_BLANK_VALUES: Final = 1 << 24

# Datatypes of the Open Inference Protocol, and what numpy calls them. BYTES are arrays of objects,
# each a str, or bytes of UTF-8.
DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BYTES": np.dtype(np.object_),
}


class Fault(NamedTuple):
    """Something that is wrong with a file.

    Attributes:
        where: The field, node or tensor; empty for the whole file.
        what: What was found, and what is allowed.
    """

    where: str
    what: str


@dataclass(frozen=True)
class TensorSpec:
    """One input or output.

    Attributes:
        name: Its name.
        datatype: As the Open Inference Protocol names it.
        shape: Its lengths, `ANY_LENGTH` for those that vary.
        any_rank: Whether it may have any shape at all; `shape` is one axis of any length then,
            which is as near as protocols without a word for it come.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    any_rank: bool = False

    def fits(self, shape: Sequence[int]) -> bool:
        """Tell whether a tensor may have this shape."""
        return self.any_rank or (
            len(shape) == len(self.shape)
            and all(want in {ANY_LENGTH, got} for want, got in zip(self.shape, shape, strict=True))
        )

    def check(self, array: Array) -> None:
        """Raise InvalidRequest, naming what was found and what is taken, unless it fits."""
        expected = DTYPES[self.datatype]
        if array.dtype != expected:
            raise InvalidRequest(
                f"input {self.name!r} has values of type {array.dtype}, the model takes "
                f"{expected} ({self.datatype})",
                field=self.name,
            )
        if not self.fits(array.shape):
            raise InvalidRequest(
                f"input {self.name!r} has the shape {list(array.shape)}, the model takes "
                f"{list(self.shape)} (-1: any length)",
                field=self.name,
            )


@dataclass(frozen=True)
class Signature:
    """What a model takes and gives.

    Attributes:
        inputs: What it takes, in its order.
        outputs: What it gives, in its order.
        rows_kept: False where a row does not come out as one row, or depends on those beside it.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    rows_kept: bool = True

    @property
    def batched(self) -> bool:
        """Whether axis 0 of every input and output takes any length: rows can be put together."""
        specs = (*self.inputs, *self.outputs)
        return self.rows_kept and all(
            spec.shape[:1] == (ANY_LENGTH,) and not spec.any_rank for spec in specs
        )

    @property
    def input_dim(self) -> int | None:
        """Length of one row, where the only input is rows of a fixed length."""
        return _row_length(self.inputs) if len(self.inputs) == 1 else None

    @property
    def output_dim(self) -> int | None:
        """Length of one row of the first output, where that is rows of a fixed length."""
        return _row_length(self.outputs)

    def check(self, tensors: Tensors) -> None:
        """Raise InvalidRequest unless there is one fitting tensor for each input."""
        names = [spec.name for spec in self.inputs]
        for name in tensors:
            if name not in names:
                raise InvalidRequest(
                    f"the model has no input {name!r}; it takes {', '.join(names)}", field=name
                )
        for spec in self.inputs:
            if spec.name not in tensors:
                raise InvalidRequest(f"the input {spec.name!r} is missing", field=spec.name)
            spec.check(tensors[spec.name])


def blank(signature: Signature, any_length: int = 1) -> dict[str, Array] | None:
    """Return inputs of zeros and empty strings, or None if they would be too large.

    Args:
        signature: What they are for.
        any_length: The length of each axis that varies.
    """
    shapes = {
        spec.name: tuple(any_length if n == ANY_LENGTH else n for n in spec.shape)
        for spec in signature.inputs
    }
    if sum(math.prod(shape) for shape in shapes.values()) > MAX_BLANK_VALUES:
        return None
    return {
        spec.name: np.full(shapes[spec.name], "", np.object_)
        if spec.datatype == "BYTES"
        else np.zeros(shapes[spec.name], DTYPES[spec.datatype])
        for spec in signature.inputs
    }


def varied(
    signature: Signature, any_length: int, *, alike: bool = False
) -> dict[str, Array] | None:
    """Return inputs as `blank` does, but with values that a model makes a difference of.

    Args:
        signature: What they are for.
        any_length: The length of each axis that varies.
        alike: Whether whole numbers are all one, which a length can be, too; else they are one and
            nought in turn, what an index or a mask can be. Other numbers lie around zero.
    """
    given = blank(signature, any_length)
    if given is None:
        return None
    numbers = np.random.default_rng(0)
    return {
        name: numbers.standard_normal(array.shape).astype(array.dtype)
        if array.dtype.kind == "f"
        else _ones(array, alike=alike)
        for name, array in given.items()
    }


def _ones(array: Array, *, alike: bool) -> Array:
    """Return ones, or ones and noughts, in turn along each axis; as texts `1` and an empty one.

    So each row has what the one before it has not. Of equal rows the order makes no difference, nor
    do their largest or their mean.
    """
    ones = np.ones(array.shape, np.bool_)
    if not alike:
        for axis, length in enumerate(array.shape):
            others = (-1,) + (1,) * (array.ndim - axis - 1)
            ones ^= (np.arange(length) % 2 == 1).reshape(others)
    return np.where(ones, "1", array) if array.dtype.kind == "O" else ones.astype(array.dtype)


def read_source(source: Path | bytes, max_bytes: int) -> tuple[bytes, str]:
    """Return a model's bytes, and what to call it in errors.

    Raises:
        Unprocessable: The file cannot be read, or is larger than `max_bytes`.
    """
    name = source.name if isinstance(source, Path) else "the file"
    try:
        # Its size first: what is too large is not worth reading.
        size = source.stat().st_size if isinstance(source, Path) else len(source)
        if size > max_bytes:
            raise Unprocessable(
                f"{name} has {size:,} bytes; a model of this format may have {max_bytes:,}"
            )
        return source.read_bytes() if isinstance(source, Path) else source, name
    except OSError as error:
        raise Unprocessable(f"{name} cannot be read: {error.strerror or error}") from None


def _row_length(specs: tuple[TensorSpec, ...]) -> int | None:
    shape = specs[0].shape if specs else ()
    return shape[1] if len(shape) == 2 and shape[1] != ANY_LENGTH else None


class Runtime(Protocol):
    """A model, loaded. Its methods block, and may be called from several threads."""

    @property
    def format(self) -> str:
        """The name of the format."""

    @property
    def signature(self) -> Signature:
        """What it takes and gives."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the file says about itself."""

    @property
    def provider(self) -> str:
        """What computes: `cpu`, `cuda` or the like."""

    @classmethod
    def load(cls, source: Path | bytes, *, threads: int = 1, provider: str = CPU) -> "Runtime":
        """Open a file, or what a file holds.

        Args:
            source: The file.
            threads: Threads of one run.
            provider: What should compute. Nothing else ever stands in for it.

        Raises:
            Unprocessable: It is not a sound model of the format, or the provider is not to be had
                here; says why.
        """
        ...

    def warm_up(self) -> None:
        """Do one pass on zeros, so that the first caller does not pay for what a first pass makes.

        A model that refuses zeros stays cold; that is no error.
        """
        ...

    def run(self, tensors: Tensors) -> dict[str, Array]:
        """Do one forward pass.

        Raises:
            InvalidRequest: The tensors do not fit the signature.
            Unprocessable: The model failed on them.
        """
        ...

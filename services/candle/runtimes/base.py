"""What executes a format: the shape that every runtime has."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from bus.errors import InvalidRequest

Array = npt.NDArray[Any]
Tensors = Mapping[str, Array]

ANY_LENGTH: Final = -1

# Datatypes of the Open Inference Protocol, and what numpy calls them.
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


@dataclass(frozen=True)
class TensorSpec:
    """One input or output.

    Attributes:
        name: Its name.
        datatype: As the Open Inference Protocol names it.
        shape: Its lengths, `ANY_LENGTH` for those that vary.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]

    def check(self, array: Array) -> None:
        """Raise InvalidRequest, naming what was found and what is taken, unless it fits."""
        expected = DTYPES[self.datatype]
        if array.dtype != expected:
            raise InvalidRequest(
                f"input {self.name!r} has values of type {array.dtype}, the model takes "
                f"{expected} ({self.datatype})",
                field=self.name,
            )
        fits = len(array.shape) == len(self.shape) and all(
            want in {ANY_LENGTH, got} for want, got in zip(self.shape, array.shape, strict=True)
        )
        if not fits:
            raise InvalidRequest(
                f"input {self.name!r} has the shape {list(array.shape)}, the model takes "
                f"{list(self.shape)} (-1: any length)",
                field=self.name,
            )


@dataclass(frozen=True)
class Signature:
    """What a model takes and gives."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def batched(self) -> bool:
        """Whether axis 0 of every input and output takes any length: rows can be put together."""
        return all(spec.shape[:1] == (ANY_LENGTH,) for spec in (*self.inputs, *self.outputs))

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

    @classmethod
    def load(cls, path: Path, *, threads: int = 1) -> "Runtime":
        """Open a file.

        Raises:
            Unprocessable: It is not a sound model of the format; says why.
        """
        ...

    def run(self, tensors: Tensors) -> dict[str, Array]:
        """Do one forward pass.

        Raises:
            InvalidRequest: The tensors do not fit the signature.
            Unprocessable: The model failed on them.
        """
        ...

"""Linear models from JSON: y = x W^T + b in float32."""

from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import numpy as np
from msgspec import Meta

from bus import codec
from bus.errors import InvalidRequest, Unprocessable
from services.candle.runtimes.base import (
    ANY_LENGTH,
    CPU,
    Array,
    Signature,
    Tensors,
    TensorSpec,
    blank,
    read_source,
)

MAX_DIM: Final = 1_000_000
# As Python numbers the weights take several times the file; larger models belong into ONNX.
MAX_BYTES: Final = 256 * 1024**2
Dim = Annotated[int, Meta(ge=1, le=MAX_DIM)]


class LinearFile(msgspec.Struct, frozen=True):
    """The file's content.

    Attributes:
        input_dim: Length I of a row that goes in.
        output_dim: Length O of a row that comes out.
        weights: O * I numbers, row-major by output.
        bias: O numbers.
        metadata: Whatever its maker wants to say.
    """

    input_dim: Dim
    output_dim: Dim
    weights: list[float]
    bias: list[float]
    metadata: dict[str, Any] = {}


class Linear:
    """A linear model, loaded; see `Runtime`."""

    format = "linear"
    provider = CPU

    def __init__(self, file: LinearFile) -> None:
        shape = f"{file.output_dim}x{file.input_dim}"
        if len(file.weights) != file.output_dim * file.input_dim:
            raise Unprocessable(
                f"weights length {len(file.weights)} does not match shape {shape}", field="weights"
            )
        if len(file.bias) != file.output_dim:
            raise Unprocessable(
                f"bias length {len(file.bias)} does not match output dim {file.output_dim}",
                field="bias",
            )
        self._weights = _as_float32(file.weights, "weights").reshape(
            file.output_dim, file.input_dim
        )
        self._bias = _as_float32(file.bias, "bias")
        self.metadata = file.metadata
        self.signature = Signature(
            inputs=(TensorSpec("inputs", "FP32", (ANY_LENGTH, file.input_dim)),),
            outputs=(TensorSpec("outputs", "FP32", (ANY_LENGTH, file.output_dim)),),
        )

    @classmethod
    def load(
        cls,
        source: Path | bytes,
        *,
        threads: int = 1,  # noqa: ARG003 - numpy decides
        provider: str = CPU,
    ) -> "Linear":
        """Open a file; see `Runtime.load`."""
        if provider != CPU:
            raise Unprocessable(
                f"provider: linear models are computed by the cpu, not by {provider!r}",
                field="config.provider",
            )
        content, name = read_source(source, MAX_BYTES)
        try:
            return cls(codec.decode(content, LinearFile))
        except InvalidRequest as error:
            raise Unprocessable(
                f"{name} is no linear model: {error.message}", field=error.field
            ) from None

    def warm_up(self) -> None:
        """Do one pass on zeros; see `Runtime.warm_up`."""
        zeros = blank(self.signature)
        if zeros is not None:
            self.run(zeros)

    def run(self, tensors: Tensors) -> dict[str, Array]:
        """Do one forward pass; see `Runtime.run`. What is beyond float32 comes out infinite."""
        self.signature.check(tensors)
        # An overflow is the caller's to see in the answer, not a warning in the worker's log.
        with np.errstate(over="ignore", invalid="ignore"):
            return {"outputs": tensors["inputs"] @ self._weights.T + self._bias}


def _as_float32(values: list[float], name: str) -> Array:
    with np.errstate(over="ignore"):
        array = np.asarray(values, np.float32)
    if not np.isfinite(array).all():
        at = int(np.flatnonzero(~np.isfinite(array))[0])
        raise Unprocessable(f"{name}[{at}] is beyond float32", field=f"{name}[{at}]")
    return array

"""Linear models from JSON: y = x W^T + b in float32."""

import re
from collections.abc import Iterator
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
    Fault,
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
        for fault in _wrong_lengths(
            file.input_dim, file.output_dim, len(file.weights), len(file.bias)
        ):
            raise Unprocessable(fault.what, field=fault.where)
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

    @property
    def parameters(self) -> int:
        """How many numbers it has learned."""
        return self._weights.size + self._bias.size

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


def faults_of(content: bytes, name: str) -> tuple[list[Fault], list[str]]:
    """Return everything that is wrong with a linear model's file, and what could be better.

    `Linear.load` ends at the first fault; whoever mends a file wants all of them.

    Args:
        content: The file.
        name: What to call it.
    """

    def no_linear_model(what: str, where: str | None = None) -> Fault:
        return Fault(where or "", f"{name} is no linear model: {what}")

    if not content:
        return [no_linear_model("the body is not JSON: the file is empty")], []
    try:
        raw = codec.decode(content, dict[str, msgspec.Raw])
    except InvalidRequest as error:
        return [_not_a_number(content, name) or no_linear_model(error.message, error.field)], []
    faults: list[Fault] = []
    known: dict[str, Any] = {}
    # One by one: msgspec ends at the first that does not fit.
    for field in msgspec.structs.fields(LinearFile):
        if field.encode_name not in raw:
            if field.required:
                what = f"Object missing required field `{field.encode_name}`"
                faults.append(no_linear_model(what, field.encode_name))
            continue
        try:
            one = msgspec.defstruct("One", [(field.encode_name, field.type)])
            text = b'{"%s":%b}' % (field.encode_name.encode(), bytes(raw[field.encode_name]))
            known[field.encode_name] = getattr(codec.decode(text, one), field.encode_name)
        except InvalidRequest as error:
            faults.append(no_linear_model(error.message, error.field or field.encode_name))
    faults += _wrong_lengths(
        known.get("input_dim"),
        known.get("output_dim"),
        len(known["weights"]) if "weights" in known else None,
        len(known["bias"]) if "bias" in known else None,
    )
    for key in ("weights", "bias"):
        try:
            _as_float32(known.get(key, []), key)
        except Unprocessable as error:
            faults.append(Fault(error.field or key, error.message))
    fields = LinearFile.__struct_fields__
    advice = [
        f"the field {key[:80]!r} means nothing here and is passed over; known are "
        f"{', '.join(fields)}"
        for key in sorted(raw.keys() - set(fields))[:5]
    ]
    if not faults and not known.get("metadata"):
        advice.append("it does not say what it is; an object `metadata` is shown to callers")
    return faults, advice


def _not_a_number(content: bytes, name: str) -> Fault | None:
    """Return the fault of a file that has NaN or Infinity as a value, which JSON lacks."""
    # In a text they stand behind a quote, or a word.
    found = re.search(rb"[\[,:]\s*(-?(?:NaN|Infinity|nan|inf))\s*[\],}]", content)
    if found is None:
        return None
    # The last key before it.
    keys = re.findall(rb'"(\w{1,64})"\s*:', content[: found.end()])
    where = keys[-1].decode(errors="replace") if keys else ""
    return Fault(
        where,
        f"{name} is no linear model: the body is not JSON: {where or 'it'} has "
        f"{found[1].decode()}, and JSON has numbers only; weights must be finite",
    )


def _wrong_lengths(
    input_dim: int | None, output_dim: int | None, weights: int | None, bias: int | None
) -> Iterator[Fault]:
    """Give what does not fit together, as far as it is known."""
    if input_dim and output_dim and weights is not None and weights != output_dim * input_dim:
        yield Fault(
            "weights", f"weights length {weights} does not match shape {output_dim}x{input_dim}"
        )
    if output_dim and bias is not None and bias != output_dim:
        yield Fault("bias", f"bias length {bias} does not match output dim {output_dim}")


def _as_float32(values: list[float], name: str) -> Array:
    with np.errstate(over="ignore"):
        array = np.asarray(values, np.float32)
    if not np.isfinite(array).all():
        at = int(np.flatnonzero(~np.isfinite(array))[0])
        raise Unprocessable(f"{name}[{at}] is beyond float32", field=f"{name}[{at}]")
    return array

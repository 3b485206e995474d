"""The contract's rows of numbers <-> arrays: `candle.model.run`."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from bus import messages as m
from bus.errors import InvalidRequest, Unprocessable
from services.candle.runtimes.base import ANY_LENGTH, DTYPES, Array, Runtime, Tensors, TensorSpec


def as_rows(inputs: list[list[float]], runtime: Runtime) -> Array:
    """Turn JSON rows into one array of shape ``[n, input_dim]`` of the type the model takes.

    Raises:
        InvalidRequest: The model does not take rows; there is no row; one has another length or
            a value that does not fit; says which.
    """
    spec = _row_input(runtime)
    if not inputs:
        raise InvalidRequest("inputs: there is no row", field="inputs")
    width = spec.shape[1] if spec.shape[1] > 0 else len(inputs[0])
    for i, row in enumerate(inputs):
        if len(row) != width:
            raise InvalidRequest(
                f"dimension mismatch: expected {width} columns, got {len(row)} in row {i}",
                field=f"inputs[{i}]",
            )
    wide = np.asarray(inputs, np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        rows: Array = wide.astype(DTYPES[spec.datatype])
        kept = np.isfinite(rows.astype(np.float64)) & (
            (rows == wide) | np.issubdtype(rows.dtype, np.floating)
        )
    if not kept.all():
        i, j = (int(at) for at in np.argwhere(~kept)[0])
        raise InvalidRequest(
            f"inputs[{i}][{j}]: {inputs[i][j]!r} is no {spec.datatype}, which the model takes",
            field=f"inputs[{i}][{j}]",
        )
    return rows


def steps(given: Array, runtime: Runtime) -> list[Tensors]:
    """Return what runs one after the other: all rows at once, or pieces of a fixed length."""
    spec = runtime.signature.inputs[0]
    step = len(given) if spec.shape[0] == ANY_LENGTH else spec.shape[0]
    return [{spec.name: given[at : at + step]} for at in range(0, len(given), step)]


def joined(outputs: Sequence[Mapping[str, Array]]) -> Mapping[str, Array]:
    """Return the outputs of several steps as those of one."""
    return {
        name: np.concatenate([np.atleast_1d(one[name]) for one in outputs]) for name in outputs[0]
    }


def check_finite(outputs: Mapping[str, Array]) -> None:
    """Raise Unprocessable for values that JSON has no words for."""
    for name, value in outputs.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise Unprocessable(
                f"the model gave values that are not finite, in output {name!r}; JSON has none"
            )


def output_of(
    model: str, outputs: Mapping[str, Array], took_ms: float, spec: m.ModelVersion, instance: str
) -> m.ModelOutput:
    """Return outputs as they travel, with the version, artefact and instance that gave them.

    All of them have to be finite.
    """
    first = next((value for value in outputs.values() if value.dtype.kind in "biuf"), None)
    numbers = np.empty((0, 0)) if first is None else _as_numbers(first)
    is_all = len(outputs) == 1 and first is not None and first.ndim == 2
    named = {} if is_all else {name: value.tolist() for name, value in outputs.items()}
    return m.ModelOutput(
        id=model,
        outputs=numbers.tolist(),
        execution_ms=took_ms,
        named=named,
        checksum=spec.checksum,
        instance=instance,
        version=spec.version,
    )


def _as_numbers(output: Array) -> npt.NDArray[np.float64]:
    """Return an output as rows of numbers, whatever its rank: a scalar is one row of one."""
    return output.reshape(len(output) if output.ndim else 1, -1).astype(np.float64)


def _row_input(runtime: Runtime) -> TensorSpec:
    """Return the only input of a model that takes rows of numbers."""
    inputs = runtime.signature.inputs
    if len(inputs) == 1 and len(inputs[0].shape) == 2 and inputs[0].datatype != "BYTES":
        return inputs[0]
    said = ", ".join(f"{spec.name} {spec.datatype}{list(spec.shape)}" for spec in inputs)
    raise InvalidRequest(
        f"candle.model.run takes models with one input of numbers in rows; this one takes {said}",
        field="id",
    )

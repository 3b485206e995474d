"""ONNX models through onnxruntime, on the processor."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from bus.errors import Unprocessable
from services.candle.runtimes.base import (
    ANY_LENGTH,
    DTYPES,
    Array,
    Signature,
    Tensors,
    TensorSpec,
)

# What onnxruntime calls the types that tensors on the wire can have.
_DATATYPES: Final[Mapping[str, str]] = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}


class Onnx:
    """An ONNX model, loaded; see `Runtime`."""

    format = "onnx"

    def __init__(self, content: bytes, name: str, threads: int) -> None:
        # Imported here: a worker that serves only linear models starts without its 30 MB.
        import onnxruntime as ort  # type: ignore[import-untyped] # noqa: PLC0415

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Spinning threads take the processor from other models for nothing.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 4
        try:
            # From bytes, not from a path: external data cannot be reached from there.
            self._session = ort.InferenceSession(
                content, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # noqa: BLE001 - onnxruntime's have no base of their own
            raise Unprocessable(
                f"{name} is no ONNX model that can be run: {_cause(error)}"
            ) from None
        described = self._session.get_modelmeta()
        self.metadata = {
            "producer": described.producer_name,
            "graph": described.graph_name,
            "description": described.description,
            "version": described.version,
            **described.custom_metadata_map,
        }
        self.signature = Signature(
            inputs=tuple(_spec(node, name) for node in self._session.get_inputs()),
            outputs=tuple(_spec(node, name) for node in self._session.get_outputs()),
        )

    @classmethod
    def load(cls, path: Path, *, threads: int = 1) -> "Onnx":
        """Open a file; see `Runtime.load`."""
        return cls(path.read_bytes(), path.name, threads)

    def run(self, tensors: Tensors) -> dict[str, Array]:
        """Do one forward pass; see `Runtime.run`."""
        self.signature.check(tensors)
        try:
            values = self._session.run(None, dict(tensors))
        except Exception as error:  # noqa: BLE001 - onnxruntime's have no base of their own
            raise Unprocessable(f"the model failed on these inputs: {_cause(error)}") from None
        names = (spec.name for spec in self.signature.outputs)
        return {name: np.asarray(value) for name, value in zip(names, values, strict=True)}


def _spec(node: Any, file: str) -> TensorSpec:
    datatype = _DATATYPES.get(node.type)
    if datatype is None:
        raise Unprocessable(
            f"{file}: {node.name!r} is a {node.type}; tensors of {', '.join(DTYPES)} are served"
        )
    # A symbolic length is a string, an unknown one None.
    lengths = (n if isinstance(n, int) and n > 0 else ANY_LENGTH for n in node.shape)
    return TensorSpec(node.name, datatype, tuple(lengths))


def _cause(error: Exception) -> str:
    """Return what onnxruntime says, without its error number and its place in the C++ source."""
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    return said.rpartition(" : ")[2].strip()[:300] or said[:300]

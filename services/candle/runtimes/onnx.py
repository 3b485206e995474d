"""ONNX models through onnxruntime, on the processor or on what else it has a provider for."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from bus.errors import InvalidRequest, Unprocessable
from services.candle.runtimes.base import (
    ANY_LENGTH,
    CPU,
    DTYPES,
    Array,
    Signature,
    Tensors,
    TensorSpec,
    blank,
    read_source,
    varied,
)
from services.candle.runtimes.onnx_file import OnnxFile, read_file

# Providers that compute nothing here: but for models that call a service elsewhere, what they are
# asked for is left to the processor (onnxruntime 1.32, tried; it always lists `azure`).
ELSEWHERE: Final = frozenset({"azure"})
# With an axis of length 0 these end the whole process, by SIGABRT (onnxruntime 1.32, tried; some 70
# other operators answer, or fail in words). The other two are made of the same kernel.
NEVER_EMPTY: Final = frozenset(
    {"LSTM", "GRU", "com.microsoft.AttnLSTM", "com.microsoft.DynamicQuantizeLSTM"}
)
# What one protobuf message, and so an ONNX file, can hold.
MAX_BYTES: Final = 2 * 1024**3
# How many rows are tried together and one by one, and up to which share of the largest value what
# comes out may differ. What is quantized while it runs differs by a hundredth or two with the rows
# beside it; an LSTM whose axis 0 is time, by a quarter and more.
ROWS_TRIED: Final = 2
ALIKE: Final = 0.05

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

# Around the cause in onnxruntime's messages: its error number, and its place in the C++ source,
# with the signature and the condition there.
_ERROR_NUMBER: Final = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")
_CPP_PLACE: Final = re.compile(r"\S+\.(?:cc|h|cpp):\d+ (?:.*? was false\. ?)?")
# What onnxruntime says in many words, or in none that help.
_IN_WORDS: Final = (
    (
        re.compile(
            r"Opset (\d+) is under development.*?for domain (\S+) is till opset (\d+)", re.DOTALL
        ),
        r"opset \1 of \2 is newer than onnxruntime here takes; export it with opset \3 or lower",
    ),
    (
        re.compile(r"Unsupported model IR version: (\d+), max supported IR version: (\d+)"),
        r"its IR version \1 is newer than onnxruntime here takes; save it with \2 or lower",
    ),
    (
        re.compile(r"Fatal error: (\S*?):?([^\s:(]+)\(-?\d+\) is not a registered function/op"),
        r"onnxruntime here has no operator \2 in the domain '\1'",
    ),
)


class Onnx:
    """An ONNX model, loaded; see `Runtime`."""

    format = "onnx"

    def __init__(
        self, source: Path | bytes, name: str, file: OnnxFile, threads: int, provider: str
    ) -> None:
        # Imported here: a worker that serves only linear models starts without its 30 MB.
        import onnxruntime as ort  # type: ignore[import-untyped] # noqa: PLC0415

        executed_by = _provider_in(ort.get_available_providers(), provider)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Spinning threads take the processor from other models for nothing.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 4
        try:
            # From the path: given bytes, it keeps them for as long as it lives, beside the weights
            # that it makes of them. A model of 41 MB took 88 MB, and 127 MB while it was loaded; so
            # it takes 49 MB and 88 MB.
            self._session = ort.InferenceSession(source, options, providers=[executed_by])
        except Exception as error:  # noqa: BLE001 - onnxruntime's have no base of their own
            raise unsound(name, _cause(error, source)) from None
        # A provider whose libraries are missing is passed over by onnxruntime, with a warning.
        if self._session.get_providers()[0] != executed_by:
            raise Unprocessable(
                f"provider: {provider!r} is known to onnxruntime here, but does not start; its "
                "libraries or its device are missing",
                field="config.provider",
            )
        self.provider = provider
        described = self._session.get_modelmeta()
        self.metadata = {
            "producer": described.producer_name,
            "graph": described.graph_name,
            "description": described.description,
            "version": described.version,
            **described.custom_metadata_map,
        }
        self.signature = Signature(
            inputs=tuple(_spec(node, name, file) for node in self._session.get_inputs()),
            outputs=tuple(_spec(node, name, file) for node in self._session.get_outputs()),
        )
        self._never_empty = sorted(NEVER_EMPTY.intersection(file.operators))
        if self.signature.batched and not self._rows_kept():
            self.signature = Signature(
                self.signature.inputs, self.signature.outputs, rows_kept=False
            )

    @classmethod
    def load(cls, source: Path | bytes, *, threads: int = 1, provider: str = CPU) -> "Onnx":
        """Open a file; see `Runtime.load`. Weights in files beside it are refused."""
        name, file = _refuse_unsound(source)
        return cls(source, name, file, threads, provider)

    def warm_up(self) -> None:
        """Do one pass on zeros; see `Runtime.warm_up`."""
        zeros = blank(self.signature)
        if zeros is not None:
            self._try(zeros)

    def run(self, tensors: Tensors) -> dict[str, Array]:
        """Do one forward pass; see `Runtime.run`. BYTES come out as str."""
        return self._run(tensors)

    def _run(self, tensors: Tensors, options: Any = None) -> dict[str, Array]:
        self.signature.check(tensors)
        if self._never_empty:
            self._refuse_empty(tensors)
        fed = {
            spec.name: _texts(tensors[spec.name], spec.name)
            if spec.datatype == "BYTES"
            else tensors[spec.name]
            for spec in self.signature.inputs
        }
        try:
            values = self._session.run(None, fed, options)
        except Exception as error:  # noqa: BLE001 - onnxruntime's have no base of their own
            raise Unprocessable(f"the model failed on these inputs: {_cause(error)}") from None
        names = (spec.name for spec in self.signature.outputs)
        return {name: np.asarray(value) for name, value in zip(names, values, strict=True)}

    def _refuse_empty(self, tensors: Tensors) -> None:
        for name, array in tensors.items():
            if not array.size:
                raise InvalidRequest(
                    f"input {name!r} has the shape {list(array.shape)}, and so no values; the "
                    f"model has the operator {self._never_empty[0]}, which needs at least one",
                    field=name,
                )

    def _rows_kept(self) -> bool:
        """Return whether a row comes out as it went in, whatever rows stand beside it.

        That cannot be read from the file: axis 0 may as well be time, and what is put together
        then answers each caller with what others sent. So the model is asked: two rows must come
        out together as they do one by one. Where it cannot be asked, one name for axis 0
        everywhere is the file's word.
        """
        import onnxruntime as ort  # noqa: PLC0415 - as above

        # What several rows take is not kept for the one row that most requests are.
        sparing = ort.RunOptions()
        if self.provider == CPU:
            sparing.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        tried = (
            varied(self.signature, ROWS_TRIED),
            varied(self.signature, ROWS_TRIED, alike=True),
            blank(self.signature, ROWS_TRIED),
        )
        for given in tried:
            kept = None if given is None else self._keeps(given, sparing)
            if kept is not None:
                return kept
        nodes = (*self._session.get_inputs(), *self._session.get_outputs())
        return len({node.shape[0] for node in nodes}) == 1 and nodes[0].shape[0] is not None

    def _keeps(self, given: Tensors, options: Any) -> bool | None:
        """Return whether these rows come out together as one by one; None if the model fails."""
        together = self._try(given, options)
        if together is None:
            return None
        if any(values.shape[:1] != (ROWS_TRIED,) for values in together.values()):
            return False
        for i in range(ROWS_TRIED):
            row = {name: array[i : i + 1] for name, array in given.items()}
            alone = self._try(row, options)
            if alone is None:
                return None
            if not all(_alike(alone[name], values[i : i + 1]) for name, values in together.items()):
                return False
        return True

    def _try(self, tensors: Tensors, options: Any = None) -> dict[str, Array] | None:
        try:
            return self._run(tensors, options)
        except Unprocessable:
            return None


def _alike(one: Array, other: Array) -> bool:
    """Return whether two results are the same, but for the last digits."""
    if one.shape != other.shape or one.dtype.kind != "f":
        return np.array_equal(one, other)
    near = ALIKE * np.abs(one[np.isfinite(one)]).max(initial=0.0)
    return np.allclose(one, other, rtol=0.0, atol=near, equal_nan=True)


def import_libraries() -> str:
    """Import what runs the models, which takes a while, and return its name and version."""
    import onnxruntime as ort  # noqa: PLC0415 - as above

    return f"onnxruntime {ort.__version__}"


def _provider_in(available: Sequence[str], provider: str) -> str:
    """Return onnxruntime's name of a provider: `cuda` is `CUDAExecutionProvider`."""
    names = {name.removesuffix("ExecutionProvider").lower(): name for name in available}
    here = names.keys() - ELSEWHERE
    if provider in ELSEWHERE:
        raise Unprocessable(
            f"provider: {provider!r} computes nothing here: it calls a service elsewhere, for "
            "models that are made for it, and leaves all else to the processor; onnxruntime has "
            f"{', '.join(sorted(here))} on this host",
            field="config.provider",
        )
    if provider not in here:
        raise Unprocessable(
            f"provider: {provider!r} is not here; onnxruntime has {', '.join(sorted(here))} on "
            "this host (another build of it, such as onnxruntime-gpu, brings others)",
            field="config.provider",
        )
    return names[provider]


def _refuse_unsound(source: Path | bytes) -> tuple[str, OnnxFile]:
    """Return what to call an ONNX file, and what it says, unless it is unsound or needs another.

    What was read and parsed for it is gone when this returns, before a session takes as much.
    """
    content, name = read_source(source, MAX_BYTES)
    file = read_file(content)
    for fault in file.faults:
        raise unsound(name, fault.what)
    return name, file


def _spec(node: Any, name: str, file: OnnxFile) -> TensorSpec:
    datatype = _DATATYPES.get(node.type)
    if datatype is None:
        raise Unprocessable(
            f"{name}: {node.name!r} is a {node.type}; tensors of {', '.join(DTYPES)} are served"
        )
    # A symbolic length is a string, an unknown one None.
    lengths = (n if isinstance(n, int) and n > 0 else ANY_LENGTH for n in node.shape)
    shape = tuple(lengths)
    # onnxruntime tells of a scalar and of what has no shape in the file alike.
    if not shape and node.name in file.unranked:
        return TensorSpec(node.name, datatype, (ANY_LENGTH,), any_rank=True)
    return TensorSpec(node.name, datatype, shape)


def _texts(array: Array, name: str) -> Array:
    """Return an array of str only: of anything else onnxruntime would take Python's `str()`."""
    texts = np.empty(array.shape, np.object_)
    for at, element in np.ndenumerate(array):
        if isinstance(element, str):
            texts[at] = element
            continue
        place = f"{name}{list(at)}"
        if not isinstance(element, bytes):
            raise InvalidRequest(
                f"{place} is of type {type(element).__name__}; BYTES take str or bytes of UTF-8",
                field=place,
            )
        try:
            texts[at] = element.decode()
        except UnicodeDecodeError:
            raise InvalidRequest(
                f"{place} is not UTF-8, which the model's strings are", field=place
            ) from None
    return texts


def unsound(name: str, cause: str) -> Unprocessable:
    """Return the error for a file that cannot be run."""
    return Unprocessable(f"{name} is no ONNX model that can be run: {cause}")


def _cause(error: Exception, source: Path | bytes | None = None) -> str:
    """Return what onnxruntime says, without what speaks only to those who build it."""
    text = str(error)
    if isinstance(source, Path):
        text = text.replace(f"Load model from {source} failed:", "")
    for pattern, words in _IN_WORDS:
        if found := pattern.search(text):
            return found.expand(words)
    lines = text.strip().splitlines() or [type(error).__name__]
    said = _ERROR_NUMBER.sub("", lines[0]).rpartition("Status Message: ")[2]
    return (_CPP_PLACE.sub("", said).strip() or said)[:300]

"""What an ONNX file says, found without running it: faults, facts, and what could be better."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Final

from services.candle.runtimes.base import Fault

# The operators that onnxruntime brings are in these; those of others need libraries of their own,
# which would run in the worker.
DOMAINS: Final = ("ai.onnx", "ai.onnx.ml", "com.microsoft")
# The first one with the dynamic slices and pads that exporters have used since.
OLD_OPSET: Final = 11
DUPLICATE_MIN_BYTES: Final = 1 << 20
# How many names a sentence lists.
_NAMED: Final = 5

# How files begin that are taken for ONNX files.
_BEGINNINGS: Final[Mapping[bytes, str]] = {
    b"PK\x03\x04": "it is a ZIP archive, as PyTorch saves models (.pt, .pth); export it with "
    "torch.onnx.export",
    b"\x80": "it looks like a Python pickle; convert the model with the exporter of its library "
    "(torch.onnx, skl2onnx)",
    b"\x89HDF": "it is an HDF5 file, as Keras saves models; convert it with tf2onnx",
    b"\x1f\x8b": "it is compressed with gzip; unpack it first",
    b"version https://git-lfs": "it is a pointer of Git LFS, which stands for the file; fetch the "
    "file itself with git lfs pull",
    b"GGUF": "it is a GGUF file, which llama.cpp runs",
    b"<": "it is a web page or XML",
    b"{": "it is JSON; a linear model is called .json",
}
_NO_ONNX: Final = "it is not in the ONNX format, or is cut short"
_ONE_FILE: Final = (
    "all weights must stand in the .onnx file itself, as onnx.save_model(onnx.load('model.onnx'), "
    "'one.onnx') writes it"
)


@dataclass(frozen=True)
class OnnxFile:
    """What a file says.

    Attributes:
        faults: Why it must not be opened by a runtime.
        advice: What could be better.
        opset: Version of the operator set `ai.onnx`.
        producer: What made it.
        operators: How often each occurs, those of other domains with the domain before the name.
        parameters: How many numbers it has learned.
        unranked: Inputs and outputs of which it does not even say how many axes they have.
    """

    faults: tuple[Fault, ...] = ()
    advice: tuple[str, ...] = ()
    opset: int | None = None
    producer: str | None = None
    operators: Mapping[str, int] = field(default_factory=dict)
    parameters: int | None = None
    unranked: frozenset[str] = frozenset()


def read_file(content: bytes) -> OnnxFile:
    """Return what an ONNX file says; it may be anything. Blocks.

    onnxruntime looks for external data from the working directory when it has only bytes, and
    reads it: for a Constant node it gave the content of a file there (1.32, tried). So a model
    could carry off what the worker can read. What is found here must be asked before a runtime
    opens the file.
    """
    import onnx  # noqa: PLC0415 - only for ONNX files

    try:
        model = onnx.ModelProto.FromString(content)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - which error depends on the protobuf underneath
        model = None
    # Some texts parse by chance: as a message of fields that ONNX does not know.
    if model is None or not model.HasField("graph"):
        known = (what for start, what in _BEGINNINGS.items() if content.startswith(start))
        return OnnxFile(faults=(Fault("", next(known, _NO_ONNX)),))
    tensors, nodes = [], []
    for message in _messages(model, onnx.TensorProto):
        if isinstance(message, onnx.TensorProto):
            tensors.append(message)
        elif isinstance(message, onnx.NodeProto):
            nodes.append(message)
    opset = max((o.version for o in model.opset_import if o.domain in {"", "ai.onnx"}), default=0)
    return OnnxFile(
        faults=(*_external(tensors, onnx.TensorProto), *_custom(nodes, model.functions)),
        advice=tuple(_advice(model, tensors, nodes, opset)),
        opset=opset or None,
        producer=f"{model.producer_name} {model.producer_version}".strip()[:200] or None,
        operators=Counter(_name_of(node)[:100] for node in nodes),
        parameters=_parameters(tensors, nodes),
        unranked=frozenset(
            value.name
            for value in (*model.graph.input, *model.graph.output)
            if not value.type.tensor_type.HasField("shape")
        ),
    )


def objection(content: bytes) -> str | None:
    """Return what ONNX's own checker has against a file, in one line; None if nothing. Blocks.

    The checker is written in C++, and a file made for it can crash it.
    """
    from onnx import checker  # noqa: PLC0415 - only for ONNX files

    try:
        checker.check_model(content)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - it has several, and passes on those of protobuf
        lines = (line.strip() for line in str(error).splitlines())
        return "; ".join(line for line in lines if line and line != "==> Context:")[:300]
    return None


def import_libraries() -> None:
    """Import what reads the files, which takes a while."""
    from onnx import checker  # noqa: F401, PLC0415 - only for ONNX files


def _messages(message: Any, leaf: type) -> Iterator[Any]:
    """Find every message, however deep: initializers, attributes, branches, loops, functions."""
    # By reflection and not by a list of places, so that none is forgotten when ONNX gets a new one.
    waiting = [message]
    while waiting:
        here = waiting.pop()
        yield here
        if isinstance(here, leaf):
            continue
        inside: list[Any] = []
        for described, value in here.ListFields():
            if described.message_type is not None:
                inside.extend([value] if hasattr(value, "ListFields") else value)
        # So that they come in the order of the file.
        waiting.extend(reversed(inside))


def _external(tensors: Iterable[Any], kind: Any) -> Iterator[Fault]:
    outside = [t for t in tensors if t.external_data or t.data_location == kind.EXTERNAL]
    for tensor in outside:
        places = [entry.value for entry in tensor.external_data if entry.key == "location"]
        if leaving := next((place for place in places if _leaves(place)), None):
            yield Fault(
                tensor.name,
                f"the tensor {tensor.name!r} lies in another file (external data), and that file "
                f"outside the model's folder: {leaving[:200]!r}; {_ONE_FILE}",
            )
            return
    if outside:
        first = outside[0].name
        others = f", and {len(outside) - 1} more do" if len(outside) > 1 else ""
        yield Fault(
            first, f"the tensor {first!r} lies in another file (external data){others}; {_ONE_FILE}"
        )


def _leaves(place: str) -> bool:
    """Return whether a path leads out of the folder that it starts from, on any system."""
    return any(
        path.is_absolute() or bool(path.drive) or ".." in path.parts
        for path in (PurePosixPath(place), PureWindowsPath(place))
    )


def _custom(nodes: Iterable[Any], functions: Iterable[Any]) -> Iterator[Fault]:
    own = {(function.domain, function.name) for function in functions}
    unknown = {
        _name_of(node): node
        for node in nodes
        if node.domain and node.domain not in DOMAINS and (node.domain, node.op_type) not in own
    }
    if unknown:
        names = sorted(unknown)
        some = ", ".join(name[:100] for name in names[:_NAMED])
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        yield Fault(
            next(iter(unknown.values())).name or names[0][:100],
            f"it uses operators that onnxruntime does not bring: {some}{more}; taken are those of "
            f"{', '.join(DOMAINS)}, and functions that the file itself defines",
        )


def _name_of(node: Any) -> str:
    known = node.domain in {"", "ai.onnx"}
    return str(node.op_type if known else f"{node.domain}.{node.op_type}")


def _parameters(tensors: Iterable[Any], nodes: Iterable[Any]) -> int | None:
    """Count the numbers in weights, and those of the classic models, which lie in attributes."""
    count = sum(math.prod(t.dims) for t in tensors if t.data_type not in _NO_WEIGHTS)
    count += sum(
        len(attribute.floats)
        for node in nodes
        if node.domain == "ai.onnx.ml"
        for attribute in node.attribute
    )
    # A file may state any lengths; such a count would be of nothing.
    return count if 0 <= count < 1 << 53 else None


# Shapes, indices, flags and texts: INT32, INT64, STRING, BOOL.
_NO_WEIGHTS: Final = {6, 7, 8, 9}
_DOUBLE: Final = 11


def _advice(model: Any, tensors: list[Any], nodes: list[Any], opset: int) -> Iterator[str]:
    if 0 < opset < OLD_OPSET:
        yield f"opset {opset} is old; an export with opset {OLD_OPSET} or later may run faster"
    doubles = [t for t in tensors if t.data_type == _DOUBLE]
    values = sum(math.prod(t.dims) for t in doubles)
    if 8 * values > DUPLICATE_MIN_BYTES:
        yield (
            f"{values:,} of its numbers are float64; float32 takes half the memory, and is nearly "
            "always exact enough"
        )
    if not (model.producer_name or model.doc_string or model.metadata_props):
        yield (
            "it does not say what it is: no producer, no doc_string and no metadata_props; "
            "callers see them"
        )
    yield from _duplicates(tensors)
    if sum(1 for node in nodes if node.op_type == "ZipMap"):
        yield "ZipMap gives maps, which cannot be sent; export with options={'zipmap': False}"


def _duplicates(tensors: Iterable[Any]) -> Iterator[str]:
    seen: dict[tuple[int, bytes], str] = {}
    again: list[tuple[str, str, int]] = []
    for tensor in tensors:
        raw = tensor.raw_data
        if len(raw) < DUPLICATE_MIN_BYTES:
            continue
        key = tensor.data_type, hashlib.blake2b(raw, digest_size=16).digest()
        first = seen.setdefault(key, tensor.name)
        if first != tensor.name:
            again.append((first, tensor.name, len(raw)))
    if again:
        first, second, _ = again[0]
        saved = sum(size for _, _, size in again)
        yield (
            f"{saved:,} bytes of weights are there more than once ({first[:100]!r} and "
            f"{second[:100]!r} hold the same); share them"
        )

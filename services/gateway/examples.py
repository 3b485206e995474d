"""Requests to copy: one inference of zeros, for curl, Python and NATS."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

import msgspec

from bus.messages import TensorInfo
from bus.subjects import MODEL_INFER

# A body with more values than this is not written out, but made by a line of Python.
VALUES_MAX: Final = 256
KEY: Final = "$BKG_KEY"

_NUMPY: Final[Mapping[str, str]] = {
    "BOOL": "bool",
    "UINT8": "uint8",
    "UINT16": "uint16",
    "UINT32": "uint32",
    "UINT64": "uint64",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
    "BYTES": "object",
}


class Examples(msgspec.Struct, frozen=True):
    """One inference of zeros.

    Attributes:
        curl: For a shell, through the gateway; the key stands in `$BKG_KEY`.
        python: For Python with `tritonclient[http]` and numpy, through the gateway.
        nats: For a shell with the command `nats`, past the gateway.
    """

    curl: str
    python: str
    nats: str


@dataclass(frozen=True)
class Place:
    """Where a model is asked.

    Attributes:
        url: The gateway, `http://HOST:PORT`.
        root: The first token of every subject.
        with_key: Whether the gateway wants a key.
    """

    url: str
    root: str
    with_key: bool = True


def examples_of(
    place: Place,
    model: str,
    version: str | None,
    tensors: tuple[Sequence[TensorInfo], Sequence[TensorInfo]],
    shapes: Mapping[str, Sequence[int]],
) -> Examples:
    """Return the examples for a model.

    Args:
        place: Where it is asked.
        model: Its name.
        version: Which version; the default one if None.
        tensors: What it takes and what it gives.
        shapes: Shapes that are known to run, by input; where there is none, free axes become 1.
    """
    inputs, outputs = tensors
    wanted = [(one, _shape(one, shapes.get(one.name))) for one in inputs]
    return Examples(
        curl=_curl(place, model, version, wanted),
        python=_python(place, model, version, wanted, outputs),
        nats=_nats(place, model, version, wanted),
    )


Wanted = Sequence[tuple[TensorInfo, list[int]]]


def body_of(wanted: Wanted) -> dict[str, Any]:
    """Return a request of the Open Inference Protocol whose tensors hold nothing but zeros."""
    return {
        "inputs": [
            {
                "name": one.name,
                "datatype": one.datatype,
                "shape": shape,
                "data": [_zero(one.datatype)] * math.prod(shape),
            }
            for one, shape in wanted
        ]
    }


def _shape(tensor: TensorInfo, known: Sequence[int] | None) -> list[int]:
    # What is told as [-1] may have any number of axes.
    if known is not None and (len(known) == len(tensor.shape) or tensor.shape == [-1]):
        return list(known)
    return [1 if length < 0 else length for length in tensor.shape]


def _zero(datatype: str) -> object:
    return {"BYTES": "", "BOOL": False}.get(datatype, 0)


def _curl(place: Place, model: str, version: str | None, wanted: Wanted) -> str:
    path = f"/v2/models/{quote(model, safe='')}"
    if version is not None:
        path += f"/versions/{quote(version, safe='')}"
    parts = ["curl -sS", shlex.quote(f"{place.url}{path}/infer")]
    if place.with_key:
        parts.append(f'-H "Authorization: Bearer {KEY}"')
    parts.append("-H 'Content-Type: application/json'")
    piped, body = _body(wanted)
    return piped + " ".join([*parts, f"--data-binary {body or '@-'}"])


def _nats(place: Place, model: str, version: str | None, wanted: Wanted) -> str:
    subject = MODEL_INFER.subject(place.root, model, *([version] if version is not None else []))
    piped, body = _body(wanted)
    asked = f"nats req {shlex.quote(subject)}"
    return f"{asked} {body}" if body else f"{piped}{asked} --force-stdin"


def _body(wanted: Wanted) -> tuple[str, str | None]:
    """Return what stands before a command, and its body: written out, or None if it is piped in."""
    if sum(math.prod(shape) for _, shape in wanted) <= VALUES_MAX:
        return "", shlex.quote(msgspec.json.encode(body_of(wanted)).decode())
    inputs = ", ".join(
        f'{{"name": {one.name!r}, "datatype": {one.datatype!r}, "shape": {shape}, '
        f'"data": [{_zero(one.datatype)!r}] * {math.prod(shape)}}}'
        for one, shape in wanted
    )
    made = f'import json; print(json.dumps({{"inputs": [{inputs}]}}))'
    return f"python3 -c {shlex.quote(made)} | ", None


def _python(
    place: Place,
    model: str,
    version: str | None,
    wanted: Wanted,
    outputs: Sequence[TensorInfo],
) -> str:
    scheme, _, host = place.url.partition("://")
    of_version = "" if version is None else f", model_version={version!r}"
    lines = ["import os", ""] if place.with_key else []
    lines += ["import numpy as np", "import tritonclient.http as triton", ""]
    secure = ", ssl=True" if scheme == "https" else ""
    lines.append(f"client = triton.InferenceServerClient({host!r}{secure})")
    headers = ""
    if place.with_key:
        lines.append('headers = {"Authorization": f"Bearer {os.environ[\'BKG_KEY\']}"}')
        headers = ", headers=headers"
    lines.append("inputs = [")
    for one, shape in wanted:
        kind = _NUMPY.get(one.datatype, "float32")
        zeros = (
            f'np.full({shape}, b"", dtype=np.object_)'
            if kind == "object"
            else f"np.zeros({shape}, dtype=np.{'bool_' if kind == 'bool' else kind})"
        )
        lines.append(
            f"    triton.InferInput({one.name!r}, {shape}, {one.datatype!r})"
            f".set_data_from_numpy({zeros}),"
        )
    lines += ["]", f"answer = client.infer({model!r}, inputs{of_version}{headers})"]
    lines += [f"print({one.name!r}, answer.as_numpy({one.name!r}))" for one in outputs]
    return "\n".join(lines) + "\n"

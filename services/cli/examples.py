"""Requests to a model, ready to be copied: curl, Python, nats."""

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from bus.messages import ModelVersion, TensorInfo
from bus.subjects import MODEL_INFER

# A request with more values is made by a program, not written out.
WRITTEN_MAX: Final = 32


@dataclass(frozen=True)
class Examples:
    """The same request, a row of zeros, three ways; each is text for a shell or for Python."""

    curl: str
    python: str
    nats: str


def examples_of(
    model: str, version: ModelVersion, *, url: str, key_file: Path, root: str
) -> Examples:
    """Return requests to a version of a model.

    Args:
        model: Its name.
        version: Which.
        url: The gateway.
        key_file: Where the key of the gateway lies.
        root: The first token of every subject.
    """
    address = f"{url}/v2/models/{quote(model, safe='')}/versions/{version.version}/infer"
    subject = MODEL_INFER.subject(root, model, version.version)
    auth = f'"Authorization: Bearer $(cat {shlex.quote(str(key_file))})"'
    body = _body(version.inputs)
    if body is not None:
        text = shlex.quote(json.dumps({"inputs": body}))
        curl = f"curl -H {auth} {shlex.quote(address)} \\\n  -d {text}"
        nats = f"nats req {subject} \\\n  {text}"
    else:
        program = f"import json; print(json.dumps({_literal(version.inputs)}))"
        made = f"python3 -c {shlex.quote(program)}"
        curl = f"{made} |\n  curl -H {auth} {shlex.quote(address)} --data-binary @-"
        nats = f"{made} |\n  nats req {subject} --force-stdin"
    return Examples(curl, _python(version.inputs, address, key_file), nats)


def _python(inputs: Sequence[TensorInfo], address: str, key_file: Path) -> str:
    return "\n".join(
        [
            "import json, pathlib, urllib.request",
            f"key = pathlib.Path({str(key_file)!r}).read_text().strip()",
            f"body = {_literal(inputs)}",
            "request = urllib.request.Request(",
            f"    {address!r},",
            "    json.dumps(body).encode(),",
            '    {"Authorization": f"Bearer {key}", "Content-Type": "application/json"},',
            ")",
            "print(json.load(urllib.request.urlopen(request)))",
        ]
    )


def _body(inputs: Sequence[TensorInfo]) -> list[dict[str, Any]] | None:
    """Return a row of zeros for each input; None where that is too much to be written out."""
    if sum(math.prod(_shape(one)) for one in inputs) > WRITTEN_MAX:
        return None
    return [
        {
            "name": one.name,
            "datatype": one.datatype,
            "shape": _shape(one),
            "data": [_zero(one.datatype)] * math.prod(_shape(one)),
        }
        for one in inputs
    ]


def _literal(inputs: Sequence[TensorInfo]) -> str:
    """Return the same as Python writes it, however large."""
    tensors = [
        f'{{"name": {json.dumps(one.name)}, "datatype": "{one.datatype}", "shape": {_shape(one)}, '
        f'"data": [{_zero(one.datatype)!r}] * {math.prod(_shape(one))}}}'
        for one in inputs
    ]
    return f'{{"inputs": [{", ".join(tensors)}]}}'


def _shape(tensor: TensorInfo) -> list[int]:
    return [1 if length < 0 else length for length in tensor.shape]


def _zero(datatype: str) -> bool | int | float | str:
    if datatype == "BYTES":
        return ""
    if datatype == "BOOL":
        return False
    return 0 if "INT" in datatype else 0.0

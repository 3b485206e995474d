"""Requests and answers as bytes: the Open Inference Protocol, JSON and binary, and plain rows."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Final

import numpy as np

from tests.bench.models import Floats

# The length of the JSON part, where raw tensors follow it.
HEADER: Final = "Inference-Header-Content-Length"


@dataclass(frozen=True, kw_only=True)
class Body:
    """One request, ready to be sent.

    Attributes:
        path: Where to.
        headers: Beside those that every client sends.
        content: The body.
    """

    path: str
    content: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


def oip_json(model: str, array: Floats) -> Body:
    """Return a request of the Open Inference Protocol, all of it JSON."""
    tensor = _tensor(array) | {"data": array.ravel().tolist()}
    return Body(
        path=_infer(model),
        headers={"Content-Type": "application/json"},
        content=_dumps({"inputs": [tensor]}),
    )


def oip_binary(model: str, array: Floats) -> Body:
    """Return the same with raw tensors both ways, as `tritonclient` sends it."""
    raw = array.astype("<f4").tobytes()
    tensor = _tensor(array) | {"parameters": {"binary_data_size": len(raw)}}
    head = _dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}})
    headers = {"Content-Type": "application/octet-stream", HEADER: str(len(head))}
    return Body(path=_infer(model), headers=headers, content=head + raw)


def rows(path: str, array: Floats, **more: str) -> Body:
    """Return ``{"inputs": [[...], ...]}``, for servers with a format of their own.

    Args:
        path: Where it is sent.
        array: The inputs.
        more: Further fields.
    """
    return Body(
        path=path,
        headers={"Content-Type": "application/json"},
        content=_dumps(more | {"inputs": array.tolist()}),
    )


def raw(path: str, array: Floats) -> Body:
    """Return the values and nothing else, little-endian."""
    headers = {"Content-Type": "application/octet-stream"}
    return Body(path=path, headers=headers, content=array.astype("<f4").tobytes())


def numbers(headers: Mapping[str, str], content: bytes) -> Floats:
    """Return the first output of an answer, whichever of the formats it is in, as one row.

    Raises:
        ValueError: It is in none of them; shows how it begins.
    """
    lower = {name.lower(): value for name, value in headers.items()}
    length = lower.get(HEADER.lower())
    try:
        head = json.loads(content if length is None else content[: int(length)])
        outputs = head["outputs"] if isinstance(head, dict) else head
        first = outputs[0]
        if isinstance(first, dict):
            outputs = first["data"] if "data" in first else _binary(first, content, length)
        return np.asarray(outputs, np.float32).reshape(-1)
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"the answer is no tensor in a known format ({error}): {content[:200]!r}"
        ) from None


def _binary(described: Mapping[str, Any], content: bytes, length: str | None) -> Floats:
    if length is None:
        raise ValueError(f"it has neither data nor the header {HEADER}")
    size = described["parameters"]["binary_data_size"]
    values = np.frombuffer(content, "<f4", count=size // 4, offset=int(length))
    if values.size != prod(described["shape"]):
        raise ValueError(f"its shape is {described['shape']}, and it has {values.size} values")
    return values.astype(np.float32)


def _infer(model: str) -> str:
    return f"/v2/models/{model}/infer"


def _tensor(array: Floats) -> dict[str, Any]:
    return {"name": "input", "shape": list(array.shape), "datatype": "FP32"}


def _dumps(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()

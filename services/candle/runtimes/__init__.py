"""The formats: each is one class in one file, and one line here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from bus.errors import InvalidRequest
from services.candle.runtimes.base import CPU, Runtime
from services.candle.runtimes.linear import Linear
from services.candle.runtimes.onnx import Onnx

FORMATS: Final[Mapping[str, type[Runtime]]] = {".json": Linear, ".onnx": Onnx}


def open_model(path: Path, *, threads: int = 1, provider: str = CPU) -> Runtime:
    """Load a file with the runtime that its suffix names. Blocks.

    Raises:
        InvalidRequest: No runtime takes that suffix.
        Unprocessable: The file is not a sound model, or cannot be read; the provider is not here.
    """
    runtime = FORMATS.get(path.suffix.lower())
    if runtime is None:
        raise InvalidRequest(
            f"{path.name!r}: the format is told by the suffix; served are {', '.join(FORMATS)}",
            field="path",
        )
    return runtime.load(path, threads=threads, provider=provider)

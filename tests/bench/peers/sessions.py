"""What every peer has in common: the models, opened alike, and where to listen."""

import os
from pathlib import Path
from typing import Any, Final

import onnxruntime as ort  # type: ignore[import-untyped]

MODELS: Final = ("tiny", "mlp", "conv")
HOST: Final = "127.0.0.1"
# The most requests that run together; the largest number of connections of a run.
MAX_BATCH: Final = 64


def open_session(model: str) -> Any:
    """Open a model with one thread that does not spin, as candle does."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    path = Path(os.environ["BENCH_MODELS"]) / f"{model}.onnx"
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def port() -> int:
    """Return the port that this run has chosen."""
    return int(os.environ["BENCH_PORT"])


def spare_port() -> int:
    """Return another port that this run has chosen, for servers that insist on a second one."""
    return int(os.environ["BENCH_SPARE_PORT"])

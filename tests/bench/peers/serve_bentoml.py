"""BentoML: one service, an API for each model, adaptive batches; its own body format."""

from typing import Any

import bentoml
import numpy as np

from tests.bench.peers.sessions import MAX_BATCH, MODELS, open_session

BATCHED: dict[str, Any] = {
    "batchable": True, "max_batch_size": MAX_BATCH, "max_latency_ms": 30_000,
}  # fmt: skip


@bentoml.service(workers=1, traffic={"timeout": 30, "max_concurrency": 1024})
class Models:
    """Runs the models."""

    def __init__(self) -> None:
        self._sessions = {model: open_session(model) for model in MODELS}

    @bentoml.api(**BATCHED)
    def tiny(self, inputs: np.ndarray) -> np.ndarray:
        """Run tiny."""
        return self._run("tiny", inputs)

    @bentoml.api(**BATCHED)
    def mlp(self, inputs: np.ndarray) -> np.ndarray:
        """Run mlp."""
        return self._run("mlp", inputs)

    @bentoml.api(**BATCHED)
    def conv(self, inputs: np.ndarray) -> np.ndarray:
        """Run conv."""
        return self._run("conv", inputs)

    def _run(self, model: str, inputs: np.ndarray) -> np.ndarray:
        output: np.ndarray = self._sessions[model].run(None, {"input": inputs.astype(np.float32)})[
            0
        ]
        return output

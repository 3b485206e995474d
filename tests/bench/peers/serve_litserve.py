"""LitServe: one API for each model, batches where they help; its own body format."""

from typing import Any

import litserve
import numpy as np
from fastapi import Request

from tests.bench.peers.sessions import HOST, MAX_BATCH, MODELS, open_session, port


class Model(litserve.LitAPI):
    """Runs one model."""

    def setup(self, device: Any) -> None:  # noqa: ARG002 - the interface's
        """Open the model in the worker."""
        self._session = open_session(self.api_path.removeprefix("/"))

    def decode_request(self, request: Request) -> Any:
        """Return one row."""
        # By now it is the body; the annotation asks the server to read it so.
        return np.array(request["inputs"][0], np.float32)

    def predict(self, x: Any) -> Any:
        """Run what waits together."""
        return self._session.run(None, {"input": x})[0]

    def encode_response(self, output: Any) -> dict[str, Any]:
        """Return the answer's body."""
        return {"outputs": [output.tolist()]}


if __name__ == "__main__":
    apis = [
        Model(max_batch_size=MAX_BATCH, batch_timeout=0.001, api_path=f"/{model}")
        for model in MODELS
    ]
    server = litserve.LitServer(apis, accelerator="cpu", workers_per_device=1, timeout=30)
    server.run(
        host=HOST, port=port(), num_api_servers=1, generate_client_file=False, log_level="warning"
    )

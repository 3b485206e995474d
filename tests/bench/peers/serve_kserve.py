"""KServe's model server; it has no batches of its own."""

from typing import Any

import kserve

from tests.bench.peers.sessions import MODELS, open_session, port


class Model(kserve.Model):
    """Runs one model."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._session = open_session(name)
        self.ready = True

    async def predict(
        self, payload: Any, headers: Any = None, response_headers: Any = None
    ) -> kserve.InferResponse:
        """Answer one request."""
        del headers, response_headers
        tensor = payload.inputs[0]
        values = self._session.run(None, {tensor.name: tensor.as_numpy()})[0]
        output = kserve.InferOutput("output", list(values.shape), "FP32")
        output.set_data_from_numpy(values, binary_data=payload.use_binary_outputs)
        return kserve.InferResponse(payload.id or self.name, self.name, [output])


if __name__ == "__main__":
    server = kserve.ModelServer(
        http_port=port(), workers=1, enable_grpc=False, enable_latency_logging=False
    )
    server.start([Model(model) for model in MODELS])

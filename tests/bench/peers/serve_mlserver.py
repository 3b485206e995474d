"""MLServer: a runtime of ours for its models, adaptive batches."""

import asyncio

import numpy as np
from mlserver import MLModel, types
from mlserver.codecs import NumpyCodec
from mlserver.server import MLServer
from mlserver.settings import ModelSettings, Settings

from tests.bench.peers.sessions import HOST, MAX_BATCH, MODELS, open_session, port, spare_port


class Onnx(MLModel):
    """Runs one model."""

    async def load(self) -> bool:
        """Open the model."""
        self._session = open_session(self.name)
        return True

    async def predict(self, payload: types.InferenceRequest) -> types.InferenceResponse:
        """Run what waits together."""
        array = NumpyCodec.decode_input(payload.inputs[0]).astype(np.float32)
        output = self._session.run(None, {"input": array})[0]
        encoded = NumpyCodec.encode_output("output", output)
        return types.InferenceResponse(model_name=self.name, outputs=[encoded])


async def _serve() -> None:
    # Models run in the server's own process: there is no hop to a worker beside it.
    settings = Settings(
        host=HOST, http_port=port(), grpc_port=spare_port(), metrics_endpoint=None,
        parallel_workers=0, debug=False, load_models_at_startup=False,
    )  # fmt: skip
    models = [
        ModelSettings(
            name=model, implementation=Onnx, max_batch_size=MAX_BATCH, max_batch_time=0.001
        )
        for model in MODELS
    ]
    await MLServer(settings).start(models)


if __name__ == "__main__":
    asyncio.run(_serve())

"""Ray Serve: one replica for each model, batches; its own body format."""

import asyncio
from typing import Any

import numpy as np
import ray
from ray import serve
from starlette.requests import Request

from tests.bench.peers.sessions import HOST, MAX_BATCH, MODELS, open_session, port


@serve.deployment(num_replicas=1, max_ongoing_requests=256, ray_actor_options={"num_cpus": 0})
class Model:
    """Runs one model."""

    def __init__(self, model: str) -> None:
        self._session = open_session(model)

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=0.001)
    async def run(self, rows: list[Any]) -> list[Any]:
        """Run what waits together."""
        return list(self._session.run(None, {"input": np.stack(rows)})[0])

    async def __call__(self, request: Request) -> dict[str, Any]:
        """Answer one request."""
        body = await request.json()
        row = await self.run(np.array(body["inputs"][0], np.float32))
        return {"outputs": [row.tolist()]}


async def _serve() -> None:
    await asyncio.Event().wait()


if __name__ == "__main__":
    ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    serve.start(http_options={"host": HOST, "port": port()}, logging_config={"log_level": "ERROR"})
    for each in MODELS:
        application: Any = Model
        serve.run(application.bind(each), name=each, route_prefix=f"/{each}")
    asyncio.run(_serve())

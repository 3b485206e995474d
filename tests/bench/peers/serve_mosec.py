"""mosec: a door in Rust, a Python process for each model, batches; its own body format.

JSON through msgspec, or the raw float32 values of one row.
"""

from typing import Any

import msgspec
import numpy as np
from mosec import Runtime, Server, Worker

from tests.bench.peers.sessions import MAX_BATCH, open_session

SHAPES: dict[str, tuple[int, ...]] = {"tiny": (16,), "mlp": (784,), "conv": (3, 112, 112)}


class Model(Worker):
    """Runs one model."""

    name: str

    def __init__(self) -> None:
        super().__init__()
        self._session = open_session(self.name)
        self._shape = SHAPES[self.name]
        self._bytes = 4 * int(np.prod(self._shape))

    def deserialize(self, data: bytes) -> Any:
        """Return one row; a JSON body of the same length cannot be."""
        if len(data) == self._bytes:
            return np.frombuffer(data, np.float32).reshape(self._shape)
        return np.array(msgspec.json.decode(data)["inputs"][0], np.float32)

    def forward(self, data: list[Any]) -> list[Any]:
        """Run what waits together."""
        return list(self._session.run(None, {"input": np.stack(data)})[0])

    def serialize(self, data: Any) -> bytes:
        """Return the answer's body."""
        return msgspec.json.encode({"outputs": [data.tolist()]})


class Tiny(Model):
    """Runs tiny."""

    name = "tiny"


class Mlp(Model):
    """Runs mlp."""

    name = "mlp"


class Conv(Model):
    """Runs conv."""

    name = "conv"


if __name__ == "__main__":
    # 1 ms is the shortest wait that it has.
    kinds = {"/tiny": Tiny, "/mlp": Mlp, "/conv": Conv}
    server = Server()
    server.register_runtime(
        {
            path: [Runtime(kind, max_batch_size=MAX_BATCH, max_wait_time=1, timeout=30)]
            for path, kind in kinds.items()
        }
    )
    server.run()

"""A format of somebody else's: a text file with one number, by which everything is multiplied."""

from pathlib import Path

from bus.errors import Unprocessable
from services.candle.runtimes.base import (
    ANY_LENGTH,
    CPU,
    Signature,
    Tensors,
    TensorSpec,
    blank,
    read_source,
)


class Scale:
    """A factor, loaded; see `Runtime`."""

    format = "scale"
    provider = CPU
    metadata = {"maker": "a test"}  # noqa: RUF012 - nobody changes it
    signature = Signature(
        inputs=(TensorSpec("inputs", "FP32", (ANY_LENGTH, 2)),),
        outputs=(TensorSpec("outputs", "FP32", (ANY_LENGTH, 2)),),
    )

    def __init__(self, factor: float) -> None:
        self._factor = factor

    @classmethod
    def load(
        cls,
        source: Path | bytes,
        *,
        threads: int = 1,  # noqa: ARG003 - there is little to do
        provider: str = CPU,  # noqa: ARG003 - a format of its own would refuse others
    ) -> "Scale":
        content, name = read_source(source, 100)
        try:
            return cls(float(content))
        except ValueError:
            raise Unprocessable(f"{name} is no scale: it has no number") from None

    def warm_up(self) -> None:
        self.run(blank(self.signature) or {})

    def run(self, tensors: Tensors):
        self.signature.check(tensors)
        return {"outputs": tensors["inputs"] * tensors["inputs"].dtype.type(self._factor)}

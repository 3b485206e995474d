"""What an artefact is, found by opening it here."""

import json
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

from bus import messages as m
from bus.errors import BusError, InvalidRequest, body_of, error_from
from bus.process import give_back
from services.candle.kserve import Codec
from services.candle.runtimes import open_model
from services.candle.specs import tensors_of


def inspected(
    file: Path, name: str, checksum: str, sample: Mapping[str, Any] | None = None
) -> m.ModelReport:
    """Return what a file is; what opening it took is given back. Blocks.

    Args:
        file: Where it is.
        name: What people call it.
        checksum: Its SHA-256.
        sample: A request of the Open Inference Protocol to run.

    Raises:
        InvalidRequest: The sample is no request for this model.
    """
    report: m.ModelReport | None = None
    refused = False
    try:
        report = _opened(file, checksum, sample)
    except BusError as error:
        # Not the error itself: it holds on to its frames, and they to the half-made model.
        failure = body_of(error)
        refused = isinstance(error, InvalidRequest)
    give_back()
    if report is not None:
        return report
    if refused:
        raise error_from(failure)
    what = failure.message.replace(file.name, name)
    return m.ModelReport(
        checksum=checksum,
        sound=False,
        validated_at=m.now(),
        problems=[m.ModelProblem(where=failure.field or "", what=what)],
        size_bytes=file.stat().st_size,
    )


def _opened(file: Path, checksum: str, sample: Mapping[str, Any] | None) -> m.ModelReport:
    began = perf_counter()
    runtime = open_model(file, threads=1)
    opened = perf_counter()
    shapes: dict[str, list[int]] = {}
    ran_ms: float | None = None
    if sample is not None:
        request = Codec(runtime.signature, "sample", "1").read(json.dumps(sample).encode())
        began_run = perf_counter()
        runtime.run(request.tensors)
        ran_ms = 1e3 * (perf_counter() - began_run)
        shapes = {tensor: list(array.shape) for tensor, array in request.tensors.items()}
    inputs, outputs = tensors_of(runtime.signature)
    return m.ModelReport(
        checksum=checksum,
        sound=True,
        validated_at=m.now(),
        format=runtime.format,
        size_bytes=file.stat().st_size,
        inputs=inputs,
        outputs=outputs,
        batched=runtime.signature.batched,
        load_ms=1e3 * (opened - began),
        run_ms=ran_ms,
        sample_shapes=shapes,
    )

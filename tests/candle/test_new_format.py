"""A new format: one class in one file, and one line that names it."""

import json
from pathlib import Path

import pytest

from bus import messages as m
from bus.errors import Unprocessable
from bus.subjects import CANDLE_STATS, MODEL_INFER, MODEL_LOAD
from services.candle import runtimes
from tests.data import scale_format
from tests.data.scale_format import Scale

LINE = 'runtimes.FORMATS[".scale"] = Scale'


@pytest.fixture
def scale(monkeypatch, tmp_path):
    """Add the format here, and in the process that looks into files."""
    monkeypatch.setitem(runtimes.FORMATS, ".scale", Scale)
    (tmp_path / "sitecustomize.py").write_text(
        f"from services.candle import runtimes\nfrom scale_format import Scale\n{LINE}\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(scale_format.__file__).parent}")


async def load(client, path: str) -> m.LoadedModel:
    return await client.call(MODEL_LOAD, m.LoadModel(id="m", path=path), timeout_s=60)


async def test_a_format_that_was_added_is_validated_loaded_and_served(
    client, worker, models_dir, scale
):
    (models_dir / "three.scale").write_text("3")
    async with worker():
        loaded = await load(client, "three.scale")
        assert (loaded.format, loaded.metadata, loaded.input_dim) == ("scale", Scale.metadata, 2)
        report = (await client.store.reports.get(loaded.checksum)).value
        assert (report.sound, report.format, report.batched) == (True, "scale", True)
        assert report.sample_shapes == {"inputs": [1, 2]}
        tensor = {"name": "inputs", "datatype": "FP32", "shape": [2, 2], "data": [1, 2, 3, 4]}
        subject = MODEL_INFER.subject(client.root, "m")
        reply = await client.relay(subject, json.dumps({"inputs": [tensor]}).encode())
        assert json.loads(reply.body)["outputs"][0]["data"] == [3, 6, 9, 12]
        (told,) = (await client.call(CANDLE_STATS, m.Empty())).models
        assert (told.id, told.format, told.requests) == ("m", "scale", 1)


async def test_what_it_cannot_open_is_refused_in_its_own_words(client, worker, models_dir, scale):
    (models_dir / "text.scale").write_text("three")
    async with worker():
        with pytest.raises(Unprocessable, match="text.scale is no scale: it has no number"):
            await load(client, "text.scale")
        assert await client.store.models.all() == []

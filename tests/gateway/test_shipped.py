"""`GET /api/models/shipped`: what comes with the plugins, and under which licence."""

from pathlib import Path
from typing import Any

from bus import codec
from bus.client import Client
from bus.instance import join
from bus.messages import ShippedModel
from bus.settings import Settings
from bus.testing import until
from services.candle.models.shipped import shipped as samples
from services.rustyface.photos import weights

WEIGHTS = ShippedModel(
    name="net.onnx",
    version="2",
    checksum="ab" * 32,
    size_bytes=12,
    licence="MIT",
    source="somewhere",
    used_for="trying",
)


async def test_shipped_weights_are_listed_with_their_licences_once(
    client: Client, settings: Settings, gate: Any
):
    ships = [codec.plain(WEIGHTS), {"name": "told in another form"}]
    async with (
        join(client, settings, plugin="echo", description="A test.", meta={"ships": ships}),
        join(client, settings, plugin="other", description="A test.", meta={"ships": "none"}),
    ):

        async def listed() -> bool:
            there = (await gate.json("/api/models/shipped"))["models"]
            return there == [codec.plain(WEIGHTS) | {"plugin": "echo"}]

        await until(listed)


async def test_whoever_may_read_nothing_learns_nothing(gate: Any):
    async with gate.anonymous.get("/api/models/shipped") as response:
        assert response.status == 401


def test_every_weight_file_that_is_shipped_has_a_licence():
    told = {one.name: one for one in [*samples(), *weights.shipped()]}
    services = Path(__file__).parents[2] / "services"
    kinds = {".onnx", ".tflite", ".pt", ".npz", ".bin", ".safetensors", ".dat"}
    files = [path for path in services.rglob("*") if path.suffix in kinds]
    files += services.joinpath("candle", "models").glob("*.json")
    files += weights.find(weights.YUNET).parent.glob("*.onnx")
    assert len(files) >= 4
    for path in files:
        assert told[path.name].licence in {"Apache-2.0", "MIT"}, path
        assert told[path.name].size_bytes == path.stat().st_size
    assert set(told) == {path.name for path in files}
    for net in (weights.YUNET, weights.SFACE):
        assert told[weights.find(net).name].checksum == net.files[weights.find(net).name]

"""Models on the whole platform, when an instance that serves them is killed."""

import subprocess
import sys

import pytest

from bus.client import connect
from bus.errors import DeadlineExceeded, NobodyListens
from bus.testing import until
from tests.journeys.conftest import REPOSITORY, without_bkg

FLOWER = {
    "inputs": [
        {"name": "flower", "datatype": "FP32", "shape": [1, 4], "data": [6.7, 3.0, 5.2, 2.3]}
    ]
}


@pytest.mark.timeout(180)
async def test_a_killed_instance_loses_no_request_sent_after(platform):
    command = [sys.executable, "-m", "services.cli", "worker", "candle"]
    home = platform.data_dir.parent / "elsewhere"
    async with platform.session() as session, connect(platform.nats_url, name="test") as client:

        async def infer() -> str:
            async with session.post("/v2/models/iris/infer", json=FLOWER) as answer:
                assert answer.status == 200, await answer.text()
                return answer.headers["Bkg-Instance"]

        async def entry(slot: int):
            return await client.store.served.get("candle", slot)

        async def serves(slot: int) -> bool:
            found = await entry(slot)
            return found is not None and any(one.state == "ready" for one in found.value.models)

        async def gone() -> bool:
            """Whether the broker has seen that connection end."""
            try:
                subject = f"{client.root}.inst.candle.100.call.candle.stats"
                await client.relay(subject, b"{}", timeout_s=0.5)
            except NobodyListens:
                return True
            except DeadlineExceeded:
                return False
            return False

        async with session.post("/v2/repository/models/iris/load", json={}) as answer:
            assert answer.status == 200, await answer.text()
        worker = subprocess.Popen(
            [*command, "--nats", platform.nats_url],
            cwd=REPOSITORY, env=without_bkg(BKG_DATA_DIR=str(home)),
        )  # fmt: skip
        try:
            # It comes later, on what counts as another host, and serves the same.
            await until(lambda: serves(100), 60)
            async with session.get("/v2/models/iris/versions/1/stats") as answer:
                assert (await answer.json())["model_stats"][0]["instances"] == 2
            for _ in range(20):
                await infer()
        finally:
            worker.kill()
            worker.wait()
        await until(gone, 30)
        first = (await entry(0)).value.instance
        assert {await infer() for _ in range(50)} == {first}

"""candle takes its limits live."""

import asyncio

import pytest

from bus import messages as m
from bus.errors import Overloaded
from bus.subjects import MODEL_LOAD, MODEL_RUN
from bus.testing import until


def limits_of(candle, model: str):
    return candle._models[model].versions[0]._loaded.batcher._limits


async def test_limits_of_loaded_models_change_without_a_restart(client, worker, linear, set_to):
    await set_to()
    async with worker() as candle:
        assert candle._instance._registration.live_settings == [
            "cache_max_mb",
            "max_batch_rows",
            "max_delay_ms",
            "max_waiting_rows",
            "memory_budget_mb",
            "telemetry_interval",
            "threads",
            "validation_cpu_s",
            "validation_memory_mb",
            "validation_wall_s",
        ]
        await client.call(MODEL_LOAD, m.LoadModel(id="m", path=linear()))
        await set_to(max_batch_rows=1, max_waiting_rows=1)
        await until(lambda: candle._settings.max_waiting_rows == 1)
        limits = limits_of(candle, "m")
        assert (limits.max_rows, limits.max_waiting_rows) == (1, 1)
        asked = (client.call(MODEL_RUN, m.RunModel(id="m", inputs=[[1, 2]])) for _ in range(50))
        done = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(one, m.ModelOutput | Overloaded) for one in done)
        # A model that is loaded later has them too.
        await client.call(MODEL_LOAD, m.LoadModel(id="n", path=linear("n.json")))
        assert limits_of(candle, "n").max_waiting_rows == 1
        # What a model's own configuration says comes before the plugin's settings.
        own = m.LoadModel(id="n", config=m.ModelConfig(max_batch_rows=5, max_delay_ms=2))
        await client.call(MODEL_LOAD, own)
        limits = limits_of(candle, "n")
        assert (limits.max_rows, limits.max_delay_s) == (5, 0.002)


@pytest.mark.parametrize("rows", [1, 7])
async def test_the_limits_of_the_settings_are_those_of_a_model(client, worker, linear, rows):
    async with worker(max_batch_rows=rows) as candle:
        await client.call(MODEL_LOAD, m.LoadModel(id="m", path=linear()))
        assert limits_of(candle, "m").max_rows == rows

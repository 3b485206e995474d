"""Questions to candle as callers put them, and a model that is held up while they wait."""

import asyncio
import json
import threading
from contextlib import asynccontextmanager

from bus import messages as m
from bus.errors import NobodyListens
from bus.subjects import MODEL_INFER, MODEL_LOAD, MODEL_UNLOAD
from bus.testing import until

ONES = {"inputs": [{"name": "inputs", "datatype": "FP32", "shape": [1, 2], "data": [1, 1]}]}


async def load(client, path=None, version=None, name="m", **config) -> m.LoadedModel:
    wanted = m.ModelConfig(**config) if config else None
    ask = m.LoadModel(id=name, path=path, version=version, config=wanted)
    return await client.call(MODEL_LOAD, ask, timeout_s=30)


async def unload(client, version=None, name="m") -> None:
    await client.call(MODEL_UNLOAD, m.UnloadModel(id=name, version=version), timeout_s=30)


async def infer(client, *name: str, model: str = "m", timeout_s: float = 10) -> float:
    """Return what one and one are for a model."""
    subject = MODEL_INFER.subject(client.root, model, *name)
    reply = await client.relay(subject, json.dumps(ONES).encode(), timeout_s=timeout_s)
    return json.loads(reply.body)["outputs"][0]["data"][0]


async def answers(client, *name: str, model: str = "m") -> bool:
    try:
        await infer(client, *name, model=model)
    except NobodyListens:
        return False
    return True


async def state(client, name: str = "m", slot: int = 0) -> str | None:
    entry = await client.store.served.get("candle", slot)
    found = [one.state for one in entry.value.models if one.id == name] if entry else []
    return found[0] if found else None


async def state_is(client, wanted: str | None, name: str = "m") -> bool:
    return await state(client, name) == wanted


def version_of(candle, model: str = "m"):
    return candle._models[model].versions[0]


class Held:
    """A model whose runs wait, and who asks it."""

    def __init__(self, client, candle) -> None:
        self.client = client
        self.batcher = version_of(candle)._loaded.batcher
        self.run = self.batcher._run
        self.gate = threading.Event()
        self.ran: list[int] = []
        self.asked: list[asyncio.Task[float]] = []

    def wait_and_run(self, tensors):
        self.ran.append(sum(len(one) for one in tensors.values()))
        self.gate.wait(60)
        return self.run(tensors)

    def ask(self) -> asyncio.Task[float]:
        self.asked.append(asyncio.create_task(infer(self.client, timeout_s=60)))
        return self.asked[-1]


@asynccontextmanager
async def held(client, candle):
    """Hold every run of the model `m` while inside, with one request in it."""
    one = Held(client, candle)
    one.batcher._run = one.wait_and_run
    try:
        one.ask()
        await until(lambda: one.ran)
        yield one
    finally:
        one.gate.set()
        await asyncio.gather(*one.asked, return_exceptions=True)
        one.batcher._run = one.run

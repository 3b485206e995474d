"""How much one message holds: what the broker says, and every side knows it."""

import asyncio
import gzip
import io
import os
import signal
from contextlib import AsyncExitStack

import pytest_asyncio
from aiohttp import ClientSession

from bus import broker
from bus.broker import running_broker
from bus.client import Answer, connect
from bus.instance import join
from bus.subjects import MODEL_INFER
from bus.testing import until
from services.gateway.app import Options, gateway
from services.gateway.pages import Pages

BROKER_TAKES = 2 * 1024**2
INFER = "/v2/models/m/infer"


@pytest_asyncio.fixture
async def small(tmp_path, settings, pages, monkeypatch):
    """A gateway on a broker of another size; gives what reached the model, and the broker, too."""
    configuration = broker._configuration
    monkeypatch.setattr(
        broker,
        "_configuration",
        lambda *given: configuration(*given).replace("max_payload: 8MB", "max_payload: 2MB"),
    )
    reached = []

    async def echo(call):
        reached.append(len(call.body))
        return Answer(call.body, {"Content-Type": "application/octet-stream"})

    async with AsyncExitStack() as running:
        enter = running.enter_async_context
        own = await enter(running_broker(tmp_path, sync_interval="2m"))
        client = await enter(connect(own.url, name="test", root=settings.root))
        await client.store.declare()
        candle = await enter(join(client, settings, plugin="candle", description="a test"))
        await enter(candle.serving_raw(MODEL_INFER, echo, "m"))
        here = await enter(
            join(client, settings, plugin="gateway", description="a test", listed=False)
        )
        parts = await enter(
            gateway(client, here, Options(port=0, no_auth=True), "key", Pages(pages))
        )
        http = await enter(ClientSession(f"http://127.0.0.1:{parts.port}"))
        yield client, http, reached, own.pid


async def test_what_no_message_of_this_broker_holds_goes_by_reference(small):
    client, http, reached, _ = small
    limit = client.max_payload
    assert BROKER_TAKES - 65_536 < limit < BROKER_TAKES
    put, delete = [], client.bodies.delete

    async def counted(name):
        put.append(name)
        await delete(name)

    client.bodies.delete = counted
    for size in (limit, limit + 1):
        async with http.post(INFER, data=io.BytesIO(bytes(size))) as response:
            if size > limit:
                # An answer goes one way only.
                problem = await response.json(content_type=None)
                assert f"{limit:,}" in problem["error"]
            else:
                assert response.status == 200, await response.text()
                assert len(await response.read()) == limit
                assert not put
    await until(lambda: len(put) == 1)
    assert reached == [limit, limit + 1]
    # Compressed it is small on its way in.
    headers = {"Content-Encoding": "gzip"}
    async with http.post(INFER, data=gzip.compress(bytes(limit + 1)), headers=headers) as response:
        assert f"{limit:,}" in await response.text()
    await until(lambda: len(put) == 2)
    assert reached == [limit, limit + 1, limit + 1]


async def test_a_caller_hears_in_time_that_a_broker_stands_still_while_its_body_comes(small):
    client, http, reached, broker = small

    async def blocks():
        yield bytes(3_000_000)
        await until(lambda: client.bodies._ours)
        os.kill(broker, signal.SIGSTOP)
        for _ in range(100):
            yield bytes(500_000)

    began = asyncio.get_running_loop().time()
    try:
        async with http.post(f"{INFER}?timeout=1", data=blocks()) as response:
            told = await response.json(content_type=None)
            assert response.status == 504, told
            assert "was not stored within 1 s" in told["detail"]
        assert asyncio.get_running_loop().time() - began < 10
    finally:
        os.kill(broker, signal.SIGCONT)
    await until(lambda: not client.bodies._ours)
    assert not reached

"""How large a body may be: as large as the broker says, and every side knows it."""

import io
from contextlib import AsyncExitStack

import pytest
import pytest_asyncio
from aiohttp import ClientSession

from bus import broker
from bus.broker import running_broker
from bus.client import Answer, connect
from bus.errors import TooLarge
from bus.instance import join
from bus.subjects import MODEL_INFER
from services.gateway.app import Options, gateway
from services.gateway.pages import Pages

BROKER_TAKES = 2 * 1024**2
INFER = "/v2/models/m/infer"


@pytest_asyncio.fixture
async def small(tmp_path, settings, pages, monkeypatch):
    """A gateway on a broker of another size; gives it, and what reached the model behind it."""
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
        yield client, http, reached


async def test_the_largest_body_is_what_the_broker_takes_and_the_refusal_names_it(small):
    client, http, reached = small
    limit = client.max_payload
    assert BROKER_TAKES - 65_536 < limit < BROKER_TAKES
    async with http.post(INFER, data=io.BytesIO(bytes(limit))) as response:
        assert response.status == 200, await response.text()
        assert len(await response.read()) == limit
    assert reached == [limit]
    # A larger one does not even reach the broker, whichever way it comes.
    for headers in ({}, {"X-Timeout-Seconds": "9"}):
        body = io.BytesIO(bytes(limit + 1))
        async with http.post(INFER, data=body, headers=headers) as response:
            problem = await response.json(content_type=None)
        assert response.status == 413
        assert f"{limit:,}" in problem["error"]
    subject = MODEL_INFER.subject(client.root, "m")
    with pytest.raises(TooLarge, match=f"the broker takes {limit:,} at most"):
        await client.relay(subject, bytes(limit + 1))
    assert reached == [limit]

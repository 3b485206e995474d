"""A worker that is asked with large bodies."""

import pytest

from bus.instance import join
from bus.subjects import MODEL_INFER
from tests.bus.large_bodies import Worker


@pytest.fixture
async def worker(connected, settings):
    one = Worker()
    async with (
        join(await connected(), settings, plugin="candle", description="a test") as one.instance,
        one.instance.serving_raw(MODEL_INFER, one.answer, "m"),
    ):
        yield one


@pytest.fixture
def subject(client):
    return MODEL_INFER.subject(client.root, "m")

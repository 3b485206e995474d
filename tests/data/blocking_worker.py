"""A worker whose event loop stands still when asked: what a plugin does that computes in it."""

import asyncio
import sys
import time

from bus import messages as m
from bus.client import connect
from bus.instance import join
from bus.process import run
from bus.settings import Settings
from bus.subjects import Endpoint

BLOCK = Endpoint("stubborn.block", "stubborn", m.Empty, m.Empty, "Stand still for an hour.")


async def block(_request: m.Empty) -> m.Empty:
    time.sleep(3600)  # noqa: ASYNC251 - that is what this worker is for
    return m.Empty()


async def main() -> None:
    settings = Settings.from_env()
    async with connect(settings.nats_url, name="stubborn", root=settings.root) as client:
        joining = join(
            client,
            settings,
            plugin="stubborn",
            description="Stands still when asked",
            capabilities=["stubborn.block"],
        )
        async with joining as instance, instance.serving(BLOCK, block):
            await instance.ready()
            await asyncio.Event().wait()


sys.exit(run(main))

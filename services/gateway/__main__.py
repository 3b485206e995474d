"""The gateway's process."""

import sys

from bus.client import connect
from bus.instance import join
from bus.process import run
from bus.settings import Settings
from services.gateway.app import Options, serve
from services.gateway.auth import admin_key


async def main() -> None:
    """Serve HTTP until told to stop."""
    settings, options = Settings.from_env(), Options.from_env()
    key = admin_key(settings.data_dir)
    async with (
        connect(settings.nats_url, name="gateway", root=settings.root) as client,
        join(
            client,
            settings,
            plugin="gateway",
            description="HTTP and WebSocket in front of the bus, and the dashboard.",
            listed=False,
        ) as instance,
    ):
        await serve(client, instance, options, key)


if __name__ == "__main__":
    sys.exit(run(main))

"""Starts a supervisor: settings from the environment, things made and handed to each other."""

import sys

from bus.client import connect
from bus.instance import join
from bus.process import run
from bus.settings import Settings
from services.supervisor import catalogue
from services.supervisor.service import Supervisor


async def main() -> None:
    """Supervise until cancelled."""
    settings = Settings.from_env()
    configs = catalogue.load(catalogue.path_from_env())
    async with connect(settings.nats_url, name="supervisor", root=settings.root) as client:
        await client.store.declare()
        async with join(
            client,
            settings,
            plugin="supervisor",
            description="Starts, stops and restarts the workers of this host",
            listed=False,
        ) as instance:
            await catalogue.seed(client.store, configs)
            await Supervisor(client, instance, settings).run()


if __name__ == "__main__":
    sys.exit(run(main))

"""Starts a rustyface worker: settings from the environment, things made and handed on."""

import asyncio
import sys

from bus import codec
from bus.client import connect
from bus.instance import join
from bus.process import run
from bus.settings import Settings
from services.rustyface.galleries import Galleries
from services.rustyface.service import SERVED, Rustyface, make_encoder
from services.rustyface.settings import RustyfaceSettings, settings_of
from services.rustyface.weights import shipped


async def main() -> None:
    """Serve until cancelled."""
    env = Settings.from_env()
    async with (
        connect(env.nats_url, name="rustyface", root=env.root) as client,
        join(
            client,
            env,
            plugin="rustyface",
            description="Turns faces into embeddings, keeps datasets of them and searches them",
            capabilities=[e.capability for e in SERVED],
            config_schema=codec.schema(RustyfaceSettings),
            meta={"ships": codec.plain(shipped())},
        ) as instance,
    ):
        wanted = settings_of(instance)
        encoder = await asyncio.to_thread(make_encoder, wanted, env.data_dir, env.cache_dir)
        galleries = Galleries(client.store.galleries, client.root, encoder.name, encoder.dimensions)
        datasets = env.data_dir / wanted.datasets_path if wanted.datasets_path else None
        await Rustyface(instance, galleries, encoder, wanted, datasets).run()


if __name__ == "__main__":
    sys.exit(run(main))

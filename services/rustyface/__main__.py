"""Starts a rustyface worker: settings from the environment, things made and handed on."""

import sys

from bus import codec
from bus.client import connect
from bus.instance import join
from bus.process import run
from bus.settings import Settings
from services.rustyface.assembly import assemble
from services.rustyface.photos.encoder import open_encoder
from services.rustyface.photos.weights import shipped
from services.rustyface.service import SERVED
from services.rustyface.settings import RustyfaceSettings, settings_of


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
        encoder = await open_encoder(wanted, client.store, env.data_dir, env.cache_dir)
        datasets = env.data_dir / wanted.datasets_path if wanted.datasets_path else None
        await assemble(client, instance, encoder, wanted, datasets, env.cache_dir).run()


if __name__ == "__main__":
    sys.exit(run(main))

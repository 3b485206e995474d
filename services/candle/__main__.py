"""Starts a candle worker: settings from the environment, things made and handed to each other."""

from bus import codec
from bus.client import connect
from bus.instance import join
from bus.process import run
from bus.settings import Settings
from services.candle.intake import taking_in
from services.candle.models.shipped import shipped
from services.candle.repository.cache import Cache
from services.candle.repository.repository import Repository
from services.candle.service import SERVED, Candle
from services.candle.settings import MIB, CandleSettings


async def main() -> None:
    """Serve until cancelled."""
    settings = Settings.from_env()
    async with (
        connect(settings.nats_url, name="candle", root=settings.root) as client,
        join(
            client,
            settings,
            plugin="candle",
            description="Runs models: linear ones from JSON, and ONNX",
            capabilities=[endpoint.capability for endpoint in SERVED],
            config_schema=codec.schema(CandleSettings),
            meta={"ships": codec.plain(shipped())},
        ) as instance,
    ):
        wanted = instance.settings(CandleSettings)
        models_dir = settings.data_dir / wanted.models_path
        cache = Cache(settings.cache_dir / "artefacts", wanted.cache_max_mb * MIB)
        repository = Repository(client.store, models_dir, cache)
        async with taking_in(client, instance, repository, settings.cache_dir, models_dir):
            await Candle(instance, repository, wanted, client.store.served).run()


if __name__ == "__main__":
    raise SystemExit(run(main))

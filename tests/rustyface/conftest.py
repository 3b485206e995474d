"""Photos, a pipeline with the real nets, and workers with them."""

import asyncio
import base64
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path

import msgspec
import pytest

from bus.client import connect
from bus.instance import join
from bus.testing import until
from services.rustyface import samples
from services.rustyface.assembly import assemble
from services.rustyface.galleries.galleries import Galleries
from services.rustyface.photos import images
from services.rustyface.photos import pipeline as pipelines
from services.rustyface.photos.encoder import FaceEncoder
from services.rustyface.photos.images import Image
from services.rustyface.photos.pipeline import Pipeline
from services.rustyface.settings import RustyfaceSettings
from tests.rustyface.persons import NORTH, new
from tests.rustyface.transfers import hurry, starting

Photo = Callable[[str], Image]


@pytest.fixture(scope="session")
def samples_dir() -> Path:
    """Where the sample photos lie."""
    return Path(next(iter(samples.__path__)))


@pytest.fixture(scope="session")
def photo(samples_dir: Path) -> Photo:
    """Gives a sample photo's pixels by name, such as ``astronaut``."""
    return lambda name: images.decode((samples_dir / f"{name}.jpg").read_bytes())


@pytest.fixture(scope="session")
def weights_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the repaired nets of this run are kept."""
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="session")
def pipeline(weights_cache: Path) -> Pipeline:
    """YuNet and SFace, loaded once for all tests."""
    return pipelines.load(weights_cache)


@pytest.fixture
def worker(settings, pipeline):
    """Start a worker; the nets are loaded once for all."""

    @asynccontextmanager
    async def start(slot=0, encoder=None, nats_url=settings.nats_url, **changes):
        here = msgspec.structs.replace(settings, slot=slot)
        async with (
            connect(nats_url, name="rustyface", root=here.root) as client,
            join(client, here, plugin="rustyface", description="a test") as instance,
        ):
            faces = assemble(
                client,
                instance,
                encoder or FaceEncoder(pipeline),
                RustyfaceSettings(**changes),
                datasets_dir=here.data_dir / "datasets",
                cache_dir=here.cache_dir,
            )
            serving = asyncio.create_task(faces.run())
            await until(lambda: instance._registration.status == "running" or serving.done())
            try:
                yield faces.galleries
            finally:
                serving.cancel()
                results = await asyncio.gather(serving, return_exceptions=True)
                assert isinstance(results[0], asyncio.CancelledError), results

    return start


@pytest.fixture
def picture(samples_dir):
    """Gives a sample photo's file in base64, by name."""

    def read(name: str) -> str:
        return base64.b64encode((samples_dir / f"{name}.jpg").read_bytes()).decode()

    return read


@pytest.fixture
def replica(client) -> Callable[..., AbstractAsyncContextManager[Galleries]]:
    """Gives galleries that are read from the beginning; what ends them comes out of it."""

    @asynccontextmanager
    async def start(other=None, embedder="test", dimensions=2, **more):
        store, root = (other or client).store, client.root
        galleries = Galleries(
            store.galleries, root, embedder, dimensions, changes=store.changes, **more
        )
        async with asyncio.timeout(60):
            reading = asyncio.create_task(galleries.run())
            try:
                await until(lambda: galleries.caught_up.is_set() or reading.done())
                yield galleries
            finally:
                reading.cancel()
                with suppress(asyncio.CancelledError):
                    await reading

    return start


@pytest.fixture
async def people(replica):
    """A gallery with three entries of ann and one of bob."""
    async with replica() as galleries:
        await galleries.create("g")
        entries = [new(f"a{i}", subject="ann") for i in range(3)]
        entries.append(new("b", NORTH, subject="bob"))
        await galleries.enrol_many("g", entries, existing="fail")
        yield galleries


@pytest.fixture
def carrier(client, settings, tmp_path):
    """Start what does jobs of datasets in a rustyface."""
    return starting(settings, tmp_path)


@pytest.fixture
def hurried(monkeypatch):
    """Leases are short, and news are told often."""
    hurry(monkeypatch)

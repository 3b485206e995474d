"""A gateway on loopback before a real broker, and clients with and without the key."""

import asyncio
import io
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from aiohttp import ClientSession, ClientWebSocketResponse, CookieJar

from bus import messages as m
from bus.client import Client, connect
from bus.errors import BusError, Conflict, NotFound
from bus.instance import Instance, join
from bus.messages import DesiredState, Message, PluginConfig, now
from bus.models import next_version
from bus.settings import Settings
from bus.subjects import CAPABILITIES, MODEL_ADD, MODEL_LOAD, Endpoint
from bus.tasks import beside
from bus.testing import until
from services.candle.repository.cache import Cache
from services.candle.repository.repository import Repository
from services.candle.service import Candle
from services.candle.settings import CandleSettings
from services.gateway.app import Options, gateway
from services.gateway.pages import Pages
from services.gateway.parts import Parts
from services.rustyface import samples
from services.rustyface.assembly import assemble
from services.rustyface.galleries.galleries import Galleries
from services.rustyface.photos import pipeline as pipelines
from services.rustyface.photos.encoder import Encoder, FaceEncoder
from services.rustyface.settings import RustyfaceSettings
from tests.gateway.dataset_asking import PEOPLE, ask

KEY = "the-right-key"
LINEAR = {"input_dim": 2, "output_dim": 1, "weights": [1, 1], "bias": [0]}
PAGE = b'<!doctype html><script type="module" src="/ui/{hash}/main.js"></script>'


class Said(Message, frozen=True):
    text: str = ""


ECHO = Endpoint("echo.say", "echo", Said, Said, "Say it again.")


@dataclass
class Running:
    """A gateway under test."""

    parts: Parts
    url: str
    http: ClientSession
    anonymous: ClientSession

    async def json(self, path: str, status: int = 200, **query: Any) -> Any:
        async with self.http.get(path, params=query) as response:
            assert response.status == status, await response.text()
            return await response.json(content_type=None)

    async def post(self, path: str, body: Any = None, status: int = 200, **more: Any) -> Any:
        raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
        async with self.http.post(path, data=io.BytesIO(raw), **more) as response:
            assert response.status == status, await response.text()
            return await response.json(content_type=None)

    async def socket(self, **more: Any) -> ClientWebSocketResponse:
        return await self.http.ws_connect("/ws/plugins", **more)


Start = Callable[..., Awaitable[Running]]


@pytest.fixture
def pages(tmp_path):
    folder = tmp_path / "dashboard"
    (folder / "parts").mkdir(parents=True)
    (folder / "index.html").write_bytes(PAGE)
    (folder / "main.js").write_text("export const answer = 42;\n" * 50)
    (folder / "parts" / "list.js").write_text("export {};\n")
    (folder / "base.css").write_text("body { margin: 0 }\n")
    (folder / "icons.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>\n")
    (folder / "vendor.toml").write_text("secret = true\n")
    (folder / "types.d.ts").write_text("export {};\n")
    return folder


@pytest_asyncio.fixture
async def start(client: Client, settings: Settings, pages) -> AsyncGenerator[Start]:
    """Start gateways; they end after the test."""
    async with AsyncExitStack() as running:
        instance = await running.enter_async_context(
            join(client, settings, plugin="gateway", description="Under test.", listed=False)
        )

        async def one(budget_bytes: int | None = None, **options: Any) -> Running:
            listens = replace(Options(port=0), **options)
            parts = await running.enter_async_context(
                gateway(client, instance, listens, KEY, Pages(pages))
            )
            if budget_bytes is not None:
                parts.listener_budget_bytes = budget_bytes
            url = f"http://127.0.0.1:{parts.port}"
            http = await running.enter_async_context(
                ClientSession(url, headers={"Authorization": f"Bearer {KEY}"})
            )
            jar = CookieJar(unsafe=True)
            anonymous = await running.enter_async_context(ClientSession(url, cookie_jar=jar))
            return Running(parts, url, http, anonymous)

        yield one


@pytest_asyncio.fixture
async def gate(start: Start) -> Running:
    """One gateway with the usual options."""
    return await start()


@pytest_asyncio.fixture
async def worker(client: Client, settings: Settings) -> AsyncGenerator[Instance]:
    """An instance of the plugin `echo`, which says again what it is told."""

    async def say(request: Said) -> Said:
        return request

    async with (
        join(
            client,
            settings,
            plugin="echo",
            description="Says it again.",
            capabilities=["echo.say"],
            config_schema={"type": "object"},
            telemetry_s=0.1,
        ) as instance,
        instance.serving(ECHO, say),
    ):
        await instance.ready()
        yield instance


def config(name: str = "echo", **more: Any) -> PluginConfig:
    given = {
        "name": name,
        "description": "Says it again.",
        "entrypoint": "tests.echo",
        "capabilities": [f"{name}.say"],
        **more,
    }
    return msgspec.convert(given, PluginConfig)


async def want(client: Client, name: str = "echo", *, enabled: bool = False, **more: Any) -> None:
    """Write a plugin's desired state, as a supervisor would."""
    wanted = DesiredState(
        config=config(name, **more),
        enabled=enabled,
        generation=1,
        changed_by="test",
        changed_at=now(),
    )
    await client.store.desired.put(wanted, name)


@pytest.fixture
def wanted(client: Client):
    async def one(name: str = "echo", **more: Any) -> None:
        await want(client, name, **more)

    return one


class Keeper:
    """Stands in for candle where models come in: it can be steered, and looks into no file.

    Attributes:
        asked: What it was asked to add.
        problem: What is wrong with everything.
        error: What it raises instead of adding.
    """

    def __init__(self, client: Client) -> None:
        self.asked: list[m.AddModel] = []
        self.loaded: list[m.LoadModel] = []
        self.problem: str | None = None
        self.error: BusError | None = None
        self._store = client.store

    async def add(self, request: m.AddModel) -> m.AddedModel:
        self.asked.append(request)
        if self.error is not None:
            raise self.error
        size = await self._store.artefacts.size(request.checksum)
        if size is None:
            raise NotFound(f"the artefact {request.checksum} is not stored")
        problems = [m.ModelProblem(where="", what=self.problem)] if self.problem else []
        report = m.ModelReport(
            checksum=request.checksum,
            sound=not problems,
            validated_at=now(),
            problems=problems,
            size_bytes=size,
        )
        await self._store.reports.put(report, request.checksum)
        entry = await self._store.models.last(request.id)
        spec = (entry and entry.value) or m.ModelSpec(id=request.id, versions=[])
        name = request.version or next_version(spec)
        present = next((one for one in spec.versions if one.version == name), None)
        if present is None:
            spec = msgspec.structs.replace(
                spec,
                versions=[*spec.versions, _version(name, request, size, sound=report.sound)],
                description=request.description or spec.description,
                labels=spec.labels if request.labels is None else request.labels,
                licence=request.licence or spec.licence,
            )
            await self._store.models.update(spec, entry.revision if entry else 0, spec.id)
        elif present.checksum != request.checksum:
            raise Conflict(f"version {name!r} has other bytes; the next free number is 2")
        created = present is None
        return m.AddedModel(
            id=spec.id, version=name, checksum=request.checksum, created=created, report=report
        )

    async def load(self, request: m.LoadModel) -> m.LoadedModel:
        self.loaded.append(request)
        return m.LoadedModel(
            id=request.id,
            input_dim=1,
            output_dim=1,
            checksum="",
            path="",
            loaded_at=now(),
            metadata={},
            format="linear",
            inputs=[],
            outputs=[],
            version=request.version or "1",
        )


def _version(name: str, request: m.AddModel, size: int, *, sound: bool) -> m.ModelVersion:
    return m.ModelVersion(
        version=name,
        path=request.file_name,
        checksum=request.checksum,
        format="onnx" if request.file_name.endswith(".onnx") else "linear",
        added_at=now(),
        wanted=False,
        size_bytes=size,
        sound=sound,
        source=request.source,
    )


@pytest_asyncio.fixture
async def keeper(client: Client, settings: Settings) -> AsyncGenerator[Keeper]:
    """An instance that takes models, and is known to the gateway as one of candle's."""
    one = Keeper(client)
    async with (
        join(client, settings, plugin="candle", description="Takes models.") as instance,
        instance.serving(MODEL_ADD, one.add),
        instance.serving(MODEL_LOAD, one.load),
    ):
        await instance.ready()
        told = m.ServedModels(
            plugin="candle", slot=0, instance=instance.id, host="test-host", models=[]
        )
        await client.store.served.put(told, "candle", 0)
        yield one


@pytest.fixture(scope="session")
def samples_dir() -> Path:
    """Where the sample photos lie."""
    return Path(next(iter(samples.__path__)))


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    """The real nets, loaded once for all tests."""
    return FaceEncoder(pipelines.load(tmp_path_factory.mktemp("weights")))


@pytest_asyncio.fixture
async def rustyface(
    connected: Callable[[], Awaitable[Client]], settings: Settings, client: Client, encoder: Encoder
) -> AsyncGenerator[Galleries]:
    """A worker that embeds, keeps and finds faces."""
    own = await connected()
    async with join(own, settings, plugin="rustyface", description="Under test.") as instance:
        worker = assemble(
            own,
            instance,
            encoder,
            RustyfaceSettings(),
            datasets_dir=None,
            cache_dir=settings.cache_dir,
        )
        async with beside(worker.run()):
            await until(lambda: instance._registration.status == "running")
            yield worker.galleries


@pytest_asyncio.fixture
async def faces(gate: Running, rustyface: Galleries) -> Running:
    """A gateway with a worker for faces behind it."""
    return gate


@pytest_asyncio.fixture
async def people(faces: Running) -> Running:
    """A gateway with a dataset without entries."""
    await ask(faces, "PUT", PEOPLE, status=201)
    return faces


@pytest.fixture
def photo(samples_dir: Path) -> Callable[[str], bytes]:
    """Gives a sample photo's bytes by name."""
    return lambda name: (samples_dir / f"{name}.jpg").read_bytes()


@pytest_asyncio.fixture
async def into(gate: Running, keeper: Keeper) -> Running:
    """A gateway that knows an instance of candle."""
    await until(gate.parts.models.instances)
    return gate


@pytest.fixture
def linear(tmp_path):
    """Write a linear model, and return its path below the models folder."""
    folder = tmp_path / "models"
    folder.mkdir()

    def write(name="m.json", **changes):
        (folder / name).write_text(json.dumps({**LINEAR, **changes}))
        return name

    return write


@pytest_asyncio.fixture
async def candle(client, settings, tmp_path, linear, wanted):
    """Start instances of candle."""
    await wanted("candle", capabilities=[c for c in CAPABILITIES if c.startswith("candle")])
    async with AsyncExitStack() as running:

        @asynccontextmanager
        async def one(slot=0, **changes):
            here = msgspec.structs.replace(settings, slot=slot)
            async with (
                connect(here.nats_url, name="candle", root=here.root) as own,
                join(own, here, plugin="candle", description="Under test.") as instance,
            ):
                cache = Cache(tmp_path / f"cache-{slot}", 1 << 30)
                repository = Repository(own.store, tmp_path / "models", cache)
                worker = Candle(instance, repository, CandleSettings(**changes), own.store.served)
                serving = asyncio.create_task(worker.run())
                try:
                    yield worker, serving
                finally:
                    serving.cancel()
                    await asyncio.gather(serving, return_exceptions=True)

        async def start(slot=0, *, ready=True, **changes):
            worker, serving = await running.enter_async_context(one(slot, **changes))
            here = worker._instance
            await until(
                lambda: serving.done() or not ready or here._registration.status == "running"
            )
            return worker

        yield start

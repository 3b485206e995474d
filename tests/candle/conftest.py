"""A candle worker in the test's own process, on a real broker."""

import asyncio
import contextlib
import json
import shutil
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from aiohttp import web
from yarl import URL

from bus import messages as m
from bus.client import Client, connect
from bus.instance import join
from bus.settings import Settings
from bus.testing import until
from services.candle.models import make
from services.candle.repository.cache import Cache
from services.candle.repository.repository import Repository
from services.candle.service import Candle
from services.candle.settings import CandleSettings

Worker = Callable[..., AbstractAsyncContextManager[Candle]]
SetTo = Callable[..., Awaitable[None]]


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample models, trained once for all tests."""
    folder = tmp_path_factory.mktemp("samples")
    make.make(folder)
    return folder


@pytest.fixture
def models_dir(tmp_path: Path, samples: Path) -> Path:
    """The folder that models are loaded from, with the samples in it."""
    return shutil.copytree(samples, tmp_path / "models")


@pytest.fixture
def linear(models_dir: Path) -> Callable[..., str]:
    """Write a linear model, and return its path below the models folder."""

    def write(name: str = "m.json", **changes: object) -> str:
        content = {"input_dim": 2, "output_dim": 1, "weights": [1, 1], "bias": [0], **changes}
        (models_dir / name).write_text(json.dumps(content))
        return name

    return write


@pytest.fixture
def set_to(client: Client) -> SetTo:
    """Write candle's settings, as the supervisor does when somebody changes them."""

    async def write(**changes: object) -> None:
        config = m.PluginConfig(
            name="candle", description="", entrypoint="x", capabilities=[], settings=changes
        )
        desired = m.DesiredState(
            config=config, enabled=True, generation=1, changed_by="t", changed_at=m.now()
        )
        await client.store.desired.put(desired, "candle")

    return write


@pytest.fixture
def worker(settings: Settings, models_dir: Path) -> Worker:
    """Start a worker; each has a cache of its own, as on another host."""

    @asynccontextmanager
    async def start(slot: int = 0, **changes: object) -> AsyncGenerator[Candle]:
        here = msgspec.structs.replace(settings, slot=slot)
        async with (
            connect(here.nats_url, name="candle", root=here.root) as client,
            join(client, here, plugin="candle", description="a test") as instance,
        ):
            cache = Cache(models_dir.parent / f"cache-{slot}", 1 << 30)
            repository = Repository(client.store, models_dir, cache)
            wanted = CandleSettings(**changes)
            candle = Candle(instance, repository, wanted, client.store.served)
            serving = asyncio.create_task(candle.run())
            await until(lambda: instance._registration.status == "running" or serving.done())
            try:
                yield candle
            finally:
                serving.cancel()
                await asyncio.gather(serving, return_exceptions=True)

    return start


class Source:
    """An HTTP server that has one file, and does with it what a test wants.

    Attributes:
        asked: The headers of each request for a file.
        break_after: The connection ends after so many bytes of each answer.
        stall_after: Nothing more comes after so many bytes of an answer, once.
        etag: What it calls the file.
        ranges: Whether it understands `Range`.
    """

    def __init__(self, content: bytes = b"") -> None:
        self.content = content
        self.asked: list[dict[str, str]] = []
        self.break_after: int | None = None
        self.stall_after: int | None = None
        self.etag: str | None = '"one"'
        self.modified: str | None = None
        self.ranges = True
        self.shift = 0
        self.declared: int | None = None
        self.refusals: list[tuple[int, dict[str, str]]] = []
        self.redirects: dict[str, str] = {}
        self.more: dict[str, str] = {}
        self.slow_s = 0.0
        self.name = "m.onnx"
        self.port = 0

    @property
    def url(self) -> URL:
        return URL(f"http://127.0.0.1:{self.port}/{self.name}")

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append({"path": request.path, **request.headers})
        if self.refusals:
            status, headers = self.refusals.pop(0)
            return web.Response(status=status, headers=headers)
        if to := self.redirects.get(request.path):
            return web.Response(status=302, headers={"Location": to, **self.more})
        start, status = 0, 200
        condition = request.headers.get("If-Range")
        held = condition is None or condition in (self.etag, self.modified)
        headers = {**self.more}
        if self.etag:
            headers["ETag"] = self.etag
        if self.modified:
            headers["Last-Modified"] = self.modified
        if self.ranges and held and (wanted := request.headers.get("Range")):
            start, status = int(wanted.removeprefix("bytes=").rstrip("-")), 206
            total = len(self.content)
            if start >= total:
                return web.Response(status=416, headers={"Content-Range": f"bytes */{total}"})
            first = start + self.shift
            headers["Content-Range"] = f"bytes {first}-{total - 1}/{total}"
        body = self.content[start:]
        response = web.StreamResponse(status=status, headers=headers)
        response.content_length = self.declared if self.declared is not None else len(body)
        await response.prepare(request)
        for at in range(0, len(body), 50_000):
            if self.break_after is not None and at >= self.break_after:
                request.transport.abort()
                return response
            if self.stall_after is not None and at >= self.stall_after:
                self.stall_after = None
                with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                    await asyncio.sleep(60)
                return response
            await asyncio.sleep(self.slow_s)
            try:
                await response.write(body[at : at + 50_000])
            except ConnectionError:
                return response
        return response

    @asynccontextmanager
    async def serving(self, tls: ssl.SSLContext | None = None) -> AsyncGenerator["Source"]:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.answer)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            await runner.cleanup()


@pytest.fixture
def no_proxy_from_outside(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
async def source() -> AsyncGenerator[Source]:
    """An HTTP server with one file."""
    async with Source().serving() as one:
        yield one


@pytest.fixture
def another_source() -> Callable[..., AbstractAsyncContextManager[Source]]:
    """Start a further HTTP server with one file."""
    return lambda content=b"", tls=None: Source(content).serving(tls)

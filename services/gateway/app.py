"""The gateway put together: its settings, the one route table, and the way that it listens."""

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler

from bus.client import Client
from bus.errors import InvalidRequest, Unavailable
from bus.instance import Instance
from bus.models import follow_models
from bus.plugins import follow_plugins
from bus.tasks import beside
from services.gateway import live
from services.gateway.auth import Access, Gate, is_loopback
from services.gateway.express import Express
from services.gateway.feeds import Feeds
from services.gateway.pages import Pages
from services.gateway.parts import PARTS, Parts
from services.gateway.patience import RATE, RATE_DEFAULT, RATE_SETTING, hold_back
from services.gateway.routes import (
    access,
    capabilities,
    dataset_files,
    datasets,
    faces,
    health,
    hosts,
    jobs,
    kserve,
    models,
    observe,
    page,
    plugins,
    shipped,
    uploads,
)
from services.gateway.translate import translated
from services.gateway.uploads import Uploads
from services.gateway.written import dress

STOP_PATIENCE_S: Final = 5.0
OPEN, READ, PRIVATE, ADMIN = Access.OPEN, Access.READ, Access.PRIVATE, Access.ADMIN

log = structlog.get_logger("services.gateway")

# Every address that we answer at, and who may. The order counts where a word could be a name.
ROUTES: Final[tuple[tuple[str, str, Handler, Access], ...]] = (
    ("GET", "/api/plugins", plugins.list_all, READ),
    ("GET", "/api/plugins/telemetry/summary", plugins.telemetry_summary, READ),
    ("GET", "/api/plugins/{name}", plugins.get, READ),
    ("GET", "/api/plugins/{name}/status", plugins.status, READ),
    ("GET", "/api/plugins/{name}/capabilities", plugins.capabilities, READ),
    ("GET", "/api/plugins/{name}/logs", observe.logs, READ),
    ("GET", "/api/plugins/{name}/telemetry", plugins.telemetry, READ),
    ("GET", "/api/plugins/{name}/history", plugins.history, READ),
    ("GET", "/api/plugins/{name}/telemetry/history", observe.telemetry_history, READ),
    ("POST", "/api/plugins/{name}/log-level", observe.set_log_level, ADMIN),
    ("POST", "/api/plugins/{name}/start", plugins.start, ADMIN),
    ("POST", "/api/plugins/{name}/stop", plugins.stop, ADMIN),
    ("POST", "/api/plugins/{name}/restart", plugins.restart, ADMIN),
    ("POST", "/api/plugins/{name}/config", plugins.configure, ADMIN),
    ("POST", "/api/plugins/{name}/scale", plugins.scale, ADMIN),
    ("POST", "/api/plugins/{name}/rollback", plugins.rollback, ADMIN),
    ("GET", "/api/hosts", hosts.list_all, READ),
    ("POST", "/api/hosts/{name}/drain", hosts.drain, ADMIN),
    ("POST", "/api/hosts/{name}/undrain", hosts.undrain, ADMIN),
    ("GET", "/api/logs", observe.logs, READ),
    ("GET", "/api/events", observe.events, READ),
    ("GET", "/api/hosts/{host}/telemetry/history", observe.host_history, READ),
    ("GET", "/api/broker/telemetry", observe.broker_history, READ),
    ("POST", "/api/capabilities/{capability}", capabilities.invoke, ADMIN),
    ("GET", "/api/models", models.list_all, READ),
    ("GET", "/api/models/loaded", models.loaded, READ),
    ("GET", "/api/models/shipped", shipped.list_all, READ),
    ("POST", "/api/models/import", jobs.import_model, ADMIN),
    ("POST", "/api/models/gc", models.collect_garbage, ADMIN),
    ("GET", "/api/models/{name}", models.get, READ),
    ("PATCH", "/api/models/{name}", models.describe, ADMIN),
    ("DELETE", "/api/models/{name}", models.remove, ADMIN),
    ("POST", "/api/models/{name}/validate", models.validate, ADMIN),
    ("POST", "/api/models/{name}/load", models.load, ADMIN),
    ("POST", "/api/models/{name}/unload", models.unload, ADMIN),
    ("GET", "/api/models/{name}/versions", models.versions, READ),
    ("POST", "/api/models/{name}/versions", uploads.post, ADMIN),
    ("GET", "/api/models/{name}/versions/{version}", models.version, READ),
    ("PUT", "/api/models/{name}/versions/{version}", uploads.put, ADMIN),
    ("DELETE", "/api/models/{name}/versions/{version}", models.remove, ADMIN),
    ("GET", "/api/models/{name}/versions/{version}/report", models.report, READ),
    ("GET", "/api/models/{name}/versions/{version}/content", models.content, READ),
    ("GET", "/api/models/{name}/versions/{version}/upload", uploads.offset, READ),
    ("DELETE", "/api/models/{name}/versions/{version}/upload", uploads.drop, ADMIN),
    ("POST", "/api/faces/encode", faces.encode, ADMIN),
    ("POST", "/api/faces/detect", faces.detect, PRIVATE),
    ("POST", "/api/faces/search", faces.search, PRIVATE),
    ("POST", "/api/faces/verify", faces.verify, PRIVATE),
    ("POST", "/api/faces/sheet", faces.sheet, PRIVATE),
    ("GET", "/api/datasets", datasets.list_all, READ),
    ("GET", "/api/datasets/{dataset}", datasets.get, READ),
    ("PUT", "/api/datasets/{dataset}", datasets.create, ADMIN),
    ("PATCH", "/api/datasets/{dataset}", datasets.configure, ADMIN),
    ("DELETE", "/api/datasets/{dataset}", datasets.delete, ADMIN),
    ("GET", "/api/datasets/{dataset}/entries", datasets.entries, PRIVATE),
    ("GET", "/api/datasets/{dataset}/entries/{entry}", datasets.entry, PRIVATE),
    ("PATCH", "/api/datasets/{dataset}/entries/{entry}", datasets.move, ADMIN),
    ("DELETE", "/api/datasets/{dataset}/entries/{entry}", datasets.remove_entry, ADMIN),
    ("GET", "/api/datasets/{dataset}/entries/{entry}/image", datasets.image, PRIVATE),
    ("GET", "/api/datasets/{dataset}/subjects", datasets.subjects, PRIVATE),
    ("PATCH", "/api/datasets/{dataset}/subjects/{subject}", datasets.rename, ADMIN),
    ("DELETE", "/api/datasets/{dataset}/subjects/{subject}", datasets.remove_subject, ADMIN),
    ("POST", "/api/datasets/{dataset}/subjects/{subject}/merge", datasets.merge, ADMIN),
    ("POST", "/api/datasets/{dataset}/rejections", datasets.reject, ADMIN),
    ("DELETE", "/api/datasets/{dataset}/rejections/{rejection}", datasets.withdraw, ADMIN),
    ("GET", "/api/datasets/{dataset}/history", datasets.history, PRIVATE),
    ("GET", "/api/datasets/{dataset}/imports", datasets.imports, PRIVATE),
    ("POST", "/api/datasets/{dataset}/imports/{imported}/undo", datasets.undo, ADMIN),
    ("POST", "/api/datasets/{dataset}/import", dataset_files.take, ADMIN),
    ("POST", "/api/datasets/{dataset}/export", dataset_files.export, ADMIN),
    ("GET", "/api/datasets/{dataset}/exports/{job}", dataset_files.content, PRIVATE),
    ("POST", "/api/datasets/{dataset}/reembed", dataset_files.reembed, ADMIN),
    ("GET", "/api/datasets/{dataset}/sheet", datasets.sheet, PRIVATE),
    ("GET", "/api/jobs", jobs.list_all, READ),
    ("GET", "/api/jobs/{job}", jobs.get, READ),
    ("POST", "/api/jobs/{job}/cancel", jobs.cancel, ADMIN),
    ("POST", "/api/jobs/{job}/retry", jobs.retry, ADMIN),
    ("GET", "/v2", kserve.server, OPEN),
    ("GET", "/v2/health/live", kserve.live, OPEN),
    ("GET", "/v2/health/ready", kserve.ready, OPEN),
    # First, because paths are tried in this order.
    ("POST", "/v2/models/{model}/infer", kserve.infer, ADMIN),
    ("GET", "/v2/models/stats", kserve.stats, READ),
    ("GET", "/v2/models/{model}", kserve.metadata, READ),
    ("GET", "/v2/models/{model}/ready", kserve.model_ready, READ),
    ("GET", "/v2/models/{model}/config", kserve.config, READ),
    ("GET", "/v2/models/{model}/stats", kserve.stats, READ),
    ("GET", "/v2/models/{model}/versions/{version}", kserve.metadata, READ),
    ("GET", "/v2/models/{model}/versions/{version}/ready", kserve.model_ready, READ),
    ("GET", "/v2/models/{model}/versions/{version}/config", kserve.config, READ),
    ("GET", "/v2/models/{model}/versions/{version}/stats", kserve.stats, READ),
    ("POST", "/v2/models/{model}/versions/{version}/infer", kserve.infer, ADMIN),
    ("POST", "/v2/repository/index", kserve.index, READ),
    ("POST", "/v2/repository/models/{model}/load", kserve.load, ADMIN),
    ("POST", "/v2/repository/models/{model}/unload", kserve.unload, ADMIN),
    ("GET", "/admin/plugins", plugins.list_all, ADMIN),
    ("POST", "/admin/plugins/{name}/start", plugins.start, ADMIN),
    ("POST", "/admin/plugins/{name}/stop", plugins.stop, ADMIN),
    ("POST", "/admin/plugins/{name}/restart", plugins.restart, ADMIN),
    ("POST", "/admin/plugins/{name}/config", plugins.configure, ADMIN),
    ("GET", "/admin/plugins/{name}/logs", live.log_stream, ADMIN),
    ("GET", "/admin/ports", health.ports, ADMIN),
    ("GET", "/auth/session", access.show, READ),
    ("POST", "/auth/session", access.sign_in, OPEN),
    ("DELETE", "/auth/session", access.sign_out, OPEN),
    ("GET", "/ws/plugins", live.socket, READ),
    ("GET", "/health", health.health, OPEN),
    ("GET", "/livez", health.livez, OPEN),
    ("GET", "/readyz", health.readyz, OPEN),
    ("GET", "/", page.index, OPEN),
    ("GET", "/plugins", page.index, OPEN),
    ("GET", "/plugins/{path:.*}", page.index, OPEN),
    ("GET", "/ui/{hash}/{path:.+}", page.file, OPEN),
)


@dataclass(frozen=True)
class Options:
    """What the gateway is told besides `bus.settings`.

    Attributes:
        host: `BKG_HOST`, the address to listen on.
        port: `BKG_PORT`; 0 takes a free one.
        public_read: `BKG_PUBLIC_READ`, whether reading needs no key.
        no_auth: `BKG_NO_AUTH`, whether nothing needs one.
        dashboard_dev: `BKG_DASHBOARD_DEV`, whether the page's files are read anew each time.
        upload_max_bytes: `BKG_UPLOAD_MAX_BYTES`, how many bytes an uploaded model may have.
        body_min_bytes_per_s: `BKG_BODY_MIN_BYTES_PER_S`, how slowly the body of a request may come;
            0: as slowly as it likes, if not for ever.
        ready_fd: `BKG_READY_FD`, where the bound port is written once we listen.
    """

    host: str = "127.0.0.1"
    port: int = 43119
    public_read: bool = False
    no_auth: bool = False
    dashboard_dev: bool = False
    upload_max_bytes: int = 2 * 1024**3
    body_min_bytes_per_s: int = RATE_DEFAULT
    ready_fd: int | None = None

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> "Options":
        """Read the environment.

        Raises:
            InvalidRequest: A variable has a value that it cannot have; names it.
        """
        options = cls(
            host=env.get("BKG_HOST") or cls.host,
            port=_number(env, "BKG_PORT", cls.port, 65_535),
            public_read=_switch(env, "BKG_PUBLIC_READ"),
            no_auth=_switch(env, "BKG_NO_AUTH"),
            dashboard_dev=_switch(env, "BKG_DASHBOARD_DEV"),
            upload_max_bytes=_number(env, "BKG_UPLOAD_MAX_BYTES", cls.upload_max_bytes, 2**50),
            body_min_bytes_per_s=_number(env, RATE_SETTING, cls.body_min_bytes_per_s, 2**30),
            ready_fd=_number(env, "BKG_READY_FD", 0, 2**20) if env.get("BKG_READY_FD") else None,
        )
        if options.no_auth and not is_loopback(options.host):
            raise InvalidRequest(
                f"signing in can be switched off only on a loopback address, not on "
                f"{options.host}: unset BKG_NO_AUTH, or listen on 127.0.0.1",
                field="BKG_NO_AUTH",
            )
        return options


async def serve(client: Client, instance: Instance, options: Options, key: str) -> None:
    """Be the gateway until cancelled."""
    async with gateway(client, instance, options, key) as parts:
        await instance.ready()
        log.info("gateway.listening", host=options.host, port=parts.port)
        if options.ready_fd is not None:
            with os.fdopen(options.ready_fd, "w") as ready:
                ready.write(f"{parts.port}\n")
        await asyncio.Event().wait()


@asynccontextmanager
async def gateway(
    client: Client, instance: Instance, options: Options, key: str, pages: Pages | None = None
) -> AsyncGenerator[Parts]:
    """Listen while inside; gives the parts, and with them the port."""
    gate = Gate(key, public_read=options.public_read, no_auth=options.no_auth)
    pages = pages or Pages(fresh=options.dashboard_dev)
    await client.store.declare()
    async with (
        follow_plugins(client.store, client.lost) as view,
        follow_models(client.store) as known,
    ):
        feeds = Feeds(client, view)
        incoming = Uploads(client, options.upload_max_bytes)
        parts = Parts(client, instance, view, known, feeds, gate, pages, incoming)
        app = make_app(parts, options.body_min_bytes_per_s)
        async with beside(feeds.run(), incoming.run()), listening(app, options.host, options.port):
            yield parts


def make_app(parts: Parts, body_min_bytes_per_s: int) -> web.Application:
    """Return the application: every route, behind the translation of errors and the gate."""
    app = web.Application()
    app[PARTS], app[RATE] = parts, body_min_bytes_per_s
    expects = _expecting(parts.instance)
    for method, path, handler, needs in ROUTES:
        streams = handler in {live.socket, live.log_stream}
        guarded = translated(parts.instance, _guarded(parts.gate, needs, handler))
        for one in ("GET", "HEAD") if method == "GET" and not streams else (method,):
            app.router.add_route(one, path, guarded, expect_handler=expects)
    # What is not there is told to everybody.
    nothing = translated(parts.instance, _nothing_here)
    app.router.add_route("*", "/{path:.*}", nothing, expect_handler=expects)
    app.on_response_prepare.append(dress)
    app.on_shutdown.append(_close_connections)
    return app


@asynccontextmanager
async def listening(app: web.Application, host: str, port: int) -> AsyncGenerator[int]:
    """Listen while inside; gives the port.

    Raises:
        Unavailable: The address cannot be had; says why.
    """
    # A handler ends with its caller: an event stream that nobody reads would stay for ever.
    runner = _Runner(
        app, access_log=None, handler_cancellation=True, shutdown_timeout=STOP_PATIENCE_S
    )
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise Unavailable(
                f"cannot listen on {host} port {port}: {error.strerror or error}; "
                "BKG_HOST and BKG_PORT choose another address"
            ) from None
        bound: int = runner.addresses[0][1]
        app[PARTS].port = bound
        yield bound
    finally:
        await runner.cleanup()


class _Runner(web.AppRunner):
    """Listens with `Express`: aiohttp has no other way to say which."""

    @property
    def server(self) -> Any:
        """The factory of connections."""
        server = super().server
        return None if server is None else partial(self._connection, server)

    def _connection(self, server: web.Server) -> web.RequestHandler:
        return Express(self.app[PARTS], server, asyncio.get_running_loop())


def _guarded(gate: Gate, needs: Access, handler: Handler) -> Handler:
    """Return a handler that the gate stands before."""

    async def handle(request: web.Request) -> web.StreamResponse:
        gate.admit(request, needs)
        return await handler(request)

    return handle


def _expecting(instance: Instance) -> Callable[[web.Request], Awaitable[web.StreamResponse | None]]:
    """Return what takes the header `Expect`: what it refuses leaves as any other error does."""

    async def expect(request: web.Request) -> web.StreamResponse | None:
        try:
            await hold_back(request)
        except web.HTTPExpectationFailed as error:
            refused = error
        else:
            return None

        async def refuse(_request: web.Request) -> web.StreamResponse:
            raise refused

        return await translated(instance, refuse)(request)

    return expect


async def _nothing_here(request: web.Request) -> web.StreamResponse:
    """Say that there is no such address, or that it does not take this method."""
    allowed: set[str] = set()
    for resource in request.app.router.resources():
        if resource is not request.match_info.route.resource:
            allowed |= (await resource.resolve(request))[1]
    if allowed:
        raise web.HTTPMethodNotAllowed(request.method, allowed)
    raise web.HTTPNotFound


async def _close_connections(app: web.Application) -> None:
    await app[PARTS].connections.close()


def _switch(env: Mapping[str, str], name: str) -> bool:
    text = env.get(name, "").lower()
    if text in {"", "0", "false", "no", "off"}:
        return False
    if text in {"1", "true", "yes", "on"}:
        return True
    raise InvalidRequest(f"{name} is {text!r}; allowed are 1 and 0", field=name)


def _number(env: Mapping[str, str], name: str, default: int, most: int) -> int:
    text = env.get(name)
    if not text:
        return default
    if not (text.isascii() and text.isdecimal()) or int(text) > most:
        raise InvalidRequest(
            f"{name} is {text[:40]!r}; allowed are whole numbers up to {most}", field=name
        )
    return int(text)

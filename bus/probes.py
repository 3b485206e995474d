"""The loopback HTTP port of an instance: probes, metrics, and what its plugin adds.

No key is asked for: who may be on this host may ask. Pages in a browser on this host may not.
They could reach the port by a name of theirs that resolves to 127.0.0.1, so `Host` must be a
loopback name; and a form could post here, so a body must say that it is JSON, which no page may
send to another origin without being allowed to.
"""

import asyncio
import ipaddress
import logging
import math
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any, Final, Literal

import structlog
from aiohttp import hdrs, web
from aiohttp.http_exceptions import HttpProcessingError
from prometheus_client import CONTENT_TYPE_LATEST

from bus import codec
from bus import messages as m
from bus.errors import (
    BusError,
    DeadlineExceeded,
    InvalidRequest,
    NotAllowed,
    Overloaded,
    TooLarge,
)

HOST: Final = "127.0.0.1"
PROBLEM: Final = "application/problem+json"
# Bodies are held in memory before anybody looks at them. Probes have no body, and no limit.
WORKING_MAX: Final = 64
BODY_PATIENCE_S: Final = 60.0
LEAVE_S: Final = 10.0
CLOSE_S: Final = 1.0

log = structlog.get_logger("bus.probes")


def _is_worth_a_record(record: logging.LogRecord) -> bool:
    """Drop what aiohttp says about bytes that are no HTTP: their sender is told."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


_http_log = logging.getLogger("bus.probes.http")
_http_log.addFilter(_is_worth_a_record)


@dataclass(frozen=True)
class Route:
    """A path on the port.

    Attributes:
        method: How it is asked.
        path: With `{field}` where it carries a field of the request.
        request: What path and body are read as.
        handler: Returns the reply, or raises a `BusError` for the caller.
    """

    method: Literal["GET", "POST"]
    path: str
    request: type[m.Message]
    handler: Callable[[Any], Awaitable[object]]


@dataclass(frozen=True)
class Facts:
    """What the probes ask the instance.

    Attributes:
        missing: Why it is not ready; nothing when it is.
        about: What `/health` says, unless the plugin says something else.
        metrics: Its figures in Prometheus' text format.
    """

    missing: Callable[[], list[str]]
    about: Callable[[], dict[str, Any]]
    metrics: Callable[[], bytes]


class Probes:
    """What answers on the port.

    Args:
        facts: What the probes ask the instance.
        body_max_bytes: The largest body: what the bus takes.
    """

    def __init__(self, facts: Facts, body_max_bytes: int) -> None:
        self._facts = facts
        self._body_max_bytes = body_max_bytes
        self._added: tuple[Route, ...] = ()
        self._working: set[asyncio.Task[object]] = set()
        self._taken = 0
        self._make_table()

    @asynccontextmanager
    async def listening(self, wanted: int) -> AsyncGenerator[int | None]:
        """Listen while inside; gives the port, or None when there is none to be had.

        Args:
            wanted: The port; a free one if 0, or if this one is taken.
        """
        # A table of our own behind one path: a plugin adds to it while the port is open.
        app = web.Application(client_max_size=self._body_max_bytes)
        app.router.add_route("*", "/{path:.*}", self._answer)
        app.on_response_prepare.append(_dress)
        runner = web.AppRunner(app, access_log=None, logger=_http_log, shutdown_timeout=CLOSE_S)
        await runner.setup()
        try:
            yield await _listen(runner, wanted)
        finally:
            await runner.cleanup()

    @asynccontextmanager
    async def routing(self, *routes: Route) -> AsyncGenerator[None]:
        """Answer further paths while inside; one for `/health` takes the place of ours.

        Left, they are gone, and what they had in hand is answered, or has had its `LEAVE_S`.
        """
        self._added += routes
        self._make_table()
        try:
            yield
        finally:
            self._added = tuple(route for route in self._added if route not in routes)
            self._make_table()
            if self._working:
                await asyncio.wait(self._working, timeout=LEAVE_S)

    def _make_table(self) -> None:
        answers: dict[tuple[str, str], _Answer] = {
            ("GET", "/livez"): self._livez,
            ("GET", "/readyz"): self._readyz,
            ("GET", "/health"): self._health,
            ("GET", "/metrics"): self._metrics,
        }
        for route in self._added:
            answers[route.method, route.path] = partial(self._serve, route)
        self._table = web.UrlDispatcher()
        self._answers: dict[web.AbstractRoute, _Answer] = {}
        for (method, path), answer in answers.items():
            for one in ("GET", "HEAD") if method == "GET" else (method,):
                self._answers[self._table.add_route(one, path, self._answer)] = answer

    async def _answer(self, request: web.Request) -> web.Response:
        try:
            _check_host(request)
            found = await self._table.resolve(request)
            if found.http_exception is not None:
                return _problem_of_http(request, found.http_exception)
            return await self._answers[found.route](request, dict(found))
        except BusError as error:
            return _problem_of(error)
        except Exception:
            log.exception("http.failed", method=request.method, path=request.path[:200])
            return _problem(500, "internal", "it failed unexpectedly; the cause is in the log")

    # --- Ours -------------------------------------------------------------------------------------

    async def _livez(self, _request: web.Request, _fields: dict[str, str]) -> web.Response:
        return _json({"status": "ok"})

    async def _readyz(self, _request: web.Request, _fields: dict[str, str]) -> web.Response:
        if reasons := self._facts.missing():
            return _problem(503, "unavailable", "; ".join(reasons), reasons=reasons, retry_s=1)
        return _json({"status": "ready"})

    async def _health(self, _request: web.Request, _fields: dict[str, str]) -> web.Response:
        return _json({"status": "ok", **self._facts.about()})

    async def _metrics(self, _request: web.Request, _fields: dict[str, str]) -> web.Response:
        text = self._facts.metrics()
        return web.Response(body=text, headers={hdrs.CONTENT_TYPE: CONTENT_TYPE_LATEST})

    # --- The plugin's -----------------------------------------------------------------------------

    async def _serve(
        self, route: Route, request: web.Request, fields: dict[str, str]
    ) -> web.Response:
        if self._taken >= WORKING_MAX:
            raise Overloaded(f"this port works on {WORKING_MAX} requests already", retry_after_s=1)
        self._taken += 1
        try:
            asked = await self._read(route, request, fields)
            # A task of its own: leaving waits for the work, and not for a caller who dawdles.
            task = asyncio.create_task(_handle(route, asked))
            self._working.add(task)
            task.add_done_callback(self._working.discard)
            return _json(await task)
        finally:
            self._taken -= 1

    async def _read(self, route: Route, request: web.Request, fields: dict[str, str]) -> m.Message:
        given: dict[str, Any] = {}
        if route.method == "POST":
            given = codec.decode(await self._body(request), dict[str, Any])
        for name, value in fields.items():
            if given.setdefault(name, value) != value:
                raise InvalidRequest(
                    f"{name}: the path says {value!r}, the body something else", field=name
                )
        return codec.convert(given, route.request)

    async def _body(self, request: web.Request) -> bytes:
        kind = request.headers.get(hdrs.CONTENT_TYPE, "")
        if kind.partition(";")[0].strip().lower() != codec.JSON:
            raise InvalidRequest(
                f"Content-Type is {kind[:100]!r}; allowed is {codec.JSON}", field=codec.CONTENT_TYPE
            )
        most = self._body_max_bytes
        if (announced := request.content_length or 0) > most:
            raise TooLarge(f"the body has {announced:,} bytes, allowed are {most:,}")
        try:
            async with asyncio.timeout(BODY_PATIENCE_S):
                return await request.read()
        except web.HTTPRequestEntityTooLarge:
            raise TooLarge(f"the body has more than the {most:,} bytes allowed") from None
        except (web.RequestPayloadError, web.PayloadAccessError) as error:
            raise InvalidRequest(f"the body cannot be read: {type(error).__name__}") from None
        except TimeoutError:
            raise DeadlineExceeded(f"the body did not come within {BODY_PATIENCE_S:g} s") from None


def is_loopback(host: str) -> bool:
    """Return whether a `Host` header names this machine in a way that no other name can."""
    found = _HOST.fullmatch(host)
    if found is None:
        return False
    name = found["name"]
    if name.lower() == "localhost":
        return True
    try:
        if name.startswith("["):
            return ipaddress.IPv6Address(name[1:-1]).is_loopback
        return ipaddress.IPv4Address(name).is_loopback
    except ValueError:
        return False


_Answer = Callable[[web.Request, dict[str, str]], Awaitable[web.Response]]
_HOST: Final = re.compile(r"(?P<name>\[[0-9a-fA-F:.]{2,45}\]|[0-9a-zA-Z.]{1,15})(:[0-9]{1,5})?")
_HEADERS: Final = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


async def _handle(route: Route, asked: m.Message) -> object:
    return await route.handler(asked)


async def _listen(runner: web.AppRunner, wanted: int) -> int | None:
    for port in dict.fromkeys((wanted, 0)):
        try:
            await web.TCPSite(runner, HOST, port).start()
        except OSError as error:
            log.warning("probes.no_port", host=HOST, port=port, cause=error.strerror or str(error))
        else:
            bound: int = runner.addresses[0][1]
            return bound
    return None


def _check_host(request: web.Request) -> None:
    hosts = request.headers.getall(hdrs.HOST, [])
    if len(hosts) != 1 or not is_loopback(hosts[0]):
        said = ", ".join(hosts)[:100]
        raise NotAllowed(f"Host is {said!r}; this port answers to {HOST} and localhost alone")


async def _dress(_request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(_HEADERS)
    response.headers[hdrs.SERVER] = "bkg"


def _json(said: object) -> web.Response:
    return web.Response(body=codec.encode(said), content_type=codec.JSON)


def _problem_of(error: BusError) -> web.Response:
    retry_s = math.ceil(error.retry_after_s or 1) if error.number in {429, 503} else None
    return _problem(error.number, error.code, error.message, field=error.field, retry_s=retry_s)


def _problem_of_http(request: web.Request, error: web.HTTPException) -> web.Response:
    path = request.path[:200]
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        response = _problem(405, None, f"{path} does not take {request.method}; allowed: {allowed}")
        response.headers[hdrs.ALLOW] = allowed
        return response
    return _problem(error.status, None, f"there is nothing at {path}")


def _problem(
    status: int,
    code: str | None,
    detail: str,
    *,
    field: str | None = None,
    reasons: list[str] | None = None,
    retry_s: int | None = None,
) -> web.Response:
    """Return an error as RFC 9457 has it; what there is nothing to say about is left out."""
    body = {
        "type": f"urn:bkg:problem:{code}" if code else "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "field": field,
        "reasons": reasons,
    }
    kept = {name: value for name, value in body.items() if value is not None}
    headers = {hdrs.RETRY_AFTER: str(retry_s)} if retry_s else None
    return web.Response(
        body=codec.encode(kept), status=status, headers=headers, content_type=PROBLEM
    )

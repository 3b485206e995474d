"""How the platform is: for people, for load balancers, for service managers."""

from typing import Final

from aiohttp import hdrs, web

from bus.errors import BusError
from bus.messages import PluginState, now
from services.gateway.parts import PARTS, Parts
from services.gateway.translate import answer, problem

PING_S: Final = 1.0


async def health(request: web.Request) -> web.Response:
    """Return every plugin's status and port; always 200."""
    at = request.app[PARTS]
    plugins = [
        {"name": state.name, "status": state.status, "port": _port(state)}
        for state in at.view.list()
    ]
    status = "ok" if at.client.connected else "degraded"
    return answer({"status": status, "timestamp": now(), "plugins": plugins})


async def livez(_request: web.Request) -> web.Response:
    """Return 200: this process answers."""
    return answer({"status": "ok"})


async def readyz(request: web.Request) -> web.Response:
    """Return 200 when the broker answers and every wanted replica is ready, else 503 and why."""
    reasons = await _reasons(request.app[PARTS])
    if not reasons:
        return answer({"status": "ready"})
    return problem(
        503, "; ".join(reasons), code="unavailable", reasons=reasons,
        headers={hdrs.RETRY_AFTER: "1"},
    )  # fmt: skip


async def ports(request: web.Request) -> web.Response:
    """Return which service listens where."""
    at = request.app[PARTS]
    ours = {"service": "gateway", "port": at.port or "n/a", "status": "running"}
    plugins = [
        {"service": state.name, "port": _port(state), "status": state.status}
        for state in at.view.list()
    ]
    return answer([ours, *plugins])


async def _reasons(at: Parts) -> list[str]:
    if not at.client.connected:
        return ["the broker is away"]
    try:
        await at.client.barrier(PING_S)
    except BusError:
        return [f"the broker did not answer within {PING_S:g} s"]
    states = at.view.list()
    if not states:
        return ["no plugin is known yet: no supervisor has brought the catalogue"]
    return [
        f"{state.name} has {state.replicas.ready} of {state.replicas.desired} replicas ready"
        + (f": {state.error[:300]}" if state.error else "")
        for state in states
        if state.replicas.ready < state.replicas.desired
    ]


def _port(state: PluginState) -> int | str:
    return "n/a" if state.port is None else state.port

"""Hosts: what is there, and whether replicas may run on it."""

from typing import Final

from aiohttp import web

from bus import codec
from bus.messages import Empty, HostInfo, NameHost
from bus.subjects import HOSTS_DRAIN, HOSTS_LIST, HOSTS_UNDRAIN, Endpoint
from services.gateway.parts import PARTS
from services.gateway.translate import answer, timeout_of

# The far side's own time-out should speak first: it says what is left there.
MARGIN_S: Final = 3.0


async def list_all(request: web.Request) -> web.Response:
    """Return every host that is there, with what runs on it. 503 no supervisor."""
    return answer((await request.app[PARTS].client.call(HOSTS_LIST, Empty())).hosts)


async def drain(request: web.Request) -> web.Response:
    """Move a host's replicas away and answer when none is left; at once with `respond-async`.

    202 under way; 404 no such host; 503 no supervisor; 504 not in time, with what is left.
    """
    return await _change(request, HOSTS_DRAIN)


async def undrain(request: web.Request) -> web.Response:
    """Let a drained host take replicas again. 404 no such host; 503 no supervisor."""
    return await _change(request, HOSTS_UNDRAIN)


async def _change(request: web.Request, endpoint: Endpoint[NameHost, HostInfo]) -> web.Response:
    timeout_s = timeout_of(request)
    wait = "respond-async" not in request.headers.get("Prefer", "")
    ask = codec.convert(
        {
            "name": request.match_info["name"],
            "by": "admin",
            "timeoutS": timeout_s,
            "wait": wait,
        },
        NameHost,
    )
    info = await request.app[PARTS].client.call(endpoint, ask, timeout_s=timeout_s + MARGIN_S)
    response = answer(info, status=200 if wait else 202)
    if not wait:
        response.headers["Preference-Applied"] = "respond-async"
    return response

"""Capabilities: whatever plugins can be asked, ours by type, third parties' by name and bytes."""

import re
from typing import Final

from aiohttp import hdrs, web

from bus.client import Reference
from bus.errors import (
    BusError,
    InvalidRequest,
    NobodyListens,
    NotAllowed,
    NotFound,
    Unavailable,
)
from bus.messages import PluginState
from bus.subjects import CAPABILITIES, MODEL_RUN, SUPERVISOR, name_of
from services.gateway.bodies import body_for_bus, whole_body
from services.gateway.models import why_nobody as why_no_model
from services.gateway.parts import PARTS, Parts
from services.gateway.room import Room
from services.gateway.translate import answer_as_it_is, headers_for_bus, timeout_of

RELAYING_MAX: Final = 256
# Half of what inference may have: what is announced here and does not come leaves it the rest.
RELAYING_MAX_BYTES: Final = 256 * 1024**2
_NAME: Final = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)+")
_NAME_MAX_CHARS: Final = 128


async def invoke(request: web.Request) -> web.Response:
    """Ask a capability: the body goes to a worker as it is, its answer comes back as it is.

    400 no capability's name, or a payload that does not fit; 403 it is a command for the admin
    routes; 404 nobody knows it, or its model is not loaded; 408 the body comes too slowly; 413
    too large; 429 and 503 try again after `Retry-After`; 504 no answer within `?timeout=` seconds.
    """
    at = request.app[PARTS]
    name = _capability(request)
    timeout_s, headers = timeout_of(request), headers_for_bus(request)
    with Room(at, RELAYING_MAX, RELAYING_MAX_BYTES) as room:
        endpoint = CAPABILITIES.get(name)
        body: bytes | Reference
        if endpoint and endpoint.keys:
            # Where it goes stands in it.
            body = await whole_body(request, room, at.client.body_max_bytes)
            kind = request.headers.get(hdrs.CONTENT_TYPE)
            subject = endpoint.subject_of_body(at.client.root, body, kind)
        else:
            subject = _subject(at, name)
            body = await body_for_bus(request, at.client, room, timeout_s)
        try:
            relayed = await at.client.relay(subject, body, headers=headers, timeout_s=timeout_s)
        except NobodyListens:
            raise await why_nobody(at, name, subject) from None
    return answer_as_it_is(relayed)


def _capability(request: web.Request) -> str:
    name = request.match_info["capability"]
    if not _NAME.fullmatch(name) or len(name) > _NAME_MAX_CHARS:
        raise InvalidRequest(
            f"{name[:100]!r} is no capability: names are `noun.verb`, of lower case letters, "
            f"digits, - and _ with dots between, at most {_NAME_MAX_CHARS} characters",
            field="capability",
        )
    if name.partition(".")[0] in {"plugins", "hosts"}:
        raise NotAllowed(f"{name} is asked by its own route, such as POST /api/plugins/NAME/start")
    return name


def _subject(at: Parts, name: str) -> str:
    # Below a capability that is keyed lie its keys: they are told by the body, not by the path.
    if any(name.startswith(f"{keyed}.") for keyed, one in CAPABILITIES.items() if one.keys):
        raise _unknown(at, name)
    return f"{at.client.root}.call.{name}"


async def why_nobody(at: Parts, name: str, subject: str) -> BusError:
    """Return what a caller can do about a capability for which nobody listens."""
    endpoint = CAPABILITIES.get(name)
    owners = [state for state in at.view.list() if name in state.capabilities]
    if endpoint and not owners:
        return Unavailable(
            f"{name} belongs to {endpoint.queue}, which is not installed here", retry_after_s=30
        )
    if not owners:
        return _unknown(at, name)
    running = next((state for state in owners if _is_there(state)), None)
    if running and endpoint is MODEL_RUN:
        error = await why_no_model(at, name_of(subject.rpartition(".")[2]))
        # In this body the model is called so.
        error.field = "id" if error.field else None
        return error
    if running and endpoint and endpoint.keys:
        return NotFound(
            f"no running instance of {running.name} has what {' and '.join(endpoint.keys)} "
            f"names loaded",
            field=endpoint.keys[0],
        )
    if running:
        return Unavailable(
            f"{running.name} runs, but does not answer {name} just now", retry_after_s=1
        )
    if owners[0].status in {"running", "degraded"}:
        return Unavailable(
            f"{name} is answered by {owners[0].name}, of which no instance is there just now",
            retry_after_s=2,
        )
    return Unavailable(
        f"{name} is answered by {owners[0].name}, which is {owners[0].status}{_reason(owners[0])}",
        retry_after_s=2 if owners[0].status == "starting" else 10,
    )


def _is_there(state: PluginState) -> bool:
    """Whether an instance tells of itself that it runs.

    The supervisor's word alone may be old: its workers leave when it is killed, and what it last
    said of them stays until the next one comes.
    """
    return any(place.id and place.status == "running" for place in state.instances)


def _reason(state: PluginState) -> str:
    return f": {state.error[:300]}" if state.error else ""


def _unknown(at: Parts, name: str) -> NotFound:
    ours = {one for one, endpoint in CAPABILITIES.items() if endpoint.queue != SUPERVISOR}
    told = {one for state in at.view.list() for one in state.capabilities}
    return NotFound(
        f"nobody knows the capability {name}; known are: {', '.join(sorted(ours | told))}"
    )

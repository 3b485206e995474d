"""Plugins: their states, commands, configuration and last telemetry."""

from typing import Annotated, Any, Final, TypeVar

import msgspec
from aiohttp import hdrs, web

from bus import codec
from bus.errors import InvalidRequest, NotFound
from bus.messages import (
    ConfigCheck,
    ConfigError,
    ConfigurePlugin,
    HistoryOfPlugin,
    NamePlugin,
    PluginConfig,
    PluginState,
    RollbackPlugin,
    ScalePlugin,
)
from bus.subjects import (
    PLUGINS_CHECK,
    PLUGINS_CONFIGURE,
    PLUGINS_HISTORY,
    PLUGINS_RESTART,
    PLUGINS_ROLLBACK,
    PLUGINS_SCALE,
    PLUGINS_START,
    PLUGINS_STOP,
    Endpoint,
)
from services.gateway.parts import PARTS
from services.gateway.translate import accepted, answer, read, timeout_of, wants_no_wait

# The far side's own time-out should speak first: it says what is missing.
MARGIN_S: Final = 3.0

Command = TypeVar("Command", bound=NamePlugin)
Replicas = Annotated[int, msgspec.Meta(ge=0, le=100)]


async def list_all(request: web.Request) -> web.Response:
    """Return every plugin known by configuration or registration."""
    return answer(request.app[PARTS].view.list())


async def get(request: web.Request) -> web.Response:
    """Return one plugin; its ETag is the revision for `If-Match`. 404 no such plugin."""
    state = request.app[PARTS].state_of(request)
    response = answer(state)
    response.headers[hdrs.ETAG] = f'"{state.revision}"'
    return response


async def status(request: web.Request) -> web.Response:
    """Return a plugin's status, process and port. 404 no such plugin."""
    state = request.app[PARTS].state_of(request)
    return answer(
        {"name": state.name, "status": state.status, "pid": state.pid, "port": state.port}
    )


async def capabilities(request: web.Request) -> web.Response:
    """Return what a plugin can be asked. 404 no such plugin."""
    return answer(request.app[PARTS].state_of(request).capabilities)


async def start(request: web.Request) -> web.Response:
    """Start a plugin and answer when it is ready.

    202 at once, for `Prefer: respond-async`, as with every command; 404 no such plugin; 409 it
    runs already; 503 no supervisor; 504 not ready in time, with what is missing.
    """
    return await _answer(request, PLUGINS_START, _named(request, NamePlugin))


async def stop(request: web.Request) -> web.Response:
    """Stop a plugin and answer when it has stopped; one that does not run is no error.

    404 no such plugin; 503 no supervisor; 504 not stopped in time.
    """
    response = await _answer(request, PLUGINS_STOP, _named(request, NamePlugin))
    return response if response.status == 202 else answer({"status": "stopped"})


async def restart(request: web.Request) -> web.Response:
    """Replace every replica of a plugin and answer when the last one is ready.

    404 no such plugin; 409 another change came first; 503 no supervisor; 504 not ready in time,
    with what is missing.
    """
    return await _answer(request, PLUGINS_RESTART, _named(request, NamePlugin))


async def scale(request: web.Request) -> web.Response:
    """Change how many replicas of a plugin are wanted, and answer when that many are there.

    400 no number from 0 to 100; 404 no such plugin; 409 `If-Match` names a revision that is not
    the present one, with that; 503 no supervisor; 504 not there in time, with what is missing.
    """
    ask = await read(request, _Scale)
    return await _answer(
        request,
        PLUGINS_SCALE,
        _named(request, ScalePlugin, replicas=ask.replicas, revision=_revision(request)),
    )


async def configure(request: web.Request) -> web.Response:
    """Store a plugin's configuration, and answer when every instance has it.

    With `?check=1` nothing is stored, and the answer is what would change, and all that is wrong.

    400 no configuration, another plugin's, or one that its schema does not allow, with all that
    is wrong; 404 no such plugin; 409 `If-Match` names a revision that is not the present one, with
    that; 503 no supervisor; 504 not taken in time, with what is missing.
    """
    if _switch(request, "check"):
        return answer(await _check(request))
    config = await _config(request)
    return await _answer(
        request,
        PLUGINS_CONFIGURE,
        _named(request, ConfigurePlugin, config=config, revision=_revision(request)),
    )


async def history(request: web.Request) -> web.Response:
    """Return the newest revisions of a plugin's desired state, newest first: `?limit=` (20).

    400 a limit that is not from 1 to 64; 404 no such plugin; 503 no supervisor.
    """
    at = request.app[PARTS]
    text = request.query.get("limit", "20")
    limit = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else text[:40]
    ask = codec.convert({"name": request.match_info["name"], "limit": limit}, HistoryOfPlugin)
    found = await at.client.call(PLUGINS_HISTORY, ask, timeout_s=timeout_of(request))
    return answer(found.revisions)


async def rollback(request: web.Request) -> web.Response:
    """Store the configuration of an older revision as a new one; answers as `configure` does.

    400 no revision; 404 no such plugin, or that revision is not kept; 409 `If-Match` names a
    revision that is not the present one, with that; 503 no supervisor; 504 not taken in time.
    """
    ask = await read(request, _Rollback)
    return await _answer(
        request,
        PLUGINS_ROLLBACK,
        _named(request, RollbackPlugin, revision=ask.revision, at_revision=_revision(request)),
    )


async def telemetry(request: web.Request) -> web.Response:
    """Return a plugin's last snapshot. 404 no such plugin, or nothing measured yet."""
    at = request.app[PARTS]
    name = at.state_of(request).name
    snapshot = at.feeds.telemetry(name)
    if snapshot is None:
        raise NotFound(f"{name} has sent no telemetry yet")
    return answer(snapshot)


async def telemetry_summary(request: web.Request) -> web.Response:
    """Return the last snapshot of every plugin that has sent one."""
    return answer(request.app[PARTS].feeds.telemetry_of_all())


class _Scale(msgspec.Struct, frozen=True):
    """The body of `scale`."""

    replicas: Replicas


class _Rollback(msgspec.Struct, frozen=True):
    """The body of `rollback`."""

    revision: int


def _named(request: web.Request, kind: type[Command], **more: Any) -> Command:
    """Return a command for the plugin that the path names.

    Raises:
        NotFound: Nobody knows it.
    """
    return kind(
        name=request.app[PARTS].state_of(request).name,
        by="admin",
        timeout_s=timeout_of(request),
        wait=not wants_no_wait(request),
        **more,
    )


async def _answer(
    request: web.Request, endpoint: Endpoint[Command, PluginState], ask: Command
) -> web.Response:
    client = request.app[PARTS].client
    state = await client.call(endpoint, ask, timeout_s=ask.timeout_s + MARGIN_S)
    return answer(state) if ask.wait else accepted(state)


async def _config(request: web.Request) -> PluginConfig:
    name = request.match_info["name"]
    config = await read(request, PluginConfig)
    if config.name != name:
        raise InvalidRequest(
            f"the configuration is for {config.name!r}, the path names {name[:100]!r}",
            field="name",
        )
    return config


async def _check(request: web.Request) -> ConfigCheck:
    try:
        config = await _config(request)
    except InvalidRequest as error:
        # What names a field is a configuration that does not fit; all else is none at all.
        if error.field is None:
            raise
        wrong = ConfigError(field=error.field, message=error.message)
        return ConfigCheck(valid=False, errors=[wrong], changes=[], restarts=False)
    ask = _named(request, ConfigurePlugin, config=config, revision=_revision(request))
    return await request.app[PARTS].client.call(PLUGINS_CHECK, ask, timeout_s=ask.timeout_s)


def _switch(request: web.Request, name: str) -> bool:
    text = request.query.get(name, "0")
    if text not in {"0", "1"}:
        raise InvalidRequest(f"{name} is {text[:40]!r}; allowed are 1 and 0", field=name)
    return text == "1"


def _revision(request: web.Request) -> int | None:
    tag = request.headers.get(hdrs.IF_MATCH, "").removeprefix("W/").strip('"')
    if not tag or tag == "*":
        return None
    if not (tag.isascii() and tag.isdecimal()):
        raise InvalidRequest(f"If-Match is {tag[:40]!r}, not a revision", field="If-Match")
    return int(tag)

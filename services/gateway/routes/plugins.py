"""Plugins: their states, commands, configuration and last telemetry."""

from typing import Final

from aiohttp import hdrs, web

from bus import codec
from bus.errors import InvalidRequest, NotFound
from bus.messages import ConfigurePlugin, NamePlugin, PluginConfig, PluginState
from bus.subjects import (
    PLUGINS_CONFIGURE,
    PLUGINS_RESTART,
    PLUGINS_START,
    PLUGINS_STOP,
    Endpoint,
)
from services.gateway.parts import PARTS
from services.gateway.translate import answer, read, timeout_of

# The far side's own time-out should speak first: it says what is missing.
MARGIN_S: Final = 3.0


async def list_all(request: web.Request) -> web.Response:
    """Return every plugin known by configuration or registration."""
    return answer(request.app[PARTS].view.list())


async def get(request: web.Request) -> web.Response:
    """Return one plugin. 404 no such plugin."""
    return answer(request.app[PARTS].state_of(request))


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

    404 no such plugin; 409 it runs already; 503 no supervisor; 504 not ready in time, with what
    is missing.
    """
    return answer(await _command(request, PLUGINS_START))


async def stop(request: web.Request) -> web.Response:
    """Stop a plugin and answer when it has stopped; one that does not run is no error.

    404 no such plugin; 503 no supervisor; 504 not stopped in time.
    """
    await _command(request, PLUGINS_STOP)
    return answer({"status": "stopped"})


async def restart(request: web.Request) -> web.Response:
    """Replace every replica of a plugin and answer when the last one is ready.

    404 no such plugin; 409 another change came first; 503 no supervisor; 504 not ready in time,
    with what is missing.
    """
    return answer(await _command(request, PLUGINS_RESTART))


async def configure(request: web.Request) -> web.Response:
    """Store a plugin's configuration; a running worker takes it at its next restart.

    400 no configuration, or another plugin's; 404 no such plugin; 409 `If-Match` names a
    revision that is not the present one; 503 no supervisor.
    """
    at = request.app[PARTS]
    name = request.match_info["name"]
    config = await read(request, PluginConfig)
    if config.name != name:
        raise InvalidRequest(
            f"the configuration is for {config.name!r}, the path names {name[:100]!r}",
            field="name",
        )
    ask = ConfigurePlugin(name=name, config=config, by="admin", revision=_revision(request))
    return answer(await at.client.call(PLUGINS_CONFIGURE, ask, timeout_s=timeout_of(request)))


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


async def _command(
    request: web.Request, endpoint: Endpoint[NamePlugin, PluginState]
) -> PluginState:
    at = request.app[PARTS]
    timeout_s = timeout_of(request)
    name = at.state_of(request).name
    ask = codec.convert({"name": name, "by": "admin", "timeoutS": timeout_s}, NamePlugin)
    return await at.client.call(endpoint, ask, timeout_s=timeout_s + MARGIN_S)


def _revision(request: web.Request) -> int | None:
    tag = request.headers.get(hdrs.IF_MATCH, "").removeprefix("W/").strip('"')
    if not tag or tag == "*":
        return None
    if not (tag.isascii() and tag.isdecimal()):
        raise InvalidRequest(f"If-Match is {tag[:40]!r}, not a revision", field="If-Match")
    return int(tag)

"""The commands that talk to a running platform: status, plugins, logs, events, call, worker."""

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import msgspec
import typer

from bus import codec
from bus.client import Client, connect
from bus.errors import BusError, InvalidRequest, NotFound
from bus.log_search import LogQuery, at_least, matcher, moment_in, seconds_in
from bus.logs import tell_log_level
from bus.messages import Empty, Level, NamePlugin, PluginConfig, SetLogLevel, now
from bus.subjects import (
    CAPABILITIES,
    DEFAULT_ROOT,
    LIVE_LOG,
    PLUGINS_LIST,
    PLUGINS_RESTART,
    PLUGINS_START,
    PLUGINS_STOP,
)
from services.cli.console import (
    out,
    show_answer,
    show_event,
    show_json,
    show_log,
    show_log_level,
    show_plugins,
)
from services.cli.running import broker_url, read_run_file

COMMANDS: Final = {"start": PLUGINS_START, "stop": PLUGINS_STOP, "restart": PLUGINS_RESTART}
# What the answer to a command may take on its way, above the time that the command itself has.
WAY_S: Final = 5.0


@asynccontextmanager
async def connected(nats: str | None, data_dir: Path) -> AsyncIterator[Client]:
    """Be connected to the running platform while inside.

    Raises:
        Unavailable: None runs here and none was named, or its broker cannot be used.
    """
    root = os.environ.get("BKG_ROOT") or DEFAULT_ROOT
    async with connect(broker_url(nats, data_dir), name="bkg-cli", root=root) as client:
        yield client


async def status(nats: str | None, data_dir: Path, *, as_json: bool) -> None:
    """Print every plugin with its state."""
    async with connected(nats, data_dir) as client:
        found = await client.call(PLUGINS_LIST, Empty())
    if as_json:
        show_json(found.plugins)
        return
    run = None if nats else read_run_file(data_dir)
    if run:
        out.print(f"bkg {run.version} at {run.url}, process {run.pid}, data in {data_dir}\n")
    show_plugins(found.plugins)


async def command(
    verb: str, name: str, nats: str | None, data_dir: Path, *, timeout_s: float, as_json: bool
) -> None:
    """Start, stop or restart a plugin, and wait until that is done."""
    ask = codec.convert({"name": name, "by": "cli", "timeoutS": timeout_s}, NamePlugin)
    async with connected(nats, data_dir) as client:
        state = await client.call(COMMANDS[verb], ask, timeout_s=timeout_s + WAY_S)
    if as_json:
        show_json(state)
    else:
        show_plugins([state])


async def logs(
    plugin: str | None,
    nats: str | None,
    data_dir: Path,
    *,
    follow: bool,
    level: Level | None,
    slot: int | None,
    since: str | None,
    grep: str | None,
    limit: int,
    as_json: bool,
) -> None:
    """Print the newest log records, oldest first, and then what comes, when asked to."""
    with _usage("--grep"):
        matches = matcher(regex=grep)
    query = LogQuery(
        limit=limit,
        plugin=plugin,
        slot=slot,
        levels=at_least(level or "debug"),
        since=_since(since),
        matches=matches,
    )
    show = show_json if as_json else show_log
    which = {"plugin": plugin, "slot": slot}
    tokens = {name: value for name, value in which.items() if value is not None}
    async with connected(nats, data_dir) as client, contextlib.AsyncExitStack() as stack:
        # Listening begins before the past is read: so nothing falls between them, and what is in
        # both is known by its number.
        live = None
        if follow:
            live = await stack.enter_async_context(client.follow(LIVE_LOG, **tokens))
        page = await client.store.search_logs(query)
        for record in page.records:
            show(record)
        if live is None:
            return
        async for received in live:
            record = msgspec.structs.replace(received.payload, seq=received.seq)
            is_new = record.seq is None or record.seq > page.next_after
            if is_new and record.level in query.levels and query.matches(record):
                show(record)


async def events(
    name: str | None,
    nats: str | None,
    data_dir: Path,
    *,
    follow: bool,
    since: str | None,
    limit: int,
    as_json: bool,
) -> None:
    """Print what happened to plugins and hosts, oldest first, and then what comes, if asked to."""
    begin = _since(since)
    show = show_json if as_json else show_event
    async with connected(nats, data_dir) as client:
        # Before the past is read, so that nothing falls between.
        asked_at = now()
        last = 0
        for event in await client.store.events(limit=limit, name=name, since=begin):
            show(event)
            last = event.seq or last
        if not follow:
            return
        async for event in client.store.follow_events(after=last, since=asked_at):
            if name is None or event.name == name:
                show(event)


async def log_level(
    plugin: str,
    level: Level,
    nats: str | None,
    data_dir: Path,
    *,
    lasts: str,
    as_json: bool,
) -> None:
    """Let a plugin's instances log from another level upward for a while; print who was told."""
    with _usage("--for"):
        seconds = seconds_in(lasts, "the time")
        wish = codec.convert({"level": level, "seconds": seconds, "by": "cli"}, SetLogLevel)
    async with connected(nats, data_dir) as client:
        told = await tell_log_level(client, plugin, wish)
    if as_json:
        show_json(told)
    else:
        show_log_level(told)


async def call(
    capability: str,
    request: str | None,
    nats: str | None,
    data_dir: Path,
    *,
    timeout_s: float,
    as_json: bool,
) -> None:
    """Ask a capability, ours or another's, and print the answer."""
    body = _read_json(request)
    async with connected(nats, data_dir) as client:
        endpoint = CAPABILITIES.get(capability)
        if endpoint is not None:
            subject = endpoint.subject_of_body(client.root, body, codec.JSON)
        else:
            subject = f"{client.root}.call.{capability}"
        headers = {codec.CONTENT_TYPE: codec.JSON}
        answer = await client.relay(subject, body, headers=headers, timeout_s=timeout_s)
    if as_json:
        sys.stdout.write(answer.body.decode() + "\n")
    else:
        show_answer(answer.body)


def worker(plugin: str, nats: str | None, data_dir: Path, slot: int | None) -> None:
    """Become a worker of a plugin of the catalogue: this process joins, and never returns.

    Raises:
        NotFound: The catalogue has no such plugin; names those that it has.
        InvalidRequest: The catalogue cannot be read.
        Unavailable: No platform runs here, and none was named.
    """
    path = Path(os.environ.get("BKG_PLUGINS") or Path(__file__).parents[1] / "plugins.json")
    configs = {config.name: config for config in _read_catalogue(path)}
    config = configs.get(plugin)
    if config is None:
        raise NotFound(f"{path} has no plugin {plugin!r}; it has {', '.join(sorted(configs))}")
    env = os.environ | config.env
    env |= {"BKG_NATS_URL": broker_url(nats, data_dir), "BKG_DATA_DIR": str(data_dir)}
    env.pop("BKG_PARENT_PID", None)
    env.pop("BKG_SLOT", None)
    if slot is not None:
        env["BKG_SLOT"] = str(slot)
    if "/" in config.entrypoint:
        program = [config.entrypoint]
    else:
        # -P: a folder `services` or `bus` where the user stands must not be taken for ours.
        program = [sys.executable, "-P", "-m", config.entrypoint]
    try:
        os.execve(program[0], [*program, *config.args], env)  # noqa: S606 - no shell is wanted
    except OSError as error:
        raise NotFound(
            f"plugin {plugin!r}: {config.entrypoint} cannot be run: {error.strerror}"
        ) from None


def run(command: Coroutine[Any, Any, None]) -> None:
    """Run a command to its end; one expected error comes out alone, not in a group."""
    try:
        asyncio.run(command)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except BaseExceptionGroup as group:
        raise _first(group) from None


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _since(text: str | None) -> datetime | None:
    with _usage("--since"):
        return moment_in(text, "the time", now()) if text else None


@contextlib.contextmanager
def _usage(option: str) -> Iterator[None]:
    """Make what an option cannot be a wrong usage."""
    try:
        yield
    except InvalidRequest as error:
        raise typer.BadParameter(error.message, param_hint=option) from None


def _read_catalogue(path: Path) -> list[PluginConfig]:
    try:
        return codec.decode(path.read_bytes(), list[PluginConfig])
    except OSError as error:
        raise InvalidRequest(f"the catalogue {path} cannot be read: {error.strerror}") from None
    except BusError as error:
        raise InvalidRequest(f"the catalogue {path}: {error.message}") from None


def _read_json(text: str | None) -> bytes:
    """Return a request's body: the text itself, `@FILE`, or `-` for what stands on stdin."""
    if text is None:
        return b"{}"
    try:
        if text == "-":
            body = sys.stdin.buffer.read()
        elif text.startswith("@"):
            body = Path(text[1:]).read_bytes()
        else:
            body = text.encode()
    except OSError as error:
        raise typer.BadParameter(f"{text[1:]} cannot be read: {error.strerror}") from None
    try:
        msgspec.json.decode(body, type=msgspec.Raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"the request is not JSON: {error}") from None
    return body

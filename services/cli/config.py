"""The commands for a plugin's configuration: config, scale, history, rollback."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import typer
from rich.text import Text

from bus import codec
from bus import messages as m
from bus.client import Client
from bus.errors import InvalidRequest
from bus.subjects import (
    PLUGINS_CHECK,
    PLUGINS_CONFIGURE,
    PLUGINS_GET,
    PLUGINS_HISTORY,
    PLUGINS_ROLLBACK,
    PLUGINS_SCALE,
)
from services.cli.console import out, plain_table, show_json, show_plugins
from services.cli.plugins import WAY_S, connected


async def configure(
    name: str,
    file: str | None,
    assignments: Sequence[str],
    nats: str | None,
    data_dir: Path,
    *,
    check: bool,
    timeout_s: float,
    as_json: bool,
) -> None:
    """Print a plugin's configuration, or change it; `check` stores nothing.

    Raises:
        typer.Exit: It was checked, and is not allowed.
    """
    settings = [_assignment(text) for text in assignments]
    given = _read(file) if file is not None else None
    async with connected(nats, data_dir) as client:
        state = await client.call(PLUGINS_GET, _named(name))
        if state.config is None:
            raise InvalidRequest(f"{name} has no configuration here: it was started by hand")
        if given is None and not settings and not check:
            show_json(state.config) if as_json else _show_config(state.config)
            return
        wanted = _with(given or state.config, settings)
        # Refused when another change came between: the difference that is shown is the one made.
        ask = m.ConfigurePlugin(
            name=name, config=wanted, by="cli", timeout_s=timeout_s, revision=state.revision
        )
        found = await client.call(PLUGINS_CHECK, ask)
        if check:
            show_json(found) if as_json else _show_check(found)
            if not found.valid:
                raise typer.Exit(1)
            return
        after = await client.call(PLUGINS_CONFIGURE, ask, timeout_s=timeout_s + WAY_S)
    if as_json:
        show_json(after)
    else:
        _show_changes(found.changes)
        show_plugins([after])


async def scale(
    name: str,
    replicas: int,
    nats: str | None,
    data_dir: Path,
    *,
    timeout_s: float,
    as_json: bool,
) -> None:
    """Change how many replicas are wanted, and wait until they are there."""
    ask = m.ScalePlugin(name=_checked(name), replicas=replicas, by="cli", timeout_s=timeout_s)
    async with connected(nats, data_dir) as client:
        state = await client.call(PLUGINS_SCALE, ask, timeout_s=timeout_s + WAY_S)
    show_json(state) if as_json else show_plugins([state])


async def history(
    name: str, limit: int, nats: str | None, data_dir: Path, *, as_json: bool
) -> None:
    """Print the newest revisions of a plugin's desired state, newest first."""
    async with connected(nats, data_dir) as client:
        revisions = await _history(client, name, limit)
    if as_json:
        show_json(revisions)
        return
    table = plain_table("revision", "when", "who", "generation", "state", "changes")
    for one in revisions:
        table.add_row(
            str(one.revision),
            one.changed_at.astimezone().strftime("%Y-%m-%d %H:%M:%S"),
            one.changed_by,
            str(one.generation),
            "on" if one.enabled else "off",
            _changes(one.changes) or Text("-"),
        )
    out.print(table, soft_wrap=False)


async def rollback(
    name: str,
    revision: int,
    nats: str | None,
    data_dir: Path,
    *,
    timeout_s: float,
    as_json: bool,
) -> None:
    """Store an older configuration as a new revision, and wait until it is taken."""
    ask = m.RollbackPlugin(name=_checked(name), revision=revision, by="cli", timeout_s=timeout_s)
    async with connected(nats, data_dir) as client:
        state = await client.call(PLUGINS_ROLLBACK, ask, timeout_s=timeout_s + WAY_S)
        [newest] = await _history(client, name, 1)
    if as_json:
        show_json(state)
    else:
        _show_changes(newest.changes)
        show_plugins([state])


async def _history(client: Client, name: str, limit: int) -> list[m.PluginRevision]:
    ask = m.HistoryOfPlugin(name=_checked(name), limit=limit)
    return (await client.call(PLUGINS_HISTORY, ask)).revisions


def _named(name: str) -> m.NamePlugin:
    return m.NamePlugin(name=_checked(name), by="cli")


def _checked(name: str) -> str:
    """Return a plugin's name; raises InvalidRequest when it cannot be one."""
    return codec.convert({"name": name}, m.NamePlugin).name


def _read(file: str) -> m.PluginConfig:
    """Return the configuration in a file, or on stdin for `-`."""
    try:
        body = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise typer.BadParameter(f"{file} cannot be read: {error.strerror}") from None
    return codec.decode(body, m.PluginConfig)


def _assignment(text: str) -> tuple[list[str], Any]:
    """Return the path and the value of `name.inner=value`: JSON, or else text."""
    name, sign, value = text.partition("=")
    if not (sign and all(name.split("."))):
        raise typer.BadParameter(f"{text!r} is not NAME=VALUE", param_hint="--set")
    try:
        return name.split("."), json.loads(value)
    except ValueError:
        return name.split("."), value


def _with(config: m.PluginConfig, settings: Iterable[tuple[list[str], Any]]) -> m.PluginConfig:
    """Return a configuration with some settings changed."""
    changed = json.loads(json.dumps(config.settings))
    for path, value in settings:
        at = changed
        for name in path[:-1]:
            inner = at.setdefault(name, {})
            if not isinstance(inner, dict):
                raise InvalidRequest(f"settings.{name} is no object, so it has no {path[-1]!r}")
            at = inner
        at[path[-1]] = value
    return msgspec.structs.replace(config, settings=changed)


def _show_config(config: m.PluginConfig) -> None:
    text = codec.encode(config)
    if out.is_terminal:
        out.print_json(text.decode())
    else:
        sys.stdout.write(msgspec.json.format(text).decode() + "\n")


def _show_check(found: m.ConfigCheck) -> None:
    for error in found.errors:
        out.print(Text("error  ", "bold red").append(error.message, ""))
    _show_changes(found.changes)
    if found.valid and found.changes:
        how = "the instances are replaced one by one" if found.restarts else "no instance restarts"
        out.print(f"allowed; {how}")


def _show_changes(changes: Sequence[m.ConfigChange]) -> None:
    """Print one line for each change."""
    out.print(_changes(changes) or Text("nothing changes", "dim"))


def _changes(changes: Sequence[m.ConfigChange]) -> Text:
    lines = []
    for change in changes:
        line = Text(f"{change.field}  ", "cyan")
        line.append(_shown(change.before), "red").append(" -> ", "dim")
        lines.append(line.append(_shown(change.after), "green"))
    return Text("\n").join(lines)


def _shown(value: Any) -> str:
    return "-" if value is None else codec.encode(value).decode()

"""What the commands show: tables, colours, lines that change."""

import re
import sys
from collections.abc import Iterable
from types import TracebackType
from typing import Final, Self

import msgspec
from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from bus import codec
from bus.messages import Event, HostInfo, LogEvent, LogLevelSet, PluginState, now

COLOURS: Final = {
    "running": "green",
    "starting": "yellow",
    "stopping": "yellow",
    "degraded": "yellow",
    "stopped": "red",
    "error": "red",
}
HOST_COLOURS: Final = {"ready": "green", "draining": "yellow", "drained": "dim", "lost": "red"}
BAD_VERBS: Final = {"crashed", "degraded", "lost"}
LEVEL_COLOURS: Final = {"debug": "dim", "info": "", "warn": "yellow", "error": "bold red"}

# What a terminal obeys: colours, the cursor, its title, the direction of what follows. It has no
# width, so a table is right without it.
_OBEYED: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class _Console(Console):
    """A console on which no name and no log record is a command to the terminal."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Give the parts of what is shown; see `Console.render`."""
        for one in super().render(renderable, options):
            yield one if one.control else Segment(_OBEYED.sub("", one.text), one.style)


# Soft wrapping leaves it to the terminal to break lines, so that links can be copied whole.
out: Final = _Console(soft_wrap=True, highlight=False)


def show_json(value: object) -> None:
    """Print a message for a program: JSON, one line."""
    sys.stdout.write(codec.encode(value).decode() + "\n")
    sys.stdout.flush()


def show_answer(body: bytes) -> None:
    """Print an answer's JSON, indented and coloured on a terminal, as it came elsewhere."""
    if out.is_terminal:
        out.print_json(msgspec.json.format(body).decode())
    else:
        sys.stdout.write(body.decode() + "\n")


def plain_table(*titles: str) -> Table:
    """Return a table without lines, with a column for each title."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title in titles:
        table.add_column(title)
    return table


def show_plugins(plugins: Iterable[PluginState]) -> None:
    """Print a table of plugins, with the reason under each that does not run well."""
    table = plain_table(
        "plugin", "status", "ready", "pid", "port", "since", "restarts", "capabilities"
    )
    for plugin in plugins:
        since = min((i.since for i in plugin.instances), default=None)
        table.add_row(
            plugin.name,
            Text(plugin.status, COLOURS[plugin.status]),
            f"{plugin.replicas.ready}/{plugin.replicas.desired}",
            str(plugin.pid or "-"),
            str(plugin.port or "-"),
            age((now() - since).total_seconds()) if since else "-",
            str(sum(i.restarts for i in plugin.instances)),
            Text(", ".join(plugin.capabilities) or "-", overflow="fold"),
        )
        if plugin.error:
            table.add_row("", Text(plugin.error, "red"))
    out.print(table, soft_wrap=False)


def show_hosts(hosts: Iterable[HostInfo]) -> None:
    """Print a table of hosts."""
    table = plain_table(
        "host", "status", "memory free", "processors", "labels", "since", "replicas"
    )
    for host in hosts:
        table.add_row(
            host.name,
            Text(host.status, HOST_COLOURS[host.status]),
            f"{host.mem_available_bytes / 1e9:.1f} of {host.mem_total_bytes / 1e9:.1f} GB",
            str(host.processors),
            ", ".join(f"{key}={value}" for key, value in sorted(host.labels.items())) or "-",
            age((now() - host.since).total_seconds()),
            Text(", ".join(host.replicas) or "-", overflow="fold"),
        )
    out.print(table, soft_wrap=False)


def show_log(event: LogEvent) -> None:
    """Print one log record as a line."""
    line = Text()
    line.append(event.timestamp.astimezone().strftime("%H:%M:%S.%f")[:-3], "dim")
    line.append(f" {event.level:<5} ", LEVEL_COLOURS[event.level])
    line.append(event.plugin if event.slot is None else f"{event.plugin}/{event.slot}", "cyan")
    line.append(f" {event.message}")
    for name, value in event.fields.items():
        line.append(f" {name}=", "dim")
        line.append(str(value))
    out.print(line)


def show_event(event: Event) -> None:
    """Print one event as a line."""
    line = Text()
    line.append(event.timestamp.astimezone().strftime("%Y-%m-%d %H:%M:%S"), "dim")
    line.append(f" {event.kind} ", "dim")
    line.append(event.name if event.slot is None else f"{event.name}/{event.slot}", "cyan")
    line.append(f" {event.verb}", "bold red" if event.verb in BAD_VERBS else "")
    for name, value in (("on", event.host), ("by", event.by)):
        if value:
            line.append(f" {name} ", "dim").append(value)
    if event.cause:
        line.append(f": {event.cause}")
    out.print(line)


def show_log_level(told: LogLevelSet) -> None:
    """Print who was told to change its log level, and until when."""
    until = told.until.astimezone().strftime("%H:%M:%S")
    for one in told.told:
        where = f" on {one.host}" if one.host else ""
        out.print(f"{told.name}/{one.slot}{where}: {told.level} and worse until {until}")


class Progress:
    """One line for each part while the platform starts.

    On a terminal the lines change where they stand; elsewhere each change is a line of its own.
    """

    def __init__(self) -> None:
        self._lines: dict[str, Text] = {}
        self._live = Live(console=out, refresh_per_second=10) if out.is_terminal else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Let the lines stand as they are; what is printed next comes below them."""
        if self._live:
            self._live.stop()

    def say(self, part: str, text: str, colour: str = "yellow") -> None:
        """Show how it stands with a part."""
        line = Text(f"  {part:<12}").append(text, colour)
        if self._lines.get(part) == line:
            return
        self._lines[part] = line
        if self._live:
            self._live.update(Text("\n").join(self._lines.values()))
        else:
            out.print(line)


def age(seconds: float) -> str:
    """Return how long something is ago, in its largest unit."""
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"

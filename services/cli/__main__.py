"""`bkg`: the parser. Each command imports its file only when it is called.

Exit statuses: 0 done; 1 refused or failed, said why; 2 wrong usage; 3 not reachable; 4 not
allowed; 130 interrupted.
"""
# ruff: noqa: PLC0415 - late imports keep `bkg --help` fast

import os
import sys
from typing import Annotated, Literal

import typer

from services.cli.faces_parser import faces_app
from services.cli.models_parser import jobs_app, models_app
from services.cli.options import (
    CommandTimeout,
    DataDir,
    HostName,
    Nats,
    Platform,
    PluginName,
    Since,
    absolute,
    reaching,
)

app = typer.Typer(
    name="bkg",
    help="A self-hosted platform of AI plugins around a NATS broker.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
plugins_app = typer.Typer(no_args_is_help=True, help="Start, stop, scale and configure plugins.")
app.add_typer(plugins_app, name="plugins")
hosts_app = typer.Typer(help="Show hosts; drain one and take it back.")
app.add_typer(hosts_app, name="hosts")

app.add_typer(models_app, name="models")
app.add_typer(faces_app, name="faces")
app.add_typer(jobs_app, name="jobs")


@app.command()
def up(
    host: Annotated[
        str, typer.Option(envvar="BKG_HOST", help="Where the gateway listens.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(envvar="BKG_PORT", min=0, max=65535, help="0 takes a free one.")
    ] = 43119,
    data_dir: DataDir = None,
    nats: Annotated[
        str | None,
        typer.Option(envvar="BKG_NATS_URL", help="Use this broker.", show_default="one of our own"),
    ] = None,
    no_auth: Annotated[
        bool,
        typer.Option(
            "--no-auth", envvar="BKG_NO_AUTH", help="Ask nobody for a key; this host only."
        ),
    ] = False,
) -> None:
    """Run the platform in the foreground, until Ctrl-C."""
    from services.cli.up import Options, run

    options = Options(
        host=host, port=port, data_dir=absolute(data_dir), nats=nats or None, no_auth=no_auth
    )
    raise typer.Exit(run(options))


@app.command()
def worker(
    plugin: PluginName,
    nats: Nats = None,
    slot: Annotated[
        int | None,
        typer.Option(min=0, help="The place that it fills.", show_default="the lowest free one"),
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """Run one worker of a plugin here, and let it join a running platform."""
    from services.cli.plugins import worker

    worker(plugin, nats or None, absolute(data_dir), slot)


@app.command()
def join(
    nats: Annotated[
        str, typer.Argument(metavar="URL", help="The broker, nats://USER:PASSWORD@HOST:PORT.")
    ],
    name: Annotated[
        str | None, typer.Option(help="This host's name.", show_default="as the system has it")
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="What plugins can require; several times."),
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """Make this machine a host of a running platform, until Ctrl-C."""
    from services.cli.hosts import join

    join(nats, absolute(data_dir), name, label or [])


@hosts_app.callback(invoke_without_command=True)
@reaching
def hosts(context: typer.Context, at: Platform) -> None:
    """Show every host with what runs on it."""
    if context.invoked_subcommand is None:
        from services.cli import hosts, plugins

        plugins.run(hosts.show(at.nats, at.data_dir, as_json=at.as_json))


@hosts_app.command()
@reaching
def drain(
    host: HostName,
    timeout: CommandTimeout = 60.0,
    *,
    at: Platform,
) -> None:
    """Move a host's replicas away, and wait until none is left."""
    _host_command("drain", host, timeout, at)


@hosts_app.command()
@reaching
def undrain(
    host: HostName,
    timeout: CommandTimeout = 30.0,
    *,
    at: Platform,
) -> None:
    """Let a drained host take replicas again."""
    _host_command("undrain", host, timeout, at)


@app.command()
@reaching
def status(*, at: Platform) -> None:
    """Show every plugin with its state."""
    from services.cli import plugins

    plugins.run(plugins.status(at.nats, at.data_dir, as_json=at.as_json))


@plugins_app.command()
@reaching
def start(
    plugin: PluginName,
    timeout: CommandTimeout = 30.0,
    *,
    at: Platform,
) -> None:
    """Start a plugin, and wait until it is ready."""
    _command("start", plugin, timeout, at)


@plugins_app.command()
@reaching
def stop(
    plugin: PluginName,
    timeout: CommandTimeout = 30.0,
    *,
    at: Platform,
) -> None:
    """Stop a plugin, and wait until it has stopped."""
    _command("stop", plugin, timeout, at)


@plugins_app.command()
@reaching
def restart(
    plugin: PluginName,
    timeout: CommandTimeout = 30.0,
    *,
    at: Platform,
) -> None:
    """Replace every replica of a plugin in turn, and wait until the last is ready."""
    _command("restart", plugin, timeout, at)


@plugins_app.command("log-level")
@reaching
def log_level(
    plugin: PluginName,
    level: Annotated[
        Literal["debug", "info", "warn", "error"],
        typer.Argument(help="This one and worse are published."),
    ],
    *,
    lasts: Annotated[
        str, typer.Option("--for", metavar="TIME", help="As 90s, 10m, 2h; at most a day.")
    ] = "10m",
    at: Platform,
) -> None:
    """Change what a plugin's instances log, for a while; then it falls back by itself."""
    from services.cli import plugins

    plugins.run(
        plugins.log_level(plugin, level, at.nats, at.data_dir, lasts=lasts, as_json=at.as_json)
    )


@app.command()
@reaching
def events(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Plugin or host.", show_default="all")
    ] = None,
    *,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes.")] = False,
    since: Since = None,
    limit: Annotated[
        int, typer.Option("--limit", "-n", min=1, max=100_000, help="How many of the newest.")
    ] = 200,
    at: Platform,
) -> None:
    """Show what happened to plugins and hosts, the oldest first."""
    from services.cli import plugins

    plugins.run(
        plugins.events(
            name,
            at.nats,
            at.data_dir,
            follow=follow,
            since=since,
            limit=limit,
            as_json=at.as_json,
        )
    )


@plugins_app.command()
@reaching
def scale(
    plugin: PluginName,
    replicas: Annotated[
        int, typer.Argument(metavar="N", min=0, max=100, help="How many instances are wanted.")
    ],
    timeout: CommandTimeout = 30.0,
    *,
    at: Platform,
) -> None:
    """Change how many instances of a plugin there are, and wait until they are there."""
    from services.cli import config, plugins

    plugins.run(
        config.scale(plugin, replicas, at.nats, at.data_dir, timeout_s=timeout, as_json=at.as_json)
    )


@plugins_app.command()
@reaching
def config(
    plugin: PluginName,
    file: Annotated[
        str | None,
        typer.Argument(metavar="FILE", help="A whole configuration as JSON; - reads stdin."),
    ] = None,
    *,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Change one setting; may be repeated."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Say what would change, and store nothing.")
    ] = False,
    timeout: CommandTimeout = 30.0,
    at: Platform,
) -> None:
    """Show a plugin's configuration; with FILE or --set, change it and wait until it is taken."""
    from services.cli import config, plugins

    plugins.run(
        config.configure(
            plugin,
            file,
            assignments or [],
            at.nats,
            at.data_dir,
            check=check,
            timeout_s=timeout,
            as_json=at.as_json,
        )
    )


@plugins_app.command()
@reaching
def history(
    plugin: PluginName,
    limit: Annotated[
        int, typer.Option("--limit", "-n", min=1, max=64, help="How many of the newest.")
    ] = 20,
    *,
    at: Platform,
) -> None:
    """Show who changed what of a plugin, the newest first."""
    from services.cli import config, plugins

    plugins.run(config.history(plugin, limit, at.nats, at.data_dir, as_json=at.as_json))


@plugins_app.command()
@reaching
def rollback(
    plugin: PluginName,
    revision: Annotated[
        int, typer.Argument(metavar="REVISION", help="Whose configuration; see history.")
    ],
    timeout: CommandTimeout = 30.0,
    *,
    at: Platform,
) -> None:
    """Store an older configuration of a plugin again, and wait until it is taken."""
    from services.cli import config, plugins

    plugins.run(
        config.rollback(
            plugin, revision, at.nats, at.data_dir, timeout_s=timeout, as_json=at.as_json
        )
    )


@app.command()
@reaching
def logs(
    plugin: Annotated[
        str | None, typer.Argument(metavar="PLUGIN", help="Whose.", show_default="all")
    ] = None,
    *,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes.")] = False,
    level: Annotated[
        Literal["debug", "info", "warn", "error"] | None, typer.Option(help="This one and worse.")
    ] = None,
    slot: Annotated[
        int | None, typer.Option(min=0, help="Of which instance.", show_default="all")
    ] = None,
    since: Since = None,
    grep: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX", help="Matched with message and fields (RE2).", show_default="all"
        ),
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", "-n", min=1, max=100_000, help="How many of the newest.")
    ] = 200,
    at: Platform,
) -> None:
    """Show log records, the oldest first."""
    from services.cli import plugins

    plugins.run(
        plugins.logs(
            plugin,
            at.nats,
            at.data_dir,
            follow=follow,
            level=level,
            slot=slot,
            since=since,
            grep=grep,
            limit=limit,
            as_json=at.as_json,
        )
    )


@app.command()
@reaching
def call(
    capability: Annotated[str, typer.Argument(help="Such as candle.model.run.")],
    request: Annotated[
        str | None,
        typer.Argument(
            metavar="JSON", help="What to ask: JSON, @FILE, or - for stdin.", show_default="{}"
        ),
    ] = None,
    *,
    timeout: Annotated[float, typer.Option(min=0.1, max=600, help="Seconds to wait.")] = 30.0,
    at: Platform,
) -> None:
    """Ask a capability, and show its answer."""
    from services.cli import plugins

    plugins.run(
        plugins.call(
            capability,
            request,
            at.nats,
            at.data_dir,
            timeout_s=timeout,
            as_json=at.as_json,
        )
    )


@app.command()
def version() -> None:
    """Show the version."""
    from services.cli.running import version

    typer.echo(version())


def main() -> int:
    """Run a command line; return its exit status. No traceback reaches the user."""
    try:
        app()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except Exception as error:  # noqa: BLE001 - the rim: whatever it is becomes one sentence
        return _tell(error)
    return 0


def _tell(error: Exception) -> int:
    from bus.errors import BusError, NoSpace, NotAllowed, Unavailable

    if os.environ.get("BKG_DEBUG"):
        raise error
    if not isinstance(error, BusError):
        what = f"{type(error).__name__}: {error}"
        sys.stderr.write(f"bkg: an unexpected error: {what} (BKG_DEBUG=1 shows where)\n")
        return 1
    sys.stderr.write(f"bkg: {error.message}\n")
    # Whoever has no room was reached.
    if isinstance(error, Unavailable) and not isinstance(error, NoSpace):
        return 3
    return 4 if isinstance(error, NotAllowed) else 1


def _command(verb: str, plugin: str, timeout_s: float, at: Platform) -> None:
    from services.cli import plugins

    plugins.run(
        plugins.command(verb, plugin, at.nats, at.data_dir, timeout_s=timeout_s, as_json=at.as_json)
    )


def _host_command(verb: str, host: str, timeout_s: float, at: Platform) -> None:
    from services.cli import hosts, plugins

    plugins.run(
        hosts.command(verb, host, at.nats, at.data_dir, timeout_s=timeout_s, as_json=at.as_json)
    )


if __name__ == "__main__":
    sys.exit(main())

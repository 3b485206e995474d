"""Options that many commands share: each is declared once, and here."""

import functools
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import typer

DataDir = Annotated[
    Path | None,
    typer.Option(
        envvar="BKG_DATA_DIR", help="Where everything is kept.", show_default="the user's data"
    ),
]
Nats = Annotated[
    str | None,
    typer.Option(
        envvar="BKG_NATS_URL",
        help="The broker, nats://USER:PASSWORD@HOST:PORT.",
        show_default="that of the running platform",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
HostName = Annotated[str, typer.Argument(metavar="HOST", help="The host's name.")]
PluginName = Annotated[str, typer.Argument(metavar="PLUGIN", help="The plugin's name.")]
ModelName = Annotated[str, typer.Argument(metavar="NAME[:VERSION]", help="The model.")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="The job's id.")]
Since = Annotated[
    str | None,
    typer.Option(
        metavar="TIME", help="How long ago, as 15m, 2h, 1d, or a time.", show_default="ever"
    ),
]
CommandTimeout = Annotated[
    float, typer.Option("--timeout", min=0.1, max=600, help="Seconds to wait until it is done.")
]
LoadTimeout = Annotated[
    float, typer.Option("--timeout", min=0.1, max=3600, help="Seconds to wait until it is done.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")]
Labels = Annotated[
    list[str] | None,
    typer.Option("--label", metavar="KEY=VALUE", help="A label of the model; several times."),
]
Description = Annotated[str | None, typer.Option(help="What the model is.")]
Licence = Annotated[str | None, typer.Option(help="Its licence, such as Apache-2.0.")]
DatasetName = Annotated[str, typer.Argument(metavar="DATASET", help="The dataset.")]
CreateDataset = Annotated[
    bool, typer.Option("--create", help="Make the dataset if it is not there.")
]
Metadata = Annotated[
    list[str] | None,
    typer.Option("--metadata", metavar="KEY=VALUE", help="Kept with the entry; several times."),
]
Filter = Annotated[
    list[str] | None,
    typer.Option(
        "--filter", metavar="FIELD=VALUE",
        help="Only entries whose metadata say so; several times, of one field: any of them.",
    ),
]  # fmt: skip
Limit = Annotated[
    int, typer.Option("--limit", "-n", min=1, max=10_000_000, help="How many at most.")
]
Force = Annotated[bool, typer.Option("--force", help="Write over a file.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]

Command = TypeVar("Command", bound=Callable[..., None])


@dataclass(frozen=True)
class Platform:
    """Where a command finds the platform, and how it answers.

    Attributes:
        nats: The broker, if one was named.
        data_dir: Where everything is kept.
        as_json: Whether a program reads the answer.
    """

    nats: str | None
    data_dir: Path
    as_json: bool


def reaching(command: Command) -> Command:
    """Give a command the options `--nats`, `--data-dir` and `--json`; it takes them as `at`."""

    @functools.wraps(command)
    def with_options(
        *args: Any, nats: str | None, data_dir: Path | None, as_json: bool, **options: Any
    ) -> None:
        command(*args, at=Platform(nats or None, absolute(data_dir), as_json), **options)

    # The parser reads the signature: the command's own parameters, and these three behind them.
    given = inspect.signature(command)
    own = [one for one in given.parameters.values() if one.name != "at"]
    with_options.__signature__ = given.replace(parameters=[*own, *_SHARED])  # type: ignore[attr-defined]
    return with_options  # type: ignore[return-value]


_SHARED: Final = [
    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
    for name, default, kind in (
        ("nats", None, Nats),
        ("data_dir", None, DataDir),
        ("as_json", False, AsJson),
    )
]


def absolute(data_dir: Path | None) -> Path:
    """Return the data directory: the one that was given, or the user's."""
    from bus.settings import default_data_dir  # noqa: PLC0415 - keeps `bkg --help` fast

    return (data_dir or default_data_dir()).absolute()


def named(text: str, version: str | None = None) -> tuple[str, str | None]:
    """Split `NAME:VERSION`; the last colon counts, and a name that has one ends in another.

    Raises:
        typer.BadParameter: There is no name, or two versions.
    """
    name, colon, found = text.rpartition(":")
    if not colon:
        name, found = text, ""
    if not name:
        raise typer.BadParameter(f"{text!r} names no model; examples: iris, iris:2")
    if found and version and found != version:
        raise typer.BadParameter(f"{text} and --version {version} name two versions; give one")
    return name, found or version or None


def pairs(texts: Sequence[str] | None, option: str) -> dict[str, str] | None:
    """Read `KEY=VALUE`, each given by an option of its own; None if there is none.

    Raises:
        typer.BadParameter: One is no `KEY=VALUE`.
    """
    if not texts:
        return None
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise typer.BadParameter(f"{text!r} is no KEY=VALUE", param_hint=option)
        found[key] = value
    return found


def values(texts: Sequence[str] | None, option: str) -> dict[str, Any] | None:
    """Read `KEY=VALUE` as `pairs` does, with values that are JSON where they can be: `age=3`."""
    found = pairs(texts, option)
    return None if found is None else {key: _json_or_text(value) for key, value in found.items()}


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text

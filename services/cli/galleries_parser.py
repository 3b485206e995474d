"""`bkg faces`: the parser for datasets, and the persons in them; see `faces_parser`."""
# ruff: noqa: PLC0415 - late imports keep `bkg --help` fast

from pathlib import Path
from typing import Annotated, Literal

import typer

from services.cli.options import (
    CreateDataset,
    DatasetName,
    DryRun,
    Filter,
    Force,
    Limit,
    Platform,
    Yes,
    reaching,
)

galleries_app = typer.Typer()

DATASETS, PERSONS, DONE = "Datasets", "Entries and persons", "What was done"

Threshold = Annotated[
    str | None,
    typer.Option(
        metavar="COSINE|default", help="From where on a search names somebody.",
        show_default="as it is",
    ),
]  # fmt: skip
VerifyThreshold = Annotated[
    str | None,
    typer.Option(
        metavar="COSINE|default", help="From where on two faces are one person.",
        show_default="as it is",
    ),
]  # fmt: skip
Scoring = Annotated[
    Literal["best", "mean"] | None,
    typer.Option(
        help="What decides on a person: their best entry, or the mean of all.",
        show_default="as it is",
    ),
]
KeepImages = Annotated[
    bool | None,
    typer.Option(help="Keep the photos, to look at and to embed anew.", show_default="as it is"),
]
Below = Annotated[
    Literal["reject", "warn", "off"] | None,
    typer.Option(
        "--quality", help="What a face below the bounds leads to.", show_default="as it is"
    ),
]
SizeMin = Annotated[
    str | None,
    typer.Option(
        "--size-min", metavar="PIXELS|none", help="Shorter side of a face.", show_default="as it is"
    ),
]
SharpnessMin = Annotated[
    str | None,
    typer.Option(
        metavar="VARIANCE|none", help="Of the Laplacian; low is blurred.", show_default="as it is"
    ),
]
ScoreMin = Annotated[
    str | None,
    typer.Option(
        metavar="SCORE|none", help="How sure the detector has to be.", show_default="as it is"
    ),
]
YawMax = Annotated[
    str | None,
    typer.Option(
        metavar="DEGREES|none", help="How far a face may be turned.", show_default="as it is"
    ),
]
Person = Annotated[
    str | None, typer.Option(metavar="NAME", help="Only theirs.", show_default="everybody's")
]
Detach = Annotated[bool, typer.Option("--detach", help="Do not wait for the job that does it.")]
After = Annotated[
    str | None, typer.Option(metavar="X", help="Go on behind this one.", show_default="the first")
]


@galleries_app.command(rich_help_panel=DATASETS)
@reaching
def datasets(*, at: Platform) -> None:
    """List the datasets.

    Example: bkg faces datasets
    """
    from services.cli import galleries, plugins

    plugins.run(galleries.list_all(at))


@galleries_app.command(rich_help_panel=DATASETS)
@reaching
def show(dataset: DatasetName, *, at: Platform) -> None:
    """Show a dataset: how much is in it, what made its vectors, and how it is set.

    Example: bkg faces show staff
    """
    from services.cli import galleries, plugins

    plugins.run(galleries.show(dataset, at))


def _changing(name: str, text: str) -> None:
    """Add the command that makes a dataset, or the one that sets one: their options are the same.

    Args:
        name: `create` or `set`.
        text: Its help.
    """

    @reaching
    def command(
        dataset: DatasetName,
        *,
        threshold: Threshold = None,
        verify_threshold: VerifyThreshold = None,
        scoring: Scoring = None,
        keep_images: KeepImages = None,
        quality: Below = None,
        size_min: SizeMin = None,
        sharpness_min: SharpnessMin = None,
        score_min: ScoreMin = None,
        yaw_max: YawMax = None,
        at: Platform,
    ) -> None:
        from services.cli import galleries, plugins
        from services.cli.dataset_settings import Changes

        changes = Changes(
            threshold=threshold,
            verify_threshold=verify_threshold,
            scoring=scoring,
            keep_images=keep_images,
            quality=quality,
            bounds={
                "size_min_px": size_min,
                "sharpness_min": sharpness_min,
                "score_min": score_min,
                "yaw_max": yaw_max,
            },
        )
        do = galleries.create if name == "create" else galleries.configure
        plugins.run(do(dataset, changes, at))

    galleries_app.command(name, help=text, rich_help_panel=DATASETS)(command)


_changing(
    "create",
    "Make a dataset; one that is there stays as it is.\n\n"
    "Example: bkg faces create staff --keep-images --quality reject --size-min 48",
)
_changing(
    "set",
    "Change how a dataset is set; what is not given stays.\n\n"
    "Example: bkg faces set staff --threshold 0.5 --yaw-max 60",
)


@galleries_app.command(rich_help_panel=DATASETS)
@reaching
def delete(
    dataset: DatasetName, *, dry_run: DryRun = False, yes: Yes = False, at: Platform
) -> None:
    """Delete a dataset with all that it has; asks for its name before.

    Example: bkg faces delete staff --dry-run
    """
    from services.cli import galleries, plugins

    plugins.run(galleries.delete(dataset, at, dry_run=dry_run, yes=yes))


@galleries_app.command("import", rich_help_panel=DATASETS)
@reaching
def bring_in(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSON, .npz or Parquet.")],
    *,
    dataset: Annotated[
        str, typer.Option("--dataset", "-d", metavar="NAME", help="Where its entries go.")
    ],
    create: CreateDataset = False,
    kind: Annotated[
        Literal["json", "npz", "parquet"] | None,
        typer.Option("--format", help="What it is.", show_default="as the file says"),
    ] = None,
    existing: Annotated[
        Literal["skip", "replace", "fail"],
        typer.Option(help="What happens with entries that are there already."),
    ] = "skip",
    settings: Annotated[
        Literal["take", "keep"] | None,
        typer.Option(
            help="Whether the dataset is set as the file says.",
            show_default="take if the import makes it, else keep",
        ),
    ] = None,
    detach: Detach = False,
    at: Platform,
) -> None:
    """Bring a file of entries into a dataset; all of it is checked before any of it is stored.

    Rejections come along where whom they concern is there, and settings as --settings says.

    Example: bkg faces import staff.npz --dataset staff --existing replace
    """
    from services.cli import gallery_files, plugins

    plugins.run(
        gallery_files.bring_in(
            file,
            dataset,
            at,
            create=create,
            kind=kind,
            existing=existing,
            settings=settings,
            detach=detach,
        )
    )


@galleries_app.command("export", rich_help_panel=DATASETS)
@reaching
def bring_out(
    dataset: DatasetName,
    file: Annotated[str, typer.Argument(metavar="FILE", help="Where to: .json, .npz or .parquet.")],
    *,
    kind: Annotated[
        Literal["json", "npz", "parquet"] | None,
        typer.Option("--format", help="As what.", show_default="as FILE ends"),
    ] = None,
    force: Force = False,
    at: Platform,
) -> None:
    """Write a dataset to a file: entries, persons, rejections and settings, but no photos.

    Example: bkg faces export staff staff.parquet
    """
    from services.cli import gallery_files, plugins

    plugins.run(gallery_files.bring_out(dataset, file, at, kind=kind, force=force))


@galleries_app.command(rich_help_panel=DATASETS)
@reaching
def reembed(
    dataset: DatasetName,
    *,
    into: Annotated[str, typer.Option(metavar="NAME", help="The dataset that it makes.")],
    detach: Detach = False,
    at: Platform,
) -> None:
    """Embed the kept photos of a dataset anew, into another dataset.

    Example: bkg faces reembed staff --into staff-2
    """
    from services.cli import gallery_files, plugins

    plugins.run(gallery_files.reembed(dataset, into, at, detach=detach))


@galleries_app.command(rich_help_panel=PERSONS)
@reaching
def entries(
    dataset: DatasetName,
    *,
    person: Person = None,
    where: Filter = None,
    limit: Limit = 100,
    after: After = None,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="With their vectors; in JSON alone.")
    ] = False,
    at: Platform,
) -> None:
    """List the entries of a dataset.

    Example: bkg faces entries staff --filter team=vision
    """
    from services.cli import galleries, plugins

    plugins.run(
        galleries.entries(
            dataset, at, person=person, where=where, limit=limit, after=after, embeddings=embeddings
        )
    )


@galleries_app.command(rich_help_panel=PERSONS)
@reaching
def subjects(
    dataset: DatasetName, *, limit: Limit = 100, after: After = None, at: Platform
) -> None:
    """List the persons of a dataset.

    Example: bkg faces subjects staff
    """
    from services.cli import galleries, plugins

    plugins.run(galleries.subjects(dataset, at, limit=limit, after=after))


@galleries_app.command(rich_help_panel=PERSONS)
@reaching
def rename(
    dataset: DatasetName,
    old: Annotated[str, typer.Argument(metavar="OLD", help="The person.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help="Their name from now on.")],
    *,
    at: Platform,
) -> None:
    """Give a person another name.

    Example: bkg faces rename staff anna "Anna Berg"
    """
    from services.cli import galleries, plugins

    plugins.run(galleries.rename(dataset, old, new, at))


@galleries_app.command(rich_help_panel=PERSONS)
@reaching
def merge(
    dataset: DatasetName,
    persons: Annotated[
        list[str], typer.Argument(metavar="FROM... INTO", help="Who is merged, and into whom.")
    ],
    *,
    at: Platform,
) -> None:
    """Make one person of several; the last one named is who they become.

    Example: bkg faces merge staff anna anni "Anna Berg"
    """
    from services.cli import galleries, plugins

    plugins.run(galleries.merge(dataset, persons, at))


@galleries_app.command(rich_help_panel=PERSONS)
@reaching
def move(
    dataset: DatasetName,
    entry: Annotated[str, typer.Argument(metavar="ENTRY", help="The entry.")],
    person: Annotated[
        str | None, typer.Argument(metavar="[PERSON]", help="Whom it shows.", show_default=False)
    ] = None,
    *,
    nobody: Annotated[bool, typer.Option("--nobody", help="It shows nobody.")] = False,
    at: Platform,
) -> None:
    """Say whom an entry shows.

    Example: bkg faces move staff 3f9a "Anna Berg"
    """
    from services.cli import galleries, plugins

    plugins.run(galleries.move(dataset, entry, person, at, nobody=nobody))


@galleries_app.command(rich_help_panel=PERSONS)
@reaching
def rm(
    dataset: DatasetName,
    *,
    entry: Annotated[str | None, typer.Option(metavar="ID", help="This entry.")] = None,
    person: Annotated[
        str | None, typer.Option(metavar="NAME", help="This person, with all their entries.")
    ] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    at: Platform,
) -> None:
    """Delete an entry or a person for good; asks before.

    Example: bkg faces rm staff --person anna --dry-run
    """
    from services.cli import galleries, plugins

    plugins.run(galleries.remove(dataset, at, entry=entry, person=person, dry_run=dry_run, yes=yes))


@galleries_app.command(rich_help_panel=PERSONS)
@reaching
def reject(
    dataset: DatasetName,
    *,
    person: Annotated[str | None, typer.Option(metavar="NAME", help="Who it is not.")] = None,
    entry: Annotated[
        str | None, typer.Option(metavar="ID", help="The entry with the face.")
    ] = None,
    withdraw: Annotated[
        str | None, typer.Option(metavar="ID", help="Take this rejection back instead.")
    ] = None,
    at: Platform,
) -> None:
    """Say of an entry's face that it is not a person: such a face is not named as them again.

    Example: bkg faces reject staff --person anna --entry 3f9a
    """
    from services.cli import galleries, plugins

    plugins.run(galleries.reject(dataset, at, person=person, entry=entry, withdraw=withdraw))


@galleries_app.command(rich_help_panel=DONE)
@reaching
def history(dataset: DatasetName, *, limit: Limit = 100, after: After = None, at: Platform) -> None:
    """Show what was done to a dataset and by whom, the newest first.

    Example: bkg faces history staff --limit 20
    """
    from services.cli import galleries, plugins

    plugins.run(galleries.history(dataset, at, limit=limit, after=after))


@galleries_app.command(rich_help_panel=DONE)
@reaching
def imports(dataset: DatasetName, *, at: Platform) -> None:
    """Show the imports of a dataset, the newest first.

    Example: bkg faces imports staff
    """
    from services.cli import galleries, plugins

    plugins.run(galleries.imports(dataset, at))


@galleries_app.command(rich_help_panel=DONE)
@reaching
def undo(
    dataset: DatasetName,
    imported: Annotated[str, typer.Argument(metavar="IMPORT", help="Its id; see imports.")],
    *,
    dry_run: DryRun = False,
    yes: Yes = False,
    at: Platform,
) -> None:
    """Take back what an import added; asks before.

    Example: bkg faces undo staff k3f9 --dry-run
    """
    from services.cli import galleries, plugins

    plugins.run(galleries.undo(dataset, imported, at, dry_run=dry_run, yes=yes))

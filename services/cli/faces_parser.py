"""`bkg faces`: the parser for photos. Each command imports its file only when it is called."""
# ruff: noqa: PLC0415 - late imports keep `bkg --help` fast

from pathlib import Path
from typing import Annotated, Literal

import typer

from services.cli.galleries_parser import galleries_app
from services.cli.options import (
    CreateDataset,
    Filter,
    Force,
    Metadata,
    Platform,
    reaching,
    values,
)

faces_app = typer.Typer(
    no_args_is_help=True,
    help="Find, compare and search faces; keep datasets of them, and the persons in them.",
)

PANEL = "Photos"

Photo = Annotated[str, typer.Argument(metavar="IMAGE", help="A photo's file; - reads stdin.")]
InDataset = Annotated[
    str | None,
    typer.Option("--dataset", "-d", metavar="NAME", help="The dataset.", show_default="default"),
]
Quality = Annotated[
    Literal["reject", "warn", "off"] | None,
    typer.Option(
        help="What a face below the dataset's bounds leads to.",
        show_default="as the dataset has it",
    ),
]


@faces_app.command(rich_help_panel=PANEL)
@reaching
def detect(
    image: Photo,
    *,
    score_min: Annotated[
        float | None,
        typer.Option(
            "--score-min", min=0.01, max=0.99, help="How sure the detector has to be.",
            show_default="as the plugin is set",
        ),
    ] = None,
    faces_max: Annotated[
        int, typer.Option("--max", min=1, max=1_000, help="The largest so many.")
    ] = 64,
    small: Annotated[
        bool, typer.Option("--small", help="Look for small faces in large photos; takes longer.")
    ] = False,
    at: Platform,
) -> None:  # fmt: skip
    """Show the faces of a photo: where, how large, how sharp, how far turned.

    Example: bkg faces detect crowd.jpg --small
    """
    from services.cli import faces, plugins

    plugins.run(faces.detect(image, at, score_min=score_min, faces_max=faces_max, small=small))


@faces_app.command(rich_help_panel=PANEL)
@reaching
def encode(
    image: Photo,
    *,
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", "-d", metavar="NAME", help="Enrol it there.", show_default="no"),
    ] = None,
    entry: Annotated[
        str | None,
        typer.Option(metavar="ID", help="The entry's id; one of that id is replaced.",
                     show_default="a new one"),
    ] = None,
    person: Annotated[
        str | None, typer.Option(metavar="NAME", help="Whom it shows.", show_default="nobody")
    ] = None,
    metadata: Metadata = None,
    quality: Quality = None,
    at: Platform,
) -> None:  # fmt: skip
    """Turn the largest face of a photo into its embedding; with --dataset, enrol it.

    Example: bkg faces encode anna.jpg --dataset staff --person anna --metadata team=vision
    """
    from services.cli import faces, plugins

    plugins.run(
        faces.encode(
            image, at, dataset=dataset, entry=entry, person=person, metadata=metadata,
            quality=quality,
        )
    )  # fmt: skip


@faces_app.command(rich_help_panel=PANEL)
@reaching
def search(
    image: Photo,
    *,
    dataset: InDataset = None,
    top: Annotated[
        int, typer.Option("--top", "-n", min=1, max=1_000, help="How many at most.")
    ] = 5,
    by: Annotated[
        Literal["entry", "person"], typer.Option(help="A line for each entry, or each person.")
    ] = "entry",
    threshold: Annotated[
        float | None,
        typer.Option(min=-1, max=1, help="Leave out what is below this cosine.", show_default="0"),
    ] = None,
    where: Filter = None,
    every_face: Annotated[
        bool, typer.Option("--every-face", help="Search for each face, not only the largest.")
    ] = False,
    at: Platform,
) -> None:
    """Say who the largest face of a photo is, and show the nearest entries.

    Example: bkg faces search visitor.jpg --dataset staff --by person
    """
    from services.cli import faces, plugins

    plugins.run(
        faces.search(
            image, at, dataset=dataset, top=top, by=by, threshold=threshold, where=where,
            every_face=every_face,
        )
    )  # fmt: skip


@faces_app.command(rich_help_panel=PANEL)
@reaching
def verify(
    a: Annotated[str, typer.Argument(metavar="A", help="A photo's file; - reads stdin.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    *,
    rate: Annotated[
        float | None,
        typer.Option(
            min=1e-12, max=0.999, help="How often strangers may be taken for one person, as 1e-4.",
            show_default="as the threshold has it",
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            min=-1, max=1, help="Cosine from which they are one person.",
            show_default="the embedder's own",
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", "-d", metavar="NAME", help="Whose threshold counts.",
                     show_default="none's"),
    ] = None,
    at: Platform,
) -> None:  # fmt: skip
    """Say whether the largest faces of two photos are one person.

    Example: bkg faces verify passport.jpg door.jpg --rate 1e-4
    """
    from services.cli import faces, plugins

    plugins.run(faces.verify(a, b, at, rate=rate, threshold=threshold, dataset=dataset))


@faces_app.command(rich_help_panel=PANEL)
@reaching
def enrol(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of photos.")],
    *,
    dataset: Annotated[
        str, typer.Option("--dataset", "-d", metavar="NAME", help="Where they go.")
    ],
    create: CreateDataset = False,
    subject_from: Annotated[
        Literal["folder", "file", "none"],
        typer.Option(
            help="What says whom a photo shows: the first folder below DIR, or its own name "
            "without a number at the end."
        ),
    ] = "folder",
    metadata: Metadata = None,
    quality: Quality = None,
    one_face: Annotated[
        bool, typer.Option("--one-face", help="Refuse photos that show several faces.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Enrol anew also what the dataset has already.")
    ] = False,
    width: Annotated[
        int | None,
        typer.Option(
            "--at-a-time", min=1, max=1_000, help="How many photos are under way.",
            show_default="as the workers have processors",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write there what became of each file, as lines of JSON.",
            show_default="no report",
        ),
    ] = None,
    at: Platform,
) -> None:  # fmt: skip
    """Enrol every photo below a folder; say which failed, and why.

    What was broken off goes on where it was: give the same command again.

    Example: bkg faces enrol photos --dataset staff --report enrolled.jsonl
    """
    from services.cli import enrolment, plugins

    wanted = enrolment.Wanted(
        folder=folder,
        dataset=dataset,
        create=create,
        subject_from=subject_from,
        metadata=values(metadata, "--metadata") or {},
        quality=quality,
        one_face=one_face,
        again=again,
        width=width,
        report=report,
    )
    plugins.run(enrolment.enrol(wanted, at))


@faces_app.command(rich_help_panel=PANEL)
@reaching
def sheet(
    dataset: Annotated[
        str | None,
        typer.Argument(metavar="[DATASET]", help="The dataset.", show_default="default"),
    ] = None,
    *,
    image: Annotated[
        str | None,
        typer.Option(metavar="IMAGE", help="A photo: who its faces are, as the dataset knows."),
    ] = None,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="Where to: .html or .png.")
    ] = "sheet.html",
    person: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only this one.", show_default="all")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=200, help="How many entries at most.")] = 60,
    after: Annotated[
        str | None, typer.Option(metavar="ID", help="Go on behind this entry.")
    ] = None,
    force: Force = False,
    at: Platform,
) -> None:
    """Draw a contact sheet of a dataset, or of a photo and who its faces are.

    Example: bkg faces sheet staff --image party.jpg -o party.png
    """
    from services.cli import faces, plugins

    plugins.run(
        faces.sheet(
            dataset, at, image=image, output=output, person=person, limit=limit, after=after,
            force=force,
        )
    )  # fmt: skip


faces_app.add_typer(galleries_app)

"""The commands about datasets of faces, and the entries and persons in them."""

import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, Final

import msgspec
import typer
from rich.text import Text

from bus import codec
from bus import messages as m
from bus.client import Client
from bus.errors import Internal, NotFound
from bus.subjects import DATASET_MANAGE
from services.cli.console import age, out, plain_table, show_json
from services.cli.dataset_settings import Changes, show_dataset
from services.cli.faces import as_line, filter_of
from services.cli.options import Platform
from services.cli.plugins import connected

# Clearing a large dataset out of the stream takes its time.
MANAGE_S: Final = 60.0
PAGE_MAX: Final = 1_000
# Vectors in JSON: so many of 1,024 values stay below the broker's limit.
VECTORS_MAX: Final = 250
STATE_COLOURS: Final = {"done": "green", "running": "yellow", "failed": "red", "undone": "dim"}


# --- Datasets -------------------------------------------------------------------------------------


async def list_all(at: Platform) -> None:
    """Print every dataset."""
    found = (await _manage(at, "list")).datasets
    if at.as_json:
        show_json(found)
        return
    table = plain_table("dataset", "entries", "persons", "embedder", "changed", "created")
    for one in found:
        table.add_row(
            Text(one.id, "cyan", overflow="fold"),
            f"{one.entries:,}",
            f"{one.subjects:,}",
            f"{one.embedder}, {one.dimensions} values",
            f"{_age(one.updated_at)} ago",
            f"{_age(one.created_at)} ago",
        )
    out.print(table, soft_wrap=False)


async def show(dataset: str, at: Platform) -> None:
    """Print all that is known of a dataset."""
    show_dataset(await _stats(dataset, at), at)


async def create(dataset: str, changes: Changes, at: Platform) -> None:
    """Make a dataset, or print the one that is there; settings go to a new one alone."""
    settings = changes.applied_to(m.DatasetSettings()) if changes else None
    made = await _manage(at, "create", dataset=dataset, settings=settings)
    show_dataset(_in_full(made), at)


async def configure(dataset: str, changes: Changes, at: Platform) -> None:
    """Change a dataset's settings; what is not given stays.

    Raises:
        typer.BadParameter: Nothing is to be changed.
        Conflict: Somebody else has changed them at the same moment.
    """
    if not changes:
        raise typer.BadParameter("nothing to change: give --threshold, --quality or another one")
    async with connected(at.nats, at.data_dir) as client:
        before = _in_full(await ask_dataset(client, "stats", dataset=dataset))
        settings = changes.applied_to(before.settings)
        # Whoever has changed them meanwhile is not overruled.
        after = await ask_dataset(
            client, "configure", dataset=dataset, settings=settings, revision=before.revision
        )
    show_dataset(_in_full(after), at)


async def delete(dataset: str, at: Platform, *, dry_run: bool, yes: bool) -> None:
    """Delete a dataset with all that it has; says what would go, and asks for its name."""
    _check_somebody(at, yes=yes or dry_run)
    stats = await _stats(dataset, at)
    if dry_run or not at.as_json:
        _show_going(stats, at)
    if dry_run:
        return
    if not yes:
        named = typer.prompt("Type the dataset's name to delete it for good", err=True)
        if named != dataset:
            sys.stderr.write(f"bkg: {named!r} is not {dataset!r}; nothing was deleted\n")
            raise typer.Exit(1)
    answer = await _manage(at, "delete-dataset", dataset=dataset)
    if at.as_json:
        show_json(_changed(answer))
    else:
        out.print(Text(f"{dataset} is deleted"))
        _show_warnings(answer)


# --- Entries and persons --------------------------------------------------------------------------


async def entries(
    dataset: str,
    at: Platform,
    *,
    person: str | None,
    where: Sequence[str] | None,
    limit: int,
    after: str | None,
    embeddings: bool,
) -> None:
    """Print the entries of a dataset, by id."""
    fields = {
        "dataset": dataset,
        "subject": person,
        "filter": filter_of(where),
        "embeddings": embeddings,
    }
    found, more, total = await _pages(
        at, "entries", lambda page: page.entries, limit=limit, after=after, fields=fields
    )
    if at.as_json:
        show_json({"entries": found, "next": more, "total": total})
        return
    table = plain_table("entry", "person", "enrolled", "quality", "image", "import", "metadata")
    for one in found:
        measures = (f"{name} {value:.4g}" for name, value in sorted(one.quality.items()))
        table.add_row(
            Text(one.id, "cyan", overflow="fold"),
            Text(one.subject or "-", overflow="fold"),
            f"{_age(one.last_seen)} ago",
            Text(", ".join(measures) or "-", overflow="fold"),
            "kept" if one.image else "-",
            one.imported or "-",
            Text(as_line(one.metadata), "dim", overflow="fold"),
        )
    out.print(table, soft_wrap=False)
    _show_more(len(found), more, total)


async def subjects(dataset: str, at: Platform, *, limit: int, after: str | None) -> None:
    """Print the persons of a dataset, by name."""
    found, more, total = await _pages(
        at,
        "subjects",
        lambda page: page.subjects,
        limit=limit,
        after=after,
        fields={"dataset": dataset},
    )
    if at.as_json:
        show_json({"subjects": found, "next": more, "total": total})
        return
    table = plain_table("person", "entries", "last enrolled", "rejections")
    for one in found:
        table.add_row(
            Text(one.id, "cyan", overflow="fold"),
            f"{one.entries:,}",
            f"{_age(one.last_seen)} ago",
            Text(", ".join(one.rejections) or "-", overflow="fold"),
        )
    out.print(table, soft_wrap=False)
    _show_more(len(found), more, total)


async def rename(dataset: str, old: str, new: str, at: Platform) -> None:
    """Give a person another name."""
    answer = await _manage(at, "rename-subject", dataset=dataset, subject=old, into=new)
    _show_change(answer, at, f"{old} is {new} now")


async def merge(dataset: str, persons: Sequence[str], at: Platform) -> None:
    """Make one person of several; the last one named is who they become."""
    *sources, into = persons
    if not sources:
        raise typer.BadParameter("name who is merged, and behind them into whom")
    answer = await _manage(at, "merge-subjects", dataset=dataset, subjects=list(sources), into=into)
    _show_change(answer, at, f"{', '.join(sources)} {'is' if len(sources) == 1 else 'are'} {into}")


async def move(dataset: str, entry: str, person: str | None, at: Platform, *, nobody: bool) -> None:
    """Say whom an entry shows.

    Raises:
        typer.BadParameter: Neither a person nor nobody is named, or both.
    """
    if (person is None) != nobody:
        raise typer.BadParameter("name the person whom it shows, or give --nobody")
    answer = await _manage(at, "move-entry", dataset=dataset, entry_id=entry, into=person)
    _show_change(answer, at, f"{entry} shows {person or 'nobody'}")


async def remove(
    dataset: str,
    at: Platform,
    *,
    entry: str | None,
    person: str | None,
    dry_run: bool,
    yes: bool,
) -> None:
    """Delete an entry, or a person with all their entries; says what would go, and asks.

    Raises:
        typer.BadParameter: Neither is named, or both, or nobody can be asked.
    """
    if (entry is None) == (person is None):
        raise typer.BadParameter("name what goes: --entry E or --person P")
    what = f"the entry {entry}" if entry is not None else f"{person}"
    action = "remove-entry" if entry is not None else "remove-subject"
    fields = {"dataset": dataset, "entry_id": entry, "subject": person}
    await _with_consent(action, fields, at, what=what, dry_run=dry_run, yes=yes)


async def reject(
    dataset: str, at: Platform, *, person: str | None, entry: str | None, withdraw: str | None
) -> None:
    """Say of an entry's face that it is not a person; or take that back.

    Raises:
        typer.BadParameter: It is not said of whom and what.
    """
    if withdraw is not None:
        if person or entry:
            raise typer.BadParameter("--withdraw names a rejection, and nothing beside it")
        answer = await _manage(at, "withdraw-rejection", dataset=dataset, rejection=withdraw)
        _show_change(answer, at, f"the rejection {withdraw} is withdrawn")
        return
    if person is None or entry is None:
        raise typer.BadParameter("say who it is not, and which face: --person P --entry E")
    answer = await _manage(at, "reject-match", dataset=dataset, subject=person, entry_id=entry)
    _show_change(
        answer,
        at,
        f"faces like {entry} are not {person}; "
        f"`bkg faces reject {dataset} --withdraw {answer.rejection}` takes it back",
    )


# --- What was done --------------------------------------------------------------------------------


async def history(dataset: str, at: Platform, *, limit: int, after: str | None) -> None:
    """Print what was done to a dataset, the newest first."""
    found, more, _ = await _pages(
        at,
        "history",
        lambda page: page.history,
        limit=limit,
        after=after,
        fields={"dataset": dataset},
    )
    if at.as_json:
        show_json({"history": found, "next": more})
        return
    for change in found:
        line = Text(change.at.astimezone().strftime("%Y-%m-%d %H:%M:%S"), "dim")
        line.append(f" {change.action}", "cyan")
        for name, value in (
            ("entry", change.entry),
            ("person", change.subject),
            ("into", change.into),
            ("import", change.imported),
            ("entries", change.count),
            ("by", change.by),
        ):
            if value is not None:
                line.append(f" {name} ", "dim").append(str(value))
        out.print(line)
    _show_more(len(found), more, None)


async def imports(dataset: str, at: Platform) -> None:
    """Print the imports of a dataset, the newest first."""
    found = (await _manage(at, "imports", dataset=dataset)).imports or []
    if at.as_json:
        show_json(found)
        return
    table = plain_table(
        "import", "state", "began", "added", "replaced", "skipped", "rejections", "format", "by",
        "from",
    )  # fmt: skip
    for one in found:
        table.add_row(
            Text(one.id, "cyan"),
            Text(one.state, STATE_COLOURS[one.state]),
            f"{_age(one.at)} ago",
            f"{one.added:,}",
            f"{one.replaced:,}",
            f"{one.skipped:,}",
            f"{one.rejections:,}",
            one.format,
            one.by or "-",
            Text(one.source, overflow="fold"),
        )
    out.print(table, soft_wrap=False)


async def undo(dataset: str, imported: str, at: Platform, *, dry_run: bool, yes: bool) -> None:
    """Take back what an import added; says how much that is, and asks."""
    fields = {"dataset": dataset, "imported": imported}
    what = f"what the import {imported} added"
    await _with_consent("undo-import", fields, at, what=what, dry_run=dry_run, yes=yes)


# --- Asking ---------------------------------------------------------------------------------------


async def ask_dataset(client: Client, action: str, **fields: Any) -> m.DatasetList:
    """Ask for a change of the datasets, or to be told of them.

    Raises:
        BusError: It was refused, or nobody can answer.
    """
    said = {key: value for key, value in fields.items() if value is not None}
    # Settings are a message already, whose bounds at None have to stay so.
    settings = said.pop("settings", None)
    ask = codec.convert(said | {"action": action, "by": "cli"}, m.ManageDataset)
    if settings is not None:
        ask = msgspec.structs.replace(ask, settings=settings)
    return await client.call(DATASET_MANAGE, ask, timeout_s=MANAGE_S)


async def have(client: Client, dataset: str, *, create: bool) -> m.DatasetStats:
    """Return what is known of a dataset; have it made, if that is wanted.

    Raises:
        NotFound: It is not there, and is not to be made.
    """
    if create:
        await ask_dataset(client, "create", dataset=dataset)
    try:
        return _in_full(await ask_dataset(client, "stats", dataset=dataset))
    except NotFound as error:
        raise NotFound(
            f"{error.message}; `bkg faces create {dataset}` makes it, or --create here"
        ) from None


async def _manage(at: Platform, action: str, **fields: Any) -> m.DatasetList:
    async with connected(at.nats, at.data_dir) as client:
        return await ask_dataset(client, action, **fields)


async def _stats(dataset: str, at: Platform) -> m.DatasetStats:
    return _in_full(await _manage(at, "stats", dataset=dataset))


async def _pages(
    at: Platform,
    action: str,
    part: Callable[[m.DatasetList], list[Any] | None],
    *,
    limit: int,
    after: str | None,
    fields: dict[str, Any],
) -> tuple[list[Any], str | None, int | None]:
    """Return `limit` things, where they go on, and how many there are in all."""
    found: list[Any] = []
    page_max = VECTORS_MAX if fields.get("embeddings") else PAGE_MAX
    async with connected(at.nats, at.data_dir) as client:
        while True:
            wanted = min(limit - len(found), page_max)
            page = await ask_dataset(client, action, **fields, limit=wanted, after=after)
            found += part(page) or []
            after = page.next
            if after is None or len(found) >= limit:
                return found, after, page.total


async def _with_consent(
    action: str, fields: dict[str, Any], at: Platform, *, what: str, dry_run: bool, yes: bool
) -> None:
    """Do what cannot be taken back: say first how much it is, and ask."""
    _check_somebody(at, yes=yes or dry_run)
    trial = await _manage(at, action, **fields, dry_run=True)
    count = trial.affected or 0
    entries_of = f"{count:,} {'entry' if count == 1 else 'entries'}"
    if dry_run:
        if at.as_json:
            show_json(_changed(trial))
        else:
            out.print(Text(f"{what} would go: {entries_of}"))
        return
    # Not inside a connection: that does not wait for somebody who thinks about it.
    if not yes and not typer.confirm(f"Delete {what} for good: {entries_of}?", err=True):
        raise typer.Exit(1)
    answer = await _manage(at, action, **fields)
    _show_change(answer, at, f"{what} {'is' if count == 1 else 'are'} gone")


def _check_somebody(at: Platform, *, yes: bool) -> None:
    if not yes and not (sys.stdin.isatty() and not at.as_json):
        raise typer.BadParameter("nobody can be asked here: give --yes, or --dry-run to see first")


# --- Telling --------------------------------------------------------------------------------------


def _in_full(answer: m.DatasetList) -> m.DatasetStats:
    if answer.dataset is None:
        raise Internal("the worker did not tell of the dataset; its version is another one")
    return answer.dataset


def _changed(answer: m.DatasetList) -> dict[str, Any]:
    """Return what a change led to, without the list of all datasets."""
    told = {
        "affected": answer.affected,
        "rejection": answer.rejection,
        "revision": answer.revision,
        "unerased": answer.unerased,
        "warnings": answer.warnings or None,
    }
    return {key: value for key, value in told.items() if value is not None}


def _show_change(answer: m.DatasetList, at: Platform, done: str) -> None:
    if at.as_json:
        show_json(_changed(answer))
        return
    count = answer.affected
    concerned = "" if count is None else f": {count:,} {'entry' if count == 1 else 'entries'}"
    out.print(Text(f"{done}{concerned}"))
    _show_warnings(answer)


def _show_warnings(answer: m.DatasetList) -> None:
    for warning in answer.warnings:
        out.print(Text(warning, "yellow"))


def _show_going(one: m.DatasetStats, at: Platform) -> None:
    if at.as_json:
        show_json({"affected": one.entries, "subjects": one.subjects, "images": one.images})
        return
    out.print(
        Text(one.id, "cyan").append(
            f" would go with {one.entries:,} entries of {one.subjects:,} persons, "
            f"{one.images:,} kept images and its history",
            "",
        )
    )


def _show_more(shown: int, more: str | None, total: int | None) -> None:
    if more is not None:
        of = "" if total is None else f" of {total:,}"
        out.print(Text(f"{shown:,}{of}; for more: --after {more}", "dim"))


def _age(moment: datetime) -> str:
    return age((m.now() - moment).total_seconds())

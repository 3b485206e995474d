"""The commands about photos: detect, encode, search, verify, sheet."""

import asyncio
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import typer
from rich.filesize import decimal
from rich.text import Text

from bus import codec
from bus import messages as m
from bus.errors import InvalidRequest
from bus.subjects import FACES_DETECT, FACES_ENCODE, FACES_SEARCH, FACES_SHEET, FACES_VERIFY
from services.cli.console import age, out, plain_table, show_json
from services.cli.options import Platform, values
from services.cli.plugins import connected
from services.cli.transfers import appearing, readable, target_of

# A photo of 50 megapixels, looked through in tiles by a worker that is busy.
ANSWER_S: Final = 60.0
SHEETS: Final = {".html": "html", ".htm": "html", ".png": "png"}


async def detect(
    image: str, at: Platform, *, score_min: float | None, faces_max: int, small: bool
) -> None:
    """Print the faces of a photo."""
    said = {"image": await _bytes_of(image), "faces_max": faces_max, "small": small}
    ask = _message(m.DetectFaces, said | {"score_min": score_min})
    async with connected(at.nats, at.data_dir) as client:
        found = await client.call(FACES_DETECT, ask, timeout_s=ANSWER_S, content_type=codec.MSGPACK)
    if at.as_json:
        show_json(found)
        return
    out.print(f"{_count(len(found.faces), 'face')} in {found.width} x {found.height} pixels")
    if found.faces:
        show_faces(found.faces)


async def encode(
    image: str,
    at: Platform,
    *,
    dataset: str | None,
    entry: str | None,
    person: str | None,
    metadata: Sequence[str] | None,
    quality: str | None,
) -> None:
    """Print the embedding of a photo's largest face; with a dataset, enrol it there.

    Raises:
        typer.BadParameter: What is meant for an entry is given, but no dataset.
    """
    given = {"--entry": entry, "--person": person, "--metadata": metadata, "--quality": quality}
    for option, value in given.items():
        if value and dataset is None:
            raise typer.BadParameter(f"{option} is for an entry; say where with --dataset")
    said = {
        "image": await _bytes_of(image),
        "dataset": dataset,
        "entry_id": entry,
        "metadata": values(metadata, "--metadata"),
        "persist": dataset is not None,
        "subject": person,
        "quality": quality,
        "by": "cli",
    }
    ask = _message(m.EncodeFace, said)
    async with connected(at.nats, at.data_dir) as client:
        face = await client.call(FACES_ENCODE, ask, timeout_s=ANSWER_S, content_type=codec.MSGPACK)
    if at.as_json:
        show_json(face)
        return
    by = f" by {face.embedder}" if face.embedder else ""
    out.print(f"{face.dimensions} values{by}, checksum {face.checksum}; --json prints them")
    if face.dataset is not None:
        who = f", shows {face.subject}" if face.subject else ""
        out.print(Text(f"{face.dataset} has it as {face.id}{who}, revision {face.revision}"))
    for warning in face.warnings:
        out.print(Text(warning, "yellow"))
    if face.faces:
        show_faces(face.faces)


async def search(
    image: str,
    at: Platform,
    *,
    dataset: str | None,
    top: int,
    by: str,
    threshold: float | None,
    where: Sequence[str] | None,
    every_face: bool,
) -> None:
    """Print who a photo's largest face is, or each of its faces, and what is nearest to it."""
    said = {
        "image": await _bytes_of(image),
        "dataset": dataset,
        "top_k": top,
        "group_by": "subject" if by == "person" else "entry",
        "threshold": threshold,
        "filter": filter_of(where),
        "every_face": every_face,
    }
    ask = _message(m.SearchFaces, said)
    async with connected(at.nats, at.data_dir) as client:
        found = await client.call(FACES_SEARCH, ask, timeout_s=ANSWER_S, content_type=codec.MSGPACK)
    if at.as_json:
        show_json(found)
        return
    if not every_face:
        _show_matches(found.results, found)
        return
    for i, face in enumerate(found.faces, 1):
        x, y, width, height = face.box
        where_it_is = f"{width:.0f} x {height:.0f} pixels at {x:.0f}, {y:.0f}"
        out.print(Text(f"face {i}", "cyan").append(f", {where_it_is}: ", ""), end="")
        _show_matches(face.matches or [], found)


async def verify(
    a: str,
    b: str,
    at: Platform,
    *,
    rate: float | None,
    threshold: float | None,
    dataset: str | None,
) -> None:
    """Print whether the largest faces of two photos are one person.

    Raises:
        typer.BadParameter: Both are to be read from stdin, or two thresholds are named.
    """
    if a == b == "-":
        raise typer.BadParameter("only one of the photos can come from stdin")
    if rate is not None and threshold is not None:
        raise typer.BadParameter("--rate and --threshold both say from where on; give one")
    said = {
        "a": {"image": await _bytes_of(a)},
        "b": {"image": await _bytes_of(b)},
        "threshold": threshold,
        "false_match_rate": rate,
        "dataset": dataset,
    }
    ask = _message(m.VerifyFaces, said)
    async with connected(at.nats, at.data_dir) as client:
        found = await client.call(FACES_VERIFY, ask, timeout_s=ANSWER_S, content_type=codec.MSGPACK)
    if at.as_json:
        show_json(found)
        return
    verdict = Text("one person", "green") if found.same else Text("two persons", "red")
    out.print(
        verdict.append(f": cosine {found.similarity:.3f}, threshold {found.threshold:.3f}", "")
    )
    for what, share in (
        ("the threshold", found.false_match_rate),
        ("this cosine", found.false_match_rate_here),
    ):
        if share is not None:
            out.print(f"strangers reach {what} in {share:.2g} of all comparisons, as measured")
    out.print(Text(f"compared by {found.embedder}", "dim"))


async def sheet(
    dataset: str | None,
    at: Platform,
    *,
    image: str | None,
    output: str,
    person: str | None,
    limit: int,
    after: str | None,
    force: bool,
) -> None:
    """Write a contact sheet: of a dataset, or of a photo and what a search finds for its faces.

    Raises:
        typer.BadParameter: Neither is named, or the file cannot be written.
    """
    if dataset is None and image is None:
        raise typer.BadParameter("name a dataset, or a photo with --image")
    path = target_of(output, "sheet.html", force=force)
    drawn = SHEETS.get(path.suffix.lower())
    if drawn is None:
        raise typer.BadParameter(
            f"{path} does not say what to draw; its name ends in .html or .png", param_hint="-o"
        )
    said = {
        "dataset": dataset,
        "subject": person,
        "image": await _bytes_of(image) if image else None,
        "limit": limit,
        "after": after,
        "format": drawn,
    }
    ask = _message(m.DrawSheet, said)
    async with connected(at.nats, at.data_dir) as client:
        made = await client.call(FACES_SHEET, ask, timeout_s=ANSWER_S, content_type=codec.MSGPACK)
    with appearing(path, force=force) as file:
        file.write(made.body)
    if at.as_json:
        told = {"path": str(path), "content_type": made.content_type, "shown": made.shown}
        show_json(told | {"size_bytes": len(made.body), "next": made.next})
        return
    shown = _count(made.shown, "entry", "entries")
    out.print(Text(f"{path} shows {shown}, {decimal(len(made.body))}"))
    if made.next is not None:
        out.print(Text(f"there are more: --after {made.next}", "dim"))


def filter_of(where: Sequence[str] | None) -> dict[str, Any]:
    """Read `FIELD=VALUE` options: a field that is given several times may have any of them."""
    found: dict[str, Any] = {}
    for text in where or ():
        [(name, value)] = (values([text], "--filter") or {}).items()
        if name in found:
            before = found[name]
            found[name] = [*before, value] if isinstance(before, list) else [before, value]
        else:
            found[name] = value
    return found


def show_faces(faces: Sequence[m.FaceInfo]) -> None:
    """Print faces as a table, with what makes each hard to recognise under it."""
    table = plain_table("face", "at", "size", "score", "quality")
    for i, face in enumerate(faces, 1):
        x, y, width, height = face.box
        measures = (f"{name} {value:.4g}" for name, value in sorted(face.quality.items()))
        table.add_row(
            Text(str(i), "cyan"),
            f"{x:.0f}, {y:.0f}",
            f"{width:.0f} x {height:.0f}",
            f"{face.score:.2f}",
            Text(", ".join(measures), overflow="fold"),
        )
        for warning in face.warnings:
            table.add_row("", "", "", "", Text(warning, "yellow"))
    out.print(table, soft_wrap=False)


def _show_matches(matches: Sequence[m.FaceMatch], found: m.FaceMatches) -> None:
    # As the answer itself is named: whoever is nearest may have been rejected.
    best = next((one for one in matches if one.known), matches[0] if matches else None)
    if best is None:
        verdict = Text("unknown", "yellow").append(": no entry is near enough", "")
    elif best.known:
        verdict = Text(best.subject or best.id, "green").append(f": cosine {best.score:.3f}", "")
    elif best.rejected:
        verdict = Text("unknown", "yellow").append(
            f": the nearest is {best.subject}, of which such a face was said not to be them", ""
        )
    else:
        nearest = f": cosine {best.score:.3f} at most"
        if best.score >= found.threshold and best.subject_score is not None:
            nearest = f": the mean of {best.subject} has a cosine of {best.subject_score:.3f}"
        verdict = Text("unknown", "yellow").append(nearest, "")
    searched = "" if found.searched is None else f", {found.searched:,} entries compared"
    verdict.append(f" ({found.dataset}, threshold {found.threshold:.3f}{searched})", "dim")
    out.print(verdict)
    if not matches:
        return
    table = plain_table("person", "entry", "cosine", "", "strangers", "enrolled", "metadata")
    for match in matches:
        expected = match.expected_false
        table.add_row(
            Text(match.subject or "-", "cyan", overflow="fold"),
            Text(match.id, overflow="fold"),
            f"{match.score:.3f}" + _of_person(match),
            Text("known", "green") if match.known else Text(_why_not(match), "dim"),
            "-" if expected is None else f"{expected:.2g}",
            f"{age((m.now() - match.last_seen).total_seconds())} ago",
            Text(as_line(match.metadata), "dim", overflow="fold"),
        )
    out.print(table, soft_wrap=False)


def _of_person(match: m.FaceMatch) -> str:
    if match.subject_score is None:
        return ""
    return f" (mean of {match.subject_entries}: {match.subject_score:.3f})"


def _why_not(match: m.FaceMatch) -> str:
    return "rejected" if match.rejected else "below"


def as_line(metadata: object) -> str:
    """Return an entry's metadata as text on one line; nothing where there are none."""
    if isinstance(metadata, Mapping):
        return ", ".join(f"{key}={value}" for key, value in metadata.items())
    return "" if metadata is None else str(metadata)


async def _bytes_of(image: str) -> bytes:
    """Read a photo's file, or stdin.

    Raises:
        typer.BadParameter: It cannot be read.
        InvalidRequest: It has no bytes.
    """
    read = sys.stdin.buffer.read
    if image != "-":
        read = readable(Path(image), "a photo's file").read_bytes
    data: bytes = await asyncio.to_thread(read)
    if not data:
        raise InvalidRequest(f"{'stdin' if image == '-' else image} has no bytes", field="image")
    return data


def _message(kind: type[Any], said: Mapping[str, Any]) -> Any:
    """Return a message; what was not said takes its default, and what cannot be is refused."""
    return codec.convert({key: value for key, value in said.items() if value is not None}, kind)


def _count(n: int, one: str, many: str | None = None) -> str:
    return f"{n:,} {one if n == 1 else many or f'{one}s'}"

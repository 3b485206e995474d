"""What dataset files carry beside their entries: what they say of themselves, and rejections."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec
import numpy as np
import orjson

from bus import codec
from bus import messages as m
from bus.errors import BusError, InvalidRequest, Unprocessable
from services.rustyface.galleries.asked import changed
from services.rustyface.galleries.projection import FENCE
from services.rustyface.transfers.files.rows import (
    BATCH,
    ENTRIES_MAX,
    Floats,
    Head,
    RejectionRow,
    check_length,
    moment_in,
    refuse,
    text_in,
    unit_rows,
)

REJECTION_ID_MAX: Final = 64
# What `head_in` reads.
HEAD_KEYS: Final = ("id", "created_at", "embedder", "embedder_digest", "settings")


class _Said(msgspec.Struct):
    """A rejection as JSON has it: of a face, or of an entry's."""

    subject: str
    id: str | None = None
    entry: str | None = None
    embedding: list[float] | None = None


def head_in(said: Mapping[str, Any]) -> Head:
    """Return what a file says of itself; what cannot be read of it counts as not said.

    Raises:
        Unprocessable: It has settings that there cannot be; names them.
    """

    def text(name: str) -> str | None:
        found = said.get(name)
        return found if isinstance(found, str) else None

    created = said.get("created_at")
    try:
        since = None if created is None else moment_in(created, 0, "")
    except Unprocessable:
        since = None
    return Head(
        id=text("id"),
        created_at=since,
        embedder=text("embedder"),
        embedder_digest=text("embedder_digest"),
        settings=settings_in(said.get("settings")),
    )


def settings_in(said: object) -> m.DatasetSettings | None:
    """Return settings; those that are not named have their defaults, None has none.

    Raises:
        Unprocessable: There is no such setting, or it cannot have that value; names it.
    """
    if said is None:
        return None
    if not isinstance(said, dict):
        raise Unprocessable(
            f"settings must be an object of settings by name, they are of type "
            f"{type(said).__name__}",
            field="settings",
        )
    try:
        return changed(m.DatasetSettings(), said)
    except InvalidRequest as error:
        place = f"settings.{error.field}" if error.field else "settings"
        raise Unprocessable(f"settings: {error.message}", field=place) from None
    except (OverflowError, ValueError) as error:
        raise Unprocessable(f"settings: they cannot be read: {error}", field="settings") from None


def rejections_in(pieces: Iterable[bytes], dimensions: int) -> Iterator[list[RejectionRow]]:
    """Give rejections that are JSON, up to `BATCH` at a time.

    Args:
        pieces: The JSON of each.
        dimensions: How long their vectors have to be.

    Raises:
        Unprocessable: One cannot be taken; says which, and why.
    """
    waiting: list[_Said] = []
    first = 0
    for index, piece in enumerate(pieces):
        waiting.append(_read(piece, index))
        if len(waiting) == BATCH:
            yield _rows(waiting, first, dimensions)
            first += len(waiting)
            waiting = []
    if waiting:
        yield _rows(waiting, first, dimensions)


def rejection(
    index: int, name: str | None, subject: object, entry: object, vector: Floats | None
) -> RejectionRow:
    """Return a rejection, once all of it can be so.

    Args:
        index: Which of the file it is; errors say that and its id, but not whom it concerns.
        name: Its id, if it has one. One that has none is known by what it says.
        subject: Who it is not.
        entry: The entry that it was, if it was one.
        vector: The face, at length 1, if it is given.

    Raises:
        Unprocessable: It cannot be taken; says which, and why.
    """
    check_many(index)
    who = text_in(subject, index, name, "subject", what="rejection")
    face = None if entry is None else text_in(entry, index, name, "entry", what="rejection")
    if vector is None and face is None:
        refuse(index, name, "it has neither an entry nor an embedding", what="rejection")
    if name is not None:
        own = text_in(name, index, None, "id", most=REJECTION_ID_MAX, what="rejection")
        if own == FENCE:
            refuse(index, None, f"no rejection can have the id {FENCE!r}", what="rejection")
    else:
        said = msgspec.msgpack.encode([who, face, None if vector is None else vector.tobytes()])
        own = hashlib.blake2b(said, digest_size=8).hexdigest()
    return RejectionRow(own, who, vector, face)


def check_many(index: int) -> None:
    """Raise Unprocessable if a file has more rejections than any dataset."""
    if index >= ENTRIES_MAX:
        refuse(index, None, f"a file may have {ENTRIES_MAX:,} rejections", what="rejection")


def as_said(row: RejectionRow) -> bytes:
    """Return a rejection as JSON."""
    said: dict[str, Any] = {"id": row.id, "subject": row.subject}
    if row.entry is not None:
        said["entry"] = row.entry
    if row.vector is not None:
        said["embedding"] = as_numbers(row.vector)
    return msgspec.json.encode(said)


def as_numbers(vector: Floats) -> msgspec.Raw:
    """Return a vector as JSON, with as many digits as a float32 needs to come back the same."""
    return msgspec.Raw(orjson.dumps(vector, option=orjson.OPT_SERIALIZE_NUMPY))


def _read(piece: bytes, index: int) -> _Said:
    try:
        return codec.decode(piece, _Said)
    except BusError as error:
        refuse(index, None, error.message, what="rejection")
    except (OverflowError, ValueError) as error:
        refuse(index, None, f"it cannot be read: {error}", what="rejection")


def _rows(said: Sequence[_Said], first: int, dimensions: int) -> list[RejectionRow]:
    # Where there is no vector any will do: none is taken from there.
    block = np.ones((len(said), dimensions))
    for at, one in enumerate(said):
        if one.embedding is not None:
            check_length(len(one.embedding), dimensions, first + at, one.id, what="rejection")
            block[at] = one.embedding
    faces = unit_rows(block, first, [one.id for one in said], what="rejection")
    return [
        rejection(
            index, one.id, one.subject, one.entry, face if one.embedding is not None else None
        )
        for index, (one, face) in enumerate(zip(said, faces, strict=True), first)
    ]

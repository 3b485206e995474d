"""What galleries are asked, and what they answer: the values that go in and out at their door."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Literal, NamedTuple

from bus import codec
from bus import messages as m
from bus.errors import InvalidRequest, TooLarge
from services.rustyface.galleries.clearing import Unerased
from services.rustyface.galleries.cosines import Floats

# Searches give it back with every result, and an answer has to fit into one message.
METADATA_MAX_BYTES: Final = 64 * 1024


@dataclass(frozen=True, kw_only=True)
class NewEntry:
    """An entry that is to be enrolled.

    Attributes:
        id: Its id; one that is there is replaced.
        vector: What `Galleries.check_vector` lets pass.
        metadata: Whatever MessagePack can carry.
        subject: The person.
        image: SHA-256 of its image, if that is kept.
        quality: Of the face.
        imported: The import that brings it.
        at: When it was last seen; now if None.
    """

    id: str
    vector: Floats
    metadata: Any = None
    subject: str | None = None
    image: str | None = None
    quality: Mapping[str, float] = field(default_factory=dict)
    imported: str | None = None
    at: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class NewRejection:
    """A face that is not a person, as it was said in another gallery, or in this one.

    Attributes:
        id: Its own.
        subject: Who it is not.
        vector: The face, shape ``[dimensions]``, not all zeros; the entry's own if None.
        entry: The entry that it was, if it was one.
        imported: The import that brings it.
    """

    id: str
    subject: str
    vector: Floats | None
    entry: str | None = None
    imported: str | None = None


@dataclass(frozen=True)
class Repeated:
    """What saying rejections again has led to.

    Attributes:
        added: How many were not there before.
        known: How many were.
        refused: Which could not be said here, and why.
        revision: The gallery's revision that has them.
    """

    added: int
    known: int
    refused: list[tuple[NewRejection, str]]
    revision: int


@dataclass(frozen=True)
class Outcome:
    """What enrolling many has led to.

    Attributes:
        added: How many were not there before.
        replaced: How many took another's place.
        skipped: How many were there and stayed as they were.
        revision: The gallery's revision that has them.
    """

    added: int
    replaced: int
    skipped: int
    revision: int


class Removed(NamedTuple):
    """What a removal has led to.

    Attributes:
        affected: How many entries it concerned.
        revision: The gallery's revision that has it.
        unerased: What of them is still in the broker's files; None if nothing is.
    """

    affected: int
    revision: int
    unerased: Unerased | None = None


@dataclass(frozen=True, kw_only=True)
class Query:
    """What is searched for.

    Attributes:
        vector: Shape ``[dimensions]``, of any length but zero.
        k: How many at most.
        threshold: Cosine below which a result leaves.
        revision: What must have been read; the newest that the broker has if None.
        by_embedder: Whether this worker's embedder made the vector; then it has to be the
            gallery's own.
        group_by: `subject`: one result for each person.
        filter: As in `SearchFaces`.
    """

    vector: Floats
    k: int
    threshold: float
    revision: int | None
    by_embedder: bool = False
    group_by: Literal["entry", "subject"] = "entry"
    filter: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Match:
    """An entry that was found.

    Attributes:
        entry: Without its vector.
        score: The cosine.
        subject: Who it shows.
        subject_score: Cosine to the mean of that person's entries; only by subject.
        subject_entries: How many they have; only by subject.
        rejected: Somebody has said of a face that it is not this person, and the query is at
            least as near to that one as to the person's best entry.
    """

    entry: m.EntryInfo
    score: float
    subject: str | None
    subject_score: float | None
    subject_entries: int | None
    rejected: bool


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        matches: Best first.
        revision: The gallery's revision that was searched.
        searched: How many entries were compared.
        settings: Of the gallery.
        embedder: What made the gallery's vectors.
    """

    matches: list[Match]
    revision: int
    searched: int
    settings: m.DatasetSettings
    embedder: str


def check_metadata(metadata: Any) -> int:
    """Refuse metadata that cannot be stored, or be given back; return how many bytes they have.

    Raises:
        InvalidRequest: There is something in it that neither JSON nor MessagePack can carry.
        TooLarge: It is over `METADATA_MAX_BYTES`.
    """
    try:
        size = len(codec.encode(metadata, codec.MSGPACK))
    except (OverflowError, TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"metadata: it cannot be stored: {error}; allowed are objects, lists, texts, numbers "
            "of 64 bits, true, false and null",
            field="metadata",
        ) from None
    if size > METADATA_MAX_BYTES:
        raise TooLarge(
            f"metadata: it has {size:,} bytes, allowed are {METADATA_MAX_BYTES:,}",
            field="metadata",
        )
    return size


def changed(before: m.DatasetSettings, changes: Mapping[str, Any]) -> m.DatasetSettings:
    """Return a dataset's settings with some of them changed, and of `quality` some bounds.

    Raises:
        InvalidRequest: There is no such setting, or it cannot have that value; names it.
    """
    codec.check_settings(changes, m.DatasetSettings, "a dataset")
    present = codec.plain(before)
    quality = changes.get("quality")
    if isinstance(quality, dict):
        codec.check_settings(quality, m.QualityBounds, "a dataset", "quality.")
        changes = {**changes, "quality": present["quality"] | quality}
    return codec.convert(present | changes, m.DatasetSettings)

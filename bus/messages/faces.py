"""Faces and datasets of them."""

from datetime import datetime
from typing import Annotated, Any, Literal

from msgspec import Meta

from bus.messages.base import Message, Name


class FaceInfo(Message, frozen=True):
    """One face of an image.

    Attributes:
        box: ``[x, y, width, height]`` in pixels of the upright image.
        landmarks: Right eye, left eye, nose, right and left corner of the mouth: five ``[x, y]``.
        score: The detector's confidence, 0 to 1.
        quality: Measures by name: `size_px`, `blur`.
    """

    box: list[float]
    landmarks: list[list[float]]
    score: float
    quality: dict[str, float]


class EncodeFace(Message, frozen=True):
    """Asks for the embedding of an image's largest face, kept in a dataset unless told not to.

    Attributes:
        image_base64: The image file; a `data:` URL is taken too.
        dataset: Where it is kept; the default one if absent.
        entry_id: Its id there; a UUID if absent. An entry of that id is replaced.
        metadata: Kept with it and given back by searches.
        persist: Whether it is kept at all.
    """

    image_base64: str
    dataset: Name | None = None
    entry_id: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    metadata: Any = None
    persist: bool = True


class EncodedFace(Message, frozen=True):
    """A face as a unit vector.

    Attributes:
        id: The entry.
        dataset: Where it was kept; null if it was not.
        embedding: ``dimensions`` numbers, of length 1.
        dimensions: How many.
        checksum: SHA-256 over the little-endian float32 values, hex.
        faces: All faces found, the largest first: the one that counts.
        embedder: What made the vector.
        revision: The gallery's revision that has the entry.
    """

    id: str
    dataset: str | None
    embedding: list[float]
    dimensions: int
    checksum: str
    faces: list[FaceInfo] = []
    embedder: str | None = None
    revision: int | None = None


class SearchFaces(Message, frozen=True):
    """Asks for the entries nearest to a face, given as an image or as an embedding.

    Attributes:
        dataset: Where to look; the default one if absent.
        top_k: How many at most.
        image_base64: The image; its largest face counts.
        embedding: The vector; it is normalised.
        threshold: Cosine below which a result leaves.
        revision: The gallery's revision that must be known; its newest if absent.
    """

    dataset: Name | None = None
    top_k: Annotated[int, Meta(ge=1, le=1000)] = 5
    image_base64: str | None = None
    embedding: list[float] | None = None
    threshold: Annotated[float, Meta(ge=-1, le=1)] = 0.0
    revision: int | None = None


class FaceMatch(Message, frozen=True):
    """An entry that was found.

    Attributes:
        id: The entry.
        score: Cosine to the query.
        metadata: As it was enrolled.
        last_seen: When it was enrolled.
        known: Whether the score reaches the dataset's threshold.
    """

    id: str
    score: float
    metadata: Any
    last_seen: datetime
    known: bool


class FaceMatches(Message, frozen=True):
    """What a search found, best first.

    Attributes:
        dataset: Where it looked.
        query_embedding: The vector that it looked for.
        results: The matches.
        known: Whether the best one reaches the dataset's threshold.
        threshold: That threshold: the cosine from which a match counts as the same person.
        faces: All faces of the query image, the largest first: the one that counts.
        revision: The gallery's revision that was searched.
    """

    dataset: str
    query_embedding: list[float]
    results: list[FaceMatch]
    known: bool
    threshold: float
    revision: int
    faces: list[FaceInfo] = []


class ManageDataset(Message, frozen=True):
    """Asks for a change of the datasets, or only for their list."""

    action: Literal["list", "create", "remove-entry", "delete-dataset"]
    dataset: Name | None = None
    entry_id: Annotated[str, Meta(min_length=1, max_length=256)] | None = None


class DatasetInfo(Message, frozen=True):
    """A dataset: how many entries, since when, and what made its vectors."""

    id: str
    entries: int
    created_at: datetime
    updated_at: datetime
    embedder: str
    dimensions: int


class DatasetList(Message, frozen=True):
    """Every dataset, by id."""

    datasets: list[DatasetInfo]


class GalleryHead(Message, frozen=True):
    """A dataset's own event: it was created, or deleted with all that it had.

    Attributes:
        id: The dataset.
        at: When.
        embedder: What makes its vectors; entries of another are refused.
        dimensions: Their length.
        deleted: Whether this ends it.
    """

    id: str
    at: datetime
    embedder: str
    dimensions: int
    deleted: bool = False


class GalleryEntry(Message, frozen=True):
    """An entry's event: it was enrolled (with its vector), or removed (without).

    Attributes:
        id: The entry.
        at: When.
        embedding: Little-endian float32 values; absent when it was removed.
        metadata: As it was enrolled.
    """

    id: str
    at: datetime
    embedding: bytes | None = None
    metadata: Any = None

"""Faces: finding, embedding, comparing and searching them."""

from datetime import datetime
from typing import Annotated, Any, Literal

from msgspec import Meta

from bus.messages.base import Message, Name

EntryId = Annotated[str, Meta(min_length=1, max_length=256)]
"""An entry's id in its dataset."""
SubjectName = Annotated[str, Meta(min_length=1, max_length=256)]
"""The person that an entry shows, as callers name them."""
Cosine = Annotated[float, Meta(ge=-1, le=1)]


class FaceInfo(Message, frozen=True):
    """One face of an image.

    Attributes:
        box: ``[x, y, width, height]`` in pixels of the upright image.
        landmarks: Right eye, left eye, nose, right and left corner of the mouth: five ``[x, y]``.
        score: The detector's confidence, 0 to 1.
        quality: Measures by name: `size_px` (shorter side of the box), `sharpness` (variance of
            the Laplacian, low is blurred), `yaw`, `pitch` and `roll` (degrees, 0 is frontal and
            upright, estimated from the landmarks).
        warnings: What of that makes it hard to recognise, in sentences.
        embedding: Its unit vector, where every face's was asked for.
        matches: What a search found for it, where every face was searched for.
    """

    box: list[float]
    landmarks: list[list[float]]
    score: float
    quality: dict[str, float]
    warnings: list[str] = []
    embedding: list[float] | None = None
    matches: list["FaceMatch"] | None = None


class DetectFaces(Message, frozen=True):
    """Asks for the faces of an image, without embeddings.

    Attributes:
        image_base64: The image file; a `data:` URL is taken too. This or `image`.
        image: Its bytes, for MessagePack.
        score_min: How sure the detector has to be; the plugin's own setting if absent.
        faces_max: The largest ones are given back.
        small: Whether faces that are small in a large photo are looked for too, in tiles: this
            takes several times as long.
    """

    image_base64: str | None = None
    image: bytes | None = None
    score_min: Annotated[float, Meta(gt=0, lt=1)] | None = None
    faces_max: Annotated[int, Meta(ge=1, le=1_000)] = 64
    small: bool = False


class DetectedFaces(Message, frozen=True, omit_defaults=False):
    """The faces of an image, the largest first.

    Attributes:
        width: Of the upright image, in pixels.
        height: Likewise.
        faces: None is no error.
    """

    width: int
    height: int
    faces: list[FaceInfo]


class EncodeFace(Message, frozen=True):
    """Asks for the embedding of an image's largest face, kept in a dataset unless told not to.

    Attributes:
        image_base64: The image file; a `data:` URL is taken too. This or `image`.
        image: Its bytes, for MessagePack.
        dataset: Where it is kept; the default one if absent.
        entry_id: Its id there; a UUID if absent. An entry of that id is replaced.
        metadata: Kept with it and given back by searches.
        persist: Whether it is kept at all.
        subject: The person that it shows.
        every_face: Whether `faces` carries an embedding for each face, not only the largest's.
        quality: What a face below the dataset's bounds leads to; as the dataset has it if absent.
        by: Who asks; the gateway says it.
    """

    image_base64: str | None = None
    image: bytes | None = None
    dataset: Name | None = None
    entry_id: EntryId | None = None
    metadata: Any = None
    persist: bool = True
    subject: SubjectName | None = None
    every_face: bool = False
    quality: Literal["reject", "warn", "off"] | None = None
    by: Annotated[str, Meta(max_length=255)] | None = None


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
        subject: The person that it was enrolled as.
        warnings: What makes the face hard to recognise.
    """

    id: str
    dataset: str | None
    embedding: list[float]
    dimensions: int
    checksum: str
    faces: list[FaceInfo] = []
    embedder: str | None = None
    revision: int | None = None
    subject: str | None = None
    warnings: list[str] = []


class SearchFaces(Message, frozen=True):
    """Asks for the entries nearest to a face, given as an image or as an embedding.

    Attributes:
        dataset: Where to look; the default one if absent.
        top_k: How many at most.
        image_base64: The image; its largest face counts.
        image: Its bytes, for MessagePack.
        embedding: The vector; it is normalised.
        threshold: Cosine below which a result leaves.
        revision: The gallery's revision that must be known; its newest if absent.
        group_by: `subject`: one result for each person, with the entry that matched best; entries
            of nobody stand for themselves. What the dataset's scoring decides by ranks them, and
            who was rejected comes last.
        filter: Only entries whose metadata have these values: field (dots lead into objects) to
            a value, or to a list of which one has to fit. `subject` is a field, too.
        every_face: Whether every face of the image is searched for; see `FaceInfo.matches`.
    """

    dataset: Name | None = None
    top_k: Annotated[int, Meta(ge=1, le=1000)] = 5
    image_base64: str | None = None
    image: bytes | None = None
    embedding: list[float] | None = None
    threshold: Cosine = 0.0
    revision: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    group_by: Literal["entry", "subject"] = "entry"
    filter: Annotated[dict[str, Any], Meta(max_length=16)] = {}
    every_face: bool = False


class FaceMatch(Message, frozen=True):
    """An entry that was found.

    Attributes:
        id: The entry.
        score: Cosine to the query.
        metadata: As it was enrolled.
        last_seen: When it was enrolled.
        known: Whether it counts as the same person: the score reaches the dataset's threshold,
            and nobody has said that it is not.
        subject: The person that the entry shows.
        subject_score: Cosine to the mean of that person's entries; only by subject.
        subject_entries: How many entries that person has; only by subject.
        rejected: Whether somebody has said of such a face that it is not this person.
        expected_false: How many entries of strangers are expected to reach this score in a
            gallery of this size, from the rates measured for the embedder; absent where none were.
    """

    id: str
    score: float
    metadata: Any
    last_seen: datetime
    known: bool
    subject: str | None = None
    subject_score: float | None = None
    subject_entries: int | None = None
    rejected: bool = False
    expected_false: float | None = None


class FaceMatches(Message, frozen=True):
    """What a search found, best first.

    Attributes:
        dataset: Where it looked.
        query_embedding: The vector that it looked for.
        results: The matches.
        known: Whether one of them counts as the same person: the best one that does.
        threshold: The dataset's threshold: the cosine from which a match counts.
        faces: All faces of the query image, the largest first: the one that counts.
        revision: The gallery's revision that was searched.
        subject: Who it is, when `known`.
        searched: How many entries were compared.
    """

    dataset: str
    query_embedding: list[float]
    results: list[FaceMatch]
    known: bool
    threshold: float
    revision: int
    faces: list[FaceInfo] = []
    subject: str | None = None
    searched: int | None = None


class FaceSide(Message, frozen=True):
    """One side of a comparison: one of the three.

    Attributes:
        image_base64: An image; its largest face counts.
        image: Its bytes, for MessagePack.
        embedding: A vector; it is normalised.
    """

    image_base64: str | None = None
    image: bytes | None = None
    embedding: list[float] | None = None


class VerifyFaces(Message, frozen=True):
    """Asks whether two faces are of one person.

    Attributes:
        a: The one.
        b: The other.
        threshold: Cosine from which they are; absent, it follows from `false_match_rate`, from
            the dataset, or is the embedder's own, in this order.
        false_match_rate: How often strangers may be taken for one person.
        dataset: Whose threshold counts.
    """

    a: FaceSide
    b: FaceSide
    threshold: Cosine | None = None
    false_match_rate: Annotated[float, Meta(gt=0, lt=1)] | None = None
    dataset: Name | None = None


class VerifiedFaces(Message, frozen=True, omit_defaults=False):
    """How much two faces are alike.

    Attributes:
        similarity: The cosine.
        same: Whether it reaches the threshold.
        threshold: From which cosine on they count as one person.
        false_match_rate: How often strangers reach that threshold, as measured for the embedder;
            null where nothing was measured.
        false_match_rate_here: How often they reach this similarity.
        embedder: What made the vectors.
        faces_a: All faces of the first image, the one that counts first.
        faces_b: Likewise of the second.
    """

    similarity: float
    same: bool
    threshold: float
    false_match_rate: float | None
    false_match_rate_here: float | None
    embedder: str
    faces_a: list[FaceInfo] = []
    faces_b: list[FaceInfo] = []


class DrawSheet(Message, frozen=True):
    """Asks for a contact sheet: pictures to look at instead of numbers.

    Attributes:
        dataset: Its entries, by person; pictures are there if the dataset keeps images.
        subject: Only of this person.
        image_base64: With an image: its faces, boxed, and what a search finds for each.
        image: Its bytes, for MessagePack.
        limit: Entries at most; with an image, matches for each face.
        after: Go on behind this entry.
        format: What comes back.
        language: What its words are in.
    """

    dataset: Name | None = None
    subject: SubjectName | None = None
    image_base64: str | None = None
    image: bytes | None = None
    limit: Annotated[int, Meta(ge=1, le=200)] = 60
    after: EntryId | None = None
    format: Literal["html", "png"] = "html"
    language: Literal["en", "de"] = "en"


class Sheet(Message, frozen=True, omit_defaults=False):
    """A contact sheet.

    Attributes:
        content_type: `text/html; charset=utf-8` or `image/png`.
        body: The file.
        shown: How many entries are on it.
        next: Where the next sheet goes on; null at the end.
    """

    content_type: str
    body: bytes
    shown: int
    next: str | None = None

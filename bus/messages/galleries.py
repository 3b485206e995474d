"""Datasets of faces: what is asked of them, what is told, and the events that they are made of."""

from datetime import datetime
from typing import Annotated, Any, Literal

from msgspec import Meta

from bus.messages.base import Message, Name
from bus.messages.faces import Cosine, EntryId, SubjectName
from bus.messages.jobs import FileFormat, FileName, FileSettings, Job
from bus.messages.repository import Digest

Quality = Literal["reject", "warn", "off"]


class QualityBounds(Message, frozen=True, omit_defaults=False):
    """What a face has to reach to be enrolled; a bound at null does not count.

    Attributes:
        below: What happens to a face that does not: it is refused, taken with a warning, or taken.
        size_min_px: Shorter side of its box.
        sharpness_min: Variance of the Laplacian of the aligned face. No picture has more than
            1,040,400: from one pixel to the next it cannot be lighter or darker than by all.
        score_min: The detector's confidence.
        yaw_max: Degrees turned to a side, at most.
    """

    below: Quality = "warn"
    size_min_px: Annotated[float, Meta(ge=0, le=10_000)] | None = 32
    sharpness_min: Annotated[float, Meta(ge=0, le=1_040_400)] | None = None
    score_min: Annotated[float, Meta(ge=0, le=1)] | None = None
    yaw_max: Annotated[float, Meta(ge=0, le=180)] | None = None


class DatasetSettings(Message, frozen=True, omit_defaults=False):
    """What can be set for a dataset.

    Attributes:
        threshold: Cosine from which a search names somebody (one to many); the embedder's own,
            or the plugin's setting, if null.
        verify_threshold: Cosine from which two faces are one person (one to one); the embedder's
            own if null.
        scoring: What decides whether a person is named: the `best` of their entries, or the
            `mean` of them.
        keep_images: Whether the images themselves are kept, to be embedded anew later and looked
            at. Off, because a vector tells less about a person than a photo.
        quality: What a face has to reach.
    """

    threshold: Cosine | None = None
    verify_threshold: Cosine | None = None
    scoring: Literal["best", "mean"] = "mean"
    keep_images: bool = False
    quality: QualityBounds = QualityBounds()


Action = Literal[
    "list",
    "create",
    "configure",
    "delete-dataset",
    "stats",
    "entries",
    "remove-entry",
    "move-entry",
    "subjects",
    "rename-subject",
    "merge-subjects",
    "remove-subject",
    "reject-match",
    "withdraw-rejection",
    "history",
    "imports",
    "undo-import",
    "import",
    "export",
    "reembed",
]


class ManageDataset(Message, frozen=True):
    """Asks for a change of the datasets, or to be told of them.

    Attributes:
        action: What.
        dataset: Which; `create` without a name takes a UUID.
        entry_id: The entry that is removed or moved, or of which it is said that it is not
            `subject`; of `entries`, only this one.
        subject: The person: renamed, merged, removed, rejected; of `entries`, only theirs.
        into: The new name, the person that others are merged into, that an entry is moved to
            (null: nobody), or the new dataset of `reembed`.
        subjects: Who is merged.
        embedding: A face of which it is said that it is not `subject`, instead of `entry_id`.
        rejection: The rejection that is withdrawn.
        settings: Of `create` and `configure`: these; those that are absent take their defaults.
        changes: Of `configure`, instead of `settings`: these alone; those that are absent stay.
        revision: Of `configure`: only if the settings have not been changed since this revision.
        imported: The import that is undone.
        artefact: Of `import`: the uploaded file, by SHA-256, in the object store of faces.
        file_name: Of `import`: what that file is called; kept as the import's `source`.
        format: Of a file that is imported (found out if absent) or exported.
        existing: What an import does with entries that are there already.
        file_settings: Whether an import is to `take` the settings in its file, or `keep` those of
            the dataset; see `GalleryWork`.
        filter: Of `entries`: as in `SearchFaces`.
        limit: How many are told of.
        after: Go on behind this one: entry, person, or revision of the history.
        embeddings: Whether `entries` come with their vectors.
        dry_run: Of what deletes: say what would go, but leave it. Other changes are refused.
        key: Idempotency key of `import`, `export`, `reembed`.
        by: Who asks; the gateway says it.
    """

    action: Action
    dataset: Name | None = None
    entry_id: EntryId | None = None
    subject: SubjectName | None = None
    into: SubjectName | None = None
    subjects: Annotated[list[SubjectName], Meta(max_length=1_000)] = []
    embedding: list[float] | None = None
    rejection: Annotated[str, Meta(max_length=64)] | None = None
    settings: DatasetSettings | None = None
    changes: Annotated[dict[str, Any], Meta(max_length=64)] | None = None
    revision: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    imported: Annotated[str, Meta(max_length=64)] | None = None
    artefact: Digest | None = None
    file_name: FileName | None = None
    format: FileFormat | None = None
    existing: Literal["skip", "replace", "fail"] = "skip"
    file_settings: FileSettings | None = None
    filter: Annotated[dict[str, Any], Meta(max_length=16)] = {}
    limit: Annotated[int, Meta(ge=1, le=1_000)] = 100
    after: Annotated[str, Meta(max_length=256)] | None = None
    embeddings: bool = False
    dry_run: bool = False
    key: Annotated[str, Meta(min_length=1, max_length=255)] | None = None
    by: Annotated[str, Meta(max_length=255)] | None = None


class DatasetInfo(Message, frozen=True):
    """A dataset: how many entries, since when, and what made its vectors, in which version."""

    id: str
    entries: int
    created_at: datetime
    updated_at: datetime
    embedder: str
    dimensions: int
    subjects: int = 0
    embedder_digest: str | None = None


class DatasetStats(Message, frozen=True, omit_defaults=False):
    """A dataset in full.

    Attributes:
        id: The dataset.
        settings: As they are set.
        threshold: What counts for searches.
        verify_threshold: What counts for comparisons.
        expected_false: How many entries of strangers are expected to reach `threshold` in one
            search of this gallery; null where nothing was measured for the embedder.
        embedder: What makes its vectors.
        embedder_digest: Which version of that; null for datasets older than this field.
        dimensions: Their length.
        entries: How many.
        subjects: How many persons.
        unnamed: Entries of nobody.
        images: Entries whose image is kept.
        rejections: How often it was said of a face that it is not a person.
        memory_bytes: What its vectors take in each replica.
        revision: Its newest.
        created_at: When.
        updated_at: When its newest event was.
    """

    id: str
    settings: DatasetSettings
    threshold: float
    verify_threshold: float
    expected_false: float | None
    embedder: str
    embedder_digest: str | None
    dimensions: int
    entries: int
    subjects: int
    unnamed: int
    images: int
    rejections: int
    memory_bytes: int
    revision: int
    created_at: datetime
    updated_at: datetime


class EntryInfo(Message, frozen=True):
    """An entry of a dataset."""

    id: str
    last_seen: datetime
    revision: int
    subject: str | None = None
    metadata: Any = None
    quality: dict[str, float] = {}
    image: str | None = None
    imported: str | None = None
    embedding: list[float] | None = None


class SubjectInfo(Message, frozen=True):
    """A person of a dataset.

    Attributes:
        id: The name.
        entries: How many.
        last_seen: Of the newest.
        rejections: Faces of which it was said that they are not this person, by id.
    """

    id: str
    entries: int
    last_seen: datetime
    rejections: list[str] = []


class GalleryChange(Message, frozen=True):
    """What was done to a dataset; kept as its history, never with a vector in it.

    Attributes:
        dataset: Which.
        at: When.
        action: What: `enrolled`, `replaced`, or an action of `ManageDataset`.
        by: Who.
        entry: Which entry.
        subject: Which person; of a removal, nobody.
        into: What they became.
        count: How many entries it concerned.
        imported: By which import.
        revision: Of the gallery, after it.
        seq: Its own number; the history is paged by it.
    """

    dataset: str
    at: datetime
    action: str
    by: str | None = None
    entry: str | None = None
    subject: str | None = None
    into: str | None = None
    count: int | None = None
    imported: str | None = None
    revision: int | None = None
    seq: int | None = None


class DatasetList(Message, frozen=True):
    """Every dataset, by id; and what the action led to.

    Attributes:
        datasets: All that there are.
        dataset: The one that was created, configured or asked about, in full.
        entries: Of `entries`.
        subjects: Of `subjects`.
        history: Of `history`, the newest first.
        imports: Of `imports`, the newest first.
        next: What `after` has to be for more; null at the end.
        total: How many entries or persons there are behind the filter.
        affected: How many entries the change concerned, or would.
        rejection: The id of what `reject-match` has made.
        revision: The gallery's revision that has the change.
        job: What goes on doing it: `import`, `export`, `reembed`.
        unerased: How many faces and images are gone for every question, but not erased from the
            broker's files yet; null for none.
        warnings: What the change has not led to, and why, in sentences.
    """

    datasets: list[DatasetInfo]
    dataset: DatasetStats | None = None
    entries: list[EntryInfo] | None = None
    subjects: list[SubjectInfo] | None = None
    history: list[GalleryChange] | None = None
    imports: list["GalleryImport"] | None = None
    next: str | None = None
    total: int | None = None
    affected: int | None = None
    rejection: str | None = None
    revision: int | None = None
    job: Job | None = None
    unerased: int | None = None
    warnings: list[str] = []


# --- Events ---------------------------------------------------------------------------------------


class GalleryHead(Message, frozen=True):
    """A dataset's own event: it was created, or deleted with all that it had.

    Attributes:
        id: The dataset.
        at: When.
        embedder: What makes its vectors; entries of another are refused.
        dimensions: Their length.
        embedder_digest: Which version of the embedder; None in events older than this field.
        settings: What it is set to until a `GallerySettings` says otherwise; the defaults if None.
        imported: The import that made it.
        deleted: Whether this ends it.
    """

    id: str
    at: datetime
    embedder: str
    dimensions: int
    embedder_digest: str | None = None
    settings: DatasetSettings | None = None
    imported: str | None = None
    deleted: bool = False


class GallerySettings(Message, frozen=True):
    """What a dataset is set to, from here on."""

    at: datetime
    settings: DatasetSettings


class GalleryEntry(Message, frozen=True):
    """An entry's event: it was enrolled (with its vector), or removed (without).

    Attributes:
        id: The entry.
        at: When.
        embedding: Little-endian float32 values; absent when it was removed.
        metadata: As it was enrolled.
        subject: The person, as named then; see `GallerySubject`.
        image: SHA-256 of the kept image.
        quality: Of the face.
        imported: The import that brought it.
    """

    id: str
    at: datetime
    embedding: bytes | None = None
    metadata: Any = None
    subject: str | None = None
    image: str | None = None
    quality: dict[str, float] = {}
    imported: str | None = None


class SubjectMove(Message, frozen=True):
    """What became of everything that bore a name until then.

    Attributes:
        into: The name that it bears from there on; None: it was removed.
        seq: The event's sequence. None in the newest move: its event's own.
    """

    into: str | None
    seq: int | None = None


class GallerySubject(Message, frozen=True):
    """A person's event: they were renamed, merged into another, or removed.

    One event changes all their entries at once, and those that were enrolled before it alone:
    whoever is given the name later is somebody else. An entry's person is found by walking from
    the name that it was enrolled with, at the sequence it was enrolled at, along the moves that
    came later.

    Attributes:
        id: The name that was borne until then.
        at: When.
        moves: All moves of that name, the oldest first.
    """

    id: str
    at: datetime
    moves: list[SubjectMove]


class GalleryRejection(Message, frozen=True):
    """A rejection's event: of a face it was said that it is not a person; or that was withdrawn.

    Attributes:
        id: Its own. `-` is nobody's: a batch of entries ends with it, withdrawn, so that it is
            refused if the dataset was deleted meanwhile, or the import undone.
        at: When.
        subject: Who it is not, as named then.
        embedding: The face, little-endian float32 values; absent when withdrawn.
        entry: The entry that it was, if it was one.
        imported: The import that brought it.
    """

    id: str
    at: datetime
    subject: str
    embedding: bytes | None = None
    entry: str | None = None
    imported: str | None = None


class GalleryImport(Message, frozen=True, omit_defaults=False):
    """An import's event.

    Attributes:
        id: The import: its job.
        at: When it began.
        source: The file's name, or its digest.
        format: What it was.
        state: How it ended. `undone`: all entries that it added and nobody has replaced since, and
            all rejections that it brought, are gone, at once.
        added: Entries that were not there before.
        replaced: Entries that were; undoing does not bring them back.
        skipped: Entries that were there and stayed.
        rejections: Rejections that were not there before.
        by: Who.
    """

    id: str
    at: datetime
    source: str
    format: str
    state: Literal["running", "done", "failed", "undone"] = "running"
    added: int = 0
    replaced: int = 0
    skipped: int = 0
    rejections: int = 0
    by: str | None = None

"""Jobs: work that outlives its request, and what it can be about."""

from datetime import datetime
from typing import Annotated, Literal

from msgspec import Meta

from bus.messages.base import Message, Name, VersionName
from bus.messages.repository import AddedModel, Digest

JobState = Literal["queued", "running", "done", "failed", "cancelled"]
JobStage = Literal[
    "fetching", "storing", "validating", "loading", "reading", "embedding", "writing"
]
FileFormat = Literal["json", "npz", "parquet"]
FileSettings = Literal["take", "keep"]


class ImportModel(Message, frozen=True):
    """Asks for a model to be fetched from elsewhere; answered with the job that does it.

    Attributes:
        id: The model.
        url: `https://`, `http://` or `hf://owner/repo/file@revision`.
        version: The version's name; the next number, if not given.
        sha256: What the bytes must come to.
        load: Whether it is served when it has come and is sound.
        by: Who asks.
        key: The caller's idempotency key: asked again with it, the first job is the answer.
    """

    id: Name
    url: Annotated[str, Meta(min_length=1, max_length=2_048)]
    version: VersionName | None = None
    sha256: Digest | None = None
    load: bool = False
    by: Annotated[str, Meta(max_length=255)] | None = None
    key: Annotated[str, Meta(min_length=1, max_length=255)] | None = None


FileName = Annotated[str, Meta(min_length=1, max_length=255)]
"""What a file is called, without its folder."""


class GalleryWork(Message, frozen=True):
    """What a job is to do with a dataset.

    Attributes:
        action: What.
        dataset: With which.
        artefact: The file that is imported.
        format: Its format, or that of the export.
        existing: What an import does with entries that are there already.
        file_settings: What an import does with the settings of the dataset that its file carries:
            `take` sets the dataset to them, `keep` leaves it as it is set. Absent, a dataset that
            the import makes takes them, and one that is there keeps its own.
        into: The dataset that `reembed` makes.
        by: Who asked.
        key: The idempotency key.
        file_name: What the file that is imported is called where it comes from.
    """

    action: Literal["import", "export", "reembed"]
    dataset: Name
    artefact: Digest | None = None
    format: FileFormat | None = None
    existing: Literal["skip", "replace", "fail"] = "skip"
    file_settings: FileSettings | None = None
    into: Name | None = None
    by: str | None = None
    key: str | None = None
    file_name: FileName | None = None


class GalleryWorkDone(Message, frozen=True, omit_defaults=False):
    """What a job has done with a dataset.

    Attributes:
        entries: How many there were.
        added: How many of them are new.
        replaced: How many took another's place.
        skipped: How many were left as they were.
        failed: What could not be taken, and why, the first 100 of them: entries, rejections.
        rejections: How many rejections were written, or are new.
        settings: What became of the dataset's settings: they were `written` into the file, `taken`
            from it, or those that the dataset had were `kept`; null where there were none.
        notes: What is otherwise than whoever asked may think, a sentence each: settings that were
            left behind, rejections that were there already.
        artefact: The file that was exported, by SHA-256; it is deleted an hour after.
        size_bytes: Its size.
        file_name: What to call it.
        revision: Of the dataset.
    """

    entries: int
    added: int = 0
    replaced: int = 0
    skipped: int = 0
    failed: list[str] = []
    rejections: int = 0
    settings: Literal["written", "taken", "kept"] | None = None
    notes: list[str] = []
    artefact: str | None = None
    size_bytes: int | None = None
    file_name: str | None = None
    revision: int | None = None


class NameJob(Message, frozen=True):
    """Names a job."""

    job: Annotated[str, Meta(pattern=r"\A[a-z0-9]{1,40}\Z", description="must be the id of a job")]


class Job(Message, frozen=True, omit_defaults=False):
    """Work that outlives its request; bucket `jobs`, key `<job>`, and told of on `job.<job>`.

    Attributes:
        job: Its id.
        kind: `import`: of a model, `request`; `gallery`: something with a dataset, `gallery`.
        state: How far it is.
        request: What was asked, without passwords; of an `import`.
        gallery: What was asked; of a `gallery`.
        created_at: When.
        updated_at: When this was written.
        started_at: When the present try began.
        ended_at: When it came to an end.
        instance: Who does it; whoever lets `lease_until` pass has lost it.
        host: Where.
        lease_until: How long nobody else takes it up.
        tries: How often it was begun.
        failures: How many of the last tries brought nothing.
        retry_at: When it is tried again.
        stage: Of an import `fetching`, `storing`, `validating`, `loading`; of a gallery `reading`,
            `embedding`, `writing`, and of an export `storing`.
        bytes: What has come.
        total_bytes: What should come, where that is known.
        bytes_per_s: How fast, lately.
        entries: Of a gallery: how many entries are done.
        total_entries: Of how many, where that is known.
        entries_per_s: How fast, in this try.
        eta_s: Seconds until all of it is there, where that can be told.
        cancelling: Whether somebody wants it to end.
        error: Why it failed, or why the last try did.
        result: What it led to; of an import.
        gallery_result: Likewise; of a gallery.
        outdated: Of an export: the revision at which something was last deleted from its dataset
            while it ran; its file has to be of that one or later.
        only: The one instance that can do it, because it alone knows the password of the address.
    """

    job: str
    created_at: datetime
    updated_at: datetime
    kind: Literal["import", "gallery"] = "import"
    request: ImportModel | None = None
    gallery: GalleryWork | None = None
    state: JobState = "queued"
    started_at: datetime | None = None
    ended_at: datetime | None = None
    instance: str | None = None
    host: str | None = None
    lease_until: datetime | None = None
    tries: int = 0
    failures: int = 0
    retry_at: datetime | None = None
    stage: JobStage | None = None
    bytes: int = 0
    total_bytes: int | None = None
    bytes_per_s: float | None = None
    entries: int = 0
    total_entries: int | None = None
    entries_per_s: float | None = None
    eta_s: float | None = None
    cancelling: bool = False
    error: str | None = None
    result: AddedModel | None = None
    gallery_result: GalleryWorkDone | None = None
    outdated: int = 0
    only: str | None = None


class JobList(Message, frozen=True, omit_defaults=False):
    """Jobs, the newest first."""

    jobs: list[Job]

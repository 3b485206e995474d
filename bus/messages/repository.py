"""How artefacts come into the repository of models, are validated, described and removed."""

from datetime import datetime
from typing import Annotated, Any

from msgspec import Meta

from bus.messages.base import Message, Name, VersionName
from bus.messages.models import ModelSource, TensorInfo

Digest = Annotated[
    str,
    Meta(pattern=r"\A[0-9a-f]{64}\Z", description="must be a SHA-256: 64 hex digits, lower case"),
]
Text = Annotated[str, Meta(max_length=4_096)]
Labels = dict[
    Annotated[str, Meta(min_length=1, max_length=63)], Annotated[str, Meta(max_length=255)]
]


class ModelProblem(Message, frozen=True):
    """Something that is wrong with an artefact.

    Attributes:
        where: The field, node or tensor; empty for the whole file.
        what: What was found, and what is allowed.
    """

    where: str
    what: str


class ModelReport(Message, frozen=True, omit_defaults=False):
    """What the validation of an artefact found; bucket `models`, key `<digest>.report`.

    Attributes:
        checksum: The artefact, by its SHA-256.
        sound: Whether it can be loaded.
        validated_at: When that was found.
        problems: Why it cannot; of many the first ones.
        advice: What would make it better, for people.
        format: `linear` or `onnx`.
        size_bytes: Size of the artefact.
        inputs: What it takes; an axis of -1 is free.
        outputs: What it gives.
        batched: Whether rows of several requests can run together.
        opset: Version of the ONNX operator set.
        producer: What made the file, as the file says.
        operators: How often each operator occurs, the most frequent ones.
        parameters: How many numbers it has learned.
        peak_memory_bytes: The most that loading and running it took.
        load_ms: How long loading took, in milliseconds.
        run_ms: How long one run took on the sample, in milliseconds.
        sample_shapes: The shapes that it was run with, by input.
        runtime: What ran it, with its version.
        confined: What the validating process was kept from: `memory`, `cpu`, `files`, `network`,
            and `reading` other files.
    """

    checksum: str
    sound: bool
    validated_at: datetime
    problems: list[ModelProblem] = []
    advice: list[str] = []
    format: str = ""
    size_bytes: int = 0
    inputs: list[TensorInfo] = []
    outputs: list[TensorInfo] = []
    batched: bool = False
    opset: int | None = None
    producer: str | None = None
    operators: dict[str, int] = {}
    parameters: int | None = None
    peak_memory_bytes: int | None = None
    load_ms: float | None = None
    run_ms: float | None = None
    sample_shapes: dict[str, list[int]] = {}
    runtime: str = ""
    confined: list[str] = []


class RemovedFile(Message, frozen=True):
    """Says that a model's file was removed; bucket `models`, key `<model>.<digest>.removed`.

    A file of these bytes that lies in a watched folder since before is not entered again.

    Attributes:
        removed_at: When it was removed last.
    """

    removed_at: datetime


class AddModel(Message, frozen=True):
    """Asks for an artefact of the object store to become a version of a model, not yet served.

    Attributes:
        id: The model; made if there is none.
        checksum: The artefact.
        file_name: Names its format: `model.onnx`, `model.json`.
        version: The version's name; the next number, if not given.
        source: Where it came from.
        description: What the model is; stays as it is if not given.
        labels: The model's labels; stay as they are if not given.
        licence: The model's licence; stays as it is if not given.
    """

    id: Name
    checksum: Digest
    file_name: Annotated[str, Meta(min_length=1, max_length=200)]
    version: VersionName | None = None
    source: ModelSource | None = None
    description: Text | None = None
    labels: Labels | None = None
    licence: Annotated[str, Meta(max_length=255)] | None = None


class AddedModel(Message, frozen=True, omit_defaults=False):
    """A version that the repository has now.

    Attributes:
        id: The model.
        version: The version.
        checksum: Its artefact.
        created: Whether it is new; the same bytes under the same version are there once.
        report: What the validation found. A version that is not sound is kept, to be looked at,
            but cannot be loaded.
    """

    id: str
    version: str
    checksum: str
    created: bool
    report: ModelReport


class ValidateModel(Message, frozen=True):
    """Asks for a version to be validated again.

    Attributes:
        id: The model.
        version: A version or alias; `default` if not given.
        sample: An inference request of the Open Inference Protocol, in JSON, to run instead of
            zeros.
    """

    id: Name
    version: VersionName | None = None
    sample: dict[str, Any] | None = None


class DescribeModel(Message, frozen=True):
    """Asks for what people read about a model to be changed; what is not given stays.

    Attributes:
        id: The model.
        description: What it is.
        labels: All its labels.
        licence: Under which it may be used.
    """

    id: Name
    description: Text | None = None
    labels: Labels | None = None
    licence: Annotated[str, Meta(max_length=255)] | None = None


class RemoveModel(Message, frozen=True):
    """Asks for a model, or one version of it, to be deleted.

    Attributes:
        id: The model.
        version: A version, by its own name; every one if not given.
        force: Delete it although it is served, or an alias leads to it.
        dry_run: Only say what would happen.
    """

    id: Name
    version: VersionName | None = None
    force: bool = False
    dry_run: bool = False


class RemovedModel(Message, frozen=True, omit_defaults=False):
    """What was deleted, or would be.

    Attributes:
        id: The model.
        versions: Its versions that left.
        artefacts: The artefacts that left with them: those that no other version needs.
        freed_bytes: What these took.
        used_by: What still uses it: `served by candle.0 on HOST`, `alias default`.
        dry_run: Whether nothing was done.
    """

    id: str
    versions: list[str]
    artefacts: list[str]
    freed_bytes: int
    used_by: list[str] = []
    dry_run: bool = False


class CollectGarbage(Message, frozen=True):
    """Asks for artefacts that no version needs, and what broken uploads left, to be deleted."""

    dry_run: bool = False


class CollectedGarbage(Message, frozen=True, omit_defaults=False):
    """What was deleted, or would be: artefacts, reports and unfinished uploads."""

    artefacts: list[str]
    uploads: list[str]
    freed_bytes: int
    dry_run: bool = False


class UnfinishedUpload(Message, frozen=True):
    """An upload through the gateway that goes on, or broke off; key `<id>.<version>.upload`.

    Attributes:
        id: The model.
        version: The version that it becomes.
        upload: Its chunks in the object store.
        file_name: What the file is called.
        begun_at: When its first byte came.
        total_bytes: How many bytes it will have, where that is known.
        offset: How many had come when it broke off.
        broken_at: When it broke off; None while it goes on, or if the gateway ended meanwhile.
    """

    id: str
    version: str
    upload: str
    file_name: str
    begun_at: datetime
    total_bytes: int | None = None
    offset: int = 0
    broken_at: datetime | None = None


class KeptAnswer(Message, frozen=True):
    """What an upload was answered, for those who ask again; key `<idempotency key>.answer`.

    Attributes:
        key: The caller's idempotency key, by its SHA-256.
        request: Method and address that it was used for.
        checksum: The artefact that came with it.
        status: The HTTP status of the answer.
        location: Where the version is.
        body: The answer.
    """

    key: str
    request: str
    checksum: str
    status: int
    location: str
    body: bytes


class ShippedModel(Message, frozen=True, omit_defaults=False):
    """Weights that come with a plugin; a worker lists them in its registration, `meta.ships`.

    Attributes:
        name: What they are called.
        version: Which of them.
        checksum: SHA-256 of the file, hex.
        size_bytes: Size of the file.
        licence: Under which they may be used, an SPDX identifier.
        source: Where they come from.
        used_for: What they do there.
        plugin: Whose they are; a registration says it already.
    """

    name: str
    version: str
    checksum: str
    size_bytes: int
    licence: str
    source: str
    used_for: str
    plugin: str = ""


class ShippedModels(Message, frozen=True, omit_defaults=False):
    """What comes with the plugins that run, by plugin and name."""

    models: list[ShippedModel]

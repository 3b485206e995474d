"""Models: what the repository has, what instances serve, and what can be asked of them."""

from datetime import datetime
from typing import Annotated, Any, Literal

from msgspec import Meta

from bus.messages.base import Message, Name, VersionName


class TensorInfo(Message, frozen=True):
    """One input or output: Open Inference Protocol datatype, shape with -1 for any length.

    What may have any number of axes has the shape `[-1]`, too.
    """

    name: str
    datatype: str
    shape: list[int]


class ModelConfig(Message, frozen=True, forbid_unknown_fields=True):
    """How a version of a model is run; what is not set here is as candle's settings say.

    Attributes:
        max_batch_rows: Rows that are put together into one run.
        max_waiting_rows: Rows that may wait; more are refused.
        max_delay_ms: How long a batch that is not full may wait for more rows, in milliseconds.
        instances: Runs at the same time.
        threads: Threads of one run.
        provider: What computes: `cpu`, `cuda`, or another one that onnxruntime has here.
        pinned: Whether it stays in memory, whatever else wants room.
        keep_alive_s: Seconds without a request after which it leaves memory; the next request
            brings it back. None: it stays as long as there is room.
    """

    max_batch_rows: Annotated[int, Meta(ge=1, le=65_536)] | None = None
    max_waiting_rows: Annotated[int, Meta(ge=1, le=1_048_576)] | None = None
    max_delay_ms: Annotated[float, Meta(ge=0, le=10_000)] | None = None
    instances: Annotated[int, Meta(ge=1, le=64)] | None = None
    threads: Annotated[int, Meta(ge=1, le=256)] | None = None
    provider: Annotated[str, Meta(pattern=r"^[a-z0-9_-]{1,32}$")] | None = None
    pinned: bool = False
    keep_alive_s: Annotated[float, Meta(gt=0, le=31_536_000)] | None = None


class ModelSource(Message, frozen=True):
    """Where an artefact came from.

    Attributes:
        kind: The models folder, an upload, an import, or the body of a request to load.
        file_name: What the file was called there.
        by: Who brought it, as far as that is known: the name of a client or of a user.
        url: Its address, without passwords and queries.
    """

    kind: Literal["folder", "upload", "import", "content"]
    file_name: str = ""
    by: str | None = None
    url: str | None = None


class ModelVersion(Message, frozen=True):
    """One version of a model: an artefact, and how it is run.

    Attributes:
        version: Its name, `1`, `2` and so on unless somebody gave another one.
        path: The file's path below the models directory, as it was given.
        checksum: SHA-256 of the artefact, hex; its name in the object store.
        format: `linear` or `onnx`.
        added_at: When it came.
        wanted: Whether it should be served.
        wanted_at: When that was last asked for.
        size_bytes: Size of the artefact.
        config: How it is run.
        inputs: What it takes.
        outputs: What it gives.
        batched: Whether rows of several requests can run together.
        sound: What the validation of the artefact came to; its report has the rest. None: it has
            not been validated.
        problem: The first thing that is wrong with it.
        source: Where the artefact came from.
    """

    version: VersionName
    path: str
    checksum: str
    format: str
    added_at: datetime
    wanted: bool = True
    wanted_at: datetime | None = None
    size_bytes: int = 0
    config: ModelConfig = ModelConfig()
    inputs: list[TensorInfo] = []
    outputs: list[TensorInfo] = []
    batched: bool = False
    sound: bool | None = None
    problem: str | None = None
    source: ModelSource | None = None


class ModelSpec(Message, frozen=True):
    """A model of the repository; bucket `models`, key `<id>`.

    Attributes:
        id: The name that requests use.
        versions: Its versions, in the order in which they came.
        aliases: Further names of versions. `default` is what answers a request that names none;
            where it is not given, that is `latest`, the wanted version with the highest number.
        description: What it is, for people.
        labels: Names and values to find it by.
        licence: Under which it may be used, an SPDX identifier where there is one.
        created_at: When its first version came.
    """

    id: Name
    versions: list[ModelVersion]
    aliases: dict[str, str] = {}
    description: str = ""
    labels: dict[str, str] = {}
    licence: str | None = None
    created_at: datetime | None = None


ModelState = Literal["queued", "fetching", "loading", "ready", "cold", "failed", "leaving"]


class ServedModel(Message, frozen=True):
    """A version as one instance has it.

    Attributes:
        id: The model.
        version: The version.
        state: `queued`, `fetching` and `loading` on its way; `cold` when it left memory and comes
            back when it is asked for; `leaving` while its last requests are answered.
        since: Since when.
        names: What it answers to: its version, and aliases.
        progress: Share of the artefact that was fetched, 0 to 1, while it is.
        reason: Why it failed, or is cold.
        memory_bytes: What loading it took.
        threads: Threads of one run.
        last_used: When it was last asked.
        kept: Why it stays: `pinned`, `keep-alive` or `room`.
        revision: Of which revision of the model's wish this is told; 0 if it does not say.
        instances: Runs that may go on at the same time; 0 while it is not in memory.
    """

    id: str
    version: str
    state: ModelState
    since: datetime
    names: list[str] = []
    progress: float | None = None
    reason: str | None = None
    memory_bytes: int = 0
    threads: int = 0
    last_used: datetime | None = None
    kept: str | None = None
    revision: int = 0
    instances: int = 0


class ServedModels(Message, frozen=True):
    """What one instance serves; bucket `observed`, key `<plugin>.<slot>.models`.

    Attributes:
        plugin: The plugin.
        slot: The slot.
        instance: The instance.
        host: Where it runs.
        models: Every version that it has, or is on its way to.
        budget_bytes: What all of them may take.
    """

    plugin: str
    slot: int
    instance: str
    host: str
    models: list[ServedModel]
    budget_bytes: int = 0


class LoadModel(Message, frozen=True):
    """Asks for a model to be served.

    Attributes:
        id: The name that requests will use.
        path: A file below the models directory. Without it a version that the repository has is
            served again.
        version: The version's name. With a path and without a version, the file takes the place of
            what is served: a new version, and the old ones leave when it serves. With both, it is
            served beside them.
        config: How it is run; what it was, if not given.
        content: The file itself, in base64, instead of one below the models directory; the path
            then only names its format.
    """

    id: Name
    path: Annotated[str, Meta(min_length=1, max_length=1024)] | None = None
    version: VersionName | None = None
    config: ModelConfig | None = None
    content: bytes | None = None


class LoadedModel(Message, frozen=True):
    """A version of a model that is served.

    Attributes:
        id: The name that requests use.
        input_dim: Length of one input row; null where inputs are not rows.
        output_dim: Length of one output row; null where outputs are not rows.
        checksum: SHA-256 of the file, hex.
        path: The file below the models directory.
        loaded_at: When it was asked for.
        metadata: What the file says about itself.
        format: `linear` or `onnx`.
        inputs: What it takes.
        outputs: What it gives.
        requests: Requests answered by the instance that tells.
        rows: Rows that they had.
        version: The version.
        names: What it answers to: its version, and aliases.
        provider: What computes.
        threads: Threads of one run.
        memory_bytes: What loading it took.
        last_used: When it was last asked.
        config: How it is run.
        revision: Of which revision of the model's wish this is told; 0 if it does not say.
    """

    id: str
    input_dim: int | None
    output_dim: int | None
    checksum: str
    path: str
    loaded_at: datetime
    metadata: dict[str, Any]
    format: str
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]
    requests: int = 0
    rows: int = 0
    version: str = ""
    names: list[str] = []
    provider: str = ""
    threads: int = 0
    memory_bytes: int = 0
    last_used: datetime | None = None
    config: ModelConfig = ModelConfig()
    revision: int = 0


class UnloadModel(Message, frozen=True):
    """Asks for a model, or one version of it, to be served no longer; its artefact stays."""

    id: Name
    version: VersionName | None = None


class UnloadedModel(Message, frozen=True):
    """The model is served no longer."""

    id: str


class AliasModel(Message, frozen=True):
    """Asks for a name to stand for a version, in one step for every request.

    Attributes:
        id: The model.
        alias: The name: `default`, or any other but `latest`.
        version: What it stands for; null takes the name away.
    """

    id: Name
    alias: VersionName
    version: VersionName | None


class ModelAliases(Message, frozen=True):
    """What the names of a model stand for."""

    id: str
    aliases: dict[str, str]


class WakeModel(Message, frozen=True):
    """Asks for a version that left memory to come back; answered at once.

    Attributes:
        id: The model.
        version: A version or alias; `default` if not given.
    """

    id: Name
    version: VersionName | None = None


class RunModel(Message, frozen=True):
    """Asks for a forward pass over rows.

    Attributes:
        id: The model.
        inputs: Shape ``[n, input_dim]``.
    """

    id: Name
    inputs: list[list[float]]


class ModelOutput(Message, frozen=True):
    """One forward pass, done.

    Attributes:
        id: The model.
        outputs: The first output of numbers, shape ``[n, output_dim]``, rows in the order of the
            inputs.
        execution_ms: Time inside the runtime, without queueing, in milliseconds.
        named: All outputs by name, where `outputs` cannot carry them: several, or other than rows
            of numbers.
        checksum: SHA-256 of the artefact that answered.
        instance: The instance that answered.
        version: The version that answered.
    """

    id: str
    outputs: list[list[float]]
    execution_ms: float
    named: dict[str, Any] = {}
    checksum: str | None = None
    instance: str | None = None
    version: str | None = None


class DurationStat(Message, frozen=True, omit_defaults=False):
    """How many times, and how long together, in nanoseconds."""

    count: int = 0
    ns: int = 0


class InferenceStats(Message, frozen=True, omit_defaults=False):
    """What requests for a model came to, and what their time went into.

    Attributes:
        success: Requests that got outputs, from coming to answer.
        fail: Requests that got an error.
        queue: Their wait for a run.
        compute_input: Putting inputs together; each request counts the whole of its run.
        compute_infer: The model itself.
        compute_output: Taking outputs apart.
    """

    success: DurationStat = DurationStat()
    fail: DurationStat = DurationStat()
    queue: DurationStat = DurationStat()
    compute_input: DurationStat = DurationStat()
    compute_infer: DurationStat = DurationStat()
    compute_output: DurationStat = DurationStat()


class BatchStat(Message, frozen=True, omit_defaults=False):
    """Runs of one size: `batch_size` rows, above 256 rounded up to a power of two."""

    batch_size: int = 0
    compute_input: DurationStat = DurationStat()
    compute_infer: DurationStat = DurationStat()
    compute_output: DurationStat = DurationStat()


class ModelStatistics(Message, frozen=True, omit_defaults=False):
    """What one version of a model was asked, in the shape of Triton's statistics extension.

    Its readers expect every field, so none is left out.

    Attributes:
        name: The model.
        version: Which of its versions.
        last_inference: When the last run ended, in milliseconds since 1970; 0 before the first.
        inference_count: Rows that ran.
        execution_count: Runs.
        inference_stats: What the requests came to.
        batch_stats: The runs, by size.
        failures: Requests that got an error, by its code; `cancelled` if the caller left.
        queue_rows: Rows that wait just now.
        threads: Threads that its runs may use.
        instances: Runs that may go on at the same time.
    """

    name: str = ""
    version: str = ""
    last_inference: int = 0
    inference_count: int = 0
    execution_count: int = 0
    inference_stats: InferenceStats = InferenceStats()
    batch_stats: list[BatchStat] = []
    failures: dict[str, int] = {}
    queue_rows: int = 0
    threads: int = 0
    instances: int = 0


class CandleStats(Message, frozen=True):
    """What an instance serves, and what it has done.

    Attributes:
        models: Every version that is loaded.
        instance: The instance that tells.
        model_stats: What each version here has done, as Triton's statistics extension has it; also
            of those that are not loaded just now.
    """

    models: list[LoadedModel]
    instance: str | None = None
    model_stats: list[ModelStatistics] = []

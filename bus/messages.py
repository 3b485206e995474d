"""The payload of every subject, as frozen structs.

Adding an optional field is compatible; a field is never given a new meaning. Readers pass over
fields that they do not know. Plugin states are camelCase on the wire, capability payloads
snake_case: clients of the system that this one grew out of rely on both. Times are UTC.
"""

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

Status = Literal["stopped", "starting", "running", "degraded", "stopping", "error"]
Level = Literal["debug", "info", "warn", "error"]

_PLUGIN_NAME = r"\A[a-z0-9][a-z0-9_-]{0,62}\Z"
_NAME = r"\A\w(?:[\w .@:+-]{0,126}[\w])?\Z"
_VERSION_NAME = r"\A[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?\Z"
# What people are told instead of the expression.
PATTERNS_IN_WORDS = {
    _PLUGIN_NAME: "must be a plugin's name: lower case letters, digits, - and _, at most 63",
    _NAME: "must be a name: letters, digits and _, inside also spaces and . @ : + -, at most 128",
    _VERSION_NAME: "must be the name of a version: letters, digits, inside also . _ -, at most 64",
}

PluginName = Annotated[str, Meta(pattern=_PLUGIN_NAME, description=PATTERNS_IN_WORDS[_PLUGIN_NAME])]
Name = Annotated[str, Meta(pattern=_NAME, description=PATTERNS_IN_WORDS[_NAME])]
VersionName = Annotated[
    str, Meta(pattern=_VERSION_NAME, description=PATTERNS_IN_WORDS[_VERSION_NAME])
]


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What travels. A field at its default is left out."""


class State(Message, frozen=True, rename="camel"):
    """What travels about plugins: camelCase."""


class Empty(Message, frozen=True):
    """No arguments."""


def now() -> datetime:
    """Return the present time in UTC."""
    return datetime.now(UTC)


# --- Plugins: configuration, desired and observed state -----------------------------------------


class Healthcheck(State, frozen=True):
    """How an instance's health is asked for.

    Attributes:
        path: The path on the instance's own HTTP port.
        interval_seconds: Time between two checks.
        timeout_seconds: Time that one answer may take.
        failure_threshold: How many consecutive failures replace the instance.
        startup_grace_seconds: Time after the start in which failures do not count.
    """

    path: Annotated[str, Meta(pattern="^/")] = "/health"
    interval_seconds: Annotated[float, Meta(ge=0.1, le=3600)] = 10.0
    timeout_seconds: Annotated[float, Meta(gt=0, le=600)] = 2.0
    failure_threshold: Annotated[int, Meta(ge=1, le=1000)] = 3
    startup_grace_seconds: Annotated[float, Meta(ge=0, le=3600)] = 30.0


class PluginConfig(State, frozen=True, forbid_unknown_fields=True):
    """An entry of the catalogue.

    Attributes:
        name: The plugin.
        description: One sentence for people.
        entrypoint: What starts a worker: a Python module (`services.candle`), or the path of a
            program.
        capabilities: What its instances can be asked.
        args: Arguments for the entry point.
        env: Environment added for it.
        autostart: Whether it is wanted from the start.
        settings: The plugin's own settings; checked against its `configSchema`.
        healthcheck: How its health is asked for.
        replicas: How many instances are wanted.
        requires: Host labels that a replica needs.
        memory_max_bytes: Resident memory from which an instance is replaced; no limit if absent.
    """

    name: PluginName
    description: str
    entrypoint: Annotated[str, Meta(min_length=1)]
    capabilities: list[str]
    args: list[str] = []
    env: dict[str, str] = {}
    autostart: bool = False
    settings: dict[str, Any] = {}
    healthcheck: Healthcheck | None = None
    replicas: Annotated[int, Meta(ge=0, le=100)] = 1
    requires: dict[str, str] = {}
    memory_max_bytes: Annotated[int, Meta(ge=1024 * 1024)] | None = None


class DesiredState(State, frozen=True):
    """What a plugin should be; bucket `desired`, key `<plugin>`.

    Attributes:
        config: How, and how many.
        enabled: Whether it should run at all.
        generation: Counts the changes; an instance of an older one is replaced.
        changed_by: Who asked for the last change.
        changed_at: When.
    """

    config: PluginConfig
    enabled: bool
    generation: int
    changed_by: str
    changed_at: datetime


class ProcessState(State, frozen=True):
    """A replica as its supervisor sees it; bucket `observed`, key `<plugin>.<slot>.process`.

    Attributes:
        plugin: The plugin.
        slot: The replica's stable number.
        host: Where.
        status: `starting` until the instance has registered.
        generation: The generation of desired state that it was started for.
        since: When it entered this status.
        pid: The process, while there is one.
        restarts: Unwanted ends since it last ran well.
        last_exit: How the last process ended, in words.
        error: Why it does not run, with the last thing that it said.
        last_lines: What it printed last before it ended by itself.
        mem_bytes: Resident memory of its processes.
    """

    plugin: PluginName
    slot: int
    host: str
    status: Status
    generation: int
    since: datetime
    pid: int | None = None
    restarts: int = 0
    last_exit: str | None = None
    error: str | None = None
    last_lines: list[str] = []
    mem_bytes: int | None = None


class Registration(State, frozen=True):
    """An instance as it tells of itself; bucket `observed`, key `<plugin>.<slot>.instance`.

    Attributes:
        id: This process, and no other before or after it.
        plugin: The plugin.
        slot: The place that it fills.
        host: Where.
        pid: Its process.
        version: Version of the plugin.
        capabilities: What it can be asked.
        status: `starting`, `running` or `stopping`.
        since: When it entered this status.
        last_heartbeat: When this was last said.
        generation: The generation of desired state that it was started for.
        port: Its loopback HTTP port, when it has one.
        meta: What it tells about itself.
        config_schema: JSON Schema of its settings.
        live_settings: The settings whose changes it takes without a restart.
        config_revision: The revision of desired state whose configuration it has; 0 if it does not
            tell.
    """

    id: str
    plugin: PluginName
    slot: int
    host: str
    pid: int
    version: str
    capabilities: list[str]
    status: Status
    since: datetime
    last_heartbeat: datetime
    generation: int = 0
    port: int | None = None
    meta: dict[str, Any] = {}
    config_schema: dict[str, Any] | None = None
    live_settings: list[str] = []
    config_revision: int = 0


class InstanceState(State, frozen=True):
    """One place of a plugin and what fills it."""

    slot: int
    host: str
    status: Status
    since: datetime
    restarts: int
    id: str | None = None
    pid: int | None = None
    port: int | Literal["internal"] | None = None
    last_exit: str | None = None
    error: str | None = None
    version: str | None = None
    last_heartbeat: datetime | None = None
    generation: int | None = None
    config_revision: int | None = None
    last_lines: list[str] = []
    mem_bytes: int | None = None


class Replicas(State, frozen=True):
    """How many instances are wanted, and how many answer."""

    desired: int
    ready: int


class PluginState(State, frozen=True):
    """A plugin as a whole: desired and observed state in one.

    `pid`, `port` and `lastHeartbeat` are those of the lowest running slot.
    """

    name: str
    status: Status
    capabilities: list[str]
    config: PluginConfig | None
    replicas: Replicas
    instances: list[InstanceState]
    generation: int
    revision: int
    pid: int | None = None
    port: int | Literal["internal"] | None = None
    last_heartbeat: datetime | None = None
    config_schema: dict[str, Any] | None = None
    error: str | None = None


class HostState(State, frozen=True):
    """A host as its supervisor tells of it; bucket `hosts`, key `<host>`.

    Attributes:
        name: The host.
        id: The supervisor's process, and no other before or after it.
        pid: Its number there.
        version: Of bkg.
        since: When that supervisor came.
        last_heartbeat: When this was last said.
        labels: What plugins can require of a host.
        processors: How many it may use.
        mem_total_bytes: Its memory, or the limit of the group that it runs in.
        mem_available_bytes: What of it is free for more.
    """

    name: Name
    id: str
    pid: int
    version: str
    since: datetime
    last_heartbeat: datetime
    labels: dict[str, str] = {}
    processors: int = 1
    mem_total_bytes: int = 0
    mem_available_bytes: int = 0


class HostDesired(State, frozen=True):
    """What a host should be; bucket `desired`, key `<host>.host`.

    Attributes:
        draining: Whether its replicas move away, and none comes.
        changed_by: Who asked for the last change.
        changed_at: When.
    """

    draining: bool
    changed_by: str
    changed_at: datetime


class HostInfo(State, frozen=True):
    """A host as others see it: what it tells, and what is wanted of it.

    Attributes:
        name: The host.
        status: `ready`, `draining`, `drained` when nothing is left there, or `lost`.
        labels: What plugins can require of it.
        version: Of bkg.
        since: When its supervisor came.
        last_heartbeat: When that was last heard of.
        processors: How many it may use.
        mem_total_bytes: Its memory.
        mem_available_bytes: What of it is free for more.
        replicas: What runs there, `plugin/slot`.
    """

    name: Name
    status: Literal["ready", "draining", "drained", "lost"]
    labels: dict[str, str]
    version: str
    since: datetime
    last_heartbeat: datetime
    processors: int
    mem_total_bytes: int
    mem_available_bytes: int
    replicas: list[str]


class HostList(State, frozen=True):
    """Every host that is there, by name."""

    hosts: list[HostInfo]


class NameHost(State, frozen=True):
    """Names one host; `by`, `timeout_s` and `wait` as in `NamePlugin`."""

    name: Name
    by: str = "nats"
    timeout_s: Annotated[float, Meta(gt=0, le=600)] = 30.0
    wait: bool = True


class NamePlugin(State, frozen=True):
    """Names one plugin; every command for the supervisor carries at least this.

    Attributes:
        name: The plugin.
        by: Who asks.
        timeout_s: How long the answer may wait for observed state to reach desired state.
        wait: Whether it waits at all; without, it is the state as it is.
    """

    name: PluginName
    by: str = "nats"
    timeout_s: Annotated[float, Meta(gt=0, le=600)] = 30.0
    wait: bool = True


class ConfigurePlugin(NamePlugin, frozen=True, kw_only=True):
    """Replaces a plugin's configuration; `revision` refuses it when another change came first.

    A secret setting that is the mask `********` keeps the value that is stored.
    """

    config: PluginConfig
    revision: int | None = None


class ScalePlugin(NamePlugin, frozen=True, kw_only=True):
    """Changes how many replicas are wanted; `revision` as in `ConfigurePlugin`."""

    replicas: Annotated[int, Meta(ge=0, le=100)]
    revision: int | None = None


class RollbackPlugin(NamePlugin, frozen=True, kw_only=True):
    """Stores an older configuration as a new revision.

    Attributes:
        revision: Whose configuration.
        at_revision: The present revision; refused when another change came first.
    """

    revision: int
    at_revision: int | None = None


class ConfigError(State, frozen=True):
    """What is wrong with one field of a configuration, in a sentence."""

    field: str
    message: str


class ConfigChange(State, frozen=True):
    """What differs between two configurations; what was or is not there is left out."""

    field: str
    before: Any = None
    after: Any = None


class ConfigCheck(State, frozen=True):
    """What storing a configuration would do; nothing was stored.

    Attributes:
        valid: Whether it would be stored.
        errors: Why not.
        changes: What differs from what is stored.
        restarts: Whether the instances would be replaced.
    """

    valid: bool
    errors: list[ConfigError]
    changes: list[ConfigChange]
    restarts: bool


class HistoryOfPlugin(State, frozen=True):
    """Asks for the newest revisions of a plugin's desired state."""

    name: PluginName
    limit: Annotated[int, Meta(ge=1, le=64)] = 20


class PluginRevision(State, frozen=True):
    """One revision of a plugin's desired state.

    Attributes:
        revision: Its number.
        config: The configuration, with its secrets masked.
        enabled: Whether the plugin should run.
        generation: Counts the changes that replace instances.
        changed_by: Who asked for it.
        changed_at: When.
        changes: What differs from the revision before, as far as that is kept.
    """

    revision: int
    config: PluginConfig
    enabled: bool
    generation: int
    changed_by: str
    changed_at: datetime
    changes: list[ConfigChange]


class PluginHistory(State, frozen=True):
    """The kept revisions of a plugin's desired state, newest first."""

    revisions: list[PluginRevision]


class PluginSchema(State, frozen=True):
    """The last known schema of a plugin's settings; bucket `desired`, key `<plugin>.schema`.

    Attributes:
        config_schema: The JSON Schema.
        version: Of the plugin that told it.
        changed_at: When it was first told.
    """

    config_schema: dict[str, Any]
    version: str
    changed_at: datetime


class PluginList(State, frozen=True):
    """Every plugin known by configuration or registration, by name."""

    plugins: list[PluginState]


# --- What every instance publishes --------------------------------------------------------------


class LogEvent(State, frozen=True):
    """One log record.

    Attributes:
        plugin: Who speaks.
        level: How bad.
        message: What happened, `noun.verb`, or a captured line.
        timestamp: When, by the speaker's clock.
        slot: Which of the plugin's instances.
        instance: Its id.
        host: Where.
        logger: The part that speaks; `stdout` or `stderr` for captured lines.
        fields: The values.
        trace: The trace id of the request that it belongs to.
        seq: The number that the stream gave it; set when it is read.
    """

    plugin: str
    level: Level
    message: str
    timestamp: datetime
    slot: int | None = None
    instance: str | None = None
    host: str | None = None
    logger: str | None = None
    fields: dict[str, Any] = {}
    trace: str | None = None
    seq: int | None = None


class TelemetrySnapshot(State, frozen=True):
    """What an instance uses and holds.

    Attributes:
        plugin: The plugin.
        cpu: Percent of one core since the last snapshot.
        mem_bytes: Resident memory.
        timestamp: When.
        models_loaded: candle only.
        datasets: rustyface only.
        entries: rustyface only.
        slot: Which instance; absent in a sum over instances.
        instance: Its id.
        host: Where.
        gauges: Further numbers by name.
    """

    plugin: str
    cpu: float
    mem_bytes: int
    timestamp: datetime
    models_loaded: int | None = None
    datasets: int | None = None
    entries: int | None = None
    slot: int | None = None
    instance: str | None = None
    host: str | None = None
    gauges: dict[str, float] = {}


class HostTelemetry(State, frozen=True):
    """What a host has, and what of it is in use.

    Attributes:
        host: Its name.
        timestamp: When.
        processors: How many it may use: what is there, or the quota of its control group.
        cpu: Percent of them in use since the last snapshot: 100 is all of them.
        load: Processes that run or wait to: the averages over 1, 5 and 15 minutes.
        mem_total_bytes: Its memory, or the limit of its control group.
        mem_available_bytes: What of it is free for more.
        disk_total_bytes: Size of the disk that has the data directory.
        disk_free_bytes: What of it is free for us.
    """

    host: str
    timestamp: datetime
    processors: float
    cpu: float
    load: list[float]
    mem_total_bytes: int
    mem_available_bytes: int
    disk_total_bytes: int
    disk_free_bytes: int


class BrokerTelemetry(State, frozen=True):
    """What the broker keeps, and how fast it answers.

    Attributes:
        timestamp: When.
        host: From where it was measured.
        stored_bytes: What its streams hold on disk.
        limit_bytes: What they may hold; absent without a limit for the account.
        reserved_bytes: What they were promised.
        streams: How many, buckets included.
        consumers: How many readers.
        round_trip_ms: From here to the broker and back.
    """

    timestamp: datetime
    host: str
    stored_bytes: int
    streams: int
    consumers: int
    round_trip_ms: float
    limit_bytes: int | None = None
    reserved_bytes: int | None = None


class SetLogLevel(State, frozen=True):
    """Changes from which level an instance publishes its log records, for a while.

    Attributes:
        level: The least level.
        seconds: After this time it falls back by itself.
        by: Who asks.
    """

    level: Level
    seconds: Annotated[float, Meta(gt=0, le=86_400)] = 600.0
    by: str = "nats"


class ToldInstance(State, frozen=True):
    """An instance that was told something; one that is no plugin's has no id here."""

    slot: int
    id: str | None = None
    host: str | None = None


class LogLevelSet(State, frozen=True):
    """Who was told to change its log level, and until when.

    Attributes:
        name: The plugin.
        level: The least level that it publishes from now on.
        until: When that ends.
        told: Its instances.
    """

    name: str
    level: Level
    until: datetime
    told: list[ToldInstance]


class Event(State, frozen=True):
    """Something that happened, kept for 30 days.

    Attributes:
        kind: What it happened to.
        name: Which plugin or host.
        verb: What happened, in the past: `started`, `ready`, `crashed`, `configured`, `joined`.
        timestamp: When.
        slot: Which of a plugin's places.
        host: Where.
        cause: Why, in words.
        by: Who asked for it.
        seq: The number that the stream gave it; set when it is read.
    """

    kind: Literal["plugin", "host"]
    name: str
    verb: str
    timestamp: datetime
    slot: int | None = None
    host: str | None = None
    cause: str | None = None
    by: str | None = None
    seq: int | None = None


class CancelCall(State, frozen=True):
    """Nobody waits for a reply any more: who works on it may stop.

    Attributes:
        inbox: The reply subject of the request.
    """

    inbox: str


class Heartbeat(State, frozen=True):
    """A sign of life, once a second.

    Attributes:
        plugin: The plugin.
        slot: Which instance.
        id: Its id.
        host: Where.
        pid: Its process.
        status: As in its registration.
        in_flight: Requests being worked on.
        oldest_s: Age of the oldest of them; one that grows is a hung worker.
        lag_ms: How late the event loop was.
        generation: The generation that it was started for.
        timestamp: When.
    """

    plugin: str
    slot: int
    id: str
    host: str
    pid: int
    status: Status
    in_flight: int
    oldest_s: float
    lag_ms: float
    generation: int
    timestamp: datetime


# --- candle ---------------------------------------------------------------------------------------


class TensorInfo(Message, frozen=True):
    """One input or output: Open Inference Protocol datatype, shape with -1 for any length."""

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


class ModelSpec(Message, frozen=True):
    """A model of the repository; bucket `models`, key `<id>`.

    Attributes:
        id: The name that requests use.
        versions: Its versions, in the order in which they came.
        aliases: Further names of versions. `default` is what answers a request that names none;
            where it is not given, that is `latest`, the wanted version with the highest number.
    """

    id: Name
    versions: list[ModelVersion]
    aliases: dict[str, str] = {}


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
    """

    id: str
    outputs: list[list[float]]
    execution_ms: float
    named: dict[str, Any] = {}
    checksum: str | None = None
    instance: str | None = None


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
        model_stats: What each of them has done, as Triton's statistics extension has it.
    """

    models: list[LoadedModel]
    instance: str | None = None
    model_stats: list[ModelStatistics] = []


# --- rustyface ------------------------------------------------------------------------------------


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

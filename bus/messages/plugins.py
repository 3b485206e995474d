"""Plugins and hosts: configuration, desired and observed state, and what can be asked of them."""

from datetime import datetime
from typing import Annotated, Any, Literal

from msgspec import Meta

from bus.messages.base import Name, PluginName, State, Status


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

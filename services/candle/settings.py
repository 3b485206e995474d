"""candle's settings, and what a model's own configuration makes of them."""

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from bus import messages as m
from services.candle.repository.validation import Limits
from services.candle.runtimes.base import CPU

INSTANCES_MAX: Final = 64
"""What a configuration may ask for, and what is started by itself on a large machine."""

MIB: Final = 1024 * 1024

Secret = Annotated[str, Meta(extra_json_schema={"format": "password"})]


class CandleSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The plugin's settings. All but the first three are taken live.

    Attributes:
        models_path: Folder that `candle.model.load` takes files from; relative to the data
            directory.
        default_model: A file there that is served as `default` from the start.
        threads: onnxruntime threads for each model that is loaded from now on; if not set, the
            processors that this worker may use, divided among its models.
        telemetry_interval: Seconds between two telemetry snapshots.
        max_batch_rows: Rows that are put together into one run.
        max_waiting_rows: Rows that may wait for a model; more are refused.
        max_delay_ms: How long a batch that is not full may wait for more rows, in milliseconds.
        memory_budget_mb: What the loaded models may take together; if not set, seven tenths of the
            memory that the plugin may have, or half of the host's. Beyond it, what was not asked
            for longest leaves memory, and comes back when it is asked for.
        cache_max_mb: What artefacts may take on this host's disk.
        validation_memory_mb: What looking into one file may take of memory; if not set, 1 GiB and
            four times the file, at most three quarters of what the worker may use.
        validation_cpu_s: The same of processor time, in seconds; if not set, 60 and one for every
            8 MiB of the file.
        validation_wall_s: The same of time, in seconds; if not set, five times that.
        watch_folder: Whether files in the models folder become versions by themselves, not served.
        import_jobs: Imports that one instance does at a time.
        import_max_mb: What an imported file may have.
        import_timeout_s: How long one try may take, in seconds.
        import_stall_s: How long nothing may come, in seconds, before it is tried again.
        import_allow: Hosts that may have addresses of the house: names, patterns such as
            `*.example.org`, addresses and networks. All others must be on the Internet.
        import_deny: Hosts that are never asked.
        import_only: If there are any, nobody else is asked.
        import_offline: Nobody is asked at all.
        import_ca_file: A file with certificates of further authorities to trust.
        import_credentials: By host, `user:password`, or the value of the header Authorization.
        hf_token: The token for the Hugging Face hub; if not set, that of the environment.
    """

    models_path: str = "models"
    default_model: str | None = None
    threads: Annotated[int, Meta(ge=1, le=256)] | None = None
    telemetry_interval: Annotated[float, Meta(gt=0, le=3600)] = 10.0
    max_batch_rows: Annotated[int, Meta(ge=1, le=65_536)] = 256
    max_waiting_rows: Annotated[int, Meta(ge=1, le=1_048_576)] = 4_096
    max_delay_ms: Annotated[float, Meta(ge=0, le=10_000)] = 0.0
    memory_budget_mb: Annotated[int, Meta(ge=1, le=1 << 30)] | None = None
    cache_max_mb: Annotated[int, Meta(ge=1, le=1 << 30)] = 10_240
    validation_memory_mb: Annotated[int, Meta(ge=16, le=1 << 30)] | None = None
    validation_cpu_s: Annotated[int, Meta(ge=1, le=86_400)] | None = None
    validation_wall_s: Annotated[float, Meta(gt=0, le=604_800)] | None = None
    watch_folder: bool = True
    import_jobs: Annotated[int, Meta(ge=0, le=64)] = 2
    import_max_mb: Annotated[int, Meta(ge=1, le=1 << 20)] = 2_048
    import_timeout_s: Annotated[float, Meta(gt=0, le=604_800)] = 3_600.0
    import_stall_s: Annotated[float, Meta(gt=0, le=3_600)] = 30.0
    import_allow: list[str] = []
    import_deny: list[str] = []
    import_only: list[str] = []
    import_offline: bool = False
    import_ca_file: str | None = None
    import_credentials: dict[str, Secret] = {}
    hf_token: Secret | None = None


# Taken without a restart; `telemetry_interval` is taken by the instance itself.
LIVE: Final = (
    "threads",
    "max_batch_rows",
    "max_waiting_rows",
    "max_delay_ms",
    "memory_budget_mb",
    "cache_max_mb",
    "validation_memory_mb",
    "validation_cpu_s",
    "validation_wall_s",
)
# The same, of imports and of the watched folder.
LIVE_IMPORTS: Final = (
    "watch_folder",
    "import_jobs",
    "import_max_mb",
    "import_timeout_s",
    "import_stall_s",
    "import_allow",
    "import_deny",
    "import_only",
    "import_offline",
    "import_ca_file",
    "import_credentials",
    "hf_token",
)


def budget_bytes(settings: CandleSettings, plugin_bytes: int | None, host_bytes: int) -> int:
    """Return what the loaded models of one worker may take together.

    Args:
        settings: The plugin's.
        plugin_bytes: What the plugin's configuration allows one worker; None: no limit.
        host_bytes: What the host, or the worker's control group, has.
    """
    if settings.memory_budget_mb is not None:
        return settings.memory_budget_mb * MIB
    return int(0.7 * plugin_bytes if plugin_bytes else 0.5 * host_bytes)


def validation_limits(settings: CandleSettings) -> Limits:
    """Return what looking into one file may take."""
    memory_mb = settings.validation_memory_mb
    return Limits(
        memory_bytes=None if memory_mb is None else memory_mb * MIB,
        cpu_s=settings.validation_cpu_s,
        wall_s=settings.validation_wall_s,
    )


def threads_of(
    config: m.ModelConfig, settings: CandleSettings, processors: float, models: int
) -> int:
    """Return the threads of one run: the model's own, the plugin's, or a fair share."""
    return config.threads or settings.threads or max(1, int(processors) // max(1, models))


def instances_of(config: m.ModelConfig, threads: int, processors: float) -> int:
    """Return how many runs of a model go on at the same time: as it says, or what fills the host.

    Of a convolutional net that computes 5 ms for an image, two runs of one thread each on two
    processors answered 1.4 to 1.8 times as many requests as one; what is quick is run on the event
    loop anyway. What another device computes has one run at a time unless somebody says otherwise.
    """
    if config.instances is None and config.provider in (None, CPU):
        return min(INSTANCES_MAX, max(1, int(processors) // threads))
    return config.instances or 1

"""Models in the words of the Open Inference Protocol and of Triton's extensions of it.

Sources: the Open Inference Protocol (KServe V2) REST specification; Triton's extensions for model
configuration, model repository and statistics.
"""

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from bus import codec
from bus.errors import InvalidRequest
from bus.messages import LoadModel, ModelConfig, ModelSpec, ModelVersion
from bus.models import DEFAULT, LATEST, ModelsView, version_of

EXTENSIONS: Final = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "statistics",
)
MAX_BATCH_ROWS: Final = 256
CPU: Final = "cpu"
# Beside a version's own parameters: how many runs go on at a time where it does not say so itself.
INSTANCES_SERVED: Final = "instances_served"

# Platform and backend, as Triton calls what executes a format.
_PLATFORMS: Final[Mapping[str, tuple[str, str]]] = {
    "onnx": ("onnxruntime_onnx", "onnxruntime"),
    "linear": ("bkg_linear", "bkg_linear"),
}
_KINDS: Final[Mapping[str, Any]] = {
    field.name: field.type for field in msgspec.structs.fields(ModelConfig)
}
_TYPES: Final[Mapping[str, str]] = {"BYTES": "TYPE_STRING"}
_STATES: Final[Mapping[str, str]] = {
    "ready": "READY",
    "queued": "LOADING",
    "fetching": "LOADING",
    "loading": "LOADING",
    "leaving": "UNLOADING",
    "cold": "UNAVAILABLE",
    "failed": "UNAVAILABLE",
}


def metadata(spec: ModelSpec, version: ModelVersion) -> dict[str, Any]:
    """Return what a model takes and gives."""
    platform, _ = _PLATFORMS.get(version.format, (version.format, version.format))
    return {
        "name": spec.id,
        "versions": [one.version for one in spec.versions if one.wanted],
        "platform": platform,
        "inputs": version.inputs,
        "outputs": version.outputs,
        "parameters": {
            "version": version.version,
            "digest": version.checksum,
            "aliases": {name: one.version for name, one in _aliases(spec).items()},
        },
    }


def configuration(
    spec: ModelSpec, version: ModelVersion, settings: Mapping[str, Any], instances: int = 0
) -> dict[str, Any]:
    """Return how a model is run, as Triton's model configuration.

    Args:
        spec: The model.
        version: The version.
        settings: candle's, for what the version leaves open.
        instances: How many runs of it go on at the same time where it is served; 0 if it is not.
    """
    platform, backend = _PLATFORMS.get(version.format, (version.format, version.format))
    config = version.config
    delay_us = _delay_us(config, settings)
    parameters = msgspec.to_builtins(config)
    group: dict[str, Any] = {"name": spec.id, "kind": _kind(config)}
    if count := config.instances or instances:
        group["count"] = count
        if config.instances is None:
            parameters[INSTANCES_SERVED] = count
    batching = {"dynamic_batching": {"max_queue_delay_microseconds": delay_us}}
    return {
        "name": spec.id,
        "platform": platform,
        "backend": backend,
        "version_policy": {"specific": {"versions": [version.version]}},
        "max_batch_size": _rows(config, settings) if version.batched else 0,
        "input": [_tensor(one, batched=version.batched) for one in version.inputs],
        "output": [_tensor(one, batched=version.batched) for one in version.outputs],
        **(batching if version.batched else {}),
        "instance_group": [group],
        "default_model_filename": version.path,
        "parameters": {key: {"string_value": str(value)} for key, value in parameters.items()},
    }


def index(view: ModelsView, *, ready_only: bool) -> list[dict[str, Any]]:
    """Return every version of every model, and whether it is served."""
    found = []
    for spec in view.specs():
        for version in spec.versions:
            state, reason = _state(view, spec, version)
            if state == "READY" or not ready_only:
                said = {"name": spec.id, "version": version.version, "state": state}
                found.append(said | ({"reason": reason} if reason else {}))
    return found


def load_request(
    model: str, parameters: Mapping[str, Any], settings: Mapping[str, Any] | None = None
) -> LoadModel:
    """Return a load request of the model repository extension as ours.

    Args:
        model: The model.
        parameters: The request's.
        settings: candle's: what they say anyway does not become the model's own.

    Raises:
        InvalidRequest: A parameter is not known, or has a value that it cannot have.
    """
    config, path, version, content = None, None, None, None
    for name, value in parameters.items():
        if name == "config":
            config = _config_in(value, settings or {})
        elif name.startswith("file:") and content is None:
            path, version, content = _file_in(name.removeprefix("file:"), value)
        else:
            raise InvalidRequest(
                f"parameters: {name!r} is not taken here; allowed are `config` and one `file:PATH`",
                field=f"parameters.{name}",
            )
    request = {"id": model, "path": path, "version": version, "config": config, "content": content}
    given = {name: value for name, value in request.items() if value is not None}
    try:
        return codec.convert(given, LoadModel)
    except UnicodeError as error:
        raise InvalidRequest(f"parameters: {error}", field="parameters") from None


def _aliases(spec: ModelSpec) -> dict[str, ModelVersion]:
    names = {DEFAULT, LATEST, *spec.aliases}
    found = ((name, version_of(spec, name)) for name in sorted(names))
    return {name: version for name, version in found if version and version.wanted}


def _state(view: ModelsView, spec: ModelSpec, version: ModelVersion) -> tuple[str, str]:
    if not version.wanted:
        return "UNAVAILABLE", "unloaded"
    for _, one in view.served(spec.id, version.version):
        return _STATES[one.state], one.reason or ("" if one.state == "ready" else one.state)
    return "UNAVAILABLE", "no instance of candle is there"


def _tensor(tensor: Any, *, batched: bool) -> dict[str, Any]:
    kind = _TYPES.get(tensor.datatype, f"TYPE_{tensor.datatype}")
    return {
        "name": tensor.name,
        "data_type": kind,
        "dims": tensor.shape[1:] if batched else tensor.shape,
    }


def _config_in(text: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Read what we know of Triton's model configuration; what does not concern us is passed over.

    A client that sends back what `config` gave it means what it changed. So our own parameters are
    the base, Triton's words go before them where they say something else, and what is so anyway is
    not written down.
    """
    try:
        said = msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, TypeError, UnicodeError, RecursionError) as error:
        raise InvalidRequest(
            f"parameters.config must be a text that holds a JSON object: {error}",
            field="parameters.config",
        ) from None
    config: dict[str, Any] = {}
    for name, one in _mapping(said, "parameters").items():
        value = one.get("string_value") if isinstance(one, dict) else None
        if name in _KINDS and isinstance(value, str):
            config[name] = _value(name, value)
    given = ModelConfig(**config)
    if (rows := said.get("max_batch_size")) and rows != _rows(given, settings):
        config["max_batch_rows"] = rows
    delay = _mapping(said, "dynamic_batching").get("max_queue_delay_microseconds")
    if delay is not None and delay != _delay_us(given, settings):
        config["max_delay_ms"] = (
            _number(delay, "dynamic_batching.max_queue_delay_microseconds") / 1e3
        )
    groups = said.get("instance_group")
    group = groups[0] if isinstance(groups, list) and groups else {}
    if isinstance(group, dict):
        if "count" in group and group["count"] != (given.instances or _served_in(said)):
            config["instances"] = group["count"]
        if group.get("kind") == "KIND_GPU" and _kind(given) == "KIND_CPU":
            config["provider"] = "cuda"
        elif group.get("kind") == "KIND_CPU" and _kind(given) != "KIND_CPU":
            config["provider"] = CPU
    return config


def _served_in(said: Mapping[str, Any]) -> int | None:
    """Return what nobody has set and `configuration` has shown as the count all the same."""
    one = _mapping(said, "parameters").get(INSTANCES_SERVED)
    text = one.get("string_value") if isinstance(one, dict) else None
    return _value("instances", text) if isinstance(text, str) else None


def _rows(config: ModelConfig, settings: Mapping[str, Any]) -> int:
    rows: int = config.max_batch_rows or settings.get("max_batch_rows", MAX_BATCH_ROWS)
    return rows


def _delay_us(config: ModelConfig, settings: Mapping[str, Any]) -> int:
    delay_ms = config.max_delay_ms
    return int(1e3 * (settings.get("max_delay_ms", 0.0) if delay_ms is None else delay_ms))


def _kind(config: ModelConfig) -> str:
    return "KIND_CPU" if (config.provider or CPU) == CPU else "KIND_GPU"


def _file_in(path: str, content: Any) -> tuple[str, str | None, Any]:
    """Return path, version and base64 of a file that came with a load request."""
    if not isinstance(content, str):
        raise InvalidRequest(
            f"parameters: file:{path} must be the file in base64", field=f"parameters.file:{path}"
        )
    folder, _, name = path.rpartition("/")
    return name, folder or None, content


def _mapping(said: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = said.get(name) or {}
    if not isinstance(value, dict):
        raise InvalidRequest(
            f"parameters.config: {name} must be an object", field=f"parameters.config.{name}"
        )
    return value


def _number(value: Any, name: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise InvalidRequest(
            f"parameters.config: {name} must be a number", field=f"parameters.config.{name}"
        ) from None


def _value(name: str, text: str) -> Any:
    """Return what a parameter's text stands for: all of them are texts in Triton's words."""
    kind = _KINDS[name]
    try:
        return msgspec.convert(text, kind, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidRequest(
            f"parameters.config: parameters.{name} is {text[:100]!r}: {error}",
            field=f"parameters.config.parameters.{name}",
        ) from None

"""What a change of configuration means: is it allowed, what differs, what does it take.

No bus and no clock: two configurations and a schema go in, sentences and decisions come out.
"""

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import jsonschema
import msgspec
import structlog
from jsonschema import Draft202012Validator, ValidationError
from jsonschema.validators import validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

from bus import codec
from bus import messages as m
from bus.masking import MASK, masked, masked_settings

# These concern the supervisor and its readers, not a running process.
NO_RESTART: Final = frozenset(
    ("autostart", "capabilities", "description", "healthcheck", "memoryMaxBytes", "name",
     "replicas", "requires")
)  # fmt: skip
SHOWN_MAX: Final = 60
# Unbounded lists help nobody; a hundred errors come from one cause.
ERRORS_MAX: Final = 50

log = structlog.get_logger("supervisor.config")

_ABSENT: Final = object()

Path = tuple[str, ...]
Schema = Mapping[str, Any]


def errors(config: m.PluginConfig, schema: Schema | None) -> list[m.ConfigError]:
    """Return what is wrong with a configuration's settings, by the plugin's own schema.

    A schema that is itself unsound, or refers to elsewhere, checks nothing: the worker has the
    last word at its start anyway.
    """
    if schema is None:
        return []
    try:
        kind = validator_for(schema, default=Draft202012Validator)
        kind.check_schema(schema)
        # An empty registry: a schema's references never make this process fetch anything.
        found = list(kind(schema, registry=Registry()).iter_errors(config.settings))
    except (jsonschema.SchemaError, Unresolvable, RecursionError) as error:
        log.warning("schema.unsound", plugin=config.name, cause=str(error).partition("\n")[0])
        return _left_masked(config.settings, schema)
    shown = masked_settings(config.settings, schema)
    told = [one for error in found for one in _told(error, shown, schema)]
    told += _left_masked(config.settings, schema)
    by_field = {one.field: one for one in reversed(told)}
    return sorted(by_field.values(), key=lambda one: one.field)[:ERRORS_MAX]


def changes(
    before: m.PluginConfig, after: m.PluginConfig, schemas: Iterable[Schema | None]
) -> list[m.ConfigChange]:
    """Return what differs, by field, with secrets masked."""
    shown_before, shown_after = before, after
    for schema in schemas:
        shown_before, shown_after = masked(shown_before, schema), masked(shown_after, schema)
    old, new = _fields(shown_before), _fields(shown_after)
    found: dict[str, m.ConfigChange] = {}
    for path in _differing(_fields(before), _fields(after)):
        visible = _visible(path, old, new)
        field = ".".join(visible)
        found[field] = m.ConfigChange(
            field=field, before=_at(old, visible), after=_at(new, visible)
        )
    return list(found.values())


def same(before: m.PluginConfig, after: m.PluginConfig) -> bool:
    """Tell whether nothing differs."""
    return not any(_differing(_fields(before), _fields(after)))


def needs_restart(before: m.PluginConfig, after: m.PluginConfig, live: frozenset[str]) -> bool:
    """Tell whether instances must be replaced for a change.

    Args:
        before: What they run with.
        after: What they should run with.
        live: The settings that every one of them takes without.
    """
    return any(
        path[0] not in NO_RESTART and not (path[0] == "settings" and path[1] in live)
        for path in _differing(_fields(before), _fields(after))
    )


def live_settings(instances: Sequence[m.Registration]) -> frozenset[str]:
    """Return the settings that all of these take live; none when there are no instances."""
    each = [frozenset(registration.live_settings) for registration in instances]
    return frozenset.intersection(*each) if each else frozenset()


# --- Differences ----------------------------------------------------------------------------------


def _fields(config: m.PluginConfig) -> dict[str, Any]:
    """Return a configuration as plain values, defaults included."""
    found = {}
    for field in msgspec.structs.fields(m.PluginConfig):
        value = getattr(config, field.name)
        if isinstance(value, m.Healthcheck):
            value = {
                one.encode_name: getattr(value, one.name)
                for one in msgspec.structs.fields(m.Healthcheck)
            }
        found[field.encode_name] = value
    return found


def _differing(before: Any, after: Any, path: Path = ()) -> Iterator[Path]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after}):
            # Null is not the same as absent: that takes the worker's default.
            yield from _differing(before.get(key, _ABSENT), after.get(key, _ABSENT), (*path, key))
    # As they travel: in Python true is 1, and 1 is 1.0.
    elif before is _ABSENT or after is _ABSENT or codec.encode(before) != codec.encode(after):
        yield path


def _visible(path: Path, *shown: dict[str, Any]) -> Path:
    """Return a path cut where a mask hides what is below."""
    for end in range(1, len(path)):
        if any(_at(one, path[:end]) == MASK for one in shown):
            return path[:end]
    return path


def _at(value: Any, path: Path) -> Any:
    for name in path:
        if not isinstance(value, dict):
            return None
        value = value.get(name)
    return value


# --- Sentences ------------------------------------------------------------------------------------


def _told(error: ValidationError, shown: dict[str, Any], root: Schema) -> Iterator[m.ConfigError]:
    """Give an error's sentences: path, value, what is allowed."""
    at = tuple(error.absolute_path)
    field = _field(at)
    schema = error.schema if isinstance(error.schema, Mapping) else {}
    match error.validator:
        case "additionalProperties" if error.validator_value is False:
            known = sorted(schema.get("properties", {}))
            for name in error.instance:
                if name not in known and not _by_pattern(name, schema):
                    yield _unknown(field, name, known)
        case "required":
            for name in error.validator_value:
                if name not in error.instance:
                    needed = schema.get("properties", {}).get(name, {})
                    yield m.ConfigError(
                        field=f"{field}.{name}",
                        message=f"{field}.{name} is missing; needed is {allowed(needed, root)}",
                    )
        case "anyOf" | "oneOf" if deeper := _deeper(error):
            for one in deeper:
                yield from _told(one, shown, root)
        case _:
            yield m.ConfigError(
                field=field,
                message=f"{field} is {_value(at, shown)}; allowed is {allowed(schema, root)}",
            )


def _deeper(error: ValidationError) -> list[ValidationError]:
    """Return the errors inside the one branch whose type fits, if the value has an inside."""
    if not isinstance(error.instance, dict | list):
        return []
    branches: dict[Any, list[ValidationError]] = {}
    for one in error.context or []:
        branches.setdefault(one.relative_schema_path[0], []).append(one)
    fitting = [
        found
        for found in branches.values()
        if not any(one.validator == "type" and not one.relative_path for one in found)
    ]
    return fitting[0] if len(fitting) == 1 else []


def _unknown(field: str, name: str, known: list[str]) -> m.ConfigError:
    near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known) or 'none'}"
    return m.ConfigError(
        field=f"{field}.{name}", message=f"{field} has no {name[:SHOWN_MAX]!r}; {hint}"
    )


def _by_pattern(name: str, schema: Schema) -> bool:
    return any(Draft202012Validator({"pattern": p}).is_valid(name)
               for p in schema.get("patternProperties", {}))  # fmt: skip


def _left_masked(settings: dict[str, Any], schema: Schema) -> list[m.ConfigError]:
    """Return an error for each secret that is the mask still: there was no value to keep."""
    # Of something else in its place, what is still hidden is a secret.
    hidden = masked_settings(_without_masks(settings), schema)
    return [
        m.ConfigError(
            field=_field(path),
            message=f"{_field(path)} is {MASK}, which keeps the stored value, and none is stored",
        )
        for path in _masks(settings)
        if _inside(hidden, path) == MASK
    ]


def _without_masks(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_masks(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_masks(one) for one in value]
    return "" if value == MASK else value


def _masks(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    if value == MASK:
        yield path
    elif isinstance(value, dict | list):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _masks(one, (*path, key))


def _field(path: Iterable[str | int]) -> str:
    return "settings" + "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path)


def _value(path: Iterable[str | int], shown: Any) -> str:
    value = _inside(shown, path)
    if value == MASK:
        return MASK
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN_MAX else f"{text[:SHOWN_MAX]}..."


def _inside(shown: Any, path: Iterable[str | int]) -> Any:
    for key in path:
        if shown == MASK:
            return MASK
        shown = shown[key]
    return shown


def allowed(schema: Any, root: Schema) -> str:
    """Return in words what a schema allows, as far as words are short."""
    for _ in range(8):
        if not (isinstance(schema, Mapping) and isinstance(schema.get("$ref"), str)):
            break
        schema = _definition(schema["$ref"], root)
    if not isinstance(schema, Mapping):
        return "nothing" if schema is False else "what the plugin takes"
    if "enum" in schema:
        return "one of " + ", ".join(json.dumps(one, ensure_ascii=False) for one in schema["enum"])
    if "const" in schema:
        return json.dumps(schema["const"], ensure_ascii=False)
    for name in ("anyOf", "oneOf"):
        if isinstance(schema.get(name), list):
            return " or ".join(dict.fromkeys(allowed(one, root) for one in schema[name]))
    kinds = schema.get("type")
    each = [_kind(one, schema) for one in (kinds if isinstance(kinds, list) else [kinds])]
    return " or ".join(each)


def _kind(kind: Any, schema: Schema) -> str:
    words = _WORDS.get(kind, "what the plugin takes")
    if kind in {"integer", "number"}:
        return words + _range(schema)
    if kind == "string":
        return words + _length(schema, "characters") + _pattern(schema)
    if kind == "array":
        return words + _length(schema, "items")
    return words


def _range(schema: Schema) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    said = ""
    if low is not None:
        said += f" from {low:g}"
    if above is not None:
        said += f" above {above:g}"
    if high is not None:
        said += f" to {high:g}" if low is not None else f" up to {high:g}"
    if below is not None:
        said += f" below {below:g}"
    if step := schema.get("multipleOf"):
        said += f" in steps of {step:g}"
    return said


def _length(schema: Schema, what: str) -> str:
    names = ("minLength", "maxLength") if what == "characters" else ("minItems", "maxItems")
    low, high = (schema.get(name) for name in names)
    if low is not None and high is not None:
        return f" of {low} to {high} {what}"
    if low is not None:
        return f" of at least {low} {what}"
    return f" of at most {high} {what}" if high is not None else ""


def _pattern(schema: Schema) -> str:
    if "pattern" not in schema:
        return ""
    return f" ({schema.get('description') or 'matching ' + str(schema['pattern'])})"


def _definition(reference: str, root: Schema) -> Any:
    found: Any = root
    for part in reference.removeprefix("#").split("/")[1:]:
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


_WORDS: Final = {
    "integer": "a whole number",
    "number": "a number",
    "string": "a text",
    "boolean": "true or false",
    "null": "null",
    "array": "a list",
    "object": "an object",
}

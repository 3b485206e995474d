"""Secrets: what of settings and jobs may be shown, and how what was hidden comes back.

A setting is secret when its JSON Schema says `format: password` or `writeOnly: true`. Whoever shows
settings shows `MASK` in its place; workers alone read the value, from the bucket.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final
from urllib.parse import unquote

import msgspec

from bus.messages import Job, PluginConfig

MASK: Final = "********"

Schema = Mapping[str, Any]


def masked(config: PluginConfig, schema: Schema | None) -> PluginConfig:
    """Return a configuration with `MASK` for every secret that has a value."""
    if not schema or not config.settings:
        return config
    return msgspec.structs.replace(config, settings=masked_settings(config.settings, schema))


def masked_settings(settings: dict[str, Any], schema: Schema) -> dict[str, Any]:
    """Return settings with `MASK` for every secret that has a value."""
    hidden = _masked(settings, list(_alternatives([schema], schema)), schema)
    # Where all settings are one secret, their names are no longer told either.
    return hidden if isinstance(hidden, dict) else dict.fromkeys(settings, MASK)


def unmasked(config: PluginConfig, stored: PluginConfig) -> PluginConfig:
    """Return a configuration with the stored value wherever it has `MASK`, if there is one."""
    settings = _unmasked(config.settings, stored.settings)
    return msgspec.structs.replace(config, settings=settings)


def without_query(job: Job) -> Job:
    """Return a job without the query of its address: a presigned one has its secret there."""
    if job.request is None:
        return job
    address, mark, _ = job.request.url.partition("?")
    if not mark:
        return job
    request = msgspec.structs.replace(job.request, url=f"{address}?...")
    return msgspec.structs.replace(job, request=request)


def _masked(value: Any, schemas: Sequence[Schema], root: Schema) -> Any:
    if value is None:
        return None
    if any(s.get("format") == "password" or s.get("writeOnly") is True for s in schemas):
        return MASK
    if isinstance(value, dict):
        return {
            key: _masked(one, list(_alternatives(_for_key(schemas, key), root)), root)
            for key, one in value.items()
        }
    if isinstance(value, list):
        return [
            _masked(one, list(_alternatives(_for_item(schemas, i), root)), root)
            for i, one in enumerate(value)
        ]
    return value


def _unmasked(value: Any, stored: Any) -> Any:
    if value == MASK and stored is not None:
        return stored
    if isinstance(value, dict) and isinstance(stored, dict):
        return {key: _unmasked(one, stored.get(key)) for key, one in value.items()}
    if isinstance(value, list) and isinstance(stored, list) and len(value) == len(stored):
        return [_unmasked(one, old) for one, old in zip(value, stored, strict=True)]
    return value


def _alternatives(schemas: Sequence[Any], root: Schema) -> Iterator[Schema]:
    """Give every schema that may apply to a value: through references, and all branches."""
    waiting, seen = list(schemas), set()
    while waiting:
        schema = waiting.pop()
        if not isinstance(schema, Mapping) or id(schema) in seen:
            continue
        seen.add(id(schema))
        yield schema
        for name in ("allOf", "anyOf", "oneOf"):
            waiting += _list(schema.get(name))
        waiting += [schema.get(name) for name in ("if", "then", "else")]
        waiting += _values(schema.get("dependentSchemas"))
        waiting.append(_referred(schema.get("$ref"), root))


def _for_key(schemas: Sequence[Schema], key: str) -> list[Any]:
    found: list[Any] = []
    for schema in schemas:
        named = schema.get("properties")
        known = named.get(key) if isinstance(named, Mapping) else None
        patterns = schema.get("patternProperties")
        matching = [
            one
            for pattern, one in (patterns.items() if isinstance(patterns, Mapping) else ())
            if _matches(pattern, key)
        ]
        if known is None and not matching:
            found += [
                schema.get(name) for name in ("additionalProperties", "unevaluatedProperties")
            ]
        found += [known, *matching]
    return found


def _for_item(schemas: Sequence[Schema], index: int) -> list[Any]:
    found: list[Any] = []
    for schema in schemas:
        # Before draft 2020-12 `items` was the list, and `additionalItems` the rest.
        first = _list(schema.get("prefixItems")) or _list(schema.get("items"))
        if index < len(first):
            found.append(first[index])
        else:
            found += [schema.get(n) for n in ("items", "additionalItems", "unevaluatedItems")]
    return found


def _referred(reference: object, root: Schema) -> Any:
    """Return what `#/a/b` points at; None for what is not in the document."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    found: Any = root
    for part in unquote(reference[1:]).split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, Mapping):
            found = found.get(key)
        elif isinstance(found, list) and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        else:
            return None
    return found


def _matches(pattern: str, key: str) -> bool:
    try:
        return re.search(pattern, key) is not None
    except re.error:
        # Better a setting too many hidden than one too few.
        return True


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _values(value: object) -> list[Any]:
    return list(value.values()) if isinstance(value, Mapping) else []

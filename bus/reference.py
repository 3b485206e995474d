"""`docs/subjects.md`, made from the declarations: subjects, buckets, streams and payloads.

`python -m bus.reference FILE` writes it. Every example is a message of its type, encoded by the
codec that the bus uses. What the declarations do not say is worked out from the types, so a new
subject or payload needs no line here; `_SAMPLES` and `_EXAMPLES` only make examples look real.
"""

import inspect
import json
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, cast

import msgspec
from msgspec import UNSET
from msgspec import inspect as types

from bus import codec
from bus import messages as m
from bus.assets import declared
from bus.errors import ErrorBody
from bus.state import Bucket, Store
from bus.streams import MIB, NS
from bus.subjects import DEFAULT_ROOT, ENDPOINTS, FEEDS, RAW_ENDPOINTS, Endpoint, Feed, RawEndpoint

_AnyEndpoint = Endpoint[m.Message, m.Message]
_AnyFeed = Feed[Any]

# Values by the name of a field; one that does not fit the field's type is passed over. An optional
# field is shown when it stands here.
_SAMPLES: Final[Mapping[str, Any]] = {
    "plugin": "candle", "slot": 0, "host": "host-1", "pid": 4242, "version": "0.1.0",
    "instance": "9f2c61d0a4b87e35c1f006", "status": "running", "generation": 3,
    "level": "info", "logger": "candle.service", "dataset": "default", "entry_id": "ada",
    "path": "linear-demo.json", "entrypoint": "services.candle", "format": "linear",
    "inputs": [[1, 2, 3]], "outputs": [[6.0, -1.5]], "embedding": [0.6, 0.8],
    "query_embedding": [0.6, 0.8], "dimensions": 2, "embedder": "sface", "top_k": 5,
    "capabilities": ["candle.model.run", "candle.stats"], "cpu": 12.5, "mem_bytes": 183_500_800,
    "models_loaded": 2, "image_base64": "/9j/4AAQ...", "by": "ada", "changed_by": "ada",
    "checksum": "0c7e9f13b7f3a1bd1f8e3d2a6c95b04f7d1e6a2b8c3f4d5e6a7b8c9d0e1f2a3b",
    "box": [40, 32, 96, 120], "landmarks": [[60, 70], [110, 70], [85, 95], [65, 120], [105, 120]],
    "score": 0.98, "datatype": "FP32", "shape": [-1, 3], "action": "list", "verb": "started",
    "retry_after_s": 2, "restarts": 0, "revision": 17,
}  # fmt: skip
# Fields of an example that say more than those that are worked out; UNSET leaves one out.
_EXAMPLES: Final[Mapping[type, Mapping[str, Any]]] = {
    m.NamePlugin: {"name": "candle"},
    m.ConfigurePlugin: {"name": "candle"},
    m.PluginState: {"name": "candle"},
    m.SearchFaces: {"embedding": UNSET},
    m.ManageDataset: {"dataset": UNSET, "entry_id": UNSET},
    m.LogEvent: {"message": "model.loaded", "fields": {"id": "demo", "rows": 3}},
    m.Registration: {
        "id": "9f2c61d0a4b87e35c1f006",
        "meta": {"models_path": "/home/ada/.local/share/bkg/models"},
    },
    m.Heartbeat: {
        "id": "9f2c61d0a4b87e35c1f006",
        "in_flight": 1, "oldest_s": 0.021, "lag_ms": 0.4,
    },
    m.TelemetrySnapshot: {"gauges": {"in_flight": 1, "requests": 512, "errors": 0}},
    m.HostState: {"name": "host-1", "id": "5b1c", "labels": {"gpu": "yes"}},
    m.Event: {"cause": "asked for", "by": "ada"},
    m.LoadModel: {"version": UNSET},
    m.UnloadModel: {"version": UNSET},
    m.WakeModel: {"version": UNSET},
    m.AliasModel: {"alias": "default", "version": "2"},
    m.ModelVersion: {"version": "2"},
    m.ServedModel: {"version": "2", "state": "ready"},
    m.LoadedModel: {"version": "2"},
    m.GalleryHead: {"id": "default"},
    m.GalleryEntry: {"id": "ada", "metadata": {"name": "Ada"}},
    m.PluginConfig: {"name": "candle", "description": "Runs models", "settings": {}},
    ErrorBody: {
        "code": "invalid-request", "message": "id: missing required field `id`",
        "field": "id", "retry_after_s": UNSET,
    },
}  # fmt: skip
# Tried in turn where a text has a pattern or a length.
_TEXTS: Final = (
    "demo", "a", "A", "0", "1", "/health", "a.b", "demo.stats", "a-b", "a_b", "0" * 64, "0" * 32,
    "sha256:" + "0" * 64, "2026-01-31T12:00:00Z", "1.0.0", "https://example.org/model.onnx",
    "nats://127.0.0.1:4222", "00000000-0000-4000-8000-000000000000", "ada@example.org", "",
)  # fmt: skip
_WHEN: Final = "2026-01-31T12:00:00Z"
_ROOMS: Final = 6
_WIDTH: Final = 96

_HEAD: Final = """\
# What travels on the bus

Made from `bus/subjects.py`, `bus/messages/` and `bus/assets.py` by `make docs`; a change by hand \
is lost. How a worker uses all this, byte for byte, is in [worker-protocol.md](worker-protocol.md).

Subjects begin with a root token, `{root}` unless `BKG_ROOT` names another. A token that stands \
for a name keeps letters, digits, `-` and `_`; every other byte of its UTF-8 form becomes `=XX`. \
Bodies are JSON, or MessagePack where `Content-Type` says so; an empty body is an empty object. \
Readers pass over fields that they do not know. Times are UTC.

Roles: *instance* is every process of bkg and every worker, each under its own plugin's name and \
slot; *operator* is whoever has the broker's password, the command `bkg` among them.

## Look on with the plain `nats` tool

```sh
# The address, with its password, stands in the data directory while bkg runs.
export NATS_URL=$(sed -n 's/.*"nats_url": "\\(.*\\)",/\\1/p' ~/.local/share/bkg/run.json)
nats micro ls                             # who is there
nats micro stats candle                   # what each endpoint did
nats sub '{root}.log.>'                      # all log records, live
nats sub '{root}.log.*.*.error'              # errors alone
nats sub '{root}.health.>'                   # heartbeats, one a second from each process
nats req {root}.call.candle.stats ''         # ask one instance
nats req {root}.call.plugins.list ''         # every plugin with its state
nats kv watch {root}-observed                # what is there, as it changes
nats kv get {root}-desired candle --raw      # what candle should be
nats stream view {root}-logs                 # log records of the last 30 days
nats stream ls                            # what the broker keeps
```
"""
_REQUESTS: Final = """\
## Requests

Each is answered by one member of its queue group, picked by the broker. The command asks with an \
example as it stands. One particular instance of a plugin is asked with \
`{root}.inst.<plugin>.<slot>.call.` in place of `{root}.call.`; whoever may publish to the latter \
(gateway, operator) needs the former as well, and every instance hears its own. What is \
*idempotent* may be answered twice for one request, [by two instances]\
(worker-protocol.md#to-be-asked-twice).

A body over the broker's `max_payload` goes by reference: put it into the object store \
`{root}-bodies`, ask with three headers that say which object it is, and delete it when the answer \
is there; what is left goes by its age. [More](worker-protocol.md#bodies-by-reference).

```sh
nats object put {root}-bodies request.json --name mine
nats req {root}.call.faces.detect '' --timeout 30s -H Bkg-Body:mine \\
  -H Bkg-Body-Bytes:$(stat -c %s request.json) \\
  -H Bkg-Body-Sha256:$(sha256sum request.json | cut -d ' ' -f 1)
nats object rm {root}-bodies mine --force
```
"""
_RAW: Final = """\
## Raw requests

Body and headers of request and reply have a format of their own, and pass through bkg as they \
are. Names that end the subject may be left out from the end.
"""
_FEEDS: Final = """\
## Feeds

One-way messages. What is kept is in the stream that is named.
"""
_BUCKETS: Final = """\
## Buckets

Key-value buckets; a key is made of names, escaped as in subjects.
"""
_STREAMS: Final = """\
## Streams

All that the broker keeps, buckets and object stores included.
"""
_PAYLOADS: Final = """\
## Payloads

An example shows every required field, and optional ones where they tell something. A field that \
is left out has its default.
"""


def render(root: str = DEFAULT_ROOT) -> str:
    """Return the page."""
    assets = declared(root)
    kinds = _Kinds()
    parts = [
        _HEAD.format(root=root),
        _REQUESTS.format(root=root),
        _table(
            ("subject", "queue group", "asked by", "request -> reply", "what", "to copy"),
            (_endpoint_row(endpoint, root, kinds) for endpoint in ENDPOINTS),
        ),
        _RAW,
        _table(
            ("subject", "queue group", "asked by", "what", "to copy"),
            (_raw_row(endpoint, root) for endpoint in RAW_ENDPOINTS),
        ),
        _FEEDS,
        _table(
            ("subject", "payload", "published by", "read by", "kept", "to copy"),
            (_feed_row(feed, root, kinds, assets) for feed in FEEDS),
        ),
        _BUCKETS,
        _table(("bucket", "key", "value", "kept", "to copy"), _bucket_rows(root, kinds, assets)),
        _STREAMS,
        _table(("stream", "what", "subjects", "kept"), map(_stream_row, assets)),
        _PAYLOADS,
        *(_payload(kind, kinds) for kind in kinds.in_order()),
    ]
    return "\n".join(parts)


def example(kind: type[Any]) -> Any:
    """Return a message of a type: what it must have, and a few fields that it may have.

    Raises:
        ValueError: A field's type allows nothing that is known here; says which.
    """
    return msgspec.convert(_example(kind, 0), kind)


# --- Rows -----------------------------------------------------------------------------------------


def _endpoint_row(endpoint: _AnyEndpoint, root: str, kinds: "_Kinds") -> tuple[str, ...]:
    asked = example(endpoint.request)
    subject = ".".join([root, "call", endpoint.capability, *(f"<{key}>" for key in endpoint.keys)])
    body = codec.encode(asked).decode()
    command = f"nats req {endpoint.subject_of(root, asked)} '{'' if body == '{}' else body}'"
    return (
        f"`{subject}`", endpoint.queue, ", ".join(endpoint.asked_by),
        f"{kinds.link(endpoint.request)} -> {kinds.link(endpoint.reply)}",
        _described(endpoint), f"`{command}`",
    )  # fmt: skip


def _raw_row(endpoint: RawEndpoint, root: str) -> tuple[str, ...]:
    asked = f"{root}.call.{endpoint.capability}"
    subject = asked + "".join(f"[.<{key}>]" for key in endpoint.keys)
    command = ".".join([asked, *(f"<{key}>" for key in endpoint.keys[:1])])
    return (
        f"`{subject}`", endpoint.queue, ", ".join(endpoint.asked_by),
        _described(endpoint), f"`nats req {command} '{endpoint.example}'`",
    )  # fmt: skip


def _described(endpoint: _AnyEndpoint | RawEndpoint) -> str:
    return endpoint.description + (" *Idempotent.*" if endpoint.idempotent else "")


def _feed_row(
    feed: _AnyFeed, root: str, kinds: "_Kinds", assets: list[dict[str, Any]]
) -> tuple[str, ...]:
    listened = feed.subject(root)
    stream = next((one for one in assets if listened in one.get("subjects", [])), None)
    template = feed.template.replace("{", "<").replace("}", ">")
    kept = f"`{stream['name']}`: {_limits(stream)}" if stream else "no"
    return (
        f"`{root}.{template}`", kinds.link(feed.payload),
        ", ".join(feed.sent_by), ", ".join(feed.heard_by), kept, f"`nats sub '{listened}'`",
    )  # fmt: skip


def _bucket_rows(
    root: str, kinds: "_Kinds", assets: list[dict[str, Any]]
) -> Iterator[tuple[str, ...]]:
    by_name = {one["name"]: one for one in assets}
    # Its declarations are read; there is no connection to ask anything.
    store = Store(cast("Any", SimpleNamespace(jetstream=lambda **_: None)), root)
    for bucket in vars(store).values():
        if not isinstance(bucket, Bucket):
            continue
        stream = bucket._stream.name  # noqa: SLF001
        name = stream.removeprefix("KV_")
        kind = bucket._kind  # noqa: SLF001
        yield (
            f"`{name}`", f"`{_key(kind, bucket._width, bucket._suffix)}`", kinds.link(kind),  # noqa: SLF001
            _limits(by_name[stream]) if stream in by_name else "",
            f"`nats kv watch {name}`",
        )  # fmt: skip


def _stream_row(asset: dict[str, Any]) -> tuple[str, ...]:
    subjects = ", ".join(f"`{subject}`" for subject in asset.get("subjects", []))
    return f"`{asset['name']}`", asset.get("description", ""), subjects, _limits(asset)


def _key(kind: type, width: int, suffix: str) -> str:
    """Return a bucket's key: by the names in the message's docstring, if it tells them."""
    told = re.search(r"key `((?:<\w+>\.?)+)", inspect.getdoc(kind) or "")
    names = told[1].rstrip(".").split(".") if told else []
    return ".".join(names if len(names) == width else ["<name>"] * width) + suffix


def _limits(asset: Mapping[str, Any]) -> str:
    """Return in words what is kept how long."""
    said = []
    said.append(_age(asset["max_age"] // NS) if asset.get("max_age") else "for ever")
    if count := asset.get("max_msgs_per_subject"):
        said.append(f"the last {count:,} of each subject" if count > 1 else "the last of each")
    if not asset.get("max_bytes"):
        return ", ".join(said)
    full = "the oldest leave" if asset.get("discard") == "old" else "then writes are refused"
    said.append(f"at most {asset['max_bytes'] // MIB:,} MiB ({full})")
    return ", ".join(said)


def _age(seconds: int) -> str:
    for unit, length in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds >= length and seconds % length == 0:
            number = seconds // length
            return f"{number} {unit}{'s' if number > 1 else ''}"
    return f"{seconds} s"


def _table(heads: Iterable[str], rows: Iterable[tuple[str, ...]]) -> str:
    heads = tuple(heads)
    lines = [heads, ("---",) * len(heads), *rows]
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in lines
    )


# --- Payloads -------------------------------------------------------------------------------------


class _Kinds:
    """The types that the page names, and those inside them, in the order of their first mention."""

    def __init__(self) -> None:
        self._seen: dict[type, None] = {}

    def link(self, kind: type) -> str:
        self._seen.setdefault(kind)
        return f"[{kind.__name__}](#{kind.__name__.lower()})"

    def in_order(self) -> Iterator[type]:
        """Give each type once; those that are met meanwhile come too, and errors last."""
        done = 0
        while done < len(self._seen):
            yield list(self._seen)[done]
            done += 1
            if done == len(self._seen):
                self._seen.setdefault(ErrorBody)


def _payload(kind: type, kinds: _Kinds) -> str:
    text, meanings = _doc(kind)
    shown = _pretty(json.loads(codec.encode(example(kind))))
    rows = [
        (
            f"`{field.encode_name}`",
            _in_words(types.type_info(field.type), kinds),
            "yes" if field.required else "",
            meanings.get(field.name, ""),
        )
        for field in msgspec.structs.fields(kind)
    ]
    # Types without a list of attributes have nothing in the last column.
    columns = 4 if meanings else 3
    heads = ("field", "type", "required", "what")[:columns]
    table = "\n" + _table(heads, (row[:columns] for row in rows)) if rows else ""
    return f"### {kind.__name__}\n\n{text}\n\n```json\n{shown}\n```\n{table}"


def _pretty(value: Any, indent: int = 0) -> str:
    """Return JSON on one line where it fits, else indented."""
    line = json.dumps(value, ensure_ascii=False)
    if len(line) + indent <= _WIDTH or not isinstance(value, dict | list) or not value:
        return line
    inner = indent + 2
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)}: {_pretty(one, inner)}" for key, one in value.items()]
    else:
        parts = [_pretty(one, inner) for one in value]
    opened, closed = "{}" if isinstance(value, dict) else "[]"
    body = ",\n".join(" " * inner + part for part in parts)
    return f"{opened}\n{body}\n{' ' * indent}{closed}"


def _doc(kind: type) -> tuple[str, dict[str, str]]:
    """Return a type's docstring without its list of attributes, and that list."""
    text, _, attributes = (inspect.getdoc(kind) or "").partition("\nAttributes:\n")
    meanings = re.findall(
        r"^(\w+): (.+?)(?=^\w+: |\Z)", textwrap.dedent(attributes), re.MULTILINE | re.DOTALL
    )
    return " ".join(text.split()), {name: " ".join(said.split()) for name, said in meanings}


def _in_words(kind: types.Type, kinds: _Kinds) -> str:
    match kind:
        case types.Metadata(type=inner):
            return _in_words(inner, kinds)
        case types.StructType(cls=cls):
            return kinds.link(cls)
        case types.ListType(item_type=item):
            return f"list of {_in_words(item, kinds)}"
        case types.DictType(value_type=value):
            return f"object of {_in_words(value, kinds)}"
        case types.LiteralType(values=values):
            return " or ".join(f"`{value}`" for value in values)
        case types.UnionType(types=several):
            return " or ".join(_in_words(one, kinds) for one in several)
        case _:
            return _PLAIN.get(type(kind), type(kind).__name__.removesuffix("Type").lower())


_PLAIN: Final[Mapping[type, str]] = {
    types.StrType: "text", types.IntType: "whole number", types.FloatType: "number",
    types.BoolType: "true or false", types.NoneType: "null", types.AnyType: "anything",
    types.DateTimeType: "time, RFC 3339", types.BytesType: "bytes; base64 in JSON",
}  # fmt: skip


# --- Examples -------------------------------------------------------------------------------------


def _example(kind: type[Any], depth: int) -> dict[str, Any]:
    made = {}
    for field in msgspec.structs.fields(kind):
        by_hand = _EXAMPLES.get(kind, {})
        if field.name in by_hand:
            if by_hand[field.name] is not UNSET:
                made[field.encode_name] = by_hand[field.name]
        elif field.required or (field.name in _SAMPLES and field.default is None):
            if not field.required and not _fits(_SAMPLES[field.name], field.type):
                continue
            made[field.encode_name] = _value(f"{kind.__name__}.{field.name}", field, depth)
    return made


def _value(place: str, field: msgspec.structs.FieldInfo, depth: int) -> Any:
    if field.name in _SAMPLES and _fits(_SAMPLES[field.name], field.type):
        return _SAMPLES[field.name]
    for value in _candidates(types.type_info(field.type), depth):
        if _fits(value, field.type):
            return value
    raise ValueError(f"{place}: no example fits {field.type}; give one in bus/reference.py")


def _candidates(kind: types.Type, depth: int) -> Iterator[Any]:
    """Give values that may fit a type, the likeliest first."""
    match kind:
        case types.Metadata(type=inner):
            yield from _candidates(inner, depth)
        case types.StructType(cls=cls):
            yield _example(cls, depth + 1) if depth < _ROOMS else {}
        case types.LiteralType(values=values):
            yield from values
        case types.UnionType(types=several):
            for one in several:
                if not isinstance(one, types.NoneType):
                    yield from _candidates(one, depth)
            yield None
        case types.ListType(item_type=item, min_length=least):
            for value in _candidates(item, depth):
                yield [value] * max(1, least or 0)
            yield []
        case types.BoolType():
            yield True
        case types.IntType() | types.FloatType():
            above = None if kind.gt is None else kind.gt + 1
            bounds = [kind.ge, kind.le, above, kind.multiple_of]
            yield from (1, 0, *(bound for bound in bounds if bound is not None))
        case types.StrType(min_length=least):
            yield from _TEXTS
            yield "a" * (least or 0)
        case types.DateTimeType():
            yield _WHEN
        case types.BytesType():
            yield "AACAPw=="
        case _:
            yield {}
            yield None


def _fits(value: Any, kind: Any) -> bool:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    return True


def main() -> None:
    """Write the page to the file that the command line names."""
    Path(sys.argv[1]).write_text(render())


if __name__ == "__main__":
    main()

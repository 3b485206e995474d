"""The repository of models: what there is, what is known of it, its bytes, and how it changes."""

import asyncio
from pathlib import PurePosixPath
from typing import Any, Final
from urllib.parse import quote

import msgspec
from aiohttp import web

from bus.errors import NotFound
from bus.messages import (
    CollectGarbage,
    DescribeModel,
    LoadModel,
    ModelConfig,
    ModelReport,
    ModelSpec,
    ModelVersion,
    RemoveModel,
    UnloadModel,
    ValidateModel,
)
from bus.models import version_of
from bus.subjects import (
    MODEL_DESCRIBE,
    MODEL_GC,
    MODEL_LOAD,
    MODEL_REMOVE,
    MODEL_UNLOAD,
    MODEL_VALIDATE,
)
from services.gateway import contents
from services.gateway.examples import Examples, Place, examples_of
from services.gateway.models import wanted_version
from services.gateway.parts import PARTS, Parts
from services.gateway.repository import detail_of, list_query, served_of, summary_of, switch
from services.gateway.stored import stored
from services.gateway.translate import answer, asked, read

CHANGE_S: Final = 30.0
LOAD_S: Final = 300.0
VALIDATE_S: Final = 600.0
# How long a change may take until this gateway has seen it.
SEEN_S: Final = 3.0


# --- Reading --------------------------------------------------------------------------------------


async def list_all(request: web.Request) -> web.Response:
    """Return the models: `q`, `label=NAME=VALUE`, `format`, `state`, `loaded`; sorted, in pages.

    400 a word that is not known, or a value that it cannot have.
    """
    view = request.app[PARTS].models
    query = list_query(request.query.items())
    part = query.applied(summary_of(view, spec) for spec in view.specs())
    return answer(
        {"models": part.items, "total": part.total, "page": part.page, "per_page": part.per_page}
    )


async def loaded(request: web.Request) -> web.Response:
    """Return what is in memory, or on its way there, on which instance, and what may be."""
    instances = request.app[PARTS].models.instances()
    return answer(
        {
            "models": [served_of(at, one) for at in instances for one in at.models],
            "instances": [
                {
                    "plugin": at.plugin,
                    "slot": at.slot,
                    "instance": at.instance,
                    "host": at.host,
                    "memory_bytes": sum(one.memory_bytes for one in at.models),
                    "budget_bytes": at.budget_bytes,
                }
                for at in instances
            ],
        }
    )


async def get(request: web.Request) -> web.Response:
    """Return a model with its versions, and examples to copy. 404 there is none."""
    at = request.app[PARTS]
    return answer(await _described(request, _spec(at, request.match_info["name"])))


async def versions(request: web.Request) -> web.Response:
    """Return a model's versions, the oldest first. 404 no such model."""
    at = request.app[PARTS]
    spec = _spec(at, request.match_info["name"])
    told = await _reports(at, spec)
    found = [detail_of(at.models, spec, one, told[one.version]) for one in spec.versions]
    return answer({"name": spec.id, "versions": found, "total": len(found)})


async def version(request: web.Request) -> web.Response:
    """Return a version with its whole report. 404 no such model or version."""
    at = request.app[PARTS]
    spec, found = _version(request)
    report = await _report(at, found)
    detail = msgspec.structs.asdict(detail_of(at.models, spec, found, report))
    examples = _examples(request, spec, found, report, found.version)
    return answer({"name": spec.id, **detail, "report": report, "examples": examples})


async def report(request: web.Request) -> web.Response:
    """Return what the validation of a version found. 404 no such version, or not validated yet."""
    spec, found = _version(request)
    told = await _report(request.app[PARTS], found)
    if told is None:
        raise NotFound(
            f"version {found.version!r} of {spec.id!r} has not been validated; "
            f"POST /api/models/{quote(spec.id, safe='')}/validate does it"
        )
    return answer(told)


async def content(request: web.Request) -> web.StreamResponse:
    """Send a version's bytes: all of them, or one range.

    206 a range; 304 the caller has them (`If-None-Match`); 404 no such version, or its bytes are
    gone; 416 no bytes in that range; 429 too many read already.
    """
    at = request.app[PARTS]
    spec, found = _version(request)
    size = await stored(at.client, at.client.store.artefacts.size(found.checksum), "artefacts")
    if size is None:
        raise NotFound(f"the bytes of version {found.version!r} of {spec.id!r} are gone")
    name = f"{spec.id}-{found.version}{PurePosixPath(found.path).suffix.lower()}"
    return await contents.content(
        request, at.client.store.artefacts, found.checksum, size, file_name=name
    )


# --- Changing -------------------------------------------------------------------------------------


class _Describe(msgspec.Struct, forbid_unknown_fields=True):
    description: str | msgspec.UnsetType = msgspec.UNSET
    labels: dict[str, str] | msgspec.UnsetType = msgspec.UNSET
    licence: str | msgspec.UnsetType = msgspec.UNSET


class _Load(msgspec.Struct, forbid_unknown_fields=True):
    version: str | None = None
    config: ModelConfig | None = None


class _Unload(msgspec.Struct, forbid_unknown_fields=True):
    version: str | None = None


class _Validate(msgspec.Struct, forbid_unknown_fields=True):
    version: str | None = None
    sample: dict[str, Any] | None = None


async def describe(request: web.Request) -> web.Response:
    """Change a model's description, labels or licence; what is not named stays.

    400 another field; 404 no such model; 503 no candle.
    """
    at = request.app[PARTS]
    given = msgspec.to_builtins(await read(request, _Describe))
    ask = asked(DescribeModel, {"id": request.match_info["name"], **given})
    spec = await at.client.call(MODEL_DESCRIBE, ask, timeout_s=CHANGE_S)
    await at.models.until(lambda: at.models.spec(spec.id) == spec, SEEN_S)
    return answer(await _described(request, spec))


async def remove(request: web.Request) -> web.Response:
    """Delete a model, or one version: `?force` although it is used, `?dry-run` only says what.

    404 no such model or version; 409 something uses it, and what; 503 no candle.
    """
    at = request.app[PARTS]
    given = {
        "id": request.match_info["name"],
        "version": request.match_info.get("version"),
        "force": _flag(request, "force"),
        "dry_run": _flag(request, "dry-run"),
    }
    ask = asked(RemoveModel, given)
    removed = await at.client.call(MODEL_REMOVE, ask, timeout_s=LOAD_S)

    def gone() -> bool:
        spec = at.models.spec(removed.id)
        return spec is None or not {v.version for v in spec.versions} & {*removed.versions}

    if not removed.dry_run:
        await at.models.until(gone, SEEN_S)
    return answer(removed)


async def validate(request: web.Request) -> web.Response:
    """Validate a version again, with `sample` instead of zeros if it is given; gives the report.

    404 no such model or version; 503 no candle; 504 it takes longer than ten minutes.
    """
    at = request.app[PARTS]
    given = msgspec.structs.asdict(await read(request, _Validate))
    ask = asked(ValidateModel, {"id": request.match_info["name"], **given})
    return answer(await at.client.call(MODEL_VALIDATE, ask, timeout_s=VALIDATE_S))


async def load(request: web.Request) -> web.Response:
    """Have a version served, and answer when an instance serves it.

    400 a key that the configuration has not; 404 no such model or version; 422 it is not sound.
    """
    given = await read(request, _Load)
    fields = {"version": given.version, "config": given.config}
    said = {name: value for name, value in fields.items() if value is not None}
    ask = asked(LoadModel, {"id": request.match_info["name"], **msgspec.to_builtins(said)})
    return answer(await load_now(request.app[PARTS], ask))


async def load_now(at: Parts, ask: LoadModel) -> Any:
    """Have a version served; return it as the instance has it that was asked."""
    served = await at.client.call(MODEL_LOAD, ask, timeout_s=LOAD_S)
    # Whoever is told so and then asks whether it is ready hears nothing else, by whichever name.
    # What stands in the view from before an unloading is no answer to this.
    names = {served.version, *served.names}
    await at.models.until(
        lambda: all(at.models.answers(served.id, name, served.revision) for name in names), SEEN_S
    )
    return served


async def unload(request: web.Request) -> web.Response:
    """Have a model, or one version, served no longer. 404 it was not."""
    at = request.app[PARTS]
    given = msgspec.structs.asdict(await read(request, _Unload))
    ask = asked(UnloadModel, {"id": request.match_info["name"], **given})
    unloaded = await at.client.call(MODEL_UNLOAD, ask, timeout_s=LOAD_S)

    def is_unwanted() -> bool:
        spec = at.models.spec(ask.id)
        found = version_of(spec, ask.version) if spec and ask.version else None
        return not (found.wanted if found else at.models.wanted(ask.id))

    await at.models.until(is_unwanted, SEEN_S)
    return answer(unloaded)


async def collect_garbage(request: web.Request) -> web.Response:
    """Delete artefacts that no version needs, and what broken uploads left; `?dry-run` says what.

    503 no candle.
    """
    ask = CollectGarbage(dry_run=_flag(request, "dry-run"))
    return answer(await request.app[PARTS].client.call(MODEL_GC, ask, timeout_s=LOAD_S))


# --- How ------------------------------------------------------------------------------------------


def _flag(request: web.Request, name: str) -> bool:
    return name in request.query and switch(request.query[name], name)


def _spec(at: Parts, model: str) -> ModelSpec:
    return wanted_version(at, model, None)[0]


def _version(request: web.Request) -> tuple[ModelSpec, ModelVersion]:
    named = request.match_info
    return wanted_version(request.app[PARTS], named["name"], named["version"])


async def _report(at: Parts, found: ModelVersion) -> ModelReport | None:
    entry = await stored(at.client, at.client.store.reports.get(found.checksum), "reports")
    return entry.value if entry else None


async def _reports(at: Parts, spec: ModelSpec) -> dict[str, ModelReport | None]:
    """Return what validation found of each version."""
    reports = await asyncio.gather(*(_report(at, one) for one in spec.versions))
    return dict(zip((one.version for one in spec.versions), reports, strict=True))


async def _described(request: web.Request, spec: ModelSpec) -> dict[str, Any]:
    at = request.app[PARTS]
    told = await _reports(at, spec)
    default = version_of(spec)
    examples = default and _examples(request, spec, default, told[default.version], None)
    versions = [detail_of(at.models, spec, one, told[one.version]) for one in spec.versions]
    signature = default and {
        "inputs": default.inputs,
        "outputs": default.outputs,
        "batched": default.batched,
    }
    return {
        **msgspec.structs.asdict(summary_of(at.models, spec)),
        "signature": signature,
        "versions": versions,
        "examples": examples,
    }


def _examples(
    request: web.Request,
    spec: ModelSpec,
    found: ModelVersion,
    told: ModelReport | None,
    named: str | None,
) -> Examples:
    at = request.app[PARTS]
    caller = at.gate.caller(request)
    place = Place(
        url=f"{request.scheme}://{request.host}",
        root=at.client.root,
        with_key=caller is None or caller.auth != "off",
    )
    tensors = found.inputs, found.outputs
    return examples_of(place, spec.id, named, tensors, told.sample_shapes if told else {})

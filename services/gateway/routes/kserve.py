"""The Open Inference Protocol (KServe V2), as Triton's clients speak it.

Bodies of inference pass through as they are: tensors are read where they are needed, at the worker.
"""

from typing import Any, Final

import msgspec
from aiohttp import hdrs, web

from bus import codec
from bus.client import Answer, trace
from bus.errors import BusError, InvalidRequest, NobodyListens
from bus.instance import bkg_version
from bus.messages import Empty, ModelStatistics, UnloadModel
from bus.models import DEFAULT
from bus.statistics import sum_statistics
from bus.subjects import CANDLE_STATS, MODEL_INFER, MODEL_UNLOAD
from services.gateway import protocol
from services.gateway.bodies import body_for_bus
from services.gateway.inference import (
    COMPRESS_MIN_BYTES,
    LENGTH,
    NAME_MAX_CHARS,
    room_for_one,
    shown,
    subject_of,
)
from services.gateway.models import wanted_version, why_nobody
from services.gateway.parts import PARTS, Parts
from services.gateway.routes.models import load_now
from services.gateway.translate import (
    OUTCOME,
    TRACEPARENT,
    answer,
    read_body,
    timeout_of,
)
from services.gateway.written import Relayed

LOAD_S: Final = 300.0
GATHER_S: Final = 2.0
# What bodies may be compressed with; aiohttp hands on as it is what it does not know.
ENCODINGS: Final = {"", "identity", "gzip", "deflate", "br", "zstd"}
# How long a change may take until this gateway has seen it.
SEEN_S: Final = 3.0


class _Parameters(msgspec.Struct):
    parameters: dict[str, Any] = {}


class _Index(msgspec.Struct):
    ready: bool = False


async def server(_request: web.Request) -> web.Response:
    """Return who this is, and which extensions of the protocol are there."""
    return answer(
        {"name": "bkg", "version": bkg_version(), "extensions": list(protocol.EXTENSIONS)}
    )


async def live(_request: web.Request) -> web.Response:
    """Return 200: this process answers."""
    return answer({"live": True})


async def ready(request: web.Request) -> web.Response:
    """Return 200 when inference can be asked for, else 503."""
    at = request.app[PARTS]
    there = at.client.connected and bool(at.models.instances())
    return answer({"ready": there}, 200 if there else 503)


async def model_ready(request: web.Request) -> web.Response:
    """Return 200 when an instance serves the model, else 404 or 503 and why."""
    at = request.app[PARTS]
    model, name = _named(request)
    _, version = wanted_version(at, model, name)
    if not (version.wanted and at.models.answers(model, name or DEFAULT)):
        raise await why_nobody(at, model, name)
    return answer({"name": model, "ready": True})


async def metadata(request: web.Request) -> web.Response:
    """Return what a model takes and gives. 404 there is none."""
    return answer(protocol.metadata(*wanted_version(request.app[PARTS], *_named(request))))


async def config(request: web.Request) -> web.Response:
    """Return how a model is run. 404 there is none."""
    at = request.app[PARTS]
    found = wanted_version(at, *_named(request))
    return answer(protocol.configuration(*found, _settings(at)))


async def stats(request: web.Request) -> web.Response:
    """Return what a model, or every model, has done on all instances together. 404 none such."""
    at = request.app[PARTS]
    model, name = request.match_info.get("model"), request.match_info.get("version")
    only = wanted_version(at, model, name)[1].version if model and name else None
    if model:
        wanted_version(at, model, None)
    found: dict[tuple[str, str], list[ModelStatistics]] = {}
    for one in await _statistics(at):
        if model in {None, one.name} and only in {None, one.version}:
            found.setdefault((one.name, one.version), []).append(one)
    return answer({"model_stats": [sum_statistics(found[key]) for key in sorted(found)]})


async def index(request: web.Request) -> web.Response:
    """Return every version in the repository, and whether it is served."""
    wanted = await _read(request, _Index)
    return answer(protocol.index(request.app[PARTS].models, ready_only=wanted.ready))


async def load(request: web.Request) -> web.Response:
    """Have a model served, and answer when an instance serves it.

    400 a parameter is not known; 404 no such model or file; 422 the model is not sound.
    """
    asked = await _read(request, _Parameters)
    at = request.app[PARTS]
    wanted = protocol.load_request(request.match_info["model"], asked.parameters, _settings(at))
    return answer(await load_now(at, wanted))


async def unload(request: web.Request) -> web.Response:
    """Have a model served no longer. 404 it was not loaded."""
    await _read(request, _Parameters)
    at = request.app[PARTS]
    wanted = codec.convert({"id": request.match_info["model"]}, UnloadModel)
    unloaded = await at.client.call(MODEL_UNLOAD, wanted, timeout_s=LOAD_S)
    await at.models.until(lambda: not at.models.wanted(wanted.id), SEEN_S)
    return answer(unloaded)


async def infer(request: web.Request) -> web.Response:
    """Run tensors through a model.

    400 the body does not fit; 404 no such model, or not loaded; 408 the body comes too slowly; 413
    too large; 422 the model fails on it; 429 and 503 try again after `Retry-After`; 504 no answer
    within `?timeout=` seconds.
    """
    at = request.app[PARTS]
    model, version = _named(request)
    if len(model) > NAME_MAX_CHARS or (version and len(version) > NAME_MAX_CHARS):
        # No name is that long. The broker hangs up on a subject beyond its 4 KiB.
        raise await why_nobody(at, model, version)
    try:
        relayed = await _relayed(request, at, subject_of(at.client.root, model, version))
    except NobodyListens:
        raise await why_nobody(at, model, version) from None
    response = Relayed(relayed.body, shown(relayed.headers))
    if len(relayed.body) >= COMPRESS_MIN_BYTES and hdrs.ACCEPT_ENCODING in request.headers:
        response.enable_compression()
    return response


async def _relayed(request: web.Request, at: Parts, subject: str) -> Answer:
    """Return the worker's answer to a request."""
    outcome = request.get(OUTCOME)
    if isinstance(outcome, BusError):
        raise outcome
    if isinstance(outcome, Answer):
        return outcome
    headers = {}
    if length := request.headers.get(LENGTH):
        headers[LENGTH] = length
    if traced := trace.get():
        headers[TRACEPARENT] = traced
    timeout_s = timeout_of(request)
    encoding = request.headers.get(hdrs.CONTENT_ENCODING, "")
    if encoding.lower() not in ENCODINGS:
        raise InvalidRequest(
            f"Content-Encoding is {encoding[:40]!r}; gzip and deflate are taken, one of them",
            field=hdrs.CONTENT_ENCODING,
        )
    with room_for_one(at) as room:
        body = await body_for_bus(request, at.client, room, timeout_s)
        return await at.client.relay(subject, body, headers=headers, timeout_s=timeout_s)


def _named(request: web.Request) -> tuple[str, str | None]:
    return request.match_info["model"], request.match_info.get("version")


def _settings(at: Parts) -> dict[str, Any]:
    """Return candle's settings, as far as they are set."""
    plugin = at.view.get(MODEL_INFER.queue)
    return plugin.config.settings if plugin and plugin.config else {}


async def _read(request: web.Request, kind: type[Any]) -> Any:
    """Return the body, which may be missing."""
    body = await read_body(request, request.app[PARTS].client.max_payload)
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body cannot be read: {error}") from None


async def _statistics(at: Parts) -> list[ModelStatistics]:
    """Return the statistics of every instance that answers."""
    told = await at.client.call_each(
        CANDLE_STATS,
        Empty(),
        [(one.plugin, one.slot) for one in at.models.instances()],
        timeout_s=GATHER_S,
    )
    return [one for stats in told for one in stats.model_stats]

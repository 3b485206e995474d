"""Uploads of models: raw bodies that can be resumed, and forms."""

import contextlib
import hashlib
from pathlib import PurePosixPath
from typing import Any, Final
from urllib.parse import quote

import aiohttp
import msgspec
from aiohttp import BodyPartReader, hdrs, web

from bus import codec
from bus.errors import (
    NEVER,
    BusError,
    InvalidRequest,
    NoSpace,
    NotFound,
    TooLarge,
    Unavailable,
    Unprocessable,
)
from bus.messages import (
    AddedModel,
    AddModel,
    KeptAnswer,
    LoadModel,
    ModelSource,
    UnfinishedUpload,
    now,
)
from bus.models import DEFAULT, LATEST
from bus.subjects import MODEL_ADD
from bus.uploads import other_digest
from services.gateway.bodies import begun, blocks_of, chunks_of, parts_of, whole_part
from services.gateway.parts import PARTS, Parts
from services.gateway.patience import Patience, for_file
from services.gateway.repository import label_in, switch
from services.gateway.routes.jobs import idempotency_key
from services.gateway.routes.models import SEEN_S, load_now
from services.gateway.stored import stored
from services.gateway.translate import answer, asked, problem_of
from services.gateway.upload_headers import COMPLETE, LENGTH, OFFSET, SHA256, Told, told_by
from services.gateway.uploads import (
    CutOff,
    WrongOffset,
    other_request,
    take,
    too_large,
)

# Fetching, validating and storing what was uploaded, at the worker.
ADD_S: Final = 600.0
FIELD_MAX_BYTES: Final = 64 * 1024
# What a form may have beside its file.
FORM_MAX_BYTES: Final = 1024 * 1024

_FORMATS: Final = (".json", ".onnx")
# In place of the digest, while the rest of a request is looked at.
_NO_DIGEST: Final = "0" * 64


# --- Handlers -------------------------------------------------------------------------------------


async def put(request: web.Request) -> web.Response:
    """Take a file as a version of a model, or the rest of one (`Upload-Offset`).

    201, or 200 if this version has these bytes already: the version and its report; a file that
    is not sound is kept as such. 204 with `Upload-Complete: ?0`: the rest is to come. 400 a header
    that cannot be; 404 nothing to resume; 409 this version has other bytes, or is being uploaded,
    or the rest does not begin there (with `Upload-Offset`); 408 nothing came for a minute;
    413; 422 another digest, or with `?load=true` not sound; 503 no candle; 507 no room.
    """
    at = request.app[PARTS]
    told = told_by(request.headers, request.content_length)
    wish = _wish(request, request.match_info["version"])
    key = idempotency_key(request)
    _check_size(at, told.total_bytes)
    with at.uploads.claiming(wish.id, wish.version, key):
        if kept := await at.uploads.answered(key, _name_of(request)):
            return await _again(request, kept)
        await _check_room(at, told)
        try:
            done = await _received(request, wish, told)
        except WrongOffset as error:
            refused = problem_of(error)
            refused.headers[OFFSET] = str(error.offset)
            return refused
        if isinstance(done, int):
            return web.Response(status=204, headers={OFFSET: str(done), COMPLETE: "?0"})
        return await _entered(request, done, key)


async def post(request: web.Request) -> web.Response:
    """Take a file as the next version of a model: a raw body, or a form with the part `file`.

    A form may have `version`, `description`, `labels`, `licence` and `sha256`, also behind the
    file. What breaks off is not kept. Answers as `put` does.
    """
    at = request.app[PARTS]
    told = told_by(request.headers, request.content_length)
    if told.offset or not told.is_last:
        raise InvalidRequest(
            "only an upload to .../versions/VERSION can be resumed: PUT it there", field=OFFSET
        )
    wish = _wish(request, None)
    key = idempotency_key(request)
    is_form = (request.content_type or "").startswith("multipart/")
    _check_size(at, told.total_bytes, FORM_MAX_BYTES if is_form else 0)
    with at.uploads.claiming(wish.id, None, key):
        if kept := await at.uploads.answered(key, _name_of(request)):
            return await _again(request, kept)
        await _check_room(at, told)
        if not is_form and (stored := await _stored_already(at, told)):
            return await _entered(request, await _compared(request, wish, told, stored), key)
        async with at.client.store.artefacts.writing() as upload:
            if is_form:
                wish, sha256 = await _form_read(request, upload, wish)
            else:
                first, blocks = await begun(blocks_of(request))
                wish = _named(wish, _file_name(request, first))
                await take(upload, blocks, max_bytes=at.uploads.max_bytes)
                sha256 = told.sha256
            digest, _ = await upload.commit(sha256)
        return await _entered(request, msgspec.structs.replace(wish, checksum=digest), key)


async def offset(request: web.Request) -> web.Response:
    """Say how much of an upload that broke off, or goes on, is here. 404 there is none."""
    at = request.app[PARTS]
    wish = _wish(request, request.match_info["version"])
    found = await at.uploads.unfinished(wish.id, wish.version or "")
    if found is None:
        raise NotFound(f"there is no unfinished upload of version {wish.version!r} of {wish.id!r}")
    headers = {OFFSET: str(found.offset), COMPLETE: "?0"}
    if found.total_bytes is not None:
        headers[LENGTH] = str(found.total_bytes)
    return web.Response(status=204, headers=headers)


async def drop(request: web.Request) -> web.Response:
    """Forget an upload that broke off. 204; 404 there is none; 409 it goes on."""
    wish = _wish(request, request.match_info["version"])
    await request.app[PARTS].uploads.drop(wish.id, wish.version or "")
    return web.Response(status=204)


# --- What a request says --------------------------------------------------------------------------


def _wish(request: web.Request, version: str | None) -> AddModel:
    """Return what is asked for, but for the bytes: from path and query."""
    if version in {DEFAULT, LATEST}:
        raise InvalidRequest(
            f"version: {version!r} is an alias; a version needs a name of its own", field="version"
        )
    query = request.query
    given = {
        "id": request.match_info["name"],
        "version": version,
        "description": query.get("description"),
        "licence": query.get("licence"),
        "labels": dict(map(label_in, query.getall("label"))) if "label" in query else None,
        "checksum": _NO_DIGEST,
        "file_name": "model",
    }
    return asked(AddModel, given)


def _named(wish: AddModel, file_name: str) -> AddModel:
    source = ModelSource(kind="upload", file_name=file_name, by="admin")
    plain = codec.plain(wish) | {"file_name": file_name, "source": codec.plain(source)}
    return asked(AddModel, plain)


def _file_name(request: web.Request, first: bytes) -> str:
    """Return what the file is called: as the caller says, or by its kind, or by how it begins."""
    if named := request.query.get("file"):
        return _with_suffix(named, first)
    if said := request.headers.get(hdrs.CONTENT_DISPOSITION):
        _, parameters = aiohttp.parse_content_disposition(said)
        if named := aiohttp.content_disposition_filename(parameters):
            return _with_suffix(named, first)
    return "model.json" if request.content_type == codec.JSON else _with_suffix("model", first)


def _with_suffix(name: str, first: bytes) -> str:
    # Browsers of old send whole paths.
    name = PurePosixPath(name.replace("\\", "/")).name
    if PurePosixPath(name).suffix.lower() in _FORMATS:
        return name
    return f"{name or 'model'}{'.json' if first.lstrip()[:1] == b'{' else '.onnx'}"


def _name_of(request: web.Request) -> str:
    return f"{request.method} {request.path_qs}"


def _check_size(at: Parts, total_bytes: int | None, surplus: int = 0) -> None:
    if not at.models.instances():
        # Before the bytes come: without candle they would be for nothing.
        raise Unavailable("no instance of candle is there to take a model", retry_after_s=5)
    if total_bytes is not None and total_bytes > at.uploads.max_bytes + surplus:
        raise too_large(total_bytes, at.uploads.max_bytes)


async def _check_room(at: Parts, told: Told) -> None:
    """Refuse what the object store cannot take, unless it has it.

    Raises:
        NoSpace: It has no room for so many bytes, now or ever; says how many it has room for.
    """
    if told.total_bytes is None:
        return
    room = at.client.store.artefacts.check_room(told.total_bytes - told.offset, told.sha256)
    try:
        await stored(at.client, room, "artefacts")
    except TooLarge as error:
        # Not for its sender to mend, who keeps to what the gateway allows.
        raise NoSpace(error.message, retry_after_s=NEVER) from None


# --- Bytes ----------------------------------------------------------------------------------------


async def _received(request: web.Request, wish: AddModel, told: Told) -> AddModel | int:
    """Return what is to be added; or, when the rest is to come, how many bytes are here."""
    at = request.app[PARTS]
    if told.offset:
        # Before the caller sends anything.
        await at.uploads.resumable(wish.id, wish.version or "", told.offset)
    if stored := await _stored_already(at, told):
        return await _compared(request, wish, told, stored)
    may_be_empty = told.offset > 0 or not told.is_last
    first, blocks = await begun(blocks_of(request), may_be_empty=may_be_empty)
    unfinished = UnfinishedUpload(
        id=wish.id,
        version=wish.version or "",
        upload="",
        file_name=_named(wish, _file_name(request, first)).file_name,
        begun_at=now(),
        total_bytes=told.total_bytes,
    )
    async with at.uploads.receiving(unfinished, told.offset) as reception:
        upload, total = reception.upload, reception.wish.total_bytes
        await take(
            upload,
            blocks,
            max_bytes=at.uploads.max_bytes,
            total_bytes=total,
            part_sha256=told.part_sha256,
        )
        if not told.is_last:
            await at.uploads.put_aside(reception)
            return upload.offset
        if total is not None and upload.offset != total:
            raise CutOff(
                f"{LENGTH} says {total:,} bytes, but only {upload.offset:,} have come; send the "
                f"rest with {OFFSET}: {upload.offset}",
                field=LENGTH,
            )
        digest, _ = await upload.commit(told.sha256)
        named = _named(wish, reception.wish.file_name)
        return msgspec.structs.replace(named, checksum=digest)


async def _stored_already(at: Parts, told: Told) -> str | None:
    """Return the digest of a whole file that is to come, if the object store has it already."""
    if told.sha256 is None or told.offset or not told.is_last:
        return None
    return told.sha256 if await at.client.store.artefacts.holds(told.sha256) else None


async def _compared(request: web.Request, wish: AddModel, told: Told, sha256: str) -> AddModel:
    """Return what is to be added, once its bytes have proved to be those that are stored.

    Raises:
        Unprocessable: They have another digest.
    """
    first, blocks = await begun(blocks_of(request))
    sha = hashlib.sha256()
    await take(
        _Hashing(sha),
        blocks,
        max_bytes=request.app[PARTS].uploads.max_bytes,
        total_bytes=told.total_bytes,
        part_sha256=told.part_sha256,
    )
    if sha.hexdigest() != sha256:
        raise other_digest(sha.hexdigest(), sha256)
    return msgspec.structs.replace(_named(wish, _file_name(request, first)), checksum=sha256)


async def _form_read(
    request: web.Request, upload: Any, wish: AddModel
) -> tuple[AddModel, str | None]:
    """Write a form's file; return what is asked for, and the digest that the file should have.

    Raises:
        InvalidRequest: It is no form, has no file, two, or a field that is not known.
    """
    given: dict[str, Any] = {}
    file_name: str | None = None
    patience = await for_file(request)
    async with contextlib.aclosing(parts_of(request, patience)) as parts:
        async for part in parts:
            if part.filename is None and part.name != "file":
                await _read_field(part, patience, given)
            elif file_name is not None:
                raise InvalidRequest("the form has two files; send one at a time", field="file")
            else:
                first, blocks = await begun(chunks_of(part, patience))
                file_name = _with_suffix(part.filename or "model", first)
                await take(upload, blocks, max_bytes=request.app[PARTS].uploads.max_bytes)
    if file_name is None:
        raise InvalidRequest("the form has no file; send it as the part `file`", field="file")
    sha256 = given.pop("sha256", None)
    if sha256 is not None and not SHA256.fullmatch(sha256):
        raise InvalidRequest("sha256 must be 64 hex digits", field="sha256")
    if given.get("version") in {DEFAULT, LATEST}:
        raise InvalidRequest("version: an alias is no version's own name", field="version")
    plain = codec.plain(wish) | {name: value for name, value in given.items() if value != ""}
    return _named(asked(AddModel, plain), file_name), sha256


async def _read_field(part: BodyPartReader, patience: Patience, given: dict[str, Any]) -> None:
    name = part.name or ""
    if name not in {"version", "description", "labels", "label", "licence", "sha256"}:
        raise InvalidRequest(
            f"the form's field {name[:40]!r} is not known; allowed are file, version, description, "
            "labels, label, licence and sha256",
            field=name[:40],
        )
    raw = await whole_part(part, patience, FIELD_MAX_BYTES)
    text = raw.decode(errors="replace").strip()
    if name == "labels":
        try:
            given.setdefault("labels", {}).update(msgspec.json.decode(raw, type=dict[str, str]))
        except msgspec.DecodeError:
            raise InvalidRequest(
                "labels must be a JSON object of texts; one label alone is the field label, "
                "NAME=VALUE",
                field="labels",
            ) from None
    elif name == "label":
        key, value = label_in(text)
        given.setdefault("labels", {})[key] = value
    else:
        given[name] = text.lower() if name == "sha256" else text


# --- Answers --------------------------------------------------------------------------------------


async def _entered(request: web.Request, wish: AddModel, key: str | None) -> web.Response:
    """Have the artefact made a version; return the answer to the upload."""
    at = request.app[PARTS]
    added = await at.client.call(MODEL_ADD, wish, timeout_s=ADD_S)
    await at.models.until(lambda: _is_seen(at, added), SEEN_S)
    location = f"/api/models/{quote(added.id, safe='')}/versions/{quote(added.version, safe='')}"
    told = codec.plain(added) | {
        "sound": added.report.sound,
        "problems": codec.plain(added.report.problems),
    }
    if "load" in request.query and switch(request.query["load"], "load"):
        try:
            told["loaded"] = codec.plain(await _loaded(at, added))
        except BusError as error:
            refused = problem_of(error)
            refused.headers[hdrs.LOCATION] = location
            return refused
    response = answer(told, 201 if added.created else 200)
    response.headers[hdrs.LOCATION] = location
    if key is not None:
        kept = KeptAnswer(
            key=key,
            request=_name_of(request),
            checksum=added.checksum,
            status=response.status,
            location=location,
            body=response.body if isinstance(response.body, bytes) else b"",
        )
        await at.uploads.keep_answer(key, kept)
    return response


async def _loaded(at: Parts, added: AddedModel) -> Any:
    if not added.report.sound:
        problems = [f"{one.where}: {one.what}".removeprefix(": ") for one in added.report.problems]
        raise Unprocessable(
            f"version {added.version!r} of {added.id!r} is kept, but not loaded: it is not sound: "
            f"{problems[0] if problems else 'the report has no reason'}",
            reasons=problems or None,
            details={"version": added.version, "report": codec.plain(added.report)},
        )
    return await load_now(at, LoadModel(id=added.id, version=added.version))


def _is_seen(at: Parts, added: AddedModel) -> bool:
    spec = at.models.spec(added.id)
    return spec is not None and any(one.version == added.version for one in spec.versions)


async def _again(request: web.Request, kept: KeptAnswer) -> web.Response:
    """Return the answer that the same request had before.

    Raises:
        Unprocessable: It brings other bytes.
    """
    sha = hashlib.sha256()
    if (request.content_type or "").startswith("multipart/"):
        hashing = _Hashing(sha)
        await _form_read(request, hashing, _wish(request, None))
    else:
        async for block in blocks_of(request):
            sha.update(block)
    if sha.hexdigest() != kept.checksum:
        raise other_request(kept.request)
    headers = {hdrs.LOCATION: kept.location}
    return web.Response(
        body=kept.body, status=kept.status, headers=headers, content_type=codec.JSON
    )


class _Hashing:
    """Takes bytes in place of an upload, only for their digest."""

    def __init__(self, sha: Any) -> None:
        self.offset = 0
        self._sha = sha

    async def write(self, block: bytes) -> None:
        self._sha.update(block)
        self.offset += len(block)

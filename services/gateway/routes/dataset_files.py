"""Datasets as files: imports, exports and embedding anew, each of them a job."""

import contextlib
from pathlib import PurePosixPath
from typing import Annotated, Any, Final
from urllib.parse import quote

import aiohttp
import msgspec
from aiohttp import hdrs, web
from msgspec import Meta

from bus.errors import BusError, Conflict, Internal, InvalidRequest, NotFound
from bus.messages import Job, ManageDataset
from bus.uploads import Upload
from services.gateway import contents
from services.gateway.bodies import begun, blocks_of, chunks_of, parts_of, whole_part
from services.gateway.parts import PARTS, Parts
from services.gateway.patience import for_file
from services.gateway.routes.datasets import manage
from services.gateway.routes.jobs import idempotency_key
from services.gateway.stored import stored
from services.gateway.translate import answer, asked, problem, read
from services.gateway.upload_headers import OFFSET, SHA256, Told, told_by
from services.gateway.uploads import take as take_blocks
from services.gateway.uploads import too_large

FIELD_MAX_BYTES: Final = 1024
# What a form may have beside its file.
FORM_MAX_BYTES: Final = 64 * 1024
JOB_MAX_CHARS: Final = 40
FILE_NAME_MAX: Final = 255

_FIELDS: Final = ("format", "existing", "file_settings", "sha256", "file_name")


async def take(request: web.Request) -> web.Response:
    """Take a dataset file: a raw body of any length, or a form with the part `file`.

    `format` (found out if absent), `existing` (`skip`, `replace` or `fail`) and `file_settings`
    (`take` or `keep`) stand in the query or in the form; a digest in the usual headers, or as the
    field `sha256`. What the file is called `file_name` says, the form, or `Content-Disposition`. A
    dataset that is not there is made, set as the file says unless they are to be kept. 202 with
    `Location`: the job that reads it; the same `Idempotency-Key` again gives the same job. 400 a
    value that there cannot be; 408 nothing came for a minute; 413; 422 another digest; 429 too many
    jobs or uploads; 503 no rustyface; 507 no room.
    """
    at = request.app[PARTS]
    told = told_by(request.headers, request.content_length)
    if told.offset or not told.is_last:
        raise InvalidRequest("an import is sent in one piece", field=OFFSET)
    given = _given(dict(request.query))
    is_form = (request.content_type or "").startswith("multipart/")
    most = at.uploads.max_bytes
    if told.total_bytes is not None and told.total_bytes > most + is_form * FORM_MAX_BYTES:
        raise too_large(told.total_bytes, most)
    key = idempotency_key(request)
    with at.uploads.claiming(request.match_info["dataset"], None, key):
        # Before the bytes come: with no worker they would be for nothing.
        await manage(request, "list")
        await _check_room(at, told)
        async with at.client.store.faces.writing() as upload:
            if is_form:
                given |= await _form_read(request, upload, given)
            else:
                given = _file_name_in(request) | given
                _, blocks = await begun(blocks_of(request))
                await take_blocks(upload, blocks, max_bytes=most)
            sha256 = given.pop("sha256", None) or told.sha256
            digest, _ = await upload.commit(sha256)
        try:
            entered = await manage(request, "import", artefact=digest, key=key, **given)
        except BusError as error:
            if error.number < 500:
                await _forget(at, digest)
            raise
    return _begun_as(entered.job)


async def export(request: web.Request) -> web.Response:
    """Have a dataset written into a file: `format` is `json` (the usual), `npz` or `parquet`.

    202 with `Location`: the job; when it is done, GET .../exports/JOB has the file. 400 another
    format; 404 no such dataset; 429 too many jobs.
    """
    given = _given(dict(request.query), allowed=("format",))
    given.setdefault("format", "json")
    told = await manage(request, "export", key=idempotency_key(request), **given)
    return _begun_as(told.job)


class _Reembed(msgspec.Struct, forbid_unknown_fields=True):
    into: Annotated[str, Meta(min_length=1, max_length=128)]


async def reembed(request: web.Request) -> web.Response:
    """Embed a dataset's kept images anew, with the present embedder, `into` a new dataset.

    202 with `Location`: the job. 404 no such dataset; 409 there is `into` already, or no image
    was kept; 429 too many jobs.
    """
    into = (await read(request, _Reembed)).into
    told = await manage(request, "reembed", into=into, key=idempotency_key(request))
    return _begun_as(told.job)


async def content(request: web.Request) -> web.StreamResponse:
    """Send the file of an export: all of it, or one range.

    206 a range; 304 the caller has it; 404 no such export; 409 its job goes on, or failed; 410 it
    was deleted; 416 no bytes in that range; 429 too many are read.
    """
    at = request.app[PARTS]
    job = await _export(request)
    done = job.gallery_result
    if job.state != "done" or done is None or done.artefact is None:
        raise Conflict(
            f"the export {job.job} is {job.state}{f': {job.error}' if job.error else ''}; "
            f"GET /api/jobs/{job.job} says how far it is",
            details={"state": job.state},
        )
    store = at.client.store.faces
    size = await stored(at.client, store.size(done.artefact), "exports")
    if size is None:
        return problem(
            410,
            "the file of this export was deleted: exports are kept for an hour; ask for a new one "
            f"by POST /api/datasets/{quote(request.match_info['dataset'], safe='')}/export",
            code="gone",
        )
    name = done.file_name or f"{request.match_info['dataset']}.{_format(job)}"
    return await contents.content(request, store, done.artefact, size, file_name=name)


# --- How ------------------------------------------------------------------------------------------


def _given(said: dict[str, str], allowed: tuple[str, ...] = _FIELDS) -> dict[str, Any]:
    """Return what a query or a form says, once it can be so.

    Raises:
        InvalidRequest: A field is not known, or has a value that it cannot have.
    """
    said.pop("timeout", None)
    for name in said:
        if name not in allowed:
            raise InvalidRequest(
                f"{name[:40]!r} is not known here; allowed are {', '.join(allowed)}",
                field=name[:40],
            )
    if "sha256" in said:
        said["sha256"] = said["sha256"].strip().lower()
        if not SHA256.fullmatch(said["sha256"]):
            raise InvalidRequest("sha256 must be 64 hex digits", field="sha256")
    asked(ManageDataset, {"action": "import", **{n: said[n] for n in said if n != "sha256"}})
    return dict(said)


async def _form_read(
    request: web.Request, upload: Upload, before: dict[str, Any]
) -> dict[str, Any]:
    """Write a form's file; return its other fields.

    Raises:
        InvalidRequest: It has no file, two, or a field that is not known or was given already.
    """
    most = request.app[PARTS].uploads.max_bytes
    said: dict[str, str] = {}
    file_name: dict[str, str] = {}
    has_file = False
    patience = await for_file(request)
    async with contextlib.aclosing(parts_of(request, patience)) as parts:
        async for part in parts:
            name = part.name or ""
            if part.filename is None and name != "file":
                if name in said or name in before:
                    raise InvalidRequest(f"{name} is given twice; give it once", field=name)
                raw = await whole_part(part, patience, FIELD_MAX_BYTES)
                said[name] = raw.decode(errors="replace").strip()
            elif has_file:
                raise InvalidRequest("the form has two files; send one at a time", field="file")
            else:
                has_file = True
                file_name = _file_name(part.filename)
                _, blocks = await begun(chunks_of(part, patience))
                await take_blocks(upload, blocks, max_bytes=most)
    if not has_file:
        raise InvalidRequest("the form has no file; send it as the part `file`", field="file")
    return _given(file_name | before | said)


def _file_name_in(request: web.Request) -> dict[str, str]:
    """Return what the headers call the file, if they do."""
    said = request.headers.get(hdrs.CONTENT_DISPOSITION)
    if said is None:
        return {}
    _, parameters = aiohttp.parse_content_disposition(said)
    return _file_name(aiohttp.content_disposition_filename(parameters))


def _file_name(named: str | None) -> dict[str, str]:
    """Return a file's name as a field, if it has one: without its folder, and not too long."""
    # Browsers of old send whole paths, and a header's bytes need not be text.
    plain = (named or "").encode(errors="replace").decode()
    name = PurePosixPath(plain.replace("\\", "/")).name[-FILE_NAME_MAX:]
    return {"file_name": name} if name else {}


async def _check_room(at: Parts, told: Told) -> None:
    """Refuse what the object store cannot take.

    Raises:
        HTTPInsufficientStorage: It has no room for so many bytes.
    """
    if told.total_bytes is None:
        return
    room = await stored(at.client, at.client.store.faces.room(), "files")
    if room is not None and told.total_bytes > room:
        raise web.HTTPInsufficientStorage(
            text=f"{told.total_bytes:,} bytes are to come, the store of images and dataset files "
            f"has room for {room:,}; exports leave it an hour after they were made"
        )


async def _forget(at: Parts, digest: str) -> None:
    """Delete a file that nobody wants to read, unless a job has the same one."""
    with contextlib.suppress(BusError):
        for entry in await at.client.store.jobs.all():
            job = entry.value
            wanted = job and job.gallery and job.gallery.artefact
            made = job and job.gallery_result and job.gallery_result.artefact
            if digest in (wanted, made):
                return
        await at.client.store.faces.delete(digest)


async def _export(request: web.Request) -> Job:
    at = request.app[PARTS]
    dataset, name = request.match_info["dataset"], request.match_info["job"]
    job = None
    # The broker hangs up on a subject that is too long; no job's id is.
    if len(name) <= JOB_MAX_CHARS:
        entry = await stored(at.client, at.client.store.jobs.get(name), "jobs")
        job = entry.value if entry else None
    work = job and job.gallery
    if job is None or not work or (work.action, work.dataset) != ("export", dataset):
        raise NotFound(f"dataset {dataset[:100]!r} has no export {name[:60]!r}", field="job")
    return job


def _format(job: Job) -> str:
    return (job.gallery and job.gallery.format) or "json"


def _begun_as(job: Job | None) -> web.Response:
    if job is None:
        raise Internal("rustyface has begun no job; it may be older than this gateway")
    response = answer(job, 202)
    response.headers[hdrs.LOCATION] = f"/api/jobs/{quote(job.job)}"
    return response

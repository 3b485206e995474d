"""Datasets of faces: what there is, what they are set to, their entries, persons and history."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final
from urllib.parse import quote

import msgspec
from aiohttp import hdrs, web
from msgspec import Meta

from bus import codec
from bus.errors import InvalidRequest, NobodyListens, NotFound
from bus.messages import (
    Action,
    DatasetInfo,
    DatasetList,
    DatasetSettings,
    DatasetStats,
    DrawSheet,
    EntryInfo,
    ManageDataset,
    QualityBounds,
)
from bus.subjects import DATASET_MANAGE
from services.gateway import contents
from services.gateway.parts import PARTS
from services.gateway.ranges import is_known
from services.gateway.repository import page_in, switch
from services.gateway.routes import faces
from services.gateway.routes.capabilities import why_nobody
from services.gateway.stored import stored
from services.gateway.translate import answer, asked, read, timeout_of

# Who changes something, as far as this gateway can tell.
BY: Final = "admin"

_SORTS: Final[Mapping[str, Callable[[DatasetInfo], Any]]] = {
    "name": lambda one: one.id,
    "entries": lambda one: one.entries,
    "subjects": lambda one: one.subjects,
    "created": lambda one: one.created_at,
    "updated": lambda one: one.updated_at,
}
# What images are kept as.
_MAGIC: Final = ((b"\xff\xd8\xff", "image/jpeg"), (b"\x89PNG", "image/png"))


# --- Datasets -------------------------------------------------------------------------------------


async def list_all(request: web.Request) -> web.Response:
    """Return the datasets: `q`, `embedder`; sorted (`sort`, `-` before it turns it), in pages.

    400 a word that is not known, or a value that it cannot have; 503 no rustyface.
    """
    query = _query(request, "q", "embedder", "sort", "page", "per_page")
    sort, text = query.get("sort", "name"), query.get("q", "").strip().casefold()
    by = _SORTS.get(sort.removeprefix("-"))
    if by is None:
        raise InvalidRequest(
            f"sort is {sort[:40]!r}; allowed are {', '.join(_SORTS)}, each with - before it for "
            "the other direction",
            field="sort",
        )
    page = page_in(query)
    listed = (await manage(request, "list", named=False)).datasets
    found = [
        one
        for one in sorted(listed, key=lambda one: one.id)
        if text in one.id.casefold() and query.get("embedder") in (None, one.embedder)
    ]
    found.sort(key=by, reverse=sort.startswith("-"))
    part = page.of(found)
    return answer(
        {
            "datasets": [msgspec.structs.asdict(one) for one in part.items],
            "total": part.total,
            "page": part.page,
            "per_page": part.per_page,
        }
    )


async def get(request: web.Request) -> web.Response:
    """Return a dataset in full. 304 the caller has it (`If-None-Match`); 404 there is none."""
    return _tagged(request, await _stats(request))


async def create(request: web.Request) -> web.Response:
    """Make a dataset, with its settings if they are given.

    201 with `Location`; 200 it was there, and has the settings now, where any were given. 400 a
    setting that there cannot be; 409 vectors of another embedder stand in its way, or `If-Match` as
    for `configure`.
    """
    given = await _settings_in(request)
    try:
        await _stats(request)
    except NotFound:
        settings = codec.convert(given, DatasetSettings) if given else None
        made = await manage(request, "create", settings=settings)
        response = answer(made.dataset or await _stats(request), 201)
        response.headers[hdrs.LOCATION] = f"/api/datasets/{_escaped(request, 'dataset')}"
        return response
    if not given:
        return _tagged(request, await _stats(request))
    settings = codec.convert(given, DatasetSettings)
    return await _configured(request, settings=settings)


async def configure(request: web.Request) -> web.Response:
    """Change what is named of a dataset's settings; the others stay.

    400 a setting that there is not, or that cannot have its value; 404 there is no such dataset;
    409 the settings were changed after the revision that `If-Match` names, with the present one.
    """
    return await _configured(request, changes=await _settings_in(request))


async def delete(request: web.Request) -> web.Response:
    """Delete a dataset with all that it has; `?dry-run` only says how much that is. 404."""
    dry_run = _flag(request, "dry-run")
    stats = await _stats(request)
    told = {
        "dataset": stats.id,
        "entries": stats.entries,
        "subjects": stats.subjects,
        "images": stats.images,
        "dry_run": dry_run,
    }
    if not dry_run:
        told |= _left(await manage(request, "delete-dataset"))
    return answer(told)


# --- Entries --------------------------------------------------------------------------------------


class _Move(msgspec.Struct, forbid_unknown_fields=True):
    subject: Annotated[str, Meta(min_length=1, max_length=256)] | None


async def entries(request: web.Request) -> web.Response:
    """Return entries by id: `subject`, `filter` (JSON: metadata field to value), in pages.

    `limit` and `after` say which part, `next` where it goes on; with `embeddings` they come with
    their vectors. 400 a value that there cannot be; 404 no such dataset.
    """
    query = _query(request, "subject", "filter", "limit", "after", "embeddings")
    told = await manage(
        request,
        "entries",
        subject=query.get("subject"),
        filter=_json_in(query, "filter"),
        limit=_json_in(query, "limit"),
        after=query.get("after"),
        embeddings=_flag(request, "embeddings") or None,
    )
    found = [_shown(one) for one in told.entries or []]
    return answer({"entries": found, "total": told.total, "next": told.next})


async def entry(request: web.Request) -> web.Response:
    """Return an entry, with its vector if `embeddings` is on. 404 there is none."""
    return answer(_shown(await _entry(request, embeddings=_flag(request, "embeddings"))))


async def move(request: web.Request) -> web.Response:
    """Say whom an entry shows: another person, or nobody (`{"subject": null}`).

    400 no `subject`; 404 no such dataset or entry.
    """
    given = await read(request, _Move)
    name = request.match_info["entry"]
    told = await manage(request, "move-entry", entry_id=name, into=given.subject)
    return _changed(told, entry=name, subject=given.subject)


async def remove_entry(request: web.Request) -> web.Response:
    """Delete an entry, from memory and from the broker; `?dry-run` only says if. 404 none."""
    name, dry_run = request.match_info["entry"], _flag(request, "dry-run")
    told = await manage(request, "remove-entry", entry_id=name, dry_run=dry_run)
    return _changed(told, entry=name, dry_run=dry_run)


async def image(request: web.Request) -> web.StreamResponse:
    """Send the image that an entry was enrolled with.

    304 the caller has it; 404 no such entry, or its image was not kept, and why; 416; 429.
    """
    at = request.app[PARTS]
    found = await _entry(request)
    if found.image is None:
        raise NotFound(
            f"the image of entry {found.id[:100]!r} was not kept: datasets keep none unless told "
            f"to, by PATCH /api/datasets/{_escaped(request, 'dataset')} "
            '{"keep_images": true} before images are enrolled',
            field="entry",
        )
    store = at.client.store.faces
    size = await stored(at.client, store.size(found.image), "images")
    if size is None:
        raise NotFound(f"the image of entry {found.id[:100]!r} is gone", field="entry")
    kind = _kind_of(b"".join([block async for block in store.read(found.image, 0, 16)]))
    return await contents.content(request, store, found.image, size, content_type=kind)


# --- Persons --------------------------------------------------------------------------------------


class _Rename(msgspec.Struct, forbid_unknown_fields=True):
    name: Annotated[str, Meta(min_length=1, max_length=256)]


class _Merge(msgspec.Struct, forbid_unknown_fields=True):
    from_: Annotated[list[str], Meta(min_length=1, max_length=1_000)] = msgspec.field(name="from")


class _Reject(msgspec.Struct, forbid_unknown_fields=True):
    subject: str
    entry: str | None = None
    embedding: list[float] | None = None


async def subjects(request: web.Request) -> web.Response:
    """Return the persons of a dataset by name, in pages: `limit`, `after`. 404 no such dataset."""
    told = await manage(request, "subjects", **_paged(_query(request, "limit", "after")))
    found = [msgspec.structs.asdict(one) for one in told.subjects or []]
    return answer({"subjects": found, "total": told.total, "next": told.next})


async def rename(request: web.Request) -> web.Response:
    """Give a person another name. 404 there is none; 409 another person has it: merge them."""
    name, into = request.match_info["subject"], (await read(request, _Rename)).name
    told = await manage(request, "rename-subject", subject=name, into=into)
    return _changed(told, subject=into)


async def remove_subject(request: web.Request) -> web.Response:
    """Delete a person with all their entries; `?dry-run` only says how many. 404 there is none."""
    name, dry_run = request.match_info["subject"], _flag(request, "dry-run")
    told = await manage(request, "remove-subject", subject=name, dry_run=dry_run)
    return _changed(told, subject=name, dry_run=dry_run)


async def merge(request: web.Request) -> web.Response:
    """Make others (`from`) one with a person. 404 one of them is not there."""
    others, into = (await read(request, _Merge)).from_, request.match_info["subject"]
    told = await manage(request, "merge-subjects", subjects=others, into=into)
    return _changed(told, subject=into)


async def reject(request: web.Request) -> web.Response:
    """Say of an entry, or of a face's `embedding`, that it is not a person.

    Such a face is not named so again. 201 with `Location`: there it is withdrawn. 400 neither or
    both are given; 404 no such entry or person.
    """
    given = await read(request, _Reject)
    told = await manage(
        request,
        "reject-match",
        subject=given.subject,
        entry_id=given.entry,
        embedding=given.embedding,
    )
    response = _changed(told, 201, rejection=told.rejection, subject=given.subject)
    place = f"/api/datasets/{_escaped(request, 'dataset')}/rejections"
    response.headers[hdrs.LOCATION] = f"{place}/{quote(told.rejection or '', safe='')}"
    return response


async def withdraw(request: web.Request) -> web.Response:
    """Take back that a face is not a person; `?dry-run` only says if. 404 nobody has said so."""
    name, dry_run = request.match_info["rejection"], _flag(request, "dry-run")
    told = await manage(request, "withdraw-rejection", rejection=name, dry_run=dry_run)
    return _changed(told, rejection=name, dry_run=dry_run)


# --- What was done --------------------------------------------------------------------------------


async def history(request: web.Request) -> web.Response:
    """Return what was done to a dataset, newest first: `limit`, `after`. 404 there is none."""
    told = await manage(request, "history", **_paged(_query(request, "limit", "after")))
    found = [msgspec.structs.asdict(one) for one in told.history or []]
    return answer({"history": found, "next": told.next})


async def imports(request: web.Request) -> web.Response:
    """Return a dataset's imports, newest first. 404 there is no such dataset."""
    told = await manage(request, "imports")
    return answer({"imports": told.imports or []})


async def undo(request: web.Request) -> web.Response:
    """Take back an import: what it added leaves; `?dry-run` only says how many entries.

    404 no such import. One that still goes on ends with that, and one that was taken back already
    stays so.
    """
    name, dry_run = request.match_info["imported"], _flag(request, "dry-run")
    told = await manage(request, "undo-import", imported=name, dry_run=dry_run)
    return _changed(told, imported=name, dry_run=dry_run)


async def sheet(request: web.Request) -> web.Response:
    """Draw a dataset's entries by person, to look at: `format`, `subject`, `limit`, `after`.

    `Link: <...>; rel="next"` says where it goes on. 400 a value that there cannot be; 404 no such
    dataset.
    """
    query = _query(request, "format", "subject", "limit", "after", "timeout")
    given = {
        "dataset": request.match_info["dataset"],
        "format": query.get("format"),
        "subject": query.get("subject"),
        "limit": _json_in(query, "limit"),
        "after": query.get("after"),
        "language": faces.language_of(request),
    }
    return await faces.drawn(request, asked(DrawSheet, given))


# --- How ------------------------------------------------------------------------------------------


async def manage(
    request: web.Request, action: Action, *, named: bool = True, **more: Any
) -> DatasetList:
    """Ask rustyface to do something with the dataset of the path, or with none.

    Raises:
        InvalidRequest: A field does not fit; names it.
        BusError: What rustyface says; when nobody listens, why that is.
    """
    at = request.app[PARTS]
    dataset = request.match_info["dataset"] if named else None
    ask = asked(ManageDataset, {"action": action, "dataset": dataset, "by": BY, **_plain(more)})
    try:
        return await at.client.call(DATASET_MANAGE, ask, timeout_s=timeout_of(request))
    except NobodyListens:
        subject = DATASET_MANAGE.subject(at.client.root)
        raise await why_nobody(at, DATASET_MANAGE.capability, subject) from None


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: codec.plain(value) if isinstance(value, msgspec.Struct) else value
        for name, value in fields.items()
    }


async def _stats(request: web.Request) -> DatasetStats:
    told = await manage(request, "stats")
    if told.dataset is None:
        raise NotFound(
            f"there is no dataset {request.match_info['dataset'][:100]!r}", field="dataset"
        )
    return told.dataset


async def _entry(request: web.Request, *, embeddings: bool = False) -> EntryInfo:
    name = request.match_info["entry"]
    told = await manage(request, "entries", entry_id=name, embeddings=embeddings)
    found = next((one for one in told.entries or [] if one.id == name), None)
    if found is None:
        dataset = request.match_info["dataset"]
        raise NotFound(f"dataset {dataset!r} has no entry {name[:100]!r}", field="entry")
    return found


async def _settings_in(request: web.Request) -> dict[str, Any]:
    """Return the settings that a body names; it may be missing."""
    given = await read(request, dict[str, Any])
    codec.check_settings(given, DatasetSettings, "a dataset")
    if isinstance(quality := given.get("quality"), dict):
        codec.check_settings(quality, QualityBounds, "a dataset", "quality.")
    return given


async def _configured(request: web.Request, **what: Any) -> web.Response:
    changed = await manage(request, "configure", revision=_revision(request), **what)
    return _tagged(request, changed.dataset or await _stats(request))


def _tagged(request: web.Request, stats: DatasetStats) -> web.Response:
    """Return a dataset with a tag that changes with its revision, and with what counts for it."""
    body = codec.encode(stats)
    etag = f'"{stats.revision}-{hashlib.sha256(body).hexdigest()[:8]}"'
    headers = {hdrs.ETAG: etag, hdrs.CACHE_CONTROL: "no-cache"}
    if is_known(request.headers.get(hdrs.IF_NONE_MATCH), etag):
        return web.Response(status=304, headers=headers)
    return web.Response(body=body, headers=headers, content_type=codec.JSON)


def _revision(request: web.Request) -> int | None:
    """Return the revision in the tag that the caller has seen (`If-Match`); None without one."""
    tag = request.headers.get(hdrs.IF_MATCH, "").strip().removeprefix("W/").strip('"')
    if not tag or tag == "*":
        return None
    revision = tag.partition("-")[0]
    if not (revision.isascii() and revision.isdecimal() and len(revision) < 19):
        raise InvalidRequest(
            f"If-Match is {tag[:40]!r}, which is no ETag of a dataset", field="If-Match"
        )
    return int(revision)


def _changed(told: DatasetList, status: int = 200, /, **more: Any) -> web.Response:
    """Return what a change led to: how many entries it concerned, and as of which revision."""
    said = {**more, "affected": told.affected, "revision": told.revision, **_left(told)}
    return answer(said, status)


def _left(told: DatasetList) -> dict[str, Any]:
    """Return what a change has not led to; nothing where it is done."""
    if not told.warnings:
        return {}
    return {"unerased": told.unerased or 0, "warnings": told.warnings}


def _shown(one: EntryInfo) -> dict[str, Any]:
    """Return an entry with all its fields; its vector only where it was asked for."""
    told = msgspec.structs.asdict(one)
    if one.embedding is None:
        del told["embedding"]
    return told


def _query(request: web.Request, *allowed: str) -> dict[str, str]:
    """Return the query's words.

    Raises:
        InvalidRequest: One is not allowed here, or comes twice.
    """
    said: dict[str, str] = {}
    for name, value in request.query.items():
        if name not in allowed and name != "timeout":
            raise InvalidRequest(
                f"{name[:40]!r} is not known here; allowed are {', '.join(allowed)}",
                field=name[:40],
            )
        if name in said:
            raise InvalidRequest(f"{name} is given twice; give it once", field=name)
        said[name] = value
    return said


def _paged(query: Mapping[str, str]) -> dict[str, Any]:
    return {"limit": _json_in(query, "limit"), "after": query.get("after")}


def _json_in(query: Mapping[str, str], name: str) -> Any:
    """Return what a word of the query says in JSON; None if it is missing."""
    if name not in query:
        return None
    try:
        return msgspec.json.decode(query[name])
    except (msgspec.DecodeError, RecursionError):
        raise InvalidRequest(
            f"{name} is {query[name][:40]!r}, which is no JSON", field=name
        ) from None


def _flag(request: web.Request, name: str) -> bool:
    return name in request.query and switch(request.query[name], name)


def _escaped(request: web.Request, name: str) -> str:
    return quote(request.match_info[name], safe="")


def _kind_of(first: bytes) -> str:
    """Return what kind of image begins so; a page of another site must not be shown as ours."""
    if first[:4] == b"RIFF" and first[8:12] == b"WEBP":
        return "image/webp"
    found = (kind for magic, kind in _MAGIC if first.startswith(magic))
    return next(found, "application/octet-stream")

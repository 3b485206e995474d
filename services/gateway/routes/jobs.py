"""Jobs: work that outlives its request, such as the import of a model or of a dataset."""

from datetime import UTC, datetime
from typing import Annotated, Any, Final, get_args
from urllib.parse import quote

import msgspec
from aiohttp import hdrs, web
from msgspec import Meta

from bus.client import Client
from bus.errors import InvalidRequest, NotFound
from bus.masking import without_query
from bus.messages import ImportModel, Job, JobState, NameJob
from bus.subjects import JOB_CANCELS, JOB_RETRIES, MODEL_IMPORT
from services.gateway.parts import PARTS
from services.gateway.repository import one_of, page_in
from services.gateway.stored import stored
from services.gateway.translate import answer, asked, read

IDEMPOTENCY_KEY: Final = "Idempotency-Key"
ASK_S: Final = 30.0

_OLDEST: Final = datetime.min.replace(tzinfo=UTC)


class Import(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of `import_model`; the fields are those of `ImportModel`."""

    url: str
    name: str
    version: str | None = None
    sha256: Annotated[str, Meta(max_length=64)] | None = None
    load: bool = False


async def import_model(request: web.Request) -> web.Response:
    """Have a model fetched from elsewhere; answers with the job that does it, at once.

    202 with `Location`; the same `Idempotency-Key` again gives the same job. 400 an address that
    is not taken; 422 that key was used for another import; 429 too many wait; 503 no candle.
    """
    at = request.app[PARTS]
    given = await read(request, Import)
    ask = asked(
        ImportModel,
        {
            "id": given.name,
            "url": given.url,
            "version": given.version,
            "sha256": given.sha256.lower() if given.sha256 else None,
            "load": given.load,
            "by": "admin",
            "key": idempotency_key(request),
        },
    )
    return _located(await at.client.call(MODEL_IMPORT, ask, timeout_s=ASK_S))


async def list_all(request: web.Request) -> web.Response:
    """Return the jobs of the last week, newest first: `state`, `kind`, `page`, `per_page`.

    400 a value that there cannot be; 503 the broker is away.
    """
    at = request.app[PARTS]
    for name in request.query:
        if name not in {"state", "kind", "page", "per_page"}:
            raise InvalidRequest(
                f"{name[:40]!r} is not known here; allowed are state, kind, page and per_page",
                field=name[:40],
            )
    state = one_of(request.query.get("state"), "state", get_args(JobState))
    kind = one_of(request.query.get("kind"), "kind", tuple(JOB_CANCELS))
    page = page_in(request.query)
    entries = await stored(at.client, at.client.store.jobs.all(), "jobs")
    jobs = [
        without_query(one.value)
        for one in entries
        if one.value and state in (None, one.value.state) and kind in (None, one.value.kind)
    ]
    # Two may begin in the same moment; their ids are unique.
    jobs.sort(key=lambda job: (job.created_at or _OLDEST, job.job), reverse=True)
    part = page.of(jobs)
    return answer(
        {"jobs": part.items, "total": part.total, "page": part.page, "per_page": part.per_page}
    )


async def get(request: web.Request) -> web.Response:
    """Return a job. 404 there is none, or it ended more than a week ago; 503 the broker is away."""
    return answer(without_query(await _found(request)))


async def cancel(request: web.Request) -> web.Response:
    """End a job; one that has ended stays as it is. 404 there is none; 503 nobody does its kind."""
    job = await _found(request)
    ended = await _client(request).call(JOB_CANCELS[job.kind], _named(request), timeout_s=ASK_S)
    return answer(without_query(ended))


async def retry(request: web.Request) -> web.Response:
    """Take up a job that failed or was cancelled. 404 there is none; 409 it goes on; 503."""
    job = await _found(request)
    return _located(
        await _client(request).call(JOB_RETRIES[job.kind], _named(request), timeout_s=ASK_S)
    )


def idempotency_key(request: web.Request) -> str | None:
    """Return the key by which the caller tells a retry from another request.

    Raises:
        InvalidRequest: It is empty, too long, or no plain text.
    """
    key: str | None = request.headers.get(IDEMPOTENCY_KEY)
    if key is not None and not (0 < len(key) <= 255 and key.isascii() and key.isprintable()):
        raise InvalidRequest(
            f"{IDEMPOTENCY_KEY} must be plain text of 1 to 255 characters", field=IDEMPOTENCY_KEY
        )
    return key


async def _found(request: web.Request) -> Job:
    at = request.app[PARTS]
    ask = _named(request)
    entry = await stored(at.client, at.client.store.jobs.get(ask.job), "jobs")
    if entry is None or entry.value is None:
        raise NotFound(
            f"there is no job {ask.job!r}: jobs are kept for a week; GET /api/jobs lists them"
        )
    return entry.value


def _client(request: web.Request) -> Client:
    return request.app[PARTS].client


def _named(request: web.Request) -> NameJob:
    job: Any = request.match_info["job"]
    try:
        return asked(NameJob, {"job": job})
    except InvalidRequest:
        raise NotFound(f"{job[:60]!r} is no id of a job; GET /api/jobs lists them") from None


def _located(job: Job) -> web.Response:
    response = answer(without_query(job), 202)
    response.headers[hdrs.LOCATION] = f"/api/jobs/{quote(job.job)}"
    return response

"""HTTP on one side, messages and `BusError`s on the other: the only file that knows both.

Every error leaves as `application/problem+json` (RFC 9457). Its `detail` is the sentence of the
`BusError`; what nobody expected says nothing but that the log has the cause.
"""

import math
import random
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final, TypeVar

import msgspec
import structlog
from aiohttp import hdrs, web
from aiohttp.compression_utils import HAS_BROTLI, HAS_ZSTD
from aiohttp.typedefs import Handler

from bus import codec
from bus.client import Answer, new_traceparent, trace
from bus.errors import NEVER, BusError, InvalidRequest, TooLarge
from bus.instance import Instance
from services.gateway.patience import TooSlow, for_body, is_held_back
from services.gateway.written import ID_GIVEN, REQUEST_ID, protect

PROBLEM: Final = "application/problem+json"
TRACEPARENT: Final = "traceparent"
TIMEOUT: Final = "X-Timeout-Seconds"
TIMEOUT_DEFAULT_S: Final = 30.0
TIMEOUT_MAX_S: Final = 300.0
PREFER: Final = "Prefer"
RESPOND_ASYNC: Final = "respond-async"
# Bodies that are no capability's payload: a configuration, a key.
BODY_MAX_BYTES: Final = 1024 * 1024
# What bodies may be compressed with: what aiohttp can undo here.
ENCODINGS: Final = ("gzip", "deflate", *(["br"] * HAS_BROTLI), *(["zstd"] * HAS_ZSTD))

# What became of a request that was asked before aiohttp got to see it (`services.gateway.express`):
# an `Answer` or a `BusError`; and the trace it was asked with.
OUTCOME: Final = web.RequestKey("outcome", object)
TRACED: Final = web.RequestKey("traced", str)

log = structlog.get_logger("services.gateway")

_PRINTABLE = re.compile(r"[\x21-\x7e][\x20-\x7e]{0,199}")
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# W3C Trace Context, version 00.
_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_TRACEBACK = "Traceback (most recent call last)"
# What aiohttp says of a body whose encoding needs a library that is not here.
_NOT_UNDONE = re.compile(r"Can not decode content-encoding: \w+ \((\w+)\)")
# What encoding raises for values that an encoding has no form for.
_NOT_CARRIED: Final = (OverflowError, TypeError, ValueError, RecursionError)

T = TypeVar("T")


class Problem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An error as RFC 9457 has it.

    Attributes:
        type: `urn:bkg:problem:` and the error's code, or `about:blank` where HTTP says it all.
        title: The status in words.
        status: The HTTP status.
        detail: One sentence for the person who has to act.
        field: The field of the request that is meant.
        reasons: What stands in the way, when it is several things.
        revision: The present revision of what was to be changed, when another change came first.
    """

    type: str
    title: str
    status: int
    detail: str | None = None
    field: str | None = None
    reasons: list[str] | None = None
    revision: int | None = None


# --- Requests to messages -------------------------------------------------------------------------


async def read(request: web.Request, kind: type[T]) -> T:
    """Return the request's body as a message.

    Raises:
        InvalidRequest: It does not fit the type; names the field.
        TooLarge: It has more than `BODY_MAX_BYTES`.
    """
    body = await read_body(request, BODY_MAX_BYTES)
    return codec.decode(body, kind, request.headers.get(hdrs.CONTENT_TYPE))


def asked(kind: type[T], given: Mapping[str, Any]) -> T:
    """Return what came in path, query and body together as a message; None is not given.

    Raises:
        InvalidRequest: It does not fit the type; names the field.
    """
    return codec.convert({key: value for key, value in given.items() if value is not None}, kind)


def encoded(message: msgspec.Struct, content_type: str = codec.JSON) -> bytes:
    """Return a caller's message as bytes for the bus.

    A field that may be anything may hold what the one encoding can carry and the other cannot, such
    as a number of more than 64 bits.

    Raises:
        InvalidRequest: There is such a field; names it.
    """
    try:
        return codec.encode(message, content_type)
    except _NOT_CARRIED:
        raise _not_carried(message, content_type) from None


def _not_carried(message: msgspec.Struct, content_type: str) -> InvalidRequest:
    for name in message.__struct_fields__:
        try:
            codec.encode(getattr(message, name), content_type)
        except _NOT_CARRIED as error:
            why = f"{name}: it cannot be sent on: {error}; numbers have 64 bits at most"
            return InvalidRequest(why, field=name)
    return InvalidRequest(f"the request cannot be sent on as {content_type}")


async def read_body(request: web.Request, max_bytes: int) -> bytes:
    """Return the request's body, without ever holding more than `max_bytes` of it.

    Raises:
        TooLarge: There is more; said before the rest is read.
        InvalidRequest: It is cut off, or not encoded as it says.
        TooSlow: It did not come in time.
    """
    content = request.content
    if content.is_eof() and content.exception() is None:
        # All of it came with the headers, as small bodies do. The limit still holds: it may have
        # been compressed.
        whole: bytes = content.read_nowait()
        if len(whole) > max_bytes:
            raise TooLarge(f"the body has more than the {max_bytes:,} bytes allowed")
        return whole
    if (announced := request.content_length or 0) > max_bytes:
        raise TooLarge(f"the body has {announced:,} bytes, allowed are {max_bytes:,}")
    body, patience = bytearray(), await for_body(request)
    try:
        while block := await patience.wait(content.readany()):
            body += block
            if len(body) > max_bytes:
                raise TooLarge(f"the body has more than the {max_bytes:,} bytes allowed")
    except (web.RequestPayloadError, web.PayloadAccessError) as error:
        raise cut_off(request, error) from None
    return bytes(body)


def cut_off(request: web.Request, error: Exception) -> InvalidRequest:
    """Return what is said of a body that aiohttp could not read to its end."""
    encoding = request.headers.get(hdrs.CONTENT_ENCODING)
    how = f", or is not {encoding[:40]!r} as Content-Encoding says" if encoding else ""
    return InvalidRequest(f"the body is cut off{how}: {type(error).__name__}")


def timeout_of(request: web.Request) -> float:
    """Return how long the caller wants to wait: `?timeout=`, `X-Timeout-Seconds`, or 30 s."""
    text = request.query.get("timeout") or request.headers.get(TIMEOUT)
    if not text:
        return TIMEOUT_DEFAULT_S
    try:
        timeout_s = float(text)
    except ValueError:
        timeout_s = math.nan
    if not 0 < timeout_s <= TIMEOUT_MAX_S:
        raise InvalidRequest(
            f"timeout is {text[:40]!r}; allowed are seconds above 0 up to {TIMEOUT_MAX_S:g}",
            field="timeout",
        )
    return timeout_s


def wants_no_wait(request: web.Request) -> bool:
    """Tell whether the caller prefers an answer at once: `Prefer: respond-async` (RFC 7240)."""
    said = ",".join(request.headers.getall(PREFER, []))
    return RESPOND_ASYNC in {one.partition(";")[0].strip().lower() for one in said.split(",")}


def headers_for_bus(request: web.Request) -> dict[str, str]:
    """Return what of the request's headers travels on with its body."""
    return {
        codec.CONTENT_TYPE: _content_type(request),
        REQUEST_ID: request[ID_GIVEN],
        TRACEPARENT: trace.get() or new_traceparent(),
    }


# --- Messages to answers --------------------------------------------------------------------------


def answer(message: object, status: int = 200) -> web.Response:
    """Return a message, or plain lists and dicts, as JSON."""
    return web.Response(body=codec.encode(message), status=status, content_type=codec.JSON)


def accepted(message: object) -> web.Response:
    """Return a message to a caller that did not want to wait."""
    response = answer(message, 202)
    response.headers["Preference-Applied"] = RESPOND_ASYNC
    return response


def answer_as_it_is(relayed: Answer) -> web.Response:
    """Return an answer whose body was not decoded."""
    kind = relayed.headers.get(codec.CONTENT_TYPE) or codec.JSON
    headers: dict[str, str] = {
        hdrs.CONTENT_TYPE: kind if _PRINTABLE.fullmatch(kind) else codec.JSON
    }
    if instance := relayed.headers.get("Bkg-Instance"):
        headers["Bkg-Instance"] = instance
    return web.Response(body=relayed.body, headers=headers)


def problem(
    status: int,
    detail: str | None = None,
    *,
    code: str | None = None,
    field: str | None = None,
    reasons: list[str] | None = None,
    revision: int | None = None,
    details: Mapping[str, Any] | None = None,
    headers: dict[str, str] | None = None,
) -> web.Response:
    """Return an error's answer; `details` are members beside ours, and never in place of them."""
    body = Problem(
        type=f"urn:bkg:problem:{code}" if code else "about:blank",
        title=HTTPStatus(status).phrase,
        status=status,
        detail=_encodable(detail),
        field=_encodable(field),
        reasons=reasons and [_encodable(reason) or "" for reason in reasons],
        revision=revision,
    )
    said: dict[str, Any] = codec.plain(body)
    ours = Problem.__struct_fields__
    said |= {name: value for name, value in (details or {}).items() if name not in ours}
    return web.Response(
        body=codec.encode(said), status=status, headers=headers, content_type=PROBLEM
    )


def problem_of(error: BusError, *, kserve: bool = False) -> web.Response:
    """Return what a `BusError` is in HTTP; clients of the inference protocol look for `error`."""
    headers: dict[str, str] = {}
    if error.number in {429, 503, 507} and error.retry_after_s != NEVER:
        headers[hdrs.RETRY_AFTER] = str(max(1, math.ceil(error.retry_after_s or 1)))
    sentence = _sentence(error.message)
    return problem(
        error.number,
        sentence,
        code=error.code,
        field=error.field,
        reasons=error.reasons,
        revision=error.revision,
        details={**(error.details or {}), **({"error": sentence} if kserve else {})},
        headers=headers,
    )


def translated(instance: Instance, handler: Handler) -> Handler:
    """Return a handler that has its ids, and whose errors leave as answers; both are counted.

    Not a middleware: aiohttp's chain of them costs a request several coroutines more.
    """
    counts = instance.gauges
    counts.setdefault("http_requests", 0)
    counts.setdefault("http_errors", 0)

    async def handle(request: web.Request) -> web.StreamResponse:
        # Counted already when it was asked.
        if OUTCOME not in request:
            counts["http_requests"] += 1
        request[ID_GIVEN] = _request_id(request)
        trace.set(request.get(TRACED) or _traceparent(request))
        response: web.StreamResponse
        try:
            response = await handler(request)
        except BusError as error:
            response = refused = problem_of(error, kserve=_is_kserve(request))
            if isinstance(error, TooSlow):
                # RFC 9110, 15.5.9: nobody waits for the rest.
                refused.force_close()
        except web.HTTPException as error:
            if error.status < 400:
                raise
            response = _problem_of_http(request, error)
        except Exception:
            log.exception("http.failed", method=request.method, path=request.path)
            sentence = "it failed unexpectedly; the gateway's log has the cause"
            details = {"error": sentence} if _is_kserve(request) else None
            response = problem(500, sentence, code="internal", details=details)
        if is_held_back(request):
            # RFC 9110, 10.1.1: it may send the body or not, and what comes next would be taken for
            # it.
            response.force_close()
        if response.status >= 500:
            counts["http_errors"] += 1
        return response

    return handle


def is_request_id(text: str) -> bool:
    """Tell whether a caller's id can be passed on."""
    return _ID.fullmatch(text) is not None


def is_traceparent(text: str) -> bool:
    """Tell whether a caller's trace can be gone on with."""
    return _TRACEPARENT.fullmatch(text) is not None


def unreadable(status: int, message: str | None) -> web.Response:
    """Return the answer to what aiohttp could not read as a request; it ends the connection.

    Nobody knows what its path was, so it has what clients of the inference protocol look for.
    """
    if found := _NOT_UNDONE.search(message or ""):
        detail, field = encoding_refused(found[1]), hdrs.CONTENT_ENCODING
    else:
        # What follows the first line quotes the request.
        said = (message or "").strip().splitlines()
        why = said[0].rstrip(":")[:200] if said else "it is no HTTP"
        detail, field = f"the request cannot be read: {why}", None
    response = problem(status, detail, field=field, details={"error": _encodable(detail)})
    protect(response)
    response.force_close()
    return response


def encoding_refused(encoding: str) -> str:
    """Return what is said to a body that is compressed in a way that is not taken."""
    taken = f"{', '.join(ENCODINGS[:-1])} and {ENCODINGS[-1]}"
    return f"Content-Encoding is {encoding[:40]!r}; {taken} are taken, one of them"


def _problem_of_http(request: web.Request, error: web.HTTPException) -> web.Response:
    """Return what aiohttp raised (404, 405, 413, ...) or one of us as a bare status."""
    kept = (hdrs.ALLOW, hdrs.WWW_AUTHENTICATE, hdrs.RETRY_AFTER)
    headers: dict[str, str] = {name: error.headers[name] for name in kept if name in error.headers}
    path = request.path[:200]
    match error.status:
        case 404:
            detail = f"there is nothing at {path}"
        case 405:
            allowed = error.headers.get(hdrs.ALLOW, "")
            detail = f"{path} does not take {request.method}; allowed: {allowed}"
        case _:
            detail = _sentence(error.text or error.reason)
    details = {"error": detail} if _is_kserve(request) else None
    return problem(error.status, detail, details=details, headers=headers)


def _is_kserve(request: web.Request) -> bool:
    """Tell whether a path belongs to the Open Inference Protocol."""
    return request.path == "/v2" or request.path.startswith("/v2/")


def _sentence(message: str) -> str:
    """Return what a far side said, without a stack trace, should it have sent one."""
    said = message.partition(_TRACEBACK)[0].strip()
    return said[:2_000] or "it failed, and gave no reason"


def _encodable(text: str | None) -> str | None:
    """Return a text that can be written as JSON: what a request's head has in it need not be.

    aiohttp keeps bytes that are no UTF-8 as surrogates, and names of headers in a class of its own.
    """
    return text and text.encode(errors="replace").decode()


def _content_type(request: web.Request) -> str:
    kind: str = request.headers.get(hdrs.CONTENT_TYPE, codec.JSON)
    if not _PRINTABLE.fullmatch(kind):
        raise InvalidRequest("Content-Type is not plain text of at most 200 characters")
    return kind


def _request_id(request: web.Request) -> str:
    asked: Any = request.headers.get(REQUEST_ID, "")
    # No secret, only one of many: the system's own randomness costs ten times as much.
    return asked if is_request_id(asked) else f"{random.getrandbits(64):016x}"


def _traceparent(request: web.Request) -> str:
    asked = request.headers.get(TRACEPARENT, "")
    return asked if is_traceparent(asked) else new_traceparent()

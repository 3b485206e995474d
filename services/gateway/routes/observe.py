"""What an operator leans on: logs, telemetry of before, events, and the log level."""

import asyncio
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Annotated, Any, Final, Literal, TypeVar, get_args

from aiohttp import web
from msgspec import Meta

from bus.errors import InvalidRequest, NotFound
from bus.log_search import LEVELS, LogPage, LogQuery, at_least, matcher, moment_in
from bus.logs import UNLISTED, tell_log_level
from bus.messages import Level, Message, SetLogLevel, State, now
from bus.subjects import BROKER_TELEMETRY, HOST_TELEMETRY, TELEMETRY, Feed
from services.gateway.parts import PARTS
from services.gateway.stored import stored
from services.gateway.telemetry import Measured, downsampled, of_broker, of_host, of_plugin
from services.gateway.translate import answer, read

DEFAULT: Final = 200
MOST: Final = 500
# With a cursor somebody reads page by page.
MOST_BY_CURSOR: Final = 5_000
POINTS_DEFAULT: Final = 120
POINTS_MAX: Final = 2_000
HISTORY_DEFAULT: Final = "1h"
NEXT_AFTER: Final = "Bkg-Next-After"
NEXT_BEFORE: Final = "Bkg-Next-Before"
COMPLETE: Final = "Bkg-Complete"

Kind = Literal["plugin", "host"]
T = TypeVar("T", bound=Message)


class AskLogLevel(State, frozen=True, forbid_unknown_fields=True):
    """From which level a plugin publishes its records, and for how long."""

    level: Level
    seconds: Annotated[float, Meta(gt=0, le=86_400)] = 600.0


async def logs(request: web.Request) -> web.Response:
    """Return log records, oldest first: of one plugin, or of all.

    `limit` (200, at most 500), `since` and `until` (a time, or how long ago), `level` (this one
    and worse), `slot`, `q` (text in any case), `regex` (RE2). The newest are given; with `after`
    (a sequence) the first ones behind it, with `before` the last ones before it, up to 5,000. The
    headers `Bkg-Next-After` and, when there is more, `Bkg-Next-Before` are the cursors of the next
    pages; `Bkg-Complete: false` says that there is more that way round.

    400 a filter that there cannot be; 404 no such plugin; 503 the broker is away.
    """
    at = request.app[PARTS]
    name = request.match_info.get("name")
    page = await stored(at.client, at.client.store.search_logs(_log_query(request, name)), "logs")
    if name is not None and not page.records and name not in UNLISTED:
        at.state_of(request)
    response = answer(page.records)
    _tell_cursors(response, page)
    return response


async def set_log_level(request: web.Request) -> web.Response:
    """Let a plugin's instances log from another level upward, for a while: `level`, `seconds`.

    Answers who was told. `gateway` and `supervisor` can be told too. 400 no such level, or more
    than a day; 404 no such plugin, or it has no instance; 503 the broker is away.
    """
    at = request.app[PARTS]
    ask = await read(request, AskLogLevel)
    wish = SetLogLevel(level=ask.level, seconds=ask.seconds, by="admin")
    name = request.match_info["name"]
    return answer(await stored(at.client, tell_log_level(at.client, name, wish), "instances"))


async def telemetry_history(request: web.Request) -> web.Response:
    """Return what a plugin, or one of its slots, used: `since` (1h), `points` (120), `slot`.

    400 a filter that there cannot be; 404 no such plugin; 503 the broker is away.
    """
    name = request.match_info["name"]
    slot = _whole(request, "slot")
    tokens: dict[str, str | int] = {"plugin": name}
    if slot is not None:
        tokens["slot"] = slot
    found, told = await _history(request, TELEMETRY, of_plugin, tokens)
    if not found and name not in UNLISTED:
        request.app[PARTS].state_of(request)
    return answer({"plugin": name, "slot": slot, **told})


async def host_history(request: web.Request) -> web.Response:
    """Return what a host used: `since` (1h), `points` (120).

    400 a filter that there cannot be; 404 no host of this name has told anything; 503 the broker
    is away.
    """
    at = request.app[PARTS]
    host = request.match_info["host"]
    _, told = await _history(request, HOST_TELEMETRY, of_host, {"host": host})
    newest = await stored(at.client, at.client.store.newest(HOST_TELEMETRY, host=host), "telemetry")
    if newest is None:
        raise NotFound(f"no host {host[:100]!r} has sent telemetry yet")
    return answer({"host": host, "latest": newest, **told})


async def broker_history(request: web.Request) -> web.Response:
    """Return what the broker kept and how fast it was: `since` (1h), `points` (120).

    400 a filter that there cannot be; 404 nobody has measured it yet; 503 it is away.
    """
    at = request.app[PARTS]
    _, told = await _history(request, BROKER_TELEMETRY, of_broker, {})
    newest = await stored(at.client, at.client.store.newest(BROKER_TELEMETRY), "telemetry")
    if newest is None:
        raise NotFound("nobody has measured the broker yet")
    return answer({"latest": newest, **told})


async def events(request: web.Request) -> web.Response:
    """Return what happened to plugins and hosts, oldest first.

    `kind` (`plugin` or `host`), `name`, `verb`, `since`, `limit` (200, at most 500). The newest
    are given; with `after` (a sequence) the first ones behind it, up to 5,000. The header
    `Bkg-Next-After` is the cursor of the next page. 400 a filter that there cannot be; 503 the
    broker is away.
    """
    at = request.app[PARTS]
    after = _whole(request, "after")
    kind = request.query.get("kind")
    if kind is not None and kind not in get_args(Kind):
        raise InvalidRequest(f"kind is {kind[:40]!r}; allowed are plugin and host", field="kind")
    asked = at.client.store.events(
        limit=_limit(request, by_cursor=after is not None),
        kind=kind,
        name=request.query.get("name"),
        verb=request.query.get("verb"),
        after=after,
        since=_moment(request, "since"),
        oldest=after is not None,
    )
    found = await stored(at.client, asked, "events")
    response = answer(found)
    response.headers[NEXT_AFTER] = str(found[-1].seq if found else after or 0)
    return response


async def _history(
    request: web.Request,
    feed: Feed[T],
    measured: Callable[[Sequence[T]], list[Measured]],
    tokens: dict[str, str | int],
) -> tuple[list[T], dict[str, Any]]:
    at = request.app[PARTS]
    until = now()
    since = moment_in(request.query.get("since") or HISTORY_DEFAULT, "since", until)
    if since >= until:
        raise InvalidRequest("since is not in the past", field="since")
    points = _whole(request, "points", least=1, most=POINTS_MAX) or POINTS_DEFAULT
    found = await stored(at.client, at.client.store.history(feed, since, **tokens), "telemetry")
    # Thousands of snapshots: the event loop has better things to do meanwhile.
    buckets = await asyncio.to_thread(lambda: downsampled(measured(found), since, until, points))
    return found, {
        "since": since,
        "until": until,
        "bucketSeconds": round((until - since).total_seconds() / points, 3),
        "points": buckets,
    }


def _log_query(request: web.Request, plugin: str | None) -> LogQuery:
    after, before = _whole(request, "after"), _whole(request, "before")
    since, until = _moment(request, "since"), _moment(request, "until")
    if since is not None and until is not None and since >= until:
        raise InvalidRequest(f"since ({since}) is not before until ({until})", field="since")
    return LogQuery(
        limit=_limit(request, by_cursor=after is not None or before is not None),
        plugin=plugin,
        slot=_whole(request, "slot"),
        levels=at_least(_level(request)),
        after=after,
        before=before,
        since=since,
        until=until,
        matches=matcher(request.query.get("q"), request.query.get("regex")),
        oldest=after is not None,
    )


def _tell_cursors(response: web.Response, page: LogPage) -> None:
    response.headers[NEXT_AFTER] = str(page.next_after)
    if page.next_before is not None:
        response.headers[NEXT_BEFORE] = str(page.next_before)
    response.headers[COMPLETE] = "true" if page.complete else "false"


def _limit(request: web.Request, *, by_cursor: bool) -> int:
    """Return how many are wanted; clients rely on nonsense being 200."""
    text = request.query.get("limit", "")
    wanted = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0
    return min(wanted, MOST_BY_CURSOR if by_cursor else MOST) or DEFAULT


def _whole(request: web.Request, name: str, *, least: int = 0, most: int = 10**18) -> int | None:
    text = request.query.get(name)
    if text is None or (name == "slot" and not text):
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 19 and least <= int(text) <= most):
        allowed = f"from {least} to {most}" if most < 10**18 else f"from {least}"
        raise InvalidRequest(
            f"{name} is {text[:40]!r}; allowed are whole numbers {allowed}", field=name
        )
    return int(text)


def _moment(request: web.Request, name: str) -> datetime | None:
    text = request.query.get(name)
    return moment_in(text, name, now()) if text else None


def _level(request: web.Request) -> Level:
    text = request.query.get("level", LEVELS[0])
    for level in LEVELS:
        if level == text:
            return level
    raise InvalidRequest(f"level is {text[:40]!r}; allowed are {', '.join(LEVELS)}", field="level")

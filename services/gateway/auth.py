"""Who may do what: the admin key, sessions of browsers, and where requests may come from.

A key travels as `Authorization: Bearer KEY`, as a session cookie that was given for it, or, for
WebSocket clients without headers, as the sub-protocol `bkg.key.KEY` beside `bkg.v1`.
"""

import hashlib
import hmac
import ipaddress
import os
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Final, Literal
from urllib.parse import urlsplit

import structlog
from aiohttp import hdrs, web

from bus.errors import InvalidRequest, NotAllowed, Overloaded

KEY_FILE: Final = "admin.key"
KEY_PROTOCOL: Final = "bkg.key."
SESSION_S: Final = 24 * 3600.0
SESSIONS_MAX: Final = 1_000
# Wrong keys from one address within the window before they are answered with 429.
WRONG_MAX: Final = 10
WRONG_WINDOW_S: Final = 60.0
WRONG_ADDRESSES_MAX: Final = 1_000

log = structlog.get_logger("services.gateway.auth")


class Access(Enum):
    """What a route asks of its callers: nothing, reading, or everything.

    Private is reading, too, but of what is about people: making reading public does not open it.
    """

    OPEN = "open"
    READ = "read"
    PRIVATE = "private"
    ADMIN = "admin"


@dataclass(frozen=True)
class Caller:
    """Who asks.

    Attributes:
        role: What they may do: `viewer` reads, `admin` everything.
        auth: How that is known: a key with the request, a session, reading made `public`, or
            `off` when nobody has to sign in.
    """

    role: Literal["viewer", "admin"]
    auth: Literal["key", "session", "public", "off"]


class Gate:
    """Admits requests, or says why not.

    Args:
        key: The admin key.
        public_read: Whether reading needs no key.
        no_auth: Whether nothing needs one; only sensible on loopback.
    """

    def __init__(self, key: str, *, public_read: bool = False, no_auth: bool = False) -> None:
        self._digest = _digest(key)
        self._public_read = public_read
        self._no_auth = no_auth
        self._sessions: OrderedDict[str, float] = OrderedDict()
        self._wrong: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def admit(self, request: web.Request, access: Access) -> None:
        """Return if the request may go on.

        Raises:
            HTTPUnauthorized: It needs a key, or has a wrong one.
            Overloaded: Its address sent too many wrong keys; the right one is always taken.
            NotAllowed: It comes from another site's page.
        """
        if access is Access.OPEN:
            return
        caller = self.caller(request)
        if (
            caller is None
            or (access is Access.ADMIN and caller.role != "admin")
            or (access is Access.PRIVATE and caller.auth == "public")
        ):
            raise _unauthorized(
                "this needs the admin key: send `Authorization: Bearer KEY`; it stands in "
                f"{KEY_FILE} in the data directory"
            )
        # A browser adds the cookie by itself, and without sign-in it needs none: then the page
        # that asks must be ours. A socket's messages are readable across sites, so always there.
        ambient = caller.auth != "key" and request.method not in {"GET", "HEAD"}
        if ambient or hdrs.UPGRADE in request.headers:
            self._check_origin(request)

    def passes(self, host: str, authorization: str | None) -> bool:
        """Tell whether a request with these headers surely may do everything.

        That is for one without cookie and Origin. If not, `admit` says what is so.
        """
        if authorization is None:
            return self._no_auth and _leads_to_loopback(host)
        scheme, _, key = authorization.partition(" ")
        return scheme.lower() == "bearer" and self._is_right(key.strip())

    def caller(self, request: web.Request) -> Caller | None:
        """Return who asks; None when nothing says it. Raises as `admit` does."""
        if (shown := _key_shown(request)) is not None:
            self.check(request, shown)
            return Caller("admin", "key")
        if self._has_session(request):
            return Caller("admin", "session")
        if self._no_auth:
            # Another site's name that resolves to this host (DNS rebinding) is no loopback name.
            if not _leads_to_loopback(request.host):
                raise NotAllowed(
                    "signing in is switched off, so only requests to a loopback name such as "
                    f"localhost are taken, not to {request.host[:100]!r}"
                )
            return Caller("admin", "off")
        if self._public_read:
            return Caller("viewer", "public")
        return None

    def check(self, request: web.Request, key: str) -> None:
        """Return if a key is right.

        Raises:
            HTTPUnauthorized: It is not.
            Overloaded: The same, once too often.
        """
        if self._is_right(key):
            return
        address, now = request.remote or "", time.monotonic()
        count, since = self._wrong.pop(address, (0, now))
        if now - since > WRONG_WINDOW_S:
            count, since = 0, now
        self._wrong[address] = (count + 1, since)
        if len(self._wrong) > WRONG_ADDRESSES_MAX:
            self._wrong.popitem(last=False)
        if count == 0:
            log.warning("key.wrong", address=address)
        if count >= WRONG_MAX:
            raise Overloaded(
                f"more than {WRONG_MAX} wrong keys came from {address} within a minute",
                retry_after_s=max(1.0, WRONG_WINDOW_S - (now - since)),
            )
        raise _unauthorized(
            f"the key is wrong; the right one stands in {KEY_FILE} in the data directory"
        )

    def sign_in(self, request: web.Request, response: web.StreamResponse) -> None:
        """Give the browser a session."""
        session = secrets.token_urlsafe(32)
        self._sessions[session] = time.monotonic()
        if len(self._sessions) > SESSIONS_MAX:
            self._sessions.popitem(last=False)
        response.set_cookie(
            _cookie(request),
            session,
            httponly=True,
            samesite="Strict",
            path="/",
            secure=request.secure,
        )

    def sign_out(self, request: web.Request, response: web.StreamResponse) -> None:
        """End the browser's session, if it has one."""
        self._sessions.pop(request.cookies.get(_cookie(request), ""), None)
        response.del_cookie(_cookie(request), path="/", httponly=True, samesite="Strict")

    def _is_right(self, key: str) -> bool:
        return hmac.compare_digest(_digest(key), self._digest)

    def _has_session(self, request: web.Request) -> bool:
        if hdrs.COOKIE not in request.headers:
            return False
        session = request.cookies.get(_cookie(request), "")
        used = self._sessions.pop(session, None)
        now = time.monotonic()
        if used is None or now - used > SESSION_S:
            return False
        self._sessions[session] = now
        return True

    def _check_origin(self, request: web.Request) -> None:
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is not None and urlsplit(origin).netloc.lower() != request.host.lower():
            raise NotAllowed(f"a page of {origin[:200]!r} may not do this here")


def admin_key(data_dir: Path) -> str:
    """Return the admin key, made at the first start and kept.

    Raises:
        InvalidRequest: The file is there, but holds no key, or cannot be read or made.
    """
    path = data_dir / KEY_FILE
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            _write_once(path, secrets.token_urlsafe(32))
        if path.stat().st_mode & 0o077:
            log.warning("key.readable_by_others", path=str(path))
        key = path.read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the key file {path} cannot be used: {error}") from None
    if not key.strip() or "\n" in key:
        raise InvalidRequest(
            f"the key file {path} must hold one line, the key; delete it for a new one"
        )
    return key


def is_loopback(host: str) -> bool:
    """Tell whether a name or address means this machine only."""
    name = host.strip("[]").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


@lru_cache(256)
def _leads_to_loopback(host: str) -> bool:
    """Tell whether a Host header names this machine only."""
    try:
        return is_loopback(urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return False


def _write_once(path: Path, key: str) -> None:
    """Write the key whole or not at all; another process that comes first wins."""
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"{key}\n")
        path.hardlink_to(part)
    except FileExistsError:
        return
    finally:
        part.unlink(missing_ok=True)


def _key_shown(request: web.Request) -> str | None:
    """Return the key that a request carries openly."""
    if authorization := request.headers.get(hdrs.AUTHORIZATION):
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer":
            raise _unauthorized(f"Authorization must be `Bearer KEY`, not {scheme[:20]!r}")
        return key.strip()
    if hdrs.UPGRADE in request.headers:
        for offered in request.headers.get(hdrs.SEC_WEBSOCKET_PROTOCOL, "").split(","):
            if offered.strip().startswith(KEY_PROTOCOL):
                return offered.strip().removeprefix(KEY_PROTOCOL)
    return None


def _cookie(request: web.Request) -> str:
    """Return the cookie's name; browsers share cookies between ports, so the port is in it."""
    return f"bkg_session_{request.url.port or 0}"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def _unauthorized(sentence: str) -> web.HTTPUnauthorized:
    return web.HTTPUnauthorized(
        text=sentence, headers={hdrs.WWW_AUTHENTICATE: 'Bearer realm="bkg"'}
    )

"""Sessions of browsers: a key for a cookie, who one is, and the way out."""

from typing import Annotated

import msgspec
from aiohttp import web
from msgspec import Meta

from bus.instance import bkg_version
from services.gateway.parts import PARTS
from services.gateway.translate import answer, read


class SignIn(msgspec.Struct, frozen=True):
    """A key, to be given for a session."""

    key: Annotated[str, Meta(min_length=1, max_length=1024)]


async def show(request: web.Request) -> web.Response:
    """Return the caller's role, how it is known, and our version. 401 nobody."""
    caller = request.app[PARTS].gate.caller(request)
    # The route is admitted for readers, so there is one.
    assert caller is not None  # noqa: S101
    return answer({"role": caller.role, "version": bkg_version(), "auth": caller.auth})


async def sign_in(request: web.Request) -> web.Response:
    """Give a session cookie for a key. 204; 400 no key; 401 a wrong one; 429 too many."""
    gate = request.app[PARTS].gate
    gate.check(request, (await read(request, SignIn)).key)
    response = web.Response(status=204)
    gate.sign_in(request, response)
    return response


async def sign_out(request: web.Request) -> web.Response:
    """End the session, if there is one. 204."""
    response = web.Response(status=204)
    request.app[PARTS].gate.sign_out(request, response)
    return response

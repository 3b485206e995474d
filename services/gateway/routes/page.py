"""The page and its files."""

from aiohttp import web

from services.gateway.parts import PARTS


async def index(request: web.Request) -> web.StreamResponse:
    """Return the page; with `?key=KEY` give a session for it first, and lead the key away.

    303 the key is right; 401 it is wrong, with the page, which asks for another; 429 too many.
    """
    at = request.app[PARTS]
    key = request.query.get("key")
    if key is None:
        return at.pages.index(request)
    try:
        at.gate.check(request, key)
    except web.HTTPUnauthorized:
        return at.pages.index(request, status=401)
    response = web.Response(status=303, headers={"Location": request.path})
    at.gate.sign_in(request, response)
    return response


async def file(request: web.Request) -> web.Response:
    """Return one of the page's files. 404 none, or of another version of the page."""
    pages = request.app[PARTS].pages
    return pages.file(request, request.match_info["hash"], request.match_info["path"])

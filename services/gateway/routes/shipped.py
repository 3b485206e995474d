"""The weights that come with the plugins, and their licences."""

from aiohttp import web

from bus.models import shipped_by
from services.gateway.parts import PARTS
from services.gateway.translate import answer


async def list_all(request: web.Request) -> web.Response:
    """Return what comes with each plugin that runs, licence and source included."""
    return answer(shipped_by(request.app[PARTS].view.registrations()))

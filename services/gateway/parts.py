"""What the handlers are given: the parts of the gateway, under one key of the application."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from aiohttp import WSCloseCode, web

from bus.client import Client
from bus.errors import NotFound
from bus.instance import Instance
from bus.messages import PluginState
from bus.models import ModelsView
from bus.plugins import PluginsView
from services.gateway.auth import Gate
from services.gateway.feeds import Feeds
from services.gateway.listener import BUDGET_BYTES
from services.gateway.pages import Pages
from services.gateway.uploads import Uploads


class Connections:
    """The connections that stay open, so that a clean stop can end them."""

    def __init__(self) -> None:
        self._open: dict[web.StreamResponse, asyncio.Event] = {}

    def __len__(self) -> int:
        return len(self._open)

    @contextmanager
    def holding(self, response: web.StreamResponse) -> Iterator[None]:
        """Know a connection while inside."""
        self._open[response] = asyncio.Event()
        try:
            yield
        finally:
            del self._open[response]

    async def stopping(self, response: web.StreamResponse) -> None:
        """Wait until a connection should end."""
        await self._open[response].wait()

    async def close(self) -> None:
        """End all; WebSockets are told that the server goes away."""
        for stop in self._open.values():
            stop.set()
        sockets = [one for one in self._open if isinstance(one, web.WebSocketResponse)]
        leaving = (
            one.close(code=WSCloseCode.GOING_AWAY, message=b"the gateway stops") for one in sockets
        )
        await asyncio.gather(*leaving)


@dataclass
class Parts:
    """The parts of one gateway.

    Attributes:
        client: The connection to the broker.
        instance: This process on the bus.
        view: Every plugin, in memory, so that reading needs nobody.
        models: Every model, in memory, too.
        feeds: What happens on the bus, for all listeners.
        gate: Who may do what.
        pages: The dashboard.
        uploads: Models on their way in.
        listener_budget_bytes: How much may wait for a live connection that reads slowly.
        port: The port that it listens on, once it does.
        relaying: Capability calls that are being waited for.
        relaying_bytes: What the bodies of inference among them hold.
        downloads: Artefacts that are being read.
        connections: WebSockets and event streams.
    """

    client: Client
    instance: Instance
    view: PluginsView
    models: ModelsView
    feeds: Feeds
    gate: Gate
    pages: Pages
    uploads: Uploads
    listener_budget_bytes: int = BUDGET_BYTES
    port: int | None = None
    relaying: int = 0
    relaying_bytes: int = 0
    downloads: int = 0
    connections: Connections = field(default_factory=Connections)

    def state_of(self, request: web.Request) -> PluginState:
        """Return the state of the plugin that a path names.

        Raises:
            NotFound: Nobody knows it.
        """
        name = request.match_info["name"]
        state = self.view.get(name)
        if state is None:
            known = ", ".join(one.name for one in self.view.list()) or "none"
            raise NotFound(f"there is no plugin {name[:100]!r}; known are: {known}")
        return state


PARTS: Final = web.AppKey("parts", Parts)

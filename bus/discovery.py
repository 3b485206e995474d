"""How others find an instance: the NATS service protocol (ADR-32).

`nats service ls`, `info` and `stats` work on it. The responder is ours because the one in nats-py
2.16 handles one request at a time and unsubscribes, instead of draining, when it stops.
"""

import contextlib
import json
import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

import msgspec

from bus import messages as m
from bus.errors import BusError
from bus.serving import Serving


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """Who answers.

    Attributes:
        plugin: What it is an instance of; the service's name.
        id: This process.
        version: Its version.
        description: One sentence about it; without, `nats service` passes over what it says.
        metadata: Where it runs.
    """

    plugin: str
    id: str
    version: str
    description: str
    metadata: Mapping[str, str]


@asynccontextmanager
async def discoverable(who: Identity, asked: Serving) -> AsyncGenerator[None]:
    """Answer the service protocol while inside."""
    identity = {
        "name": who.plugin,
        "id": who.id,
        "version": _semver(who.version),
        "metadata": who.metadata,
    }
    started = m.now()

    async def on_message(message: Any) -> None:
        said: dict[str, Any]
        match message.subject.split(".")[1]:
            case "PING":
                said = {"type": "io.nats.micro.v1.ping_response"}
            case "INFO":
                said = {
                    "type": "io.nats.micro.v1.info_response",
                    "description": who.description,
                    "endpoints": [served.info for served in asked.served.values()],
                }
            case "STATS":
                said = {
                    "type": "io.nats.micro.v1.stats_response",
                    "started": _rfc3339(started),
                    "endpoints": [served.stats for served in asked.served.values()],
                }
            case _:
                return
        if message.reply:
            with contextlib.suppress(BusError):
                body = json.dumps({**identity, **said}).encode()
                await asked.client.answer(message.reply, body, {})

    subjects = [f"$SRV.*{tail}" for tail in ("", f".{who.plugin}", f".{who.plugin}.{who.id}")]
    heard = [await asked.client.listen(subject, "", on_message) for subject in subjects]
    try:
        yield
    finally:
        for subscription in heard:
            await asked.client.stop_listening(subscription)


def _rfc3339(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


def _semver(found: str) -> str:
    """Return a version as the service protocol wants it: three numbers at least."""
    return found if re.fullmatch(r"\d+\.\d+\.\d+([-+].*)?", found) else "0.0.0"

"""What all messages are made of: their kinds, and the names in them."""

from datetime import UTC, datetime
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Status = Literal["stopped", "starting", "running", "degraded", "stopping", "error"]
Level = Literal["debug", "info", "warn", "error"]

_PLUGIN_NAME = r"\A[a-z0-9][a-z0-9_-]{0,62}\Z"
_NAME = r"\A\w(?:[\w .@:+-]{0,126}[\w])?\Z"
_VERSION_NAME = r"\A[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?\Z"
# What people are told instead of the expression.
PATTERNS_IN_WORDS = {
    _PLUGIN_NAME: "must be a plugin's name: lower case letters, digits, - and _, at most 63",
    _NAME: "must be a name: letters, digits and _, inside also spaces and . @ : + -, at most 128",
    _VERSION_NAME: "must be the name of a version: letters, digits, inside also . _ -, at most 64",
}

PluginName = Annotated[str, Meta(pattern=_PLUGIN_NAME, description=PATTERNS_IN_WORDS[_PLUGIN_NAME])]
Name = Annotated[str, Meta(pattern=_NAME, description=PATTERNS_IN_WORDS[_NAME])]
VersionName = Annotated[
    str, Meta(pattern=_VERSION_NAME, description=PATTERNS_IN_WORDS[_VERSION_NAME])
]


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What travels. A field at its default is left out."""


class State(Message, frozen=True, rename="camel"):
    """What travels about plugins: camelCase."""


class Empty(Message, frozen=True):
    """No arguments."""


def now() -> datetime:
    """Return the present time in UTC."""
    return datetime.now(UTC)

"""What becomes of a request: an answer or an error, and the headers that say so; or neither."""

import re
from collections.abc import Mapping
from typing import Final

import msgspec

from bus import codec
from bus.errors import BusError, ErrorBody, InvalidRequest, error_from, error_from_number

ERROR: Final = "Nats-Service-Error"
ERROR_CODE: Final = "Nats-Service-Error-Code"
# On an answer: the process that gave it.
INSTANCE: Final = "Bkg-Instance"
# Beside it: the plugin and slot that can be asked for the same, `<plugin>.<slot>`.
SLOT: Final = "Bkg-Slot"
# Beside it: the same may be asked twice, and does no harm.
IDEMPOTENT: Final = "Bkg-Idempotent"
# On a refusal: this instance does not serve that, or no longer; whoever does may be asked.
NOT_SERVED: Final = "Bkg-Not-Served"


class Answer(msgspec.Struct, frozen=True):
    """A reply whose body was not decoded."""

    body: bytes
    headers: Mapping[str, str]


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """The end of a process that filled a place.

    Attributes:
        plugin: Of which plugin.
        slot: The place.
        host: Where.
        how: How it ended, in words.
        before: What was sent to the place later, in the time of `time.perf_counter`, is for its
            successor.
        alone: The capabilities that nobody else has who is ready.
    """

    plugin: str
    slot: str
    host: str
    how: str
    before: float
    alone: frozenset[str]


def error_in(body: bytes, headers: Mapping[str, str]) -> BusError:
    """Return the error that a reply with `ERROR_CODE` carries."""
    try:
        return error_from(codec.decode(body, ErrorBody))
    except InvalidRequest:
        number = headers[ERROR_CODE]
        said = headers.get(ERROR) or "the service gave no reason"
        # Digits that are none of ASCII, or thousands of them, are no number: who asked would wait.
        return error_from_number(int(number) if _NUMBER.fullmatch(number) else 500, said)


_NUMBER = re.compile(r"[0-9]{1,4}")

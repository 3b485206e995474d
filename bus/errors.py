"""The errors that may cross the bus, and their names on the wire.

| error             | who can mend it        | what the caller may do              |
| ----------------- | ---------------------- | ----------------------------------- |
| InvalidRequest    | the caller             | mend the named field                |
| NotAllowed        | the caller             | use another key                     |
| NotFound          | the caller             | check the name                      |
| Conflict          | the caller             | read the present state, try again   |
| TooLarge          | the caller             | send less                           |
| Unprocessable     | the caller             | send something else (no face in it) |
| Overloaded        | nobody, it passes      | try again after `retry_after_s`     |
| Unavailable       | nobody, it passes      | try again after `retry_after_s`     |
| - NobodyListens   | whoever starts plugins | look whether the plugin runs        |
| - InstanceEnded   | nobody, it passes      | see whether it was done; try again  |
| - NoSpace         | whoever runs bkg       | make room, then try again           |
| DeadlineExceeded  | nobody, it passes      | allow more time                     |
| Internal          | us                     | report it; the log has the cause    |

A handler raises one of these; the far side of the bus raises the same one again. Anything else
that a handler raises becomes `Internal` without its text, and the text goes to the log.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Final

import msgspec

# As `retry_after_s`; JSON has no such number, and there it becomes "not known".
NEVER: Final = math.inf


class BusError(Exception):
    """The root of everything that may cross the bus.

    Attributes:
        code: The error's name on the wire; never changes.
        number: What `Nats-Service-Error-Code` carries. The service protocol leaves the numbers
            open; ours mean what they mean in HTTP, because operators know those.
        message: One sentence for the person who has to act.
        field: The field of the request that is meant, as a path such as `inputs[3]`.
        retry_after_s: When another try makes sense, in seconds; `NEVER`: not before somebody has
            done something about it.
        revision: The present revision of what was to be changed, when another change came first.
        reasons: Everything that is wrong, when it is several things.
        details: Further facts by name, such as how far a model is with loading.
    """

    code: ClassVar[str] = "internal"
    number: ClassVar[int] = 500

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        retry_after_s: float | None = None,
        revision: int | None = None,
        reasons: list[str] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s
        self.revision = revision
        self.reasons = reasons
        self.details = details


class InvalidRequest(BusError):
    """The request is malformed: a wrong type, a missing field, a value out of range."""

    code = "invalid-request"
    number = 400


class NotAllowed(BusError):
    """The caller may not do this."""

    code = "not-allowed"
    number = 403


class NotFound(BusError):
    """What the request names does not exist."""

    code = "not-found"
    number = 404


class Conflict(BusError):
    """The request does not fit the present state, or another writer came first."""

    code = "conflict"
    number = 409


class TooLarge(BusError):
    """The request is larger than a stated limit."""

    code = "too-large"
    number = 413


class Unprocessable(BusError):
    """The request is well formed, but what it carries cannot be used."""

    code = "unprocessable"
    number = 422


class Overloaded(BusError):
    """A queue is full; the message says which one and what its limit is."""

    code = "overloaded"
    number = 429


class Internal(BusError):
    """Something failed that nobody expected; the log has the cause."""


class Unavailable(BusError):
    """Nobody can answer just now: not started, still loading, broker away."""

    code = "unavailable"
    number = 503


class NobodyListens(Unavailable):
    """No process listens on the subject; said by the broker at once."""


class InstanceEnded(Unavailable):
    """The process that had the request has ended; never on the wire, it could say nothing more."""


class NoSpace(Unavailable):
    """A disk or a store is full; the message says how much is needed, and how much is free."""

    code = "no-space"
    number = 507


class DeadlineExceeded(BusError):
    """The answer did not come, or would not have come, within the caller's time."""

    code = "deadline-exceeded"
    number = 504


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A `BusError` as the body of an answer.

    Attributes:
        code: The error's name, as in `BusError.code`.
        message: One sentence for the person who has to act.
        field: The field of the request that is meant.
        retry_after_s: When another try makes sense, in seconds.
        revision: The present revision of what was to be changed.
        reasons: Everything that is wrong, when it is several things.
        details: Further facts by name, such as how far a model is with loading.
    """

    code: str
    message: str
    field: str | None = None
    retry_after_s: float | None = None
    revision: int | None = None
    reasons: list[str] | None = None
    details: Mapping[str, Any] | None = None


def body_of(error: BusError) -> ErrorBody:
    """Return what travels of an error."""
    return ErrorBody(
        code=error.code,
        message=error.message,
        field=error.field,
        retry_after_s=error.retry_after_s,
        revision=error.revision,
        reasons=error.reasons,
        details=error.details,
    )


def error_from(body: ErrorBody) -> BusError:
    """Return the error that a body stands for; a code that is not ours becomes `Internal`."""
    kind = _BY_CODE.get(body.code, Internal)
    return kind(
        body.message,
        field=body.field,
        retry_after_s=body.retry_after_s,
        revision=body.revision,
        reasons=body.reasons,
        details=body.details,
    )


def error_from_number(number: int, message: str) -> BusError:
    """Return the nearest error for a third party's service error, which has only a number."""
    kind = _BY_NUMBER.get(number, InvalidRequest if 400 <= number < 500 else Internal)
    return kind(message)


_KINDS: tuple[type[BusError], ...] = (
    InvalidRequest, NotAllowed, NotFound, Conflict, TooLarge, Unprocessable, Overloaded,
    Internal, Unavailable, NoSpace, DeadlineExceeded,
)  # fmt: skip
_BY_CODE = {kind.code: kind for kind in _KINDS}
_BY_NUMBER = {kind.number: kind for kind in _KINDS}

"""What JetStream is asked: again while nobody answers, and many messages as one."""

import asyncio
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import nats.errors
from nats.aio.client import Client as Nats

from bus.errors import BusError, Conflict, Internal, Unavailable
from bus.tasks import keeping_cancellation

WRITE_PATIENCE_S: Final = 15.0
# One answer may take so long. The broker gives up a batch that nobody goes on with after 10 s.
ANSWER_S: Final = 5.0

_WRONG_LAST_SEQUENCE = {10071, 10164}
_NO_MESSAGE = 10037
_STREAM_NOT_FOUND = 10059
# The account's limits, the server's memory and disk, and what the stream's own store refuses.
_FULL = {10002, 10023, 10028, 10047, 10077}
# A batch: the stream takes none, it takes none with message ids (2.12.0), and it has one of these.
_ONE_BY_ONE = {10174, 10177, 10201}
# A batch: a part of it was lost on the way, or too many are open.
_BROKEN_OFF = {10176, 10210}


class StoreFullError(Internal):
    """The broker has no room for another message; its own words say which limit."""


class Outgoing(NamedTuple):
    """A message that is to be stored.

    Attributes:
        subject: Its subject.
        body: Its body.
        headers: Further headers.
        expect: A subject and the sequence that its last message must have then, 0 for none.
    """

    subject: str
    body: bytes
    headers: Mapping[str, str] = {}
    expect: tuple[str, int] | None = None

    def sent_with(self) -> dict[str, str]:
        """Return all its headers."""
        if self.expect is None:
            return dict(self.headers)
        expected, seq = self.expect
        headers = {**self.headers, "Nats-Expected-Last-Subject-Sequence": str(seq)}
        if expected != self.subject:
            headers["Nats-Expected-Last-Subject-Sequence-Subject"] = expected
        return headers


async def ask_jetstream(
    nc: Nats,
    subject: str,
    body: bytes,
    headers: dict[str, str] | None = None,
    *,
    missing_is_none: bool = False,
    error_is_reply: bool = False,
    patience_s: float = WRITE_PATIENCE_S,
    once: bool = False,
) -> dict[str, Any]:
    """Ask JetStream, again with back-off while nobody answers, and return its reply.

    Args:
        nc: The connection.
        subject: What is asked.
        body: The request.
        headers: Its headers.
        missing_is_none: That there is no such message is an empty reply.
        error_is_reply: So is any other error.
        patience_s: For how long.
        once: Do not ask again; all of `patience_s` is for the one answer.
    """
    loop = asyncio.get_running_loop()
    deadline, pause_s = loop.time() + patience_s, 0.05
    while True:
        try:
            with keeping_cancellation():
                reply = await nc.request(
                    subject,
                    body,
                    timeout=patience_s if once else min(ANSWER_S, patience_s),
                    headers=dict(headers or {}) or None,
                )
            answer: dict[str, Any] = json.loads(reply.data)
            break
        except (nats.errors.NoRespondersError, nats.errors.TimeoutError) as error:
            if once or loop.time() + pause_s > deadline:
                # One that is busy takes its time, and has it on.
                is_off = subject == "$JS.API.INFO" and isinstance(
                    error, nats.errors.NoRespondersError
                )
                raise Unavailable(
                    f"the broker did not store or read {subject} within {patience_s:g} s"
                    + (" (is JetStream on?)" if is_off else "")
                ) from error
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, 1.0)
        except nats.errors.Error as error:
            raise Unavailable(f"the broker cannot be reached: {error}") from None
    if "error" in answer and not error_is_reply:
        if missing_is_none and answer["error"].get("err_code") == _NO_MESSAGE:
            return {}
        raise refusal(subject, answer["error"])
    return answer


async def store_batch(nc: Nats, messages: Sequence[Outgoing]) -> int | None:
    """Store messages as one atomic batch (ADR-50), and return the sequence of the last one.

    Nothing is stored before the last one has come, and then all of it, with one answer. Whatever
    breaks off before is forgotten by the broker, so it is begun again as another batch; what is
    stored though its answer was lost is known by the ids of its messages.

    Args:
        nc: The connection.
        messages: 1,000 at most, each with an id of its own.

    Returns:
        None where they have to be stored one by one: the stream takes no batches, or has some of
        these messages already. Nothing was stored then.

    Raises:
        Conflict: A subject's last message is another one than a message expects.
        BusError: As `ask_jetstream`; after `Unavailable` all may be stored, or nothing.
    """
    loop = asyncio.get_running_loop()
    deadline, pause_s = loop.time() + WRITE_PATIENCE_S, 0.05
    while True:
        failure: BusError
        try:
            answer = await _committed(nc, messages)
        except Unavailable as error:
            failure = error
        else:
            if "error" not in answer:
                return int(answer["seq"])
            code = answer["error"].get("err_code")
            if code in _ONE_BY_ONE:
                return None
            failure = refusal(messages[-1].subject, answer["error"])
            if code not in _BROKEN_OFF:
                raise failure
        if loop.time() + pause_s > deadline:
            raise failure
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, 1.0)


async def _committed(nc: Nats, messages: Sequence[Outgoing]) -> dict[str, Any]:
    """Send a batch and return the broker's answer to all of it."""
    if not nc.is_connected:
        # nats-py would keep all of it, and send it besides the next try's.
        raise Unavailable("the broker cannot be reached just now")
    batch = secrets.token_hex(8)
    *before, last = [
        (
            one.subject,
            one.body,
            {**one.sent_with(), "Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(number)},
        )
        for number, one in enumerate(messages, 1)
    ]
    try:
        for subject, body, headers in before:
            await nc.publish(subject, body, headers=headers)
    except nats.errors.Error as error:
        raise Unavailable(f"the broker cannot be reached: {error}") from None
    subject, body, headers = last
    return await ask_jetstream(
        nc,
        subject,
        body,
        {**headers, "Nats-Batch-Commit": "1"},
        error_is_reply=True,
        patience_s=ANSWER_S,
        once=True,
    )


def refusal(subject: str, error: Mapping[str, Any]) -> BusError:
    """Return what an error of JetStream is here."""
    code, said = error.get("err_code"), error.get("description")
    if code in _WRONG_LAST_SEQUENCE:
        return Conflict("another change came first; read the present state and try again")
    if code == _STREAM_NOT_FOUND:
        return Unavailable(f"{subject}: the stream is not there (yet)")
    if code in _BROKEN_OFF:
        return Unavailable(f"{subject}: the broker did not get a whole batch: {said}")
    if code in _FULL:
        return StoreFullError(f"the broker refused {subject}: {said}")
    return Internal(f"the broker refused {subject}: {said}")

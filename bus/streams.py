"""JetStream's streams: append to one, read it, follow it without a gap.

Every write waits for the broker's acknowledgement and is tried again while a stream has no
leader; it carries a message id, so that a retry is stored once. Every reader that follows is a
consumer of our own making: the watchers of nats-py 2.16 are blind for up to 20 s after the broker
was restarted, ours for about a second.
"""

import asyncio
import contextlib
import json
import secrets
from base64 import b64decode
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import nats.errors
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg

from bus.errors import Conflict, Internal, Unavailable
from bus.tasks import heed_cancellation, keeping_cancellation

NS: Final = 1_000_000_000
MIB: Final = 1024 * 1024
# Of consumers. Seldom, because there are some twenty of them in an idle platform; that the broker
# came back is seen by the connection.
HEARTBEAT_S: Final = 5
LOOK_S: Final = 1.0
WRITE_PATIENCE_S: Final = 15.0

_WRONG_LAST_SEQUENCE = {10071, 10164}
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_NO_MESSAGE = 10037
_STREAM_NOT_FOUND = 10059
# The account's limits, the server's memory and disk, and what the stream's own store refuses.
_FULL = {10002, 10023, 10028, 10047, 10077}


class StoreFullError(Internal):
    """The broker has no room for another message; its own words say which limit."""


@dataclass(frozen=True)
class Stored:
    """A message of a stream; `at` is when it was stored, in nanoseconds since 1970."""

    subject: str
    seq: int
    body: bytes
    headers: Mapping[str, str]
    at: int = 0


@dataclass(frozen=True)
class Batch:
    """Some messages of a stream that is followed; `caught_up` as in `Changes`."""

    messages: list[Stored]
    caught_up: bool


@dataclass(frozen=True)
class Occupied:
    """What a stream holds.

    Attributes:
        size_bytes: On the disk, with what the broker needs beside the messages.
        max_bytes: How much it may hold; None without a limit.
        first_seq: Sequence of its oldest message.
        last_seq: Sequence of its newest one.
        subjects: How many messages there are of each subject that was asked for.
    """

    size_bytes: int
    max_bytes: int | None
    first_seq: int
    last_seq: int
    subjects: Mapping[str, int]


class Stream:
    """A stream: append to it, follow it.

    Attributes:
        name: Its name at the broker.
    """

    def __init__(self, nc: Nats, name: str) -> None:
        self.name = name
        self._nc = nc

    async def append(
        self,
        subject: str,
        body: bytes,
        *,
        headers: Mapping[str, str] | None = None,
        expect: tuple[str, int] | None = None,
    ) -> int:
        """Store a message and return its sequence.

        Args:
            subject: Its subject.
            body: Its body.
            headers: Further headers.
            expect: A subject and the sequence that its last message must have, 0 for none.

        Raises:
            Conflict: That subject has had another message since.
            Unavailable: The broker stored nothing within the time.
        """
        sent = {"Nats-Msg-Id": secrets.token_hex(12), **(headers or {})}
        if expect is not None:
            sent["Nats-Expected-Last-Subject-Sequence"] = str(expect[1])
            if expect[0] != subject:
                sent["Nats-Expected-Last-Subject-Sequence-Subject"] = expect[0]
        reply = await ask_jetstream(self._nc, subject, body, sent)
        return int(reply["seq"])

    async def append_once(
        self, subject: str, body: bytes, headers: Mapping[str, str], timeout_s: float
    ) -> int:
        """Store a message in one try and return its sequence, for whoever keeps an order.

        Raises:
            StoreFullError: There is no room for it.
            Unavailable: No answer came in time; it may be stored all the same.
        """
        reply = await ask_jetstream(
            self._nc, subject, body, dict(headers), patience_s=timeout_s, once=True
        )
        return int(reply["seq"])

    @property
    def reconnects(self) -> int:
        """How often the connection has come back: answers from before that never come."""
        return self._nc.stats["reconnects"]

    async def last(self, subject: str) -> Stored | None:
        """Return the last message of a subject, which may have wildcards; None without one."""
        reply = await ask_jetstream(
            self._nc,
            f"$JS.API.STREAM.MSG.GET.{self.name}",
            json.dumps({"last_by_subj": subject}).encode(),
            missing_is_none=True,
        )
        if "message" not in reply:
            return None
        return _stored_in_json(reply["message"])

    async def at_or_after(self, seq: int, subject: str) -> Stored | None:
        """Return the first message of a subject from a sequence on; None without one."""
        reply = await ask_jetstream(
            self._nc,
            f"$JS.API.STREAM.MSG.GET.{self.name}",
            json.dumps({"seq": seq, "next_by_subj": subject}).encode(),
            missing_is_none=True,
        )
        return _stored_in_json(reply["message"]) if "message" in reply else None

    async def remove(self, seq: int, *, erase: bool = False) -> None:
        """Delete one message; one that is not there is no error.

        Args:
            seq: Which.
            erase: Write over its bytes in the broker's files as well, which costs an fsync: some
                three milliseconds. Otherwise they lie there until their block is written anew.
        """
        await ask_jetstream(
            self._nc,
            f"$JS.API.STREAM.MSG.DELETE.{self.name}",
            json.dumps({"seq": seq, "no_erase": not erase}).encode(),
            error_is_reply=True,
        )

    async def occupied(self, subject: str | None = None) -> Occupied:
        """Return what the stream holds, counted by subject for those that `subject` matches."""
        found: dict[str, int] = {}
        while True:
            asked = {"subjects_filter": subject, "offset": len(found)} if subject else {}
            info = await ask_jetstream(
                self._nc, f"$JS.API.STREAM.INFO.{self.name}", json.dumps(asked).encode()
            )
            page: dict[str, int] = info["state"].get("subjects") or {}
            found |= page
            if not page or len(found) >= int(info.get("total", 0)):
                break
        state, limit = info["state"], int(info["config"].get("max_bytes", -1))
        return Occupied(
            size_bytes=int(state["bytes"]),
            max_bytes=limit if limit >= 0 else None,
            first_seq=int(state["first_seq"]),
            last_seq=int(state["last_seq"]),
            subjects=found,
        )

    async def account_room(self) -> int | None:
        """Return what the account may still store on disk; None without a limit."""
        account = await ask_jetstream(self._nc, "$JS.API.INFO", b"")
        limit = int(account.get("limits", {}).get("max_storage", -1))
        return max(0, limit - int(account.get("storage", 0))) if limit >= 0 else None

    async def last_seq(self) -> int:
        """Return the sequence of the newest message, 0 when there never was one."""
        return (await self.bounds())[1]

    async def bounds(self) -> tuple[int, int]:
        """Return the sequences of the oldest message that is there and of the newest one."""
        info = await ask_jetstream(self._nc, f"$JS.API.STREAM.INFO.{self.name}", b"")
        return int(info["state"]["first_seq"]), int(info["state"]["last_seq"])

    async def purge(self, subject: str, *, keep_from: int | None = None) -> None:
        """Delete the messages of a subject, which may have wildcards, below a sequence."""
        asked: dict[str, Any] = {"filter": subject}
        if keep_from is not None:
            asked["seq"] = keep_from
        await ask_jetstream(
            self._nc, f"$JS.API.STREAM.PURGE.{self.name}", json.dumps(asked).encode()
        )

    async def erase(self, subject: str) -> None:
        """Delete the messages of a subject one by one, and write over their bytes; see `remove`.

        Cut short, it leaves the later ones.
        """
        after = 0
        while (found := await self.at_or_after(after + 1, subject)) is not None:
            await self.remove(found.seq, erase=True)
            after = found.seq

    async def follow(
        self,
        subject: str | Sequence[str],
        *,
        after: int = 0,
        latest_only: bool = False,
        since: datetime | None = None,
    ) -> AsyncIterator[Batch]:
        """Give the messages of a subject, which may have wildcards, and then every new one.

        In order and without a gap, across reconnections and restarts of the broker: a consumer
        that missed a message, or went silent for three heartbeats, is made anew after the last
        message that was given (the ordered consumer of ADR-17). Ends only with the caller.

        Args:
            subject: Which messages; several subjects must not overlap.
            after: The sequence after which to begin.
            latest_only: Begin with the last message of each subject instead.
            since: Begin with the first message that was stored at this moment or later instead.
        """
        start: dict[str, Any] | None = None
        if latest_only and not after:
            start = {"deliver_policy": "last_per_subject"}
        elif since is not None and not after:
            start = _from(since)
        pause_s = 0.1
        while True:
            try:
                async with _consumer(self._nc, self.name, subject, start or _after(after)) as feed:
                    heed_cancellation()
                    async for batch in feed:
                        pause_s = 0.1
                        if batch.messages:
                            after, start = batch.messages[-1].seq, None
                        yield batch
            except Unavailable:
                # The broker or the stream is away, or the consumer was lost: again from there.
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, 2.0)

    async def read(
        self,
        subject: str | Sequence[str],
        *,
        after: int = 0,
        latest_only: bool = False,
        since: datetime | None = None,
    ) -> AsyncIterator[Stored]:
        """Give what is there now, and end."""
        following = self.follow(subject, after=after, latest_only=latest_only, since=since)
        async with contextlib.aclosing(following) as batches:  # type: ignore[type-var]
            async for batch in batches:
                for message in batch.messages:
                    yield message
                if batch.caught_up:
                    return
                # A full queue is read without waiting: the others have their turn in between.
                await asyncio.sleep(0)


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
                    timeout=patience_s if once else min(5.0, patience_s),
                    headers=dict(headers or {}) or None,
                )
            answer: dict[str, Any] = json.loads(reply.data)
            break
        except (nats.errors.NoRespondersError, nats.errors.TimeoutError) as error:
            if once or loop.time() + pause_s > deadline:
                raise Unavailable(
                    f"the broker did not store or read {subject} within {patience_s:g} s"
                    + (" (is JetStream on?)" if subject == "$JS.API.INFO" else "")
                ) from error
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, 1.0)
        except nats.errors.Error as error:
            raise Unavailable(f"the broker cannot be reached: {error}") from None
    if "error" in answer and not error_is_reply:
        code = answer["error"].get("err_code")
        if missing_is_none and code == _NO_MESSAGE:
            return {}
        if code in _WRONG_LAST_SEQUENCE:
            raise Conflict("another change came first; read the present state and try again")
        if code == _STREAM_NOT_FOUND:
            raise Unavailable(f"{subject}: the stream is not there (yet)")
        if code in _FULL:
            raise StoreFullError(
                f"the broker refused {subject}: {answer['error'].get('description')}"
            )
        raise Internal(f"the broker refused {subject}: {answer['error'].get('description')}")
    return answer


def nanoseconds(moment: datetime | None) -> int | None:
    """Return a moment as the broker counts: in nanoseconds since 1970."""
    return None if moment is None else int(moment.timestamp() * 1e6) * 1_000


def _from(since: datetime) -> dict[str, Any]:
    # Before 1970 nothing was stored, and the broker's clock cannot say it.
    moment = max(since, _EPOCH).astimezone(UTC)
    start = moment.isoformat(timespec="microseconds").replace("+00:00", "Z")
    return {"deliver_policy": "by_start_time", "opt_start_time": start}


def _after(seq: int) -> dict[str, Any]:
    if seq:
        return {"deliver_policy": "by_start_sequence", "opt_start_seq": seq + 1}
    return {"deliver_policy": "all"}


@contextlib.asynccontextmanager
async def _consumer(
    nc: Nats, stream: str, subject: str | Sequence[str], start: dict[str, Any]
) -> AsyncIterator[AsyncIterator[Batch]]:
    """Hold an ephemeral push consumer while inside; its batches end in Unavailable when it lost."""
    inbox = nc.new_inbox()
    arrived: asyncio.Queue[Msg] = asyncio.Queue()
    heard = await nc.subscribe(inbox, cb=arrived.put, pending_bytes_limit=512 * MIB)
    name = f"follow-{secrets.token_hex(6)}"
    create = f"$JS.API.CONSUMER.CREATE.{stream}.{name}"
    only: dict[str, Any]
    if isinstance(subject, str):
        # With its one filter in the subject, permissions can limit it.
        only, create = {"filter_subject": subject}, f"{create}.{subject}"
    else:
        only = {"filter_subjects": list(subject)}
    config = {
        "name": name,
        "deliver_subject": inbox,
        **only,
        "ack_policy": "none",
        "max_deliver": 1,
        "flow_control": True,
        "idle_heartbeat": HEARTBEAT_S * NS,
        "inactive_threshold": 30 * NS,
        "mem_storage": True,
        "num_replicas": 1,
        **start,
    }
    try:
        made = await ask_jetstream(
            nc,
            create,
            json.dumps({"stream_name": stream, "config": config}).encode(),
        )
        yield _batches(nc, arrived, int(made["num_pending"]))
    finally:
        with contextlib.suppress(nats.errors.Error):
            await heard.unsubscribe()
            if nc.is_connected:
                await nc.publish(f"$JS.API.CONSUMER.DELETE.{stream}.{name}")


async def _batches(
    nc: Nats, arrived: asyncio.Queue[Msg], waiting_at_start: int
) -> AsyncIterator[Batch]:
    caught_up = not waiting_at_start
    if caught_up:
        yield Batch([], caught_up=True)
    expected = 1
    reconnects = nc.stats["reconnects"]
    while True:
        message = await _next(nc, arrived, reconnects)
        batch: list[Stored] = []
        pending, idle = -1, False
        while True:
            if (message.headers or {}).get("Status") == "100":
                idle = await _obey(nc, message, expected)
            else:
                idle = False
                seq, delivered, at, pending = _numbers(message.reply)
                if delivered != expected:
                    raise Unavailable("the consumer lost a message")
                expected += 1
                batch.append(
                    Stored(message.subject, seq, message.data, dict(message.headers or {}), at)
                )
            if arrived.empty() or len(batch) >= 1_000:
                break
            message = arrived.get_nowait()
        # The last ones that were waiting may be deleted before they are sent: then nothing says
        # that none is left, but that the consumer has nothing to send.
        if batch or (idle and not caught_up):
            caught_up = idle or pending == 0
            yield Batch(batch, caught_up)


async def _next(nc: Nats, arrived: asyncio.Queue[Msg], reconnects: int) -> Msg:
    """Return what a consumer sends next, at least its heartbeat.

    Raises:
        Unavailable: It sent nothing for three heartbeats, or the connection was another one
            meanwhile: a broker that was restarted has forgotten the consumer.
    """
    for _ in range(int(3 * HEARTBEAT_S / LOOK_S)):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_S):
                return await arrived.get()
        if nc.stats["reconnects"] != reconnects:
            raise Unavailable("the connection was lost meanwhile")
    raise Unavailable("the consumer went silent")


async def _obey(nc: Nats, control: Msg, expected: int) -> bool:
    """Answer flow control, and return whether the consumer is idle: it has sent all that it has.

    Raises:
        Unavailable: A heartbeat's number is not ours.
    """
    headers = control.headers or {}
    if control.reply:
        await nc.publish(control.reply)
    elif stalled := headers.get("Nats-Consumer-Stalled"):
        await nc.publish(stalled)
    last = headers.get("Nats-Last-Consumer")
    if last is not None and int(last) != expected - 1:
        raise Unavailable("the consumer lost a message")
    return last is not None and not control.reply and "Nats-Consumer-Stalled" not in headers


def _numbers(reply: str) -> tuple[int, int, int, int]:
    """Return stream and delivery sequence, time stored and pending of `$JS.ACK...` (ADR-15)."""
    parts = reply.split(".")
    # 9 tokens, or 12 with domain and account hash before and a random token behind.
    at = 5 if len(parts) == 9 else 7
    return int(parts[at]), int(parts[at + 1]), int(parts[at + 2]), int(parts[at + 3])


def _stored_in_json(message: Mapping[str, Any]) -> Stored:
    lines = b64decode(message.get("hdrs", "")).decode().split("\r\n")[1:]
    headers = dict(line.split(": ", 1) for line in lines if ": " in line)
    at = datetime.fromisoformat(message["time"])
    return Stored(
        message["subject"],
        int(message["seq"]),
        b64decode(message.get("data", "")),
        headers,
        (at - _EPOCH) // timedelta(microseconds=1) * 1_000,
    )

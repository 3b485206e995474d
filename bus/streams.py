"""JetStream's streams: append to one, read it, follow it without a gap.

Every write waits for the broker's acknowledgement and is tried again while a stream has no
leader; it carries a message id, so that a retry is stored once.
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

from nats.aio.client import Client as Nats

from bus.consumers import NS, Batch, Stored, consumer
from bus.errors import BusError, Conflict, Internal, Unavailable
from bus.jetstream import Outgoing, StoreFullError, ask_jetstream, refusal, store_batch
from bus.tasks import heed_cancellation

__all__ = [
    "MIB", "NS", "Batch", "Occupied", "Outgoing", "StoreFullError", "Stored", "Stream",
    "nanoseconds",
]  # fmt: skip

MIB: Final = 1024 * 1024
# A deletion of what is not there: deleted before, displaced, or purged out of the middle. Below the
# first message, behind the last one and in a stream without any, the broker (2.15) says that the
# deletion failed, and why in words alone, as of one that it refuses: a stream that denies it, a
# message that it cannot read.
_NO_SUCH_SEQUENCE: Final = 10043
_DELETION_FAILED: Final = 10057
_NOT_THERE: Final = {"no message found", "stream store EOF", "deleted message"}
# Of what is stored as one batch; the broker takes up to 1,000 messages.
AS_ONE_MAX: Final = 250
AS_ONE_MAX_BYTES: Final = 4 * MIB
# A broker on the same host acknowledges some thousand appends a second, once enough wait for it.
APPENDED_AT_ONCE: Final = 128

MESSAGE_ID: Final = "Nats-Msg-Id"
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


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
        self._takes_batches = False

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
        return await self._append(Outgoing(subject, body, headers or {}, expect))

    async def append_batch(self, messages: Sequence[Outgoing]) -> int | None:
        """Store messages in their order, all or none, and return the sequence of the last one.

        Costs four fsyncs, and is whole whoever is killed meanwhile. What each message expects is
        looked at when all are stored, not before; of several of one subject only the first may
        expect something of that.

        Args:
            messages: Which: some `AS_ONE_MAX` at most, of not many more bytes than
                `AS_ONE_MAX_BYTES`. With ids, if `append_each` is to know them again.

        Returns:
            None where they have to be stored one by one, since the broker cannot take them so: the
            stream is an older one, or has some of them already, by their ids: an answer was lost,
            or a power cut has left a part. Nothing was stored now.

        Raises:
            Conflict: A subject has had another message than one expects; nothing is stored.
            StoreFullError: There is no room for all; nothing is stored.
            Unavailable: The broker did not answer within the time; all may be stored, or nothing.
        """
        # Asked first: a broker before 2.12 would take the messages as they come, whatever a later
        # one expects.
        if not self._takes_batches:
            info = await ask_jetstream(self._nc, f"$JS.API.STREAM.INFO.{self.name}", b"")
            self._takes_batches = bool(info["config"].get("allow_atomic"))
        if not self._takes_batches:
            return None
        return await store_batch(self._nc, [_identified(one) for one in messages])

    async def append_each(self, messages: Sequence[Outgoing]) -> list[int | None]:
        """Store messages by themselves, many at a time, in any order; return their sequences.

        None stands for one whose subject has had another message than it expects: that may be
        itself, if an answer was lost.

        Raises:
            BusError: One could not be stored, others may be; each was answered or given up.
        """
        seqs: list[int | None] = [None] * len(messages)
        left, failed = iter(enumerate(messages)), list[BusError]()

        async def work() -> None:
            for i, one in left:
                if failed:
                    return
                try:
                    seqs[i] = await self._append(one)
                except Conflict:
                    continue
                except BusError as error:
                    failed.append(error)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(APPENDED_AT_ONCE, len(messages))):
                tasks.create_task(work())
        if failed:
            raise failed[0]
        return seqs

    async def _append(self, message: Outgoing) -> int:
        headers = _identified(message).sent_with()
        reply = await ask_jetstream(self._nc, message.subject, message.body, headers)
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

        Raises:
            Unavailable: Nobody did it within the time.
            BusError: The broker refuses; says why.
        """
        subject = f"$JS.API.STREAM.MSG.DELETE.{self.name}"
        asked = json.dumps({"seq": seq, "no_erase": not erase}).encode()
        reply = await ask_jetstream(self._nc, subject, asked, error_is_reply=True)
        if "error" in reply and not _says_gone(reply["error"]):
            raise refusal(subject, reply["error"])

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

        Raises:
            Unavailable: Nobody did it within the time.
            BusError: The broker refuses some, or cannot read them; the others are erased.
        """
        after, refused = 0, None
        while (found := await self.at_or_after(after + 1, subject)) is not None:
            after = found.seq
            try:
                await self.remove(found.seq, erase=True)
            except Unavailable:
                raise
            except BusError as error:
                refused = refused or error
        if refused is not None:
            raise refused
        # What the broker cannot read any more it counts, but does not give.
        if left := sum((await self.occupied(subject)).subjects.values()):
            raise Internal(f"the broker cannot read {left:,} messages of {subject} to erase them")

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
                async with consumer(self._nc, self.name, subject, start or _after(after)) as feed:
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


def _says_gone(error: Mapping[str, Any]) -> bool:
    """Tell whether a deletion failed because there is nothing to delete."""
    code = error.get("err_code")
    return code == _NO_SUCH_SEQUENCE or (
        code == _DELETION_FAILED and error.get("description") in _NOT_THERE
    )


def _identified(message: Outgoing) -> Outgoing:
    """Return a message with an id, so that it is stored once, however often it is sent."""
    if MESSAGE_ID in message.headers:
        return message
    return message._replace(headers={MESSAGE_ID: secrets.token_hex(12), **message.headers})


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

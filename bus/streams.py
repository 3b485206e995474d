"""JetStream's streams: append to one, read it, follow it without a gap.

Every write waits for the broker's acknowledgement and is tried again while a stream has no
leader; it carries a message id, so that a retry is stored once.
"""

import asyncio
import contextlib
import json
import secrets
from base64 import b64decode
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from nats.aio.client import Client as Nats

from bus.consumers import NS, Batch, Stored, consumer
from bus.errors import BusError, Internal, Unavailable
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
# The broker takes up to 1,000 messages as one batch.
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
        sent = {MESSAGE_ID: secrets.token_hex(12), **(headers or {})}
        if expect is not None:
            sent |= _expecting(expect, subject)
        reply = await ask_jetstream(self._nc, subject, body, sent)
        return int(reply["seq"])

    async def append_all(
        self, messages: Sequence[Outgoing], *, expect: tuple[str, int] | None = None
    ) -> int:
        """Store messages, in their order, and return the sequence of the last one; 0 for none.

        They go in batches, each of which costs four fsyncs and is stored whole or not at all,
        whoever is killed meanwhile. Where the broker cannot take one so, its messages are stored
        one by one: the stream is an older one, or a power cut has left a part of it there.

        Args:
            messages: Which.
            expect: As for `append`, for all of them; none of them may be of that subject.

        Raises:
            Conflict: That subject has had another message; the batches before that are stored.
            StoreFullError: There is no room for a batch; those before it are stored.
            Unavailable: The broker did not answer within the time; some may be stored.
        """
        seq = 0
        for part in _in_batches(messages):
            sent = [
                one._replace(headers={MESSAGE_ID: secrets.token_hex(12), **one.headers})
                for one in part
            ]
            # One alone costs one fsync.
            stored = await self._append_batch(sent, expect) if len(sent) > 1 else None
            seq = stored or await self._append_each(sent, expect)
        return seq

    async def _append_batch(
        self, messages: Sequence[Outgoing], expect: tuple[str, int] | None
    ) -> int | None:
        # Asked first: a broker before 2.12 would take the messages as they come, whatever the last
        # one expects.
        if not self._takes_batches:
            info = await ask_jetstream(self._nc, f"$JS.API.STREAM.INFO.{self.name}", b"")
            self._takes_batches = bool(info["config"].get("allow_atomic"))
        if not self._takes_batches:
            return None
        if expect is not None:
            # Looked at when the batch is stored, and so for all of it.
            *before, last = messages
            headers = {**last.headers, **_expecting(expect, last.subject)}
            messages = [*before, last._replace(headers=headers)]
        return await store_batch(self._nc, messages)

    async def _append_each(
        self, messages: Sequence[Outgoing], expect: tuple[str, int] | None
    ) -> int:
        """Store messages many at a time; ends when each one of them was stored or refused."""
        left, seqs, failed = iter(messages), list[int](), list[BusError]()

        async def work() -> None:
            for subject, body, headers in left:
                if failed:
                    return
                try:
                    seqs.append(await self.append(subject, body, headers=headers, expect=expect))
                except BusError as error:
                    failed.append(error)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(APPENDED_AT_ONCE, len(messages))):
                tasks.create_task(work())
        if failed:
            raise failed[0]
        return max(seqs)

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


def _expecting(expect: tuple[str, int], subject: str) -> dict[str, str]:
    """Return the headers by which a message expects a subject's last sequence."""
    expected, seq = expect
    headers = {"Nats-Expected-Last-Subject-Sequence": str(seq)}
    if expected != subject:
        headers["Nats-Expected-Last-Subject-Sequence-Subject"] = expected
    return headers


def _says_gone(error: Mapping[str, Any]) -> bool:
    """Tell whether a deletion failed because there is nothing to delete."""
    code = error.get("err_code")
    return code == _NO_SUCH_SEQUENCE or (
        code == _DELETION_FAILED and error.get("description") in _NOT_THERE
    )


def _in_batches(messages: Sequence[Outgoing]) -> Iterator[list[Outgoing]]:
    part, size = list[Outgoing](), 0
    for one in messages:
        size += len(one.body)
        if part and (len(part) == AS_ONE_MAX or size > AS_ONE_MAX_BYTES):
            yield part
            part, size = [], len(one.body)
        part.append(one)
    if part:
        yield part


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

"""A consumer of a stream, of our own making.

The watchers of nats-py 2.16 are blind for up to 20 s after the broker was restarted, this one for
about a second.
"""

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import nats.errors
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg

from bus.errors import Unavailable
from bus.jetstream import ask_jetstream

NS: Final = 1_000_000_000
# Seldom, because there are some twenty consumers in an idle platform; that the broker came back is
# seen by the connection.
HEARTBEAT_S: Final = 5
LOOK_S: Final = 1.0
PENDING_MAX_BYTES: Final = 512 * 1024 * 1024


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


@contextlib.asynccontextmanager
async def consumer(
    nc: Nats, stream: str, subject: str | Sequence[str], start: dict[str, Any]
) -> AsyncIterator[AsyncIterator[Batch]]:
    """Hold an ephemeral push consumer while inside; its batches end in Unavailable when it lost."""
    inbox = nc.new_inbox()
    arrived: asyncio.Queue[Msg] = asyncio.Queue()
    heard = await nc.subscribe(inbox, cb=arrived.put, pending_bytes_limit=PENDING_MAX_BYTES)
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

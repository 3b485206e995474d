"""The caller's side of the bus: connect, call, relay, publish, follow."""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Final, TypeVar

from nats.aio.client import Client as Nats

from bus import codec
from bus.answers import ERROR, ERROR_CODE, IDEMPOTENT, INSTANCE, NOT_SERVED, SLOT, Answer, Ended
from bus.bodies import Bodies, Reference
from bus.connection import Connection, connected
from bus.errors import BusError
from bus.followed import Followed, Received
from bus.hedging import ask
from bus.messages import Message
from bus.relay import TIMEOUT_MS, Asked, Asker, Done, new_traceparent, settle, trace
from bus.settings import bodies_share_bytes, body_max_bytes
from bus.state import Store
from bus.streams import Stream
from bus.subjects import DEFAULT_ROOT, Endpoint, Feed, token
from bus.wire import TRACEPARENT

__all__ = [
    "ERROR", "ERROR_CODE", "IDEMPOTENT", "INSTANCE", "NOT_SERVED", "SLOT", "TIMEOUT_MS",
    "TRACEPARENT", "Answer", "Asked", "Client", "Followed", "Received", "Reference", "connect",
    "new_traceparent", "trace",
]  # fmt: skip

# How long bodies that are put aside may take to go, at the end.
LEAVE_S: Final = 2.0

Req = TypeVar("Req", bound=Message)
Rep = TypeVar("Rep", bound=Message)


class Client(Connection):
    """A connection to the broker; made by `connect`.

    Args:
        nc: nats-py's client, connected.
        root: The first token of every subject.
        body_max_bytes: How large the body of a request may be.
        bodies_share_bytes: How many bytes of large bodies may be put aside at a time.

    Attributes:
        store: Buckets and streams.
        bodies: Where bodies of requests go that are too large for one message.
    """

    def __init__(self, nc: Nats, root: str, body_max_bytes: int, bodies_share_bytes: int) -> None:
        super().__init__(nc, root)
        self.store = Store(nc, root)
        self.bodies = Bodies(
            Stream(nc, f"OBJ_{root}-bodies"), f"{root}-bodies", body_max_bytes, bodies_share_bytes
        )
        self._asker = Asker(self, self._wire, self._replies, self.bodies)

    @property
    def body_max_bytes(self) -> int:
        """The largest body that a request can have, in one message or by reference."""
        return max(self.max_payload, self.bodies.max_bytes)

    async def call(
        self,
        endpoint: Endpoint[Req, Rep],
        request: Req,
        *,
        timeout_s: float = 10.0,
        content_type: str = codec.JSON,
    ) -> Rep:
        """Ask whoever serves an endpoint, and return the answer.

        Args:
            endpoint: What is asked.
            request: The question.
            timeout_s: How long the answer may take.
            content_type: How question and answer travel; bytes are a third shorter in MessagePack.

        Raises:
            BusError: What the far side raised; `Unavailable` when nobody listens or the broker
                is away; `DeadlineExceeded` after `timeout_s`.
        """
        answer = await self.relay(
            endpoint.subject_of(self.root, request),
            codec.encode(request, content_type),
            headers={codec.CONTENT_TYPE: content_type},
            timeout_s=timeout_s,
        )
        return codec.decode(answer.body, endpoint.reply, answer.headers.get(codec.CONTENT_TYPE))

    async def call_each(
        self,
        endpoint: Endpoint[Req, Rep],
        request: Req,
        slots: Iterable[tuple[str, int]],
        *,
        timeout_s: float = 10.0,
    ) -> list[Rep]:
        """Ask each of these instances, and return the answers of those that gave one in time.

        Args:
            endpoint: What is asked.
            request: The question.
            slots: Plugin and slot of each.
            timeout_s: How long all of them have.
        """
        subject = endpoint.subject_of(self.root, request)
        body, headers = codec.encode(request), {codec.CONTENT_TYPE: codec.JSON}
        asked = (
            self.relay(
                self._asker.to(subject, f"{token(plugin)}.{slot}"),
                body, headers=headers, timeout_s=timeout_s,
            )
            for plugin, slot in slots
        )  # fmt: skip
        answers = await asyncio.gather(*asked, return_exceptions=True)
        replies = []
        for answer in answers:
            if isinstance(answer, Answer):
                kind = answer.headers.get(codec.CONTENT_TYPE)
                replies.append(codec.decode(answer.body, endpoint.reply, kind))
            elif not isinstance(answer, BusError):
                raise answer
        return replies

    async def relay(
        self,
        subject: str,
        body: bytes | Reference,
        *,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 10.0,
    ) -> Answer:
        """Send a body as it is and return the answer as it is; raises as `call` does.

        One that is too large for a message is put aside, and its reference sent (`bus.bodies`).
        One that is put aside already is deleted when this is over.

        Where several instances are known to answer a subject, the one that is likely to be the
        quickest is asked (`bus.balance`), else the broker picks one. One that does not serve it
        any more says so, and the broker picks then. A busy one answers so at once; then one more
        is asked.
        """
        reply: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        asked = self.ask(subject, body, settle(reply), headers=headers, timeout_s=timeout_s)
        # It may be large, and has been sent.
        del body
        try:
            return await reply
        except asyncio.CancelledError:
            asked.cancel()
            raise

    def ask(
        self,
        subject: str,
        body: bytes | Reference,
        done: Done,
        *,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 10.0,
    ) -> Asked:
        """Do what `relay` does without waiting: `done` is called with the answer or the error.

        It may be called before this returns. What is returned can be cancelled.
        """
        return ask(self._asker, subject, body, headers or {}, timeout_s, done)

    def lost(self, ended: Ended) -> None:
        """End the requests that a process had when it ended: they are told so with 503.

        They are not sent to another one: what they ask for may be done, and may be what ended it.
        """
        self._asker.lost(ended)

    async def publish(
        self, feed: Feed[Req], payload: Req, content_type: str = codec.JSON, **tokens: str | int
    ) -> None:
        """Send a one-way message.

        Raises:
            TooLarge: It is over the broker's limit.
            Unavailable: The broker is away and the buffer for that time is full.
        """
        body = codec.encode(payload, content_type)
        self.check_size(body)
        subject = feed.subject(self.root, **tokens)
        await self.send(feed.template, subject, "", body, {codec.CONTENT_TYPE: content_type})

    @asynccontextmanager
    async def follow(self, feed: Feed[Req], **tokens: str | int) -> AsyncGenerator[Followed[Req]]:
        """Listen to a feed while inside; a token that is not given is a wildcard.

        Entered, it hears all that is published from then on.
        """
        followed = Followed(feed.template.split("."), feed.payload)
        heard = await self._nc.subscribe(feed.subject(self.root, **tokens), cb=followed.take)
        try:
            await self.barrier()
            yield followed
        finally:
            await self._forget(heard)

    async def _leave(self) -> None:
        """Ask nothing more; what was put aside for requests goes first."""
        self._asker.close()
        # A broker that is away takes nothing out.
        await self._asker.closed(LEAVE_S if self._nc.is_connected else 0.0)


@asynccontextmanager
async def connect(
    url: str, *, name: str, root: str = DEFAULT_ROOT, patience_s: float = 5.0
) -> AsyncGenerator[Client]:
    """Be connected while inside; reconnects for ever, and ends the body if that is refused.

    Args:
        url: `nats://[user:password@]host:port`, several with commas between.
        name: Who connects, as the broker's operator sees it.
        root: The first token of every subject.
        patience_s: How long a broker may take to answer for the first time.

    Raises:
        Unavailable: No broker answers there, it refuses us, or it has no JetStream.
    """
    max_bytes, share_bytes = body_max_bytes(), bodies_share_bytes()

    def made(nc: Nats) -> Client:
        return Client(nc, root, max_bytes, share_bytes)

    async with connected(url, name=name, patience_s=patience_s, made=made) as client:
        try:
            await client.store.check()
            yield client
        finally:
            await client._leave()  # noqa: SLF001

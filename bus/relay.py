"""The caller's side of requests: whom to ask, what became of it, and asking once more.

A request is no task and has no future: it stands in the table of those who wait for a reply, and
whoever asked is called when it is over. So asking costs little more than writing and reading two
messages. Only what cannot be done at once (the broker is away, the short way of `bus.wire` cannot
be gone, or the body is too large for one message and is put aside first) takes a task.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any, Final

import structlog

from bus.answers import ERROR_CODE, IDEMPOTENT, NOT_SERVED, SLOT, Answer, Ended, error_in
from bus.balance import Balance, Outcome
from bus.bodies import IN_ITS_PLACE, REFERENCE, RETRY_AFTER_S, Bodies, Reference
from bus.connection import Connection
from bus.errors import (
    BusError,
    Conflict,
    DeadlineExceeded,
    InstanceEnded,
    Internal,
    InvalidRequest,
    NobodyListens,
    Overloaded,
    Unavailable,
    Unprocessable,
)
from bus.late import Late
from bus.wire import TRACEPARENT, Incoming, Replies, Waiting, Wire

TIMEOUT_MS: Final = "Bkg-Timeout-Ms"
# The broker ends a connection that sends a longer control line than 4 KiB; the inbox stands there
# beside the subject.
SUBJECT_MAX_CHARS: Final = 3_072
# When to ask again after the end of who was asked: another process takes a second at least.
AGAIN_S: Final = 2.0

log = structlog.get_logger("bus.relay")

# The W3C trace context of the request that is being worked on; log records carry its trace id.
trace: ContextVar[str | None] = ContextVar("trace", default=None)


# Called once with what became of a request; must not raise.
Done = Callable[[Answer | BusError], None]


class Asker:
    """What requests are sent with, and who answers what how fast.

    Args:
        connection: Where to.
        wire: Its short way.
        replies: Who waits for which reply on it.
        bodies: Where bodies go that are too large for one message.
    """

    def __init__(
        self, connection: Connection, wire: Wire, replies: Replies, bodies: Bodies
    ) -> None:
        self.connection = connection
        self.wire = wire
        self.replies = replies
        self.bodies = bodies
        self.balance = Balance()
        self.late = Late()
        self.calls = f"{connection.root}.call."
        self.instances = f"{connection.root}.inst."
        self.loop = asyncio.get_running_loop()
        # What could not be done at once.
        self.working: set[asyncio.Task[None]] = set()

    def to(self, subject: str, slot: str | None) -> str:
        """Return where one slot hears what a subject means; the subject itself without one."""
        if slot is None:
            return subject
        return f"{self.instances}{slot}.call.{subject[len(self.calls) :]}"

    def lost(self, ended: Ended) -> None:
        """End the requests that a process had when it ended."""
        slot = f"{ended.plugin}.{ended.slot}"

        def had(waiting: Waiting) -> bool:
            return isinstance(waiting, Asked) and waiting.is_with(slot, ended)

        self.replies.end_where(
            had,
            InstanceEnded(
                f"{slot} on {ended.host}, which had it, {ended.how}; it may have been done",
                retry_after_s=AGAIN_S,
                details={"state": "ended", "host": ended.host, "reason": ended.how},
            ),
        )

    def only_asks(self, subject: str, slot: str, alone: frozenset[str]) -> bool:
        """Tell whether what is sent to a subject comes to one slot, as far as can be known.

        Args:
            subject: What is asked.
            slot: Who is meant.
            alone: The capabilities that only this one has.
        """
        if not subject.startswith(self.calls):
            return subject.startswith(f"{self.instances}{slot}.")
        if self.balance.alone(subject, slot):
            return True
        asked = f"{subject[len(self.calls) :]}."
        return any(asked.startswith(f"{capability}.") for capability in alone)

    def close(self) -> None:
        """Do nothing more, but delete what is put aside: `closed` waits for that."""
        self.late.close()
        self.replies.close()
        for working in self.working:
            working.cancel()

    async def closed(self, timeout_s: float) -> None:
        """Wait until nothing is put aside any more; what takes longer is left to its age."""
        deadline = self.loop.time() + timeout_s
        # They were cancelled, and have bodies taken out that had not got a name yet.
        if self.working:
            await asyncio.wait(self.working, timeout=timeout_s)
        await self.bodies.gone(max(0.0, deadline - self.loop.time()))


class Asked:
    """A request that waits for its answer.

    Where several instances are known to answer, the one that is likely to be the quickest is asked
    (`bus.balance`), else the broker picks one. One that does not serve it any more says so, and
    the broker picks then. A busy one answers so at once; then one more is asked.

    Attributes:
        deadline: Until when the answer may come, in the event loop's time.
        inbox: Where it comes to; empty while nothing is sent.
        over: Whether nobody waits for an answer any more.
        slot: Who is asked; None: whoever the broker picks.
    """

    __slots__ = (
        "_again", "_aside", "_asker", "_balanced", "_body", "_done", "_headers", "_sent_at",
        "_subject", "_timeout_s", "_working", "deadline", "inbox", "over", "slot",
    )  # fmt: skip

    def __init__(
        self,
        asker: Asker,
        subject: str,
        body: bytes | Reference,
        headers: Mapping[str, str],
        timeout_s: float,
        done: Done,
    ) -> None:
        self._asker = asker
        self._subject = subject
        self._headers = headers
        # Where the body is, when it is too large for one message.
        self._aside: Reference | None = None
        if isinstance(body, Reference):
            self._refer(body)
        else:
            self._body = body
        self._timeout_s = timeout_s
        self._done = done
        self._balanced = subject.startswith(asker.calls)
        self._again = False
        self.slot: str | None = None
        self._sent_at = 0.0
        self._working: asyncio.Task[None] | None = None
        self.deadline = asker.loop.time() + timeout_s
        self.inbox = ""
        self.over = False

    def begin(self) -> None:
        """Ask for the first time."""
        if len(self._subject) > SUBJECT_MAX_CHARS:
            self._end(
                InvalidRequest(
                    f"the subject has {len(self._subject):,} characters, at most "
                    f"{SUBJECT_MAX_CHARS:,} are taken; a name in it is too long"
                )
            )
            return
        if len(self._body) > self._asker.connection.max_payload:
            self._work(self._put_aside)
        else:
            self._send()

    def cancel(self) -> None:
        """Wait no longer; `done` is not called any more."""
        if self.over:
            return
        self.over = True
        self._withdraw()
        self._tell("dropped")
        if self._aside:
            self._asker.bodies.let_go(self._aside)

    # --- What became of it ------------------------------------------------------------------------

    def replied(self, message: Incoming) -> None:
        """Take the reply."""
        self.inbox = ""
        found = message.headers
        by = found.get(SLOT)
        if ERROR_CODE in found:
            error = self._as_ours(error_in(message.data, found))
            if NOT_SERVED in found:
                self._nobody(error.message)
            elif isinstance(error, Overloaded) and not self._again:
                self._tell("busy", by)
                if self._balanced and self._asker.balance.alone(self._subject, by):
                    # It would be asked again just when it has too much to do.
                    self._end(error)
                else:
                    self._again = True
                    self._ask_another()
            else:
                self._tell("busy" if isinstance(error, Overloaded) else "failed", by)
                self._end(error)
        elif not message.data and found.get("Status") == "503":
            self._nobody(f"nobody answers {self._subject} just now")
        else:
            self._tell("answered", by, IDEMPOTENT in found)
            self._end(Answer(message.data, found))

    def ended(self, error: TimeoutError | Unavailable) -> None:
        """Take note that there will be no reply."""
        if isinstance(error, Unavailable):
            self._tell("ended" if isinstance(error, InstanceEnded) else "dropped")
            self._end(error)
            return
        self._withdraw()
        self._tell("gone")
        self._end(DeadlineExceeded(f"{self._subject} gave no answer within {self._timeout_s:g} s"))

    def is_with(self, slot: str, ended: Ended) -> bool:
        """Tell whether a slot had it, as a whole, when the process there ended."""
        if self._sent_at >= ended.before or (self._working and not self._working.done()):
            return False
        if self.slot is None:
            return self._asker.only_asks(self._subject, slot, ended.alone)
        return self.slot == slot

    def _as_ours(self, error: BusError) -> BusError:
        """Return an error as whoever asked may read it: what became of our body is not theirs."""
        lost = isinstance(error, Conflict | Unprocessable) and error.field in REFERENCE
        if self._aside is None or not lost:
            return error
        return Unavailable(
            f"the broker has lost the body of {self._aside.size:,} bytes, which {self._subject} "
            f"was asked with ({error.message}); ask again",
            retry_after_s=RETRY_AFTER_S,
        )

    def _nobody(self, said: str) -> None:
        """Ask the group where a slot does not serve it any more."""
        self._tell("gone")
        if self.slot is None:
            self._end(NobodyListens(said, retry_after_s=2))
        else:
            self.slot = None
            self._send()

    def _ask_another(self) -> None:
        if self._balanced:
            now = time.perf_counter()
            choice = self._asker.balance.choose(self._subject, now, again=True)
            self.slot = choice.slot if choice else None
        self._send()

    def _tell(self, outcome: Outcome, by: str | None = None, idempotent: bool = False) -> None:
        """Let the balance know what became of it."""
        if self._balanced:
            now = time.perf_counter()
            self._asker.balance.ended(
                self._subject, self.slot, outcome, now, by, now - self._sent_at, idempotent
            )

    def _end(self, outcome: Answer | BusError) -> None:
        if not self.over:
            self.over = True
            if self._aside:
                self._asker.bodies.let_go(self._aside)
            self._done(outcome)

    def _withdraw(self) -> None:
        """Have the work on it stopped, and not sent what is not yet."""
        if self._working:
            self._working.cancel()
        if self.inbox:
            self._asker.replies.forget(self.inbox)
            self._asker.connection.give_up(self.inbox)
            self.inbox = ""

    # --- Sending ----------------------------------------------------------------------------------

    def _send(self) -> None:
        asker = self._asker
        if not asker.connection.connected:
            self._work(self._send_when_online)
            return
        left_s = self._timeout_s
        # Else it begins now.
        if self._sent_at or self._aside:
            left_s = max(0.001, self.deadline - asker.loop.time())
        self._sent_at = time.perf_counter()
        if TRACEPARENT not in self._headers:
            made = trace.get() or new_traceparent()
            self._headers = {**self._headers, TRACEPARENT: made}
        headers = {TIMEOUT_MS: str(int(left_s * 1000)), **self._headers}
        to = self._subject if self.slot is None else asker.to(self._subject, self.slot)
        inbox = asker.replies.inbox(asker.replies.reserve(1))
        try:
            sent = asker.wire.send(to, inbox, self._body, headers)
        except BusError as error:
            self._tell("dropped")
            self._end(error)
            return
        if sent:
            self.inbox = inbox
            asker.replies.await_at(inbox, self)
        else:
            self._work(partial(self._send_long, to, headers))

    async def _send_when_online(self) -> None:
        await self._come_online()
        if not self.over:
            self._send()

    async def _come_online(self) -> None:
        left_s = self.deadline - self._asker.loop.time()
        await self._asker.connection.come_online(min(max(left_s, 0.001), 2.0))

    async def _put_aside(self) -> None:
        """Put the body into the store, and ask with its reference."""
        bodies, body = self._asker.bodies, self._body
        bodies.check_size(len(body))
        await self._come_online()
        try:
            async with asyncio.timeout_at(self.deadline):
                reference = await bodies.put(_once(body), len(body))
        except TimeoutError:
            raise DeadlineExceeded(
                f"{self._subject} was not asked: its body of {len(body):,} bytes was not stored "
                f"within {self._timeout_s:g} s"
            ) from None
        self._refer(reference)
        if self.over:
            bodies.let_go(reference)
        else:
            self._send()

    def _refer(self, reference: Reference) -> None:
        """Have the body's reference travel in its place."""
        self._aside = reference
        self._body = IN_ITS_PLACE
        self._headers = {**self._headers, **reference.headers}

    async def _send_long(self, to: str, headers: dict[str, str]) -> None:
        asker = self._asker
        self.inbox = asker.replies.inbox(asker.replies.reserve(1))
        asker.replies.await_at(self.inbox, self)
        await asker.connection.send(self._subject, to, self.inbox, self._body, headers)

    def _work(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do what cannot be done at once."""

        async def done() -> None:
            failure: BusError | None = None
            try:
                await work()
            except BusError as error:
                failure = error
            if failure and not self.over:
                self._asker.replies.forget(self.inbox)
                self.inbox = ""
                self._tell("dropped")
                self._end(failure)

        def forget(task: asyncio.Task[None]) -> None:
            self._asker.working.discard(task)
            error = None if task.cancelled() else task.exception()
            if error:
                log.error("request.not_sent", subject=self._subject, exc_info=error)
            if not self.over and (error or task.cancelled()):
                self._asker.replies.forget(self.inbox)
                self._tell("dropped")
                self._end(
                    Internal(f"{self._subject} could not be asked")
                    if error
                    else Unavailable("the connection to the broker was closed")
                )

        self._working = task = self._asker.loop.create_task(done())
        self._asker.working.add(task)
        task.add_done_callback(forget)


def new_traceparent() -> str:
    """Return a W3C trace context that begins here."""
    # Random enough to tell requests apart; never zero, which the standard forbids.
    both = f"{random.getrandbits(192) | 1 << 64 | 1:048x}"
    return f"00-{both[:32]}-{both[32:]}-01"


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body


def settle(reply: "asyncio.Future[Any]") -> Done:
    """Return what gives a future the outcome of a request."""

    def done(outcome: Answer | BusError) -> None:
        if reply.done():
            return
        if isinstance(outcome, BusError):
            reply.set_exception(outcome)
        else:
            reply.set_result(outcome)

    return done

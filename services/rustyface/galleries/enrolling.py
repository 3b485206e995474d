"""Many entries on their way into a gallery: never over what others have stored meanwhile.

Each is stored under the condition that its subject has had no event since the one that it was
decided by. What holds for all of a batch, that the gallery was not deleted and the import not
undone, is borne by fences: messages that say nothing, and expect it. So the broker refuses a batch
that anybody has got ahead of. Then it is looked at again, decided again, and tried again.
"""

import asyncio
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from bus import codec
from bus import messages as m
from bus.errors import Conflict, DeadlineExceeded, NotFound
from bus.streams import Outgoing, Stored, Stream
from bus.subjects import GALLERY_HEAD, GALLERY_IMPORT, GALLERY_REJECTION
from services.rustyface.galleries.asked import NewEntry
from services.rustyface.galleries.enrolment import (
    Counted,
    Existing,
    Plan,
    Write,
    there_already,
    undone,
)
from services.rustyface.galleries.gallery import Gallery
from services.rustyface.galleries.ledger import TRIES, WAIT_S, Ledger, deleted
from services.rustyface.galleries.projection import FENCE, MESSAGE_ID


class Enrolling:
    """Entries that are stored in one gallery.

    Args:
        ledger: The events of all galleries.
        stream: Where they are.
        root: The first token of their subjects.
        there: The gallery.
        imports: Those that the entries are from: undone, nothing more of them is stored.
        existing: What is done with entries that are there.

    Attributes:
        counts: How entries counted so far.
        written: How many of them were stored.
        revision: The last event of them.
    """

    def __init__(
        self,
        ledger: Ledger,
        stream: Stream,
        root: str,
        there: Gallery,
        imports: Collection[str],
        existing: Existing,
    ) -> None:
        self.counts: Counter[Counted] = Counter()
        self.written = 0
        self.revision = there.revision
        self._ledger = ledger
        self._stream = stream
        self._root = root
        self._there = there
        self._imports = imports
        self._existing = existing
        self._expected: list[tuple[str, int]] = []
        # By id, the last events that were found at the broker.
        self._last: dict[str, int] = {}

    async def begin(self) -> None:
        """Look whether the imports go on, and what the fences have to expect.

        Raises:
            Conflict: One of them was undone.
        """
        head = GALLERY_HEAD.subject(self._root, gallery=self._there.head.id)
        self._expected = [(head, self._there.head_seq)]
        for imported in self._imports:
            subject = GALLERY_IMPORT.subject(
                self._root, gallery=self._there.head.id, imported=imported
            )
            stored, seq = await self._ledger.last(subject, self._there)
            if stored and codec.decode(stored.body, m.GalleryImport).state == "undone":
                raise undone(imported)
            self._expected.append((subject, seq))

    async def store(self, entries: Sequence[NewEntry]) -> None:
        """Store entries that the broker takes as one.

        Raises:
            NotFound: The gallery was deleted meanwhile; none of them is in it, nor in one that has
                its name by now.
            Conflict: The import was undone meanwhile. Or there are such entries, and may not be.
        """
        waiting = {one.id: one for one in entries}
        for tried in range(2 * TRIES):
            plan = Plan(self._there, waiting.values(), self._existing, self._last)
            if plan.refused:
                raise there_already(self._there, plan.refused, self.written)
            # Where somebody is always ahead of one of them, the others need not wait for it.
            stored = await self._carried_out(plan.writes, together=tried < TRIES)
            self.counts.update(one.counted for one in stored)
            self.written += len(stored)
            if len(stored) == len(plan.writes):
                self.counts.update(plan.without)
                return
            for one in stored:
                del waiting[one.event.id]
        raise Conflict(
            f"others keep changing the same entries of {self._there.head.id!r}; try again",
            retry_after_s=1,
        )

    async def _carried_out(self, writes: Sequence[Write], *, together: bool) -> Sequence[Write]:
        """Store entries and return those that were; having looked again unless all were."""
        if not writes:
            return writes
        messages = [
            self._ledger.outgoing(subject, one.event, codec.MSGPACK, (subject, one.after))
            for one in writes
            for subject in (self._subject(one),)
        ]
        if together:
            try:
                seq = await self._stream.append_batch([*messages, *self._fences()])
            except Conflict:
                self._remember(await self._last_of(messages), writes)
                await self._catch_up()
                return []
            if seq is not None:
                self.revision = seq
                return writes
        return await self._one_by_one(writes, messages)

    async def _one_by_one(
        self, writes: Sequence[Write], messages: Sequence[Outgoing]
    ) -> Sequence[Write]:
        """Store entries by themselves, without a fence: the gallery is looked at afterwards."""
        seqs = await self._stream.append_each(messages)
        last = await self._last_of(
            [one for one, seq in zip(messages, seqs, strict=True) if seq is None]
        )
        stored = []
        for write, message, appended in zip(writes, messages, seqs, strict=True):
            found = last.get(message.subject)
            # It was stored before, and its answer lost.
            ours = found and found.headers.get(MESSAGE_ID) == message.headers[MESSAGE_ID]
            if (seq := found.seq if found and ours else appended) is not None:
                stored.append((write, seq))
        self._remember(last, writes)
        try:
            await self._catch_up()
        except NotFound:
            await self._take_out(stored)
            raise
        self.revision = max([self.revision, *(seq for _, seq in stored)])
        return [write for write, _ in stored]

    async def _last_of(self, messages: Sequence[Outgoing]) -> dict[str, Stored]:
        """Return the last event of each message's subject, from the broker."""
        if not messages:
            return {}
        subjects = [one.subject for one in messages]
        try:
            async with asyncio.timeout(WAIT_S):
                found = self._stream.read(subjects, latest_only=True)
                return {one.subject: one async for one in found}
        except TimeoutError:
            raise DeadlineExceeded(
                f"the broker did not say within {WAIT_S:g} s what it has of {len(subjects):,} "
                "entries",
                retry_after_s=1,
            ) from None

    def _remember(self, last: Mapping[str, Stored], writes: Sequence[Write]) -> None:
        for one in writes:
            if (found := last.get(self._subject(one))) is not None:
                self._last[one.event.id] = found.seq
            else:
                self._last.pop(one.event.id, None)

    async def _catch_up(self) -> None:
        """Read what the others have stored.

        Raises:
            NotFound: The gallery was deleted.
            Conflict: The import was undone.
        """
        try:
            now = await self._ledger.known(self._there.head.id)
        except NotFound:
            raise deleted(self._there) from None
        if now.head_seq != self._there.head_seq:
            raise deleted(self._there)
        await self.begin()

    async def _take_out(self, stored: Iterable[tuple[Write, int]]) -> None:
        """Leave nothing of what has come into a gallery that is another by now, or none."""
        now = self._ledger.projection.galleries.get(self._there.head.id)
        for write, seq in stored:
            if now is None or seq < now.head_seq:
                await self._stream.remove(seq, erase=True)
            else:
                await self._ledger.bury(now, write.event.id, seq)

    def _fences(self) -> list[Outgoing]:
        event = m.GalleryRejection(id=FENCE, at=m.now(), subject="")
        subject = GALLERY_REJECTION.subject(
            self._root, gallery=self._there.head.id, rejection=FENCE
        )
        return [self._ledger.outgoing(subject, event, codec.JSON, one) for one in self._expected]

    def _subject(self, write: Write) -> str:
        return self._ledger.entry_subject(self._there, write.event.id)

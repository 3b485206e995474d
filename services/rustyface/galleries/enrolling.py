"""Many entries on their way into a gallery: never over what others have stored meanwhile.

Each is stored under the condition that its subject has had no event since the one that it was
decided by. What holds for all of a batch, that the gallery was not deleted and the import not
undone, is borne by fences: messages that say nothing, and expect it. So the broker refuses a batch
that anybody has got ahead of. Then it is looked at again, decided again, and tried again.
"""

import asyncio
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from bus import codec
from bus import messages as m
from bus.errors import Conflict, NotFound
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
from services.rustyface.galleries.ledger import TRIES, Ledger, deleted
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
        self._head = GALLERY_HEAD.subject(root, gallery=there.head.id)
        # By subject, what the broker had last when it was looked at again.
        self._last: dict[str, Stored] = {}

    async def begin(self) -> None:
        """Look whether the imports go on, and what the fences have to expect.

        Raises:
            Conflict: One of them was undone.
        """
        self._expected = [(self._head, self._there.head_seq)]
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
        size, conflicts = len(waiting), 0
        while waiting and conflicts < 2 * TRIES:
            tried = list(waiting.values())[-size:]
            plan = Plan(self._there, tried, self._existing, self._last_of)
            if plan.refused:
                raise there_already(self._there, plan.refused, self.written)
            stored = await self._carried_out(plan.writes)
            self.counts.update(one.counted for one in stored)
            self.written += len(stored)
            if len(stored) == len(plan.writes):
                self.counts.update(plan.without)
                for one in tried:
                    del waiting[one.id]
                size, conflicts = len(waiting), 0
                continue
            for write in stored:
                del waiting[write.event.id]
            # Somebody keeps changing one of them, or erases what was there: the others need not
            # wait for it. The last ones first, as erasing begins with the first ones.
            conflicts = 0 if stored else conflicts + 1
            if size == 1:
                waiting = {one.id: one for one in tried} | waiting
            elif conflicts > 1:
                size //= 2
        if waiting:
            raise Conflict(
                f"others keep changing the same entries of {self._there.head.id!r}; try again",
                retry_after_s=1,
            )

    async def _carried_out(self, writes: Sequence[Write]) -> Sequence[Write]:
        """Store entries and return those that were; having looked again unless all were."""
        if not writes:
            return writes
        messages = [
            self._ledger.outgoing(subject, one.event, codec.MSGPACK, (subject, one.after))
            for one in writes
            for subject in (self._subject(one.event.id),)
        ]
        try:
            seq = await self._stream.append_batch([*messages, *self._fences()])
        except Conflict:
            await self._look_again(messages)
            await self._check()
            return []
        if seq is None:
            return await self._one_by_one(writes, messages)
        self.revision = seq
        return writes

    async def _one_by_one(
        self, writes: Sequence[Write], messages: Sequence[Outgoing]
    ) -> Sequence[Write]:
        """Store entries by themselves, without a fence: the gallery is looked at afterwards."""
        seqs = await self._stream.append_each(messages)
        await self._look_again(messages)
        stored = []
        for write, message, seq in zip(writes, messages, seqs, strict=True):
            found = self._last.get(message.subject)
            # It was stored before, and its answer lost.
            ours = found and found.headers.get(MESSAGE_ID) == message.headers[MESSAGE_ID]
            if (at := found.seq if found and ours else seq) is not None:
                stored.append((write, at))
        try:
            await self._check()
        except NotFound:
            await self._take_out(stored)
            raise
        self.revision = max([self.revision, *(seq for _, seq in stored)])
        return [write for write, _ in stored]

    async def _look_again(self, messages: Sequence[Outgoing]) -> None:
        """Ask the broker what it has last of all that was expected, and read that far."""
        subjects = [self._head, *(one.subject for one in messages)]
        # Each by itself: a consumer that is to give all would wait for what is erased meanwhile.
        # And not the newest of all: the broker is slow to say that while much is erased.
        found = await asyncio.gather(*(self._stream.last(one) for one in subjects))
        self._last = {one.subject: one for one in found if one is not None}
        await self._ledger.wait(max([0, *(one.seq for one in self._last.values())]))

    async def _check(self) -> None:
        """Look whether entries still may be stored.

        Raises:
            NotFound: The gallery was deleted.
            Conflict: The import was undone.
        """
        head = self._last.get(self._head)
        if head is None or head.seq != self._there.head_seq:
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

    def _last_of(self, entry: str) -> int:
        found = self._last.get(self._subject(entry)) if self._last else None
        return 0 if found is None else found.seq

    def _fences(self) -> list[Outgoing]:
        event = m.GalleryRejection(id=FENCE, at=m.now(), subject="")
        subject = GALLERY_REJECTION.subject(
            self._root, gallery=self._there.head.id, rejection=FENCE
        )
        return [self._ledger.outgoing(subject, event, codec.JSON, one) for one in self._expected]

    def _subject(self, entry: str) -> str:
        return self._ledger.entry_subject(self._there, entry)

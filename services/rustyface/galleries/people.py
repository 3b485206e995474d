"""The persons of galleries, and how they change: one event each, however many entries they have.

What others may change at the same moment is appended under the condition that its own subject has
not had another message; whoever comes second looks again, so that nobody's change is lost. Where a
name has to be nobody's, the condition is wider: see `_watched`.
"""

import secrets
from collections.abc import Iterable, Sequence
from typing import Any, Final

import structlog

from bus import codec
from bus import messages as m
from bus.errors import Conflict, InvalidRequest, NotFound
from bus.subjects import GALLERY_REJECTION, GALLERY_SUBJECT, gallery_events
from services.rustyface.galleries.asked import NewRejection, Removed, Repeated
from services.rustyface.galleries.cosines import Floats
from services.rustyface.galleries.gallery import Gallery, Kept
from services.rustyface.galleries.ledger import TRIES
from services.rustyface.galleries.persons import MOVES_MAX_BYTES, Person
from services.rustyface.galleries.projection import LITTLE_ENDIAN, addressed
from services.rustyface.galleries.questions import Questions

# Of a renaming. Each that fails on other renamings has let one of those through.
RENAMING_TRIES: Final = 64
# So many of them on the condition that nothing at all has come into the gallery. Where entries come
# without a pause it never holds, and with 200,000 of them the broker takes 7 ms to look at it.
STRICT_TRIES: Final = 4

log = structlog.get_logger("rustyface.galleries")


class People(Questions):
    """Every gallery of the deployment: their persons renamed, merged, removed, and told apart."""

    async def move_subjects(
        self,
        gallery: str,
        subjects: Sequence[str],
        into: str,
        *,
        fresh: bool = False,
        by: str | None = None,
    ) -> tuple[int, int]:
        """Let persons be called otherwise, all their entries at once; an event for each of them.

        Args:
            gallery: Where.
            subjects: Who.
            into: Their new name: somebody's, whom they are merged into, or nobody's yet.
            fresh: Whether it has to be nobody's.
            by: Who asks.

        Returns:
            How many entries that concerned, and the revision.

        Raises:
            NotFound: There is no such gallery or person.
            Conflict: The new name is somebody's, with `fresh`.
            InvalidRequest: It is nobody but `into` who would be moved.
        """
        there = await self._ledger.known(gallery)
        sources = [one for one in dict.fromkeys(subjects) if one != into]
        if not sources:
            raise InvalidRequest(f"{into!r} is called so already", field="into")
        people = [person_of(there, one) for one in sources]
        concerned = [len(one.entries) for one in people]
        revision = 0
        for source, count in zip(sources, concerned, strict=True):
            revision = await self._move(gallery, source, into, fresh=fresh)
            self._tell(
                gallery,
                "rename-subject" if fresh else "merge-subjects",
                revision,
                by,
                subject=source,
                into=into,
                count=count,
            )
        await self._ledger.settle(there, [])
        return sum(concerned), revision

    async def remove_subject(
        self, gallery: str, subject: str, *, by: str | None = None, dry_run: bool = False
    ) -> Removed:
        """Remove a person: all their entries and rejections, here, in the stream, in the history.

        Raises:
            NotFound: There is no such gallery or person.
        """
        there = await self._ledger.known(gallery)
        person = person_of(there, subject)
        if dry_run:
            return Removed(len(person.entries), there.revision)
        with self._ledger.taking() as (message_id, dead):
            revision = await self._move(gallery, subject, None, message_id=message_id)
            await self._forget_history(there, subject, revision)
            gone = sum(one.entry is not None for one in dead)
            self._tell(gallery, "remove-subject", revision, by, count=gone)
            return Removed(gone, revision, await self._ledger.settle(there, dead))

    async def reject(
        self,
        gallery: str,
        subject: str,
        *,
        entry: str | None = None,
        vector: Floats | None = None,
        by: str | None = None,
    ) -> tuple[str, int]:
        """Say of a face that it is not somebody: who looks like it is not named so again.

        Args:
            gallery: Where.
            subject: Who it is not.
            entry: The face, if it is an entry.
            vector: The face, if it is not.
            by: Who asks.

        Returns:
            The rejection's id, and the revision.

        Raises:
            NotFound: There is no such gallery, person or entry.
            Conflict: The entry is that person's, or one of both has left at this moment.
            InvalidRequest: There is no face, or it is none for this gallery.
        """
        there = await self._ledger.known(gallery)
        person = person_of(there, subject)
        if entry is not None:
            if self._entry(there, entry).person is person:
                raise Conflict(
                    f"the entry {entry!r} is enrolled as {subject!r}; move-entry says whom it "
                    "shows instead",
                    field="entry_id",
                )
            vector = there.matrix.vector(entry)
        if vector is None:
            raise InvalidRequest("reject-match needs an entry_id or an embedding", field="entry_id")
        said = NewRejection(id=secrets.token_hex(8), subject=subject, vector=vector, entry=entry)
        revision = await self._append_rejection(there, said, self._face(there, said))
        await self.wait(revision)
        if not there.rejects(said.id):
            # It would be about whoever is given the name next.
            await self._ledger.settle(there, [])
            raise Conflict(
                f"{subject!r}, or the face that they are not, has left at this moment",
                field="subject",
            )
        self._tell(gallery, "reject-match", revision, by, subject=subject)
        return said.id, revision

    async def reject_again(
        self, gallery: str, rejections: Sequence[NewRejection], *, by: str | None = None
    ) -> Repeated:
        """Say here what was said of faces elsewhere; all of it is acknowledged when this returns.

        A rejection that is there, by its id, stays as it is. One that the same import has brought
        already counts as added, so that an import may be taken up again.

        Raises:
            NotFound: There is no such gallery, or it was deleted meanwhile.
            InvalidRequest: A face is none for this gallery.
        """
        there = await self._ledger.known(gallery)
        said: list[NewRejection] = []
        refused: list[tuple[NewRejection, str]] = []
        added = known = 0
        for one in rejections:
            before, person = there.rejections.get(one.id), there.named(one.subject)
            if before is not None:
                ours = one.imported is not None and before.imported == one.imported
                added, known = added + ours, known + (not ours)
            elif person is None:
                refused.append((one, f"who it is about is nobody of the dataset {gallery!r}"))
            elif one.entry is not None and one.entry not in there.entries:
                refused.append((one, f"the dataset {gallery!r} has no entry {one.entry!r}"))
            elif one.entry is not None and there.entries[one.entry].person is person:
                refused.append((one, f"the entry {one.entry!r} is enrolled as whom it is about"))
            else:
                said.append(one)
        # Before anything is stored: an entry may leave meanwhile, with its face.
        faces = [self._face(there, one) for one in said]
        revision = there.revision
        for one, face in zip(said, faces, strict=True):
            revision = await self._append_rejection(there, one, face)
        if said:
            await self.wait(revision)
            imports = {one.imported for one in said}
            self._tell(
                gallery,
                "reject-match",
                revision,
                by,
                count=len(said),
                imported=imports.pop() if len(imports) == 1 else None,
            )
        # Renamed or removed between the look and the append, it would be about nobody.
        lost = [one for one in said if not there.rejects(one.id)]
        if lost:
            refused += [(one, "whom or what it is about has left at this moment") for one in lost]
            await self._ledger.settle(there, [])
        return Repeated(added + len(said) - len(lost), known, refused, revision)

    async def withdraw(
        self, gallery: str, rejection: str, *, by: str | None = None, dry_run: bool = False
    ) -> Removed:
        """Take a rejection back; raises NotFound if there is no such gallery or rejection."""
        there = await self._ledger.known(gallery)
        known = there.rejections.get(rejection)
        if known is None:
            raise NotFound(
                f"the dataset {gallery!r} has no rejection {rejection!r}", field="rejection"
            )
        if dry_run:
            return Removed(0, there.revision)
        called, since = known.person.name, known.since
        with self._ledger.taking() as (message_id, dead):
            revision = await self._ledger.withdraw(there, rejection, message_id)
            await self.wait(revision)
            # They may have been renamed meanwhile.
            subject, _ = there.moves.walk(called, since, revision)
            self._tell(gallery, "withdraw-rejection", revision, by, subject=subject)
            return Removed(0, revision, await self._ledger.clear(dead))

    def _face(self, there: Gallery, rejection: NewRejection) -> Floats:
        """Return the face of a rejection at length 1: its own, or its entry's."""
        vector = rejection.vector
        if vector is None and rejection.entry is not None:
            vector = there.matrix.vector(rejection.entry)
        if vector is None:
            raise InvalidRequest("a rejection needs an entry or an embedding", field="embedding")
        return there.matrix.unit(vector)

    async def _append_rejection(self, there: Gallery, one: NewRejection, face: Floats) -> int:
        event = m.GalleryRejection(
            id=one.id,
            at=m.now(),
            subject=one.subject,
            embedding=face.astype(LITTLE_ENDIAN).tobytes(),
            entry=one.entry,
            imported=one.imported,
        )
        address = GALLERY_REJECTION.subject(self._root, gallery=there.head.id, rejection=one.id)
        return await self._ledger.append(there, address, event, content_type=codec.MSGPACK)

    async def _move(
        self,
        gallery: str,
        name: str,
        into: str | None,
        *,
        fresh: bool = False,
        message_id: str | None = None,
    ) -> int:
        """Append one move of a name; with `fresh`, to a name that is nobody's."""
        subject = GALLERY_SUBJECT.subject(self._root, gallery=gallery, subject=addressed(name))
        there = await self._ledger.known(gallery)
        for i in range(RENAMING_TRIES if fresh else TRIES):
            watched = self._watched(gallery, strict=i < STRICT_TRIES) if fresh else subject
            _, expected = await self._ledger.last(watched, there)
            # In this order: all that was there by then is known, and whatever came after it makes
            # the broker refuse.
            there = await self._ledger.known(gallery)
            person_of(there, name)
            if fresh and into is not None and there.named(into) is not None:
                raise Conflict(
                    f"the dataset {gallery!r} has somebody called {into!r} already; "
                    "merge-subjects makes one person of both",
                    field="into",
                )
            event = there.moves.next(name, into)
            if len(codec.encode(event)) > MOVES_MAX_BYTES:
                raise Conflict(
                    f"the name {name!r} was moved {len(event.moves) - 1:,} times already, which is "
                    "all that can be kept of it; use another name",
                    field="subject",
                )
            try:
                return await self._ledger.append_after(
                    there, subject, expected, event, message_id=message_id, watched=watched
                )
            except Conflict:
                continue
        raise contended(f"the name {name!r}")

    def _watched(self, gallery: str, *, strict: bool) -> str:
        """Return what has to stay as it was seen, so that a free name stays free.

        Else names alone: nobody else is moved to the name. A face that is enrolled under it between
        the look and the move then is one of the person who comes to it, as a moment later.
        """
        if strict:
            return gallery_events(self._root, gallery)
        return GALLERY_SUBJECT.subject(self._root, gallery=gallery)

    def _entry(self, there: Gallery, entry: str) -> Kept:
        kept = there.entries.get(entry)
        if kept is None:
            raise NotFound(
                f"the dataset {there.head.id!r} has no entry {entry!r}", field="entry_id"
            )
        return kept

    async def _forget_history(self, there: Gallery, name: str, until: int) -> None:
        """Delete the history of whoever bore a name until an event, under all that they bore."""
        await self._ledger.telling.all_told()
        await self._history.forget(there.head.id, there.moves.trail(name, until))

    async def _forget_leavers(self, there: Gallery, were: Iterable[tuple[str, int]]) -> None:
        """Delete the history of those of some who have no entry left.

        Args:
            there: Where.
            were: What they were called, and since which event.
        """
        for name in {there.moves.walk(*one)[0] for one in were}:
            if name is not None and there.named(name) is None:
                await self._forget_history(there, name, there.revision)

    def _tell(self, gallery: str, action: str, revision: int, by: str | None, **more: Any) -> None:
        change = m.GalleryChange(
            dataset=gallery, at=m.now(), action=action, by=by, revision=revision, **more
        )
        self._ledger.telling.put(change)


def person_of(there: Gallery, name: str) -> Person:
    """Return who bears a name in a gallery; raises NotFound if nobody does."""
    person = there.named(name)
    if person is None:
        raise NotFound(f"the dataset {there.head.id!r} has nobody called {name!r}", field="subject")
    return person


def contended(what: str) -> Conflict:
    """Return what is said to whoever came second too often."""
    return Conflict(f"others keep changing {what}; try again", retry_after_s=1)

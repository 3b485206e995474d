"""The galleries: what they are asked, and how they are changed. Every change is one event.

An entry is appended under the condition that its gallery's subject has not had another message
since: an entry is never accepted into a gallery that was deleted meanwhile. What others may change
at the same moment (a person's moves, an import, and what an import brings) is appended under the
condition that its own subject has not; whoever comes second looks again, so that nobody's change is
lost.
"""

from collections.abc import Callable, Sequence
from datetime import datetime

import msgspec
import structlog

from bus import codec
from bus import messages as m
from bus.errors import Conflict, NotFound
from bus.subjects import GALLERY_IMPORT, GALLERY_SETTINGS
from services.rustyface.galleries import filters
from services.rustyface.galleries.asked import (
    METADATA_MAX_BYTES,
    Found,
    Match,
    NewEntry,
    NewRejection,
    Outcome,
    Query,
    Removed,
    Repeated,
    check_metadata,
)
from services.rustyface.galleries.clearing import Ended
from services.rustyface.galleries.cosines import Floats
from services.rustyface.galleries.enrolling import Enrolling
from services.rustyface.galleries.enrolment import (
    Existing,
    Plan,
    distinct,
    event_of,
    parts,
    there_already,
    undone,
)
from services.rustyface.galleries.gallery import Gallery
from services.rustyface.galleries.ledger import TRIES
from services.rustyface.galleries.people import People, contended
from services.rustyface.galleries.projection import LITTLE_ENDIAN, utc

__all__ = [
    "LITTLE_ENDIAN",
    "METADATA_MAX_BYTES",
    "Floats",
    "Found",
    "Galleries",
    "Match",
    "NewEntry",
    "NewRejection",
    "Outcome",
    "Query",
    "Removed",
    "Repeated",
    "check_metadata",
]

log = structlog.get_logger("rustyface.galleries")


class Galleries(People):
    """Every gallery of the deployment: asked, and changed."""

    async def create(
        self,
        gallery: str,
        *,
        at: datetime | None = None,
        settings: m.DatasetSettings | None = None,
        imported: str | None = None,
        by: str | None = None,
    ) -> int:
        """Create a gallery and return its revision; one that is there stays as it is.

        Args:
            gallery: Its name.
            at: When it was created; now if None.
            settings: What it is set to.
            imported: The import that makes it.
            by: Who asks.

        Raises:
            Conflict: There is an event of that gallery which this worker cannot read.
        """
        await self.wait(await self.newest())
        if (there := self._galleries.get(gallery)) is not None:
            return there.revision
        self._ledger.check_readable(gallery)
        head = m.GalleryHead(
            id=gallery,
            at=utc(at or m.now()),
            embedder=self._embedder,
            dimensions=self._dimensions,
            embedder_digest=self._digest,
            # With the gallery itself: nobody ever sees it without, whoever is killed when.
            settings=settings,
            imported=imported,
        )
        try:
            revision = await self._ledger.append_head(
                head, self._ledger.projection.heads.get(gallery, 0)
            )
        except Conflict:
            # Another replica has created it at the same moment.
            revision = await self.newest()
            await self.wait(revision)
            return revision
        await self.wait(revision)
        self._tell(gallery, "create", revision, by)
        return revision

    async def configure(
        self,
        gallery: str,
        settings: m.DatasetSettings | Callable[[m.DatasetSettings], m.DatasetSettings],
        *,
        by: str | None = None,
        since: int | None = None,
    ) -> int:
        """Set what can be set for a gallery; of two at the same moment, neither is lost.

        Args:
            gallery: Which.
            settings: To what; or what is made of what it is set to.
            by: Who asks.
            since: Only if it has not been set to anything else since this revision.

        Raises:
            NotFound: There is no such gallery.
            Conflict: It has been.
        """
        subject = GALLERY_SETTINGS.subject(self._root, gallery=gallery)
        for _ in range(TRIES):
            there = await self._ledger.known(gallery)
            last, seq = await self._ledger.last(subject, there)
            if last is not None and last.seq > self.revision:
                # Set again between the two questions, and not read yet.
                continue
            if since is not None and last is not None and last.seq > since:
                raise Conflict(
                    f"the settings of dataset {gallery!r} were changed at revision {last.seq}, "
                    f"after revision {since}; read them again",
                    revision=there.revision,
                )
            made = settings if isinstance(settings, m.DatasetSettings) else settings(there.settings)
            event = m.GallerySettings(at=m.now(), settings=made)
            try:
                revision = await self._ledger.append_after(there, subject, seq, event)
            except Conflict:
                continue
            self._tell(gallery, "configure", revision, by)
            return revision
        raise contended(f"the settings of {gallery!r}")

    async def delete(self, gallery: str, *, by: str | None = None) -> Removed:
        """Delete a gallery with all that it has, here, in the stream and in the history.

        Raises:
            NotFound: There is none.
            Conflict: Another replica deletes it at the same moment.
        """
        there = await self._ledger.known(gallery)
        head = msgspec.structs.replace(there.head, at=m.now(), deleted=True)
        with self._ledger.taking() as (message_id, dead):
            revision = await self._ledger.append_head(head, there.head_seq, message_id)
            log.info("dataset.deleted", dataset=gallery, revision=revision, by=by)
            ended = Ended(gallery, revision, revision)
            with self._ledger.ending(ended):
                await self.wait(revision)
                # Killed in between, the next worker that starts does it.
                await self._ledger.telling.all_told()
                await self._history.forget(gallery)
                unerased = await self._ledger.clear(dead, ended=ended)
        return Removed(sum(one.entry is not None for one in dead), revision, unerased)

    # --- Entries ----------------------------------------------------------------------------------

    async def enrol(self, gallery: str, entry: NewEntry, *, by: str | None = None) -> int:
        """Store an entry, replacing one of the same id; return the revision that has it.

        Waits for the broker alone: once that has the entry, nothing here makes it an error.

        Raises:
            NotFound: There is no such gallery, or it was deleted at this moment.
            InvalidRequest: Its vectors come from another embedder, or the metadata cannot be
                stored.
            TooLarge: The metadata are.
            Conflict: The import that it is from was undone.
        """
        if entry.imported is not None:
            # Over what others have enrolled, it is not the import's to be undone.
            return (await self.enrol_many(gallery, [entry], existing="replace", by=by)).revision
        check_metadata(entry.metadata)
        there = await self._ledger.known(gallery)
        self._check_embedder(there)
        action = "replaced" if entry.id in there.entries else "enrolled"
        revision = await self._ledger.append_entry(there, event_of(entry))
        self._tell(gallery, action, revision, by, entry=entry.id, subject=entry.subject)
        return revision

    async def enrol_many(
        self,
        gallery: str,
        entries: Sequence[NewEntry],
        *,
        existing: Existing,
        by: str | None = None,
    ) -> Outcome:
        """Store entries, many at a time; all are acknowledged when this returns.

        What others store meanwhile is dealt with as what was there: see `Enrolling`. An entry that
        replaces another bears no import: undoing the import leaves it. One that the same import
        has brought already counts as added, so that an import may be taken up again.

        Args:
            gallery: Where.
            entries: Which; of several with one id the last one counts, if they may replace.
            existing: What is done with those that are there already: `skip`, `replace` or `fail`;
                `renew` replaces what the same import has brought, and skips others.
            by: Who asks.

        Raises:
            NotFound: There is no such gallery, or it was deleted meanwhile.
            InvalidRequest: A vector or metadata cannot be stored; nothing was then.
            Conflict: Some are there already and `existing` is `fail`: nothing was stored of these
                entries if they were there at the start. If they came meanwhile, those before them
                were; the message says how many. Or the import was undone.
        """
        for entry in entries:
            self.check_vector(entry.vector)
        sizes = {one.id: check_metadata(one.metadata) + one.vector.nbytes for one in entries}
        if existing in ("replace", "renew"):
            await self._ledger.keeps_up()
        there = await self._ledger.known(gallery)
        self._check_embedder(there)
        fresh, doubled = distinct(entries, existing)
        if existing == "fail":
            refused = Plan(there, fresh.values(), existing).refused + doubled
            if refused:
                raise there_already(there, refused)
        imports = {one.imported for one in entries if one.imported is not None}
        enrolling = Enrolling(self._ledger, self._stream, self._root, there, imports, existing)
        await enrolling.begin()
        for part in parts(fresh.values(), sizes):
            await enrolling.store(part)
        if enrolling.written:
            self._tell(
                gallery,
                "enrolled",
                enrolling.revision,
                by,
                count=enrolling.written,
                imported=imports.pop() if len(imports) == 1 else None,
            )
        enrolling.counts["replaced" if existing == "replace" else "skipped"] += len(doubled)
        counts = enrolling.counts
        return Outcome(counts["added"], counts["replaced"], counts["skipped"], enrolling.revision)

    async def remove(
        self, gallery: str, entry: str, *, imported: str | None = None, by: str | None = None
    ) -> Removed:
        """Remove an entry, here and from the stream's files.

        Args:
            gallery: Where.
            entry: Which.
            imported: Only if this import has brought it, and nobody has replaced it since.
            by: Who asks.

        Raises:
            NotFound: There is no such gallery or entry.
        """
        for _ in range(TRIES):
            there = await self._ledger.known(gallery)
            kept = self._entry(there, entry)
            if imported is not None and kept.imported != imported:
                raise NotFound(
                    f"the entry {entry!r} of the dataset {gallery!r} is not of import {imported!r}",
                    field="entry_id",
                )
            were = {(kept.person.name, kept.since)} if kept.person else set()
            with self._ledger.taking() as (message_id, dead):
                try:
                    revision = await self._ledger.append_entry(
                        there,
                        m.GalleryEntry(id=entry, at=m.now()),
                        message_id,
                        since=None if imported is None else kept.seq,
                    )
                except Conflict:
                    continue
                await self.wait(revision)
                # Only in the history of somebody who stays.
                [subject] = [
                    there.moves.walk(*one, revision)[0]
                    for one in were
                    if there.named(there.moves.walk(*one)[0]) is not None
                ] or [None]
                self._tell(gallery, "remove-entry", revision, by, entry=entry, subject=subject)
                await self._forget_leavers(there, were)
                return Removed(1, revision, await self._ledger.settle(there, dead))
        raise contended(f"the entry {entry!r}")

    async def move_entry(
        self, gallery: str, entry: str, subject: str | None, *, by: str | None = None
    ) -> int:
        """Say whom an entry shows; None is nobody.

        Raises:
            NotFound: There is no such gallery or entry, or one of them was removed at this moment.
        """
        for _ in range(TRIES):
            there = await self._ledger.known(gallery)
            kept = self._entry(there, entry)
            vector = there.matrix.vector(entry)
            before, since = kept.person.name if kept.person else None, kept.since
            if before == subject or vector is None:
                return there.revision
            event = m.GalleryEntry(
                id=entry,
                at=kept.at,
                embedding=vector.astype(LITTLE_ENDIAN).tobytes(),
                metadata=filters.read(kept.metadata),
                subject=subject,
                image=kept.image,
                quality=filters.measures(kept.quality),
                imported=kept.imported,
            )
            try:
                revision = await self._ledger.append_entry(there, event, since=kept.seq)
            except Conflict:
                continue
            now = self._galleries.get(gallery)
            if now is not None and now is not there:
                # The gallery was deleted and made anew: a deleted face must not be in the new one.
                await self._ledger.bury(now, entry, revision)
                raise NotFound(
                    f"the dataset {gallery!r} was deleted at this moment", field="dataset"
                )
            if before is not None and there.moves.walk(before, since, revision)[0] is None:
                # Whom it showed was removed meanwhile, and all their faces with them. What was
                # enrolled in its place since is another.
                await self._ledger.bury(there, entry, revision)
                raise NotFound(
                    f"{before!r}, whom the entry {entry!r} showed, was removed at this moment",
                    field="entry_id",
                )
            if before is not None:
                # Renamed meanwhile, it would be told of whoever bears that name by now.
                before, _ = there.moves.walk(before, since, revision)
            # One for each of them: what one person's ring says goes with that person alone.
            if before is not None:
                self._tell(gallery, "move-entry", revision, by, entry=entry, subject=before)
            if subject is not None:
                self._tell(gallery, "move-entry", revision, by, entry=entry, subject=subject)
            await self._ledger.settle(there, [])
            return revision
        raise contended(f"the entry {entry!r}")

    # --- Imports ----------------------------------------------------------------------------------

    async def begin_import(self, gallery: str, record: m.GalleryImport) -> int:
        """Record that an import begins, or goes on.

        Raises:
            NotFound: There is no such gallery.
            Conflict: It was undone.
        """
        return await self._record(gallery, record)

    async def end_import(self, gallery: str, record: m.GalleryImport) -> int:
        """Record how an import ended; raises as `begin_import` does."""
        revision = await self._record(gallery, record)
        count = record.added + record.replaced
        self._tell(gallery, "import", revision, record.by, count=count, imported=record.id)
        return revision

    async def undo_import(
        self, gallery: str, imported: str, *, by: str | None = None, dry_run: bool = False
    ) -> Removed:
        """Take out all entries that an import has added and nobody has replaced since.

        The rejections that it has brought leave as well. What is affected are entries.

        Raises:
            NotFound: There is no such gallery or import.
        """
        for _ in range(TRIES):
            there = await self._ledger.known(gallery)
            record = there.imports.get(imported)
            if record is None:
                raise NotFound(
                    f"the dataset {gallery!r} has no import {imported!r}", field="imported"
                )
            brought = [one for one in there.entries.values() if one.imported == imported]
            if dry_run or record.state == "undone":
                return Removed(len(brought), there.revision)
            people = {(one.person.name, one.since) for one in brought if one.person}
            ended = msgspec.structs.replace(record, state="undone")
            with self._ledger.taking() as (message_id, dead):
                try:
                    revision = await self._append_import(there, record, ended, message_id)
                except Conflict:
                    continue
                await self._forget_leavers(there, people)
                gone = sum(one.entry is not None for one in dead)
                self._tell(gallery, "undo-import", revision, by, count=gone, imported=imported)
                return Removed(gone, revision, await self._ledger.settle(there, dead))
        raise contended(f"the import {imported!r}")

    # --- Beneath ----------------------------------------------------------------------------------

    async def _record(self, gallery: str, record: m.GalleryImport) -> int:
        for _ in range(TRIES):
            there = await self._ledger.known(gallery)
            self._check_import(there, record.id)
            seen = there.imports.get(record.id)
            try:
                return await self._append_import(there, seen, record, None)
            except Conflict:
                continue
        raise contended(f"the import {record.id!r}")

    async def _append_import(
        self,
        there: Gallery,
        seen: m.GalleryImport | None,
        record: m.GalleryImport,
        message_id: str | None,
    ) -> int:
        """Record an import if what it was decided by, `seen`, still is what is there."""
        subject = GALLERY_IMPORT.subject(self._root, gallery=there.head.id, imported=record.id)
        stored, expected = await self._ledger.last(subject, there)
        newest = None if stored is None else codec.decode(stored.body, m.GalleryImport)
        # Not what is known by now: an undoing that was read meanwhile would be written over.
        if newest != seen:
            raise Conflict(f"the import {record.id!r} was changed at this moment")
        return await self._ledger.append_after(
            there, subject, expected, record, message_id=message_id
        )

    def _check_import(self, there: Gallery, imported: str | None) -> None:
        record = there.imports.get(imported) if imported is not None else None
        if record is not None and record.state == "undone":
            raise undone(record.id)

"""What galleries are asked: lists, settings, searches. Nothing here changes anything."""

import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bus import codec
from bus import messages as m
from bus.errors import InvalidRequest
from bus.streams import Stream
from bus.subjects import GALLERY_HEAD
from services.rustyface.galleries import filters
from services.rustyface.galleries.asked import Found, Match, NewRejection, Query
from services.rustyface.galleries.clearing import DropImage
from services.rustyface.galleries.cosines import Floats
from services.rustyface.galleries.gallery import Gallery, Kept
from services.rustyface.galleries.history import History
from services.rustyface.galleries.ledger import Ledger
from services.rustyface.galleries.search import NOBODY, Result, Search


class Questions:
    """Every gallery of the deployment, in memory: what can be asked of them.

    Args:
        stream: Where the events are.
        root: The first token of their subjects.
        embedder: What makes the vectors of new galleries.
        dimensions: How long those are.
        digest: Which version of the embedder; None if that is not known.
        changes: Where the history is kept; None keeps none.
        drop_image: Deletes a kept image that no entry names any more.

    Attributes:
        caught_up: Set once everything that was there at the start has been read.
    """

    def __init__(
        self,
        stream: Stream,
        root: str,
        embedder: str,
        dimensions: int,
        *,
        digest: str | None = None,
        changes: Stream | None = None,
        drop_image: DropImage | None = None,
    ) -> None:
        self._root = root
        self._stream = stream
        self._embedder = embedder
        self._dimensions = dimensions
        self._digest = digest
        self._history = History(changes, root)
        self._ledger = Ledger(stream, root, self._history, drop_image)
        self._galleries = self._ledger.projection.galleries
        self.caught_up = self._ledger.caught_up

    async def run(self) -> None:
        """Read the events, from the first one on, until cancelled.

        Raises:
            Unavailable: The stream is not the one that was read so far.
        """
        await self._ledger.run()

    @property
    def revision(self) -> int:
        """The last event that was read."""
        return self._ledger.projection.revision

    @property
    def count(self) -> int:
        """How many entries there are in all galleries."""
        return sum(len(there.entries) for there in self._galleries.values())

    @property
    def dimensions(self) -> int:
        """How long the vectors of new galleries are."""
        return self._dimensions

    @property
    def images(self) -> set[str]:
        """Every kept image that an entry names, by SHA-256."""
        return set(self._ledger.projection.images)

    async def names_image(self, image: str) -> bool:
        """Tell whether an entry names an image, as of the broker's newest revision."""
        return await self._ledger.names_image(image)

    def __contains__(self, gallery: str) -> bool:
        return gallery in self._galleries

    def datasets(self) -> list[m.DatasetInfo]:
        """Return every gallery, by name."""
        return [_info(self._galleries[name]) for name in sorted(self._galleries)]

    async def wait(self, revision: int) -> None:
        """Wait until this replica has read an event; raises DeadlineExceeded if it does not."""
        await self._ledger.wait(revision)

    async def newest(self) -> int:
        """Return the newest revision that the broker has, of all galleries together.

        Raises:
            Unavailable: It is older than what was read, and this replica ends.
        """
        return await self._ledger.newest()

    async def settings(self, gallery: str) -> m.DatasetSettings:
        """Return what a gallery is set to; raises NotFound if there is none."""
        return (await self._ledger.known(gallery)).settings

    async def stats(
        self,
        gallery: str,
        thresholds: Callable[[str, m.DatasetSettings], tuple[float, float]],
        expected_false: Callable[[str, float, int], float | None],
    ) -> m.DatasetStats:
        """Return a gallery in full; raises NotFound if there is none.

        Args:
            gallery: Which.
            thresholds: Says of an embedder which cosine counts in searches and in comparisons.
            expected_false: Says of an embedder how many entries of strangers reach a cosine, of so
                many.
        """
        there = await self._ledger.known(gallery)
        info = _info(there)
        search, verify = thresholds(there.head.embedder, there.settings)
        return m.DatasetStats(
            id=gallery,
            settings=there.settings,
            threshold=search,
            verify_threshold=verify,
            expected_false=expected_false(info.embedder, search, info.entries),
            embedder=info.embedder,
            embedder_digest=there.head.embedder_digest,
            dimensions=info.dimensions,
            entries=info.entries,
            subjects=info.subjects,
            unnamed=info.entries - sum(len(one.entries) for one in there.persons.values()),
            images=there.images,
            rejections=len(there.rejections),
            memory_bytes=there.matrix.nbytes,
            revision=there.revision,
            created_at=info.created_at,
            updated_at=info.updated_at,
        )

    async def entries(
        self,
        gallery: str,
        *,
        limit: int,
        after: str | None = None,
        subject: str | None = None,
        entry: str | None = None,
        filter: Mapping[str, Any] | None = None,  # noqa: A002 - as it is called in the message
        embeddings: bool = False,
    ) -> tuple[list[m.EntryInfo], str | None, int]:
        """Return entries by id, the one after which the next ones begin, and how many there are.

        Args:
            gallery: Where.
            limit: How many at most.
            after: Only those behind this one.
            subject: Only this person's.
            entry: Only this one.
            filter: As in `SearchFaces`.
            embeddings: Whether they come with their vectors.

        Raises:
            NotFound: There is no such gallery.
            InvalidRequest: The filter cannot be understood.
        """
        there = await self._ledger.known(gallery)
        person = None if subject is None else there.named(subject)
        of_them = there.entries.keys() if subject is None else person.entries if person else set()
        ids: Sequence[str]
        if entry is not None:
            ids = [entry] if entry in of_them else []
        else:
            ids = there.ordered() if subject is None else sorted(of_them)
        if filter:
            wanted, groups = _compiled(there, filter)
            fitting = set(await there.joined.read(lambda rows: rows.matching(wanted, groups)))
            ids = [one for one in ids if one in fitting]
        shown, following = _page(ids, limit, after)
        return self.picked(gallery, shown, embeddings=embeddings), following, len(ids)

    def ids(self, gallery: str) -> list[str]:
        """Return the entries that this replica knows in a gallery, in order; none without one."""
        there = self._galleries.get(gallery)
        return list(there.ordered()) if there else []

    def deleted_since(self, gallery: str, revision: int) -> bool:
        """Tell whether something of a gallery was deleted after a revision, or all of it."""
        there = self._galleries.get(gallery)
        if there is None:
            # Of one that cannot be read nobody knows; it was not deleted.
            return gallery not in self._ledger.projection.unreadable
        return max(there.head_seq, there.deleted_at) > revision

    def picked(
        self, gallery: str, entries: Iterable[str], *, embeddings: bool = False
    ) -> list[m.EntryInfo]:
        """Return those of some entries that this replica knows, in the order asked for."""
        there = self._galleries.get(gallery)
        if there is None:
            return []
        return [
            _told(there, kept, embeddings=embeddings)
            for one in entries
            if (kept := there.entries.get(one)) is not None
        ]

    def stands(self, gallery: str, entries: Iterable[str]) -> list[tuple[int, str | None] | None]:
        """Return the event of entries that this replica knows, and whom they show; None of others.

        Who is called otherwise by now has the new name, though the event is the old one.
        """
        there = self._galleries.get(gallery)
        if there is None:
            return [None for _ in entries]
        found = (there.entries.get(one) for one in entries)
        return [
            None if kept is None else (kept.seq, kept.person.name if kept.person else None)
            for kept in found
        ]

    def deletions(self, gallery: str) -> tuple[int, int] | None:
        """Return the event that made a gallery, and how much has left it since; None without one.

        While it stays the same, nothing was deleted.
        """
        there = self._galleries.get(gallery)
        return None if there is None else (there.head_seq, there.deletions)

    async def subjects(
        self, gallery: str, *, limit: int, after: str | None = None
    ) -> tuple[list[m.SubjectInfo], str | None, int]:
        """Return persons by name, the one after which the next begin, and how many there are.

        Raises:
            NotFound: There is no such gallery.
        """
        there = await self._ledger.known(gallery)
        names = there.names()
        shown, following = _page(names, limit, after)
        told = [
            m.SubjectInfo(
                id=name,
                entries=len(there.persons[name].entries),
                last_seen=max(there.entries[one].at for one in there.persons[name].entries),
                rejections=sorted(there.persons[name].rejections),
            )
            for name in shown
        ]
        return told, following, len(names)

    async def imports(self, gallery: str) -> list[m.GalleryImport]:
        """Return a gallery's imports, the newest first; raises NotFound without a gallery."""
        there = await self._ledger.known(gallery)
        return sorted(there.imports.values(), key=lambda one: (one.at, one.id), reverse=True)

    def rejections(self, gallery: str) -> list[NewRejection]:
        """Return what this replica knows of faces in a gallery that are not somebody; in order.

        Those whose person or entry has gone are about to be withdrawn, and left out.
        """
        there = self._galleries.get(gallery)
        if there is None:
            return []
        return [
            NewRejection(
                id=one.id,
                subject=one.person.name,
                vector=one.vector,
                entry=one.entry,
                imported=one.imported,
            )
            for _, one in sorted(there.rejections.items())
            if there.has_sense(one)
        ]

    def maker(self, gallery: str) -> str | None:
        """Return the import that made a gallery, as far as this replica knows; None if none did."""
        there = self._galleries.get(gallery)
        return there.head.imported if there else None

    async def ended_maker(self, gallery: str) -> str | None:
        """Return the import that made a gallery which was deleted; None of one that is there."""
        if gallery in self:
            return None
        stored = await self._stream.last(GALLERY_HEAD.subject(self._root, gallery=gallery))
        head = None if stored is None else codec.decode(stored.body, m.GalleryHead)
        return head.imported if head is not None and head.deleted else None

    async def history(
        self, gallery: str, *, limit: int, after: int | None = None
    ) -> tuple[list[m.GalleryChange], int | None]:
        """Return what was done to a gallery, the newest first, and where the next ones begin.

        Raises:
            NotFound: There is no such gallery.
        """
        await self._ledger.known(gallery)
        await self._ledger.telling.all_told()
        return await self._history.read(gallery, limit=limit, before=after)

    async def search(self, gallery: str, query: Query) -> Found:
        """Return the nearest entries, best first; by person as the gallery's scoring has it.

        Raises:
            NotFound: There is no such gallery.
            InvalidRequest: The vector has another length than the gallery's, or comes from
                another embedder; or the filter cannot be understood; or the broker has no such
                revision yet.
        """
        [found] = await self.search_each(gallery, query, [query.vector])
        return found

    async def search_each(
        self, gallery: str, query: Query, vectors: Sequence[Floats]
    ) -> list[Found]:
        """Search for each of some vectors in place of the query's own, all at one revision.

        Raises as `search` does.
        """
        there = await self._ledger.known(gallery, query.revision)
        if query.by_embedder:
            self._check_embedder(there)
        if query.k < 1:
            raise InvalidRequest(f"top_k is {query.k}, it has to be at least 1", field="top_k")
        wanted, groups = _compiled(there, query.filter)
        searches = [
            Search(
                query=there.matrix.unit(vector),
                k=query.k,
                threshold=query.threshold,
                by_group=query.group_by == "subject",
                by_mean=there.settings.scoring == "mean",
                wanted=wanted,
                groups=groups,
                rejected=there.rejected() or None,
            )
            for vector in vectors
        ]
        revision, settings = there.revision, there.settings
        # One alone joins those of others; several have to be answered from the same rows.
        results: list[Result] = (
            [await there.joined.search(searches[0])]
            if len(searches) == 1
            else await there.joined.read(lambda rows: rows.find(searches))
        )
        return [_found(there, result, revision, settings) for result in results]

    def check_vector(self, vector: Floats) -> None:
        """Raise InvalidRequest unless a vector from elsewhere could be this embedder's.

        Nothing else may be appended: every replica would pass over it for ever.
        """
        shape = (self._dimensions,)
        if vector.shape != shape or not np.isfinite(vector).all() or not vector.any():
            raise InvalidRequest(
                f"an embedding of {self._embedder} has {self._dimensions} finite numbers, not all "
                f"of them zero; this one has {len(vector)}",
                field="embedding",
            )

    def _check_embedder(self, there: Gallery) -> None:
        head = there.head
        if (head.embedder, head.dimensions) != (self._embedder, self._dimensions):
            raise InvalidRequest(
                f"the dataset {head.id!r} holds vectors of {head.embedder}, this worker "
                f"makes those of {self._embedder}; they cannot be mixed",
                field="dataset",
            )
        # Galleries are older than the digest in their event.
        theirs = head.embedder_digest
        if theirs is not None and self._digest is not None and theirs != self._digest:
            raise InvalidRequest(
                f"the dataset {head.id!r} holds vectors of {head.embedder} {theirs[:12]}, this "
                f"worker makes those of {self._digest[:12]}; they cannot be mixed: reembed makes "
                "a new dataset",
                field="dataset",
            )


def _found(there: Gallery, result: Result, revision: int, settings: m.DatasetSettings) -> Found:
    matches = [
        Match(
            _told(there, kept),
            hit.score,
            kept.person.name if kept.person else None,
            hit.group_score if hit.group != NOBODY else None,
            hit.group_entries if hit.group != NOBODY else None,
            hit.rejected,
        )
        for hit in result.hits
        # Removed while the rows were searched, it is not shown any more.
        if (kept := there.entries.get(hit.id)) is not None
    ]
    return Found(matches, revision, result.searched, settings, there.head.embedder)


def _compiled(
    there: Gallery, asked: Mapping[str, Any]
) -> tuple[tuple[filters.Wanted, ...], frozenset[int] | None]:
    wanted, subjects = filters.compiled(asked)
    if subjects is None:
        return wanted, None
    people = [there.persons.get(name) for name in subjects]
    return wanted, frozenset(one.group for one in people if one is not None)


def _page(ids: Sequence[str], limit: int, after: str | None) -> tuple[Sequence[str], str | None]:
    """Return the ids behind one, and after which one the next page begins."""
    first = 0 if after is None else bisect.bisect_right(ids, after)
    shown = ids[first : first + limit]
    return shown, shown[-1] if first + limit < len(ids) else None


def _told(there: Gallery, kept: Kept, *, embeddings: bool = False) -> m.EntryInfo:
    vector = there.matrix.vector(kept.id) if embeddings else None
    return m.EntryInfo(
        id=kept.id,
        last_seen=kept.at,
        revision=kept.seq,
        subject=kept.person.name if kept.person else None,
        metadata=filters.read(kept.metadata),
        quality=filters.measures(kept.quality),
        image=kept.image,
        imported=kept.imported,
        embedding=None if vector is None else vector.tolist(),
    )


def _info(there: Gallery) -> m.DatasetInfo:
    # Somebody of whom there are only faces that are not them is no person of the gallery.
    hollow = {one.person.name for one in there.rejections.values() if not one.person.entries}
    return m.DatasetInfo(
        id=there.head.id,
        entries=len(there.entries),
        created_at=there.head.at,
        updated_at=there.updated_at,
        embedder=there.head.embedder,
        dimensions=there.head.dimensions,
        subjects=len(there.persons) - len(hollow),
        embedder_digest=there.head.embedder_digest,
    )

"""One gallery in memory: its entries, its persons, its vectors, and how each change leaves them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import msgspec
import numpy as np

from bus import messages as m
from services.rustyface.galleries.cosines import Floats
from services.rustyface.galleries.joined import Joined
from services.rustyface.galleries.persons import Moves, Person, Rejection
from services.rustyface.galleries.search import NOBODY, Matrix


class Kept(msgspec.Struct, gc=False):
    """An entry without its vector, which is in the matrix.

    Attributes:
        id: Its own.
        seq: Its event.
        since: Since which event its person has borne the name.
        at: When it was enrolled.
        metadata: As MessagePack; empty for none. Few entries are ever shown: bytes are small.
        person: Who it shows.
        image: SHA-256 of the kept image.
        quality: Of the face, as MessagePack; empty for nothing known.
        imported: The import that brought it.
        older: It has taken the place of an event that may not be erased yet.
    """

    id: str
    seq: int
    since: int
    at: datetime
    metadata: bytes
    person: Person | None
    image: str | None
    quality: bytes
    imported: str | None
    older: bool = False


@dataclass
class Gallery:
    """One gallery.

    Attributes:
        head: Its own last event.
        head_seq: That event's sequence; what is below it belongs to a predecessor.
        matrix: The vectors.
        joined: Where they are searched.
        entries: By id.
        persons: By name: all who have an entry or a rejection.
        rejections: By id.
        imports: By id.
        moves: Of all names.
        settings: As they are set.
        revision: The last event that concerned it.
        stored_at: When the broker stored that, in nanoseconds since 1970.
        images: How many entries name an image.
        deletions: How many entries and rejections have left it.
        deleted_at: The last event that somebody has deleted something by.
    """

    head: m.GalleryHead
    head_seq: int
    matrix: Matrix
    joined: Joined
    revision: int
    stored_at: int
    images: int = 0
    deletions: int = 0
    deleted_at: int = 0
    entries: dict[str, Kept] = field(default_factory=dict)
    persons: dict[str, Person] = field(default_factory=dict)
    rejections: dict[str, Rejection] = field(default_factory=dict)
    imports: dict[str, m.GalleryImport] = field(default_factory=dict)
    moves: Moves = field(default_factory=Moves)
    settings: m.DatasetSettings = field(default_factory=m.DatasetSettings)
    _groups: int = 0
    _ordered: list[str] | None = None
    _names: list[str] | None = None
    _rejected: dict[int, Floats] | None = None

    @property
    def updated_at(self) -> datetime:
        """When its newest event was stored: entries may come with times of their own."""
        return datetime.fromtimestamp(self.stored_at / 1e9, UTC)

    def person(self, name: str) -> Person:
        """Return who bears a name now; somebody new if nobody does."""
        if (there := self.persons.get(name)) is not None:
            return there
        made = self.persons[name] = Person(name, self._groups)
        self._groups += 1
        return made

    def named(self, name: str | None) -> Person | None:
        """Return who bears a name and has an entry; None bears nobody."""
        there = None if name is None else self.persons.get(name)
        return there if there is not None and there.entries else None

    def ordered(self) -> list[str]:
        """Return the ids of all entries, in their order."""
        if self._ordered is None:
            self._ordered = sorted(self.entries)
        return self._ordered

    def names(self) -> list[str]:
        """Return the names of all who have an entry, in their order."""
        if self._names is None:
            self._names = sorted(name for name, one in self.persons.items() if one.entries)
        return self._names

    def rejected(self) -> Mapping[int, Floats]:
        """Return the faces that are not somebody, by the person's number; never changed after."""
        if self._rejected is None:
            faces: dict[int, list[Floats]] = {}
            for one in self.rejections.values():
                faces.setdefault(one.person.group, []).append(one.vector)
            self._rejected = {group: np.stack(rows) for group, rows in faces.items()}
        return self._rejected

    def has_sense(self, rejection: Rejection) -> bool:
        """Tell whether both are there: who was rejected, and the entry whose face they are not.

        An entry that is enrolled as that person by now has sense no more.
        """
        if not rejection.person.entries:
            return False
        if rejection.entry is None:
            return True
        face = self.entries.get(rejection.entry)
        return face is not None and face.person is not rejection.person

    def has_pointless(self) -> bool:
        """Tell whether there is a rejection that has no sense."""
        return any(not self.has_sense(one) for one in self.rejections.values())

    def rejects(self, rejection: str) -> bool:
        """Tell whether there is a rejection, by its id, that has sense."""
        there = self.rejections.get(rejection)
        return there is not None and self.has_sense(there)

    def add(self, kept: Sequence[Kept], rows: Floats) -> None:
        """Add entries with their vectors, or replace them."""
        groups = [NOBODY if one.person is None else one.person.group for one in kept]
        self.matrix.put_many([one.id for one in kept], rows, groups, [one.metadata for one in kept])
        before = [self.entries.get(one.id) for one in kept]
        if None in before:
            self._ordered = None
        self.images -= sum(one is not None and one.image is not None for one in before)
        for one in kept:
            self.entries[one.id] = one
            self.images += one.image is not None
            if one.person is not None:
                if not one.person.entries:
                    self._names = None
                one.person.entries.add(one.id)
        # Only now, or somebody whose entries are all replaced would be gone in between.
        for old, new in zip(before, kept, strict=True):
            if old is not None and old.person is not new.person:
                self._part(old)

    def forget(self, ids: Iterable[str]) -> list[Kept]:
        """Take entries out; return those that were there."""
        gone = [kept for one in ids if (kept := self.entries.pop(one, None)) is not None]
        if gone:
            self._ordered = None
        self.deletions += len(gone)
        self.images -= sum(kept.image is not None for kept in gone)
        self.matrix.delete_many([kept.id for kept in gone])
        for kept in gone:
            self._part(kept)
        return gone

    def reject(self, rejection: Rejection) -> None:
        """Add a rejection."""
        self.rejections[rejection.id] = rejection
        rejection.person.rejections[rejection.id] = rejection
        self._rejected = None

    def withdraw(self, rejection: str) -> Rejection | None:
        """Take a rejection out; return it if it was there."""
        gone = self.rejections.pop(rejection, None)
        if gone is not None:
            self.deletions += 1
            del gone.person.rejections[rejection]
            self._rejected = None
            self.leave(gone.person)
        return gone

    def move(self, name: str) -> tuple[list[Kept], list[Rejection]]:
        """Let all that bears a name follow its moves.

        Returns:
            What was removed by them, each `since` the event that did.
        """
        person = self.persons.get(name)
        if person is None:
            return [], []
        kept = [self.entries[one] for one in person.entries]
        told = [(one, *self.moves.walk(name, one.since)) for one in kept]
        gone = self.forget([one.id for one, into, _ in told if into is None])
        moving: dict[str, list[Kept]] = {}
        for one, into, since in told:
            one.since = since
            if into is not None and into != name:
                moving.setdefault(into, []).append(one)
        for into, entries in moving.items():
            target = self.person(into)
            ids = [one.id for one in entries]
            self.matrix.regroup(ids, target.group)
            person.entries.difference_update(ids)
            target.entries.update(ids)
            for one in entries:
                one.person = target
        self._names = None
        dropped = self._move_rejections(person)
        self.leave(person)
        return gone, dropped

    def _move_rejections(self, person: Person) -> list[Rejection]:
        dropped = []
        for one in list(person.rejections.values()):
            into, one.since = self.moves.walk(person.name, one.since)
            if into is None:
                self.withdraw(one.id)
                dropped.append(one)
            elif into != person.name:
                del person.rejections[one.id]
                one.person = self.person(into)
                one.person.rejections[one.id] = one
        self._rejected = None
        return dropped

    def _part(self, kept: Kept) -> None:
        if kept.person is not None:
            kept.person.entries.discard(kept.id)
            if not kept.person.entries:
                self._names = None
            self.leave(kept.person)

    def leave(self, person: Person) -> None:
        """Forget somebody who has nothing left."""
        # Whoever came to the name meanwhile is somebody else.
        known = self.persons.get(person.name) is person
        if known and not person.entries and not person.rejections:
            del self.persons[person.name]

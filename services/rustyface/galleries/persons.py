"""Who a name stands for: the walk from the name that was given along the moves that came later."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from bus import messages as m
from bus.errors import InvalidRequest
from services.rustyface.galleries.cosines import Floats

# A name's event has to fit into one message; it takes some thousand moves to come here.
MOVES_MAX_BYTES: Final = 256 * 1024


@dataclass(eq=False, slots=True)
class Rejection:
    """A face of which it was said that it is not a person.

    Attributes:
        id: Its own.
        seq: Its event.
        since: Since which event the person has borne the name.
        person: Who it is not.
        vector: The face.
        entry: The entry that it was, if it was one.
        imported: The import that brought it.
        older: It has taken the place of an event that may not be erased yet.
    """

    id: str
    seq: int
    since: int
    person: "Person"
    vector: Floats
    entry: str | None
    imported: str | None
    older: bool = False


@dataclass(eq=False, slots=True)
class Person:
    """Somebody in a gallery.

    Attributes:
        name: What they are called now.
        group: Their number in the matrix; nobody else ever has it.
        entries: Their entries.
        rejections: What is not them.
    """

    name: str
    group: int
    entries: set[str] = field(default_factory=set)
    rejections: dict[str, Rejection] = field(default_factory=dict)


class Borne(NamedTuple):
    """That somebody bore a name: behind one event, up to another one.

    Attributes:
        name: The name.
        after: The event behind which they did; 0 for the first.
        until: The last event at which they did: the one by which they left it, or were last seen.
    """

    name: str
    after: int
    until: int


class Moves:
    """What became of each name of a gallery: every move, at the event that made it."""

    def __init__(self) -> None:
        self._of: dict[str, list[tuple[int, str | None]]] = {}

    def learn(self, event: m.GallerySubject, seq: int) -> None:
        """Take in a name's moves as its newest event tells all of them.

        Raises:
            InvalidRequest: They are not in the order in which they were made.
        """
        moves = [(seq if move.seq is None else move.seq, move.into) for move in event.moves]
        seqs = [at for at, _ in moves]
        if not moves or seqs != sorted(set(seqs)) or seqs[-1] != seq:
            raise InvalidRequest(f"its moves are at {seqs}; they have to rise up to {seq}, its own")
        self._of[event.id] = moves

    def walk(self, name: str, since: int, before: int | None = None) -> tuple[str | None, int]:
        """Return what who bore a name since an event bears now, and since which event.

        None when they were removed. Ends, because each step leads to a later event.

        Args:
            name: What they were called.
            since: The event.
            before: Bear just before this event, instead of now.
        """
        while True:
            step = next((one for one in self._of.get(name, ()) if one[0] > since), None)
            if step is None or (before is not None and step[0] >= before):
                return name, since
            since, into = step
            if into is None:
                return None, since
            name = into

    def next(self, name: str, into: str | None) -> m.GallerySubject:
        """Return the event that moves a name once more.

        Args:
            name: Who.
            into: The new name; None removes.

        Raises:
            InvalidRequest: It leads to itself.
        """
        if name == into:
            raise InvalidRequest(f"{name!r} is called {name!r} already", field="into")
        earlier = [m.SubjectMove(into=after, seq=seq) for seq, after in self._of.get(name, ())]
        return m.GallerySubject(id=name, at=m.now(), moves=[*earlier, m.SubjectMove(into=into)])

    def trail_of(self, removal: int) -> list[Borne]:
        """Return the trail of whoever an event has removed; of none, if it has moved nobody."""
        for name, moves in self._of.items():
            if any(at == removal for at, _ in moves):
                return self.trail(name, removal)
        return []

    def trail(self, name: str, until: int) -> list[Borne]:
        """Return every name that somebody has borne, and when; of a merged one all of theirs.

        Others have borne the same names before and after: those are not in it.

        Args:
            name: What they were called.
            until: When: an event, that which has moved the name on included.
        """
        into: defaultdict[str, list[tuple[int, str]]] = defaultdict(list)
        for before, moves in self._of.items():
            for at, after in moves:
                if after is not None:
                    into[after].append((at, before))
        found, left = list[Borne](), [(name, until)]
        while left:
            called, last = left.pop()
            # Whoever bore the name up to its move before is somebody else.
            first = max((at for at, _ in self._of.get(called, ()) if at < last), default=0)
            found.append(Borne(called, first, last))
            left += [(before, at) for at, before in into[called] if first < at < last]
        return found

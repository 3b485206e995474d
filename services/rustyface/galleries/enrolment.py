"""What enrolling entries comes to: which events, in place of which ones, and how they count."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

from bus import messages as m
from bus.errors import Conflict
from bus.streams import AS_ONE_MAX, AS_ONE_MAX_BYTES
from services.rustyface.galleries.asked import NewEntry
from services.rustyface.galleries.gallery import Gallery
from services.rustyface.galleries.projection import LITTLE_ENDIAN, utc

NAMED_MAX: Final = 5

# What is done with entries that are there already: they stay, whoever brought them; they are
# replaced; nothing may be there; or they are replaced if the same import has brought them, and stay
# otherwise.
Existing = Literal["skip", "replace", "fail", "renew"]
Counted = Literal["added", "replaced", "skipped"]


class Write(NamedTuple):
    """An entry that is to be stored.

    Attributes:
        event: Its event.
        after: Sequence of the event whose place it takes, 0 for none.
        counted: As what.
    """

    event: m.GalleryEntry
    after: int
    counted: Counted


class Plan:
    """How entries are enrolled, each in place of what a replica knows of its subject.

    Args:
        there: Where.
        entries: Which, no id twice.
        existing: What is done with those that are there.
        last: Says the sequence of an entry's last event that is not kept here, 0 for none: of
            what was taken away, and not erased yet.

    Attributes:
        writes: To be stored.
        without: How those count that need not be.
        refused: The ids of those that are there, and may not be.
    """

    def __init__(
        self,
        there: Gallery,
        entries: Iterable[NewEntry],
        existing: Existing,
        last: Callable[[str], int] = lambda _: 0,
    ) -> None:
        self.writes: list[Write] = []
        self.without: Counter[Counted] = Counter()
        self.refused: list[str] = []
        for entry in entries:
            before = there.entries.get(entry.id)
            if before is None:
                self.writes.append(Write(event_of(entry), last(entry.id), "added"))
            elif entry.imported and before.imported == entry.imported:
                if existing in ("replace", "renew"):
                    self.writes.append(Write(event_of(entry), before.seq, "added"))
                else:
                    self.without["added"] += 1
            elif existing == "replace":
                # Undoing the import leaves it: what it has replaced would not come back.
                self.writes.append(Write(event_of(entry, imported=None), before.seq, "replaced"))
            elif existing == "fail":
                self.refused.append(entry.id)
            else:
                self.without["skipped"] += 1


def distinct(
    entries: Sequence[NewEntry], existing: Existing
) -> tuple[dict[str, NewEntry], list[str]]:
    """Return entries by id, and the ids of those that another one of them leaves no place.

    Of several with one id the last one counts, if they may replace, and the first one otherwise.
    """
    found: dict[str, NewEntry] = {}
    doubled = []
    for entry in entries:
        if entry.id in found:
            doubled.append(entry.id)
        if entry.id not in found or existing in ("replace", "renew"):
            found[entry.id] = entry
    return found, doubled


def parts(entries: Iterable[NewEntry], sizes: Mapping[str, int]) -> Iterator[list[NewEntry]]:
    """Give entries in parts that the broker stores as one.

    Args:
        entries: Which.
        sizes: By id, about how many bytes each has.
    """
    part, size = list[NewEntry](), 0
    for one in entries:
        size += sizes[one.id]
        if part and (len(part) == AS_ONE_MAX or size > AS_ONE_MAX_BYTES):
            yield part
            part, size = [], sizes[one.id]
        part.append(one)
    if part:
        yield part


def there_already(there: Gallery, ids: Sequence[str], stored: int = 0) -> Conflict:
    """Return what is said where entries are there, and may not be.

    Args:
        there: Where.
        ids: Which.
        stored: How many were stored before these came.
    """
    shown = ", ".join(repr(one) for one in ids[:NAMED_MAX])
    more = f" and {len(ids) - NAMED_MAX:,} more" if len(ids) > NAMED_MAX else ""
    meanwhile = f", stored by others after the first {stored:,} of these entries" if stored else ""
    return Conflict(
        f"the dataset {there.head.id!r} has entries {shown}{more} already{meanwhile}; existing "
        "says what is done with them: skip, replace or fail",
        field="existing",
    )


def undone(imported: str) -> Conflict:
    """Return what is said to whoever goes on with an import that was undone."""
    return Conflict(f"the import {imported!r} was undone", field="imported")


def event_of(entry: NewEntry, **changed: Any) -> m.GalleryEntry:
    """Return the event that enrols an entry."""
    return m.GalleryEntry(
        **{
            "id": entry.id,
            "at": utc(entry.at or m.now()),
            "embedding": entry.vector.astype(LITTLE_ENDIAN).tobytes(),
            "metadata": entry.metadata,
            "subject": entry.subject,
            "image": entry.image,
            "quality": dict(entry.quality),
            "imported": entry.imported,
            **changed,
        }
    )

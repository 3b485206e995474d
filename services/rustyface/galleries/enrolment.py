"""What enrolling entries comes to: which events, and how they are counted."""

from collections.abc import Sequence
from typing import Any, Final

from bus import messages as m
from bus.errors import Conflict
from services.rustyface.galleries.asked import NewEntry
from services.rustyface.galleries.gallery import Gallery
from services.rustyface.galleries.projection import LITTLE_ENDIAN, utc

NAMED_MAX: Final = 5


class Plan:
    """How many entries are enrolled.

    Attributes:
        events: To be appended.
        added: How many are not there yet.
        replaced: How many take another's place.
        skipped: How many are left as they are.

    Raises:
        Conflict: Some are there already, and may not be.
    """

    def __init__(self, there: Gallery, entries: Sequence[NewEntry], existing: str) -> None:
        self.added = self.replaced = self.skipped = 0
        taken: dict[str, NewEntry] = {}
        refused: list[str] = []
        for entry in entries:
            before = there.entries.get(entry.id)
            ours = before is not None and entry.imported and before.imported == entry.imported
            if (before is None or ours) and entry.id not in taken:
                self.added += 1
                if before is None or existing == "replace":
                    taken[entry.id] = entry
            elif existing == "replace":
                self.replaced += 1
                taken[entry.id] = entry
            elif existing == "skip":
                self.skipped += 1
            else:
                refused.append(entry.id)
        if refused:
            shown = ", ".join(repr(one) for one in refused[:NAMED_MAX])
            more = f" and {len(refused) - NAMED_MAX:,} more" if len(refused) > NAMED_MAX else ""
            raise Conflict(
                f"the dataset {there.head.id!r} has entries {shown}{more} already; existing says "
                "what is done with them: skip, replace or fail",
                field="existing",
            )
        self.events = [
            event_of(entry, imported=entry.imported if self._adds(there, entry) else None)
            for entry in taken.values()
        ]

    def _adds(self, there: Gallery, entry: NewEntry) -> bool:
        before = there.entries.get(entry.id)
        return before is None or before.imported == entry.imported


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

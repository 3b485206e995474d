"""What of a dataset a file has, and what has become of that since."""

import asyncio
from array import array
from collections.abc import Callable, Sequence
from datetime import UTC

import numpy as np

from bus import messages as m
from bus.errors import NotFound
from bus.tasks import to_its_end
from services.rustyface.galleries.galleries import Galleries, NewRejection
from services.rustyface.transfers.files import BATCH, RejectionRow, Row, Writer


class Snapshot:
    """The entries and rejections of a dataset in a file, brought up to what the dataset is.

    Args:
        galleries: Where the dataset is.
        dataset: Which.
        file: Where they go.

    Raises:
        NotFound: There is no such dataset.
    """

    def __init__(self, galleries: Galleries, dataset: str, file: Writer) -> None:
        self._galleries = galleries
        self._dataset = dataset
        self._file = file
        # As of when the file was last brought up to the dataset.
        self._deletions = galleries.deletions(dataset)
        # By id, the row that has an entry now; and of each row the event that it shows, and whom.
        self._rows: dict[str, int] = {}
        self._events = array("Q")
        self._subjects: list[str | None] = []
        self._without: set[int] = set()
        self._rejections: set[str] = set()
        self._check()

    @property
    def entries(self) -> int:
        """How many entries the file has once it is written."""
        return len(self._rows)

    @property
    def rejections(self) -> int:
        """How many rejections the file has that was written last."""
        return len(self._rejections)

    async def catch_up(self, told: Callable[[int], None] = lambda _done: None) -> None:
        """Have the file take what is new or otherwise by now, and leave out what is gone.

        Args:
            told: Is called with how many of all entries were looked at.

        Raises:
            NotFound: The dataset was deleted.
        """
        self._check()
        # Before anything is looked at: what leaves meanwhile counts as not seen.
        self._deletions = self._galleries.deletions(self._dataset)
        ids = self._galleries.ids(self._dataset)
        for first in range(0, len(ids), BATCH):
            part = ids[first : first + BATCH]
            now = self._galleries.stands(self._dataset, part)
            await self._take(
                [one for one, is_now in zip(part, now, strict=True) if not self._has(one, is_now)]
            )
            told(first + len(part))

    async def write(self) -> None:
        """Write the file, with the rejections that there are now.

        Raises:
            NotFound: The dataset was deleted.
            Unprocessable: It cannot be said in the file's format; says what.
        """
        self._check()
        # Now, and not when the others were taken: the later, the less can leave until the end.
        await to_its_end(self._leave_out, self._galleries.ids(self._dataset))
        said = self._galleries.rejections(self._dataset)
        rows = [_rejection(one) for one in said]
        await to_its_end(self._file.finish, rows, frozenset(self._without))
        self._rejections = {one.id for one in said}

    async def has_deleted(self) -> bool:
        """Tell whether the file that was written last has anything that was deleted.

        Certain of all that this replica had read of when it was asked.

        Raises:
            NotFound: The dataset was deleted.
        """
        self._check()
        if self._galleries.deletions(self._dataset) == self._deletions:
            return False
        if self._rejections - {one.id for one in self._galleries.rejections(self._dataset)}:
            return True
        ids = list(self._rows)
        for first in range(0, len(ids), BATCH):
            part = ids[first : first + BATCH]
            for one, now in zip(part, self._galleries.stands(self._dataset, part), strict=True):
                # Of another event it may have been removed, and enrolled again since.
                if now is None or now[0] != self._events[self._rows[one]]:
                    return True
            await asyncio.sleep(0)
        return False

    async def _take(self, ids: Sequence[str]) -> None:
        self._check()
        entries = self._galleries.picked(self._dataset, ids, embeddings=True)
        if not entries:
            await asyncio.sleep(0)
            return
        for entry in entries:
            if (before := self._rows.get(entry.id)) is not None:
                self._without.add(before)
            self._rows[entry.id] = len(self._events)
            self._events.append(entry.revision)
            self._subjects.append(entry.subject)
        await to_its_end(self._file.add, [_row(entry) for entry in entries])

    def _has(self, entry: str, now: tuple[int, str | None] | None) -> bool:
        row = self._rows.get(entry)
        return row is not None and now == (self._events[row], self._subjects[row])

    def _leave_out(self, ids: Sequence[str]) -> None:
        """Leave out what is not of these any more."""
        for gone in self._rows.keys() - set(ids):
            self._without.add(self._rows.pop(gone))

    def _check(self) -> None:
        now = self._galleries.deletions(self._dataset)
        if self._deletions is None or now is None or now[0] != self._deletions[0]:
            when = "" if self._deletions is None else ": it was deleted meanwhile"
            raise NotFound(f"there is no dataset {self._dataset!r}{when}", field="dataset")


def _row(entry: m.EntryInfo) -> Row:
    return Row(
        entry.id,
        np.asarray(entry.embedding, np.float32),
        entry.metadata,
        entry.subject,
        entry.last_seen.astimezone(UTC),
        entry.quality,
    )


def _rejection(said: NewRejection) -> RejectionRow:
    return RejectionRow(said.id, said.subject, said.vector, said.entry)

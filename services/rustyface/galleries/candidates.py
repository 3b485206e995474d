"""Of the rows that were looked at so far, those that may be among the best of each search."""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from services.rustyface.galleries.cosines import Floats, Ints

# The first rows of a block alone say roughly how good the best are: so many, and such a share.
_FIRST: Final = 4_096
_FIRST_SHARE: Final = 8
# Once there are so many times more candidates than are asked for, and so many beside, the worst
# of them leave: that takes as long as it does to rank the latter.
_SPARE: Final = 2
_BESIDE: Final = 64


class Candidates:
    """The best rows of several searches, by scores that may be off.

    All searches together: by itself each of them costs a dozen calls that do next to nothing.

    Args:
        thresholds: Of each search, the score below which it wants nothing.
        wanted: How many it wants.
        by_group: Whether of each person only the best row counts.
        groups: The person of each row; below 0 for nobody, such rows stand alone.
        slack: By how much a score may be off.
    """

    def __init__(
        self,
        thresholds: Sequence[float],
        wanted: Sequence[int],
        by_group: Sequence[bool],
        groups: npt.NDArray[np.int32],
        slack: float,
    ) -> None:
        self._bounds = np.array([[one - slack] for one in thresholds], np.float32)
        self._wanted = wanted
        self._by_group = by_group
        self._groups = groups
        # Both scores may be off, the one of a bound and the one that is compared with it.
        self._margin = np.float32(2 * slack)
        self._parts: list[tuple[Ints, Ints, Floats]] = []
        self._count = 0
        self._many = _SPARE * sum(wanted) + _BESIDE
        self._raised = False

    def take(self, scores: Floats, begin: int) -> None:
        """Take those of some rows that reach the bounds.

        Args:
            scores: Shape ``[searches, rows]``.
            begin: The first row.
        """
        n = scores.shape[1]
        passed = scores >= self._bounds
        if not self._raised and np.count_nonzero(passed) > self._many:
            self._raise(scores[:, : max(_FIRST, n // _FIRST_SHARE)], begin)
            passed = scores >= self._bounds
        [places] = passed.ravel().nonzero()
        asked, rows = np.divmod(places, n)
        if begin:
            rows += begin
        self._parts.append((asked, rows, scores.ravel()[places]))
        self._count += len(places)
        if self._count > self._many:
            self._prune()

    def left(self) -> tuple[Ints, Ints]:
        """Return what is left, search by search: whose candidate each is, and its row."""
        asked, rows, _ = self._joined()
        return asked, rows

    def _joined(self) -> tuple[Ints, Ints, Floats]:
        if len(self._parts) != 1:
            none = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
            asked, rows, scores = map(np.concatenate, zip(none, *self._parts, strict=True))
            order = asked.argsort(kind="stable")
            self._parts = [(asked[order], rows[order], scores[order])]
        return self._parts[0]

    def _raise(self, scores: Floats, begin: int) -> None:
        """Raise the bounds by rows of which none is taken yet."""
        self._raised = True
        if any(self._by_group):
            groups = self._groups[begin : begin + scores.shape[1]].astype(np.int64)
            own = np.where(groups < 0, -1 - np.arange(len(groups)), groups)
            order = own.argsort()
            own = own[order]
            starts = np.flatnonzero(np.append(True, own[1:] != own[:-1]))
            scores = np.maximum.reduceat(scores[:, order], starts, axis=1)
        last = scores.shape[1] - max(self._wanted)
        if last >= 0:
            worst = np.partition(scores, last, axis=1)[:, last, None]
            self._bounds = np.maximum(self._bounds, worst - self._margin)

    def _prune(self) -> None:
        """Raise the bounds to the worst of the best so far, and let go of what is below."""
        asked, rows, scores = self._joined()
        # By search, best first: scores are less than 4 apart.
        order = np.argsort(4.0 * asked - scores)
        asked, rows, scores = asked[order], rows[order], scores[order]
        kept = np.ones(len(rows), np.bool_)
        counting = np.arange(len(rows))
        if any(self._by_group):
            first, own = self._persons(asked, rows)
            kept = scores >= scores[first][own] - self._margin
            counting = np.sort(first)
        ends = np.searchsorted(asked[counting], np.arange(len(self._wanted) + 1))
        last = ends[:-1] + self._wanted - 1
        enough = last < ends[1:]
        worst = scores[counting[last[enough]]] - self._margin
        self._bounds[enough, 0] = np.maximum(self._bounds[enough, 0], worst)
        kept &= scores >= self._bounds[asked, 0]
        self._parts = [(asked[kept], rows[kept], scores[kept])]
        self._count = len(self._parts[0][0])
        # Equal ones all stay; there may be any number of them.
        self._many = max(self._many, _SPARE * self._count)

    def _persons(self, asked: Ints, rows: Ints) -> tuple[Ints, Ints]:
        """Return the places of each person's first row, and of each row, which person's it is."""
        groups = self._groups[rows].astype(np.int64)
        alone = (groups < 0) | ~np.array(self._by_group)[asked]
        keys = (asked << 40) + np.where(alone, -1 - rows, groups)
        _, first, own = np.unique(keys, return_index=True, return_inverse=True)
        return first, own

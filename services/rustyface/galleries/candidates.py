"""Of the rows that were looked at so far, those that may be among the best of each search."""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from services.rustyface.galleries.cosines import Floats, Ints

# So many are looked at first, at least, where far more reach the bounds than are asked for.
_FEW: Final = 256
_FEW_SHARE: Final = 16
# Once there are so many times more candidates than are asked for, the worst of them leave.
_SPARE: Final = 2


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
        self._slack = slack
        self._parts: list[tuple[Ints, Ints, Floats]] = []
        self._count = 0
        self._many = _SPARE * sum(wanted)
        self._pruned = False

    def take(self, scores: Floats, begin: int) -> None:
        """Take those of some rows that reach the bounds.

        Args:
            scores: Shape ``[searches, rows]``.
            begin: The first row.
        """
        n = scores.shape[1]
        [places] = (scores >= self._bounds).ravel().nonzero()
        if not self._pruned and n > _FEW and len(places) > self._many:
            # The first ones alone say roughly how good the best are, so that few of the others
            # have to be looked at twice.
            few = max(_FEW, n // _FEW_SHARE)
            self.take(scores[:, :few], begin)
            self.take(scores[:, few:], begin + few)
            return
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

    def _prune(self) -> None:
        """Raise the bounds to the worst of the best so far, and let go of what is below."""
        asked, rows, scores = self._joined()
        # By search, best first: scores are less than 4 apart.
        order = np.argsort(4.0 * asked - scores)
        asked, rows, scores = asked[order], rows[order], scores[order]
        # Both scores may be off, this one and the one that is compared with it.
        margin = np.float32(2 * self._slack)
        kept = np.ones(len(rows), np.bool_)
        counting = np.arange(len(rows))
        if any(self._by_group):
            first, own = self._persons(asked, rows)
            kept = scores >= scores[first][own] - margin
            counting = np.sort(first)
        each = np.arange(len(self._wanted))
        begins, ends = np.searchsorted(asked[counting], [each, each + 1])
        last = begins + np.array(self._wanted) - 1
        enough = last < ends
        worst = scores[counting[last[enough]]]
        self._bounds[enough, 0] = np.maximum(self._bounds[enough, 0], worst - margin)
        kept &= scores >= self._bounds[asked, 0]
        self._parts = [(asked[kept], rows[kept], scores[kept])]
        self._count = len(self._parts[0][0])
        # Equal ones all stay; there may be any number of them.
        self._many = max(self._many, _SPARE * self._count)
        self._pruned = True

    def _persons(self, asked: Ints, rows: Ints) -> tuple[Ints, Ints]:
        """Return the places of each person's first row, and of each row, which person's it is."""
        groups = self._groups[rows].astype(np.int64)
        alone = (groups < 0) | ~np.array(self._by_group)[asked]
        keys = (asked << 40) + np.where(alone, -1 - rows, groups)
        _, first, own = np.unique(keys, return_index=True, return_inverse=True)
        return first, own

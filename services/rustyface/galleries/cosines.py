"""Vectors brought to length 1, and cosines that come out the same wherever they are computed.

Replicas get the same vectors in other batches, and keep them in another order. What numpy makes of
a whole block depends on that in its last bits; what is computed here does not.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

# Rows at once: what float64 makes of so many stays in the cache. 16,384 took twice as long.
_AT_ONCE: Final = 1 << 9
# A template is a sum of whole numbers, so that it is the same whatever the order of the rows.
_TEMPLATE_SCALE: Final = float(2**40)


def units(vectors: npt.NDArray[np.floating[Any]]) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Return vectors at length 1, shape ``[n, d]``, and which of them had a direction.

    A row comes out the same whichever others are beside it: replicas get them in other batches.
    """
    wide = np.asarray(vectors, np.float64)
    # Scaled by the largest value first: squares of what a float can hold may not fit in one.
    largest = np.abs(wide).max(axis=1, keepdims=True, initial=0)
    sound = np.isfinite(largest) & (largest > 0)
    wide = wide / np.where(sound, largest, 1)
    # Unsound rows may hold what overflows; they are given back with their mark all the same.
    wide[~sound[:, 0]] = 0
    lengths = np.sqrt((wide * wide).sum(axis=1, keepdims=True))
    return np.asarray(wide / np.where(sound, lengths, 1), np.float32), sound[:, 0]


def exact(rows: Floats, at: Ints, queries: Floats, asked: Ints) -> Doubles:
    """Return cosines in float64; each is the same whatever else is computed with it.

    Args:
        rows: All rows, of length 1.
        at: Which of them.
        queries: All queries, of length 1, shape ``[n, dimensions]``.
        asked: To which query each row is compared.
    """
    cosines = np.empty(len(at), np.float64)
    for i in range(0, len(at), _AT_ONCE):
        here = slice(i, i + _AT_ONCE)
        pairs = rows.take(at[here], axis=0), queries.take(asked[here], axis=0)
        np.add.reduce(np.multiply(*pairs, dtype=np.float64), axis=1, out=cosines[here])
    return cosines.clip(-1, 1, out=cosines)


def means(rows: Floats, persons: Sequence[Ints]) -> Doubles:
    """Return the direction of the mean of each person's rows; 0 where they have none.

    Many at once: by itself each of them costs a dozen calls that do next to nothing.
    """
    if not persons:
        return np.empty((0, rows.shape[1]), np.float64)
    together = np.cumsum([len(at) for at in persons]) // _AT_ONCE
    firsts = np.flatnonzero(np.diff(together, prepend=-1)).tolist()
    totals = [_totals(rows, persons[a:b]) for a, b in pairwise([*firsts, len(persons)])]
    templates = np.concatenate(totals).astype(np.float64)
    lengths = np.sqrt((templates * templates).sum(axis=1, keepdims=True))
    # Two faces that are each other's opposite have no mean.
    templates /= np.where(lengths > 0, lengths, 1)
    return templates


def cosines_to_means(directions: Doubles, query: Floats) -> Doubles:
    """Return the cosine of a query to each of some means."""
    cosines = (directions * query.astype(np.float64)).sum(axis=1).clip(-1, 1)
    return np.asarray(cosines, np.float64)


def _totals(rows: Floats, persons: Sequence[Ints]) -> Ints:
    lengths = [len(at) for at in persons]
    if sum(lengths) > 2 * _AT_ONCE:
        return np.stack([_total(rows, at) for at in persons])
    totals: Ints = np.add.reduceat(
        _scaled(rows, np.concatenate(persons)), np.cumsum([0, *lengths[:-1]])
    )
    return totals


def _scaled(rows: Floats, at: Ints) -> Ints:
    return np.rint(rows[at].astype(np.float64) * _TEMPLATE_SCALE).astype(np.int64)


def _total(rows: Floats, at: Ints) -> Ints:
    total = np.zeros(rows.shape[1], np.int64)
    for i in range(0, len(at), _AT_ONCE):
        total += _scaled(rows, at[i : i + _AT_ONCE]).sum(axis=0)
    return total

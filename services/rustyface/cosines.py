"""Vectors brought to length 1, and cosines that come out the same wherever they are computed.

Replicas get the same vectors in other batches, and keep them in another order. What numpy makes of
a whole block depends on that in its last bits; what is computed here does not.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_AT_ONCE: Final = 1 << 14
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


def exact(rows: Floats, at: Ints, query: Floats) -> Doubles:
    """Return cosines in float64; each is the same whatever else is computed with it."""
    wide = query.astype(np.float64)
    parts = [
        (rows[at[i : i + _AT_ONCE]].astype(np.float64) * wide).sum(axis=1)
        for i in range(0, len(at), _AT_ONCE)
    ]
    return np.concatenate(parts).clip(-1, 1) if parts else np.empty(0, np.float64)


def cosine_to_mean(rows: Floats, at: Ints, query: Floats) -> float:
    """Return the cosine to the mean of some rows; 0 where they have none."""
    total = np.zeros(rows.shape[1], np.int64)
    for i in range(0, len(at), _AT_ONCE):
        scaled = rows[at[i : i + _AT_ONCE]].astype(np.float64) * _TEMPLATE_SCALE
        total += np.rint(scaled).astype(np.int64).sum(axis=0)
    template = total.astype(np.float64)
    length = float(np.sqrt((template * template).sum()))
    # Two faces that are each other's opposite have no mean.
    if length == 0:
        return 0.0
    return float(np.clip((template / length * query.astype(np.float64)).sum(), -1, 1))

"""What a cosine means: how often strangers reach it, and from where on two faces are one person.

Measured for SFace on 587 publicly posted photos of 79 people, aligned by YuNet's landmarks: of
83,707 pairs of strangers 0.15 % reach 0.363 and 0.01 % reach 0.42; with 30 people enrolled by one
photo each, 0.8 % of strangers were named at 0.40 and 0.04 % at 0.45, which is one thirtieth of that
for each comparison. Between these four points a straight line through the logarithms is taken.

Few, mostly adult and Western faces, and easy photos: the rates say what order of magnitude is to be
expected, not more. Children are told apart worse. Beyond the points nothing is claimed: above the
last one its rate is given, which is then "at most", and below the first one none.
"""

from collections.abc import Mapping
from typing import Final

import numpy as np

from bus import messages as m

THRESHOLDS: Final[Mapping[str, float]] = {"sface": 0.45, "pixel32": 0.99}
"""Cosine from which a search names somebody. sface: of 30 enrolled people it names 98 % and more,
of strangers 0.1 % at most. pixel32 tells nobody apart: a near copy of a picture is all that it can
know."""

VERIFY_THRESHOLDS: Final[Mapping[str, float]] = {"sface": 0.363, "pixel32": 0.99}
"""Cosine from which two faces are one person. sface: 99.8 % of pairs of one person reach it, 0.15 %
of pairs of strangers: in a search, which compares with everybody, too many."""

# Cosine and rate of false matches, both in rising order of the cosine.
_MEASURED: Final[Mapping[str, tuple[tuple[float, float], ...]]] = {
    "sface": ((0.363, 1.5e-3), (0.40, 2.7e-4), (0.42, 1e-4), (0.45, 1.3e-5)),
}
# Nobody is named by an embedder of which nothing is known.
_NEVER: Final = 1.0


def false_match_rate(embedder: str, cosine: float) -> float | None:
    """Return how often two strangers reach a cosine: above what was measured, at most so often.

    None where nothing was measured: for another embedder, or below the first point.
    """
    points = _MEASURED.get(embedder)
    if points is None or cosine < points[0][0]:
        return None
    cosines, rates = zip(*points, strict=True)
    return _rounded(float(np.exp(np.interp(cosine, cosines, np.log(rates)))))


def cosine_at(embedder: str, rate: float) -> float | None:
    """Return the cosine that strangers reach no more often than `rate`.

    The first point's where they may do so more often than was measured. None where no such cosine
    was measured: for another embedder, or a rate below the last point's.
    """
    points = _MEASURED.get(embedder)
    if points is None or rate < points[-1][1]:
        return None
    cosines, rates = zip(*reversed(points), strict=True)
    return float(np.interp(np.log(rate), np.log(rates), cosines))


def rate_min(embedder: str) -> float | None:
    """Return the lowest rate of false matches that was measured for an embedder."""
    points = _MEASURED.get(embedder)
    return points[-1][1] if points else None


def expected_false(embedder: str, cosine: float, entries: int) -> float | None:
    """Return how many entries of strangers reach a cosine in one search of so many entries.

    As if each were a stranger's, and a photo of its own; None as in `false_match_rate`.
    """
    rate = false_match_rate(embedder, cosine)
    return None if rate is None else _rounded(rate * entries)


def threshold_of(embedder: str, *chosen: float | None) -> float:
    """Return the cosine from which a search names somebody.

    Args:
        embedder: What made the vectors.
        chosen: What was set, the nearest first: for the dataset, for the plugin, for the model.
    """
    return _first(*chosen, THRESHOLDS.get(embedder))


def verify_threshold_of(embedder: str, *chosen: float | None) -> float:
    """Return the cosine from which two faces are one person; as `threshold_of`."""
    return _first(*chosen, VERIFY_THRESHOLDS.get(embedder))


class Thresholds:
    """What counts as the same person here: as set for the dataset, the plugin, or the embedder.

    Which embedder: the dataset's, where one is searched; it need not be the worker's.

    Args:
        embedder: The worker's, by name.
        own: The threshold of that, if somebody brought it; None for ours.
        own_verify: Likewise, for comparing two faces.

    Attributes:
        plugin: The plugin's setting for searches; may be changed at any time.
    """

    def __init__(
        self, embedder: str, own: float | None = None, own_verify: float | None = None
    ) -> None:
        self.plugin: float | None = None
        self._embedder = embedder
        self._own, self._own_verify = own, own_verify

    def search(self, embedder: str, dataset: m.DatasetSettings) -> float:
        """Return the cosine from which a search of a dataset of some embedder names somebody."""
        own = self._own if embedder == self._embedder else None
        return threshold_of(embedder, dataset.threshold, self.plugin, own)

    def verify(self, embedder: str, dataset: m.DatasetSettings | None = None) -> float:
        """Return the cosine from which two faces are one person."""
        chosen = dataset.verify_threshold if dataset else None
        own = self._own_verify if embedder == self._embedder else None
        return verify_threshold_of(embedder, chosen, own)

    def both(self, embedder: str, dataset: m.DatasetSettings) -> tuple[float, float]:
        """Return what counts in searches of a dataset, and in comparisons."""
        return self.search(embedder, dataset), self.verify(embedder, dataset)


def _rounded(rate: float) -> float:
    """Return a rate with three digits: no more of it was measured."""
    return float(f"{rate:.3g}")


def _first(*values: float | None) -> float:
    return next((value for value in values if value is not None), _NEVER)

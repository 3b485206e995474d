"""How well embedders tell people apart: labelled photos, pairs of them, and rates."""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

from bus.errors import BusError
from services.rustyface.photos import images, pipeline
from services.rustyface.photos.embedding import Pixel32
from tests.bench.faces_photos import (
    Counts,
    Photo,
    all_pairs,
    labelled,
    lfw_pairs,
    shipped_photos,
)
from tests.bench.roster import CACHE

Floats = npt.NDArray[np.float32]

FALSE_MATCH_RATES: Final = (5e-2, 1e-2, 1e-3, 1e-4)
THRESHOLDS: Final = (0.363, 0.45)
_PACKAGES: Final = "from face_recognition, insightface and scikit-image"
# Standard normal deviate of a two-sided interval of 95 %.
_Z: Final = 1.96


class AtRate(msgspec.Struct, frozen=True, kw_only=True):
    """The true-match rate at a false-match rate, and the least threshold that keeps to it."""

    false_match_rate: float
    threshold: float
    true_match_rate: float


class AtThreshold(msgspec.Struct, frozen=True, kw_only=True):
    """Both rates at a threshold, each with its interval of 95 % (Wilson, 1927)."""

    threshold: float
    true_match_rate: float
    true_match_interval: tuple[float, float]
    false_match_rate: float
    false_match_interval: tuple[float, float]


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """What the scores of pairs come to.

    Attributes:
        same: Pairs of one person that were compared.
        different: Pairs of strangers.
        auc: The chance that a pair of one person scores above one of strangers.
        balanced: Mean of true-match rate and true non-match rate; the threshold is the best one of
            the other nine folds.
        at_rates: For the rates that the number of pairs allows.
        at_thresholds: For those that the product uses.
    """

    same: int
    different: int
    auc: float
    balanced: float
    at_rates: list[AtRate]
    at_thresholds: list[AtThreshold]


class Accuracy(msgspec.Struct, frozen=True, kw_only=True):
    """How well an embedder tells the people of a set apart.

    Attributes:
        embedder: Which.
        source: Where the photos are from.
        persons: How many there are.
        photos: How many photos.
        missed: Those of them without a vector: no face was found, or it could not be read.
        rates: Of the pairs of the others.
    """

    embedder: str
    source: str
    persons: int
    photos: int
    missed: int
    rates: Rates


def accuracy(folder: Path | None, say: Callable[[str], None]) -> list[Accuracy]:
    """Compare the photos of a folder, or those that packages ship, with both embedders.

    Args:
        folder: Holds a folder for each person, and perhaps LFW's `pairs.txt`.
        say: Is told how far it is.

    Raises:
        ValueError: There are no photos, or none that can be compared; says what is wanted.
    """
    photos = labelled(folder) if folder else shipped_photos()
    source = str(folder) if folder else _PACKAGES
    listed = folder / "pairs.txt" if folder else None
    pairs = lfw_pairs(listed, photos) if listed and listed.is_file() else all_pairs(photos)
    found = []
    for name, vectors in _embedded(photos, say).items():
        there = np.array([vector is not None for vector in vectors])
        filled = np.stack([np.zeros_like(_some(vectors)) if v is None else v for v in vectors])
        same = there[pairs.same].all(axis=1)
        different = there[pairs.different].all(axis=1)
        if not same.any() or not different.any():
            raise ValueError(
                f"{source}: {name} finds faces in {there.sum()} of {len(photos)} photos, too few "
                "for a pair of one person and a pair of strangers"
            )
        found.append(
            Accuracy(
                embedder=name,
                source=source,
                persons=len({photo.person for photo in photos}),
                photos=len(photos),
                missed=int((~there).sum()),
                rates=rates(
                    cosines(filled, pairs.same[same]),
                    cosines(filled, pairs.different[different]),
                    pairs.same_fold[same],
                    pairs.different_fold[different],
                ),
            )
        )
    return found


def cosines(vectors: Floats, pairs: Counts) -> Floats:
    """Return the cosine of each pair of rows of length 1."""
    return np.asarray(np.einsum("ij,ij->i", vectors[pairs[:, 0]], vectors[pairs[:, 1]]), np.float32)


def rates(same: Floats, different: Floats, same_fold: Counts, different_fold: Counts) -> Rates:
    """Return what the scores of pairs come to.

    Args:
        same: Scores of pairs of one person, shape ``[n]``.
        different: Of strangers, shape ``[m]``.
        same_fold: The fold of each.
        different_fold: Likewise.
    """
    return Rates(
        same=len(same),
        different=len(different),
        auc=area(same, different),
        balanced=_balanced(same, different, same_fold, different_fold),
        # With fewer pairs of strangers a rate could not be told from none at all.
        at_rates=[
            at_rate(same, different, rate)
            for rate in FALSE_MATCH_RATES
            if len(different) * rate >= 1
        ],
        at_thresholds=[at_threshold(same, different, t) for t in THRESHOLDS],
    )


def area(same: Floats, different: Floats) -> float:
    """Return the area under the curve: how often one of `same` is above one of `different`.

    The Mann-Whitney statistic; equal scores count half.
    """
    order = np.sort(different)
    below = np.searchsorted(order, same, "left").sum()
    up_to = np.searchsorted(order, same, "right").sum()
    return float((below + up_to) / 2 / (len(same) * len(different)))


def at_rate(same: Floats, different: Floats, rate: float) -> AtRate:
    """Return the true-match rate at the least threshold that at most `rate` of strangers reach."""
    allowed = math.floor(len(different) * rate + 1e-9)
    descending = np.sort(different)[::-1]
    # Just above the first stranger that may not pass.
    threshold = np.nextafter(descending[allowed], np.float32(2), dtype=np.float32)
    return AtRate(
        false_match_rate=rate,
        threshold=float(threshold),
        true_match_rate=float((same >= threshold).mean()),
    )


def at_threshold(same: Floats, different: Floats, threshold: float) -> AtThreshold:
    """Return both rates at a threshold."""
    true, false = int((same >= threshold).sum()), int((different >= threshold).sum())
    return AtThreshold(
        threshold=threshold,
        true_match_rate=true / len(same),
        true_match_interval=interval(true, len(same)),
        false_match_rate=false / len(different),
        false_match_interval=interval(false, len(different)),
    )


def interval(hits: int, of: int) -> tuple[float, float]:
    """Return where a rate lies with 95 % when so many of a number were hits (Wilson, 1927)."""
    rate, z2 = hits / of, _Z**2
    middle = rate + z2 / (2 * of)
    reach = _Z * math.sqrt(rate * (1 - rate) / of + z2 / (4 * of**2))
    low, high = ((middle + sign * reach) / (1 + z2 / of) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def best_threshold(same: Floats, different: Floats) -> float:
    """Return the threshold with the best mean of true-match and true non-match rate.

    It lies half way between two scores: at one of them, the next pair of that kind that comes a
    little lower would be on the wrong side.
    """
    scores = np.unique(np.concatenate([same, different]))
    candidates = np.concatenate([scores[:1], (scores[1:] + scores[:-1]) / 2])
    true = 1 - np.searchsorted(np.sort(same), candidates, "left") / len(same)
    refused = np.searchsorted(np.sort(different), candidates, "left") / len(different)
    return float(candidates[np.argmax(true + refused)])


def _balanced(same: Floats, different: Floats, same_fold: Counts, different_fold: Counts) -> float:
    """Return the mean over the folds that have pairs of both kinds, inside and outside."""
    found = []
    for fold in range(int(max(same_fold.max(), different_fold.max())) + 1):
        held, refused = same_fold == fold, different_fold == fold
        if held.any() and refused.any() and not held.all() and not refused.all():
            threshold = best_threshold(same[~held], different[~refused])
            true = (same[held] >= threshold).mean()
            found.append((true + (different[refused] < threshold).mean()) / 2)
    return float(np.mean(found)) if found else math.nan


def _embedded(
    photos: Sequence[Photo], say: Callable[[str], None]
) -> dict[str, list[Floats | None]]:
    """Return a vector of each photo by each embedder; none where there is no face."""
    cv2.setNumThreads(1)
    stages = pipeline.load(CACHE / "faces" / "weights")
    pixels = Pixel32()

    def embed(photo: Photo) -> tuple[Floats | None, Floats | None]:
        try:
            image = images.decode(photo.path.read_bytes())
            faces = stages.analyse(image, embedded_max=photo.face + 1)
        except BusError as error:
            say(f"{photo.path.name}: {error.message}")
            return None, None
        if photo.face >= len(faces):
            say(f"{photo.path.name}: {len(faces)} faces were found")
            return None, None if photo.among else pixels.embed([image])[0]
        face = faces[photo.face]
        return face.embedding, pixels.embed([_cut(image, face) if photo.among else image])[0]

    say(f"{len(photos)} photos")
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        both = list(threads.map(embed, photos))
    return {
        stages.embedder.name: [face for face, _ in both],
        pixels.name: [whole for _, whole in both],
    }


def _cut(image: images.Image, face: pipeline.Face) -> images.Image:
    """Return the part of a picture that a face is in."""
    left, top, width, height = face.box
    x, y = max(0, int(left)), max(0, int(top))
    return image[y : int(top + height), x : int(left + width)]


def _some(vectors: Sequence[Floats | None]) -> Floats:
    """Return the first vector that there is; a number alone when there is none."""
    return next((v for v in vectors if v is not None), np.zeros(1, np.float32))

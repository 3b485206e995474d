"""A face turned upright and scaled, so that eyes, nose and mouth stand where the net was taught.

Alignment is worth more than anything else here: with the mere box in its place, the share of
same persons found at one false match in a thousand fell from 0.997 to 0.582 (86,121 pairs).
"""

from typing import Final

import cv2
import numpy as np
import numpy.typing as npt

from bus.errors import Unprocessable
from services.rustyface.photos.images import Image

SIDE: Final = 112
"""Width and height of an aligned face in pixels."""

TEMPLATE: Final = (
    (38.2946, 51.6963),
    (73.5318, 51.5014),
    (56.0252, 71.7366),
    (41.5493, 92.3655),
    (70.7299, 92.2041),
)
"""Where the five landmarks go, in the order of `Detections.landmarks`. The template of ArcFace
(Deng et al., 2019), which SFace was trained with as well."""

_FINEST: Final = 16


def align(image: Image, landmarks: npt.NDArray[np.float32]) -> Image:
    """Return one face as `SIDE` x `SIDE` pixels; what lies outside of the picture is black.

    Args:
        image: The picture.
        landmarks: Five points in its pixels, shape ``[5, 2]``.

    Raises:
        Unprocessable: The five points are one.
    """
    move = similarity(landmarks)
    # A warp looks at four pixels for each one it makes. Where a large face shrinks it would skip
    # most of them, so it makes a finer face first, which is then averaged down. On a face of
    # 690 noisy pixels (sd 60 of 255) that lifts the cosine to the clean one from 0.37 to 0.91.
    shrink = 1 / float(np.hypot(move[0, 0], move[1, 0]))
    finer = int(np.clip(shrink, 1, _FINEST))
    move = move * finer
    move[:, 2] += (finer - 1) / 2
    crop = cv2.warpAffine(image, move, (SIDE * finer, SIDE * finer), flags=cv2.INTER_LINEAR)
    if finer > 1:
        crop = cv2.resize(crop, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    return np.asarray(crop, np.uint8)


def similarity(landmarks: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Return the turn, scale and shift, as a matrix ``[2, 3]``, that fits the template best.

    Least squares over the five points (Umeyama, 1991). A similarity of the plane is ``a z + b``
    in complex numbers, where the best `a` is a quotient.

    Raises:
        Unprocessable: The five points are one, so that there is no scale.
    """
    source = landmarks[:, 0] + 1j * landmarks[:, 1].astype(np.float64)
    target = np.array([complex(x, y) for x, y in TEMPLATE])
    centred = source - source.mean()
    spread = np.vdot(centred, centred).real
    if not spread > 1e-6:
        raise Unprocessable("the five landmarks of the face are one point")
    a = np.vdot(centred, target - target.mean()) / spread
    b = target.mean() - a * source.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])

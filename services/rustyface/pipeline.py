"""A picture through all stages: detect, align, embed, and say how good each face is."""

from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt

from services.rustyface import weights
from services.rustyface.alignment import align
from services.rustyface.detection import SCORE_MIN, Detector
from services.rustyface.embedding import Embedder, Sface
from services.rustyface.images import Image

Floats = npt.NDArray[np.float32]

FACES_MAX: Final = 64
"""Faces of one picture that are embedded, at about 20 ms each."""

SIZE_MIN_PX: Final = 32
"""Smaller faces are told apart noticeably worse: of crops 32, 24 and 16 pixels wide 0.970, 0.904
and 0.622 are recognised at one false match in a thousand, against 0.997 at full size."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Face:
    """One face in a picture; lengths in its pixels.

    Attributes:
        box: Left, top, width, height; may reach beyond the picture.
        landmarks: Right eye, left eye, nose, right and left corner of the mouth, as x and y.
        score: How sure the detector is, up to 1.
        size_px: The shorter side of the box; compare with `SIZE_MIN_PX`.
        sharpness: Variance of the Laplacian of the aligned face in grey; low is blurred.
        embedding: Length 1, as many values as the embedder has dimensions; None if it was not
            asked for.
    """

    box: tuple[float, float, float, float]
    landmarks: tuple[tuple[float, float], ...]
    score: float
    size_px: float
    sharpness: float
    embedding: Floats | None


class Pipeline:
    """Finds and embeds faces. Blocks, and may be called from as many threads as there are cores.

    Each caller adds about 20 MB to the 125 MB of the two nets, besides the picture itself. The
    sizes that the nets work on are bounded, so memory does not grow with time: 60 pictures of
    60 sizes and a crowd of 100 faces added 10 MB.

    Args:
        detector: Finds them.
        embedder: Takes aligned faces.
    """

    def __init__(self, detector: Detector, embedder: Embedder) -> None:
        self.detector = detector
        self.embedder = embedder

    def analyse(
        self,
        image: Image,
        *,
        score_min: float = SCORE_MIN,
        faces_max: int = FACES_MAX,
        embedded_max: int = FACES_MAX,
    ) -> list[Face]:
        """Return the faces in a picture with their embeddings, the largest first.

        Args:
            image: The picture, upright, as `images.decode` gives it.
            score_min: How sure the detector has to be.
            faces_max: The largest ones are taken.
            embedded_max: The largest ones are embedded. With 1 a crowd costs little more than a
                portrait: 16 faces 27 ms instead of 226.

        Returns:
            As many as there are; none is no error.
        """
        found = self.detector.detect(image, score_min=score_min)
        order = np.argsort(-found.boxes[:, 2:].prod(axis=1), kind="stable")[:faces_max]
        crops = [align(image, found.landmarks[i]) for i in order]
        vectors = self.embedder.embed(crops[:embedded_max])
        faces = []
        for i, crop, vector in zip_longest(order, crops, vectors):
            left, top, width, height = found.boxes[i].tolist()
            faces.append(
                Face(
                    box=(left, top, width, height),
                    landmarks=tuple((x, y) for x, y in found.landmarks[i].tolist()),
                    score=float(found.scores[i]),
                    size_px=min(width, height),
                    sharpness=sharpness(crop),
                    embedding=vector,
                )
            )
        return faces


def load(cache_dir: Path, models_dir: Path | None = None) -> Pipeline:
    """Open YuNet and SFace; see `weights.load` for where they come from.

    Raises:
        Unavailable: There are no weights, or other ones than published; says how to get them.
    """
    return Pipeline(
        Detector(weights.load(weights.YUNET, cache_dir, models_dir)),
        Sface(weights.load(weights.SFACE, cache_dir, models_dir)),
    )


def sharpness(crop: Image) -> float:
    """Return how much detail an aligned face has (Pech-Pacheco et al., 2000)."""
    grey = cv2.cvtColor(crop, cv2.COLOR_BGR2GRAY)
    return float(np.var(np.asarray(cv2.Laplacian(grey, cv2.CV_32F))))

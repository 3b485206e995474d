"""A picture through all stages: detect, align, embed, and say how good each face is."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np
import numpy.typing as npt

from services.rustyface.photos import weights
from services.rustyface.photos.alignment import align
from services.rustyface.photos.detection import SCORE_MIN, Detector
from services.rustyface.photos.embedding import Embedder, Sface
from services.rustyface.photos.images import Image
from services.rustyface.photos.quality import Quality, pose, sharpness

Floats = npt.NDArray[np.float32]

FACES_MAX: Final = 64
"""Faces of one picture that are embedded, at about 20 ms each."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Face:
    """One face in a picture; lengths in its pixels.

    Attributes:
        box: Left, top, width, height; may reach beyond the picture.
        landmarks: Right eye, left eye, nose, right and left corner of the mouth, as x and y.
        quality: How good it is to recognise.
        embedding: Length 1, as many values as the embedder has dimensions; None if it was not
            asked for.
    """

    box: tuple[float, float, float, float]
    landmarks: tuple[tuple[float, float], ...]
    quality: Quality
    embedding: Floats | None

    @property
    def score(self) -> float:
        """How sure the detector is, up to 1."""
        return self.quality.score


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
        small: bool = False,
    ) -> list[Face]:
        """Return the faces in a picture with their embeddings, the largest first.

        Args:
            image: The picture, upright, as `images.decode` gives it.
            score_min: How sure the detector has to be.
            faces_max: The largest ones are taken.
            embedded_max: The largest ones are embedded. With 1 a crowd costs little more than a
                portrait: 16 faces 27 ms instead of 226.
            small: Whether small faces of a large picture are looked for; see `Detector.detect`.

        Returns:
            As many as there are; none is no error.
        """
        found = self.detector.detect(image, score_min=score_min, small=small)
        order = np.argsort(-found.boxes[:, 2:].prod(axis=1), kind="stable")[:faces_max]
        for i in order[:embedded_max]:
            found.landmarks[i] = self.detector.refined(image, found.boxes[i], found.landmarks[i])
        crops = [align(image, found.landmarks[i]) for i in order]
        vectors = self.embedder.embed(crops[:embedded_max])
        faces = []
        for i, crop, vector in zip_longest(order, crops, vectors):
            left, top, width, height = found.boxes[i].tolist()
            faces.append(
                Face(
                    box=(left, top, width, height),
                    landmarks=tuple((x, y) for x, y in found.landmarks[i].tolist()),
                    quality=Quality(
                        score=float(found.scores[i]),
                        size_px=min(width, height),
                        sharpness=sharpness(crop),
                        **pose(found.landmarks[i])._asdict(),
                    ),
                    embedding=vector,
                )
            )
        return faces


def load(
    cache_dir: Path,
    models_dir: Path | None = None,
    *,
    files: Mapping[str, Path] = MappingProxyType({}),
    embedder: Embedder | None = None,
) -> Pipeline:
    """Open YuNet and SFace; see `weights.load` for where they come from.

    Args:
        cache_dir: Where repaired nets are kept.
        models_dir: Where OpenCV Zoo's files lie; the installed package if None.
        files: By the net's name, `yunet` or `sface`: the very file.
        embedder: Takes the place of SFace.

    Raises:
        Unavailable: There are no weights, or other ones than published; says how to get them.
    """

    def opened(net: weights.Net) -> weights.Weights:
        return weights.load(net, cache_dir, models_dir, file=files.get(net.name))

    return Pipeline(Detector(opened(weights.YUNET)), embedder or Sface(opened(weights.SFACE)))

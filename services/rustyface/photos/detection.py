"""Faces in a picture: YuNet, its anchors decoded, its doubles dropped; small ones in tiles.

Source: Wu, Peng and Yu, "YuNet: A Tiny Millisecond-level Face Detector", 2023; the decoding is
that of OpenCV's ``FaceDetectorYN``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import cv2
import numpy as np
import numpy.typing as npt

from services.rustyface.photos.images import Image
from services.rustyface.photos.weights import Weights

Floats = npt.NDArray[np.float32]

LONGER_SIDE: Final = 640
"""YuNet was trained for faces of 10 to 300 pixels. On 46 annotated faces in camera pictures it
found all at 640 pixels with one false alarm, at full size 43 with two."""

SCORE_MIN: Final = 0.7
"""At 0.6 twice as many false alarms, at 0.9 three of 46 faces are missed (at 640 pixels)."""

OVERLAP_MAX: Final = 0.3
CANDIDATES_MAX: Final = 2_000
"""Bounds the work on a picture made to look like faces everywhere."""

TILE_OVERLAP: Final = 160
"""Pixels that neighbouring tiles share: a face up to this size is whole in one of them."""

TILE_SCALE: Final = 4
"""By how much the picture shrinks from one layer of tiles to the next. YuNet finds faces from about
10 pixels on, so those that outgrow the overlap in one layer have 40 pixels in the next."""

INSIDE_MAX: Final = 0.7
"""A find of which more than this lies in a surer one is a part of that face, seen too near."""

NEAR_BELOW: Final = 64
"""A face that is smaller than this once the picture is shrunk is looked at again from near. A pixel
that its landmarks are off there is ten in a picture of 6,000, and what is aligned by them is not
quite the same face."""

NEAR_SIDE: Final = 192
"""Of three faces, 45 to 280 pixels wide in 41 pictures of 1,280 to 4,000, the cosine to the same
face cut out was 0.88 in the median, 0.45 at worst; looked at from near 0.96 and 0.93. At 128 pixels
that is 0.93 and 0.85, at 320 0.96 and 0.75. It takes 2 ms more."""

NEAR_REACH: Final = 1.5
"""How far that look goes from the middle of a face, in lengths of its longer side."""

_STRIDES: Final = (8, 16, 32)
_OUTPUTS: Final = [f"{kind}_{s}" for kind in ("cls", "obj", "bbox", "kps") for s in _STRIDES]


@dataclass(frozen=True, eq=False)
class Detections:
    """Faces found in one picture, the surest first; lengths in its pixels.

    Attributes:
        boxes: Left, top, width, height; shape ``[n, 4]``. May reach beyond the picture.
        landmarks: Right eye, left eye, nose, right and left corner of the mouth, right and left
            as the person has them; shape ``[n, 5, 2]``.
        scores: From the least asked for to 1; shape ``[n]``.
    """

    boxes: Floats
    landmarks: Floats
    scores: Floats


class Detector:
    """Finds faces. May be called from several threads at once.

    Args:
        weights: YuNet, as `weights.load` gives it.
        longer_side: Larger pictures are shrunk to this many pixels before they are searched.
    """

    def __init__(self, weights: Weights, *, longer_side: int = LONGER_SIDE) -> None:
        self.digest = weights.digest
        self._weights = weights
        self._longer_side = longer_side

    def detect(
        self, image: Image, *, score_min: float = SCORE_MIN, small: bool = False
    ) -> Detections:
        """Return the faces in a picture that score at least `score_min`.

        Args:
            image: The picture.
            score_min: How sure the net has to be.
            small: Whether faces are looked for that are too small once the picture is shrunk: at
                4,000 pixels those below some 60. Tiles of the picture are searched at full size,
                and at a quarter, a sixteenth and so on of it: a second instead of 10 ms for
                12 megapixels, and more false alarms.
        """
        found = self._search(image, score_min)
        if not small or max(image.shape[:2]) <= self._longer_side:
            return found
        layer, scale = image, 1
        every = [found]
        while max(layer.shape[:2]) > self._longer_side:
            every += [_moved(tile, scale) for tile in self._search_tiles(layer, score_min)]
            scale *= TILE_SCALE
            size = max(1, image.shape[1] // scale), max(1, image.shape[0] // scale)
            layer = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
        return _merged(every)

    def refined(self, image: Image, box: Floats, landmarks: Floats) -> Floats:
        """Return a face's landmarks as they are seen from near; as they are if that is no better.

        Args:
            image: The picture that the face was found in.
            box: Where, as in `Detections`.
            landmarks: Likewise.
        """
        shrink = self._longer_side / max(image.shape[:2])
        if shrink >= 1 or box[2:].max() * shrink >= NEAR_BELOW:
            return landmarks
        reach = NEAR_REACH * box[2:].max()
        begin = np.maximum(box[:2] + box[2:] / 2 - reach, 0).astype(int)
        end = (box[:2] + box[2:] / 2 + reach).astype(int)
        near = image[begin[1] : end[1], begin[0] : end[0]]
        found = self._search(near, SCORE_MIN, longer_side=NEAR_SIDE)
        aside = np.abs(found.boxes[:, :2] + found.boxes[:, 2:] / 2 + begin - box[:2] - box[2:] / 2)
        # Whoever stands beside is in the look too.
        same = np.flatnonzero((aside < box[2:] / 4).all(axis=1))
        if not same.size:
            return landmarks
        return np.asarray(found.landmarks[same[0]] + begin, np.float32)

    def _search(
        self, image: Image, score_min: float, *, longer_side: int | None = None
    ) -> Detections:
        """Search a picture as a whole, shrunk to what the net was trained for."""
        height, width = image.shape[:2]
        shrink = min(1.0, (longer_side or self._longer_side) / max(height, width))
        if shrink < 1:
            size = max(1, round(width * shrink)), max(1, round(height * shrink))
            image = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
        seen = image.shape[:2]
        # The net halves its input five times. With the longer side bounded, so is the number
        # of sizes that the runtime ever sees, and the memory that it holds on to.
        image = np.pad(image, ((0, -seen[0] % 32), (0, -seen[1] % 32), (0, 0)))
        blob = np.ascontiguousarray(image.transpose(2, 0, 1)[None], np.float32)
        outputs = self._weights.run(_OUTPUTS, blob)
        found = _decode(outputs, image.shape[1] // 8, score_min)
        # Both sides are rounded, so each has its own scale back.
        back = np.array([width / seen[1], height / seen[0]], np.float32)
        return Detections(found.boxes * np.tile(back, 2), found.landmarks * back, found.scores)

    def _search_tiles(self, image: Image, score_min: float) -> Iterator[Detections]:
        """Search a picture in tiles, without the faces that an inner edge has cut."""
        height, width = image.shape[:2]
        for top in _begins(height, self._longer_side):
            for left in _begins(width, self._longer_side):
                side = self._longer_side
                found = self._search(image[top : top + side, left : left + side], score_min)
                begin = found.boxes[:, :2] + (left, top)
                end = begin + found.boxes[:, 2:]
                inner = np.array([left, top, left + side, top + side], np.float32)
                # At the picture's own edges nothing more is to be seen in another tile.
                inner[:2][inner[:2] == 0] = -np.inf
                inner[2:][inner[2:] >= (width, height)] = np.inf
                whole = (begin > inner[:2]).all(axis=1) & (end < inner[2:]).all(axis=1)
                yield Detections(
                    np.concatenate([begin, found.boxes[:, 2:]], axis=1)[whole],
                    found.landmarks[whole] + np.array([left, top], np.float32),
                    found.scores[whole],
                )


def _begins(length: int, side: int) -> list[int]:
    """Return where tiles begin along a length, so that all of it is covered."""
    if length <= side:
        return [0]
    step = side - TILE_OVERLAP
    count = -(-(length - side) // step) + 1
    # Spread evenly: the overlap only grows by that.
    return [round(i * (length - side) / (count - 1)) for i in range(count)]


def _moved(found: Detections, scale: float) -> Detections:
    return Detections(found.boxes * scale, found.landmarks * scale, found.scores)


def _merged(every: list[Detections]) -> Detections:
    """Return the faces of several searches of one picture, each once."""
    boxes = np.concatenate([one.boxes for one in every]).astype(np.float32)
    landmarks = np.concatenate([one.landmarks for one in every]).astype(np.float32)
    scores = np.concatenate([one.scores for one in every])
    order = np.argsort(-scores, kind="stable")[:CANDIDATES_MAX]
    kept = order[_without_doubles(boxes[order], inside_max=INSIDE_MAX)]
    return Detections(boxes[kept], landmarks[kept], scores[kept])


def _decode(outputs: list[Any], columns: int, score_min: float) -> Detections:
    """Turn the net's outputs, one set for each stride, into faces without doubles."""
    rows = []
    for i, stride in enumerate(_STRIDES):
        face, object_, box, points = (outputs[i + 3 * k][0] for k in range(4))
        scores = np.sqrt(face[:, 0].clip(0, 1) * object_[:, 0].clip(0, 1))
        (sure,) = np.nonzero(scores >= score_min)
        # Each anchor is a cell of a grid; offsets and logarithms of sizes are in cells.
        across = columns * 8 // stride
        cells = np.stack([sure % across, sure // across], axis=1).astype(np.float32)
        size = np.exp(box[sure, 2:])
        corner = cells + box[sure, :2] - size / 2
        marks = points[sure].reshape(-1, 5, 2) + cells[:, None]
        faces = np.concatenate([corner, size, marks.reshape(-1, 10)], axis=1) * stride
        rows.append(np.concatenate([faces, scores[sure, None]], axis=1))
    every = np.concatenate(rows).astype(np.float32)
    # Stable, so that the same picture gives the same faces on every machine.
    every = every[np.argsort(-every[:, 14], kind="stable")[:CANDIDATES_MAX]]
    kept = every[_without_doubles(every[:, :4])]
    return Detections(kept[:, :4], kept[:, 4:14].reshape(-1, 5, 2), kept[:, 14])


def _without_doubles(boxes: Floats, *, inside_max: float = 1.0) -> list[int]:
    """Return which boxes stay when each one drops all later ones that overlap it too much.

    Args:
        boxes: Shape ``[n, 4]``, the surest first.
        inside_max: How much of a later one may lie in it.
    """
    begin, end = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    area = boxes[:, 2] * boxes[:, 3]
    left = np.arange(len(boxes))
    kept = []
    while left.size:
        first, left = left[0], left[1:]
        kept.append(int(first))
        sides = np.minimum(end[first], end[left]) - np.maximum(begin[first], begin[left])
        shared = sides.clip(0).prod(axis=1)
        apart = shared <= OVERLAP_MAX * (area[first] + area[left] - shared)
        left = left[apart & (shared <= inside_max * area[left])]
    return kept

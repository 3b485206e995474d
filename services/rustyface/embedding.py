"""Faces into vectors whose angle says how much they are alike."""

import hashlib
from collections.abc import Sequence
from typing import Protocol

import cv2
import numpy as np
import numpy.typing as npt

from services.rustyface.images import Image
from services.rustyface.weights import Weights

Floats = npt.NDArray[np.float32]


class Embedder(Protocol):
    """What turns pictures into vectors. Vectors of two embedders are never compared.

    Attributes:
        name: What a gallery names it by.
        digest: SHA-256 of what the vectors depend on, in hex; another one means other vectors.
        dimensions: Length of a vector.
        takes_faces: It wants aligned faces, not whole pictures.
    """

    name: str
    digest: str
    dimensions: int
    takes_faces: bool

    def embed(self, images: Sequence[Image]) -> Floats:
        """Return one vector of length 1 for each image, shape ``[n, dimensions]``."""


class Sface:
    """SFace (Zhong et al., 2021): 128 values for an aligned face. May be called from threads.

    Two pictures of one person mostly reach a cosine of 0.45; 0.363 is for comparing two faces,
    in a gallery it names strangers.

    Args:
        weights: SFace, as `weights.load` gives it.
    """

    name = "sface"
    dimensions = 128
    takes_faces = True

    def __init__(self, weights: Weights) -> None:
        self.digest = weights.digest
        self._session = weights.session
        self._input = weights.session.get_inputs()[0].name

    def embed(self, images: Sequence[Image]) -> Floats:
        """Return the vectors of aligned faces, of shape ``[112, 112, 3]`` each.

        One run each: a batch gains less than 3 % on a CPU, and a crowd in one batch would take
        the memory for all its faces at once.
        """
        rows = np.empty((len(images), self.dimensions), np.float32)
        for row, image in zip(rows, images, strict=True):
            # The net was trained on red first; it subtracts and scales inside.
            blob = np.ascontiguousarray(image[:, :, ::-1].transpose(2, 0, 1)[None], np.float32)
            row[:] = self._session.run(None, {self._input: blob})[0][0]
        return unit(rows)


class Pixel32:
    """The picture itself, 32 x 32 in grey: needs no weights, finds no face, is no recogniser.

    Steps: 8-bit luma (0.299 R + 0.587 G + 0.114 B), 32 x 32 with OpenCV's ``INTER_CUBIC``,
    divided by 255, divided by its length. The system that this embedder was first part of used
    the Catmull-Rom cubic (a = -0.5, widened where it shrinks); OpenCV's is the one of Keys with
    a = -0.75 over four pixels. Values therefore differ a little from vectors made there.
    """

    name = "pixel32"
    digest = hashlib.sha256(b"pixel32: luma, 32x32 INTER_CUBIC, /255, L2").hexdigest()
    dimensions = 1024
    takes_faces = False

    def embed(self, images: Sequence[Image]) -> Floats:
        """Return the vectors of whole pictures of any size. An all black one gives zeros."""
        rows = np.empty((len(images), self.dimensions), np.float32)
        for row, image in zip(rows, images, strict=True):
            luma = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
            small = cv2.resize(luma, (32, 32), interpolation=cv2.INTER_CUBIC)
            row[:] = np.asarray(small, np.float32).ravel() / 255
        return unit(rows)


def unit(rows: Floats) -> Floats:
    """Return rows scaled to length 1; a row of zeros stays one."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    # Zeros stay zeros whatever they are divided by.
    return np.asarray(rows / np.where(lengths > 0, lengths, 1), np.float32)

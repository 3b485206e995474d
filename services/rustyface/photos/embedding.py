"""Faces into vectors whose angle says how much they are alike."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import cv2
import numpy as np
import numpy.typing as npt

from bus.errors import Unprocessable
from services.rustyface.photos.alignment import SIDE
from services.rustyface.photos.images import Image
from services.rustyface.photos.weights import Weights, open_session

Floats = npt.NDArray[np.float32]

DIMENSIONS_MAX: Final = 16_384
Levels = float | Sequence[float]
"""One value for each of three channels, or one for all."""


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
        self._weights = weights

    def embed(self, images: Sequence[Image]) -> Floats:
        """Return the vectors of aligned faces, of shape ``[112, 112, 3]`` each.

        One run each: a batch gains less than 3 % on a CPU, and a crowd in one batch would take
        the memory for all its faces at once.
        """
        rows = np.empty((len(images), self.dimensions), np.float32)
        for row, image in zip(rows, images, strict=True):
            # The net was trained on red first; it subtracts and scales inside.
            blob = np.ascontiguousarray(image[:, :, ::-1].transpose(2, 0, 1)[None], np.float32)
            row[:] = self._weights.run(None, blob)[0][0]
        return unit(rows)


class ArcFace:
    """Somebody's own net that takes aligned faces of 112 x 112 pixels. May be called from threads.

    ArcFace (Deng et al., 2019) and most of what came after it look like this from outside: one
    picture goes in, one vector comes out. Pixels are given to it as ``(value - mean) / std``.

    Args:
        model: The ONNX file.
        name: What galleries name it by.
        channels: Which comes first.
        mean: Of pixel values from 0 to 255, in the order of `channels`.
        std: Likewise, above 0.

    Raises:
        Unprocessable: It is no such net; says what it takes and gives.
    """

    takes_faces = True

    def __init__(
        self,
        model: Path,
        *,
        name: str,
        channels: Literal["rgb", "bgr"] = "rgb",
        mean: Levels = 127.5,
        std: Levels = 127.5,
    ) -> None:
        self.name = name
        self._order = slice(None, None, -1 if channels == "rgb" else 1)
        self._mean, self._std = (_planes(levels) for levels in (mean, std))
        how = f"{channels} {self._mean.ravel().tolist()} {self._std.ravel().tolist()}"
        file = hashlib.sha256(model.read_bytes()).hexdigest()
        # The same net with other colours or levels gives other vectors.
        self.digest = hashlib.sha256(f"{file} {how}".encode()).hexdigest()
        try:
            self._session = open_session(model)
        except Exception as error:
            # Whatever the runtime dislikes, it is the file.
            raise Unprocessable(f"the model {name!r} cannot be opened: {error}") from error
        self._input = _only_input(self._session, name)
        self.dimensions = self._tried()

    def embed(self, images: Sequence[Image]) -> Floats:
        """Return the vectors of aligned faces, of shape ``[112, 112, 3]`` each.

        One run each, as with SFace; so a net whose batch is fixed to 1 will do.
        """
        rows = np.empty((len(images), self.dimensions), np.float32)
        for row, image in zip(rows, images, strict=True):
            row[:] = self._run(image)[0]
        return unit(rows)

    def _run(self, image: Image) -> Any:
        planes = image[:, :, self._order].transpose(2, 0, 1).astype(np.float32)
        blob = np.ascontiguousarray((planes - self._mean) / self._std, np.float32)[None]
        return self._session.run(None, {self._input: blob})[0]

    def _tried(self) -> int:
        """Run it once, and return how long its vectors are."""
        grey = np.full((SIDE, SIDE, 3), 128, np.uint8)
        try:
            made = np.asarray(self._run(grey))
        except Exception as error:
            raise Unprocessable(f"the model {self.name!r} does not run: {error}") from error
        if made.ndim != 2 or len(made) != 1 or not 1 < made.shape[1] <= DIMENSIONS_MAX:
            raise Unprocessable(
                f"the model {self.name!r} gives an array of shape {list(made.shape)} for one face, "
                f"a vector of 2 to {DIMENSIONS_MAX} values is needed: [1, d]"
            )
        if not np.isfinite(made).all():
            raise Unprocessable(
                f"the model {self.name!r} gives values that are no finite numbers for a grey face; "
                "do mean and std fit it?"
            )
        return int(made.shape[1])


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


def _planes(levels: Levels) -> Floats:
    """Return levels in a shape that goes with ``[3, height, width]``."""
    return np.asarray(np.broadcast_to(np.asarray(levels), (3,)), np.float32).reshape(3, 1, 1)


def _only_input(session: Any, name: str) -> str:
    """Return the name of a net's one input, if it takes an aligned face.

    Raises:
        Unprocessable: It takes something else, or gives more than one thing.
    """
    inputs, outputs = session.get_inputs(), session.get_outputs()
    wanted = [1, 3, SIDE, SIDE]
    fits = (
        len(inputs) == len(outputs) == 1
        and inputs[0].type == "tensor(float)"
        and len(inputs[0].shape) == len(wanted)
        # What has a name, or none, is free.
        and all(
            given == asked or not isinstance(given, int) or given < 0
            for given, asked in zip(inputs[0].shape, wanted, strict=True)
        )
    )
    if not fits:
        takes = ", ".join(f"{one.name}: {one.type} {one.shape}" for one in inputs) or "nothing"
        gives = ", ".join(one.name for one in outputs)
        raise Unprocessable(
            f"the model {name!r} is not for aligned faces: it takes {takes} and gives {gives}; "
            f"one input tensor(float) {['batch', *wanted[1:]]} and one output are needed"
        )
    return str(inputs[0].name)

"""An image file through everything: bytes, pixels, faces, and the vector that stands for it."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import cv2
import numpy as np
import numpy.typing as npt

from bus.errors import Unprocessable
from bus.state import Store
from services.rustyface.photos import images, pipeline
from services.rustyface.photos.detection import LONGER_SIDE, SCORE_MIN
from services.rustyface.photos.embedding import ArcFace, Pixel32
from services.rustyface.photos.images import MAX_PIXELS
from services.rustyface.photos.nets import Nets
from services.rustyface.photos.pipeline import FACES_MAX, Face, Pipeline
from services.rustyface.settings import RustyfaceSettings

Floats = npt.NDArray[np.float32]

IMAGE_FIELD: Final = "image_base64"


@dataclass(frozen=True, eq=False)
class Found:
    """The faces of an image, the largest first.

    Attributes:
        width: Of the upright image, in pixels.
        height: Likewise.
        faces: None is no error.
    """

    width: int
    height: int
    faces: list[Face]


class Encoder(Protocol):
    """What turns an image file into faces; blocks, and may be called from threads.

    Attributes:
        name: Of the embedder.
        digest: SHA-256 of what its vectors depend on, in hex.
        dimensions: Of its vectors.
        max_pixels: Largest width times height of an image.
    """

    name: str
    digest: str
    dimensions: int
    max_pixels: int

    def encode(
        self, data: bytes, *, every_face: bool = False, field: str = IMAGE_FIELD
    ) -> tuple[Floats, list[Face]]:
        """Return the vector that stands for the image, and the faces in it, the largest first.

        Args:
            data: The file.
            every_face: Whether each face has its own embedding, not only the largest.
            field: The request's field that it came from, for the error.

        Raises:
            Unprocessable: It is no image, or there is nothing in it to embed.
            TooLarge: It has more pixels than allowed.
        """
        ...

    def find(
        self,
        data: bytes,
        *,
        score_min: float | None = None,
        faces_max: int = FACES_MAX,
        small: bool = False,
        field: str = IMAGE_FIELD,
    ) -> Found:
        """Return the faces in an image, without embeddings; see `Pipeline.analyse`.

        Raises:
            Unprocessable: It is no image, or this embedder looks for no faces.
            TooLarge: It has more pixels than allowed.
        """
        ...


class FaceEncoder:
    """Detects, aligns and embeds; the largest face stands for the image.

    Args:
        stages: What does it.
        score_min: How sure the detector has to be.
        max_pixels: Largest width times height.
    """

    def __init__(
        self, stages: Pipeline, *, score_min: float = SCORE_MIN, max_pixels: int = MAX_PIXELS
    ) -> None:
        self._stages = stages
        self._score_min = score_min
        self.max_pixels = max_pixels
        self.name = stages.embedder.name
        self.digest = stages.embedder.digest
        self.dimensions = stages.embedder.dimensions

    def encode(
        self, data: bytes, *, every_face: bool = False, field: str = IMAGE_FIELD
    ) -> tuple[Floats, list[Face]]:
        """See `Encoder.encode`.

        Raises:
            Unprocessable: There is no face in the image, or no image in the data.
        """
        image = images.decode(data, max_pixels=self.max_pixels, field=field)
        faces = self._stages.analyse(
            image, score_min=self._score_min, embedded_max=FACES_MAX if every_face else 1
        )
        vector = faces[0].embedding if faces else None
        if vector is None:
            height, width = image.shape[:2]
            wide = max(30, 10 * max(width, height) // LONGER_SIDE)
            raise Unprocessable(
                f"no face was found in the image of {width} x {height} pixels; one must be seen "
                f"from the front or half from the side, and be some {wide} pixels wide in it",
                field=field,
            )
        if not (np.isfinite(vector).all() and vector.any()):
            # Every replica would pass over such an entry for ever.
            raise Unprocessable(f"{self.name} gives no vector for the face", field=field)
        return vector, faces

    def find(
        self,
        data: bytes,
        *,
        score_min: float | None = None,
        faces_max: int = FACES_MAX,
        small: bool = False,
        field: str = IMAGE_FIELD,
    ) -> Found:
        """See `Encoder.find`."""
        image = images.decode(data, max_pixels=self.max_pixels, field=field)
        faces = self._stages.analyse(
            image,
            score_min=self._score_min if score_min is None else score_min,
            faces_max=faces_max,
            embedded_max=0,
            small=small,
        )
        height, width = image.shape[:2]
        return Found(width, height, faces)


class PixelEncoder:
    """Takes the whole image as it is.

    Args:
        max_pixels: Largest width times height.
    """

    def __init__(self, *, max_pixels: int = MAX_PIXELS) -> None:
        self._embedder = Pixel32()
        self.max_pixels = max_pixels
        self.name = self._embedder.name
        self.digest = self._embedder.digest
        self.dimensions = self._embedder.dimensions

    def encode(
        self,
        data: bytes,
        *,
        every_face: bool = False,  # noqa: ARG002 - there are none
        field: str = IMAGE_FIELD,
    ) -> tuple[Floats, list[Face]]:
        """See `Encoder.encode`; there are no faces.

        Raises:
            Unprocessable: The image is all black, so that it has no direction.
        """
        image = images.decode(data, max_pixels=self.max_pixels, field=field)
        [vector] = self._embedder.embed([image])
        if not vector.any():
            raise Unprocessable("the image is all black: it has no vector", field=field)
        return vector, []

    def find(
        self,
        data: bytes,  # noqa: ARG002 - not looked at
        *,
        score_min: float | None = None,  # noqa: ARG002
        faces_max: int = FACES_MAX,  # noqa: ARG002
        small: bool = False,  # noqa: ARG002
        field: str = IMAGE_FIELD,
    ) -> Found:
        """Raise Unprocessable: this embedder looks for no faces."""
        raise Unprocessable(
            "this worker embeds whole images (embedder pixel32): it looks for no faces",
            field=field,
        )


async def open_encoder(
    settings: RustyfaceSettings, store: Store, data_dir: Path, cache_dir: Path
) -> Encoder:
    """Open what the settings ask for; takes about a second.

    Raises:
        Unavailable: The weights are nowhere, or not those that were published.
        BusError: A file that the settings name is not there, or no such net; names the setting.
    """
    # Each of our own threads works on an image of its own; OpenCV's would only compete.
    cv2.setNumThreads(1)
    if settings.embedder == "pixel32":
        return PixelEncoder(max_pixels=settings.max_pixels)
    nets = Nets(store, data_dir, cache_dir / "weights" / "named")
    files = {
        net: await nets.file(named, setting=f"weights.{net}")
        for net, named in (("yunet", settings.weights.yunet), ("sface", settings.weights.sface))
        if named is not None
    }
    own, model = settings.own_embedder, None
    if own is not None:
        model = await nets.file(own.model, setting="own_embedder.model")

    def load() -> Pipeline:
        embedder = None
        if own is not None and model is not None:
            embedder = ArcFace(
                model, name=own.name, channels=own.channels, mean=own.mean, std=own.std
            )
        models_dir = data_dir / settings.models_dir if settings.models_dir else None
        return pipeline.load(cache_dir / "weights", models_dir, files=files, embedder=embedder)

    return FaceEncoder(
        await asyncio.to_thread(load),
        score_min=settings.score_min,
        max_pixels=settings.max_pixels,
    )

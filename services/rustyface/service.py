"""Answers `faces.*` and `dataset.manage`, once its galleries are caught up."""

import asyncio
import hashlib
import os
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import cv2
import numpy as np
import numpy.typing as npt
import structlog

from bus import messages as m
from bus.errors import Conflict, InvalidRequest, NotFound, Overloaded, Unprocessable
from bus.instance import Instance
from bus.probes import Route
from bus.subjects import DATASET_MANAGE, FACES_ENCODE, FACES_SEARCH
from bus.tasks import beside
from services.rustyface import images, pipeline
from services.rustyface.embedding import Pixel32
from services.rustyface.galleries import (
    LITTLE_ENDIAN,
    Galleries,
    NewEntry,
    Query,
    check_metadata,
)
from services.rustyface.manage import Manage
from services.rustyface.pipeline import Face, Pipeline
from services.rustyface.settings import RustyfaceSettings, settings_of
from services.rustyface.transfer import take_in

Floats = npt.NDArray[np.float32]
T = TypeVar("T")

# Cosine from which a match counts as the same person. sface: of 30 enrolled people 98 % and more
# are named, and 0.1 % of strangers at most. pixel32 tells nobody apart: a near copy of a picture
# is all that it can know.
THRESHOLDS: Final[Mapping[str, float]] = {"sface": 0.45, "pixel32": 0.99}

SERVED: Final = (FACES_ENCODE, FACES_SEARCH, DATASET_MANAGE)

log = structlog.get_logger("rustyface.service")


class Encoder(Protocol):
    """What turns an image file into faces; blocks.

    Attributes:
        name: Of the embedder.
        dimensions: Of its vectors.
    """

    name: str
    dimensions: int

    def encode(self, data: bytes) -> tuple[Floats, list[Face]]:
        """Return the vector that stands for the image, and the faces in it, the largest first."""
        ...


class FaceEncoder:
    """Detects, aligns and embeds; the largest face stands for the image."""

    name = "sface"

    def __init__(self, stages: Pipeline) -> None:
        self._stages = stages
        self.dimensions = stages.embedder.dimensions

    def encode(self, data: bytes) -> tuple[Floats, list[Face]]:
        """See `Encoder.encode`.

        Raises:
            Unprocessable: There is no face in the image, or no image in the data.
        """
        image = images.decode(data, field="image_base64")
        faces = self._stages.analyse(image, embedded_max=1)
        vector = faces[0].embedding if faces else None
        if vector is None:
            height, width = image.shape[:2]
            raise Unprocessable(
                f"no face was found in the image of {width} x {height} pixels; one must be seen "
                "from the front or half from the side, and be some 30 pixels wide",
                field="image_base64",
            )
        return vector, faces


class PixelEncoder:
    """Takes the whole image as it is."""

    name = "pixel32"

    def __init__(self) -> None:
        self._embedder = Pixel32()
        self.dimensions = self._embedder.dimensions

    def encode(self, data: bytes) -> tuple[Floats, list[Face]]:
        """See `Encoder.encode`; there are no faces."""
        [vector] = self._embedder.embed([images.decode(data, field="image_base64")])
        return vector, []


def make_encoder(settings: RustyfaceSettings, data_dir: Path, cache_dir: Path) -> Encoder:
    """Open what the settings ask for; raises as `pipeline.load` does. Blocks for a second."""
    # Each of our own threads works on an image of its own; OpenCV's would only compete.
    cv2.setNumThreads(1)
    if settings.embedder == "pixel32":
        return PixelEncoder()
    models_dir = data_dir / settings.models_dir if settings.models_dir else None
    return FaceEncoder(pipeline.load(cache_dir / "weights", models_dir))


class NameDataset(m.Message, frozen=True):
    """Names a dataset in a path; one that could not be a name is one that is not there."""

    dataset: str


class NoJobs:
    """Takes no work."""

    async def enter(self, work: m.GalleryWork) -> m.Job:
        """Refuse it."""
        raise InvalidRequest(f"{work.action} cannot be done here", field="action")


class Rustyface:
    """Embeds, enrols and searches faces.

    Args:
        instance: This process's place on the bus.
        galleries: Where faces are kept.
        encoder: Makes the vectors.
        settings: How.
        datasets_dir: Dataset files in it are taken in at the start; None for none.
    """

    def __init__(
        self,
        instance: Instance,
        galleries: Galleries,
        encoder: Encoder,
        settings: RustyfaceSettings,
        datasets_dir: Path | None,
    ) -> None:
        self._instance = instance
        self._galleries = galleries
        self._encoder = encoder
        self._settings = settings
        self._datasets_dir = datasets_dir
        self._manages = Manage(galleries, NoJobs(), self._thresholds, lambda _cosine, _n: None)
        self._threshold = self._threshold_of(settings)
        instance.on_config(("threshold", "max_waiting"), self._take_settings)
        # One thread for each processor: onnxruntime runs with one thread and without the GIL.
        self._threads = ThreadPoolExecutor(_processors(), "faces")
        self._waiting = 0

    def _thresholds(self, settings: m.DatasetSettings) -> tuple[float, float]:
        own = self._threshold if settings.threshold is None else settings.threshold
        return own, own if settings.verify_threshold is None else settings.verify_threshold

    async def run(self) -> None:
        """Serve until cancelled."""
        async with (
            beside(self._galleries.run()),
            self._instance.local_routes(*self._routes()),
        ):
            await self._galleries.caught_up.wait()
            # First, so that there can be a file of the default dataset.
            if self._datasets_dir is not None:
                await take_in(self._datasets_dir, self._galleries)
            try:
                await self._galleries.create(self._settings.default_dataset)
            except Conflict as error:
                # The other datasets can be used all the same.
                log.error("dataset.not_created", cause=error.message)
            self._tell()
            try:
                async with (
                    self._instance.serving(FACES_ENCODE, self._encode),
                    self._instance.serving(FACES_SEARCH, self._search),
                    self._instance.serving(DATASET_MANAGE, self._manage),
                ):
                    await self._instance.ready()
                    await self._keep_telling()
            finally:
                # Not earlier: leaving `serving` answers what the broker had sent here already.
                self._threads.shutdown(wait=False, cancel_futures=True)

    def _take_settings(self) -> None:
        self._settings = settings_of(self._instance)
        self._threshold = self._threshold_of(self._settings)

    def _threshold_of(self, settings: RustyfaceSettings) -> float:
        own = THRESHOLDS[self._encoder.name]
        return own if settings.threshold is None else settings.threshold

    def _routes(self) -> tuple[Route, ...]:
        search = partial(self._instance.answer_here, FACES_SEARCH)
        return (
            Route("GET", "/health", m.Empty, self._health),
            Route("GET", "/datasets", m.Empty, self._list_here),
            Route("GET", "/datasets/{dataset}", NameDataset, self._show_here),
            Route("POST", "/datasets/{dataset}/search", m.SearchFaces, search),
        )

    async def _health(self, _request: m.Empty) -> dict[str, Any]:
        datasets = len(self._galleries.datasets())
        return {"status": "ok", "datasets": datasets, "entries": self._galleries.count}

    async def _list_here(self, _request: m.Empty) -> m.DatasetList:
        asked = m.ManageDataset(action="list")
        return await self._instance.answer_here(DATASET_MANAGE, asked)

    async def _show_here(self, request: NameDataset) -> m.DatasetInfo:
        listed = (await self._list_here(m.Empty())).datasets
        found = next((one for one in listed if one.id == request.dataset), None)
        if found is None:
            known = ", ".join(one.id for one in listed) or "none"
            raise NotFound(
                f"there is no dataset {request.dataset!r}; there are: {known}", field="dataset"
            )
        return found

    async def _encode(self, request: m.EncodeFace) -> m.EncodedFace:
        began = time.perf_counter()
        check_metadata(request.metadata)
        vector, faces = await self._vector_of(request.image_base64 or "")
        if not vector.any():
            raise Unprocessable("the image is all black: it has no vector", field="image_base64")
        entry = request.entry_id or str(uuid.uuid4())
        dataset = revision = None
        if request.persist:
            dataset = request.dataset or self._settings.default_dataset
            revision = await self._enrol(request, entry, vector)
            took_ms = round(1e3 * (time.perf_counter() - began), 1)
            log.info(
                "face.enrolled", dataset=dataset, entry=entry, revision=revision, took_ms=took_ms
            )
        return m.EncodedFace(
            id=entry,
            dataset=dataset,
            embedding=vector.tolist(),
            dimensions=len(vector),
            checksum=hashlib.sha256(vector.astype(LITTLE_ENDIAN).tobytes()).hexdigest(),
            faces=[_told(face) for face in faces],
            embedder=self._encoder.name,
            revision=revision,
        )

    async def _search(self, request: m.SearchFaces) -> m.FaceMatches:
        if (request.image_base64 is None) == (request.embedding is None):
            which = "neither" if request.embedding is None else "both"
            raise InvalidRequest(
                f"give either image_base64 or embedding; there is {which}", field="image_base64"
            )
        dataset = request.dataset or self._settings.default_dataset
        faces: list[Face] = []
        if request.image_base64 is not None:
            vector, faces = await self._vector_of(request.image_base64)
        else:
            vector = _unit(request.embedding or [])
        found = await self._galleries.search(
            dataset,
            Query(
                vector=vector,
                k=request.top_k,
                threshold=request.threshold,
                revision=request.revision,
                by_embedder=request.image_base64 is not None,
            ),
        )
        results = [
            m.FaceMatch(
                id=match.entry.id,
                score=match.score,
                metadata=match.entry.metadata,
                last_seen=match.entry.last_seen,
                known=match.score >= self._threshold and not match.rejected,
            )
            for match in found.matches
        ]
        return m.FaceMatches(
            dataset=dataset,
            query_embedding=vector.tolist(),
            results=results,
            known=bool(results) and results[0].known,
            threshold=self._threshold,
            revision=found.revision,
            faces=[_told(face) for face in faces],
        )

    async def _manage(self, request: m.ManageDataset) -> m.DatasetList:
        answer = await self._manages.answer(request)
        self._tell()
        return answer

    async def _enrol(self, request: m.EncodeFace, entry: str, vector: Floats) -> int:
        """Store an entry and return its revision; the default dataset is made if it is gone.

        Waits for the broker alone: once that has the entry, nothing here may make it an error.
        """
        new = NewEntry(id=entry, vector=vector, metadata=request.metadata, subject=request.subject)
        if request.dataset is not None:
            return await self._galleries.enrol(request.dataset, new, by=request.by)
        default = self._settings.default_dataset
        try:
            return await self._galleries.enrol(default, new, by=request.by)
        except NotFound:
            await self._galleries.create(default)
            return await self._galleries.enrol(default, new, by=request.by)

    async def _vector_of(self, image_base64: str) -> tuple[Floats, list[Face]]:
        def work() -> tuple[Floats, list[Face]]:
            return self._encoder.encode(images.from_base64(image_base64))

        return await self._in_thread(work)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Do work on a thread of its own.

        Raises:
            Overloaded: Too many images wait already.
        """
        if self._waiting >= self._settings.max_waiting:
            raise Overloaded(
                f"{self._waiting} images wait for this worker; max_waiting allows "
                f"{self._settings.max_waiting}",
                retry_after_s=1,
            )
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._waiting -= 1

    async def _keep_telling(self) -> None:
        while True:
            await asyncio.sleep(1)
            self._tell()

    def _tell(self) -> None:
        self._instance.counts["datasets"] = len(self._galleries.datasets())
        self._instance.counts["entries"] = self._galleries.count
        self._instance.gauges["images_waiting"] = self._waiting


def _processors() -> int:
    """Return how many processors this process may use."""
    # Only Linux can say.
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _told(face: Face) -> m.FaceInfo:
    return m.FaceInfo(
        box=[round(value, 1) for value in face.box],
        landmarks=[[round(x, 1), round(y, 1)] for x, y in face.landmarks],
        score=round(face.score, 4),
        quality={"size_px": round(face.size_px, 1), "sharpness": round(face.sharpness, 1)},
    )


def _unit(values: list[float]) -> Floats:
    """Return a caller's vector at length 1; the gallery checks its dimensions."""
    wide = np.asarray(values, np.float64)
    length = float(np.linalg.norm(wide)) if len(wide) else 0.0
    if not np.isfinite(length) or length == 0:
        raise InvalidRequest(
            "embedding: it has no direction: it is empty, all zeros or too large",
            field="embedding",
        )
    return np.asarray(wide / length, np.float32)

"""Answers `faces.encode`, `faces.search`, `faces.detect` and `faces.verify`."""

import dataclasses
import hashlib
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
import structlog

from bus import messages as m
from bus.errors import InvalidRequest, NotFound
from services.rustyface import calibration
from services.rustyface.calibration import Thresholds
from services.rustyface.galleries.galleries import (
    LITTLE_ENDIAN,
    Found,
    Galleries,
    Match,
    NewEntry,
    Query,
    check_metadata,
)
from services.rustyface.photos import images, quality
from services.rustyface.photos.encoder import Encoder
from services.rustyface.photos.kept import KeptImages
from services.rustyface.photos.pipeline import Face
from services.rustyface.photos.workers import Workers

Floats = npt.NDArray[np.float32]

UNBOUND: Final = m.QualityBounds()

log = structlog.get_logger("rustyface.faces")


class Faces:
    """Embeds, enrols, searches and compares faces.

    Args:
        galleries: Where faces are kept.
        encoder: Makes the vectors.
        workers: Threads for that.
        kept: Where images go that a dataset keeps.
        thresholds: From where on faces are one person.
        default_dataset: Where faces go that name no dataset.
    """

    def __init__(
        self,
        galleries: Galleries,
        encoder: Encoder,
        workers: Workers,
        kept: KeptImages,
        thresholds: Thresholds,
        default_dataset: str,
    ) -> None:
        self._galleries = galleries
        self._encoder = encoder
        self._workers = workers
        self._kept = kept
        self._thresholds = thresholds
        self._default = default_dataset

    # --- faces.encode -----------------------------------------------------------------------------

    async def encode(self, request: m.EncodeFace) -> m.EncodedFace:
        """Embed the largest face of an image, and enrol it unless told not to.

        Raises:
            InvalidRequest: There is no image, or the metadata cannot be stored.
            NotFound: There is no such dataset.
            Unprocessable: There is no face in it, or none that is good enough for the dataset.
            Overloaded: Too many images wait.
        """
        began = time.perf_counter()
        check_metadata(request.metadata)
        given = _given(request)
        name = request.dataset or self._default
        settings = await self._settings(name, request) if request.persist else m.DatasetSettings()
        bounds = _bounds(settings.quality, request)
        keep = request.persist and settings.keep_images

        def work() -> tuple[Floats, list[Face], bytes | None]:
            data = given.read()
            vector, faces = self._encoder.encode(
                data, every_face=request.every_face, field=given.field
            )
            return vector, faces, self._kept_form(data) if keep else None

        vector, faces, image = await self._workers.run(work)
        short = quality.shortfalls(faces[0].quality, bounds) if faces else []
        if bounds.below == "reject":
            quality.refuse(short, field=given.field, dataset=name if request.persist else None)
        entry = request.entry_id or str(uuid.uuid4())
        revision = None
        if request.persist:
            best = faces[0].quality if faces else None
            new = NewEntry(
                id=entry,
                vector=vector,
                metadata=request.metadata,
                subject=request.subject,
                quality=best.measures() | {"score": round(best.score, 4)} if best else {},
            )
            revision = await self._enrol(name, new, image, request)
            took_ms = round(1e3 * (time.perf_counter() - began), 1)
            # Which entry it is does not go into the log: it outlives a deletion.
            log.info("face.enrolled", dataset=name, revision=revision, took_ms=took_ms)
        return m.EncodedFace(
            id=entry,
            dataset=name if request.persist else None,
            embedding=vector.tolist(),
            dimensions=len(vector),
            checksum=hashlib.sha256(vector.astype(LITTLE_ENDIAN).tobytes()).hexdigest(),
            faces=[_told(face, bounds, embedding=request.every_face) for face in faces],
            embedder=self._encoder.name,
            revision=revision,
            subject=request.subject,
            warnings=[one.sentence for one in short],
        )

    def _kept_form(self, data: bytes) -> bytes:
        return images.without_metadata(data, max_pixels=self._encoder.max_pixels)

    async def _settings(self, name: str, request: m.EncodeFace) -> m.DatasetSettings:
        """Return a dataset's settings; the default one is made if it is gone."""
        try:
            return await self._galleries.settings(name)
        except NotFound:
            if request.dataset is not None:
                raise
            await self._galleries.create(name)
            return await self._galleries.settings(name)

    async def _enrol(
        self, name: str, new: NewEntry, image: bytes | None, request: m.EncodeFace
    ) -> int:
        """Store an entry, its image first, and return its revision.

        Waits for the broker alone: once that has the entry, nothing here may make it an error.
        """
        if image is not None:
            new = dataclasses.replace(new, image=await self._kept.keep(image))
        try:
            revision = await self._galleries.enrol(name, new, by=request.by)
        except NotFound:
            if request.dataset is not None:
                raise
            # The default dataset was deleted while the image was worked on, and a new one keeps
            # no images.
            await self._galleries.create(name)
            new = dataclasses.replace(new, image=None)
            return await self._galleries.enrol(name, new, by=request.by)
        if image is not None and new.image is not None:
            await self._kept.ensure(new.image, image)
        return revision

    # --- faces.search -----------------------------------------------------------------------------

    async def search(self, request: m.SearchFaces) -> m.FaceMatches:
        """Find the entries nearest to a face, or to each face of an image.

        Raises:
            InvalidRequest: There is not one of image and embedding, or the embedding is none for
                this dataset; or the broker has no such revision yet.
            NotFound: There is no such dataset.
            Unprocessable: There is no face in the image.
            Overloaded: Too many images wait.
        """
        named = request.dataset or self._default
        faces: list[Face] = []
        by_image = request.embedding is None
        if by_image:
            given = _given(request, "embedding")
            every = request.every_face
            vector, faces = await self._workers.run(
                lambda: self._encoder.encode(given.read(), every_face=every, field=given.field)
            )
        else:
            _one_of(request, "image_base64", "image", "embedding")
            vector = unit_of(request.embedding or [], field="embedding")
        others = [face.embedding for face in faces[1:] if face.embedding is not None]
        query = self._query(vector, request, by_image=by_image)
        found, *rest = await self._galleries.search_each(named, query, [vector, *others])
        results = self._results(found)
        told = [_told(face, UNBOUND, embedding=request.every_face) for face in faces]
        if faces and request.every_face:
            each = [results, *(self._results(one) for one in rest)]
            told = [
                msgspec.structs.replace(face, matches=matches)
                for face, matches in zip(told, each, strict=True)
            ]
        named_as = first_known(results)
        return m.FaceMatches(
            dataset=named,
            query_embedding=vector.tolist(),
            results=results,
            known=named_as is not None,
            threshold=self._thresholds.search(found.embedder, found.settings),
            revision=found.revision,
            faces=told,
            subject=named_as.subject if named_as else None,
            searched=found.searched,
        )

    def _query(self, vector: Floats, request: m.SearchFaces, *, by_image: bool) -> Query:
        return Query(
            vector=vector,
            k=request.top_k,
            threshold=request.threshold,
            revision=request.revision,
            by_embedder=by_image,
            group_by=request.group_by,
            filter=request.filter,
        )

    def _results(self, found: Found) -> list[m.FaceMatch]:
        threshold = self._thresholds.search(found.embedder, found.settings)
        return [
            m.FaceMatch(
                id=match.entry.id,
                score=match.score,
                metadata=match.entry.metadata,
                last_seen=match.entry.last_seen,
                known=decisive(match, found.settings) >= threshold and not match.rejected,
                subject=match.subject,
                subject_score=match.subject_score,
                subject_entries=match.subject_entries,
                rejected=match.rejected,
                expected_false=calibration.expected_false(
                    found.embedder, match.score, found.searched
                ),
            )
            for match in found.matches
        ]

    # --- faces.detect, faces.verify ---------------------------------------------------------------

    async def detect(self, request: m.DetectFaces) -> m.DetectedFaces:
        """Find the faces of an image.

        Raises:
            InvalidRequest: There is no image.
            Unprocessable: It is no image, or this worker's embedder looks for no faces.
            Overloaded: Too many images wait.
        """
        given = _given(request)
        found = await self._workers.run(
            lambda: self._encoder.find(
                given.read(),
                score_min=request.score_min,
                faces_max=request.faces_max,
                small=request.small,
                field=given.field,
            )
        )
        return m.DetectedFaces(
            width=found.width,
            height=found.height,
            faces=[_told(face, UNBOUND) for face in found.faces],
        )

    async def verify(self, request: m.VerifyFaces) -> m.VerifiedFaces:
        """Say whether two faces are one person.

        Raises:
            InvalidRequest: A side has not one of image and embedding, or so low a rate of false
                matches was never measured.
            NotFound: There is no such dataset.
            Unprocessable: There is no face in an image.
            Overloaded: Too many images wait.
        """
        name = self._encoder.name
        threshold = await self._verify_threshold(request)
        # One after the other: a queue of one takes both.
        a, faces_a = await self._side(request.a, "a")
        b, faces_b = await self._side(request.b, "b")
        similarity = float(np.clip(a @ b, -1, 1))
        return m.VerifiedFaces(
            similarity=similarity,
            same=similarity >= threshold,
            threshold=threshold,
            false_match_rate=calibration.false_match_rate(name, threshold),
            false_match_rate_here=calibration.false_match_rate(name, similarity),
            embedder=name,
            faces_a=[_told(face, UNBOUND) for face in faces_a],
            faces_b=[_told(face, UNBOUND) for face in faces_b],
        )

    async def _verify_threshold(self, request: m.VerifyFaces) -> float:
        if request.threshold is not None:
            return request.threshold
        if request.false_match_rate is not None:
            name, rate = self._encoder.name, request.false_match_rate
            found = calibration.cosine_at(name, rate)
            if found is None:
                least = calibration.rate_min(name)
                measured = f"from {least:g} on" if least else "none"
                raise InvalidRequest(
                    f"false_match_rate: it is {rate:g}; measured for {name} are rates {measured}: "
                    "give a threshold instead",
                    field="false_match_rate",
                )
            return found
        dataset = None
        if request.dataset is not None:
            dataset = await self._galleries.settings(request.dataset)
        return self._thresholds.verify(self._encoder.name, dataset)

    async def _side(self, side: m.FaceSide, path: str) -> tuple[Floats, list[Face]]:
        if side.embedding is None:
            given = _given(side, "embedding", path=f"{path}.")
            return await self._workers.run(
                lambda: self._encoder.encode(given.read(), field=given.field)
            )
        _one_of(side, "image_base64", "image", "embedding", path=f"{path}.")
        field = f"{path}.embedding"
        vector = unit_of(side.embedding, field=field)
        if len(vector) != self._encoder.dimensions:
            raise InvalidRequest(
                f"{field}: it has {len(vector)} dimensions, those of {self._encoder.name} have "
                f"{self._encoder.dimensions}",
                field=field,
            )
        return vector, []


def first_known(matches: Sequence[m.FaceMatch]) -> m.FaceMatch | None:
    """Return the match that says who somebody is: the best one that counts; None for a stranger."""
    return next((one for one in matches if one.known), None)


def decisive(match: Match, settings: m.DatasetSettings) -> float:
    """Return the cosine by which it is decided whether a match is known."""
    if settings.scoring == "mean" and match.subject_score is not None:
        return match.subject_score
    return match.score


def unit_of(values: Sequence[float], *, field: str) -> Floats:
    """Return a caller's vector at length 1; whoever compares it checks its dimensions.

    Raises:
        InvalidRequest: It has no direction.
    """
    wide = np.asarray(values, np.float64)
    length = float(np.linalg.norm(wide)) if len(wide) else 0.0
    if not np.isfinite(length) or length == 0:
        raise InvalidRequest(
            f"{field}: it has no direction: it is empty, all zeros or too large", field=field
        )
    return np.asarray(wide / length, np.float32)


@dataclass(frozen=True)
class _Given:
    """An image as a request carries it.

    Attributes:
        field: Where.
        content: Base64, or the file itself.
    """

    field: str
    content: str | bytes

    def read(self) -> bytes:
        """Return the file; takes some milliseconds for base64, so not in the event loop."""
        if isinstance(self.content, bytes):
            return self.content
        return images.from_base64(self.content, field=self.field)


def _given(request: Any, *besides: str, path: str = "") -> _Given:
    """Return the one image of a request that has `image_base64` and `image`.

    Raises:
        InvalidRequest: There is none, or more than one, or one of `besides` as well.
    """
    name = _one_of(request, "image_base64", "image", *besides, path=path)
    return _Given(f"{path}{name}", getattr(request, name))


def _one_of(request: Any, *names: str, path: str = "") -> str:
    there = [name for name in names if getattr(request, name) is not None]
    if len(there) == 1:
        return there[0]
    # `image` is what MessagePack has for `image_base64`: named where there is nothing else.
    allowed = [names[0], names[-1]]
    found = "both" if there == allowed else " and ".join(there) or "neither"
    raise InvalidRequest(
        f"{path and path[:-1] + ': '}give either {' or '.join(allowed)}; there is {found}",
        field=f"{path}{names[0]}",
    )


def _bounds(bounds: m.QualityBounds, request: m.EncodeFace) -> m.QualityBounds:
    """Return what is asked of the face; without a bound if nothing follows from one."""
    below = request.quality or (bounds.below if request.persist else "warn")
    if below == "off":
        return m.QualityBounds(below="off", size_min_px=None)
    return msgspec.structs.replace(bounds, below=below)


def _told(face: Face, bounds: m.QualityBounds, *, embedding: bool = False) -> m.FaceInfo:
    vector = face.embedding if embedding else None
    return m.FaceInfo(
        box=[round(value, 1) for value in face.box],
        landmarks=[[round(x, 1), round(y, 1)] for x, y in face.landmarks],
        score=round(face.score, 4),
        quality=face.quality.measures(),
        warnings=[one.sentence for one in quality.shortfalls(face.quality, bounds)],
        embedding=None if vector is None else vector.tolist(),
    )

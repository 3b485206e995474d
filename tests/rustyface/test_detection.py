"""Faces in a picture."""

from collections.abc import Callable
from itertools import pairwise

import cv2
import numpy as np
import pytest

from services.rustyface.photos import weights
from services.rustyface.photos.detection import TILE_OVERLAP, Detector, _begins
from services.rustyface.photos.images import Image
from services.rustyface.photos.pipeline import Pipeline

Photo = Callable[[str], Image]


@pytest.fixture
def detector(pipeline: Pipeline) -> Detector:
    return pipeline.detector


@pytest.mark.parametrize("name", ["astronaut", "cameraman", "astronaut-changed"])
def test_it_finds_what_opencv_finds(detector: Detector, photo: Photo, name: str):
    image = photo(name)
    theirs = cv2.FaceDetectorYN.create(str(weights.find(weights.YUNET)), "", (320, 320), 0.7)
    theirs.setInputSize((image.shape[1], image.shape[0]))
    _, faces = theirs.detect(image)
    ours = detector.detect(image)
    assert len(faces) == 1
    assert ours.boxes == pytest.approx(faces[:, :4], abs=1e-3)
    assert ours.landmarks.reshape(-1, 10) == pytest.approx(faces[:, 4:14], abs=1e-3)
    assert ours.scores == pytest.approx(faces[:, 14], abs=1e-5)


def test_a_cup_of_coffee_has_no_face(detector: Detector, photo: Photo):
    found = detector.detect(photo("coffee"))
    assert found.boxes.shape == (0, 4)
    assert found.landmarks.shape == (0, 5, 2)
    assert found.scores.shape == (0,)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3_000), (31, 33), (3_000, 2)])
def test_pictures_of_any_shape_are_searched(detector: Detector, shape: tuple[int, int]):
    assert len(detector.detect(np.full((*shape, 3), 127, np.uint8)).scores) == 0


def test_places_in_a_large_picture_are_in_its_own_pixels(detector: Detector, photo: Photo):
    small = photo("astronaut")
    large = cv2.resize(small, None, fx=5, fy=4, interpolation=cv2.INTER_CUBIC)
    times = np.array([5, 4, 5, 4])
    (box,) = detector.detect(large).boxes
    assert box == pytest.approx(detector.detect(small).boxes[0] * times, rel=0.1)


def test_every_face_of_a_picture_is_found_once(detector: Detector, photo: Photo):
    face = photo("astronaut")[:256, 100:356]
    found = detector.detect(np.tile(face, (2, 2, 1)))
    assert len(found.scores) == 4
    assert (np.diff(found.scores) <= 0).all()
    centres = found.boxes[:, :2] + found.boxes[:, 2:] / 2
    assert {tuple(c) for c in (centres // 256).astype(int)} == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_a_face_below_the_asked_score_is_left_out(detector: Detector, photo: Photo):
    assert len(detector.detect(photo("cameraman"), score_min=0.92).scores) == 0
    assert len(detector.detect(photo("astronaut"), score_min=0.92).scores) == 1


def collage(photo: Photo, side: int, places: list[tuple[int, int]]) -> Image:
    """Put a portrait, shrunk to `side` pixels, on a large canvas; its face is about a third."""
    canvas = np.full((3_000, 4_000, 3), (150, 160, 170), np.uint8)
    portrait = cv2.resize(
        photo("astronaut")[:256, 100:356], (side, side), interpolation=cv2.INTER_AREA
    )
    for top, left in places:
        canvas[top : top + side, left : left + side] = portrait
    return canvas


# In corners, in the middle, and on the edges of tiles, of which the first ones begin at 0 and 472.
PLACES = [(0, 0), (2_890, 3_890), (430, 440), (600, 600), (1_500, 2_000), (620, 3_400), (2_300, 90)]


def test_small_faces_of_a_large_picture_are_found_in_tiles_and_each_once(
    detector: Detector, photo: Photo
):
    image = collage(photo, 110, PLACES)
    assert len(detector.detect(image).scores) == 0
    found = detector.detect(image, small=True)
    centres = found.boxes[:, :2] + found.boxes[:, 2:] / 2
    assert sorted((int(y // 1), int(x // 1)) for x, y in centres) == [
        (pytest.approx(top + 52, abs=8), pytest.approx(left + 53, abs=8))
        for top, left in sorted(PLACES)
    ]
    assert (np.diff(found.scores) <= 0).all()
    inside = found.landmarks - found.boxes[:, None, :2]
    assert ((inside > 0) & (inside < found.boxes[:, None, 2:])).all()


def test_large_and_small_faces_of_one_picture_are_found_together(detector: Detector, photo: Photo):
    image = collage(photo, 110, [(200, 3_000)])
    image[900:2_900, 300:2_300] = cv2.resize(photo("astronaut")[:256, 100:356], (2_000, 2_000))
    found = detector.detect(image, small=True)
    sizes = sorted(found.boxes[:, 2].tolist())
    assert sizes == [pytest.approx(40, abs=10), pytest.approx(650, abs=120)]


def test_a_picture_that_is_small_itself_needs_no_tiles(detector: Detector, photo: Photo):
    plain, tiled = (detector.detect(photo("astronaut"), small=small) for small in (False, True))
    assert np.array_equal(plain.boxes, tiled.boxes)


@pytest.mark.parametrize("length", [1, 640, 641, 1_000, 1_121, 4_000, 32_767])
def test_tiles_cover_all_of_a_length_and_overlap(length: int):
    begins = _begins(length, 640)
    assert begins[0] == 0
    assert begins[-1] + 640 >= length
    assert all(0 < after - before <= 640 - TILE_OVERLAP for before, after in pairwise(begins))


def test_the_net_sees_a_bounded_number_of_sizes_whatever_the_pictures_are(
    detector: Detector, monkeypatch: pytest.MonkeyPatch
):
    """The runtime keeps memory for what it has seen: 300 pictures must not be 300 sizes."""
    seen: set[tuple[int, ...]] = set()

    class Watched:
        def run(self, _outputs: list[str], blob: np.ndarray) -> list[np.ndarray]:
            seen.add(blob.shape)
            cells = [blob.shape[2] * blob.shape[3] // stride**2 for stride in (8, 16, 32)]
            return [np.zeros((1, n, width)) for width in (1, 1, 4, 10) for n in cells]

    monkeypatch.setattr(detector, "_weights", Watched())
    rng = np.random.default_rng(0)
    for width, height in rng.integers(1, 3_000, (300, 2)):
        detector.detect(np.zeros((height, width, 3), np.uint8), small=bool(width % 50 == 0))
    assert all(side % 32 == 0 and side <= 640 for shape in seen for side in shape[2:])
    assert max(shape[2] for shape in seen) == 640
    assert len(seen) < 60

"""Faces in a picture."""

from collections.abc import Callable

import cv2
import numpy as np
import pytest

from services.rustyface import weights
from services.rustyface.detection import Detector
from services.rustyface.images import Image
from services.rustyface.pipeline import Pipeline

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

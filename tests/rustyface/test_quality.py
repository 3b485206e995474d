"""How good a face is to recognise, and what follows from that."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus import messages as m
from bus.errors import Unprocessable
from services.rustyface.photos.images import Image
from services.rustyface.photos.pipeline import Face, Pipeline
from services.rustyface.photos.quality import _HEAD, Quality, pose, refuse, shortfalls

Photo = Callable[[str], Image]
GOOD = Quality(score=0.95, size_px=120, sharpness=300, yaw=-5, pitch=3, roll=1)


def only_face(pipeline: Pipeline, image: Image) -> Face:
    (face,) = pipeline.analyse(image)
    return face


def seen(yaw: float, pitch: float, roll: float, scale: float = 1.0) -> np.ndarray:
    """Return the landmarks of the average head, turned; x to the right, y down, z away."""
    a, b, c = -np.radians(pitch), -np.radians(yaw), np.radians(roll)
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    about_z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    turned = _HEAD[:, :3] @ (about_z @ about_y @ about_x).T
    return (scale * turned[:, :2] + 500).astype(np.float32)


@given(st.floats(-60, 60), st.floats(-40, 40), st.floats(-80, 80), st.floats(0.2, 20))
def test_the_pose_of_the_average_head_is_found_however_it_is_turned(
    yaw: float, pitch: float, roll: float, scale: float
):
    assert pose(seen(yaw, pitch, roll, scale)) == pytest.approx((yaw, pitch, roll), abs=0.2)


def test_signs_are_as_one_says_them():
    """To the right in the picture, up, and clockwise are positive."""
    straight = seen(0, 0, 0)
    nose, left_eye = 2, 1
    assert seen(20, 0, 0)[nose][0] > straight[nose][0]
    assert seen(0, 20, 0)[nose][1] < straight[nose][1]
    assert seen(0, 0, 20)[left_eye][1] > straight[left_eye][1]


def test_points_in_one_place_have_no_pose():
    assert pose(np.full((5, 2), 7, np.float32)) == (0, 0, 0)


def test_a_profile_is_turned_more_than_a_portrait_and_its_mirror_image_the_other_way(
    pipeline: Pipeline, photo: Photo
):
    profile = photo("cameraman")
    portrait, right, left = (
        only_face(pipeline, image).quality
        for image in (photo("astronaut"), profile, profile[:, ::-1].copy())
    )
    assert abs(portrait.yaw) < 15
    assert right.yaw == pytest.approx(65, abs=10)
    assert left.yaw == pytest.approx(-65, abs=10)


def test_a_good_face_falls_short_of_nothing():
    bounds = m.QualityBounds(size_min_px=100, sharpness_min=100, score_min=0.9, yaw_max=20)
    assert shortfalls(GOOD, bounds) == []


@pytest.mark.parametrize(
    ("bounds", "measure", "says"),
    [
        ({"size_min_px": 121}, "size_px", "120 pixels wide, 121 are needed"),
        ({"sharpness_min": 400}, "sharpness", "sharpness is 300, 400 is needed"),
        ({"score_min": 0.96}, "score", "score is 0.95, 0.96 is needed"),
        ({"yaw_max": 4}, "yaw", "turned 5 degrees to the side, 4 are allowed"),
    ],
)
def test_each_bound_is_told_with_what_was_found(bounds: dict, measure: str, says: str):
    (short,) = shortfalls(GOOD, m.QualityBounds(**bounds))
    assert short.measure == measure
    assert says in short.sentence


def test_a_bound_at_null_does_not_count():
    nothing = Quality(score=0, size_px=0, sharpness=0, yaw=90, pitch=90, roll=90)
    assert shortfalls(nothing, m.QualityBounds(size_min_px=None)) == []


def test_a_refusal_names_every_measure_with_found_and_bound():
    bounds = m.QualityBounds(size_min_px=200, yaw_max=2)
    with pytest.raises(Unprocessable, match="'staff' takes no such face: .*200 are needed; ") as no:
        refuse(shortfalls(GOOD, bounds), dataset="staff", field="image")
    assert no.value.field == "image"
    assert no.value.details == {
        "size_px": {"found": 120, "bound": 200},
        "yaw": {"found": 5, "bound": 2},
    }
    assert len(no.value.reasons or []) == 2
    refuse([], dataset="staff", field="image")

"""Cosines come out the same to the last bit, whatever else is computed with them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.rustyface.galleries import cosines

RNG = np.random.default_rng(7)
ROWS, _ = cosines.units(RNG.standard_normal((300, 24)))
QUERIES, _ = cosines.units(RNG.standard_normal((5, 24)))
places = st.lists(st.integers(0, len(ROWS) - 1), max_size=60)


@given(st.lists(places.filter(bool), max_size=12), st.integers(1, 50))
def test_means_are_the_same_alone_and_together_in_steps_of_any_size(persons, at_once: int):
    every = [np.array(one) for one in persons]
    alone = [cosines.means(ROWS, [one])[0] for one in every]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cosines, "_AT_ONCE", at_once)
        together = cosines.means(ROWS, every)
    assert together.shape == (len(every), 24)
    assert (together == np.array(alone).reshape(-1, 24)).all()
    for direction, own in zip(together, every, strict=True):
        mean = ROWS[own].mean(axis=0)
        assert direction == pytest.approx(mean / np.linalg.norm(mean), abs=1e-5)


@given(places, st.integers(1, 50), st.data())
def test_cosines_are_the_same_alone_and_together_in_steps_of_any_size(at, at_once: int, data):
    asked = data.draw(st.lists(st.integers(0, 4), min_size=len(at), max_size=len(at)))
    rows, queries = np.array(at, np.int64), np.array(asked, np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cosines, "_AT_ONCE", at_once)
        together = cosines.exact(ROWS, rows, QUERIES, queries)
    for i, cosine in enumerate(together):
        [alone] = cosines.exact(ROWS, rows[i : i + 1], QUERIES, queries[i : i + 1])
        assert cosine == alone
        plain = (ROWS[at[i]].astype(np.float64) * QUERIES[asked[i]].astype(np.float64)).sum()
        assert cosine == plain


def test_faces_that_are_each_other_s_opposite_have_no_mean():
    rows = np.stack([ROWS[0], -ROWS[0]])
    assert not cosines.means(rows, [np.array([0, 1])]).any()

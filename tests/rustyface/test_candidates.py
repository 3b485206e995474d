"""Candidates of searches: whatever is let go of could not have been among the best."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.rustyface.galleries.candidates import Candidates

SLACK = 1e-3


def candidates(wanted, groups, *, threshold=-1.0, by_group=False) -> Candidates:
    n = len(wanted)
    numbers = np.asarray(groups, np.int32)
    return Candidates([threshold] * n, wanted, [by_group] * n, numbers, SLACK)


def left_of(found: Candidates, search: int) -> set[int]:
    asked, rows = found.left()
    return set(rows[asked == search].tolist())


@given(
    st.integers(0, 2**32),
    st.integers(1, 1_500),
    st.sampled_from([1, 3, 40]),
    st.lists(
        st.tuples(st.integers(1, 9), st.booleans(), st.sampled_from([-1.0, 0.0, 0.9])),
        min_size=1,
        max_size=4,
    ),
    st.integers(1, 700),
    st.sampled_from([1e-4, 0.05, 1.0]),
)
def test_the_best_are_among_them_however_the_scores_are_off(seed, n, persons, asked, step, spread):
    """Of many equal ones, too, and of persons, in blocks of any size."""
    random = np.random.default_rng(seed)
    right = random.uniform(-spread, spread, (len(asked), n)).round(3)
    off = (right + random.uniform(-SLACK, SLACK, right.shape)).astype(np.float32)
    groups = random.integers(-1, persons, n).astype(np.int32)
    wanted, by_group, thresholds = ([one[i] for one in asked] for i in range(3))
    found = Candidates(thresholds, wanted, by_group, groups, SLACK * 1.01)
    for begin in range(0, n, step):
        found.take(off[:, begin : begin + step], begin)
    for i, (k, grouped, threshold) in enumerate(asked):
        left, seen, last = left_of(found, i), set[int](), -2.0
        for row in np.argsort(-right[i], kind="stable").tolist():
            score = right[i, row]
            if score < threshold or (len(seen) == k and score < last):
                break
            person = groups[row] if grouped and groups[row] >= 0 else -1 - row
            if person not in seen:
                # The k best, and whoever is as good as the last of them.
                assert row in left
                seen, last = (seen | {person}) if len(seen) < k else seen, score


def test_few_are_left_of_many_and_of_each_person_only_the_best():
    random = np.random.default_rng(5)
    scores = random.uniform(-1, 1, (3, 50_000)).astype(np.float32)
    plain = candidates([10, 20, 30], [-1] * 50_000)
    persons = candidates([10, 20, 30], random.integers(0, 4, 50_000), by_group=True)
    for found in (plain, persons):
        for begin in range(0, 50_000, 20_000):
            found.take(scores[:, begin : begin + 20_000], begin)
        assert len(found.left()[0]) < 300


@pytest.mark.parametrize("by_group", [False, True])
def test_of_equal_ones_none_is_let_go(by_group):
    found = candidates([2], range(5_000), by_group=by_group)
    for begin in (0, 2_500):
        found.take(np.full((1, 2_500), 0.5, np.float32), begin)
    assert left_of(found, 0) == set(range(5_000))


def test_nothing_is_left_of_nothing():
    assert [len(one) for one in candidates([3], []).left()] == [0, 0]

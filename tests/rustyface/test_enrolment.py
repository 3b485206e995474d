"""Entries in parts that the broker stores as one, and those that share an id."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.streams import AS_ONE_MAX, AS_ONE_MAX_BYTES
from services.rustyface.galleries.enrolment import distinct, parts
from services.rustyface.galleries.galleries import NewEntry

EAST, NORTH = np.array([1, 0], np.float32), np.array([0, 1], np.float32)


@given(
    st.lists(st.integers(1, AS_ONE_MAX_BYTES * 2), max_size=20)
    | st.lists(st.integers(1, 1_000), min_size=AS_ONE_MAX, max_size=3 * AS_ONE_MAX)
)
def test_parts_are_all_entries_in_their_order_and_no_larger_than_the_broker_is_given(sizes):
    entries = [NewEntry(id=f"e{i}", vector=EAST) for i in range(len(sizes))]
    bytes_of = {entry.id: size for entry, size in zip(entries, sizes, strict=True)}
    found = list(parts(entries, bytes_of))
    assert [one for part in found for one in part] == entries
    for part in found:
        assert 1 <= len(part) <= AS_ONE_MAX
        assert len(part) == 1 or sum(bytes_of[one.id] for one in part) <= AS_ONE_MAX_BYTES
    # Nothing is left for the next part that this one has room for.
    for part, after in itertools.pairwise(found):
        more = sum(bytes_of[one.id] for one in [*part, after[0]])
        assert len(part) == AS_ONE_MAX or more > AS_ONE_MAX_BYTES


@pytest.mark.parametrize(
    ("existing", "kept"), [("skip", EAST), ("fail", EAST), ("replace", NORTH), ("renew", NORTH)]
)
def test_of_entries_with_one_id_the_last_one_counts_if_they_may_replace(existing, kept):
    entries = [NewEntry(id="a", vector=EAST), NewEntry(id="a", vector=NORTH)]
    found, doubled = distinct(entries, existing)
    assert found["a"].vector is kept
    assert doubled == ["a"]

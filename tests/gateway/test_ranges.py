"""The header `Range`: one range of a file's bytes, all of them, or none that there could be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway import ranges

sizes = st.integers(0, 2_000)


@given(st.text(max_size=30) | st.from_regex(r"bytes=\d{0,4}-\d{0,4}", fullmatch=True), sizes)
def test_a_range_lies_inside_the_file_or_is_refused(header, size):
    try:
        part = ranges.range_of(header, size)
    except ranges.Unsatisfiable:
        return
    if part is not None:
        assert 0 <= part[0] < part[1] <= size


@given(st.integers(0, 3_000), st.integers(0, 3_000), sizes)
def test_a_range_is_the_slice_that_it_says(first, last, size):
    whole = bytes(i % 251 for i in range(size))
    try:
        part = ranges.range_of(f"bytes={first}-{last}", size)
    except ranges.Unsatisfiable:
        assert not whole[first : last + 1]
        return
    # The wrong way round it is no range, and so all of it.
    assert part is None if last < first else whole[slice(*part)] == whole[first : last + 1]


@given(st.integers(0, 3_000), sizes)
def test_a_suffix_is_the_end_of_the_file(length, size):
    whole = bytes(i % 251 for i in range(size))
    try:
        part = ranges.range_of(f"bytes=-{length}", size)
    except ranges.Unsatisfiable:
        assert length == 0 or size == 0
        return
    assert whole[slice(*part)] == whole[-length:]


@pytest.mark.parametrize(
    "header",
    [None, "", "bytes", "bytes=", "bytes=-", "bytes=1", "bytes=a-b", "lines=0-1", "bytes=0-1,3-4",
     "bytes=5-2", f"bytes={'9' * 30}-", "bytes=٣-٤"],
)  # fmt: skip
def test_what_is_no_single_range_means_all_of_it(header):
    assert ranges.range_of(header, 100) is None

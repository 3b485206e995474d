"""Filters of metadata: columns that come and go find what reading every entry finds."""

from collections import Counter

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus import codec
from bus.errors import InvalidRequest
from services.rustyface.galleries.filters import COLUMNS_MAX, VALUES_MAX, Columns, compiled, read
from services.rustyface.galleries.search import Matrix, Search


def mostly(often: st.SearchStrategy, seldom: st.SearchStrategy) -> st.SearchStrategy:
    """Draw from one four times as often as from the other; `one_of` would forget the weights."""
    return st.sampled_from([often] * 4 + [seldom]).flatmap(lambda drawn: drawn)


# Few and often the same: what never fits tells nothing of what should.
values = mostly(
    st.sampled_from([1, True, "a"]),
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-2, 2),
        st.sampled_from([1.0, 1.5, "1", "a", "", {"x": 1}, {}, []]),
    ),
)
leaves = mostly(values, st.lists(values, max_size=3))
objects = st.fixed_dictionaries(
    {"a": mostly(leaves, st.fixed_dictionaries({"c": leaves}, optional={"a": leaves}))},
    optional={"b": mostly(leaves, st.fixed_dictionaries({"a": leaves}))},
)
metadata = mostly(objects, leaves)
paths = mostly(st.just("a"), st.sampled_from(["b", "a.c", "b.a"]))
asked = st.dictionaries(paths, mostly(values, st.lists(values, max_size=3)), max_size=2)
changes = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "put", "delete", "find"]), st.integers(0, 30), metadata
    ),
    min_size=4,
    max_size=60,
)


def same(a: object, b: object) -> bool:
    """Return whether JSON would call them equal: true is no number."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def fits(whole: object, asked: dict) -> bool:
    for path, wanted in asked.items():
        value = whole
        for name in path.split("."):
            if not isinstance(value, dict) or name not in value:
                return False
            value = value[name]
        every = [value, *value] if isinstance(value, list) else [value]
        any_of = wanted if isinstance(wanted, list) else [wanted]
        if not any(same(one, it) for one in any_of for it in every):
            return False
    return True


def test_after_any_changes_it_finds_what_reading_every_entry_finds():
    met: Counter[bool] = Counter()

    @settings(max_examples=300)
    @given(changes, asked)
    def whatever_changes(steps, asked: dict) -> None:
        matrix, plain = Matrix(2), dict[str, object]()
        wanted, _ = compiled(asked)
        search = Search(query=np.array([1, 0], np.float32), k=100, threshold=-1, wanted=wanted)
        for step, number, value in [*steps, ("find", 0, None)]:
            name = f"e{number}"
            match step:
                case "put":
                    raw = codec.encode(value, codec.MSGPACK)
                    matrix.put_many([name], np.array([[1, 0]], np.float32), [-1], [raw])
                    plain[name] = value
                case "delete":
                    matrix.delete(name)
                    plain.pop(name, None)
                case "find":
                    [found] = matrix.search(search)
                    expected = sorted(one for one, value in plain.items() if fits(value, asked))
                    met[bool(expected)] += bool(asked and plain)
                    assert sorted(hit.id for hit in found.hits) == expected
                    assert found.searched == len(expected)

    whatever_changes()
    # Filters that say something did fit some, and did not fit any.
    assert min(met[True], met[False]) > 20


@given(st.lists(st.tuples(st.sampled_from(["put", "delete"]), st.integers(0, 9)), max_size=40))
def test_a_column_follows_the_rows_to_their_new_places(steps: list[tuple[str, int]]):
    matrix, plain = Matrix(2), set[str]()
    for i, (step, number) in enumerate(steps):
        name = f"e{number}"
        if step == "put":
            raw = codec.encode({"own": number}, codec.MSGPACK)
            matrix.put_many([name], np.array([[1, 0]], np.float32), [-1], [raw])
            plain.add(name)
        else:
            matrix.delete(name)
            plain.discard(name)
        # Not after each step: rows that were not read yet move, too.
        for asked in range(10 if i % 3 else 0):
            wanted, _ = compiled({"own": asked})
            search = Search(query=np.array([1, 0], np.float32), k=9, threshold=-1, wanted=wanted)
            [found] = matrix.search(search)
            assert [hit.id for hit in found.hits] == [f"e{asked}"] * (f"e{asked}" in plain)


def test_persons_are_told_apart_from_metadata():
    wanted, subjects = compiled({"subject": ["ann", "bob"], "a.b": 1})
    assert subjects == {"ann", "bob"}
    assert [one.path for one in wanted] == ["a.b"]
    assert compiled({"subject": "ann"}) == ((), frozenset({"ann"}))
    assert compiled({}) == ((), None)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"": 1}, "'' names no field"),
        ({"a..b": 1}, "'a..b' names no field"),
        ({"subject": 7}, "filter.subject: persons are named by texts"),
        ({"subject": ["ann", None]}, "filter.subject: persons are named by texts"),
        ({"a": list(range(VALUES_MAX + 1))}, "filter.a has 1,001 values, allowed are 1,000"),
    ],
)
def test_a_filter_that_cannot_be_meant_is_refused(asked: dict, said: str):
    with pytest.raises(InvalidRequest, match=said):
        compiled(asked)


def test_only_the_fields_asked_for_last_are_kept():
    columns = Columns()
    raw = [msgspec.msgpack.encode({f"f{i}": i for i in range(COLUMNS_MAX + 5)})] * 3
    for i in range(COLUMNS_MAX + 5):
        [wanted], _ = compiled({f"f{i}": i})
        assert columns.fits(wanted, raw, 3).all()
    assert len(columns._columns) == COLUMNS_MAX


def test_metadata_that_cannot_be_read_are_none():
    for raw in (b"", b"\xc1", b"\xa1\xff", b"\x81"):
        assert read(raw) is None

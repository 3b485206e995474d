"""The vectors of one gallery."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.errors import InvalidRequest
from services.rustyface.galleries.search import Hit, Matrix, Search, Snapshot
from tests.rustyface.matrices import nearest, put

# Small whole numbers, so that equal scores are common.
vectors = st.lists(st.integers(-3, 3), min_size=3, max_size=3).filter(any)
changes = st.lists(
    st.tuples(st.sampled_from(["put", "put", "delete"]), st.integers(0, 150), vectors),
    max_size=300,
)


def cosine(a: list[int], b: list[int]) -> float:
    return float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))


@given(changes, vectors, st.integers(1, 20), st.sampled_from([-1.0, 0.0, 0.3, 0.9]))
def test_after_any_changes_it_finds_what_a_plain_search_finds(
    steps: list[tuple[str, int, list[int]]], query: list[int], k: int, threshold: float
):
    matrix, plain = Matrix(3), dict[str, list[int]]()
    for step, number, vector in steps:
        name = f"e{number:03}"
        if step == "put":
            put(matrix, name, vector)
            plain[name] = vector
        else:
            assert matrix.delete(name) == (plain.pop(name, None) is not None)
    assert sorted(matrix.ids()) == sorted(plain)
    assert len(matrix) == len(plain)
    every = sorted((cosine(query, v) for v in plain.values()), reverse=True)
    hits = nearest(matrix, query, k, threshold - 1e-6)
    assert [h.score for h in hits] == pytest.approx(
        [s for s in every[:k] if s >= threshold - 1e-6], abs=1e-6
    )
    for hit in hits:
        assert hit.score == pytest.approx(cosine(query, plain[hit.id]), abs=1e-6)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["put", "put", "delete", "move", "read", "done"]),
            st.integers(0, 20),
            vectors,
        ),
        max_size=80,
    )
)
def test_a_reader_sees_what_was_there_when_it_began_whatever_changes_meanwhile(
    steps: list[tuple[str, int, list[int]]],
):
    matrix, plain = Matrix(3), dict[str, tuple[list[int], int]]()
    reading: tuple[Snapshot, dict[str, tuple[list[int], int]]] | None = None
    search = Search(query=matrix.unit([1, 2, 3]), k=100, threshold=-1)
    for step, number, vector in [*steps, ("done", 0, [1])]:
        name = f"e{number:02}"
        if step == "put":
            put(matrix, name, vector, number % 3)
            plain[name] = (vector, number % 3)
        elif step == "delete":
            matrix.delete(name)
            plain.pop(name, None)
        elif step == "move" and name in plain:
            matrix.regroup([name], 7)
            plain[name] = (plain[name][0], 7)
        elif step == "read" and reading is None:
            reading = matrix.snapshot(), dict(plain)
        elif step == "done" and reading is not None:
            [found] = reading[0].find([search])
            told = {hit.id: (hit.score, hit.group) for hit in found.hits}
            assert told == {
                one: (pytest.approx(cosine([1, 2, 3], v), abs=1e-6), group)
                for one, (v, group) in reading[1].items()
            }
            matrix.release()
            reading = None
            # Nothing is left of what was deleted or replaced.
            assert len(matrix._ids) == len(plain)
    [found] = matrix.search(search)
    assert {hit.id: hit.group for hit in found.hits} == {one: g for one, (_, g) in plain.items()}


def test_of_equal_scores_the_smaller_id_comes_first():
    matrix = Matrix(2)
    for name in "dbca":
        put(matrix, name, [0, 2])
    assert nearest(matrix, [0, 1], 3) == [Hit("a", 1.0), Hit("b", 1.0), Hit("c", 1.0)]


def test_a_second_vector_replaces_the_first():
    matrix = Matrix(2)
    put(matrix, "a", [1, 0])
    put(matrix, "a", [0, 5])
    assert len(matrix) == 1
    assert "a" in matrix
    assert matrix.vector("a") == pytest.approx([0, 1])
    assert matrix.vector("b") is None


def test_memory_grows_by_doubling_and_rows_stay_one_block():
    matrix = Matrix(4)
    sizes = set()
    for i in range(1_000):
        put(matrix, str(i), [i, 1, 0, 0])
        sizes.add(matrix.nbytes)
    assert sorted(sizes) == [64 * 16 * 2**i for i in range(5)]
    assert nearest(matrix, [1, 1, 0, 0], 1) == [Hit("1", pytest.approx(1))]


def test_nothing_is_found_in_an_empty_gallery():
    assert nearest(Matrix(2), [1, 0]) == []


@pytest.mark.parametrize(
    ("vector", "said"),
    [
        ([1, 2, 3], "has 3 dimensions, the gallery has 2"),
        ([[1, 2]], "has 1 x 2 dimensions, the gallery has 2"),
        (7, "has no dimensions, the gallery has 2"),
        ([0, 0], "only zeros"),
        ([1, float("nan")], "no finite numbers"),
        ([1, float("inf")], "no finite numbers"),
        (["a", "b"], "no list of numbers"),
        ([[1], [2, 3]], "no list of numbers"),
    ],
)
def test_vectors_that_do_not_fit_are_refused_with_both_sides_named(vector: list[float], said: str):
    matrix = Matrix(2)
    for use in (lambda: put(matrix, "a", vector), lambda: nearest(matrix, vector)):
        with pytest.raises(InvalidRequest, match=said) as refused:
            use()
        assert refused.value.field == "embedding"
    assert len(matrix) == 0


def test_very_large_and_very_small_vectors_have_a_direction_too():
    matrix = Matrix(2)
    put(matrix, "large", [1e300, 1e300])
    put(matrix, "small", [1e-300, -1e-300])
    assert nearest(matrix, [1, 1], 1) == [Hit("large", pytest.approx(1))]

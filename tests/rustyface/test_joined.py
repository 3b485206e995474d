"""Searches that wait together: one pass for all, each its own answer, and nobody held up."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from bus.testing import until
from services.rustyface.galleries import search as searching
from services.rustyface.galleries.cosines import units
from services.rustyface.galleries.joined import AT_ONCE_MAX, Joined
from services.rustyface.galleries.search import NOBODY, Matrix, Search
from tests.rustyface.matrices import put

RNG = np.random.default_rng(3)


@pytest.fixture
def threads():
    with ThreadPoolExecutor(1) as pool:
        yield pool


def filled(n: int, dimensions: int = 16, groups: int = 9) -> Matrix:
    matrix = Matrix(dimensions)
    rows, _ = units(RNG.standard_normal((n, dimensions)))
    persons = RNG.integers(-1, groups, n).tolist()
    matrix.put_many([f"e{i:06}" for i in range(n)], rows, persons, [b""] * n)
    return matrix


def asking(matrix: Matrix, **more) -> Search:
    query = matrix.unit(RNG.standard_normal(matrix.dimensions))
    return Search(**{"query": query, "k": 5, "threshold": 0.0, **more})


class Held:
    """Holds the thread up until it is let go."""

    def __init__(self, joined: Joined) -> None:
        self._go, self.began = threading.Event(), threading.Event()
        self._task = asyncio.create_task(joined.read(self._wait))

    def _wait(self, _snapshot) -> None:
        self.began.set()
        self._go.wait(20)

    async def __aenter__(self) -> None:
        await until(self.began.is_set)

    async def __aexit__(self, *_error: object) -> None:
        self._go.set()
        await self._task


async def test_what_waits_together_is_one_pass_and_each_gets_its_own_answer(threads):
    matrix = filled(2_000)
    joined = Joined(matrix, threads)
    searches = [asking(matrix, k=i % 7 + 1, by_group=i % 2 == 0) for i in range(AT_ONCE_MAX + 3)]
    alone = [matrix.search(one)[0] for one in searches]
    async with Held(joined):
        answers = [asyncio.create_task(joined.search(one)) for one in searches]
        await asyncio.sleep(0)
    assert await asyncio.gather(*answers) == alone
    assert joined.passes == 3


async def test_the_answer_to_one_is_the_same_whoever_else_asks():
    """To the last bit, or two replicas would disagree."""
    matrix = filled(5_000, 128)
    searches = [asking(matrix) for _ in range(AT_ONCE_MAX)]
    assert list(matrix.search(*searches)) == [matrix.search(one)[0] for one in searches]


@examples(max_examples=60)
@given(
    st.integers(1, 4_000),
    st.lists(
        st.fixed_dictionaries(
            {
                "k": st.integers(1, 60),
                "threshold": st.sampled_from([-1.0, 0.0, 0.5, 0.9]),
                "by_group": st.booleans(),
                "by_mean": st.booleans(),
                "groups": st.none() | st.frozensets(st.integers(0, 8), max_size=4),
                "rejected": st.none() | st.frozensets(st.integers(0, 8), min_size=1, max_size=3),
            }
        ),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from([100, 1_000]),
)
def test_different_searches_find_together_in_small_blocks_what_each_finds_alone(
    n: int, asked: list[dict], rows_at_once: int
):
    matrix = filled(n, 8)
    faces, _ = units(RNG.standard_normal((2, 8)))
    searches = [
        asking(
            matrix, **one | {"rejected": one["rejected"] and dict.fromkeys(one["rejected"], faces)}
        )
        for one in asked
    ]
    alone = [matrix.search(one)[0] for one in searches]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(searching, "_ROWS_AT_ONCE", rows_at_once)
        patch.setattr(searching, "_SCORES_AT_ONCE", rows_at_once)
        assert matrix.search(*searches) == alone


async def test_where_a_row_stands_makes_no_difference():
    matrix, other = filled(300, 128), Matrix(128)
    for name in sorted(matrix.ids(), reverse=True):
        row = matrix._row_of[name]
        put(other, "gone", RNG.standard_normal(128))
        other.put_many([name], matrix._rows[row][None], [int(matrix._groups[row])], [b""])
        other.delete("gone")
    for by_group in (False, True):
        search = asking(matrix, k=50, threshold=-1.0, by_group=by_group)
        assert other.search(search) == matrix.search(search)


async def test_changes_go_on_while_the_rows_are_read_and_are_not_seen_by_the_reader(threads):
    matrix = filled(100)
    joined = Joined(matrix, threads)
    before = matrix.search(asking(matrix, k=200, threshold=-1.0))[0]
    seen: list[list[str]] = []

    def look(snapshot) -> None:
        go.wait(20)
        seen.append(sorted(snapshot.matching((), None)))

    go = threading.Event()
    reading = asyncio.create_task(joined.read(look))
    await asyncio.sleep(0)
    old = matrix.vector("e000001")
    put(matrix, "new", np.ones(16))
    put(matrix, "e000001", np.ones(16))
    matrix.delete("e000002")
    assert len(matrix) == 100
    assert matrix.vector("e000001") == pytest.approx(0.25)
    go.set()
    await reading
    assert len(before.hits) == 100
    assert seen == [[f"e{i:06}" for i in range(100)]]
    # Now that nobody reads, what was deleted and replaced is overwritten.
    assert len(matrix._ids) == 100
    assert not np.isclose(matrix._rows[:110], old).all(axis=1).any()


async def test_the_event_loop_is_not_held_up_by_a_search(threads):
    matrix = filled(60_000, 128)
    joined = Joined(matrix, threads)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    await asyncio.gather(*(joined.search(asking(matrix)) for _ in range(AT_ONCE_MAX)))
    counting.cancel()
    assert turns > 10


async def test_whoever_goes_away_takes_nobody_s_answer_along(threads):
    matrix = filled(50)
    joined = Joined(matrix, threads)
    async with Held(joined):
        first, second, third = (
            asyncio.create_task(joined.search(asking(matrix))) for _ in range(3)
        )
        await asyncio.sleep(0)
        first.cancel()
    assert len((await second).hits) == len((await third).hits) == 5
    assert first.cancelled() or first.cancelling()


async def test_an_error_reaches_those_who_asked_and_the_next_search_goes_on(threads):
    matrix = filled(50)
    joined = Joined(matrix, threads)
    bad = Search(query=np.ones(3, np.float32), k=1, threshold=0)
    with pytest.raises(ValueError, match="matmul"):
        await joined.search(bad)
    assert len((await joined.search(asking(matrix))).hits) == 5


@examples(max_examples=60)
@given(
    st.integers(0, 9_000),
    st.integers(1, 40),
    st.sampled_from([-1.0, 0.0, 0.4, 0.99]),
    st.booleans(),
    st.integers(1, 5),
    st.booleans(),
)
def test_it_finds_what_a_plain_search_finds(
    n: int, k: int, threshold: float, by_group: bool, at_once: int, few_groups: bool
):
    """Over several steps of rows, by entry and by person, alone and joined."""
    matrix = filled(n, 8, 3 if few_groups else 3_000) if n else Matrix(8)
    searches = [asking(matrix, k=k, threshold=threshold, by_group=by_group)] * at_once
    rows = matrix._rows[: len(matrix)].astype(np.float64)
    scores = rows @ searches[0].query.astype(np.float64)
    order = np.lexsort((matrix._ids, -scores)) if n else []
    expected, seen = [], set()
    for row in order:
        group = int(matrix._groups[row])
        if scores[row] >= threshold and not (by_group and group != NOBODY and group in seen):
            expected.append((matrix._ids[row], pytest.approx(scores[row])))
            seen.add(group)
    for result in matrix.search(*searches):
        assert [(hit.id, hit.score) for hit in result.hits] == expected[:k]
        assert result.searched == n
        for hit in result.hits:
            if by_group and hit.group != NOBODY:
                own = rows[matrix._groups[:n] == hit.group]
                mean = own.mean(axis=0)
                cosine = mean @ searches[0].query / np.linalg.norm(mean)
                assert hit.group_entries == len(own)
                assert hit.group_score == pytest.approx(cosine, abs=1e-6)

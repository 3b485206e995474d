"""Who leaves memory so that another model fits."""

import asyncio
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.candle.memory import Full, Memory, NoRoom, give_back, to_evict


@dataclass
class Held:
    label: str
    memory_bytes: int
    pinned: bool = False
    busy: bool = False
    used_at: float = 0.0


def labels(found: object) -> list[str]:
    assert isinstance(found, list)
    return [one.label for one in found]


def test_nobody_leaves_while_there_is_room():
    assert to_evict([Held("a", 40), Held("b", 40)], 20, 100) == []


def test_the_least_recently_used_leaves_first_and_no_more_than_needed():
    held = [Held("new", 40, used_at=3), Held("old", 40, used_at=1), Held("mid", 20, used_at=2)]
    assert labels(to_evict(held, 30, 100)) == ["old"]
    assert labels(to_evict(held, 60, 100)) == ["old", "mid"]


def test_pinned_models_stay():
    held = [Held("pinned", 60, pinned=True, used_at=0), Held("free", 40, used_at=9)]
    assert labels(to_evict(held, 40, 100)) == ["free"]
    assert to_evict(held, 50, 100) == Full(60)


def test_what_is_being_asked_leaves_last():
    held = [Held("asked", 50, busy=True, used_at=0), Held("idle", 50, used_at=9)]
    assert labels(to_evict(held, 50, 100)) == ["idle"]


@given(
    st.lists(
        st.builds(
            Held, st.just("x"), st.integers(0, 50), st.booleans(), st.booleans(), st.floats(0, 9)
        ),
        max_size=8,
    ),
    st.integers(0, 100),
    st.integers(0, 200),
)
def test_after_an_eviction_there_is_room_and_the_pinned_are_there(held, need, budget):
    found = to_evict(held, need, budget)
    pinned = sum(one.memory_bytes for one in held if one.pinned)
    if isinstance(found, Full):
        assert pinned + need > budget
        return
    left = sum(one.memory_bytes for one in held) - sum(one.memory_bytes for one in found)
    assert left + need <= budget
    assert not any(one.pinned for one in found)


async def test_models_load_one_after_the_other_and_growth_is_measured():
    memory = Memory(10**9, list, _never)
    running, most, grown = 0, 0, []

    async def load(size: int) -> None:
        nonlocal running, most
        async with memory.loading("m", size) as measured:
            running += 1
            most = max(most, running)
            content = bytearray(size)
            await asyncio.sleep(0)
            grown.append(measured())
            running -= 1
            del content

    await asyncio.gather(*(load(64_000_000) for _ in range(3)))
    assert most == 1
    assert max(grown) > 32_000_000


async def test_without_room_the_error_says_who_holds_it_and_what_to_turn():
    memory = Memory(100_000_000, lambda: [Held("model 'a'", 90_000_000, pinned=True)], _never)
    with pytest.raises(NoRoom, match=r"about 50 MB.*memory_budget_mb.*held by model 'a'"):
        async with memory.loading("model 'b'", 50_000_000):
            pass
    loose = Memory(100_000_000, lambda: [Held("model 'a'", 90_000_000)], _never)
    with pytest.raises(NoRoom):
        async with loose.loading("model 'b'", 50_000_000, may_evict=False):
            pass


async def _never(_tenant: object) -> None:
    raise AssertionError("nobody has to leave here")


def test_giving_back_memory_works_on_this_platform():
    give_back()

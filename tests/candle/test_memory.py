"""Who leaves memory so that another model fits, and what leaves it is gone."""

import asyncio
import threading
import weakref
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus import messages as m
from bus.errors import Unprocessable
from bus.process import give_back
from bus.subjects import MODEL_LOAD, MODEL_UNLOAD, MODEL_WAKE
from bus.testing import until
from services.candle.repository import repository
from services.candle.serving import version
from services.candle.serving.memory import Full, Memory, NoRoom, to_evict


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
    memory = Memory(100_000_000, lambda: [Held("model 'a'", 90_000_000)], _never)
    with pytest.raises(NoRoom, match=r"about 50 MB.*memory_budget_mb.*held by model 'a'"):
        async with memory.loading("model 'b'", 50_000_000, may_evict=False):
            pass


async def test_what_never_fits_is_no_matter_of_waiting():
    pinned = Held("model 'a'", 60_000_000, pinned=True)
    memory = Memory(100_000_000, lambda: [pinned, Held("model 'c'", 40_000_000)], _never)
    said = r"about 50 MB.*memory_budget_mb allows 100 MB.*60 MB are held by model 'a', which must"
    with pytest.raises(Unprocessable, match=said):
        async with memory.loading("model 'b'", 50_000_000):
            pass
    with pytest.raises(Unprocessable, match=r"about 200 MB.*memory_budget_mb allows 100 MB;"):
        async with Memory(100_000_000, list, _never).loading("model 'b'", 200_000_000):
            pass


async def _never(_tenant: object) -> None:
    raise AssertionError("nobody has to leave here")


def test_giving_back_memory_works_on_this_platform():
    give_back()


class Opening:
    """Opens models for a worker, held up until told to go on, and knows which of them live."""

    def __init__(self, monkeypatch) -> None:
        self.begun = 0
        self.go_on = threading.Event()
        self.most_at_once = 0
        self._at_once = 0
        self._opened: list[weakref.ref] = []
        self._really = version.open_model
        monkeypatch.setattr(version, "open_model", self._open)

    @property
    def living(self) -> int:
        return sum(one() is not None for one in self._opened)

    def _open(self, path, **options):
        self.begun += 1
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        assert self.go_on.wait(30)
        opened = self._really(path, **options)
        self._opened.append(weakref.ref(opened))
        self._at_once -= 1
        return opened


@pytest.fixture
def opening(monkeypatch) -> Opening:
    return Opening(monkeypatch)


async def load(client, path: str, name: str = "m") -> m.LoadedModel:
    return await client.call(MODEL_LOAD, m.LoadModel(id=name, path=path), timeout_s=30)


async def unload(client, name: str = "m") -> None:
    await client.call(MODEL_UNLOAD, m.UnloadModel(id=name), timeout_s=30)


async def test_of_an_unloaded_model_nothing_is_left(client, worker, linear, opening):
    opening.go_on.set()
    async with worker():
        await load(client, linear())
        assert opening.living == 1
        await unload(client)
        assert opening.living == 0


async def test_a_load_that_is_called_off_is_over_before_the_next_one_begins(
    client, worker, linear, opening
):
    async with worker() as candle:
        here = candle._models
        loading = asyncio.create_task(load(client, linear()))
        await until(lambda: opening.begun == 1)
        unloading = asyncio.create_task(unload(client))
        other = asyncio.create_task(load(client, linear("o.json", bias=[1]), name="o"))
        await until(lambda: here["m"].spec.versions[0].wanted is False)
        # The other one waits for its turn.
        await until(lambda: candle._memory._loading._waiters)
        assert not unloading.done()
        assert opening.begun == 1
        opening.go_on.set()
        await unloading
        await other
        await asyncio.gather(loading, return_exceptions=True)
        assert opening.most_at_once == 1
        # The other one; of the first nothing is left.
        await until(lambda: opening.living == 1)


async def test_a_model_that_cannot_be_loaded_takes_no_memory(client, worker, linear, monkeypatch):
    halves: list[weakref.ref] = []

    class Half:
        pass

    def fail(_path, **_options):
        half = Half()
        halves.append(weakref.ref(half))
        raise Unprocessable("the second half is missing")

    monkeypatch.setattr(version, "open_model", fail)
    async with worker() as candle:
        with pytest.raises(Unprocessable, match="second half"):
            await load(client, linear())
        assert [one.state for one in candle._versions()] == ["failed"]
        give_back()
        assert halves[0]() is None


async def test_files_are_looked_into_one_at_a_time(client, worker, linear, monkeypatch):
    running, most = 0, 0
    really = repository.validate

    async def validated(file, **options):
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            return await really(file, **options)
        finally:
            running -= 1

    monkeypatch.setattr(repository, "validate", validated)
    async with worker():
        names = [f"m{i}" for i in range(4)]
        await asyncio.gather(*(load(client, linear(f"{n}.json"), name=n) for n in names))
    assert most == 1


async def test_a_model_that_never_fits_has_failed_and_nothing_wakes_it(
    client, worker, linear, opening
):
    opening.go_on.set()
    path = linear(weights=[1] * 400_000, input_dim=1, output_dim=400_000, bias=[0] * 400_000)
    async with worker(memory_budget_mb=1) as candle:
        with pytest.raises(
            Unprocessable, match=r"about 3\.\d MB.*memory_budget_mb allows 1 MB"
        ) as told:
            await load(client, path)
        assert told.value.details["budget_bytes"] == 1 << 20
        assert [one.state for one in candle._versions()] == ["failed"]
        woken = await client.call(MODEL_WAKE, m.WakeModel(id="m"))
        assert (woken.state, "memory_budget_mb" in woken.reason) == ("failed", True)
        await load(client, linear("small.json"), name="small")
        assert opening.begun == 1
        candle._memory.budget_bytes = 100_000_000
        await load(client, path)
        assert opening.begun == 2

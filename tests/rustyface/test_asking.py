"""One question for all who wait for its answer together."""

import asyncio

import pytest

from bus.errors import Unavailable
from bus.testing import until
from services.rustyface.galleries.asking import AT_ONCE, Asking


class Asked:
    """Counts upwards, each time once it is let go."""

    def __init__(self) -> None:
        self.begun = 0
        self.go = asyncio.Semaphore(0)
        self.fails = False

    async def __call__(self) -> int:
        self.begun += 1
        mine = self.begun
        await self.go.acquire()
        if self.fails:
            raise Unavailable("nobody is there")
        return mine


@pytest.fixture
def asked():
    return Asked()


@pytest.fixture
async def asking(asked):
    made = Asking(asked)
    yield made
    await made.close()


async def test_whoever_waits_together_is_answered_together(asking, asked):
    waiting = [asyncio.create_task(asking.answer()) for _ in range(50)]
    asked.go.release()
    assert await asyncio.gather(*waiting) == [1] * 50


async def test_an_answer_is_never_older_than_the_call(asking, asked):
    first = asyncio.create_task(asking.answer())
    await until(lambda: asked.begun == 1)
    later = [asyncio.create_task(asking.answer()) for _ in range(50)]
    asked.go.release()
    assert await first == 1
    asked.go.release()
    assert await asyncio.gather(*later) == [2] * 50


async def test_beyond_a_few_under_way_all_share_the_next_one(asking, asked):
    before = []
    for i in range(AT_ONCE):
        before.append(asyncio.create_task(asking.answer()))
        await until(lambda wanted=i + 1: asked.begun == wanted)
    later = [asyncio.create_task(asking.answer()) for _ in range(50)]
    await asyncio.sleep(0)
    asked.go.release()
    await until(lambda: asked.begun == AT_ONCE + 1)
    for _ in range(AT_ONCE):
        asked.go.release()
    assert sorted(await asyncio.gather(*before)) == list(range(1, AT_ONCE + 1))
    assert await asyncio.gather(*later) == [AT_ONCE + 1] * 50


async def test_whoever_gives_up_takes_no_answer_from_the_others(asking, asked):
    first, second = (asyncio.create_task(asking.answer()) for _ in range(2))
    await until(lambda: asked.begun == 1)
    first.cancel()
    asked.go.release()
    assert await second == 1


async def test_an_error_is_everybodys_and_the_next_question_is_asked_all_the_same(asking, asked):
    asked.fails = True
    waiting = [asyncio.create_task(asking.answer()) for _ in range(3)]
    asked.go.release()
    for told in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(told, Unavailable)
    asked.fails = False
    asked.go.release()
    assert await asking.answer() == 2


async def test_at_the_end_nobody_waits_for_ever(asking, asked):
    waiting = asyncio.create_task(asking.answer())
    await until(lambda: asked.begun == 1)
    await asking.close()
    for late in (waiting, asking.answer()):
        with pytest.raises(Unavailable, match="asks no more"):
            await late

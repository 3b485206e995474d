"""Work beside a body: owned, ended, and its errors handed on as they are."""

import asyncio
import threading
import weakref

import pytest

from bus.tasks import beside, to_its_end
from bus.testing import until


async def forever() -> None:
    await asyncio.Event().wait()


async def fail() -> None:
    raise KeyError("why")


async def test_work_ends_with_its_body():
    started = asyncio.Event()
    ended = asyncio.Event()

    async def work() -> None:
        started.set()
        try:
            await forever()
        finally:
            ended.set()

    async with beside(work()):
        await started.wait()
    assert ended.is_set()


async def test_work_that_fails_ends_its_body_with_its_error():
    with pytest.raises(KeyError, match="why"):
        async with beside(fail(), forever()):
            await forever()
    assert asyncio.current_task().cancelling() == 0


async def test_the_bodys_own_error_passes_as_it_is():
    with pytest.raises(LookupError, match="mine"):
        async with beside(forever()):
            raise LookupError("mine")


async def test_being_cancelled_from_outside_stays_a_cancellation():
    async def body() -> None:
        async with beside(forever()):
            await forever()

    task = asyncio.create_task(body())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_work_that_loses_a_cancellation_is_cancelled_again():
    async def deaf() -> None:
        try:
            await forever()
        except asyncio.CancelledError:
            await forever()

    async with asyncio.timeout(5), beside(deaf()):
        await asyncio.sleep(0)


async def test_work_that_is_called_off_goes_to_its_end_and_leaves_nothing_behind():
    begun, go_on = threading.Event(), threading.Event()
    made: list[weakref.ref[object]] = []

    class Made:
        pass

    def work() -> Made:
        begun.set()
        assert go_on.wait(30)
        one = Made()
        made.append(weakref.ref(one))
        return one

    working = asyncio.create_task(to_its_end(work))
    await until(begun.is_set)
    for _ in range(3):
        working.cancel()
        await asyncio.sleep(0)
    assert not working.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError) as ended:
        await working
    # Not even by the cancellation that came of it.
    assert ended.value.__traceback__
    await until(lambda: made[0]() is None)


async def test_work_in_a_thread_gives_what_it_gives_and_raises_what_it_raises():
    assert await to_its_end(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await to_its_end(divmod, 7, 0)

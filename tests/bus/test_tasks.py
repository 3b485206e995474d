"""Work beside a body: owned, ended, and its errors handed on as they are."""

import asyncio

import pytest

from bus.tasks import beside


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

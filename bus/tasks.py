"""Work that goes on beside a body of code, owned by it."""

import asyncio
import functools
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def keeping_cancellation() -> Iterator[None]:
    """Raise the cancellation that came while inside, should what was awaited have lost it.

    In Python 3.11 `asyncio.wait_for`, which every request of nats-py uses, loses one that comes in
    the same moment as the answer (cpython#86296). A worker that is told to stop just when the
    broker has stored that it is ready would never stop.
    """
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - a coroutine runs in a task
    before = task.cancelling()
    try:
        yield
    finally:
        if task.cancelling() > before:
            raise asyncio.CancelledError


@asynccontextmanager
async def beside(*work: Coroutine[Any, Any, None]) -> AsyncGenerator[None]:
    """Run `work` while inside; left, all of it is cancelled and has ended.

    Work that fails cancels the body, and its error comes out of here. Unlike a `TaskGroup` this
    hands on an error as it is, without a group around it, so that callers can catch it by name.
    """
    body = asyncio.current_task()
    assert body is not None  # noqa: S101 - a coroutine runs in a task
    failure: list[BaseException] = []

    def on_end(task: asyncio.Task[None]) -> None:
        if task.cancelled() or (error := task.exception()) is None:
            return
        if not failure:
            body.cancel()
        failure.append(error)

    tasks = [asyncio.create_task(one) for one in work]
    for task in tasks:
        task.add_done_callback(on_end)
    try:
        yield
    except asyncio.CancelledError:
        # Cancelled by us, and by nobody else besides.
        if failure and body.uncancel() == 0:
            raise failure[0] from None
        raise
    finally:
        # More than once: `asyncio.wait_for`, which nats-py uses, loses a cancellation in Python
        # 3.11 when what it waits for comes at the same moment (cpython#86296).
        left = {task for task in tasks if not task.done()}
        while left:
            for task in left:
                task.cancel()
            _, left = await asyncio.wait(left, timeout=1)


async def to_its_end(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `work` in a thread; cancelled meanwhile, wait for its end and only then end cancelled.

    A thread cannot be cancelled. `asyncio.to_thread` leaves it behind: what it opens or takes then
    belongs to nobody, and what it still takes is not seen by whoever comes next.
    """
    loop = asyncio.get_running_loop()
    working = loop.run_in_executor(None, functools.partial(work, *args, **kwargs))
    cancelled = False
    while not working.done():
        try:
            await asyncio.wait({working})
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        # Looked at, or asyncio reports an error that nobody waits for any more; and let go of, or
        # the cancellation's traceback keeps what it made.
        working.exception()
        del working
        raise asyncio.CancelledError
    return working.result()


def heed_cancellation() -> None:
    """End here if this task was cancelled while it waited for an answer.

    `asyncio.wait_for` of Python 3.11 swallows a cancellation that meets a result (cpython#86296),
    and nats-py waits for its answers that way: a task that then went on to follow something
    would never end.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError

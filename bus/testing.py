"""pytest fixtures on a real broker, for us and for writers of plugins.

Load them with `pytest_plugins = ["bus.testing"]`. One broker serves the whole run, or each process
of it with pytest-xdist; each test has a root token of its own on it, and so sees nothing of the
others.
"""

import asyncio
import inspect
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from bus.broker import Broker, running_broker
from bus.client import Client, connect
from bus.settings import Settings

Connected = Callable[[], Awaitable[Client]]


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Generator[Broker]:
    """A broker for the whole run, without fsync: no test here cuts the power."""
    home = tmp_path_factory.mktemp("broker")
    with asyncio.Runner() as runner:
        running = running_broker(home, sync_interval="2m")
        broker = runner.run(running.__aenter__())
        runner.run(_keep_its_folder(broker))
        yield broker
        runner.run(running.__aexit__(None, None, None))


async def _keep_its_folder(broker: Broker) -> None:
    """Have the broker keep a stream that no test deletes.

    With the last stream the server also deletes the folder of all streams, a moment later, and
    then makes none for whoever comes in between.
    """
    async with connect(broker.url, name="test", root="kept") as client:
        await client.store.declare()


@pytest.fixture
def root() -> str:
    """A root token that no other test uses."""
    return f"t{secrets.token_hex(4)}"


@pytest.fixture
def settings(broker: Broker, root: str, tmp_path: Path) -> Settings:
    """The environment of a process under test."""
    return Settings(
        nats_url=broker.url,
        root=root,
        data_dir=tmp_path / "data",
        slot=0,
        generation=1,
        log_level="debug",
        host="test-host",
    )


@pytest_asyncio.fixture
async def connected(broker: Broker, root: str) -> AsyncGenerator[Connected]:
    """Make further clients, closed after the test."""
    async with AsyncExitStack() as open_clients:

        async def another() -> Client:
            return await open_clients.enter_async_context(
                connect(broker.url, name="test", root=root)
            )

        yield another


@pytest_asyncio.fixture
async def client(broker: Broker, root: str) -> AsyncGenerator[Client]:
    """A client whose buckets and streams are there, and gone after the test."""
    async with declared(broker.url, root) as one:
        yield one


@asynccontextmanager
async def declared(url: str, root: str) -> AsyncGenerator[Client]:
    """Be connected, with every bucket and stream of `root` made, and deleted in the end."""
    async with connect(url, name="test", root=root) as client:
        await client.store.declare()
        try:
            yield client
        finally:
            await client.store.delete_everything()


async def until(
    condition: Callable[[], object | Awaitable[object]], timeout_s: float = 30.0
) -> None:
    """Wait until a condition holds, looking again every 20 ms.

    Raises:
        AssertionError: It does not hold in time; shows the condition's source.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    while True:
        found = condition()
        if inspect.isawaitable(found):
            found = await found
        if found:
            return
        if loop.time() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {_source(condition)}")
        await asyncio.sleep(0.02)


def _source(condition: Callable[[], object]) -> str:
    try:
        return inspect.getsource(condition).strip()
    except OSError:
        return repr(condition)

"""Several supervisors as several hosts: shared replicas, loss, labels, draining."""

import asyncio
import contextlib
import os
import signal
import sys

import msgspec
import pytest

from bus import messages as m
from bus.errors import Conflict, DeadlineExceeded, NotFound
from bus.instance import join
from bus.plugins import follow_plugins
from bus.subjects import HOSTS_DRAIN, HOSTS_LIST, HOSTS_UNDRAIN
from bus.testing import until
from services.supervisor.hosts import Hosts


def where(view, plugin: str = "w") -> dict[int, str]:
    """Return the host of each slot that runs."""
    state = view.get(plugin)
    return {i.slot: i.host for i in state.instances if i.status == "running"} if state else {}


async def happened(client, name: str) -> list[str]:
    return [event.verb for event in await client.store.events(limit=500, name=name)]


async def ask(client, endpoint, name: str, **more: object) -> m.HostInfo:
    return await client.call(endpoint, m.NameHost(name=name, **more), timeout_s=40)


@contextlib.asynccontextmanager
async def supervisor_process(settings, host: str, catalogue):
    """A supervisor as a process of its own, which can be killed."""
    env = os.environ | {
        "BKG_NATS_URL": settings.nats_url,
        "BKG_ROOT": settings.root,
        "BKG_DATA_DIR": str(settings.data_dir / host),
        "BKG_HOST_NAME": host,
        "BKG_PLUGINS": str(catalogue),
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.supervisor", env=env
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


@pytest.fixture
def catalogue(tmp_path, plugin):
    def write(**more: object):
        path = tmp_path / "plugins.json"
        path.write_bytes(msgspec.json.encode([plugin(**more)]))
        return path

    return write


async def test_two_hosts_share_the_replicas(client, supervise, plugin):
    async with follow_plugins(client.store) as view:
        async with supervise(plugin(replicas=4), host="a"), supervise(host="b"):
            await until(lambda: len(where(view)) == 4, 20)
            assert sorted(where(view).values()) == ["a", "a", "b", "b"]
            listed = (await client.call(HOSTS_LIST, m.Empty())).hosts
            assert [(one.name, one.status) for one in listed] == [("a", "ready"), ("b", "ready")]
            assert sorted(r for one in listed for r in one.replicas) == [
                f"w/{slot}" for slot in range(4)
            ]


async def test_a_host_that_joins_takes_its_share_and_nothing_is_missed_meanwhile(
    client, supervise, plugin
):
    async with follow_plugins(client.store) as view, supervise(plugin(replicas=2), host="a"):
        await until(lambda: len(where(view)) == 2, 20)
        fewest = 2
        async with supervise(host="b"):

            def spread() -> bool:
                nonlocal fewest
                fewest = min(fewest, view.get("w").replicas.ready)
                there = where(view)
                return sorted(there.values()) == ["a", "b"] and set(there) == {0, 1}

            await until(spread, 30)
        assert fewest == 2
        # It leaves in good order, and its share comes back.
        await until(lambda: where(view) == {0: "a", 1: "a"}, 20)
    assert await happened(client, "b") == ["joined", "left"]


async def test_what_a_killed_host_had_is_back_within_ten_seconds(
    client, settings, supervise, catalogue
):
    file = catalogue(replicas=2)
    async with (
        follow_plugins(client.store) as view,
        supervisor_process(settings, "b", file) as b,
    ):
        await until(lambda: len(where(view)) == 2, 30)
        async with supervise(host="a"):
            await until(lambda: sorted(where(view).values()) == ["a", "b"], 30)
            loop = asyncio.get_running_loop()
            b.send_signal(signal.SIGKILL)
            began = loop.time()
            await until(lambda: where(view) == {0: "a", 1: "a"}, 20)
            took_s = loop.time() - began
            listed = (await client.call(HOSTS_LIST, m.Empty())).hosts
            assert {one.name: one.status for one in listed}["b"] == "lost"
            await until(lambda: _told(client, "b", "lost"))
            await until(lambda: _told(client, "w", "placed"))
            await until(lambda: _told(client, "w", "degraded"))
            await until(lambda: _told(client, "w", "recovered"))
    assert took_s < 10


async def _told(client, name: str, verb: str) -> bool:
    return verb in await happened(client, name)


async def test_a_replica_goes_only_where_the_labels_are(client, supervise, plugin):
    wants_gpu = plugin(replicas=2, requires={"gpu": "yes"})
    async with (
        follow_plugins(client.store) as view,
        supervise(wants_gpu, host="a"),
        supervise(host="b", labels={"gpu": "yes"}),
    ):
        await until(lambda: where(view) == {0: "b", 1: "b"}, 20)


async def test_a_replica_for_which_no_host_fits_is_shown_with_the_reason(client, supervise, plugin):
    wants_gpu = plugin(replicas=1, requires={"gpu": "yes"})
    async with follow_plugins(client.store) as view, supervise(wants_gpu, host="a"):
        await until(lambda: view.get("w") and view.get("w").status == "error", 20)
        state = view.get("w")
        assert state.error == "no host has the labels gpu=yes; hosts: a (no labels)"
        assert (state.replicas.desired, state.replicas.ready) == (1, 0)
        async with supervise(host="b", labels={"gpu": "yes"}):
            await until(lambda: where(view) == {0: "b"}, 20)
            assert view.get("w").error is None


async def test_a_host_is_drained_and_taken_back(client, supervise, plugin):
    async with (
        follow_plugins(client.store) as view,
        supervise(plugin(replicas=2), host="a"),
        supervise(host="b"),
    ):
        await until(lambda: sorted(where(view).values()) == ["a", "b"], 30)
        drained = await ask(client, HOSTS_DRAIN, "b", by="test")
        assert (drained.status, drained.replicas) == ("drained", [])
        await until(lambda: where(view) == {0: "a", 1: "a"}, 20)
        back = await ask(client, HOSTS_UNDRAIN, "b", by="test")
        assert back.status == "ready"
        await until(lambda: sorted(where(view).values()) == ["a", "b"], 30)
        assert (await happened(client, "b"))[-2:] == ["draining", "taken-back"]


async def test_draining_the_only_host_leaves_it_idle_and_says_why(client, supervise, plugin):
    async with follow_plugins(client.store) as view, supervise(plugin(), host="a"):
        await until(lambda: where(view) == {0: "a"}, 20)
        assert (await ask(client, HOSTS_DRAIN, "a")).status == "drained"
        await until(lambda: view.get("w").error == "no host takes replicas: a is being drained")


async def test_a_drain_that_takes_too_long_says_what_is_left(client, supervise, plugin):
    stubborn = plugin(
        then="""import signal
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: None)
        await asyncio.Event().wait()"""
    )
    async with follow_plugins(client.store) as view, supervise(stubborn, host="a"):
        await until(lambda: where(view) == {0: "a"}, 20)
        with pytest.raises(DeadlineExceeded, match=r"a: not done within 1 s: w/0 still there"):
            await ask(client, HOSTS_DRAIN, "a", timeout_s=1.0)


async def test_a_host_that_nobody_knows_is_named(client, supervise):
    async with supervise(host="a"):
        with pytest.raises(NotFound, match="there is no host 'z'; there are: a"):
            await ask(client, HOSTS_DRAIN, "z")


async def test_a_second_supervisor_for_one_host_is_refused(client, settings, supervise):
    here = msgspec.structs.replace(settings, host="a")
    async with (
        supervise(host="a"),
        join(client, here, plugin="supervisor", description="a test", listed=False) as second,
    ):
        await until(lambda: client.store.hosts.get("a"))
        with pytest.raises(Conflict, match="a supervisor for the host 'a' runs already"):
            async with Hosts(client, second, here).joined():
                pass


async def test_no_place_has_two_processes_while_hosts_come_and_go(
    client, supervise, plugin, tmp_path
):
    """Each worker notes its place while it serves; nobody may find another one's note."""
    notes = tmp_path / "notes"
    notes.mkdir()
    worker = plugin(
        replicas=3,
        before=f"""import pathlib
        note = pathlib.Path({str(notes)!r}) / os.environ['BKG_SLOT']
        if note.exists() and os.path.exists('/proc/' + note.read_text()):
            (pathlib.Path({str(notes)!r}) / 'twice').write_text(note.name)
        note.write_text(str(os.getpid()))""",
    )
    async with follow_plugins(client.store) as view, supervise(worker, host="a"):
        await until(lambda: len(where(view)) == 3, 20)
        for _ in range(2):
            async with supervise(host="b"):
                await until(lambda: set(where(view).values()) == {"a", "b"}, 30)
                await until(lambda: len(where(view)) == 3, 30)
            await until(lambda: where(view) == dict.fromkeys(range(3), "a"), 30)
    assert not (notes / "twice").exists()

"""A supervisor with real workers: started, crashed, hung, killed, restarted, stopped."""

import asyncio
import os
import signal
import sys
from itertools import pairwise

import msgspec
import psutil
import pytest

from bus import messages as m
from bus.errors import Conflict, DeadlineExceeded, InvalidRequest, NotFound
from bus.plugins import follow_plugins
from bus.subjects import (
    PLUGINS_CONFIGURE,
    PLUGINS_GET,
    PLUGINS_LIST,
    PLUGINS_RESTART,
    PLUGINS_START,
    PLUGINS_STOP,
    STATUS,
)
from bus.testing import until
from services.supervisor import chronicle, health, reconcile, replicas, service
from services.supervisor.reconcile import Key, Start, Stop

# Blocks its event loop for good, but only the first time.
HANG_ONCE = """import time, pathlib; flag = pathlib.Path(sys.argv[0] + '.hung')
        if not flag.exists(): flag.touch(); time.sleep(1000)
        await asyncio.Event().wait()"""


async def ask(client, endpoint, timeout_s: float = 10) -> m.PluginState:
    request = m.NamePlugin(name="w", by="test", timeout_s=timeout_s)
    return await client.call(endpoint, request, timeout_s=timeout_s + 5)


async def test_what_is_wanted_runs_and_what_is_not_does_not(client, supervise, plugin):
    idle = msgspec.structs.replace(plugin(), name="idle", autostart=False)
    async with follow_plugins(client.store) as view, supervise(plugin(replicas=2), idle):
        await until(lambda: view.get("w") and view.get("w").status == "running")
        state = view.get("w")
        assert (state.replicas.desired, state.replicas.ready) == (2, 2)
        assert [i.slot for i in state.instances] == [0, 1]
        assert all(psutil.pid_exists(i.pid) for i in state.instances)
        assert view.get("idle").status == "stopped"
        listed = await client.call(PLUGINS_LIST, m.Empty())
        assert [(p.name, p.status) for p in listed.plugins] == [
            ("idle", "stopped"),
            ("w", "running"),
        ]
    await until(lambda: not any(psutil.pid_exists(i.pid) for i in state.instances))


async def test_stop_and_start_answer_when_it_is_done(client, supervise, plugin):
    async with supervise(plugin()):
        await until(lambda: _is(client, "running"))
        pid = (await ask(client, PLUGINS_GET)).pid
        stopped = await ask(client, PLUGINS_STOP)
        assert (stopped.status, stopped.instances) == ("stopped", [])
        assert not psutil.pid_exists(pid)
        # Stopping what does not run is no error.
        assert (await ask(client, PLUGINS_STOP)).status == "stopped"
        started = await ask(client, PLUGINS_START)
        assert started.status == "running"
        assert started.pid != pid
        with pytest.raises(Conflict, match="w is started already"):
            await ask(client, PLUGINS_START)


async def test_a_worker_that_dies_at_import_is_visible_in_its_log_and_in_error(
    client, supervise, plugin
):
    async with supervise(plugin("import time\nimport no_such_module\n")):
        await until(lambda: _is(client, "error"))
        state = await ask(client, PLUGINS_GET)
        assert "No module named 'no_such_module'" in state.error
        assert state.instances[0].last_exit == "ended with status 1"
        records = await client.store.logs("w", limit=100, level="error")
        # The traceback is one record.
        assert records[0].message.startswith("Traceback")
        assert "No module named 'no_such_module'" in records[0].message
        assert records[0].logger == "stderr"
        with pytest.raises(DeadlineExceeded, match=r"replica 0 is .*no_such_module"):
            await ask(client, PLUGINS_RESTART, timeout_s=1)


async def test_what_a_worker_prints_is_its_log(client, supervise, plugin):
    program = """
        import sys, time
        print("\\x1b[31mred\\x1b[0m words")
        print("x" * 40_000)
        sys.stderr.write("careful\\nno newline at the end")
    """
    async with supervise(plugin(program)):
        await until(lambda: _said(client, "no newline at the end"))
        records = await client.store.logs("w", limit=100)
        said = {(r.logger, r.level, r.message) for r in records}
        assert ("stdout", "info", "red words") in said
        assert ("stderr", "warn", "careful") in said
        # Long lines come in pieces, and nothing of them is lost.
        assert [len(r.message) for r in records if r.message.startswith("xxx")][:3] == [
            16_384,
            16_384,
            40_000 - 2 * 16_384,
        ]


async def test_a_killed_worker_is_brought_back(client, supervise, plugin):
    async with supervise(plugin()):
        await until(lambda: _is(client, "running"))
        pid = (await ask(client, PLUGINS_GET)).pid
        os.kill(pid, signal.SIGKILL)
        await until(lambda: _is(client, "running", other_than=pid))
        place = (await ask(client, PLUGINS_GET)).instances[0]
        assert place.restarts == 1
        assert place.last_exit == "was ended by SIGKILL (by hand?)"


async def test_a_crash_loop_slows_down_and_says_so(client, supervise, plugin):
    async with supervise(plugin("print('hello'); raise SystemExit(3)")):
        await until(lambda: _restarts(client, 3))
        state = await ask(client, PLUGINS_GET)
        assert state.instances[0].last_exit == "ended with status 3"
        assert "hello" in state.error
        records = await client.store.logs("w", limit=100)
        times = [r.timestamp for r in records if r.message == "hello"]
        pauses = [(b - a).total_seconds() for a, b in pairwise(times)]
        assert pauses[0] >= 0.5
        assert pauses[1] >= 1.0


async def test_a_program_that_is_not_there_is_an_error_in_words(client, supervise, plugin):
    gone = msgspec.structs.replace(plugin(), entrypoint="/no/such/program")
    async with supervise(gone):
        await until(lambda: _is(client, "error"))
        error = (await ask(client, PLUGINS_GET)).error
    assert error == "/no/such/program cannot be started: No such file or directory"


@pytest.mark.parametrize(("room_factor", "fewest"), [(1.25, 3), (1e9, 2)])
async def test_a_restart_replaces_one_replica_at_a_time(
    client, supervise, plugin, monkeypatch, room_factor, fewest
):
    """Where there is memory for one more, all run all the time; else all but one."""
    monkeypatch.setattr(service, "ROOM_FACTOR", room_factor)
    ready: list[int] = []
    async with follow_plugins(client.store) as view, supervise(plugin(replicas=3)) as supervisor:
        await until(lambda: view.get("w") and view.get("w").replicas.ready == 3)
        await until(lambda: all(r.mem_bytes for r in supervisor._replicas.here.values()))
        pids = {i.pid for i in view.get("w").instances}
        watching = True

        async def watch() -> None:
            version = view.version
            while watching:
                version = await view.wait(version)
                ready.append(view.get("w").replicas.ready)

        watcher = asyncio.create_task(watch())
        after = await ask(client, PLUGINS_RESTART, 30)
        watching = False
        watcher.cancel()
        await until(lambda: len(view.get("w").instances) == 3)
    assert after.status == "running"
    assert not pids & {i.pid for i in after.instances}
    assert {i.generation for i in after.instances} == {2}
    assert min(ready) == fewest


async def test_a_hung_worker_is_found_and_replaced(client, supervise, plugin, monkeypatch):
    monkeypatch.setattr(reconcile, "SILENCE_S", 2.5)
    async with supervise(plugin(then=HANG_ONCE)):
        await until(lambda: _restarts(client, 1), timeout_s=15)
        await until(lambda: _is(client, "running"))
        place = (await ask(client, PLUGINS_GET)).instances[0]
        assert place.last_exit.startswith("gave no sign of life for 2.5 s; was ended by SIGKILL")


async def test_a_worker_that_starts_slowly_but_beats_is_left_alone(
    client, supervise, plugin, monkeypatch, tmp_path
):
    loop = asyncio.get_running_loop()
    waits = "while not os.path.exists(sys.argv[0] + '.go'): await asyncio.sleep(0.02)"
    async with supervise(plugin(before=waits)):
        await until(lambda: client.store.instances.get("w", 0), 30)
        # From here on it beats. Before, it was the machine that took its time.
        monkeypatch.setattr(reconcile, "STARTUP_GRACE_S", 3.0)
        slow_until = loop.time() + 4
        await until(lambda: loop.time() > slow_until)
        (tmp_path / "w.py.go").touch()
        await until(lambda: _is(client, "running"))
        assert (await ask(client, PLUGINS_GET)).instances[0].restarts == 0


async def test_a_worker_that_never_joins_is_replaced_after_its_grace(
    client, supervise, plugin, monkeypatch
):
    monkeypatch.setattr(reconcile, "STARTUP_GRACE_S", 0.5)
    async with supervise(plugin("import signal; signal.pause()")):
        await until(lambda: _restarts(client, 1))
        last_exit = (await ask(client, PLUGINS_GET)).instances[0].last_exit
    assert last_exit.startswith("started, then gave no sign of life for 0.5 s")


async def test_a_broker_that_hangs_costs_no_worker_its_life(
    client, broker, supervise, plugin, monkeypatch
):
    monkeypatch.setattr(service, "DEAF_S", 1.5)
    monkeypatch.setattr(reconcile, "SILENCE_S", 3.0)
    async with supervise(plugin()):
        await until(lambda: _is(client, "running"))
        before = (await ask(client, PLUGINS_GET)).pid
        os.kill(broker.pid, signal.SIGSTOP)
        try:
            # The silence is what is tested: longer than a worker's may be.
            await asyncio.sleep(4.5)
        finally:
            os.kill(broker.pid, signal.SIGCONT)
        await until(lambda: _answers(client))
        place = (await ask(client, PLUGINS_GET)).instances[0]
        assert (place.pid, place.restarts) == (before, 0)


async def test_a_worker_that_ends_before_it_is_stopped_does_not_block_its_place(
    client, supervise, plugin
):
    async with supervise(plugin()) as supervisor:
        await until(lambda: _is(client, "running"))
        replica = supervisor._replicas.here[Key("w", 0)]
        replica.child.kill()
        await until(lambda: replica.child is None)
        # Decided while it still ran.
        await supervisor._replicas.do(Stop(Key("w", 0)))
        await supervisor._replicas.do(Start(Key("removed-meanwhile", 0), 1))
        await until(lambda: _is(client, "running"))


async def test_a_worker_that_ignores_being_asked_is_killed(client, supervise, plugin, monkeypatch):
    monkeypatch.setattr(reconcile, "STOP_GRACE_S", 1.0)
    ignore = "import signal; asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)\n"
    ignore += "        signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    ignore += "        await asyncio.Event().wait()"
    async with supervise(plugin(then=ignore)):
        await until(lambda: _is(client, "running"))
        assert (await ask(client, PLUGINS_STOP)).status == "stopped"


async def test_stopping_the_supervisor_kills_what_does_not_stop_in_time(
    client, supervise, plugin, monkeypatch
):
    monkeypatch.setattr(replicas, "STOP_ALL_S", 0.5)
    ignore = "import signal; asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)\n"
    ignore += "        signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    ignore += "        await asyncio.Event().wait()"
    async with supervise(plugin(then=ignore)):
        await until(lambda: _is(client, "running"))
        pid = (await ask(client, PLUGINS_GET)).pid
    assert not psutil.pid_exists(pid)


async def test_every_change_is_published(client, supervise, plugin):
    async with client.follow(STATUS, plugin="w", slot=0) as changes, supervise(plugin()):
        await until(lambda: _is(client, "running"))
        await ask(client, PLUGINS_STOP)
        heard = []
        while "stopped" not in heard:
            heard.append((await asyncio.wait_for(anext(changes), 5)).payload.status)
    assert heard == ["starting", "running", "stopping", "stopped"]


async def test_an_unknown_plugin_is_answered_with_those_that_there_are(client, supervise, plugin):
    async with supervise(plugin()):
        await until(lambda: _answers(client))
        for endpoint in (PLUGINS_GET, PLUGINS_START, PLUGINS_STOP, PLUGINS_RESTART):
            with pytest.raises(NotFound, match="no plugin 'nobody'; there are: w"):
                await client.call(endpoint, m.NamePlugin(name="nobody"))


async def test_a_configuration_is_stored_and_scales_at_once(client, supervise, plugin):
    config = plugin()
    async with supervise(config):
        await until(lambda: _is(client, "running"))
        before = await ask(client, PLUGINS_GET)
        more = msgspec.structs.replace(config, replicas=2, description="more")
        after = await client.call(PLUGINS_CONFIGURE, m.ConfigurePlugin(name="w", config=more))
        assert after.config == more
        await until(lambda: _ready(client, 2))
        # What ran goes on: neither concerns it.
        assert (await ask(client, PLUGINS_GET)).pid == before.pid
        with pytest.raises(Conflict, match="is at revision"):
            await client.call(
                PLUGINS_CONFIGURE,
                m.ConfigurePlugin(name="w", config=more, revision=before.revision),
            )
        other = msgspec.structs.replace(config, name="other")
        with pytest.raises(InvalidRequest, match="for 'other', not for 'w'"):
            await client.call(PLUGINS_CONFIGURE, m.ConfigurePlugin(name="w", config=other))


async def test_of_commands_at_the_same_time_none_is_lost(client, supervise, plugin):
    async with supervise(plugin()):
        await until(lambda: _is(client, "running"))
        states = await asyncio.gather(*(ask(client, PLUGINS_RESTART) for _ in range(4)))
        assert max(state.generation for state in states) == 5
        assert (await ask(client, PLUGINS_GET)).instances[0].generation == 5


async def test_a_start_that_is_overtaken_by_a_stop_says_so(client, supervise, plugin):
    async with supervise(plugin("import signal; signal.pause()", autostart=False)):
        await until(lambda: _is(client, "stopped"))
        await until(lambda: _answers(client))
        starting = asyncio.create_task(ask(client, PLUGINS_START))
        await until(lambda: _is(client, "starting"))
        await ask(client, PLUGINS_STOP)
        with pytest.raises(Conflict, match="w was stopped meanwhile by another command"):
            await starting


async def test_of_two_who_configure_at_the_same_time_one_gets_a_conflict(client, supervise, plugin):
    config = plugin(autostart=False)
    async with supervise(config):
        await until(lambda: _answers(client))
        revision = (await ask(client, PLUGINS_GET)).revision
        both = await asyncio.gather(
            *(
                client.call(
                    PLUGINS_CONFIGURE,
                    m.ConfigurePlugin(
                        name="w",
                        config=msgspec.structs.replace(config, description=text),
                        revision=revision,
                    ),
                )
                for text in ("one", "other")
            ),
            return_exceptions=True,
        )
        [won] = [one for one in both if isinstance(one, m.PluginState)]
        assert [one for one in both if isinstance(one, Conflict)]
        assert (await ask(client, PLUGINS_GET)).config == won.config


async def test_a_worker_that_is_killed_has_that_in_its_own_log(client, supervise, plugin):
    async with supervise(plugin()):
        await until(lambda: _is(client, "running"))
        os.kill((await ask(client, PLUGINS_GET)).pid, signal.SIGKILL)
        await until(lambda: _said(client, "process.ended"))
        [record] = [r for r in await _log(client) if r.message == "process.ended"]
    assert (record.level, record.logger) == ("error", "supervisor")
    assert "SIGKILL" in record.fields["cause"]
    assert record.fields["again_after_s"] == 0.5


async def test_only_changes_are_published_and_not_what_is_written_again(
    client, supervise, plugin, monkeypatch
):
    monkeypatch.setattr(chronicle, "WRITE_AGAIN_S", 0.05)
    async with client.follow(STATUS, plugin="w", slot=0) as changes, supervise(plugin()):
        await until(lambda: _is(client, "running"))
        revisions = set()

        async def written_again() -> bool:
            revisions.add((await client.store.processes.get("w", 0)).revision)
            return len(revisions) > 3

        await until(written_again)
        await ask(client, PLUGINS_STOP)
        heard = [(await anext(changes)).payload.status for _ in range(4)]
    assert heard == ["starting", "running", "stopping", "stopped"]


async def test_desired_state_survives_the_supervisor(client, supervise, plugin):
    config = plugin()
    async with supervise(config):
        await until(lambda: _is(client, "running"))
        await ask(client, PLUGINS_STOP)
    async with supervise(config):
        await until(lambda: _answers(client))
        assert (await ask(client, PLUGINS_GET)).status == "stopped"
        assert (await ask(client, PLUGINS_START)).status == "running"


async def test_the_workers_of_a_killed_supervisor_end_and_the_next_one_starts_them_again(
    client, settings, plugin, supervise, tmp_path
):
    supervisor = await _supervisor_process(settings, tmp_path, plugin())
    await until(lambda: _answers(client))
    await until(lambda: _is(client, "running"))
    pid = (await ask(client, PLUGINS_GET)).pid
    supervisor.kill()
    await supervisor.wait()
    await until(lambda: _has_ended(pid))
    async with supervise(plugin()):
        await until(lambda: _is(client, "running", other_than=pid))


async def test_a_worker_that_hung_when_its_supervisor_was_killed_leaves_before_its_successor_comes(
    client, settings, plugin, supervise, tmp_path, monkeypatch
):
    monkeypatch.setattr(replicas, "STOP_ALL_S", 0.5)
    config = plugin(then=HANG_ONCE)
    supervisor = await _supervisor_process(settings, tmp_path, config)
    await until(lambda: _is(client, "running"))
    pid = (await _state(client)).pid
    await until((tmp_path / "w.py.hung").exists)
    supervisor.kill()
    await supervisor.wait()
    async with supervise(config):
        await until(lambda: _is(client, "running", other_than=pid))
        assert _has_ended(pid)


async def test_sigterm_to_the_supervisor_leaves_no_process(client, settings, plugin, tmp_path):
    supervisor = await _supervisor_process(settings, tmp_path, plugin(replicas=2))
    await until(lambda: _is(client, "running"))
    pids = [place.pid for place in (await _state(client)).instances]
    supervisor.terminate()
    assert await asyncio.wait_for(supervisor.wait(), 4) == 0
    assert all(_has_ended(pid) for pid in pids)
    # And no trace in observed state that would have to expire.
    assert await client.store.processes.all() == []


async def _supervisor_process(settings, tmp_path, config) -> asyncio.subprocess.Process:
    catalogue_file = tmp_path / "plugins.json"
    catalogue_file.write_bytes(msgspec.json.encode([config]))
    env = {
        **os.environ,
        "BKG_NATS_URL": settings.nats_url,
        "BKG_ROOT": settings.root,
        "BKG_HOST_NAME": settings.host,
        "BKG_PLUGINS": str(catalogue_file),
    }
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.supervisor", env=env
    )


def _has_ended(pid: int) -> bool:
    """Tell whether a process runs no more; its adoptive parent may not have taken note yet."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def _state(client) -> m.PluginState | None:
    async with follow_plugins(client.store) as view:
        return view.get("w")


async def _is(client, status: str, other_than: int = 0) -> bool:
    state = await _state(client)
    return state is not None and state.status == status and state.pid != other_than


async def _ready(client, count: int) -> bool:
    state = await _state(client)
    return state is not None and state.replicas.ready == count


async def _restarts(client, count: int) -> bool:
    state = await _state(client)
    return state is not None and any(i.restarts >= count for i in state.instances)


async def _said(client, message: str) -> bool:
    return any(r.message == message for r in await _log(client))


async def _log(client) -> list[m.LogEvent]:
    return await client.store.logs("w", limit=100)


async def _answers(client) -> bool:
    try:
        await client.call(PLUGINS_LIST, m.Empty(), timeout_s=1)
    except Exception:  # noqa: BLE001 - not yet
        return False
    return True


async def test_a_worker_that_takes_more_memory_than_it_may_is_replaced(
    client, supervise, plugin, monkeypatch
):
    monkeypatch.setattr(service, "MEASURE_S", 0.2)
    greedy = plugin(
        then="""hold = bytearray(os.urandom(1024)) * (200 * 1024)
        await asyncio.Event().wait()""",
        memory_max_bytes=150 * 1024 * 1024,
    )
    async with follow_plugins(client.store) as view, supervise(greedy):
        await until(lambda: (s := view.get("w")) and s.instances and s.instances[0].restarts, 20)
        place = view.get("w").instances[0]
        assert "MiB of memory; memoryMaxBytes allows 150 MiB" in (place.last_exit or "")


async def test_what_a_worker_printed_last_is_told_with_its_end(client, supervise, plugin):
    async with (
        follow_plugins(client.store) as view,
        supervise(
            plugin("""
            import sys
            for n in range(30): print(f"line {n}", flush=True)
            sys.exit("it cannot go on")
        """)
        ),
    ):
        await until(lambda: (s := view.get("w")) and s.status == "error")
        place = view.get("w").instances[0]
    assert {"line 29", "it cannot go on"} <= set(place.last_lines)
    assert len(place.last_lines) <= 8
    assert place.error == "ended with status 1: it cannot go on"


async def test_its_ends_are_forgotten_after_it_ran_well(client, supervise, plugin, monkeypatch):
    monkeypatch.setattr(replicas, "HEALTHY_S", 1.0)
    monkeypatch.setattr(service, "MEASURE_S", 0.1)
    monkeypatch.setattr(chronicle, "WRITE_AGAIN_S", 0.2)
    async with follow_plugins(client.store) as view, supervise(plugin()):
        await until(lambda: _is(client, "running"))
        pid = view.get("w").pid
        os.kill(pid, signal.SIGKILL)
        await until(lambda: view.get("w").instances[0].restarts == 1)
        await until(lambda: view.get("w").instances[0].restarts == 0)
        assert view.get("w").status == "running"


async def test_the_story_of_a_place_is_kept(client, supervise, plugin):
    async def story() -> list[str]:
        events = await client.store.events(limit=100, name="w")
        # Without those of who asked for something.
        return [event.verb for event in events if event.by is None]

    async with follow_plugins(client.store) as view, supervise(plugin()):
        await until(lambda: _is(client, "running"))
        pid = view.get("w").pid
        os.kill(pid, signal.SIGKILL)
        await until(lambda: _is(client, "running", other_than=pid))
        await ask(client, PLUGINS_STOP)
        expected = ["started", "ready", "crashed", "started", "ready", "draining", "stopped"]

        async def told() -> bool:
            return await story() == expected

        await until(told)
        crash = (await client.store.events(limit=100, name="w"))[2]
    assert crash.cause == "was ended by SIGKILL (by hand?)"
    assert (crash.kind, crash.slot, crash.host) == ("plugin", 0, "test-host")


async def test_a_worker_that_fails_its_health_checks_in_a_row_is_replaced(
    client, supervise, plugin
):
    check = m.Healthcheck(
        path="/no-such-thing",
        interval_seconds=0.1,
        timeout_seconds=5,
        failure_threshold=3,
        startup_grace_seconds=0,
    )
    async with follow_plugins(client.store) as view, supervise(plugin(healthcheck=check)):
        await until(lambda: (s := view.get("w")) and s.instances and s.instances[0].restarts, 20)
        said = view.get("w").instances[0].last_exit
    assert "3 health checks in a row failed: GET /no-such-thing was answered 404" in said


async def test_a_worker_that_passes_its_health_checks_stays(client, supervise, plugin, monkeypatch):
    asked: list[str | None] = []

    async def ask_and_count(*args: object) -> str | None:
        asked.append(await really_ask(*args))
        return asked[-1]

    really_ask = health.ask
    monkeypatch.setattr(health, "ask", ask_and_count)
    check = m.Healthcheck(
        interval_seconds=0.1, timeout_seconds=5, failure_threshold=1, startup_grace_seconds=0
    )
    async with (
        follow_plugins(client.store) as view,
        supervise(plugin(healthcheck=check)) as supervisor,
    ):
        await until(lambda: _is(client, "running"))
        [replica] = supervisor._replicas.here.values()
        await until(replica.port.done)
        pid = view.get("w").pid
        await until(lambda: len(asked) >= 10, 30)
        assert set(asked) == {None}
        assert (view.get("w").pid, replica.fault) == (pid, None)

"""`bkg up`: starts the platform, keeps it running, and leaves nothing behind."""

import asyncio
import json
import os
import signal
import socket
import stat
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest

from bus.broker import Broker
from bus.testing import declared, until

EVERYWHERE = "0.0.0.0"  # noqa: S104 - refused, never listened on


async def test_it_tells_where_it_is_and_writes_a_run_file_for_scripts(up: Any, data_dir: Path):
    async with up() as platform:
        run = platform.run
        key = (data_dir / "admin.key").read_text().strip()
        assert f"{run['url']}/?key={key}" in platform.welcome
        assert "MB in" in platform.welcome
        assert run["pid"] == platform.process.pid
        assert set(run["pids"]) == {"broker", "supervisor", "gateway"}
        assert mode(data_dir / "run.json") == 0o600
        assert mode(data_dir) == 0o700
        assert is_ready(run["url"])
    assert not (data_dir / "run.json").exists()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_stops_everything_within_five_seconds(
    up: Any, all_gone: Any, number: signal.Signals
):
    async with up() as platform:
        everything = platform.everything()
        assert len(everything) >= 5, "bkg, broker, supervisor, gateway, and a worker"
        began = time.monotonic()
        platform.process.send_signal(number)
        assert await asyncio.wait_for(platform.process.wait(), 10) == 0
        assert time.monotonic() - began < 5
        await all_gone(everything, 0)


async def test_a_second_interrupt_kills_at_once(up: Any, all_gone: Any):
    async with up() as platform:
        everything = platform.everything()
        # A supervisor that does not react: the first interrupt has to wait for it.
        os.kill(platform.run["pids"]["supervisor"], signal.SIGSTOP)
        platform.process.send_signal(signal.SIGINT)
        await platform.read_until("stopping")
        platform.process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(platform.process.wait(), 3) == 130
        await all_gone(everything, 1)


async def test_a_hung_supervisor_leaves_no_worker_behind(up: Any, all_gone: Any):
    async with up() as platform:
        everything = platform.everything()
        os.kill(platform.run["pids"]["supervisor"], signal.SIGSTOP)
        began = time.monotonic()
        platform.process.terminate()
        assert await asyncio.wait_for(platform.process.wait(), 10) == 0
        assert time.monotonic() - began < 6
        await all_gone(everything, 0)


async def test_killed_it_leaves_no_process_and_starts_again(up: Any, all_gone: Any):
    async with up() as platform:
        everything, first = platform.everything(), platform.run
        platform.process.kill()
        await platform.process.wait()
        await all_gone(everything, 10)
    async with up() as platform:
        assert platform.run["pid"] != first["pid"]
        assert platform.run["nats_url"] == first["nats_url"]


async def test_a_second_one_on_the_same_data_is_refused(up: Any, bkg: Any):
    async with up() as platform:
        ended = await bkg("up", "--port", "0")
        assert ended.status == 1
        assert f"process {platform.process.pid} at {platform.run['url']}" in ended.err
        assert ended.err.count("\n") == 1


async def test_a_part_that_dies_is_started_again_at_the_same_place(up: Any):
    async with up() as platform:
        for part in ("broker", "supervisor", "gateway"):
            before = platform.run
            os.kill(before["pids"][part], signal.SIGKILL)
            said = await platform.read_until("runs again")
            assert f"the {part} was ended by SIGKILL" in said
            after = platform.run
            others = {name: pid for name, pid in before["pids"].items() if name != part}
            assert after["pids"] == others | {part: after["pids"][part]}
            assert after["pids"][part] != before["pids"][part]
            assert (after["url"], after["nats_url"]) == (before["url"], before["nats_url"])
            await until(lambda url=before["url"]: is_ready(url), timeout_s=30)


async def test_a_broker_of_ones_own_is_used_and_left_alone(
    up: Any, broker: Broker, root: str, env: dict[str, str]
):
    env["BKG_ROOT"] = root
    async with declared(broker.url, root), up("--port", "0", "--nats", broker.url) as platform:
        assert platform.run["nats_url"] == broker.url
        assert "broker" not in platform.run["pids"]
    assert psutil.pid_exists(broker.pid)


async def test_a_taken_port_is_named(bkg: Any):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = await bkg("up", "--port", str(port))
    assert_refused(ended, f"cannot listen on 127.0.0.1 port {port}: Address already in use")


async def test_a_broker_that_does_not_answer_is_named(bkg: Any):
    assert_refused(await bkg("up", "--port", "0", "--nats", "nats://127.0.0.1:9"), "127.0.0.1:9")


async def test_a_data_directory_that_cannot_be_written_is_named(bkg: Any, tmp_path: Path):
    (tmp_path / "file").touch()
    ended = await bkg("up", "--data-dir", str(tmp_path / "file" / "data"))
    assert_refused(ended, f"the data directory {tmp_path}/file/data cannot be written")


@pytest.fixture(params=["{", '[{"name": "candle"}]', '[{"nam": "candle"}]'])
def broken_catalogue(request: pytest.FixtureRequest, catalogue_file: Path) -> Path:
    catalogue_file.write_text(request.param)
    return catalogue_file


async def test_a_broken_catalogue_is_told_and_nothing_stays_running(
    bkg: Any, broken_catalogue: Path
):
    assert_refused(await bkg("up", "--port", "0"), str(broken_catalogue))
    assert not [process for process in psutil.process_iter() if uses(process, broken_catalogue)]


async def test_open_access_is_refused_where_others_can_reach_it(bkg: Any):
    ended = await bkg("up", "--port", "0", "--host", EVERYWHERE, "--no-auth")
    assert_refused(ended, "--no-auth is for this host only")


async def test_the_environment_does_what_the_options_do_and_an_option_wins(
    bkg: Any, env: dict[str, str]
):
    env |= {"BKG_HOST": EVERYWHERE, "BKG_NO_AUTH": "1", "BKG_NATS_URL": "nats://127.0.0.1:9"}
    assert_refused(await bkg("up", "--port", "0"), "--no-auth is for this host only")
    ended = await bkg("up", "--port", "0", "--host", "127.0.0.1")
    assert_refused(ended, "127.0.0.1:9")


async def test_the_commands_work_on_what_runs(up: Any, bkg: Any):
    async with up():
        status = await bkg("status", "--json")
        assert [(p["name"], p["status"]) for p in status.json] == [("candle", "running")]
        assert "running" in (await bkg("status")).out
        stopped = await bkg("plugins", "stop", "candle", "--json")
        assert stopped.json["status"] == "stopped"
        started = await bkg("plugins", "start", "candle", "--json")
        assert started.json["status"] == "running"
        again = await bkg("plugins", "start", "candle")
        assert again.status == 1
        unknown = await bkg("plugins", "restart", "candel")
        assert unknown.status == 1
        assert "candel" in unknown.err
        stats = await bkg("call", "candle.stats")
        assert (stats.status, "models" in stats.json) == (0, True)
        assert (await bkg("call", "nobody.serves.this")).status == 3
        logs = await bkg("logs", "candle", "--json")
        events = [json.loads(line) for line in logs.out.splitlines()]
        assert {event["plugin"] for event in events} == {"candle"}


async def test_a_worker_by_hand_joins(up: Any, bkg: Any, env: dict[str, str],
                                      data_dir: Path):  # fmt: skip
    async with up():
        command = (sys.executable, "-m", "services.cli", "worker", "candle")
        worker = await asyncio.create_subprocess_exec(
            *command, env=env | {"BKG_DATA_DIR": str(data_dir)}
        )
        try:

            async def joined() -> bool:
                (state,) = (await bkg("status", "--json")).json
                return worker.pid in [instance["pid"] for instance in state["instances"]]

            await until(joined, timeout_s=20)
        finally:
            worker.terminate()
            await worker.wait()


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=1) as answer:  # noqa: S310
            return answer.status == 200
    except OSError:
        return False


def uses(process: psutil.Process, catalogue: Path) -> bool:
    try:
        return process.environ().get("BKG_PLUGINS") == str(catalogue)
    except psutil.Error:
        return False


def assert_refused(ended: Any, text: str) -> None:
    assert ended.status == 1
    assert ended.err.startswith("bkg: ")
    assert ended.err.count("\n") == 1
    assert text in ended.err

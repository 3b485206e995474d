"""A broker of our own: what `bkg up` and the tests rely on."""

import asyncio
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from bus.broker import HOST, USER, find_server, running_broker
from bus.errors import Unavailable

ROOT = Path(__file__).parents[2]


async def hello(port: int, password: str) -> bytes:
    """Sign in as a client does; return the server's answer to the first PING."""
    reader, writer = await asyncio.open_connection(HOST, port)
    assert (await reader.readline()).startswith(b"INFO ")
    said = json.dumps({"user": USER, "pass": password, "verbose": False})
    writer.write(b"CONNECT %s\r\nPING\r\n" % said.encode())
    answer = await reader.readline()
    writer.close()
    return answer


def password_in(data_dir: Path) -> str:
    return (data_dir / "nats" / "password").read_text().strip()


async def test_it_answers_as_soon_as_it_is_entered_and_is_gone_afterwards(tmp_path: Path):
    async with running_broker(tmp_path) as broker:
        assert await hello(broker.port, password_in(tmp_path)) == b"PONG\r\n"
    assert not psutil.pid_exists(broker.pid)


async def test_it_refuses_a_wrong_password(tmp_path: Path):
    async with running_broker(tmp_path) as broker:
        assert await hello(broker.port, "guessed") == b"-ERR 'Authorization Violation'\r\n"


async def test_its_url_is_the_same_after_a_restart(tmp_path: Path):
    async with running_broker(tmp_path) as first:
        pass
    async with running_broker(tmp_path) as second:
        assert second.url == first.url
        assert second.pid != first.pid


async def test_it_moves_when_somebody_else_took_its_port(tmp_path: Path):
    async with running_broker(tmp_path) as first:
        pass
    with socket.create_server((HOST, first.port)):
        async with running_broker(tmp_path) as second:
            assert second.port != first.port


async def test_a_port_that_was_asked_for_and_is_taken_is_an_error(tmp_path: Path):
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Unavailable, match=f"port {port} of {HOST} is taken"):
            async with running_broker(tmp_path, port=port):
                pass


async def test_nobody_else_may_read_its_files(tmp_path: Path):
    async with running_broker(tmp_path):
        home = tmp_path / "nats"
        assert stat.S_IMODE(home.stat().st_mode) == 0o700
        for name in ("password", "server.conf", "lock"):
            assert stat.S_IMODE((home / name).stat().st_mode) == 0o600, name


async def test_its_password_does_not_show_where_it_is_printed(tmp_path: Path):
    async with running_broker(tmp_path) as broker:
        assert password_in(tmp_path) not in repr(broker)


async def test_two_brokers_never_share_a_store(tmp_path: Path):
    async with running_broker(tmp_path):
        with pytest.raises(Unavailable, match=r"another broker runs on .*nats"):
            async with running_broker(tmp_path, start_s=0.1):
                pass


async def test_a_death_is_told_in_words(tmp_path: Path):
    async with running_broker(tmp_path) as broker:
        os.kill(broker.pid, signal.SIGKILL)
        said = await asyncio.wait_for(broker.ended(), 5)
    assert said.startswith("the broker was ended by SIGKILL; its last lines: ")
    assert "Server is ready" in said


async def test_a_start_that_fails_shows_what_the_broker_said(tmp_path: Path):
    with pytest.raises(Unavailable, match=r"at its start the broker ended .*sync_interval"):
        async with running_broker(tmp_path, sync_interval="sometimes"):
            pass


async def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(Unavailable, match=r"directory .*file/data/nats cannot be used"):
        async with running_broker(tmp_path / "file" / "data"):
            pass


async def test_it_ends_with_a_parent_that_is_killed(tmp_path: Path):
    program = (
        "import asyncio, pathlib, sys\n"
        "from bus.broker import running_broker\n"
        "async def main():\n"
        "    async with running_broker(pathlib.Path(sys.argv[1])) as broker:\n"
        "        print(broker.pid, flush=True)\n"
        "        await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, str(tmp_path), stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    broker = psutil.Process(int(await parent.stdout.readline()))
    parent.kill()
    await parent.wait()
    await asyncio.to_thread(broker.wait, timeout=5)


def test_a_server_named_by_the_environment_wins(monkeypatch: pytest.MonkeyPatch):
    real = find_server()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("NATS_SERVER", str(real))
    assert find_server() == real


def test_a_named_server_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NATS_SERVER", "no/such/nats-server")
    with pytest.raises(Unavailable, match="NATS_SERVER names no/such/nats-server"):
        find_server()


def test_the_wheels_server_is_found_without_a_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("NATS_SERVER", raising=False)
    monkeypatch.setenv("PATH", "")
    assert find_server().name == "nats-server"


@pytest.mark.parametrize("said", ["nats-server: v2.11.6", "something else"])
def test_a_server_that_is_too_old_is_refused(
    said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    old = tmp_path / "nats-server"
    old.write_text(f"#!/bin/sh\necho '{said}'\n")
    old.chmod(0o700)
    monkeypatch.setenv("NATS_SERVER", str(old))
    with pytest.raises(Unavailable, match=rf"says '{said}'; needed is nats-server 2\.12 or newer"):
        find_server()


def test_the_sample_configuration_for_a_broker_of_ones_own_is_valid():
    checked = subprocess.run(
        [find_server(), "-t", "-c", ROOT / "deploy" / "nats-server.conf"],
        env={"BKG_NATS_PASSWORD": "made-up"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr

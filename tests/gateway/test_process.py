"""The gateway as a process: how it starts, says where it listens, refuses and stops."""

import asyncio
import os
import signal
import socket
import stat
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import ClientError, ClientSession, WSMsgType

from bus.testing import until
from tests.gateway.test_uploads import MIB, PLACE, blob, offset_of, put, rfc9530, sha256


@pytest.fixture
def env(broker, root, tmp_path, client):
    return {
        **os.environ,
        "BKG_NATS_URL": broker.url,
        "BKG_ROOT": root,
        "BKG_DATA_DIR": str(tmp_path / "data"),
        "BKG_PORT": "0",
    }


async def run(env, **more: str):
    """Run a gateway that ends by itself; return its status and what it said on stderr."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.gateway", env={**env, **more},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await asyncio.wait_for(process.communicate(), 30)
    assert out == b""
    return process.returncode, err.decode()


@asynccontextmanager
async def running(env):
    """A gateway that listens, and its port as it told it."""
    told, tell = os.pipe()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.gateway", env={**env, "BKG_READY_FD": str(tell)},
        pass_fds=[tell], stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    os.close(tell)
    try:
        with os.fdopen(told) as ready:
            line = await asyncio.wait_for(asyncio.to_thread(ready.read), 30)
        assert line.endswith("\n"), (await process.communicate())[1]
        yield process, int(line)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_it_says_where_it_listens_makes_its_key_and_stops_cleanly(env, client, tmp_path):
    async with running(env) as (process, port):
        key_file = tmp_path / "data" / "admin.key"
        assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
        headers = {"Authorization": f"Bearer {key_file.read_text().strip()}"}
        url = f"http://127.0.0.1:{port}"
        async with (
            ClientSession(url, headers=headers) as http,
            http.ws_connect("/ws/plugins") as ws,
        ):
            async with http.get("/api/plugins") as response:
                assert (response.status, await response.json()) == (200, [])
            assert (await ws.receive_json())["type"] == "bootstrap"
            process.send_signal(signal.SIGTERM)
            message = await ws.receive(timeout=10)
            assert (message.type, message.data) == (WSMsgType.CLOSE, 1001)
        out, err = await asyncio.wait_for(process.communicate(), 15)
        assert (process.returncode, out) == (0, b""), err

        async def logged():
            found = await client.store.logs("gateway", limit=50)
            return any(
                one.message == "gateway.listening" and one.fields["port"] == port for one in found
            )

        await until(logged)


async def test_a_taken_port_is_said_in_one_sentence(env):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        status, said = await run(env, BKG_PORT=port)
    assert status == 1
    assert port in said
    assert "BKG_PORT" in said
    assert len(said.splitlines()) == 1


async def test_no_auth_on_an_open_address_is_said_in_one_sentence(env):
    status, said = await run(env, BKG_NO_AUTH="1", BKG_HOST="0.0.0.0")  # noqa: S104
    assert status == 1
    assert "loopback" in said
    assert len(said.splitlines()) == 1


async def test_no_broker_is_said_in_one_sentence(env):
    status, said = await run(env, BKG_NATS_URL="nats://127.0.0.1:1")
    assert status == 1
    assert "no broker" in said
    assert len(said.splitlines()) == 1


async def test_an_upload_outlives_a_gateway_that_is_killed(env, client, keeper, start):
    body = blob(8 * MIB)
    async with running(env) as (process, port):
        key = (Path(env["BKG_DATA_DIR"]) / "admin.key").read_text().strip()

        async def blocks():
            yield body[: 4 * MIB]
            await asyncio.sleep(60)

        async def upload():
            headers = {"Authorization": f"Bearer {key}", "Upload-Length": str(len(body))}
            url = f"http://127.0.0.1:{port}{PLACE}"
            async with ClientSession() as http, http.put(url, data=blocks(), headers=headers):
                pass

        async def some():
            return sum(one.bytes for one in await client.store.artefacts.unfinished()) > 3 * MIB

        uploading = asyncio.create_task(upload())
        await until(some, 30)
        process.kill()
        await process.wait()
        with pytest.raises(ClientError):
            await uploading
    gate = await start()
    await until(gate.parts.models.instances)
    here = await offset_of(gate)
    assert 3 * MIB < here <= 4 * MIB
    told, _ = await put(gate, body[here:], Upload_Offset=str(here), Repr_Digest=rfc9530(body))
    assert told["checksum"] == sha256(body)

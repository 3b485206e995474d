"""Health checks: the rule by table and property, the asking against real servers and processes."""

import asyncio
import signal
import sys
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from bus.messages import Healthcheck
from bus.testing import until
from services.supervisor import process
from services.supervisor.health import HELD_UP_S, Checked, ask, failures_after, in_words, watch

RULE = Healthcheck(timeout_seconds=2, failure_threshold=3, startup_grace_seconds=30)
WRONG = "was answered 503 Service Unavailable"


def once(**more) -> Healthcheck:
    """A rule under which tests are over soon, and a loaded machine has time to answer."""
    given = {"interval_seconds": 0.1, "timeout_seconds": 1, "startup_grace_seconds": 0, **more}
    return Healthcheck(**given)


@pytest.mark.parametrize(
    ("before", "last", "after"),
    [
        # A healthy answer makes all failures before it forgotten.
        (0, Checked(100, 0.1), 0),
        (2, Checked(100, 0.1), 0),
        (2, Checked(1, 0.1), 0),
        # A failure counts.
        (0, Checked(100, 0.1, WRONG), 1),
        (2, Checked(100, 2.0, WRONG), 3),
        # Not while the instance may still be starting; that ends at its age, not at an answer.
        (0, Checked(0, 0.1, WRONG), 0),
        (0, Checked(29.9, 2.0, WRONG), 0),
        (0, Checked(30, 0.1, WRONG), 1),
        # Not when we were held up ourselves; what was known before stays.
        (2, Checked(100, 2 + HELD_UP_S + 0.1, WRONG), 2),
        (2, Checked(100, 2 + HELD_UP_S, WRONG), 3),
    ],
)
def test_a_check_changes_the_count_of_failures(before, last, after):
    assert failures_after(RULE, before, last) == after


checks = st.builds(
    Checked,
    age_s=st.floats(0, 100),
    took_s=st.floats(0, 10),
    failure=st.sampled_from([None, WRONG]),
)


@given(st.lists(checks, max_size=50))
def test_only_failures_in_a_row_count_and_only_those_that_tell_something(done):
    failures = 0
    row = 0
    for last in done:
        failures = failures_after(RULE, failures, last)
        tells = last.age_s >= 30 and last.took_s <= 2 + HELD_UP_S
        row = 0 if last.failure is None else row + tells
        assert failures == row


@given(st.lists(checks, max_size=50))
def test_an_instance_that_answers_every_third_time_is_never_replaced(done):
    failures = 0
    for at, last in enumerate(done):
        one = Checked(last.age_s, last.took_s) if at % 3 == 2 else last
        failures = failures_after(RULE, failures, one)
        assert failures < RULE.failure_threshold


def test_the_reason_is_a_sentence():
    said = in_words(RULE, 3, "gave no answer within 2 s")
    assert said == "3 health checks in a row failed: GET /health gave no answer within 2 s"
    assert in_words(RULE, 1, WRONG).startswith("1 health check failed: GET /health was answered")


@asynccontextmanager
async def serving(*statuses: int):
    """A server that answers these in turn, and the last one for ever; gives its port and calls."""
    asked: list[int] = []

    async def answer(_request: web.Request) -> web.Response:
        asked.append(statuses[min(len(asked), len(statuses) - 1)])
        return web.Response(status=asked[-1], headers={"Location": "http://127.0.0.1:1/"})

    app = web.Application()
    app.router.add_get("/health", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield runner.addresses[0][1], asked
    finally:
        await runner.cleanup()


def now() -> float:
    return asyncio.get_running_loop().time()


async def test_failures_that_are_not_in_a_row_replace_nobody():
    async with serving(503, 503, 200, 503, 503, 200, 503, 503, 503) as (port, asked):
        said = await asyncio.wait_for(watch(once(), port, now()), 60)
        assert len(asked) == 9
    assert (
        said == "3 health checks in a row failed: GET /health was answered 503 Service Unavailable"
    )


async def test_failures_in_the_start_up_grace_replace_nobody():
    async with serving(503, 503, 503, 503, 200) as (port, asked):
        check = once(failure_threshold=1, startup_grace_seconds=3600)
        watching = asyncio.create_task(watch(check, port, now()))
        await until(lambda: asked[-1:] == [200], timeout_s=60)
        assert not watching.done()
        watching.cancel()
        await asyncio.wait([watching])


async def test_an_instance_older_than_its_grace_has_none_left():
    async with serving(500) as (port, _asked):
        check = once(failure_threshold=1, startup_grace_seconds=100)
        said = await asyncio.wait_for(watch(check, port, now() - 100), 60)
    assert said == "1 health check failed: GET /health was answered 500 Internal Server Error"


async def test_a_redirect_is_an_answer_and_is_not_followed():
    async with serving(302) as (port, _asked), aiohttp.ClientSession() as http:
        assert await ask(http, once(timeout_seconds=30), port) is None


async def test_what_is_not_there_is_not_healthy():
    async with serving(200) as (port, _asked), aiohttp.ClientSession() as http:
        check = once(path="/healthz", timeout_seconds=30)
        assert await ask(http, check, port) == "was answered 404 Not Found"


async def test_a_port_where_nobody_listens_is_told_as_such():
    async with serving(200) as (port, _asked):
        pass
    said = await asyncio.wait_for(watch(once(failure_threshold=2), port, now()), 60)
    assert said.startswith("2 health checks in a row failed: GET /health cannot be sent to port ")
    assert "onnect" in said


async def test_a_process_that_hangs_is_found_and_named():
    """A real server, stopped by a signal: the kernel still takes its connections."""
    program = (
        "import http.server as h\n"
        "class Ok(h.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200); self.end_headers()\n"
        "s = h.ThreadingHTTPServer(('127.0.0.1', 0), Ok)\n"
        "print(s.server_port, flush=True)\n"
        "s.serve_forever()\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert process.stdout
        port = int(await process.stdout.readline())
        async with aiohttp.ClientSession() as http:
            assert await ask(http, once(timeout_seconds=30), port) is None
        process.send_signal(signal.SIGSTOP)
        said = await asyncio.wait_for(watch(once(failure_threshold=2), port, now()), 60)
    finally:
        process.kill()
        await process.wait()
    assert said == "2 health checks in a row failed: GET /health gave no answer within 1 s"


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * 100_000,
        b"\x00\xff",
        b"",
    ],
    ids=["another protocol", "a header without end", "noise", "nothing"],
)
async def test_what_is_no_http_answer_is_a_failure_and_no_crash(answer):
    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(say, "127.0.0.1", 0)
    async with server, aiohttp.ClientSession() as http:
        port = server.sockets[0].getsockname()[1]
        said = await ask(http, once(timeout_seconds=30), port)
    assert said
    assert said.startswith("gave no HTTP answer: ")


@pytest.mark.parametrize("path", ["//evil.example/", "/@evil.example", "/a b?c=d#e", "/\r\nX: y"])
async def test_whatever_the_path_only_the_instance_is_asked(path):
    hosts: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        hosts.append(request.headers["Host"])
        return web.Response()

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    async with aiohttp.ClientSession() as http:
        said = await ask(http, once(path=path, timeout_seconds=30), port)
    await runner.cleanup()
    assert (said, hosts) == (None, [f"127.0.0.1:{port}"])


async def test_a_worker_whose_event_loop_is_blocked_is_found(client, settings, plugin):
    config = plugin(then="import signal; signal.pause()")
    env = {
        "BKG_NATS_URL": settings.nats_url,
        "BKG_ROOT": settings.root,
        "BKG_SLOT": "0",
        "BKG_PARENT_PID": "",
    }
    child = await process.start(config, env, lambda *_record: None)
    ending = asyncio.create_task(child.ended())
    try:

        async def registered() -> int | None:
            entry = await client.store.instances.get("w", 0)
            ready = entry and entry.value and entry.value.status == "running"
            return entry.value.port if ready else None

        await until(registered, timeout_s=60)
        port = await registered()
        assert port
        said = await asyncio.wait_for(watch(once(failure_threshold=2), port, now()), 60)
    finally:
        child.kill()
        await ending
    assert said == "2 health checks in a row failed: GET /health gave no answer within 1 s"

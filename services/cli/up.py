"""`bkg up`: broker, supervisor and gateway as processes, watched until Ctrl-C.

Each is a child of this process, in a session of its own, so that a terminal's Ctrl-C reaches this
process alone and the parts stop in order: first who asks (the gateway), then who works (the
supervisor with its workers), last what carries (the broker).
"""

import asyncio
import contextlib
import http.client
import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from bus.broker import running_broker
from bus.errors import BusError, Unavailable
from bus.messages import now
from bus.tasks import beside
from services.cli.children import Child, child, first_line
from services.cli.console import Progress, out
from services.cli.descendants import adopt_orphans, kill_all, memory, reap_orphans
from services.cli.preflight import (
    check_broker,
    check_port,
    check_reach,
    only_one,
    wait_for_last_run,
)
from services.cli.running import RunFile, remove_run_file, version, write_run_file

READY_S: Final = 30.0
# Together below the five seconds in which all of it has stopped.
GATEWAY_STOP_S: Final = 0.5
SUPERVISOR_STOP_S: Final = 4.0
BROKER_STOP_S: Final = 0.3
# A part that ran this long was well; its next end counts as the first.
WELL_S: Final = 60.0
LONGEST_WAIT_S: Final = 10.0

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line asks for.

    Attributes:
        host: Where the gateway listens.
        port: Its port; 0 takes a free one.
        data_dir: Where everything is kept.
        nats: A broker to use; None: one of our own.
        no_auth: Whether the gateway asks nobody for a key.
    """

    host: str
    port: int
    data_dir: Path
    nats: str | None
    no_auth: bool


def run(options: Options) -> int:
    """Run the platform until SIGINT, SIGTERM or SIGHUP; return the exit status."""
    try:
        with only_one(options.data_dir):
            check_reach(options.host, no_auth=options.no_auth)
            wait_for_last_run(options.data_dir)
            check_port(options.host, options.port)
            return asyncio.run(_until_signal(options))
    except BusError as error:
        sys.stderr.write(f"bkg: {error.message}\n")
        return 1


class _Part(Protocol):
    """A process of the platform."""

    @property
    def pid(self) -> int: ...

    async def ended(self) -> str:
        """Wait until it has ended; return how, as a sentence about it."""


class _Platform:
    """The parts, and what is known of them.

    Args:
        options: What the command line asks for.
        progress: Shows how far the start has come.
    """

    def __init__(self, options: Options, progress: Progress) -> None:
        self._options = options
        self._progress = progress
        self._pids: dict[str, int] = {}
        self._started_at = now()
        self._nats_url = options.nats or ""
        # Chosen at the first start and kept, so that whoever knew them finds us again.
        self._broker_port: int | None = None
        self._port = options.port
        self._listens = False
        self._is_up = False
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Start the parts, tell when they are ready, and keep them running until cancelled.

        Raises:
            Unavailable: A part ended before the platform was up; says why.
        """
        began = time.monotonic()
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(beside(reap_orphans()))
            if self._options.nats:
                await check_broker(self._options.nats)
                self._progress.say("broker", "answers", "green")
            else:
                await self._or_failure(await stack.enter_async_context(self._kept("broker")))
            supervisor = await stack.enter_async_context(self._kept("supervisor"))
            gateway = await stack.enter_async_context(self._kept("gateway"))
            await self._or_failure(supervisor)
            await self._or_failure(gateway)
            missing = await self._or_failure(asyncio.ensure_future(self._until_ready()))
            self._is_up = True
            self._progress.stop()
            self._welcome(missing, time.monotonic() - began)
            await asyncio.Event().wait()

    @asynccontextmanager
    async def _kept(self, name: str) -> AsyncIterator[asyncio.Future[None]]:
        """Keep a part running while inside; gives a future that is done when it first runs."""
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        keeping = asyncio.create_task(self._keep(name, started))
        try:
            yield started
        finally:
            started.cancel()
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)

    async def _keep(self, name: str, started: asyncio.Future[None]) -> None:
        start: Callable[[], AbstractAsyncContextManager[_Part]]
        start = {"broker": self._broker, "supervisor": self._supervisor, "gateway": self._gateway}[
            name
        ]
        self._progress.say(name, "starting")
        failures = 0
        while True:
            began = time.monotonic()
            try:
                async with start() as part:
                    self._pids[name] = part.pid
                    self._record()
                    if self._is_up:
                        _say(f"the {name} runs again, process {part.pid}")
                    elif not started.done():
                        self._progress.say(name, f"runs, process {part.pid}", "green")
                        started.set_result(None)
                    how = await part.ended()
            except BusError as error:
                how = error.message
            except Exception as error:  # noqa: BLE001 - else nobody would hear of it
                how = f"the {name} cannot be kept running: {type(error).__name__}: {error}"
            self._pids.pop(name, None)
            if not self._is_up:
                if not self._failed.done():
                    self._failed.set_exception(Unavailable(how))
                return
            failures = 1 if time.monotonic() - began > WELL_S else failures + 1
            wait_s = min(0.2 * 2**failures, LONGEST_WAIT_S) * random.uniform(0.8, 1.0)  # noqa: S311
            _say(f"{how}; starting it again in {wait_s:.1f} s")
            await asyncio.sleep(wait_s)

    @asynccontextmanager
    async def _broker(self) -> AsyncIterator[_Part]:
        data_dir, port = self._options.data_dir, self._broker_port
        async with running_broker(data_dir, port=port, stop_s=BROKER_STOP_S) as broker:
            self._broker_port, self._nats_url = broker.port, broker.url
            yield broker

    @asynccontextmanager
    async def _supervisor(self) -> AsyncIterator[_Part]:
        async with self._service("supervisor", SUPERVISOR_STOP_S) as supervisor:
            yield supervisor

    @asynccontextmanager
    async def _gateway(self) -> AsyncIterator[_Part]:
        reads, writes = os.pipe()
        with os.fdopen(reads, "rb", 0) as told, os.fdopen(writes, "wb", 0) as tell:
            async with self._service("gateway", GATEWAY_STOP_S, ready_fd=writes) as gateway:
                # The child has its own end; ours must not keep the pipe open when it dies.
                tell.close()
                line = await first_line(told)
                if not line:
                    raise Unavailable(await gateway.ended())
                self._port, self._listens = int(line), True
                yield gateway

    def _service(
        self, name: str, stop_s: float, ready_fd: int | None = None
    ) -> AbstractAsyncContextManager[Child]:
        env = {
            "BKG_NATS_URL": self._nats_url,
            "BKG_DATA_DIR": str(self._options.data_dir),
            "BKG_HOST": self._options.host,
            "BKG_PORT": str(self._port),
            "BKG_NO_AUTH": "1" if self._options.no_auth else "",
            "BKG_PARENT_PID": str(os.getpid()),
        }
        log = self._options.data_dir / "log" / f"{name}.log"
        return child(name, env, log, stop_s, ready_fd)

    async def _or_failure(self, wanted: "asyncio.Future[T]") -> T:
        """Wait for something, or for the first part that ended before all was up."""
        either: set[asyncio.Future[Any]] = {wanted, self._failed}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not wanted.done():
                await self._failed
            return await wanted
        finally:
            wanted.cancel()

    async def _until_ready(self) -> str | None:
        """Wait until every plugin that starts by itself is ready; return what is missing."""
        missing: str | None = "the gateway has not answered yet"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(READY_S):
                while missing := await asyncio.to_thread(_missing, self._options.host, self._port):
                    self._progress.say("plugins", missing)
                    await asyncio.sleep(0.1)
        if missing is None:
            self._progress.say("plugins", "ready", "green")
        return missing

    def _url(self) -> str:
        host = _reachable(self._options.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self._port}"

    def _record(self) -> None:
        if self._listens:
            run = RunFile(
                url=self._url(),
                nats_url=self._nats_url,
                host=socket.gethostname(),
                pid=os.getpid(),
                pids=dict(self._pids),
                started_at=self._started_at,
                version=version(),
            )
            write_run_file(self._options.data_dir, run)

    def _welcome(self, missing: str | None, took_s: float) -> None:
        key_file = self._options.data_dir / "admin.key"
        link = self._url() + "/"
        if not self._options.no_auth:
            with contextlib.suppress(OSError):
                link += f"?key={key_file.read_text().strip()}"
        mem_bytes, processes = memory()
        out.print(f"\nbkg {version()} is up, after {took_s:.1f} s\n")
        if missing:
            out.print(f"  not ready    {missing}", style="yellow")
        out.print(f"  dashboard    {link}")
        if not self._options.no_auth:
            out.print(f"  key          in {key_file}")
        out.print(f"  data         in {self._options.data_dir}")
        out.print(f"  memory       {mem_bytes / 1e6:.0f} MB in {processes} processes")
        out.print("  stop         with Ctrl-C\n")


def _say(text: str) -> None:
    """Print a line; a terminal that has gone is no reason to stop out of order."""
    with contextlib.suppress(OSError, SystemExit):
        out.print(text)


async def _until_signal(options: Options) -> int:
    # Workers whose supervisor was killed.
    adopt_orphans()
    stopping = False
    with Progress() as progress:
        working = asyncio.create_task(_Platform(options, progress).run())

        def stop(number: int) -> None:
            nonlocal stopping
            if stopping and number == signal.SIGINT:
                kill_all()
                remove_run_file(options.data_dir)
                os._exit(130)
            if not stopping:
                stopping = True
                working.cancel()
                progress.stop()
                _say("stopping")

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # Ignored by nohup, and meant to stay so.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                loop.add_signal_handler(number, stop, number)
        try:
            await working
        except asyncio.CancelledError:
            if not stopping:
                raise
        finally:
            kill_all()
            remove_run_file(options.data_dir)
    _say("stopped")
    return 0


def _reachable(host: str) -> str:
    """Return the name under which this host reaches what listens on `host`."""
    return "127.0.0.1" if host in ("0.0.0.0", "::", "") else host  # noqa: S104 - compared


def _missing(host: str, port: int) -> str | None:
    """Ask the gateway what is missing until all is ready; None when nothing is."""
    connection = http.client.HTTPConnection(_reachable(host), port, timeout=2)
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        body = answer.read()
    except (OSError, http.client.HTTPException) as error:
        return f"the gateway does not answer: {error}"
    finally:
        connection.close()
    if answer.status == http.HTTPStatus.OK:
        return None
    with contextlib.suppress(ValueError, TypeError, LookupError):
        return "; ".join(json.loads(body)["reasons"])
    return f"the gateway answers {answer.status} to /readyz"

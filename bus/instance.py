"""This process as others see it: it registers, beats, serves, drains and leaves.

What it is asked is worked on in `bus.serving`, how it is stands in `bus.vitals`, what it says of
itself is written down in `bus.registration`, its configuration changes in `bus.live_config`, and
how others find it stands in `bus.discovery`.
"""

import asyncio
import os
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

import msgspec
import structlog

from bus import codec, logs
from bus import messages as m
from bus.client import INSTANCE, SLOT, Answer, Client
from bus.discovery import Identity, discoverable
from bus.errors import DeadlineExceeded, NobodyListens
from bus.live_config import LiveConfig
from bus.probes import Facts, Probes, Route
from bus.process import settle
from bus.registration import FIRST_FREE_SLOT, Registered, claim_free_slot
from bus.served import DRAIN_S, Served
from bus.serving import MAX_IN_FLIGHT, Call, Serving, in_task
from bus.settings import Settings
from bus.subjects import (
    CANCEL,
    Endpoint,
    RawEndpoint,
    instance_calls,
)
from bus.tasks import beside
from bus.vitals import Vitals
from bus.wire import Incoming

__all__ = [
    "DRAIN_S", "FIRST_FREE_SLOT", "MAX_IN_FLIGHT", "Call", "Instance", "RawCall", "bkg_version",
    "join",
]  # fmt: skip

log = structlog.get_logger("bus.instance")

Req = TypeVar("Req", bound=m.Message)
Rep = TypeVar("Rep", bound=m.Message)
S = TypeVar("S")


def bkg_version() -> str:
    """Return the version of the distribution that this process runs."""
    try:
        return version("bkg")
    except PackageNotFoundError:
        return "0.0.0"


class RawCall(msgspec.Struct, frozen=True):
    """A request whose body was not decoded.

    Attributes:
        body: As it came.
        headers: As they came.
        deadline: When the caller gives up, in the event loop's time; None if it did not say.
    """

    body: bytes
    headers: Mapping[str, str]
    deadline: float | None


class Instance:
    """A process on the bus; made by `join`.

    Attributes:
        id: This process, and no other before or after it.
        plugin: What it is an instance of.
        slot: The place that it fills.
        host: Where it runs.
        counts: `models_loaded`, `datasets` or `entries`, for telemetry.
        gauges: Further numbers for telemetry.
        series: Give further metrics for Prometheus, whenever somebody asks.
    """

    def __init__(
        self,
        client: Client,
        registration: m.Registration,
        *,
        description: str,
        config: m.PluginConfig | None,
        listed: bool,
        telemetry_s: float | None = None,
    ) -> None:
        self.id = registration.id
        self.plugin = registration.plugin
        self.slot = registration.slot
        self.host = registration.host
        self._client = client
        self._listed = listed
        self._registered = Registered(client, registration, listed=listed)
        self._live = LiveConfig(client, self._registered, config)
        who = {INSTANCE: self.id}
        if listed:
            who[SLOT] = f"{self.plugin}.{self.slot}"
        self._asked = Serving(client, self.plugin, who)
        self._vitals = Vitals(
            client,
            self._asked,
            lambda: self._registration,
            telemetry_s or _telemetry_interval(config),
        )
        self.counts = self._vitals.counts
        self.gauges = self._vitals.gauges
        self.series = self._vitals.series
        self._probes = Probes(
            Facts(self._vitals.missing, self._vitals.about, self._vitals.metrics),
            client.max_payload,
        )
        self._identity = Identity(
            plugin=self.plugin,
            id=self.id,
            version=registration.version,
            description=description,
            metadata={"host": self.host, "slot": str(self.slot), "pid": str(os.getpid())},
        )
        if telemetry_s is None:
            self.on_config(["telemetry_interval"], self._take_telemetry_interval)

    @property
    def config(self) -> m.PluginConfig | None:
        """The plugin's configuration as this process has it: what it has taken live included."""
        return self._live.present

    @property
    def in_flight(self) -> int:
        """Requests being worked on."""
        return self._asked.in_flight

    def settings(self, kind: type[S]) -> S:
        """Return the plugin's settings, checked.

        Raises:
            InvalidRequest: They do not fit; names the setting.
        """
        return codec.convert(self.config.settings if self.config else {}, kind)

    def on_config(self, names: Sequence[str], callback: Callable[[], None]) -> None:
        """Take changes of these settings live: the supervisor then needs no restart for them.

        Args:
            names: The settings.
            callback: Called when one of them has changed; `config` and `settings` have the new
                values then. If it raises a `BusError`, nothing is taken. It is called at once when
                such a change came between joining and now.
        """
        self._live.on_change(names, callback)

    async def ready(self) -> None:
        """Tell everybody that this instance can do its work."""
        self._registered.say(status="running", since=m.now())
        await self._registered.write()
        settle()
        port = self._registration.port
        log.info("instance.ready", slot=self.slot, pid=os.getpid(), port=port)

    @asynccontextmanager
    async def serving(
        self, endpoint: Endpoint[Req, Rep], handler: Callable[[Req], Awaitable[Rep]], *keys: str
    ) -> AsyncGenerator[None]:
        """Answer an endpoint's requests while inside.

        Entered, the broker routes requests here. Left, it no longer does, and every request that
        it had sent here is answered, or has had its `DRAIN_S`. Requests run concurrently, up to
        `MAX_IN_FLIGHT` in the whole process; one more is refused at once.

        Args:
            endpoint: What is served.
            handler: Returns the reply, or raises a `BusError` for the caller.
            keys: Values of the endpoint's `keys`.
        """

        async def work(call: Call) -> Answer:
            content_type = call.headers.get(codec.CONTENT_TYPE) or codec.JSON
            request = codec.decode(call.body, endpoint.request, content_type)
            # It may be large, and is read.
            call.body = b""
            allowed_s = call.allowed_s
            try:
                async with asyncio.timeout(allowed_s):
                    reply = await handler(request)
            except TimeoutError:
                raise DeadlineExceeded(f"not done within the caller's {allowed_s} s") from None
            kind = codec.MSGPACK if content_type == codec.MSGPACK else codec.JSON
            return Answer(codec.encode(reply, kind), {codec.CONTENT_TYPE: kind})

        subject = endpoint.subject(self._client.root, *keys)
        async with self._serving(Served(endpoint, subject, in_task(work), handler)):
            yield

    @asynccontextmanager
    async def serving_raw(
        self, endpoint: RawEndpoint, handler: Callable[[RawCall], Awaitable[Answer]], *keys: str
    ) -> AsyncGenerator[None]:
        """Answer a raw endpoint's requests while inside, as `serving` does for others.

        The handler has to honour the deadline: what waits in a queue of its own is better dropped
        there than cancelled here.

        Args:
            endpoint: What is served.
            handler: Returns the answer, or raises a `BusError` for the caller.
            keys: Values of the endpoint's `keys`; the last ones may be left out.
        """
        loop = asyncio.get_running_loop()

        async def work(call: Call) -> Answer:
            allowed_s = call.allowed_s
            deadline = None if allowed_s is None else loop.time() + allowed_s
            return await handler(RawCall(call.body, call.headers, deadline))

        async with self.serving_calls(endpoint, in_task(work), *keys):
            yield

    @asynccontextmanager
    async def serving_calls(
        self, endpoint: RawEndpoint, take: Callable[[Call], None], *keys: str
    ) -> AsyncGenerator[None]:
        """Answer a raw endpoint's requests while inside, without a task for each.

        Args:
            endpoint: What is served.
            take: Is given each request as soon as it is read. It must not wait; it ends the call
                now or later, by `answer`, `fail` or `drop`. What it raises fails the call. The
                deadline is its own to honour, and so is `Call.on_cancel`.
            keys: Values of the endpoint's `keys`; the last ones may be left out.
        """
        subject = endpoint.subject(self._client.root, *keys)
        async with self._serving(Served(endpoint, subject, take)):
            yield

    @asynccontextmanager
    async def _serving(self, served: Served) -> AsyncGenerator[None]:
        self._asked.add(served)

        def taker(message: Incoming) -> None:
            # Another subject: a stream's consumer delivers here what its maker may not send here
            # (nats-server#8274).
            if message.subject == served.subject:
                self._asked.take(served, message)

        heard = await self._client.take(served.subject, served.endpoint.queue, taker)
        self._asked.served[served.subject] = served
        try:
            yield
        finally:
            # Who asks this very instance is sent on at once. A successor may serve it by now.
            if self._asked.served.get(served.subject) is served:
                del self._asked.served[served.subject]
            await self._client.stop_listening(heard)
            await served.drained()

    @asynccontextmanager
    async def local_routes(self, *routes: Route) -> AsyncGenerator[None]:
        """Answer further paths on the loopback port while inside, if there is one."""
        async with self._probes.routing(*routes):
            yield

    async def answer_here(self, endpoint: Endpoint[Req, Rep], request: Req) -> Rep:
        """Answer a request that did not come over the bus as if it had: same limits, same counts.

        Raises:
            NobodyListens: This instance does not serve that.
            BusError: What the handler raised.
        """
        served = self._asked.served.get(endpoint.subject_of(self._client.root, request))
        if served is None or served.handler is None:
            raise NobodyListens(
                f"{endpoint.capability} is not served by this instance just now", retry_after_s=2
            )
        reply: Rep = await self._asked.here(served, request)
        return reply

    @asynccontextmanager
    async def _addressed(self) -> AsyncGenerator[None]:
        """Answer what is asked of this very slot while inside: whatever it serves.

        Slots of what is not listed are not unique: nobody could be asked by one.
        """
        if not self._listed:
            yield
            return
        here = instance_calls(self._client.root, self.plugin, self.slot)

        def taker(message: Incoming) -> None:
            subject = f"{self._client.root}.call.{message.subject[len(here) - 1 :]}"
            self._asked.take_direct(subject, message)

        # In a queue group, because a slot has two instances for a moment when it changes hands.
        heard = await self._client.take(here, self.plugin, taker)
        try:
            yield
        finally:
            await self._client.stop_listening(heard)
            await self._asked.posted()

    async def _follow_cancels(self) -> None:
        """Stop working on what nobody waits for any more."""
        async with self._client.follow(CANCEL) as cancels:
            async for cancel in cancels:
                self._asked.cancel(cancel.payload.inbox)

    @property
    def _registration(self) -> m.Registration:
        return self._registered.told

    def _take_telemetry_interval(self) -> None:
        self._vitals.report_every(_telemetry_interval(self.config))

    @asynccontextmanager
    async def _present(self, settings: Settings) -> AsyncGenerator[None]:
        """Be seen and heard by others while inside; for `join`."""
        about = m.LogEvent(
            plugin=self.plugin,
            level="info",
            message="",
            timestamp=m.now(),
            slot=self.slot,
            instance=self.id,
            host=self.host,
        )
        async with (
            logs.shipping(self._client, about, settings.log_level),
            discoverable(self._identity, self._asked),
            self._addressed(),
            self._probed(settings.probe_port),
        ):
            await self._registered.write()
            try:
                async with beside(
                    self._registered.keep(),
                    self._vitals.beat(),
                    self._vitals.report(),
                    self._follow_cancels(),
                    *([self._live.follow()] if self._listed else []),
                ):
                    yield
            except Exception as error:
                log.exception("instance.failed", cause=str(error))
                raise
            finally:
                await self._registered.withdraw()

    @asynccontextmanager
    async def _probed(self, wanted: int) -> AsyncGenerator[None]:
        """Have the loopback port open while inside; nobody would learn that of one not listed."""
        if not self._listed:
            yield
            return
        async with self._probes.listening(wanted) as port:
            self._registered.say(port=port)
            yield


@asynccontextmanager
async def join(
    client: Client,
    settings: Settings,
    *,
    plugin: str,
    description: str,
    capabilities: Sequence[str] = (),
    meta: Mapping[str, Any] | None = None,
    config_schema: Mapping[str, Any] | None = None,
    listed: bool = True,
    telemetry_s: float | None = None,
) -> AsyncGenerator[Instance]:
    """Be on the bus while inside: logs, heartbeats, telemetry, registration and discovery.

    Args:
        client: The connection.
        settings: The environment: slot, generation, host, log level.
        plugin: What this is an instance of.
        description: One sentence about it.
        capabilities: What it can be asked.
        meta: What it tells about itself.
        config_schema: JSON Schema of its settings.
        listed: Whether it registers as a plugin's instance; gateway and supervisor do not.
        telemetry_s: Time between snapshots; the setting `telemetry_interval` if None.

    Raises:
        Conflict: No free slot, or another instance took ours.
    """
    wanted = await client.store.desired.get(plugin) if listed else None
    config = wanted.value.config if wanted and wanted.value else None
    moment = m.now()
    registration = m.Registration(
        id=secrets.token_hex(11),
        plugin=plugin,
        slot=settings.slot or 0,
        host=settings.host,
        pid=os.getpid(),
        version=bkg_version(),
        capabilities=list(capabilities),
        status="starting",
        since=moment,
        last_heartbeat=moment,
        generation=settings.generation,
        meta=dict(meta or {}),
        config_schema=dict(config_schema) if config_schema else None,
        # A setting that this instance does not go by changes without a restart, too.
        live_settings=["telemetry_interval"],
        config_revision=wanted.revision if wanted else 0,
    )
    if listed and settings.slot is None:
        registration = await claim_free_slot(client, registration)
    instance = Instance(
        client,
        registration,
        description=description,
        config=config,
        listed=listed,
        telemetry_s=telemetry_s,
    )
    async with instance._present(settings):  # noqa: SLF001 - it is made here alone
        yield instance


def _telemetry_interval(config: m.PluginConfig | None) -> float:
    period = config.settings.get("telemetry_interval", 10) if config else 10
    return float(period) if isinstance(period, int | float) and period > 0 else 10.0

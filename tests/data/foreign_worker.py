"""A worker of nats-py and the standard library alone, made after docs/worker-protocol.md."""

import asyncio
import json
import os
import signal
import time
from resource import RUSAGE_SELF, getrusage

import nats.micro

ROOT, SLOT = os.environ["BKG_ROOT"], int(os.environ["BKG_SLOT"])
ME = {"plugin": "greet", "slot": SLOT, "pid": os.getpid(), "host": os.environ["BKG_HOST_NAME"]}
ME |= {"generation": int(os.environ["BKG_GENERATION"]), "status": "running"}
ME |= {"version": "1.0.0", "capabilities": ["greet.hello"], "inFlight": 0, "oldestS": 0, "lagMs": 0}


async def hello(request):
    try:
        answer = {"greeting": "Hello, " + json.loads(request.data)["name"]}
        await request.respond(json.dumps(answer).encode())
    except (ValueError, LookupError, TypeError, RecursionError):
        said = json.dumps({"code": "invalid-request", "message": "name must be text"})
        await request.respond_error("400", "name must be text", said.encode())


async def main():
    leaving = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, leaving.cancel)
    nc = await nats.connect(os.environ["BKG_NATS_URL"], max_reconnect_attempts=-1)
    kv = await nc.jetstream().key_value(f"{ROOT}-observed")
    about = {"name": "greet", "version": "1.0.0", "description": "Says hello"}
    service = await nats.micro.add_service(nc, **about, queue_group="greet")
    await service.add_endpoint(name="hello", subject=f"{ROOT}.call.greet.hello", handler=hello)
    me = ME | {"id": service.id, "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    key, revision, n = f"greet.{SLOT}.instance", None, 1
    while not leaving.done():
        me["lastHeartbeat"] = me["timestamp"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        me |= {"cpu": 100 * time.process_time() / n, "memBytes": 1024 * getrusage(RUSAGE_SELF)[2]}
        try:
            for feed in ("health", "telemetry"):
                await nc.publish(f"{ROOT}.{feed}.greet.{SLOT}", json.dumps(me).encode())
            if revision is None:
                revision = await kv.put(key, json.dumps(me).encode())
                ready = json.dumps(me | {"level": "info", "message": "ready"}).encode()
                await nc.publish(f"{ROOT}.log.greet.{SLOT}.info", ready)
            elif n % 10 == 0:
                revision = await kv.update(key, json.dumps(me).encode(), revision)
        except nats.js.errors.KeyWrongLastSequenceError:
            revision, there = None, json.loads((await kv.get(key)).value or "{}")
            assert there.get("id", service.id) == service.id, f"somebody else has slot {SLOT}"
        except nats.errors.Error:  # The broker is away: the next beat tries again.
            revision = None
        n += 1
        await asyncio.wait([leaving], timeout=1)
    await kv.delete(key, revision)
    await nc.drain()


asyncio.run(main())

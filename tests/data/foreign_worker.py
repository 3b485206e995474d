"""A worker of nats-py and the standard library alone, made after docs/worker-protocol.md."""

import asyncio
import json
import os
import resource
import signal
import time
from contextlib import suppress

import nats
from nats.js.errors import KeyWrongLastSequenceError

ROOT, SLOT, ID = os.environ["BKG_ROOT"], int(os.environ["BKG_SLOT"]), os.urandom(11).hex()
ME = {"plugin": "greet", "slot": SLOT, "pid": os.getpid(), "host": os.environ["BKG_HOST_NAME"]}
ME |= {"id": ID, "generation": int(os.environ["BKG_GENERATION"]), "status": "running"}
ME |= {"version": "1.0.0", "capabilities": ["greet.hello"]}
ABOUT = {"name": "greet", "id": ID, "version": "1.0.0", "metadata": {}}
HELLO = {"name": "hello", "subject": f"{ROOT}.call.greet.hello", "queue_group": "greet"}
COUNTS = dict.fromkeys(("num_requests", "num_errors", "processing_time"), 0)
COUNTS |= {"average_processing_time": 0, "last_error": ""}


def now():
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


async def main():
    leaving = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, leaving.cancel)
    nc = await nats.connect(os.environ["BKG_NATS_URL"], max_reconnect_attempts=-1)
    kv = await nc.jetstream().key_value(f"{ROOT}-observed")
    key, place, since, revision, beats = f"greet.{SLOT}.instance", f"greet.{SLOT}", now(), None, 0

    async def send(subject, headers=None, **message):
        await nc.publish(subject, json.dumps(message).encode(), headers=headers)

    async def hello(request):
        COUNTS["num_requests"] += 1
        try:
            await send(request.reply, greeting="Hello, " + json.loads(request.data)["name"])
        except (ValueError, LookupError, TypeError, RecursionError):
            COUNTS["num_errors"] += 1
            error = {"Nats-Service-Error": "name must be text", "Nats-Service-Error-Code": "400"}
            await send(request.reply, error, code="invalid-request", message="name must be text")

    async def discover(request):
        verb = request.subject.split(".")[1]
        says = {"INFO": {"description": "Says hello", "endpoints": [HELLO]}}
        says["STATS"] = {"started": since, "endpoints": [HELLO | COUNTS]}
        kind = f"io.nats.micro.v1.{verb.lower()}_response"
        await send(request.reply, **ABOUT, type=kind, **says.get(verb, {}))

    calls = await nc.subscribe(HELLO["subject"], "greet", hello)
    for tail in ("", ".greet", f".greet.{ID}"):
        await nc.subscribe(f"$SRV.*{tail}", cb=discover)
    while not leaving.done():
        me = ME | {"since": since, "lastHeartbeat": now(), "timestamp": now()}
        with suppress(nats.errors.Error):
            try:
                if revision is None:
                    revision = await kv.put(key, json.dumps(me).encode())
                    await send(f"{ROOT}.log.{place}.info", **me, level="info", message="ready")
                elif beats % 10 == 0:
                    revision = await kv.update(key, json.dumps(me).encode(), revision)
            except KeyWrongLastSequenceError:
                revision, there = None, json.loads((await kv.get(key)).value or "{}")
                if there.get("id", ID) != ID:
                    raise SystemExit(f"another process has slot {SLOT}") from None
            await send(f"{ROOT}.health.{place}", **me, inFlight=0, oldestS=0, lagMs=0)
            cpu, kib = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            uses = {"cpu": 100 * cpu / (beats + 1), "memBytes": 1024 * kib}
            await send(f"{ROOT}.telemetry.{place}", **me, **uses)
        beats += 1
        await asyncio.wait([leaving], timeout=1)
    await calls.drain()
    with suppress(nats.errors.Error):
        await kv.delete(key, revision)
    await nc.close()


asyncio.run(main())

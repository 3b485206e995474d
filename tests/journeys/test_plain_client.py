"""An operator with a plain NATS client, and no code of ours."""

import json

import nats

from bus.testing import until


async def test_everything_can_be_read_and_asked(platform):
    """Subjects are readable, bodies are JSON, services are listed, and candle.stats answers."""
    heard: dict[str, dict[str, object]] = {}

    async def on_message(message) -> None:
        heard[message.subject] = json.loads(message.data)

    plain = await nats.connect(platform.nats_url)
    try:
        for kind in ("log", "telemetry", "status", "health"):
            await plain.subscribe(f"bkg.{kind}.>", cb=on_message)
        async with platform.session() as session:
            async with session.post("/api/plugins/candle/restart") as answer:
                assert answer.status == 200
        expected = {
            "bkg.log.candle.0.info",
            "bkg.log.supervisor.0.info",
            "bkg.telemetry.rustyface.0",
            "bkg.status.candle.0",
            "bkg.health.candle.0",
            "bkg.health.gateway.0",
        }
        await until(lambda: expected <= set(heard))
        assert heard["bkg.log.candle.0.info"]["plugin"] == "candle"
        assert heard["bkg.telemetry.rustyface.0"]["memBytes"] > 1_000_000
        await until(lambda: heard["bkg.status.candle.0"]["status"] == "running")
        assert heard["bkg.health.candle.0"]["status"] == "running"

        services = await gather(plain, "$SRV.INFO")
        assert {s["name"] for s in services} == {"candle", "rustyface", "supervisor", "gateway"}
        assert all(s["type"] == "io.nats.micro.v1.info_response" for s in services)
        assert all(isinstance(s["description"], str) for s in services)
        stats = await gather(plain, "$SRV.STATS.candle")
        assert "bkg.call.candle.stats" in [e["subject"] for e in stats[0]["endpoints"]]

        reply = await plain.request("bkg.call.candle.stats", b"", timeout=2)
        assert json.loads(reply.data)["models"] == []
        wrong = await plain.request("bkg.call.candle.model.load", b"{}", timeout=2)
        assert wrong.headers["Nats-Service-Error-Code"] == "400"
        assert "id" in wrong.headers["Nats-Service-Error"]
    finally:
        await plain.close()


async def gather(plain, subject: str) -> list[dict[str, object]]:
    """Collect the answers of all services, as `nats service ls` does."""
    inbox = plain.new_inbox()
    answers = await plain.subscribe(inbox)
    await plain.publish(subject, b"", reply=inbox)
    found = []
    try:
        while True:
            found.append(json.loads((await answers.next_msg(timeout=0.5)).data))
    except nats.errors.TimeoutError:
        return found

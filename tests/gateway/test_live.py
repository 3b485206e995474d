"""The WebSocket: what is told, when, to whom, and what a client cannot break."""

import asyncio
import json
from contextlib import asynccontextmanager

import pytest
from aiohttp import WSMsgType, WSServerHandshakeError
from hypothesis import HealthCheck, given
from hypothesis import settings as runs
from hypothesis import strategies as st

from bus.instance import join
from bus.logs import publish_log
from bus.messages import LogEvent, TelemetrySnapshot, now
from bus.subjects import TELEMETRY
from bus.testing import until
from services.gateway import feeds as feeds_module


@asynccontextmanager
async def socket(gate, origin=None):
    """A connection whose bootstrap has been read."""
    async with gate.http.ws_connect("/ws/plugins", origin=origin) as ws:
        assert (await frame(ws))["type"] == "bootstrap"
        yield ws


async def frame(ws, *kinds: str):
    """Return the next frame, of the given types if any; the clock's ticks are passed over."""
    async with asyncio.timeout(5):
        while True:
            message = await ws.receive()
            assert message.type is WSMsgType.TEXT, message
            told = json.loads(message.data)
            if told["type"] in kinds or (not kinds and told["type"] != "tick"):
                return told


async def ask(ws, action, topic, **more: object):
    """Send a wish and return every frame up to its acknowledgement."""
    await ws.send_json({"action": action, "topic": topic, "id": "x", **more})
    told = []
    while (one := await frame(ws))["type"] not in ("ack", "error"):
        told.append(one)
    assert one == {"type": "ack", "payload": {"id": "x"}}
    return told


async def quiet(ws, topic):
    """Return whether nothing of a topic waits: an answer to a wish comes behind it."""
    await asyncio.sleep(3 * feeds_module.TICK_S)
    return not [one for one in await ask(ws, "UNSUB", "status", pluginId="x") if
                one["type"] == topic]  # fmt: skip


async def speak(client, *messages: str, plugin="echo", level="info", slot=0):
    for message in messages:
        event = LogEvent(plugin=plugin, level=level, message=message, timestamp=now(), slot=slot)
        await publish_log(client, event)


async def stored(client, count, plugin="echo"):
    async def there():
        return len(await client.store.logs(plugin, limit=5_000)) >= count

    await until(there)


async def lines(ws, count):
    return [(await frame(ws, "logs"))["payload"]["message"] for _ in range(count)]


# --- Bootstrap and topics -------------------------------------------------------------------------


async def test_the_first_frame_is_a_bootstrap_with_plugins_and_telemetry(gate, worker, wanted):
    await wanted("silent")
    await until(lambda: len(gate.parts.feeds.states()) == 2 and gate.parts.feeds.telemetry("echo"))
    async with gate.http.ws_connect("/ws/plugins") as ws:
        first = await frame(ws)
    assert first["type"] == "bootstrap"
    assert [one["name"] for one in first["payload"]["plugins"]] == ["echo", "silent"]
    assert [one["plugin"] for one in first["payload"]["telemetry"]] == ["echo"]


async def test_nothing_comes_before_a_wish(gate, client, worker, wanted):
    async with socket(gate) as ws:
        await wanted("silent")
        await speak(client, "one")
        await until(lambda: len(gate.parts.feeds.states()) == 2)
        with pytest.raises(TimeoutError):
            await ws.receive(timeout=0.3)


async def test_status_tells_every_state_at_once_and_then_each_change(gate, wanted):
    await wanted("ant")
    await wanted("bee")
    await until(lambda: len(gate.parts.feeds.states()) == 2)
    async with socket(gate) as ws:
        told = await ask(ws, "SUB", "status")
        assert [(one["type"], one["payload"]["name"]) for one in told] == [
            ("status", "ant"),
            ("status", "bee"),
        ]
        await wanted("bee", description="Changed.")
        change = await frame(ws)
        assert change["payload"]["config"]["description"] == "Changed."


async def test_status_of_one_plugin_is_only_of_that_one(gate, wanted):
    await wanted("ant")
    await wanted("bee")
    await until(lambda: len(gate.parts.feeds.states()) == 2)
    async with socket(gate) as ws:
        told = await ask(ws, "SUB", "status", pluginId="bee")
        assert [one["payload"]["name"] for one in told] == ["bee"]
        await wanted("ant", description="Changed.")
        await wanted("bee", description="Changed.")
        assert (await frame(ws))["payload"]["name"] == "bee"


async def test_a_plugin_that_nobody_knows_any_more_is_told_as_stopped(gate, client, settings):
    async with (
        join(client, settings, plugin="guest", description="By hand.") as guest,
        socket(gate) as ws,
    ):
        await guest.ready()
        await until(lambda: [one.status for one in gate.parts.feeds.states()] == ["running"])
        await ask(ws, "SUB", "status", pluginId="guest")
        leave = asyncio.create_task(client.store.instances.delete("guest", 0))
        while (state := (await frame(ws, "status"))["payload"])["status"] != "stopped":
            pass
        await leave
    assert state["instances"] == []


async def test_telemetry_tells_the_last_snapshot_at_once_and_then_each_new_one(gate, worker):
    await until(lambda: gate.parts.feeds.telemetry("echo"))
    async with socket(gate) as ws:
        told = await ask(ws, "SUB", "telemetry")
        assert told[0]["type"] == "telemetry"
        assert told[0]["payload"]["plugin"] == "echo"
        later = await frame(ws, "telemetry")
        assert later["payload"]["timestamp"] >= told[0]["payload"]["timestamp"]


async def test_telemetry_of_all_leaves_out_what_is_no_plugin(gate, client, wanted):
    await wanted("echo")
    await until(gate.parts.feeds.states)
    async with socket(gate) as ws:
        await ask(ws, "SUB", "telemetry")
        for plugin in ("supervisor", "echo"):
            snapshot = TelemetrySnapshot(plugin=plugin, cpu=1, mem_bytes=1, timestamp=now(), slot=0)
            await client.publish(TELEMETRY, snapshot, plugin=plugin, slot=0)
        assert (await frame(ws))["payload"]["plugin"] == "echo"
        told = await ask(ws, "SUB", "telemetry", pluginId="supervisor")
        assert [one["payload"]["plugin"] for one in told] == ["supervisor"]


async def test_logs_of_a_plugin_begin_with_the_last_hundred_oldest_first(gate, client):
    await speak(client, *(f"old {n}" for n in range(150)))
    await stored(client, 150)
    async with socket(gate) as ws:
        told = await ask(ws, "SUB", "logs", pluginId="echo")
        assert [one["payload"]["message"] for one in told] == [f"old {n}" for n in range(50, 150)]
        await speak(client, "new")
        assert await lines(ws, 1) == ["new"]


async def test_logs_of_all_are_live_only(gate, client):
    await speak(client, "old")
    await stored(client, 1)
    async with socket(gate) as ws:
        assert await ask(ws, "SUB", "logs") == []
        await speak(client, "new", plugin="ant")
        told = await frame(ws)
        assert (told["payload"]["plugin"], told["payload"]["message"]) == ("ant", "new")
        assert told["payload"]["seq"] > 0


async def test_a_record_comes_once_though_two_wishes_want_it(gate, client):
    async with socket(gate) as ws:
        await ask(ws, "SUB", "logs")
        await ask(ws, "SUB", "logs", pluginId="echo")
        await speak(client, "one", "two")
        assert await lines(ws, 2) == ["one", "two"]
        assert await quiet(ws, "logs")


@pytest.mark.parametrize("topic", ["status", "telemetry", "logs"])
async def test_the_same_wish_again_changes_nothing(gate, client, worker, topic):
    await speak(client, "old")
    await stored(client, 1)
    await until(lambda: gate.parts.feeds.telemetry("echo"))
    async with socket(gate) as ws:
        await ask(
            ws, "SUB", topic, pluginId="echo", **({"level": "info"} if topic == "logs" else {})
        )
        again = await ask(
            ws, "SUB", topic, pluginId="echo", **({"level": "info"} if topic == "logs" else {})
        )
        # What happens meanwhile may come; no second snapshot or back-fill does.
        assert topic != "logs" or again == []
        assert topic != "status" or again == []


async def test_unsub_ends_a_wish(gate, client, wanted):
    await wanted("ant")
    await until(gate.parts.feeds.states)
    async with socket(gate) as ws:
        await ask(ws, "SUB", "status", pluginId="ant")
        await ask(ws, "SUB", "logs", pluginId="ant")
        await ask(ws, "UNSUB", "status", pluginId="ant")
        await ask(ws, "UNSUB", "logs", pluginId="ant")
        await wanted("ant", description="Changed.")
        await speak(client, "unheard", plugin="ant")
        await until(lambda: gate.parts.feeds.states()[0].config.description == "Changed.")
        assert await quiet(ws, "status")


async def test_unsub_without_a_plugin_ends_the_topic(gate, client):
    async with socket(gate) as ws:
        await ask(ws, "SUB", "logs", pluginId="echo")
        await ask(ws, "SUB", "logs")
        await ask(ws, "UNSUB", "logs")
        await speak(client, "unheard")
        assert await quiet(ws, "logs")


# --- Logs: level, after, batch, the seam ----------------------------------------------------------


async def test_a_level_is_the_least_one_in_back_fill_and_live(gate, client):
    for level in ("debug", "info", "warn", "error"):
        await speak(client, f"old {level}", level=level)
    await stored(client, 4)
    async with socket(gate) as ws:
        told = await ask(ws, "SUB", "logs", pluginId="echo", level="warn")
        assert [one["payload"]["message"] for one in told] == ["old warn", "old error"]
        await speak(client, "low", level="info")
        await speak(client, "high", level="error")
        assert await lines(ws, 1) == ["high"]


async def test_after_brings_what_was_missed_since_and_nothing_else(gate, client):
    await speak(client, *(f"old {n}" for n in range(10)))
    await stored(client, 10)
    seen = (await client.store.logs("echo", limit=10))[5].seq
    async with socket(gate) as ws:
        told = await ask(ws, "SUB", "logs", after=seen)
        assert [one["payload"]["message"] for one in told] == [f"old {n}" for n in range(6, 10)]


async def test_a_back_fill_that_does_not_reach_back_is_announced_by_a_gap(gate, client):
    await speak(client, *(f"old {n}" for n in range(20)))
    await stored(client, 20)
    seqs = [one.seq for one in await client.store.logs("echo", limit=20)]
    async with socket(gate) as ws:
        told = await ask(ws, "SUB", "logs", pluginId="echo", after=seqs[2], backfill=5)
    assert told[0] == {"type": "gap", "payload": {"from": seqs[2] + 1, "to": seqs[15] - 1}}
    assert [one["payload"]["message"] for one in told[1:]] == [f"old {n}" for n in range(15, 20)]


async def test_batch_brings_several_records_in_one_frame(gate, client):
    await speak(client, *(f"old {n}" for n in range(10)))
    await stored(client, 10)
    async with socket(gate) as ws:
        told = await ask(ws, "SUB", "logs", pluginId="echo", batch=True)
        assert [len(one["payload"]) for one in told] == [10]
        await speak(client, *(f"new {n}" for n in range(50)))
        heard = []
        while len(heard) < 50:
            heard += [one["message"] for one in (await frame(ws, "logs"))["payload"]]
    assert heard == [f"new {n}" for n in range(50)]


async def test_no_record_is_missed_or_doubled_where_back_fill_meets_live(gate, client):
    total = 3_000
    speaking = asyncio.create_task(speak(client, *(f"n {n}" for n in range(total))))
    for _ in range(5):
        async with socket(gate) as ws:
            await ws.send_json({"action": "SUB", "topic": "logs", "pluginId": "echo"})
            heard = []
            while len(heard) < 300 and not (heard and heard[-1] == total - 1):
                payload = (await frame(ws, "logs", "gap"))["payload"]
                heard.append(int(payload["message"].split()[1]))
        assert heard == list(range(heard[0], heard[0] + len(heard)))
        if heard[-1] >= total - 400:
            break
    await speaking


async def test_all_records_reach_every_one_of_many_browsers(gate, client):
    sockets = [await gate.socket() for _ in range(10)]
    for ws in sockets:
        await frame(ws, "bootstrap")
        await ask(ws, "SUB", "logs")
    await speak(client, *(f"n {n}" for n in range(500)))
    for ws in sockets:
        assert await lines(ws, 500) == [f"n {n}" for n in range(500)]
        await ws.close()


async def test_the_live_feed_is_followed_only_while_somebody_reads(gate, client):
    async with socket(gate) as ws:
        await ask(ws, "SUB", "logs")
        assert gate.parts.feeds._tailing.is_set()
    await until(lambda: not gate.parts.feeds._wanted.is_set())
    await speak(client, "unheard")
    await until(lambda: not gate.parts.feeds._tailing.is_set())
    async with socket(gate) as ws:
        await ask(ws, "SUB", "logs", pluginId="echo")
        await speak(client, "heard again")
        assert await lines(ws, 1) == ["heard again"]


async def test_a_browser_that_reads_too_slowly_is_told_what_it_missed(start, client):
    gate = await start(budget_bytes=20_000)
    async with socket(gate) as slow, socket(gate) as quick:
        await ask(slow, "SUB", "logs")
        await ask(quick, "SUB", "logs")
        # The slow one stops reading: kernel buffers fill, then the gateway's.
        slow._reader._protocol.pause_reading()
        total, text = 3_000, "x" * 10_000
        speaking = asyncio.create_task(speak(client, *(f"{n} {text}" for n in range(total))))
        for n in range(total):
            assert (await lines(quick, 1))[0].startswith(f"{n} ")
        await speaking
        slow._reader._protocol.resume_reading()
        reached, lost = None, 0
        while reached is None or reached < total - 1:
            told = await frame(slow, "logs", "gap")
            if told["type"] == "gap":
                lost += told["payload"]["to"] - told["payload"]["from"] + 1
                if reached is not None and reached + lost >= total - 1:
                    break
            else:
                reached = int(told["payload"]["message"].split()[0])
    assert lost > 0


async def test_a_clock_ticks_for_those_who_asked_for_something(gate, monkeypatch, start):
    monkeypatch.setattr(feeds_module, "CLOCK_S", 0.05)
    gate = await start()
    async with socket(gate) as ws:
        await ask(ws, "SUB", "status")
        assert (await frame(ws, "tick"))["payload"]["time"].endswith("Z")


# --- What clients send wrongly --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "action"),
        ("{", "JSON"),
        ("null", ""),
        ("[]", ""),
        ('{"action":"SUB"}', "topic"),
        ('{"action":"GRAB","topic":"logs"}', "action"),
        ('{"action":"SUB","topic":"secrets"}', "topic"),
        ('{"action":"SUB","topic":"logs","pluginId":"../.."}', "pluginId"),
        ('{"action":"SUB","topic":"logs","pluginId":">"}', "pluginId"),
        ('{"action":"SUB","topic":"logs","after":-1}', "after"),
        ('{"action":"SUB","topic":"logs","after":1e300}', "after"),
        ('{"action":"SUB","topic":"logs","backfill":100000}', "backfill"),
        ('{"action":"SUB","topic":"logs","level":"loud"}', "level"),
        ("[" * 5_000, ""),
    ],
)
async def test_a_wrong_frame_is_answered_and_the_connection_stays(gate, text, named):
    async with socket(gate) as ws:
        await ws.send_str(text)
        told = await frame(ws)
        assert told["type"] == "error"
        assert named in json.dumps(told["payload"])
        await ask(ws, "SUB", "status")


async def test_an_error_frame_carries_the_id_of_the_wish(gate):
    async with socket(gate) as ws:
        await ws.send_json({"action": "SUB", "topic": "x", "id": 7})
        assert (await frame(ws))["payload"]["id"] == 7


async def test_a_binary_frame_is_answered_and_the_connection_stays(gate):
    async with socket(gate) as ws:
        await ws.send_bytes(b"\x00\x01")
        assert (await frame(ws))["type"] == "error"
        await ask(ws, "SUB", "status")


async def test_a_frame_over_the_limit_ends_the_connection_with_1009(gate):
    async with socket(gate) as ws:
        await ws.send_str("x" * 100_000)
        message = await ws.receive(timeout=5)
        assert message.type in (WSMsgType.CLOSE, WSMsgType.CLOSED)
        assert ws.close_code == 1009


async def test_whatever_text_comes_the_connection_stays(gate):
    @runs(max_examples=100, suppress_health_check=list(HealthCheck))
    @given(
        st.text(max_size=200)
        | st.dictionaries(
            st.sampled_from(["action", "topic", "pluginId", "after", "backfill", "level", "id"]),
            st.sampled_from(["SUB", "UNSUB", "logs", "status", "telemetry", "echo"])
            | st.none() | st.integers() | st.text(max_size=20) | st.floats() | st.lists(st.none()),
        ).map(json.dumps)
    )  # fmt: skip
    def texts(text):
        tried.append(text)

    tried = []
    texts()
    async with socket(gate) as ws:
        for text in tried:
            await ws.send_str(text.encode(errors="replace").decode())
        await ws.send_json({"action": "SUB", "topic": "status", "id": "the end"})
        while (await frame(ws, "ack"))["payload"]["id"] != "the end":
            pass


async def test_a_request_that_is_no_web_socket_is_400(gate):
    await gate.json("/ws/plugins", status=400)


async def test_only_so_many_connections_are_held(gate, monkeypatch):
    monkeypatch.setattr(feeds_module, "LISTENERS_MAX", 1)
    async with socket(gate):
        with pytest.raises(WSServerHandshakeError) as refused:
            await gate.http.ws_connect("/ws/plugins")
    assert refused.value.status == 429
    assert refused.value.headers["Retry-After"]


# --- Who may connect, and the end -----------------------------------------------------------------


async def test_without_a_key_the_socket_is_401(gate):
    with pytest.raises(WSServerHandshakeError) as refused:
        await gate.anonymous.ws_connect("/ws/plugins")
    assert refused.value.status == 401


async def test_the_key_may_travel_as_a_sub_protocol_beside_ours(gate):
    offered = ("bkg.v1", "bkg.key.the-right-key")
    async with gate.anonymous.ws_connect("/ws/plugins", protocols=offered) as ws:
        assert ws.protocol == "bkg.v1"
        assert (await frame(ws))["type"] == "bootstrap"


@pytest.mark.parametrize(
    ("offered", "status"),
    [
        (("bkg.v1", "bkg.key.wrong"), 401),
        (("bkg.v1",), 401),
        (("bkg.key.the-right-key",), 400),
    ],
)
async def test_other_offers_of_sub_protocols_are_refused(gate, offered, status):
    with pytest.raises(WSServerHandshakeError) as refused:
        await gate.anonymous.ws_connect("/ws/plugins", protocols=offered)
    assert refused.value.status == status


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1"])
async def test_a_page_of_another_site_cannot_connect(gate, origin):
    with pytest.raises(WSServerHandshakeError) as refused:
        await gate.http.ws_connect("/ws/plugins", origin=origin)
    assert refused.value.status == 403


async def test_our_own_page_can_connect(gate):
    async with socket(gate, origin=gate.url) as ws:
        await ask(ws, "SUB", "status")


async def test_a_clean_stop_closes_sockets_with_1001(gate):
    async with socket(gate) as ws:
        closing = asyncio.create_task(gate.parts.connections.close())
        message = await ws.receive(timeout=5)
        assert (message.type, message.data) == (WSMsgType.CLOSE, 1001)
        await closing

"""Packs: what one turn brings travels together, and each request keeps a fate of its own."""

import asyncio
import contextlib
import os
import signal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus import packs, serving
from bus.balance import EXPLORE, SILENT_S, Balance
from bus.broker import running_broker
from bus.client import ERROR_CODE, PACKS, Answer, Client, connect
from bus.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NobodyListens,
    NotFound,
    Overloaded,
    TooLarge,
)
from bus.instance import RawCall, join
from bus.packs import PackedReply, PackedRequest
from bus.subjects import MODEL_INFER, instance_packs
from bus.testing import until
from bus.wire import Incoming

# --- The form of a pack ---------------------------------------------------------------------------

_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
_REQUESTS = st.lists(
    st.builds(PackedRequest, _TEXT, st.dictionaries(_TEXT, _TEXT, max_size=4), st.binary()),
    max_size=packs.PACK_MAX,
)


@given(_REQUESTS)
def test_whatever_is_packed_is_read_as_it_was(requests):
    assert packs.read(packs.join([packs.encode(r) for r in requests]), PackedRequest) == requests


@given(st.binary(max_size=200), st.sampled_from([PackedRequest, PackedReply]))
def test_any_bytes_are_read_or_refused(raw, kind):
    for pack in (raw, b"\xdc\x00\x02" + raw):
        with contextlib.suppress(InvalidRequest):
            for part in packs.read(pack, kind):
                assert isinstance(part, kind | InvalidRequest)


def test_a_part_that_cannot_be_read_spoils_no_other():
    good = packs.encode(PackedRequest("a", {}, b""))
    first, second, third = packs.read(packs.join([good, b"\x93\x01\x80\xc0", good]), PackedRequest)
    assert first == third == PackedRequest("a", {}, b"")
    assert isinstance(second, InvalidRequest)


def test_a_pack_over_the_limit_is_refused():
    parts = [packs.encode(PackedRequest("a", {}, b""))] * (packs.PACK_MAX + 1)
    with pytest.raises(InvalidRequest, match="65 parts; 64 are allowed"):
        packs.read(packs.join(parts), PackedRequest)


@given(st.integers(1, 16**12), st.integers(1, packs.PACK_MAX))
def test_a_packs_reply_subject_stands_for_the_inboxes_of_its_requests(first, count):
    found = packs.inboxes_of(packs.pack_inbox("_INBOX_x.a.", first, count))
    assert found == [f"_INBOX_x.a.{number:x}" for number in range(first, first + count)]


@given(st.text(max_size=30))
def test_any_text_stands_for_a_bounded_number_of_inboxes(text):
    assert len(packs.inboxes_of(f"_I.{text}")) <= packs.PACK_MAX


def test_a_pack_and_its_reply_subject_have_to_agree():
    pack = packs.join([packs.encode(PackedRequest("a", {}, b""))])
    with pytest.raises(InvalidRequest, match="stands for 2"):
        packs.unpack(Incoming("s", "_I.1-2", pack, {}), "r")


# --- Who is asked ---------------------------------------------------------------------------------


def knowing_one(packs: bool) -> Balance:
    made = Balance(draw=lambda: 0.999)
    made.ended("s", None, "answered", 0, by="candle.0", took_s=0.01, packs=packs)
    return made


def test_the_only_one_that_is_known_is_named_where_it_takes_packs():
    assert knowing_one(packs=True).choose("s", 0) == "candle.0"
    assert knowing_one(packs=False).choose("s", 0) is None


def test_the_only_one_that_is_known_is_left_to_the_group_once_it_is_silent_or_busy():
    one = knowing_one(packs=True)
    assert one.choose("s", 0) == "candle.0"
    assert one.choose("s", 2 * SILENT_S) is None
    one.ended("s", "candle.0", "answered", 2 * SILENT_S, by="candle.0", packs=True)
    assert one.choose("s", 2 * SILENT_S) == "candle.0"
    one.ended("s", "candle.0", "busy", 2 * SILENT_S, by="candle.0")
    assert one.choose("s", 2 * SILENT_S) is None


def test_an_instance_that_takes_packs_no_longer_is_sent_none():
    one = knowing_one(packs=True)
    one.ended("s", None, "answered", 1, by="candle.0", took_s=0.01, packs=False)
    assert not one.packs("s", "candle.0")
    assert one.choose("s", 1) is None


def test_one_request_in_many_looks_for_others_than_the_only_one_that_is_known():
    one = knowing_one(packs=True)
    one._draw = lambda: 0.9 / EXPLORE
    assert one.choose("s", 0) is None


# --- Over the bus ---------------------------------------------------------------------------------


class Echo:
    """An instance of two models that answers as it is asked to."""

    def __init__(self, client: Client) -> None:
        self.root = client.root
        self.client = client
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.messages: list[str] = []
        self.bodies: list[bytes] = []
        self.stopped: list[bytes] = []

    async def handle(self, call: RawCall) -> Answer:
        self.bodies.append(call.body)
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.stopped.append(call.body)
            raise
        if call.body == b"missing":
            raise NotFound("there is no such thing")
        if call.body == b"large":
            return Answer(b"x" * 100_000, {})
        return Answer(call.body, {"X-Said": call.headers.get("X-Said", "")})

    async def ask(self, *bodies: bytes, model: str = "m", **options) -> list[Answer]:
        subject = MODEL_INFER.subject(self.root, model)
        asked = (self.client.relay(subject, b, **{"timeout_s": 60, **options}) for b in bodies)
        return await asyncio.gather(*asked, return_exceptions=True)

    async def known(self) -> None:
        """Have the caller know that packs are taken for both models."""
        for model in ("m", "n"):
            subject = MODEL_INFER.subject(self.root, model)
            while not self.client._asker.balance.packs(subject, "candle.0"):
                await self.ask(b"hello", model=model)
        self.messages.clear()
        self.bodies.clear()

    def packed(self) -> int:
        return sum(subject.endswith(".pack") for subject in self.messages)


@contextlib.asynccontextmanager
async def echoing(client, asked, settings, monkeypatch):
    """Serve at `client`, ask at `asked`, and note the subjects of what is sent."""
    made = Echo(asked)
    # One request in 256 goes by the group; here none does.
    monkeypatch.setattr(asked._asker.balance, "_draw", lambda: 0.999)
    send = asked._wire.send

    def noting(subject, reply, body, headers):
        sent = send(subject, reply, body, headers)
        made.messages.extend([subject] * sent)
        return sent

    monkeypatch.setattr(asked._wire, "send", noting)
    async with (
        join(client, settings, plugin="candle", description="a test") as made.candle,
        made.candle.serving_raw(MODEL_INFER, made.handle, "m"),
        contextlib.AsyncExitStack() as leaving,
    ):
        await leaving.enter_async_context(made.candle.serving_raw(MODEL_INFER, made.handle, "n"))
        made.leave_n = leaving.aclose
        await made.known()
        yield made


@pytest.fixture
async def echo(client, connected, settings, monkeypatch):
    async with echoing(client, await connected(), settings, monkeypatch) as made:
        yield made


async def test_requests_of_one_turn_are_one_message_whatever_model_they_are_for(echo):
    answers = await asyncio.gather(echo.ask(b"a", b"b"), echo.ask(b"c", model="n"))
    assert [a.body for one in answers for a in one] == [b"a", b"b", b"c"]
    assert echo.messages == [instance_packs(echo.root, "candle", 0)]


async def test_headers_pass_both_ways_and_tell_who_answered(echo):
    said = await echo.ask(b"a", b"b", headers={"X-Said": "ä b"})
    assert echo.packed() == 1
    for answer in said:
        assert answer.headers["X-Said"] == "ä b"
        assert answer.headers["Bkg-Instance"] == echo.candle.id
        assert answer.headers[PACKS] == "1"


async def test_one_request_in_a_turn_goes_alone_and_by_the_group(echo):
    await echo.ask(b"a")
    assert echo.messages == [MODEL_INFER.subject(echo.root, "m")]


async def test_a_long_body_goes_alone_both_ways(echo):
    long = b"x" * (packs.ALONE_BYTES + 1)
    answers = await echo.ask(b"a", long, b"large", b"b")
    assert [len(a.body) for a in answers] == [1, len(long), 100_000, 1]
    assert len(echo.messages) == 2


async def test_packs_are_bounded_by_count_and_by_bytes(echo):
    many = [b"%d" % i for i in range(3 * packs.PACK_MAX)]
    assert [a.body for a in await echo.ask(*many)] == many
    assert echo.packed() == 3
    echo.messages.clear()
    heavy = [b"x" * 3_500] * 40
    assert [a.body for a in await echo.ask(*heavy)] == heavy
    assert echo.packed() == 3


async def test_an_error_is_its_own_requests_alone(echo):
    one, missing, two = await echo.ask(b"a", b"missing", b"b")
    assert echo.packed() == 1
    assert (one.body, two.body) == (b"a", b"b")
    assert isinstance(missing, NotFound)
    assert echo.candle._asked.served[MODEL_INFER.subject(echo.root, "m")].stats["num_errors"] == 1


async def test_a_model_that_has_left_is_missed_by_its_own_requests_alone(echo):
    await echo.leave_n()
    answers = await asyncio.gather(echo.ask(b"a", b"b"), echo.ask(b"c", model="n"))
    assert [a.body for a in answers[0]] == [b"a", b"b"]
    assert isinstance(answers[1][0], NobodyListens)


async def test_a_request_of_a_pack_is_cancelled_alone(echo):
    echo.go_on.clear()
    subject = MODEL_INFER.subject(echo.root, "m")
    asked = [
        asyncio.create_task(echo.client.relay(subject, b, timeout_s=600)) for b in (b"a", b"b")
    ]
    await until(lambda: echo.candle.in_flight == 2)
    assert echo.packed() == 1
    asked[0].cancel()
    await until(lambda: echo.stopped == [b"a"])
    echo.go_on.set()
    assert (await asked[1]).body == b"b"
    assert not echo.candle._asked._by_inbox


async def test_what_is_cancelled_before_it_is_sent_is_not_sent(echo):
    subject = MODEL_INFER.subject(echo.root, "m")
    asked = [asyncio.create_task(echo.client.relay(subject, b)) for b in (b"a", b"b", b"c")]
    # Each has run once when this goes on; what they brought has not been sent yet.
    await asyncio.sleep(0)
    asked[1].cancel()
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert [a.body for a in (answers[0], answers[2])] == [b"a", b"c"]
    assert isinstance(answers[1], asyncio.CancelledError)
    assert echo.bodies == [b"a", b"c"]


async def test_each_has_a_deadline_of_its_own(echo):
    echo.go_on.clear()
    short, long = (
        asyncio.create_task(echo.ask(b, timeout_s=s)) for b, s in ((b"a", 0.3), (b"b", 60))
    )
    assert isinstance((await short)[0], DeadlineExceeded)
    assert echo.packed() == 1
    await until(lambda: echo.stopped == [b"a"])
    echo.go_on.set()
    assert (await long)[0].body == b"b"
    assert not echo.client._replies._waiting


async def test_of_a_pack_as_many_are_taken_as_there_is_room_for(echo, monkeypatch):
    monkeypatch.setattr(serving, "MAX_IN_FLIGHT", 3)
    echo.go_on.clear()
    asked = asyncio.create_task(echo.ask(*[b"%d" % i for i in range(5)]))
    await until(lambda: len(echo.bodies) == 3)
    await until(lambda: not echo.candle._asked._posting)
    echo.go_on.set()
    answers = await asked
    # Who was refused asks once more, by the group.
    assert [a.body for a in answers[:3]] == [b"0", b"1", b"2"]
    assert all(isinstance(a, Answer | Overloaded) for a in answers[3:])


async def test_an_instance_that_is_gone_costs_no_request(client, connected, settings, monkeypatch):
    asked = await connected()
    async with echoing(client, asked, settings, monkeypatch) as made:
        pass
    other = msgspec.structs.replace(settings, slot=1)
    async with (
        join(client, other, plugin="candle", description="a test") as candle,
        candle.serving_raw(MODEL_INFER, made.handle, "m"),
    ):
        assert asked._asker.balance.known(MODEL_INFER.subject(made.root, "m")) == {"candle.0"}
        assert [a.body for a in await made.ask(b"a", b"b", b"c")] == [b"a", b"b", b"c"]
        assert made.packed() == 1
    assert not asked._replies._waiting


async def test_a_pack_that_cannot_be_read_is_refused_and_its_parts_by_themselves(echo):
    subject = instance_packs(echo.root, "candle", 0)
    inbox, reply = echo.client._replies.expect(60)
    pack_inbox = f"{inbox}-1"
    echo.client._wire.send(subject, pack_inbox, b"\xff", {})
    refused = await reply
    assert refused.headers[ERROR_CODE] == "400"
    good = packs.encode(PackedRequest("candle.model.infer.m", {}, b"a"))
    first = echo.client._replies.reserve(2)
    waits = [asyncio.get_running_loop().create_future() for _ in range(2)]
    for number, wait in enumerate(waits, first):
        echo.client._replies.await_at(echo.client._replies.inbox(number), wait, 1e12)
    pack = packs.pack_inbox(echo.client._replies.prefix, first, 2)
    echo.client._wire.send(subject, pack, packs.join([good, b"\x01"]), {})
    answered, refused = await asyncio.gather(*waits)
    assert answered.data == b"a"
    assert refused.headers[ERROR_CODE] == "400"


async def test_without_the_short_way_nobody_sends_or_takes_packs(
    broker, root, settings, monkeypatch
):
    monkeypatch.setattr("bus.wire._is_as_known", lambda _nc: False)
    async with connect(broker.url, name="test", root=root) as client:
        await client.store.declare()
        made = Echo(client)
        async with (
            join(client, settings, plugin="candle", description="a test") as candle,
            candle.serving_raw(MODEL_INFER, made.handle, "m"),
        ):
            for _ in range(2):
                answers = await made.ask(b"a", b"b")
                assert [a.body for a in answers] == [b"a", b"b"]
                assert PACKS not in answers[0].headers
        await client.store.delete_everything()


async def test_a_pack_in_flight_while_the_broker_restarts_is_answered(
    tmp_path, settings, monkeypatch
):
    async with contextlib.AsyncExitStack() as first:
        broker = await first.enter_async_context(running_broker(tmp_path, sync_interval="2m"))
        async with connect(broker.url, name="test", root="r") as client:
            await client.store.declare()
            async with echoing(client, client, settings, monkeypatch) as made:
                made.go_on.clear()
                asked = asyncio.create_task(made.ask(b"a", b"b", timeout_s=120))
                await until(lambda: made.candle.in_flight == 2)
                assert made.packed() == 1
                os.kill(broker.pid, signal.SIGKILL)
                await until(lambda: not client.connected)
                await first.aclose()
                made.go_on.set()
                async with running_broker(tmp_path, sync_interval="2m"):
                    await until(lambda: client.connected, timeout_s=60)
                    assert [a.body for a in await asked] == [b"a", b"b"]
                    assert [a.body for a in await made.ask(b"c", b"d")] == [b"c", b"d"]


async def test_messages_of_others_are_answered_as_ever(echo):
    """Of `nats req`, for one: it knows nothing of packs."""
    subject = MODEL_INFER.subject(echo.root, "m")
    reply = await echo.client._nc.request(subject, b"a", timeout=60)
    assert reply.data == b"a"


async def test_what_cannot_be_sent_as_a_pack_goes_the_public_way(echo, monkeypatch):
    monkeypatch.setattr(echo.client._wire, "send", lambda *_: False)
    assert [a.body for a in await echo.ask(b"a", b"b")] == [b"a", b"b"]


async def test_headers_of_more_than_a_line_cannot_be_packed(echo):
    answers = await echo.ask(b"a", b"b", headers={"X-Said": "a\r\nX-More: b"})
    assert echo.packed() == 0
    for answer in answers:
        assert "\n" not in answer.headers["X-Said"]


async def test_a_broker_that_takes_less_than_a_pack_gets_the_answers_by_themselves(client):
    sent: list[tuple[str, bytes]] = []

    def post(subject: str, body: bytes, _headers: object) -> None:
        if len(body) > 300:
            raise TooLarge("more than this broker takes")
        sent.append((subject, body))

    answering = packs.Answering(client._wire, {}, post)
    for number in (1, 2):
        answering.answer(f"_I.{number}", "_I.1-2", b"x" * 200, {})
    await until(lambda: len(sent) == 2)
    told = [packs.read(body, PackedReply)[0].to for _, body in sent]
    assert told == ["1", "2"]

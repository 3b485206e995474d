"""The short way of inference: nobody can tell it from the long one, but by its cost."""

import asyncio
import json
import socket
import time
import zlib
from contextlib import asynccontextmanager
from functools import partial

import pytest
import pytest_asyncio

from bus.client import Answer, trace
from bus.errors import InvalidRequest
from bus.instance import join
from bus.subjects import MODEL_INFER
from bus.testing import until
from services.gateway import app, express
from services.gateway.app import Options, gateway
from services.gateway.inference import RELAYING_MAX, RELAYING_MAX_BYTES
from services.gateway.pages import Pages
from services.gateway.routes import kserve
from services.gateway.written import whole
from tests.gateway.conftest import KEY

BODY = json.dumps({"inputs": []}).encode()


class Model:
    """An instance that answers for the model `m` as it is asked to."""

    def __init__(self) -> None:
        self.calls = []
        self.stopped = 0
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def infer(self, call):
        self.calls.append(call)
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.stopped += 1
            raise
        if call.body == b"bad":
            raise InvalidRequest("inputs lack everything", field="inputs")
        if call.body == b"large":
            return Answer(b"7" * 5_000, {"Content-Type": "application/json"})
        if call.body == b"huge":
            return Answer(b"7" * 60_000, {"Content-Type": "application/json"})
        return Answer(call.body, {"Content-Type": "application/json", "Bkg-Model-Version": "1"})


@pytest_asyncio.fixture
async def model(client, settings):
    one = Model()
    async with (
        join(client, settings, plugin="candle", description="a test") as instance,
        instance.serving_raw(MODEL_INFER, one.infer, "m"),
    ):
        yield one


@pytest.fixture
def long_way(monkeypatch):
    """The requests that reach aiohttp's handler, and those among them with the outcome in hand."""
    reached = []
    relayed = kserve._relayed

    async def noting(request, at, subject):
        reached.append(request.get(express.OUTCOME))
        return await relayed(request, at, subject)

    monkeypatch.setattr(kserve, "_relayed", noting)
    return reached


@pytest.fixture
def doors(monkeypatch):
    """The gateway's ends of all connections, in the order in which they were made."""
    made = []
    connection_made = express.Express.connection_made

    def noting(self, transport):
        made.append(self)
        connection_made(self, transport)

    monkeypatch.setattr(express.Express, "connection_made", noting)
    return made


class Connection:
    """A client that says exactly what it is told to."""

    def __init__(self, reader, writer) -> None:
        self.reader = reader
        self.writer = writer

    async def ask(self, body=BODY, **fields):
        self.send(body, **fields)
        return await self.answer()

    def send(self, body=BODY, **fields):
        self.writer.write(request(body, **fields))

    async def answer(self):
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().splitlines()
        fields = dict(line.split(": ", 1) for line in head[1:] if line)
        size = int(fields.get("Content-Length", 0))
        return int(head[0].split()[1]), fields, await self.reader.readexactly(size)


def request(body=BODY, path="/v2/models/m/infer", method="POST", key=KEY, **fields):
    given = {
        "Host": "localhost",
        "Authorization": f"Bearer {key}",
        "Content-Length": str(len(body)),
        **{name.replace("_", "-"): value for name, value in fields.items()},
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in given.items())
    return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode() + body


@asynccontextmanager
async def connecting(gate, **how):
    reader, writer = await asyncio.open_connection("127.0.0.1", gate.parts.port, **how)
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()


@pytest_asyncio.fixture
async def connection(gate):
    """A connection that aiohttp is ready for: it has answered once."""
    async with connecting(gate) as one:
        assert (await one.ask(b"", path="/livez", method="GET"))[0] == 200
        yield one


async def received(gate):
    """Return when the gateway has read what was sent before on other connections."""
    async with gate.http.get("/livez") as response:
        assert response.status == 200


async def test_a_plain_request_does_not_reach_aiohttp(gate, model, connection, long_way):
    for number in range(3):
        body = b"%d" % number
        status, fields, said = await connection.ask(body)
        assert (status, said, fields["Bkg-Model-Version"]) == (200, body, "1")
    assert not long_way
    assert gate.parts.instance.gauges["http_requests"] == 4
    assert (gate.parts.relaying, gate.parts.relaying_bytes) == (0, 0)


async def test_both_ways_answer_with_the_same_fields(model, connection, long_way):
    _, short, _ = await connection.ask()
    _, long, _ = await connection.ask(X_Timeout_Seconds="9")
    assert len(long_way) == 1
    different = {"Date", "X-Request-Id"}
    assert {k: v for k, v in short.items() if k not in different} == {
        k: v for k, v in long.items() if k not in different
    }
    assert short.keys() == long.keys()


async def test_trace_and_id_are_passed_on_where_they_are_sound(model, connection):
    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    _, fields, _ = await connection.ask(Traceparent=trace, X_Request_Id="mine")
    assert model.calls[-1].headers["traceparent"] == trace
    assert fields["X-Request-Id"] == "mine"
    _, fields, _ = await connection.ask(Traceparent="nonsense", X_Request_Id="a b")
    assert model.calls[-1].headers["traceparent"] != "nonsense"
    assert fields["X-Request-Id"] != "a b"


async def test_an_error_is_the_same_problem_on_both_ways(model, connection, long_way):
    status, fields, said = await connection.ask(b"bad")
    assert (status, fields["Content-Type"]) == (400, "application/problem+json")
    assert json.loads(said)["error"] == "inputs lack everything"
    assert isinstance(long_way[0], InvalidRequest)
    assert len(model.calls) == 1
    assert (await connection.ask())[0] == 200


async def test_a_request_is_counted_once_whichever_way_it_goes(gate, model, connection):
    counts = gate.parts.instance.gauges
    before = counts["http_requests"]
    for body in (BODY, b"bad", b"large"):
        await connection.ask(body)
        await connection.ask(body, X_Timeout_Seconds="9")
    assert counts["http_requests"] == before + 6
    model.go_on.clear()
    async with connecting(gate) as one:
        one.send()
        await until(lambda: len(model.calls) == 7)
    await until(lambda: model.stopped == 1)
    assert counts["http_requests"] == before + 7


async def test_an_error_is_worked_on_in_the_trace_that_the_model_was_asked_with(
    model, connection, monkeypatch
):
    traces = []
    relayed = kserve._relayed

    async def noting(request, at, subject):
        traces.append(trace.get())
        return await relayed(request, at, subject)

    monkeypatch.setattr(kserve, "_relayed", noting)
    await connection.ask(b"bad")
    assert traces == [model.calls[-1].headers["traceparent"]]


async def test_an_empty_length_of_the_json_part_is_none_on_both_ways(model, connection):
    await connection.ask(Inference_Header_Content_Length="")
    await connection.ask(Inference_Header_Content_Length="", X_Timeout_Seconds="9")
    assert [express.LENGTH in call.headers for call in model.calls] == [False, False]


async def test_a_model_that_is_not_there_is_404(connection):
    status, _, said = await connection.ask(path="/v2/models/nobody/infer")
    assert status == 404
    assert "nobody" in json.loads(said)["error"]


async def test_a_wrong_key_is_refused_and_the_model_not_asked(model, connection):
    assert (await connection.ask(key="wrong"))[0] == 401
    assert (await connection.ask(Authorization="Basic eDp5"))[0] == 401
    assert not model.calls


async def test_an_answer_that_the_client_takes_compressed_is_compressed(model, connection):
    _, fields, said = await connection.ask(b"large", Accept_Encoding="deflate")
    assert fields["Content-Encoding"] == "deflate"
    assert zlib.decompress(said) == b"7" * 5_000
    _, fields, said = await connection.ask(b"large")
    assert ("Content-Encoding" in fields, len(said)) == (False, 5_000)
    assert len(model.calls) == 2


def test_an_answer_with_a_field_of_more_than_a_line_is_not_written_in_one_piece():
    assert whole(b"x", {"A": "b"}, "1").endswith(b"\r\n\r\nx")
    assert whole(b"x", {"A": "b\r\nC: d"}, "1") is None
    assert whole(b"x", {"A": "b\nC: d"}, "1") is None


async def test_a_body_that_comes_in_pieces_is_put_together(gate, model, connection, long_way):
    whole = request(b"0123456789" * 1_000)
    for piece in (whole[:-7_000], whole[-7_000:-1], whole[-1:]):
        connection.writer.write(piece)
        await received(gate)
    assert (await connection.answer())[2] == b"0123456789" * 1_000
    assert not long_way


async def test_a_body_that_stops_coming_is_given_to_aiohttp(
    gate, model, connection, long_way, monkeypatch
):
    monkeypatch.setattr(express, "PATIENCE_S", 0.05)
    whole = request()
    connection.writer.write(whole[:-1])
    await until(lambda: long_way)
    connection.writer.write(whole[-1:])
    assert (await connection.answer())[2] == BODY
    assert len(long_way) == 1
    await received(gate)
    assert (await connection.ask())[0] == 200
    assert len(long_way) == 1


async def test_a_body_that_comes_byte_by_byte_is_put_together_in_linear_time(
    gate, model, connection, doors
):
    async with connecting(gate) as one:
        assert (await one.ask())[0] == 200
        body = b"0123456789" * 4_000
        one.writer.write(request(body)[: -len(body)])
        await until(lambda: doors[-1]._to_gather)
        began = time.process_time()
        for at in range(len(body)):
            doors[-1].data_received(body[at : at + 1])
        # Each byte again and again would be some ten seconds.
        assert time.process_time() - began < 1
        assert (await one.answer())[2] == body


async def test_a_body_that_would_be_too_much_once_it_is_there_is_refused(gate, model, connection):
    whole = request()
    connection.writer.write(whole[:-1])
    await received(gate)
    gate.parts.relaying_bytes += RELAYING_MAX_BYTES
    connection.writer.write(whole[-1:])
    assert (await connection.answer())[0] == 429
    gate.parts.relaying_bytes -= RELAYING_MAX_BYTES
    assert (await connection.ask())[0] == 200


async def test_requests_that_come_together_are_answered_in_their_order(model, connection):
    asked = [request(b"%d" % i) for i in range(20)]
    asked.insert(10, request(b"", path="/livez", method="GET"))
    connection.writer.write(b"".join(asked))
    said = [await connection.answer() for _ in asked]
    assert [body for _, _, body in said[:10]] == [b"%d" % i for i in range(10)]
    assert [body for _, _, body in said[11:]] == [b"%d" % i for i in range(10, 20)]
    assert {status for status, _, _ in said} == {200}


async def test_who_sends_on_and_on_is_made_to_wait(model, connection, gate):
    model.go_on.clear()
    connection.send()
    await until(lambda: model.calls)
    many = request(b"x" * 1_000)
    for _ in range(200):
        connection.writer.write(many)
    model.go_on.set()
    assert [(await connection.answer())[0] for _ in range(201)] == [200] * 201


async def test_what_a_client_has_waiting_is_bounded_while_it_is_answered(
    gate, model, doors, monkeypatch
):
    waited = []
    take_later = express.Express._take_later

    def noting(self, more):
        take_later(self, more)
        waited.append(len(self._later))

    monkeypatch.setattr(express.Express, "_take_later", noting)
    many = 2_200
    async with connecting(gate) as one:
        one.writer.write(request(b"x" * 1_000) * many)
        for _ in range(many):
            assert (await one.answer())[0] == 200
    # The event loop reads 256 KiB at once.
    assert express.LATER_MAX_BYTES < max(waited) <= express.LATER_MAX_BYTES + 256 * 1024


@pytest.mark.parametrize("fields", [{}, {"X_Timeout_Seconds": "60"}], ids=["short", "long"])
async def test_what_is_written_to_who_does_not_read_is_bounded(gate, model, doors, fields):
    plug = socket.socket()
    plug.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    plug.setblocking(False)
    await asyncio.get_running_loop().sock_connect(plug, ("127.0.0.1", gate.parts.port))
    plug.send(request(b"huge", **fields) * 300)
    await until(lambda: doors and doors[0].writing_paused)
    async with connecting(gate) as another:
        for _ in range(100):
            assert (await another.ask())[0] == 200
    # One answer, and what may wait before the transport says that it is too much.
    assert doors[0].transport.get_write_buffer_size() < 256 * 1024
    reader, writer = await asyncio.open_connection(sock=plug)
    slow = Connection(reader, writer)
    assert [len((await slow.answer())[2]) for _ in range(300)] == [60_000] * 300
    writer.close()


async def test_a_head_in_two_pieces_is_never_taken_for_two_requests(gate, model, connection):
    hidden = request(b"", method="POST")
    outer = b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX-More: "
    connection.writer.write(outer)
    await received(gate)
    connection.writer.write(hidden)
    # It is one request, with two fields that say where it goes to.
    assert (await connection.answer())[0] == 400
    await received(gate)
    assert not model.calls


async def test_a_caller_that_goes_away_is_worked_for_no_longer(gate, model):
    model.go_on.clear()
    async with connecting(gate) as one:
        assert (await one.ask(b"", path="/livez", method="GET"))[0] == 200
        one.send()
        await until(lambda: model.calls)
    await until(lambda: model.stopped == 1)
    assert (gate.parts.relaying, gate.parts.relaying_bytes) == (0, 0)


async def test_a_caller_that_asks_for_the_end_of_the_connection_gets_it(model, connection):
    status, fields, _ = await connection.ask(Connection="close")
    assert (status, fields["Connection"]) == (200, "close")
    assert await connection.reader.read() == b""


async def refused(port):
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except (ConnectionRefusedError, ConnectionResetError):
        return True
    writer.close()
    return False


@asynccontextmanager
async def stopping(client, settings, pages):
    """A connection to a gateway of its own that has answered once; and what begins a clean stop."""
    async with join(client, settings, plugin="gateway", description="a test", listed=False) as here:
        running = gateway(client, here, Options(port=0), KEY, Pages(pages))
        parts = await running.__aenter__()
        reader, writer = await asyncio.open_connection("127.0.0.1", parts.port)
        one = Connection(reader, writer)
        assert (await one.ask(b"", path="/livez", method="GET"))[0] == 200

        async def stop():
            ended = asyncio.create_task(running.__aexit__(None, None, None))
            await until(partial(refused, parts.port))
            assert not ended.done()
            return ended

        yield one, parts, stop
        assert await reader.read() == b""
        writer.close()


async def test_a_clean_stop_answers_what_is_in_flight(client, settings, model, pages):
    model.go_on.clear()
    async with stopping(client, settings, pages) as (one, _, stop):
        one.send()
        await until(lambda: model.calls)
        ended = await stop()
        model.go_on.set()
        assert (await one.answer())[2] == BODY
        await ended


@pytest.mark.parametrize("full", [False, True], ids=["taken", "refused"])
async def test_a_clean_stop_answers_a_request_whose_body_comes_meanwhile(
    client, settings, model, pages, doors, full
):
    async with stopping(client, settings, pages) as (one, parts, stop):
        one.writer.write(request()[:-1])
        await until(lambda: doors[0]._to_gather)
        ended = await stop()
        parts.relaying += RELAYING_MAX * full
        one.writer.write(request()[-1:])
        assert (await one.answer())[0] == (429 if full else 200)
        parts.relaying -= RELAYING_MAX * full
        async with asyncio.timeout(app.STOP_PATIENCE_S / 2):
            await ended


@pytest.mark.parametrize("cut", [0, 1], ids=["no answer", "no body"])
async def test_a_clean_stop_waits_once_for_what_does_not_come(
    client, settings, model, pages, doors, monkeypatch, cut
):
    monkeypatch.setattr(app, "STOP_PATIENCE_S", 2.0)
    model.go_on.clear()
    async with stopping(client, settings, pages) as (one, _, stop):
        whole = request()
        one.writer.write(whole[: len(whole) - cut])
        await until(lambda: model.calls or doors[0]._to_gather)
        began = time.monotonic()
        await (await stop())
        assert 1.9 < time.monotonic() - began < 3.6


async def test_a_clean_stop_waits_no_longer_for_who_has_gone(client, settings, model, pages, doors):
    async with stopping(client, settings, pages) as (one, _, stop):
        one.writer.write(request()[:-1])
        await until(lambda: doors[0]._to_gather)
        ended = await stop()
        one.writer.write_eof()
        one.writer.transport.abort()
        async with asyncio.timeout(app.STOP_PATIENCE_S / 2):
            await ended

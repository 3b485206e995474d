"""The short way of inference: nobody can tell it from the long one, but by its cost."""

import asyncio
import json
import zlib
from contextlib import asynccontextmanager
from functools import partial

import pytest
import pytest_asyncio

from bus.client import Answer
from bus.errors import InvalidRequest
from bus.instance import join
from bus.subjects import MODEL_INFER
from bus.testing import until
from services.gateway import express
from services.gateway.app import Options, gateway
from services.gateway.pages import Pages
from services.gateway.routes import kserve
from services.gateway.translate import whole
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
async def connecting(gate):
    reader, writer = await asyncio.open_connection("127.0.0.1", gate.parts.port)
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
    monkeypatch.setattr(express, "BODY_PATIENCE_S", 0.05)
    whole = request()
    connection.writer.write(whole[:-1])
    await until(lambda: long_way)
    connection.writer.write(whole[-1:])
    assert (await connection.answer())[2] == BODY
    assert len(long_way) == 1
    await received(gate)
    assert (await connection.ask())[0] == 200
    assert len(long_way) == 1


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


async def test_a_clean_stop_answers_what_is_in_flight(client, settings, model, pages):
    model.go_on.clear()
    async with join(client, settings, plugin="gateway", description="a test", listed=False) as here:
        running = gateway(client, here, Options(port=0), KEY, Pages(pages))
        parts = await running.__aenter__()
        reader, writer = await asyncio.open_connection("127.0.0.1", parts.port)
        one = Connection(reader, writer)
        assert (await one.ask(b"", path="/livez", method="GET"))[0] == 200
        one.send()
        await until(lambda: model.calls)
        stopping = asyncio.create_task(running.__aexit__(None, None, None))
        await until(partial(refused, parts.port))
        assert not stopping.done()
        model.go_on.set()
        assert (await one.answer())[2] == BODY
        await stopping
        assert await reader.read() == b""
        writer.close()

"""How long a caller may take to send a body, and what it hears before it sends one."""

import asyncio
import io
from contextlib import asynccontextmanager

import pytest

from bus.errors import InvalidRequest
from bus.testing import until
from services.gateway import patience
from services.gateway.app import Options
from services.gateway.patience import Patience, TooSlow
from services.gateway.routes import faces as routes
from tests.gateway.test_large_bodies import INFER, nothing_left

DETECT, ECHO = "/api/faces/detect", "/api/capabilities/echo.say"
MIB = 1024**2


class Sender:
    """A caller that sends what it is told to.

    Attributes:
        writer: Where to.
    """

    def __init__(self, reader, writer) -> None:
        self._reader = reader
        self.writer = writer

    async def send(self, data):
        self.writer.write(data)
        await self.writer.drain()

    async def trickle(self, data, pause_s):
        """Send a byte at a time, until that is of no use any more."""
        try:
            for at in range(len(data)):
                await self.send(data[at : at + 1])
                await asyncio.sleep(pause_s)
        except OSError:
            pass

    async def answer(self):
        """Return what is answered: its first lines, and the whole head with the body."""
        async with asyncio.timeout(20):
            head = await self._reader.readuntil(b"\r\n\r\n")
            body = b"" if b" 100 " in head else await self._reader.readuntil(b"}")
            return head.decode(), body.decode()


@asynccontextmanager
async def sending(gate, path, length, *more: str):
    """Be a caller that has sent its head while inside."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gate.parts.port)
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: 127.0.0.1",
        f"Authorization: {gate.http.headers['Authorization']}",
        f"Content-Length: {length}",
        *more,
    ]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    try:
        yield Sender(reader, writer)
    finally:
        writer.transport.abort()


MULTIPART = "Content-Type: multipart/form-data; boundary=x"
PART = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'


# --- How long it may take -------------------------------------------------------------------------


async def test_slow_forms_give_up_their_places_for_others(faces, photo, monkeypatch):
    monkeypatch.setattr(patience, "PATIENCE_S", 3.0)
    monkeypatch.setattr(routes, "RELAYING_MAX", 2)
    slow = (sending(faces, DETECT, 1_000_000, MULTIPART) for _ in range(2))
    async with next(slow) as one, next(slow) as two, asyncio.TaskGroup() as tasks:
        for sender in (one, two):
            await sender.send(PART)
            tasks.create_task(sender.trickle(bytes(1_000), 0.1))
        await until(lambda: faces.parts.relaying == 2)
        async with faces.http.post(DETECT, data=io.BytesIO(photo("astronaut"))) as response:
            assert response.status == 429
        for sender in (one, two):
            head, body = await sender.answer()
            assert " 408 " in head
            assert "connection: close" in head.lower()
            assert "urn:bkg:problem:request-timeout" in body
            assert "too slowly: " in body
            assert "BKG_BODY_MIN_BYTES_PER_S" in body
            # It hears no end of it otherwise.
            sender.writer.transport.abort()
        async with faces.http.post(DETECT, data=io.BytesIO(photo("astronaut"))) as response:
            assert response.status == 200
    await nothing_left(faces)


@pytest.mark.parametrize("path", [DETECT, ECHO, INFER])
async def test_a_body_that_comes_no_slower_than_it_may_takes_as_long_as_it_needs(
    start, path, monkeypatch
):
    monkeypatch.setattr(patience, "PATIENCE_S", 1.2)
    gate = await start(body_min_bytes_per_s=1_000)

    async def blocks():
        for _ in range(26):
            yield bytes(200)
            await asyncio.sleep(0.1)

    began = asyncio.get_running_loop().time()
    async with gate.http.post(path, data=blocks()) as response:
        # Nobody is there who could answer.
        assert response.status in {400, 404, 503}, await response.text()
    assert asyncio.get_running_loop().time() - began > 2 * patience.PATIENCE_S


@pytest.mark.parametrize("path", [DETECT, ECHO, INFER])
async def test_a_body_that_stops_coming_is_given_up_however_much_of_it_came(
    gate, path, monkeypatch
):
    monkeypatch.setattr(patience, "PATIENCE_S", 0.5)
    async with sending(gate, path, 30 * MIB) as sender:
        await sender.send(bytes(20 * MIB))
        # At the least rate that would have been minutes.
        head, body = await sender.answer()
    assert " 408 " in head
    assert "nothing more of the body came for " in body
    assert f"after {20 * MIB:,} bytes" in body
    await nothing_left(gate)


async def test_a_configuration_that_stops_coming_is_given_up(gate, monkeypatch):
    monkeypatch.setattr(patience, "PATIENCE_S", 0.3)
    async with sending(gate, "/auth/session", 20) as sender:
        await sender.send(b"{")
        assert " 408 " in (await sender.answer())[0]


class Content:
    """A body that comes as a test has it."""

    total_bytes = 0

    async def come(self, size, after_s):
        await asyncio.sleep(after_s)
        self.total_bytes += size


async def test_a_body_comes_within_the_time_there_is_for_all_of_it():
    content = Content()
    one = Patience(content, 5.0, 1_000, all_s=0.3)

    async def all_of_it():
        while True:
            await one.wait(content.come(1_000, 0.05))

    with pytest.raises(TooSlow, match=r"did not come within 0\.3 s, but [0-9],000 bytes of it"):
        await all_of_it()
    assert content.total_bytes < 8_000


async def test_without_a_least_rate_any_byte_gives_back_all_patience():
    content = Content()
    one = Patience(content, 1.0)
    for _ in range(4):
        await one.wait(content.come(1, 0.4))
    with pytest.raises(TooSlow, match="nothing more of the body came for 1.* s, after 4 bytes"):
        await one.wait(content.come(1, 10.0))


async def test_what_is_done_with_a_body_takes_no_patience():
    content = Content()
    one = Patience(content, 0.5, 1_000)
    for _ in range(3):
        await one.wait(content.come(1, 0.0))
        await asyncio.sleep(0.4)


def test_the_least_rate_is_said_by_the_environment():
    assert Options.from_env({}).body_min_bytes_per_s == 16 * 1024
    assert Options.from_env({"BKG_BODY_MIN_BYTES_PER_S": "0"}).body_min_bytes_per_s == 0
    with pytest.raises(InvalidRequest, match="BKG_BODY_MIN_BYTES_PER_S is '1k'"):
        Options.from_env({"BKG_BODY_MIN_BYTES_PER_S": "1k"})


# --- What is heard before -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "more"),
    [
        (INFER, ()),
        (ECHO, ()),
        ("/api/capabilities/candle.model.run", ()),
        (DETECT, ()),
        (DETECT, (MULTIPART,)),
        ("/auth/session", ()),
    ],
)
async def test_who_asks_before_sending_hears_of_too_long_a_body_and_else_that_it_may(
    gate, path, more
):
    waits = (*more, "Expect: 100-continue")
    async with sending(gate, path, 200_000_000, *waits) as sender:
        head, body = await sender.answer()
        assert " 413 " in head
        assert "200,000,000 bytes" in body
    async with sending(gate, path, 1_000, *waits) as sender:
        head, _ = await sender.answer()
        assert head.startswith("HTTP/1.1 100 Continue\r\n")
        await sender.send(bytes(1_000))
        head, _ = await sender.answer()
        assert " 100 " not in head


async def test_who_asks_before_sending_to_nowhere_hears_that(gate):
    async with sending(gate, "/nowhere", 1_000, "Expect: 100-continue") as sender:
        assert " 404 " in (await sender.answer())[0]


@pytest.mark.parametrize(("path", "length"), [("/nowhere", 1_000), (INFER, 200_000_000)])
async def test_who_is_refused_before_sending_hears_that_the_connection_ends(gate, path, length):
    """Else its next request would be taken for the body that it has not sent."""
    async with sending(gate, path, length, "Expect: 100-continue") as sender:
        assert "connection: close" in (await sender.answer())[0].lower()


async def test_who_sends_at_once_what_it_asks_for_can_go_on(gate):
    async with sending(gate, "/nowhere", 3, "Expect: 100-continue", "", "abc") as sender:
        assert "connection: close" not in (await sender.answer())[0].lower()


async def test_what_else_is_expected_cannot_be_met(gate):
    async with sending(gate, INFER, 1_000, "Expect: a miracle") as sender:
        assert " 417 " in (await sender._reader.readline()).decode()


async def test_bodies_that_stop_coming_leave_others_their_part_of_the_store_and_that_soon(
    gate, monkeypatch
):
    monkeypatch.setattr(patience, "PATIENCE_S", 4.0)
    bodies = gate.parts.client.bodies
    bodies.share_bytes = 50 * MIB
    async with sending(gate, INFER, 20 * MIB) as one, sending(gate, INFER, 20 * MIB) as two:
        for sender in (one, two):
            await sender.send(bytes(10 * MIB))
        await until(lambda: sum(bodies._ours.values()) == 40 * MIB)
        # As long as it would be, however little of it came; and before it comes.
        async with sending(gate, INFER, 20 * MIB, "Expect: 100-continue") as third:
            head, body = await third.answer()
            assert " 503 " in head
            assert "Retry-After: 1\r\n" in head
            assert f"{50 * MIB:,} are allowed together" in body
            assert "BKG_BODIES_SHARE_BYTES" in body
        # What fits into a message needs none of it.
        async with gate.http.post(INFER, data=b"{}") as response:
            assert response.status == 404
        for sender in (one, two):
            assert " 408 " in (await sender.answer())[0]
    await nothing_left(gate)
    await until(lambda: not bodies._ours)


async def test_a_photo_has_no_more_of_the_store_than_other_bodies(faces):
    faces.parts.client.bodies.share_bytes = 10 * MIB
    async with faces.http.post(DETECT, data=io.BytesIO(b"\xff\xd8" + bytes(11 * MIB))) as response:
        told = await response.json(content_type=None)
        assert (response.status, response.headers["Retry-After"]) == (503, "1"), told
        assert "BKG_BODIES_SHARE_BYTES" in told["detail"]
    await nothing_left(faces)

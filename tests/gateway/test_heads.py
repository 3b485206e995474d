"""Heads of requests: what is taken for plain is what aiohttp finds; what is doubtful is not."""

import asyncio

import pytest
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import HttpRequestParser
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.heads import read_head

ASK = "POST /v2/models/m/infer HTTP/1.1"
HOST = "Host: localhost"


def head(*lines: str) -> bytes:
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode()


@pytest.mark.parametrize(
    ("path", "model", "version"),
    [
        ("/v2/models/m/infer", "m", None),
        ("/v2/models/a.b-c_d/infer", "a.b-c_d", None),
        ("/v2/models/m/versions/2/infer", "m", "2"),
        ("/v2/models/infer/infer", "infer", None),
    ],
)
def test_plain_inference_is_recognised(path, model, version):
    read = read_head(head(f"POST {path} HTTP/1.1", HOST, "content-length: 12"))
    assert (read.infer.model, read.infer.version, read.body_size) == (model, version, 12)


def test_what_a_client_says_is_handed_on():
    read = read_head(
        head(
            ASK, "HOST:x:1 ", "Authorization: Bearer a b", "X-Request-Id: 7", "Traceparent: t",
            "Inference-Header-Content-Length: 9", "Accept-Encoding: gzip", "Content-Length: 0",
        )
    )  # fmt: skip
    infer = read.infer
    assert (infer.host, infer.authorization) == ("x:1", "Bearer a b")
    assert (infer.request_id, infer.traceparent, infer.tensors_at) == ("7", "t", "9")
    assert infer.compressible


@pytest.mark.parametrize(
    "lines",
    [
        (ASK.replace("1.1", "1.0"), HOST),
        (ASK, HOST, "Transfer-Encoding: chunked"),
        (ASK, HOST, "Content-Length: 1", "Content-Length: 1"),
        (ASK, HOST, "Content-Length: +1"),
        (ASK, HOST, "Content-Length: 0x1"),
        (ASK, HOST, "Content-Length: 1, 1"),
        (ASK, HOST, "Content-Length : 1"),
        (ASK, HOST, "Expect: 100-continue"),
        (ASK, HOST, "Connection: close"),
        (ASK, HOST, "Upgrade: websocket"),
        (ASK, HOST, "X: a\nContent-Length: 1"),
        (ASK, HOST, "X: a\r\n b"),
        (ASK, HOST, " X: a"),
        (ASK, HOST, "X: ä"),
        (ASK, HOST, "no field"),
        ("CONNECT /v2/models/m/infer HTTP/1.1", HOST),
        ("POST  /v2/models/m/infer HTTP/1.1", HOST),
        ("POST http://localhost/v2/models/m/infer HTTP/1.1", HOST),
    ],
)
def test_what_could_be_read_in_two_ways_is_not_read(lines):
    assert read_head(head(*lines)) is None


@pytest.mark.parametrize(
    "lines",
    [
        ("GET /v2/models/m/infer HTTP/1.1", HOST),
        ("POST /v2/models/../infer HTTP/1.1", HOST),
        ("POST /v2/models/m%2E/infer HTTP/1.1", HOST),
        ("POST /v2/models/m/infer?timeout=1 HTTP/1.1", HOST),
        ("POST /v2/models/m/versions/../infer HTTP/1.1", HOST),
        (ASK,),
        (ASK, HOST, "Content-Encoding: gzip"),
        (ASK, HOST, "Cookie: a=b"),
        (ASK, HOST, "Origin: http://localhost"),
        (ASK, HOST, "X-Timeout-Seconds: 1"),
    ],
)
def test_what_its_head_does_not_decide_is_no_plain_inference(lines):
    read = read_head(head(*lines, "Content-Length: 3"))
    assert (read.infer, read.body_size) == (None, 3)


def test_half_a_head_is_none():
    whole = head(ASK, HOST)
    assert all(read_head(whole[:at]) is None for at in range(len(whole)))


def test_a_head_without_an_end_is_none():
    assert read_head(head(ASK, HOST, "X: " + "y" * 10_000)) is None


@pytest.mark.parametrize("fields", [127, 128, 129])
def test_no_more_fields_are_read_than_aiohttp_takes(fields):
    raw = head(ASK, HOST, *[f"X-{i}: y" for i in range(fields - 1)])
    loop = asyncio.new_event_loop()
    try:
        HttpRequestParser(BaseProtocol(loop), loop, 2**16, max_headers=128).feed_data(raw)
        taken = True
    except HttpProcessingError:
        taken = False
    finally:
        loop.close()
    assert (read_head(raw) is not None) == taken == (fields <= 128)


_PIECES = st.sampled_from(
    ["POST ", "GET ", "/v2/models/m/infer", "/v2", " HTTP/1.1", " HTTP/1.0", "\r\n", "\n", "\r",
     "Host: x", "Content-Length: 3", "content-length: 03", "Content-Length:", "-1", " ", "\t", ":",
     "Transfer-Encoding: chunked", "Connection: keep-alive", "Connection: close", "a: b", "\0",
     "Expect: 100-continue", "Upgrade: x"]
)  # fmt: skip
_LINES = st.lists(
    st.sampled_from(
        ["Host: x", "Content-Length: 3", "content-length: 3", "Content-Length:4", "X:\t y ", "Y: ",
         "Connection: keep-alive", "connection: Keep-Alive", "Accept: a, b", "Cookie: c", "Z: :"]
    ),
    max_size=5,
)  # fmt: skip


@given(
    st.lists(_PIECES, max_size=12).map("".join)
    | st.builds(lambda m, lines: "\r\n".join([m, *lines, "", ""]), st.sampled_from(
        [ASK, "GET /v2 HTTP/1.1", "DELETE /x HTTP/1.1", "OPTIONS / HTTP/1.1"]), _LINES)
)  # fmt: skip
def test_whatever_is_read_aiohttp_reads_alike(text):
    raw = text.encode()
    read = read_head(raw)
    if read is None:
        return
    loop = asyncio.new_event_loop()
    try:
        parser = HttpRequestParser(BaseProtocol(loop), loop, 2**16)
        # The next request is recognised where this one ends by our count, and nowhere else.
        try:
            messages, upgraded, _ = parser.feed_data(
                raw[: read.size] + b"x" * read.body_size + head("PUT /next HTTP/1.1", "Host: n")
            )
        except HttpProcessingError:
            # It answers 400 and hangs up: nothing that follows is read by anybody.
            assert read.infer is None
            return
    finally:
        loop.close()
    assert not upgraded
    assert [m.path for m, _ in messages] == [messages[0][0].path, "/next"]
    if read.infer:
        assert (messages[0][0].method, messages[0][0].path) == ("POST", "/v2/models/m/infer")

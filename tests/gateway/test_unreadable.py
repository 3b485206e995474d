"""Requests that do not even become requests are refused in words, as all others are."""

import asyncio
import json

import pytest
from aiohttp import http_parser

from services.gateway import translate
from tests.gateway.conftest import KEY

HEAD = f"HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"


async def answer_to(gate, raw):
    """Send bytes; return status, headers and problem of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gate.parts.port)
    writer.write(raw)
    async with asyncio.timeout(10):
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
        fields = dict(line.split(": ", 1) for line in lines[1:] if line)
        body = await reader.readexactly(int(fields.get("Content-Length", 0)))
    writer.transport.abort()
    return int(lines[0].split()[1]), fields, json.loads(body) if body else None


@pytest.mark.parametrize(
    "raw",
    [
        b"NONSENSE\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nHost: x\r\nContent-Length: z\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Encoding: lzma\r\nContent-Length: 1\r\n\r\na",
    ],
)
async def test_what_cannot_be_read_is_refused_as_a_problem(gate, raw):
    _, fields, _ = await answer_to(gate, raw)
    assert fields["Content-Type"].startswith("application/problem+json")
    assert fields["X-Content-Type-Options"] == "nosniff"


async def test_clients_of_the_inference_protocol_hear_what_cannot_be_read(gate):
    raw = f"POST /v2/models/m/infer {HEAD}Content-Length: z\r\n\r\n".encode()
    status, _, problem = await answer_to(gate, raw)
    assert status == 400
    assert problem["detail"].startswith("the request cannot be read: ")
    assert problem["error"] == problem["detail"]


@pytest.mark.parametrize(
    ("path", "method"),
    [("/v2/models/m/infer", "POST"), ("/api/models", "GET"), ("/nowhere", "GET"),
     ("/api/models/m/versions/1", "PUT")],
)  # fmt: skip
async def test_an_expectation_that_is_not_known_is_a_problem_that_names_the_known(
    gate, path, method
):
    raw = f"{method} {path} {HEAD}Content-Length: 0\r\nExpect: a-miracle\r\n\r\n".encode()
    status, fields, problem = await answer_to(gate, raw)
    assert status == 417
    assert fields["Content-Type"].startswith("application/problem+json")
    assert problem["detail"] == "Expect is 'a-miracle'; what can be expected is 100-continue"
    assert ("error" in problem) == path.startswith("/v2")


async def test_http_1_0_knows_no_expectations(gate):
    raw = b"GET /livez HTTP/1.0\r\nExpect: a-miracle\r\n\r\n"
    assert (await answer_to(gate, raw))[0] == 200


@pytest.mark.parametrize(("encoding", "library"), [("zstd", "HAS_ZSTD"), ("br", "HAS_BROTLI")])
async def test_an_encoding_that_cannot_be_undone_here_is_refused_with_those_that_can(
    gate, monkeypatch, encoding, library
):
    monkeypatch.setattr(http_parser, library, False)
    monkeypatch.setattr(translate, "ENCODINGS", ("gzip", "deflate"))
    raw = (
        f"POST /v2/models/m/infer {HEAD}Content-Encoding: {encoding}\r\nContent-Length: 1\r\n\r\na"
    )
    status, _, problem = await answer_to(gate, raw.encode())
    assert status == 400
    assert (
        problem["error"]
        == problem["detail"]
        == (f"Content-Encoding is '{encoding}'; gzip and deflate are taken, one of them")
    )
    assert problem["field"] == "Content-Encoding"

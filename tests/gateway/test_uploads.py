"""Uploads of models: raw bodies and forms, digests, what is refused, the same request again."""

import asyncio
import io

import pytest
from aiohttp import FormData
from hypothesis import given
from hypothesis import strategies as st

from bus.errors import InvalidRequest
from bus.testing import until
from services.gateway.app import Options
from services.gateway.upload_headers import told_by
from tests.gateway.uploading import (
    LINEAR,
    MIB,
    PLACE,
    blob,
    offset_of,
    put,
    rfc9530,
    sha256,
    stored,
)

# --- Whole ----------------------------------------------------------------------------------------


async def test_a_file_becomes_a_version_with_its_report(into, client, keeper):
    told, headers = await put(into, LINEAR)
    assert headers["Location"] == PLACE
    assert (told["id"], told["version"], told["created"]) == ("iris", "1", True)
    assert (told["sound"], told["problems"]) == (True, [])
    assert told["checksum"] == told["report"]["checksum"] == sha256(LINEAR)
    assert await stored(client, LINEAR)
    assert (await into.json(PLACE))["source"]["kind"] == "upload"


async def test_the_same_bytes_again_are_there_once_and_answered_with_200(into, client):
    await put(into, LINEAR)
    told, _ = await put(into, LINEAR, 200)
    assert told["created"] is False
    assert await client.store.artefacts.unfinished() == []


async def test_other_bytes_under_the_same_version_are_refused(into):
    await put(into, LINEAR)
    told, _ = await put(into, LINEAR + b" ", 409)
    assert "next free number" in told["detail"]


async def test_a_large_file_comes_through_whole(into, client):
    body = blob(20 * MIB)
    told, _ = await put(into, body)
    assert told["report"]["size_bytes"] == len(body)
    read = b"".join([block async for block in client.store.artefacts.read(sha256(body))])
    assert read == body


async def test_a_body_without_a_length_is_taken(into, client):
    async def blocks():
        for _ in range(50):
            yield b"{" + bytes(99_999)

    await put(into, blocks())
    assert await stored(client, (b"{" + bytes(99_999)) * 50)


@pytest.mark.parametrize(
    ("query", "headers", "body", "name"),
    [
        ("", {}, b"  {}", "model.json"),
        ("", {}, b"\x08\x08", "model.onnx"),
        ("", {"Content-Type": "application/json"}, b"\x08", "model.json"),
        ("?file=best.onnx", {}, b"{}", "best.onnx"),
        ("?file=..%2Fup%2Fbest.JSON", {}, b"x", "best.JSON"),
        ("?file=best", {}, b"{}", "best.json"),
        ("", {"Content-Disposition": 'attachment; filename="a b.onnx"'}, b"{", "a b.onnx"),
        ("", {"Content-Disposition": "attachment; filename*=UTF-8''%C3%A4.json"}, b"x", "ä.json"),
        ("", {"Content-Disposition": "nonsense"}, b"x", "model.onnx"),
    ],
)
async def test_a_file_is_called_as_its_sender_says_or_as_it_begins(
    into, keeper, query, headers, body, name
):
    await put(into, body, path=PLACE + query, **headers)
    assert keeper.asked[0].file_name == keeper.asked[0].source.file_name == name


async def test_what_people_read_about_a_model_comes_with_the_query(into, keeper):
    query = "?description=Flowers&label=team=a&label=x=y&licence=MIT"
    await put(into, LINEAR, path=PLACE + query)
    asked = keeper.asked[0]
    assert (asked.description, asked.labels, asked.licence) == (
        "Flowers",
        {"team": "a", "x": "y"},
        "MIT",
    )


async def test_a_file_that_is_not_sound_is_kept_and_said_to_be_so(into, keeper):
    keeper.problem = "node 3: no such operator"
    told, _ = await put(into, LINEAR)
    assert told["sound"] is False
    assert told["problems"] == [{"where": "", "what": "node 3: no such operator"}]


async def test_load_true_loads_a_sound_version_right_after(into, keeper):
    told, _ = await put(into, LINEAR, path=f"{PLACE}?load=true")
    assert told["loaded"]["version"] == "1"
    assert [(one.id, one.version) for one in keeper.loaded] == [("iris", "1")]


async def test_load_true_of_what_is_not_sound_is_422_and_the_version_stays(into, keeper):
    keeper.problem = "node 3: no such operator"
    told, headers = await put(into, LINEAR, 422, path=f"{PLACE}?load=true")
    assert "node 3: no such operator" in told["detail"]
    assert headers["Location"] == PLACE
    assert not keeper.loaded
    assert (await into.json(PLACE))["sound"] is False


# --- Digests --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Content-Digest", "Repr-Digest", "X-Checksum-Sha256"])
async def test_bytes_with_another_digest_than_said_leave_nothing_behind(into, client, name):
    right = sha256(LINEAR).upper() if name.startswith("X") else rfc9530(LINEAR)
    wrong = sha256(b"") if name.startswith("X") else f"md5=:AA==:, {rfc9530(b'')}"
    told, _ = await put(into, LINEAR, 422, **{name: wrong})
    assert "SHA-256" in told["detail"]
    assert not await stored(client, LINEAR)
    assert await offset_of(into) is None
    assert await client.store.artefacts.unfinished() == []
    await put(into, LINEAR, **{name: right})


@pytest.mark.parametrize(
    ("headers", "field"),
    [
        ({"X-Checksum-Sha256": "abc"}, "X-Checksum-Sha256"),
        ({"Content-Digest": "sha-256=:AAAA:"}, "Content-Digest"),
        ({"Upload-Offset": "-1"}, "Upload-Offset"),
        ({"Upload-Length": "many"}, "Upload-Length"),
        ({"Upload-Length": "3"}, "Upload-Length"),
        ({"Upload-Complete": "yes"}, "Upload-Complete"),
        ({"Content-Encoding": "gzip"}, "Content-Encoding"),
        ({"Content-Digest": rfc9530(b"a"), "Repr-Digest": rfc9530(b"b")}, "Content-Digest"),
        ({"X-Checksum-Sha256": sha256(b"a"), "Repr-Digest": rfc9530(b"b")}, "X-Checksum-Sha256"),
    ],
)
def test_a_header_that_cannot_be_is_named(headers, field):
    with pytest.raises(InvalidRequest) as refused:
        told_by(headers, 10)
    assert refused.value.field == field


@given(
    st.dictionaries(
        st.sampled_from(
            ["Upload-Offset", "Upload-Length", "Upload-Complete", "X-Checksum-Sha256",
             "Content-Digest", "Repr-Digest"]
        ),
        st.text(max_size=80) | st.integers(0, 2**70).map(str) | st.sampled_from(["?0", "?1"]),
    ),
    st.none() | st.integers(0, 2**40),
)  # fmt: skip
def test_headers_are_understood_or_refused_by_name(headers, length):
    try:
        told = told_by(headers, length)
    except InvalidRequest as refused:
        assert refused.field in headers  # noqa: PT017 - it may also not be raised
        return
    assert told.offset >= 0
    if told.total_bytes is not None and length is not None:
        assert told.total_bytes >= told.offset + length


# --- Refused before the bytes ---------------------------------------------------------------------


async def test_a_compressed_file_is_refused_by_the_header_that_says_so(into):
    told, _ = await put(into, LINEAR, 400, Content_Encoding="gzip")
    assert told["field"] == "Content-Encoding"


async def head_of_answer(gate, *lines: str):
    """Send the head of an upload, and return the first line of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gate.parts.port)
    key = f"Authorization: {gate.http.headers['Authorization']}"
    writer.write("\r\n".join([*lines, "Host: 127.0.0.1", key, "", ""]).encode())
    async with asyncio.timeout(10):
        said = await reader.readline()
    writer.transport.abort()
    return said.decode()


async def test_too_large_a_file_is_refused_before_it_is_sent(start, keeper):
    gate = await start(upload_max_bytes=1_000)
    await until(gate.parts.models.instances)
    head = f"PUT {PLACE} HTTP/1.1", "Content-Length: 1001"
    assert "413" in await head_of_answer(gate, *head)
    assert "413" in await head_of_answer(gate, *head, "Expect: 100-continue")
    fits = f"PUT {PLACE} HTTP/1.1", "Content-Length: 1000", "Expect: 100-continue"
    assert "100 Continue" in await head_of_answer(gate, *fits)


def test_the_limit_is_said_by_the_environment():
    assert Options.from_env({"BKG_UPLOAD_MAX_BYTES": "5"}).upload_max_bytes == 5
    with pytest.raises(InvalidRequest, match="BKG_UPLOAD_MAX_BYTES"):
        Options.from_env({"BKG_UPLOAD_MAX_BYTES": "2 GiB"})


async def test_too_large_a_file_without_a_length_is_refused_where_it_becomes_so(
    start, keeper, client
):
    gate = await start(upload_max_bytes=300_000)
    await until(gate.parts.models.instances)

    async def blocks():
        for _ in range(10):
            yield bytes(100_000)

    told, _ = await put(gate, blocks(), 413)
    assert "BKG_UPLOAD_MAX_BYTES" in told["detail"]
    assert await client.store.artefacts.unfinished() == []
    assert await offset_of(gate) is None


async def test_what_the_store_has_no_room_for_is_507_before_it_is_sent(start, keeper):
    gate = await start(upload_max_bytes=2**45)
    await until(gate.parts.models.instances)
    head = f"PUT {PLACE} HTTP/1.1", f"Content-Length: {2**44}", "Expect: 100-continue"
    assert "507" in await head_of_answer(gate, *head)


async def test_what_never_fits_into_the_store_is_507_with_the_numbers_and_no_other_time(
    into, client, monkeypatch
):
    monkeypatch.setenv("BKG_ARTEFACTS_MAX_BYTES", str(2 * MIB))
    await client.store.declare()
    told, headers = await put(into, bytes(3 * MIB), 507)
    assert f"{3 * MIB:,} bytes" in told["detail"]
    assert "BKG_ARTEFACTS_MAX_BYTES" in told["detail"]
    assert "Retry-After" not in headers


async def test_what_does_not_fit_now_is_507_with_the_time_of_another_try(into, client, monkeypatch):
    monkeypatch.setenv("BKG_ARTEFACTS_MAX_BYTES", str(2 * MIB))
    await client.store.declare()
    async with client.store.artefacts.writing() as other:
        await other.write(bytes(MIB))
        await other.keep()
        told, headers = await put(into, bytes(3 * MIB // 2), 507)
    assert "bytes are free" in told["detail"]
    assert int(headers["Retry-After"]) >= 1


async def test_bytes_that_are_stored_already_need_no_room(into, client, monkeypatch):
    monkeypatch.setenv("BKG_ARTEFACTS_MAX_BYTES", str(2 * MIB))
    await client.store.declare()
    body = blob(3 * MIB // 2)
    await put(into, body)
    other = "/api/models/other/versions"
    told, _ = await put(into, body, path=f"{other}/1", Repr_Digest=rfc9530(body))
    assert told["checksum"] == sha256(body)
    said = {"X-Checksum-Sha256": sha256(body)}
    async with into.http.post(other, data=io.BytesIO(body), headers=said) as again:
        assert (again.status, (await again.json())["checksum"]) == (201, sha256(body))
    assert await client.store.artefacts.unfinished() == []


async def test_other_bytes_than_those_that_are_stored_are_refused_all_the_same(into, client):
    await put(into, LINEAR)
    path = "/api/models/other/versions/1"
    told, _ = await put(into, LINEAR + b" ", 422, path=path, Repr_Digest=rfc9530(LINEAR))
    assert told["field"] == "sha256"
    await into.json(path, 404)


async def test_a_store_that_fills_up_on_the_way_is_507_with_the_numbers(into, client, monkeypatch):
    monkeypatch.setenv("BKG_ARTEFACTS_MAX_BYTES", str(2 * MIB))
    await client.store.declare()

    async def blocks():
        for _ in range(80):
            yield bytes(100_000)

    told, _ = await put(into, blocks(), 507)
    assert told["type"] == "urn:bkg:problem:no-space"
    assert "bytes are stored" in told["detail"]
    assert "BKG_ARTEFACTS_MAX_BYTES" in told["detail"]
    assert await client.store.artefacts.unfinished() == []
    assert await offset_of(into) is None


async def test_without_candle_nothing_is_taken(gate, client):
    told, headers = await put(gate, LINEAR, 503)
    assert "candle" in told["detail"]
    assert "Retry-After" in headers
    assert not await stored(client, LINEAR)


async def test_uploading_needs_the_key_before_the_file_is_sent(into):
    reader, writer = await asyncio.open_connection("127.0.0.1", into.parts.port)
    head = f"PUT {PLACE} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n"
    writer.write(head.encode())
    async with asyncio.timeout(10):
        assert b"401" in await reader.readline()
    writer.transport.abort()


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/api/models/iris/versions/latest", "version"),
        ("/api/models/iris/versions/a%20b", "version"),
        ("/api/models/-iris/versions/1", "id"),
        (f"{PLACE}?label=x", "label"),
    ],
)
async def test_a_name_that_cannot_be_is_refused(into, path, field):
    told, _ = await put(into, LINEAR, 400, path=path)
    assert told["field"] == field


async def test_an_empty_body_is_refused(into):
    await put(into, b"", 400)


# --- Retries --------------------------------------------------------------------------------------


async def test_the_same_key_and_request_have_the_same_answer(into, keeper):
    body = blob(MIB)
    first, headers = await put(into, body, Idempotency_Key="k")
    again, headers_again = await put(into, body, 201, Idempotency_Key="k")
    assert again == first
    assert headers_again["Location"] == headers["Location"]
    assert len(keeper.asked) == 1


async def test_the_same_key_for_another_request_is_refused(into):
    await put(into, LINEAR, Idempotency_Key="k")
    told, _ = await put(into, LINEAR + b" ", 422, Idempotency_Key="k")
    assert "Idempotency-Key" in told["detail"]
    other = "/api/models/iris/versions/2"
    await put(into, LINEAR, 422, path=other, Idempotency_Key="k")


async def test_a_request_that_failed_is_done_again_under_its_key(into, client):
    await put(into, LINEAR, 422, Idempotency_Key="k", Content_Digest=rfc9530(b""))
    await put(into, LINEAR, Idempotency_Key="k")


async def test_a_key_that_is_none_is_refused(into):
    await put(into, LINEAR, 400, Idempotency_Key="")


# --- Forms ----------------------------------------------------------------------------------------


async def post(gate, body, status=201, path="/api/models/iris/versions", **headers):
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with gate.http.post(path, data=body, headers=named) as response:
        told = await response.json(content_type=None)
        assert response.status == status, told
        return told


def form(*fields: tuple[str, str], file=LINEAR, name="best.json"):
    made = FormData(default_to_multipart=True)
    if file is not None:
        made.add_field("file", file, filename=name)
    for field, value in fields:
        made.add_field(field, value)
    return made


async def test_a_form_brings_a_file_and_what_is_known_of_it_in_any_order(into, keeper):
    fields = [
        ("version", "3"),
        ("description", "Flowers"),
        ("labels", '{"a": "b"}'),
        ("label", "c=d"),
        ("licence", "MIT"),
        ("sha256", sha256(LINEAR)),
    ]
    told = await post(into, form(*fields))
    assert told["version"] == "3"
    asked = keeper.asked[0]
    assert (asked.file_name, asked.description, asked.licence) == ("best.json", "Flowers", "MIT")
    assert asked.labels == {"a": "b", "c": "d"}


async def test_a_raw_body_becomes_the_next_version(into):
    assert (await post(into, LINEAR))["version"] == "1"
    assert (await post(into, blob(1_000)))["version"] == "2"


async def test_a_retried_form_has_the_same_answer(into, keeper):
    first = await post(into, form(), Idempotency_Key="k")
    assert await post(into, form(), Idempotency_Key="k") == first
    assert len(keeper.asked) == 1
    await post(into, form(file=b"{}"), 422, Idempotency_Key="k")


@pytest.mark.parametrize(
    ("made", "status", "said"),
    [
        (lambda: form(("x", "y"), file=None), 400, "'x'"),
        (lambda: form(("version", "1"), file=None), 400, "no file"),
        (lambda: form(("labels", "[1]")), 400, "labels"),
        (lambda: form(("sha256", "12")), 400, "sha256"),
        (lambda: form(("version", "latest")), 400, "version"),
        (lambda: form(("sha256", sha256(b""))), 422, "SHA-256"),
        (lambda: form(("description", "x" * 70_000)), 413, "description"),
        (lambda: form(("description", "x" * 5_000)), 400, "description"),
    ],
)
async def test_a_form_that_cannot_be_is_refused_and_leaves_nothing(
    into, client, keeper, made, status, said
):
    told = await post(into, made(), status)
    assert said in told["detail"]
    assert keeper.asked == []
    assert not await stored(client, LINEAR)


async def test_a_form_that_breaks_off_leaves_nothing(into, client, keeper):
    head = b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n'
    _, writer = await asyncio.open_connection("127.0.0.1", into.parts.port)
    key = into.http.headers["Authorization"]
    writer.write(
        f"POST /api/models/iris/versions HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 9999999\r\n\r\n".encode()
    )
    writer.write(head + blob(MIB))

    async def some():
        return [one for one in await client.store.artefacts.unfinished() if one.bytes > MIB // 2]

    await until(some)
    writer.transport.abort()
    await until(lambda: not into.parts.uploads._count)
    assert await client.store.artefacts.unfinished() == []
    assert keeper.asked == []


async def test_two_files_in_a_form_are_refused(into):
    made = form()
    made.add_field("other", b"x", filename="b.json")
    told = await post(into, made, 400)
    assert "two files" in told["detail"]


async def test_a_body_that_is_no_form_though_it_says_so_is_refused(into):
    kind = "multipart/form-data; boundary=x"
    told = await post(into, b"nonsense", 400, Content_Type=kind)
    assert "form" in told["detail"]


async def test_only_a_named_version_can_be_resumed(into):
    await post(into, LINEAR, 400, Upload_Offset="5")

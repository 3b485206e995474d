"""Uploads that break off or come in parts: kept, resumed where they ended, dropped in time."""

import asyncio

from bus.messages import UnfinishedUpload, now
from bus.testing import until
from services.gateway import patience
from services.gateway import uploads as uploads_module
from tests.gateway.uploading import (
    LINEAR,
    MIB,
    PLACE,
    UPLOAD,
    blob,
    break_off,
    is_here,
    offset_of,
    put,
    rfc9530,
    sha256,
    stored,
)


async def test_what_broke_off_goes_on_where_it_ended(into, client):
    body = blob(3 * MIB)
    await break_off(into, body, 2 * MIB)
    assert not await stored(client, body)
    async with into.http.head(UPLOAD) as response:
        here = int(response.headers["Upload-Offset"])
        assert response.headers["Upload-Complete"] == "?0"
        assert response.headers["Upload-Length"] == str(len(body))
    assert here == 2 * MIB
    told, _ = await put(into, body[here:], Upload_Offset=str(here), Repr_Digest=rfc9530(body))
    assert told["checksum"] == sha256(body)
    assert await offset_of(into) is None
    assert await client.store.artefacts.unfinished() == []


async def test_a_broken_upload_shows_nothing(into, client, keeper):
    await break_off(into, blob(MIB), MIB // 2)
    assert keeper.asked == []
    assert (await into.json("/api/models"))["total"] == 0
    await into.json(PLACE, 404)


async def test_it_can_break_off_more_than_once(into):
    body = blob(3 * MIB)
    await break_off(into, body, MIB)
    await break_off(into, body[MIB:], MIB, **{"Upload-Offset": str(MIB)})
    assert await offset_of(into) == 2 * MIB
    told, _ = await put(into, body[2 * MIB :], Upload_Offset=str(2 * MIB))
    assert told["checksum"] == sha256(body)


async def test_another_gateway_goes_on_with_what_broke_off(into, start):
    body = blob(2 * MIB)
    await break_off(into, body, MIB)
    other = await start()
    await until(other.parts.models.instances)
    assert await offset_of(other) == MIB
    told, _ = await put(other, body[MIB:], Upload_Offset=str(MIB))
    assert told["checksum"] == sha256(body)


async def test_what_a_gateway_left_when_it_was_killed_goes_on(into, client):
    body = blob(2 * MIB)
    async with client.store.artefacts.writing() as upload:
        await upload.write(body[:MIB])
        await upload.keep()
    left = UnfinishedUpload(
        id="iris", version="1", upload=upload.id, file_name="model.onnx", begun_at=now()
    )
    await client.store.uploads.put(left, "iris", "1")
    assert await offset_of(into) == MIB
    told, _ = await put(into, body[MIB:], Upload_Offset=str(MIB))
    assert told["checksum"] == sha256(body)


async def test_a_wrong_offset_is_409_with_the_right_one(into):
    body = blob(2 * MIB)
    await break_off(into, body, MIB)
    told, headers = await put(into, body[10:], 409, Upload_Offset="10")
    assert headers["Upload-Offset"] == str(MIB) == str(told["upload_offset"])
    assert await offset_of(into) == MIB


async def test_a_rest_that_makes_another_length_than_was_said_is_refused(into):
    body = blob(2 * MIB)
    await break_off(into, body, MIB)
    told, _ = await put(into, b"the end", 400, Upload_Offset=str(MIB))
    assert told["field"] == "Upload-Length"
    assert await offset_of(into) == MIB
    await put(into, body[MIB:], Upload_Offset=str(MIB))


async def test_there_is_nothing_to_go_on_with_where_nothing_broke_off(into):
    told, _ = await put(into, b"rest", 404, Upload_Offset="10")
    assert "begin anew" in told["detail"]
    assert await offset_of(into) is None


async def test_without_an_offset_an_upload_begins_anew(into, client):
    body = blob(2 * MIB)
    await break_off(into, body, MIB)
    told, _ = await put(into, LINEAR)
    assert told["checksum"] == sha256(LINEAR)
    assert await client.store.artefacts.unfinished() == []


async def test_a_file_comes_in_as_many_parts_as_its_sender_likes(into):
    parts = [blob(700_000, seed) for seed in range(3)]
    here = 0
    for part in parts[:2]:
        _, headers = await put(
            into,
            part,
            204,
            Upload_Offset=str(here),
            Upload_Complete="?0",
            Upload_Length="2100000",
            Content_Digest=rfc9530(part),
        )
        here += len(part)
        assert (headers["Upload-Offset"], headers["Upload-Complete"]) == (str(here), "?0")
    told, _ = await put(into, parts[2], Upload_Offset=str(here), Upload_Complete="?1")
    assert told["checksum"] == sha256(b"".join(parts))


async def test_a_damaged_part_ends_the_upload(into, client):
    await put(into, blob(1_000), 204, Upload_Complete="?0")
    await put(
        into, b"part", 422, Upload_Offset="1000", Upload_Complete="?0",
        Content_Digest=rfc9530(b"other"),
    )  # fmt: skip
    assert await offset_of(into) is None
    assert await client.store.artefacts.unfinished() == []


async def test_an_upload_that_is_shorter_than_it_said_waits_for_the_rest(into):
    async def blocks():
        yield b"12345"

    told, _ = await put(into, blocks(), 400, Upload_Length="10")
    assert "Upload-Offset: 5" in told["detail"]
    told, _ = await put(into, b"67890", Upload_Offset="5")
    assert told["checksum"] == sha256(b"1234567890")


async def test_an_upload_that_is_longer_than_it_said_is_refused(into, client):
    async def blocks():
        yield b"12345678901"

    await put(into, blocks(), 400, Upload_Length="10")
    assert await client.store.artefacts.unfinished() == []


async def test_what_broke_off_is_dropped_when_asked(into, client):
    await break_off(into, blob(MIB), MIB // 2)
    async with into.http.delete(UPLOAD) as response:
        assert response.status == 204
    assert await offset_of(into) is None
    assert await client.store.artefacts.unfinished() == []
    async with into.http.delete(UPLOAD) as response:
        assert response.status == 404


async def test_what_broke_off_is_dropped_after_its_time(into, client):
    await break_off(into, blob(MIB), MIB // 2)
    await into.parts.uploads.sweep()
    assert await offset_of(into) == MIB // 2
    into.parts.uploads.keep_s = 0.0
    await into.parts.uploads.sweep()
    assert await offset_of(into) is None
    assert await client.store.artefacts.unfinished() == []


async def test_a_sender_that_falls_silent_is_told_so_and_may_go_on_later(into, monkeypatch):
    monkeypatch.setattr(patience, "STALL_S", 0.5)

    async def blocks():
        yield blob(1_000)
        await asyncio.sleep(30)

    told, _ = await put(into, blocks(), 408)
    assert "nothing more of the file came" in told["detail"]
    assert await offset_of(into) == 1_000


async def test_one_version_is_uploaded_by_one_caller_at_a_time(into):
    go_on = asyncio.Event()

    async def blocks():
        yield blob(1_000)
        await go_on.wait()
        yield b"end"

    first = asyncio.create_task(put(into, blocks()))
    await until(lambda: is_here(into, 1_000))
    told, _ = await put(into, LINEAR, 409)
    assert "being uploaded" in told["detail"]
    async with into.http.delete(UPLOAD) as response:
        assert response.status == 409
    other = "/api/models/iris/versions/2"
    await put(into, LINEAR, path=other)
    go_on.set()
    told, _ = await first
    assert told["checksum"] == sha256(blob(1_000) + b"end")


async def test_more_uploads_than_there_is_room_for_are_refused(into, monkeypatch):
    monkeypatch.setattr(uploads_module, "UPLOADS_MAX", 0)
    _, headers = await put(into, LINEAR, 429)
    assert "Retry-After" in headers

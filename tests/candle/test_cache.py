"""The artefacts on this host's disk: fetched once, sound, bounded, never taken from a user."""

import asyncio
import hashlib
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest

from bus.errors import NoSpace, Unprocessable
from bus.testing import until
from services.candle.repository import cache as room
from services.candle.repository.cache import Cache


class Source:
    """Artefacts to fetch, and how often each was."""

    def __init__(self) -> None:
        self.fetched: list[str] = []

    def of(self, content: bytes) -> tuple[str, int]:
        return hashlib.sha256(content).hexdigest(), len(content)

    def holding(self, cache: Cache, content: bytes):
        digest, size = self.of(content)

        async def fetch(path: Path) -> None:
            self.fetched.append(digest)
            await asyncio.to_thread(path.write_bytes, content)

        return cache.holding(digest, ".bin", size, fetch)


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def cache(tmp_path) -> Cache:
    made = Cache(tmp_path / "artefacts", 1_000)
    made.open()
    return made


async def test_an_artefact_is_fetched_once(cache, source):
    for _ in range(3):
        async with source.holding(cache, b"model") as path:
            assert path.read_bytes() == b"model"
    assert len(source.fetched) == 1


async def test_what_was_spoilt_on_the_disk_is_fetched_again(cache, source):
    async with source.holding(cache, b"model") as path:
        pass
    path.write_bytes(b"mOdel")
    async with source.holding(cache, b"model") as path:
        assert path.read_bytes() == b"model"
    assert len(source.fetched) == 2


async def test_beyond_the_limit_the_least_recently_used_leaves(cache, source, tmp_path):
    for moment, content in enumerate((b"a" * 400, b"b" * 400)):
        async with source.holding(cache, content) as path:
            pass
        os.utime(path, (moment, moment))
    # Used again: now the other one is the oldest.
    async with source.holding(cache, b"a" * 400):
        pass
    async with source.holding(cache, b"c" * 400):
        pass
    kept = {path.read_bytes()[:1] for path in (tmp_path / "artefacts").iterdir()}
    assert kept == {b"a", b"c"}


async def test_what_is_in_use_stays_whatever_the_limit(cache, source):
    async with source.holding(cache, b"a" * 900) as first:
        async with source.holding(cache, b"b" * 900) as second:
            assert first.exists()
            assert second.exists()
    async with source.holding(cache, b"c" * 900):
        assert not first.exists()


def _hold(path: str, held, release) -> None:
    hold = room._Hold(Path(path))
    hold.take()
    held.set()
    release.wait(30)
    hold.release()


async def test_what_another_process_uses_stays_too(cache, source):
    async with source.holding(cache, b"a" * 900) as path:
        pass
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(str(path), held, release))
    process.start()
    try:
        assert await asyncio.to_thread(held.wait, 30)
        cache.make_room(900)
        assert path.exists()
    finally:
        release.set()
        await asyncio.to_thread(process.join, 30)
    cache.make_room(900)
    assert not path.exists()


async def test_a_full_disk_is_told_before_anything_is_fetched(cache, source, monkeypatch):
    usage = room.shutil.disk_usage(cache._folder)._replace(free=room.ROOM_BYTES)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(NoSpace, match=r"no room for 5 bytes, .*; [\d,]+ bytes are free: .*_DIR"):
        async with source.holding(cache, b"model"):
            pass
    assert source.fetched == []


def test_parts_that_broken_downloads_left_are_removed_when_they_are_old(tmp_path):
    folder = tmp_path / "artefacts"
    folder.mkdir()
    old, new = folder / "old.part", folder / "new.part"
    for part in (old, new):
        part.write_bytes(b"half")
    hours_ago = time.time() - 2 * room.PARTS_KEPT_S
    os.utime(old, (hours_ago, hours_ago))
    Cache(folder, 1).open()
    assert (old.exists(), new.exists()) == (False, True)


async def test_an_artefact_that_is_stored_broken_is_never_used(client, tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"one thing")
    # Under the digest of another one, as if somebody had written there by hand.
    written = await client._nc.jetstream().object_store(f"{client.root}-artefacts")
    await written.put("0" * 64, path.read_bytes())
    with pytest.raises(Unprocessable, match="stored broken: 9 of 9 bytes"):
        await client.store.artefacts.fetch("0" * 64, tmp_path / "b.bin")
    assert [one.name for one in tmp_path.iterdir()] == ["a.bin"]


async def test_an_artefact_whose_user_was_called_off_is_held_no_longer(cache, source, monkeypatch):
    async with source.holding(cache, b"a" * 900) as path:
        pass
    begun, go_on = threading.Event(), threading.Event()
    really = room._Hold.take

    def slowly(hold: room._Hold) -> None:
        begun.set()
        assert go_on.wait(30)
        really(hold)

    monkeypatch.setattr(room._Hold, "take", slowly)

    async def hold() -> None:
        async with source.holding(cache, b"a" * 900):
            await asyncio.Event().wait()

    holding = asyncio.create_task(hold())
    await until(begun.is_set)
    holding.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await holding
    async with source.holding(cache, b"b" * 900):
        assert not path.exists()

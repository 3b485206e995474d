"""Files of imports and exports on the disk of a host: nobody else reads them, and none is left."""

import asyncio
import contextlib
import os
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bus import private
from bus.testing import until
from services.rustyface.transfers.scratch import Scratch
from tests.rustyface.transfers import FORMATS, as_file, rows_of, uploaded

HOLDS = """
import signal, sys
from pathlib import Path
from services.rustyface.transfers.scratch import Scratch
path = Scratch(Path(sys.argv[1])).place("job.export")
path.write_text("a face")
print(path, flush=True)
signal.pause()
"""


@pytest.fixture
def open_umask():
    before = os.umask(0)
    yield
    os.umask(before)


@contextlib.asynccontextmanager
async def holder(shared: Path):
    """Have another process that has a file there, and give it and the file."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOLDS, str(shared), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        yield process, Path((await process.stdout.readline()).decode().strip())
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def modes_below(folder: Path) -> dict[str, int]:
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}
    return found | {".": stat.S_IMODE(folder.stat().st_mode)}


async def test_what_a_killed_process_has_left_goes_at_once_and_what_a_living_one_has_stays(
    tmp_path,
):
    async with holder(tmp_path) as (living, kept), holder(tmp_path) as (killed, left):
        ours = Scratch(tmp_path)
        mine = await asyncio.to_thread(ours.place, "mine")
        await asyncio.to_thread(mine.touch)
        await asyncio.to_thread(ours.tidy)
        assert all(path.exists() for path in (kept, left, mine))
        killed.kill()
        await killed.wait()
        await asyncio.to_thread(ours.tidy)
        assert all(path.exists() for path in (kept, mine))
        assert not left.parent.exists()
        ours.close()
        assert {*tmp_path.iterdir()} == {kept.parent}
        assert living.returncode is None


async def test_a_worker_that_starts_deletes_what_a_killed_one_has_left(carrier, tmp_path):
    shared = tmp_path / "transfers-0"
    async with holder(shared) as (killed, left):
        killed.kill()
        await killed.wait()
        # Of a version that kept them without a folder.
        loose = shared / "job.0a1b.import"
        loose.write_text("a face")
        async with carrier():
            await until(lambda: not left.exists() and not loose.exists())


async def test_a_folder_that_somebody_deletes_is_made_again(tmp_path):
    scratch = Scratch(tmp_path / "there")
    first = scratch.place("a")
    first.parent.rmdir()
    second = scratch.place("b")
    second.touch()
    scratch.close()
    assert list((tmp_path / "there").iterdir()) == []


def test_many_that_start_and_tidy_at_once_never_lose_a_folder(tmp_path):
    def take(_count: int) -> None:
        scratch = Scratch(tmp_path)
        path = scratch.place("a")
        path.touch()
        Scratch(tmp_path).tidy()
        assert path.exists()
        scratch.close()

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(take, range(200)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.usefixtures("open_umask")
async def test_nobody_else_reads_the_files_of_transfers(
    client, carrier, tmp_path, monkeypatch, kind
):
    shared = tmp_path / "transfers-0"
    shared.mkdir(mode=0o755)
    artefact = await uploaded(client, as_file(tmp_path / "f", rows_of(3), kind))
    seen: list[dict[str, int]] = []
    async with carrier() as at:
        store = at.jobs._work.exports._store
        fetch, put = store.fetch, store.put

        async def fetched(digest, path) -> None:
            await fetch(digest, path)
            seen.append(modes_below(shared))

        async def stored(digest, path) -> None:
            seen.append(modes_below(shared))
            await put(digest, path)

        at.jobs._work._import._store.fetch, store.put = fetched, stored
        await at.do("import", "d", artefact=artefact)
        await at.do("export", "d", format=kind)
        imported, exported = seen
        for modes, ending in ((imported, ".import"), (exported, ".export")):
            [own] = [name for name in modes if len(name) == 16 and "." not in name]
            assert (modes.pop("."), modes.pop(own)) == (0o700, 0o700)
            assert any(name.endswith(ending) for name in modes)
            assert set(modes.values()) == {0o600}
        assert len(exported) > len(imported)
        # Nothing is left of either, not even while the worker lives.
        assert [path for path in shared.rglob("*") if path.is_file()] == []
    assert list(shared.iterdir()) == []


@pytest.mark.usefixtures("open_umask")
def test_a_private_file_is_written_from_its_beginning_and_read(tmp_path):
    path = tmp_path / "x"
    for text in (b"something long", b"short"):
        with private.opened(path) as file:
            file.write(text)
            file.seek(0)
            assert file.read() == text
        assert path.read_bytes() == text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600

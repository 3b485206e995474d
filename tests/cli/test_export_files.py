"""The file of an export on its way to the user's own disk."""

import hashlib
import os
import stat

import pytest

from bus import messages as m
from bus.errors import NotFound
from bus.objects import Objects
from services.cli.gallery_files import _fetch
from services.cli.options import Platform


def exported(artefact: str, size: int) -> m.Job:
    done = m.GalleryWorkDone(entries=1, artefact=artefact, size_bytes=size)
    at = m.now()
    return m.Job(
        job="j1", created_at=at, updated_at=at, kind="gallery", state="done", gallery_result=done
    )


@pytest.fixture
def quiet(tmp_path):
    return Platform(nats=None, data_dir=tmp_path, as_json=True)


@pytest.fixture
async def artefact(client, tmp_path) -> tuple[str, int]:
    path = tmp_path / "exported"
    body = os.urandom(3 * 1024 * 1024)
    path.write_bytes(body)
    digest = hashlib.sha256(body).hexdigest()
    await client.store.faces.put(digest, path)
    return digest, len(body)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
async def test_a_fetched_export_is_for_whom_the_user_says(
    client, quiet, artefact, tmp_path, umask, mode
):
    before = os.umask(umask)
    try:
        await _fetch(client, exported(*artefact), tmp_path / "d.json", quiet, force=False)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "d.json").stat().st_mode) == mode


@pytest.mark.parametrize("moment", ["before", "meanwhile"])
async def test_an_export_that_is_deleted_before_it_is_here_says_so(
    client, quiet, artefact, tmp_path, monkeypatch, moment
):
    digest, size = artefact
    store, info = client.store.faces, Objects.info

    async def told_and_gone(objects, name):
        found = await info(objects, name)
        monkeypatch.setattr(Objects, "info", info)
        await store.delete(digest)
        return found

    if moment == "before":
        await store.delete(digest)
    else:
        # Between what is told of it and its first byte.
        monkeypatch.setattr(Objects, "info", told_and_gone)
    with pytest.raises(NotFound, match="the export j1 was deleted before all of it was here"):
        await _fetch(client, exported(digest, size), tmp_path / "d.json", quiet, force=False)
    assert sorted(path.name for path in tmp_path.iterdir() if "d.json" in path.name) == []

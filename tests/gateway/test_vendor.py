"""The libraries that the page carries are those that were released, and any change is seen."""

import importlib.util
import io
import json
import shutil
import subprocess
import sys
import tarfile

import pytest

from services.gateway.pages import FOLDER

VENDOR = FOLDER / "vendor"
SCRIPT = VENDOR / "vendor.py"


@pytest.fixture(scope="module")
def vendor():
    spec = importlib.util.spec_from_file_location("vendor", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path):
    copy = tmp_path / "vendor"
    shutil.copytree(VENDOR, copy, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture
def packed(vendor, monkeypatch):
    """Let archives made here stand in for the registry."""
    archives: dict[str, bytes] = {}

    def pack(what, into):
        path = into / "library.tgz"
        path.write_bytes(archives[what])
        return path

    monkeypatch.setattr(vendor, "_pack", pack)
    return archives


@pytest.fixture
def small(tmp_path, packed):
    """A list of one library, and the way to release it."""
    (tmp_path / "vendor.toml").write_text(
        '[[library]]\nname = "lib"\nversion = "1.0.0"\nlicence = "MIT"\n'
        'files = { "dist/lib.mjs" = "lib.js", "LICENSE" = "LICENSE.lib" }\n'
        '[imports]\n"other" = "./other.js"\n'
    )

    def release(code):
        packed["lib@1.0.0"] = archive({"dist/lib.mjs": code, "LICENSE": "MIT"})
        return tmp_path

    return release


def archive(files):
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    return raw.getvalue()


def test_what_stands_here_is_what_was_brought():
    done = subprocess.run(
        [sys.executable, "-B", SCRIPT, "--check"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_every_library_has_its_licence_beside_it(vendor):
    for library in vendor._listed(VENDOR)["library"]:
        assert library["licence"] in {"MIT", "Apache-2.0"}
        assert any(name.startswith("LICENSE.") for name in library["files"].values())


def test_a_changed_file_is_seen(vendor, folder):
    path = folder / "preact.js"
    path.write_bytes(path.read_bytes() + b"\n")
    assert vendor.check(folder) == ["preact.js: is not the file that was brought"]


def test_a_missing_file_and_one_too_many_are_seen(vendor, folder):
    (folder / "htm.js").rename(folder / "more.js")
    assert vendor.check(folder) == ["htm.js: is missing", "more.js: nobody brought it"]


def test_a_version_that_was_not_brought_is_seen(vendor, folder):
    path = folder / "vendor.toml"
    path.write_text(path.read_text().replace("11.2.0", "11.2.1"))
    assert vendor.check(folder) == ["preact: vendor.toml says 11.2.1, vendor.lock.json says 11.2.0"]


def test_bringing_changes_the_names_in_imports_and_nothing_else(vendor, small):
    code = 'import{h}from"other";const s="from x";export{h}\n//# sourceMappingURL=lib.mjs.map'
    folder = small(code)
    vendor.bring(folder, update=True)
    brought = (folder / "lib.js").read_text()
    assert brought == 'import{h}from"./other.js";const s="from x";export{h}\n'
    assert json.loads((folder / "vendor.lock.json").read_text())["lib"]["version"] == "1.0.0"
    assert vendor.check(folder) == []


def test_an_archive_that_is_not_the_locked_one_is_refused(vendor, small):
    folder = small("export const a = 1;\n")
    vendor.bring(folder, update=True)
    small("export const a = 2;\n")
    with pytest.raises(vendor.Refused, match="not the archive"):
        vendor.bring(folder)
    assert (folder / "lib.js").read_text() == "export const a = 1;\n"


@pytest.mark.parametrize("name", ["stranger", "./part.js"])
def test_an_import_without_a_place_is_refused(vendor, small, name):
    folder = small(f'import a from "{name}";\n')
    with pytest.raises(vendor.Refused, match=name):
        vendor.bring(folder, update=True)


def test_a_file_that_the_archive_lacks_is_refused(vendor, small, packed):
    folder = small("")
    packed["lib@1.0.0"] = archive({"LICENSE": "MIT"})
    with pytest.raises(vendor.Refused, match=r"no file dist/lib\.mjs"):
        vendor.bring(folder, update=True)

"""Finds a headless Chromium for the tests, or brings one; prints the path of what starts it.

In this order: the one that `BKG_BROWSER` names, an installed one, Debian's package (as root), and
a build that npm carries, unpacked into `.cache/browser`.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

INSTALLED = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
PACKAGE = "@sparticuz/chromium@153.0.0"
CACHE = Path(__file__).parents[1] / ".cache" / "browser"

# The build names font folders of another platform, and without a font Chromium dies on the first
# page: so it gets a configuration that names its own.
FONTS_CONF = """\
<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig>
  <dir>{fonts}</dir>
  <cachedir>{cache}</cachedir>
</fontconfig>
"""
STARTER = """\
#!/bin/sh
export LD_LIBRARY_PATH="{lib}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}"
export FONTCONFIG_PATH="{fonts}"
exec "{chromium}" "$@"
"""
# npm runs on node, and node can unpack what the package is packed with.
UNBROTLI = """
const fs = require("fs"), zlib = require("zlib");
const [from, to] = process.argv.slice(1);
fs.writeFileSync(to, zlib.brotliDecompressSync(fs.readFileSync(from)));
"""


def find() -> Path | None:
    """Return a browser that is there already."""
    if named := os.environ.get("BKG_BROWSER"):
        if found := shutil.which(named):
            return Path(found)
        raise SystemExit(f"BKG_BROWSER names {named}, which is no program that can be run")
    for name in INSTALLED:
        if found := shutil.which(name):
            return Path(found)
    starter = CACHE / "chromium"
    return starter if starter.exists() else None


def install() -> Path | None:
    """Install Debian's package, where that is allowed and there is one."""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return None
    quiet = {"stdout": sys.stderr, "env": os.environ | {"DEBIAN_FRONTEND": "noninteractive"}}
    for name in INSTALLED[:2]:
        for command in (
            ["apt-get", "update", "-qq"],
            ["apt-get", "install", "-qq", "--no-install-recommends", name],
        ):
            done = subprocess.run(command, check=False, **quiet)
        if done.returncode == 0:
            return find()
    return None


def unpack() -> Path:
    """Bring the build that npm carries, and return a script that starts it."""
    if not shutil.which("npm") or not shutil.which("node"):
        raise SystemExit(
            "the tests need a headless Chromium: install the package chromium, "
            "or name one with BKG_BROWSER, or install npm, with which one can be brought"
        )
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        packed = subprocess.run(
            ["npm", "pack", PACKAGE, "--silent"],
            cwd=scratch, check=True, stdout=subprocess.PIPE, text=True,
        ).stdout.split()[-1]  # fmt: skip
        extract(Path(scratch, packed), Path(scratch))
        parts = Path(scratch, "package", "bin")
        unbrotli(parts / "chromium.br", CACHE / "chromium.bin")
        for part in ("al2023", "fonts", "swiftshader"):
            unbrotli(parts / f"{part}.tar.br", parts / f"{part}.tar")
            extract(parts / f"{part}.tar", CACHE / part)
    (CACHE / "chromium.bin").chmod(0o755)
    fonts = next((CACHE / "fonts").rglob("*.ttf")).parent
    lib = next((CACHE / "al2023").rglob("lib*.so*")).parent
    for beside in (CACHE / "swiftshader").iterdir():
        beside.replace(CACHE / beside.name)
    (fonts / "fonts.conf").write_text(FONTS_CONF.format(fonts=fonts, cache=CACHE / "fontconfig"))
    starter = CACHE / "chromium"
    starter.write_text(STARTER.format(lib=lib, fonts=fonts, chromium=CACHE / "chromium.bin"))
    starter.chmod(0o755)
    return starter


def extract(archive: Path, into: Path) -> None:
    """Unpack an archive; nothing in it may leave the folder."""
    with tarfile.open(archive) as tar:
        tar.extractall(into, filter="data")


def unbrotli(packed: Path, to: Path) -> None:
    """Unpack one brotli file."""
    subprocess.run(["node", "-e", UNBROTLI, packed, to], check=True)


if __name__ == "__main__":
    sys.stdout.write(f"{find() or install() or unpack()}\n")

"""Bring the libraries that the page carries, or check that they are what was brought.

    python vendor.py            bring what vendor.toml names; an archive must have its locked digest
    python vendor.py --update   the same after a change of versions: lock the digests found
    python vendor.py --check    compare the files with the lock; needs no network

Files stand here as they were released, except for the names in imports and source map lines.
"""

import argparse
import base64
import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LIST = "vendor.toml"
LOCK = "vendor.lock.json"
# What stands here and came from nobody else.
OURS = {LIST, LOCK, Path(__file__).name}

_SOURCE_MAP = re.compile(rb"(?:\n|(?<=;))//# sourceMappingURL=\S+\s*\Z")
_IMPORTED = re.compile(rb"""(\bfrom|\bimport)(\s*)(["'])([^"'\n]+)\3""")


class Refused(Exception):
    """What was found is not what the lock or the list says."""


def check(folder: Path = HERE) -> list[str]:
    """Return what differs from the lock, in a sentence each."""
    locked = json.loads((folder / LOCK).read_text("utf-8"))
    wanted: dict[str, str] = {}
    wrong: list[str] = []
    for library in _listed(folder)["library"]:
        name, version = library["name"], library["version"]
        entry = locked.get(name, {})
        if entry.get("version") != version:
            wrong.append(f"{name}: {LIST} says {version}, {LOCK} says {entry.get('version')}")
        if set(entry.get("files", {})) != set(library["files"].values()):
            wrong.append(f"{name}: {LIST} and {LOCK} name different files")
        wanted |= entry.get("files", {})
    listed = {library["name"] for library in _listed(folder)["library"]}
    wrong += [f"{name}: stands in {LOCK}, not in {LIST}" for name in sorted(set(locked) - listed)]
    for name, digest in wanted.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name}: is missing")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            wrong.append(f"{name}: is not the file that was brought")
    present = {path.name for path in folder.iterdir() if path.is_file()}
    wrong += [f"{name}: nobody brought it" for name in sorted(present - set(wanted) - OURS)]
    return wrong


def bring(folder: Path = HERE, *, update: bool = False) -> None:
    """Bring every library of the list.

    Raises:
        Refused: An archive is not the one that was locked, or lacks a file, or a file imports
            something that the list gives no place.
    """
    listed = _listed(folder)
    path = folder / LOCK
    old = json.loads(path.read_text("utf-8")) if path.exists() else {}
    lock: dict[str, Any] = {}
    for library in listed["library"]:
        name, version = library["name"], library["version"]
        with tempfile.TemporaryDirectory() as scratch:
            archive = _pack(f"{name}@{version}", Path(scratch))
            digest = "sha512-" + base64.b64encode(
                hashlib.sha512(archive.read_bytes()).digest()
            ).decode("ascii")
            known = old.get(name, {})
            if not update and (known.get("version"), known.get("archive")) != (version, digest):
                raise Refused(
                    f"{name}@{version} is not the archive that {LOCK} names; if its version was "
                    "changed on purpose, run with --update"
                )
            lock[name] = {
                "version": version,
                "licence": library["licence"],
                "archive": digest,
                "files": _extract(archive, library["files"], listed["imports"], folder),
            }
    path.write_text(json.dumps(lock, indent=2, sort_keys=True) + "\n", "utf-8")


def _listed(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / LIST).read_text("utf-8"))


def _pack(what: str, into: Path) -> Path:
    subprocess.run(
        ["npm", "pack", what, "--silent", "--ignore-scripts"],
        cwd=into,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return next(into.glob("*.tgz"))


def _extract(
    archive: Path, files: dict[str, str], imports: dict[str, str], folder: Path
) -> dict[str, str]:
    """Write an archive's files; return the digest of each."""
    digests = {}
    with tarfile.open(archive) as tar:
        for source, target in files.items():
            try:
                member = tar.extractfile(f"package/{source}")
            except KeyError:
                member = None
            if member is None:
                raise Refused(f"{archive.name} has no file {source}")
            body = member.read()
            if target.endswith(".js"):
                body = _relinked(_SOURCE_MAP.sub(b"\n", body), imports, target)
            (folder / target).write_bytes(body)
            digests[target] = hashlib.sha256(body).hexdigest()
    return digests


def _relinked(body: bytes, imports: dict[str, str], target: str) -> bytes:
    def place(found: re.Match[bytes]) -> bytes:
        word, space, quote, name = found.groups()
        if name.startswith(b"."):
            raise Refused(f"{target} imports {name.decode()}, which the archive keeps beside it")
        known = imports.get(name.decode())
        if known is None:
            raise Refused(f"{target} imports {name.decode()}, which {LIST} gives no place")
        return word + space + quote + known.encode() + quote

    return _IMPORTED.sub(place, body)


def main() -> int:
    """Do what the command line asks; return its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="compare with the lock, offline")
    what.add_argument("--update", action="store_true", help="lock the digests that are found")
    options = parser.parse_args()
    if options.check:
        wrong = check()
        sys.stderr.writelines(f"{one}\n" for one in wrong)
        return 1 if wrong else 0
    try:
        bring(update=options.update)
    except Refused as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

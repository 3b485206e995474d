"""The dashboard's files: read once, compressed once, served from memory.

Every file lies below `/ui/<hash of all files>/`, so it may be kept for ever, and relative imports
inherit the hash. Only `index.html` is asked for again; the literal `{hash}` in it is replaced.
"""

import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from aiohttp import hdrs, web

from bus.errors import NotFound, Unavailable

FOLDER: Final = Path(__file__).with_name("dashboard")
# The system's own table of types differs from machine to machine.
CONTENT_TYPES: Final = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; media-src 'self' blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_INDEX: Final = "index.html"


@dataclass(frozen=True)
class _File:
    kind: str
    body: bytes
    squeezed: bytes | None


class Pages:
    """The dashboard.

    Args:
        folder: Where its files lie.
        fresh: Whether to read them anew for each request, for those who work on them.

    Raises:
        Unavailable: There is no `index.html`.
    """

    def __init__(self, folder: Path = FOLDER, *, fresh: bool = False) -> None:
        self._folder = folder
        self._fresh = fresh
        self.hash, self._files = _files(folder, squeeze=not fresh)

    def index(self, request: web.Request, status: int = 200) -> web.Response:
        """Return the one document of the page; 304 when the browser has it."""
        self._renew()
        tag = f'W/"{self.hash}"'
        headers = {hdrs.ETAG: tag, hdrs.CACHE_CONTROL: "no-cache", _CSP: POLICY}
        if status == 200 and tag in request.headers.get(hdrs.IF_NONE_MATCH, ""):
            return web.Response(status=304, headers=headers)
        return _response(request, self._files[_INDEX], headers, status)

    def file(self, request: web.Request, version: str, path: str) -> web.Response:
        """Return one file of the page.

        Raises:
            NotFound: There is none, or it belongs to another version of the page.
        """
        self._renew()
        found = self._files.get(path)
        if found is None or path == _INDEX or (version != self.hash and not self._fresh):
            raise NotFound(f"the page has no file {path[:200]!r} in version {version[:40]!r}")
        kept = "no-cache" if self._fresh else "public, max-age=31536000, immutable"
        return _response(request, found, {hdrs.CACHE_CONTROL: kept, _CSP: POLICY}, 200)

    def _renew(self) -> None:
        if self._fresh:
            self.hash, self._files = _files(self._folder, squeeze=False)


_CSP: Final = "Content-Security-Policy"


def _files(folder: Path, *, squeeze: bool) -> tuple[str, dict[str, _File]]:
    """Read all files of the page; return their common hash, and each by its path."""
    bodies = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.suffix in CONTENT_TYPES and path.is_file()
    }
    if _INDEX not in bodies:
        raise Unavailable(f"the dashboard is incomplete: {folder / _INDEX} is missing")
    digest = hashlib.sha256()
    for name, body in bodies.items():
        digest.update(f"{name}\0{len(body)}\0".encode() + body)
    version = digest.hexdigest()[:16]
    bodies[_INDEX] = bodies[_INDEX].replace(b"{hash}", version.encode())
    return version, {
        name: _File(
            kind=CONTENT_TYPES[Path(name).suffix],
            body=body,
            squeezed=gzip.compress(body, mtime=0) if squeeze else None,
        )
        for name, body in bodies.items()
    }


def _response(
    request: web.Request, file: _File, headers: dict[str, str], status: int
) -> web.Response:
    headers = {**headers, hdrs.CONTENT_TYPE: file.kind, hdrs.VARY: hdrs.ACCEPT_ENCODING}
    body = file.body
    if file.squeezed is not None and "gzip" in request.headers.get(hdrs.ACCEPT_ENCODING, ""):
        body = file.squeezed
        headers[hdrs.CONTENT_ENCODING] = "gzip"
    return web.Response(body=body, headers=headers, status=status)

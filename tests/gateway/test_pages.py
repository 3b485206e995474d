"""The page's files: how they are named, kept, compressed and protected."""

import pytest
from yarl import URL

from bus.errors import Unavailable
from services.gateway.pages import CONTENT_TYPES, Pages


async def version(gate):
    async with gate.anonymous.get("/") as response:
        return (await response.text()).split("/ui/")[1].split("/")[0]


@pytest.mark.parametrize("path", ["/", "/plugins", "/plugins/echo", "/plugins/echo/logs"])
async def test_the_pages_own_routes_are_the_page_with_the_hash_written_in(gate, path):
    async with gate.anonymous.get(path) as response:
        text = await response.text()
        assert response.headers["Content-Type"] == "text/html; charset=utf-8"
        assert response.headers["Cache-Control"] == "no-cache"
    assert "{hash}" not in text
    assert f"/ui/{gate.parts.pages.hash}/main.js" in text


async def test_the_page_is_not_sent_again_when_the_browser_has_it(gate):
    async with gate.anonymous.get("/") as response:
        tag = response.headers["ETag"]
    async with gate.anonymous.get("/", headers={"If-None-Match": tag}) as response:
        assert response.status == 304
        assert await response.read() == b""
    async with gate.anonymous.get("/", headers={"If-None-Match": 'W/"old"'}) as response:
        assert response.status == 200


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("main.js", "text/javascript; charset=utf-8"),
        ("parts/list.js", "text/javascript; charset=utf-8"),
        ("base.css", "text/css; charset=utf-8"),
        ("icons.svg", "image/svg+xml"),
    ],
)
async def test_a_file_may_be_kept_for_ever_and_has_our_type(gate, path, kind):
    async with gate.anonymous.get(f"/ui/{await version(gate)}/{path}") as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == kind
        assert response.headers["Cache-Control"] == "public, max-age=31536000, immutable"
        assert response.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    "path",
    ["vendor.toml", "types.d.ts", "index.html", "none.js", "parts", "parts/", "../pages.py",
     "..%2f..%2fauth.py", "%2e%2e/auth.py", "/etc/passwd", "main.js%00.css", "parts//list.js"],
)  # fmt: skip
async def test_nothing_else_is_served(gate, path):
    url = URL(f"{gate.url}/ui/{await version(gate)}/{path}", encoded=True)
    async with gate.anonymous.get(url) as response:
        assert response.status == 404
        assert response.content_type == "application/problem+json"


async def test_a_file_of_another_version_is_404(gate):
    async with gate.anonymous.get("/ui/0123456789abcdef/main.js") as response:
        assert response.status == 404


async def test_files_are_compressed_for_those_who_can_read_it(gate):
    url = f"/ui/{await version(gate)}/main.js"
    async with gate.anonymous.get(url, headers={"Accept-Encoding": "gzip"}) as response:
        assert response.headers["Content-Encoding"] == "gzip"
        assert response.headers["Vary"] == "Accept-Encoding"
        squeezed = int(response.headers["Content-Length"])
        text = await response.text()
    async with gate.anonymous.get(url, headers={"Accept-Encoding": "identity"}) as response:
        assert "Content-Encoding" not in response.headers
        assert await response.text() == text
        assert int(response.headers["Content-Length"]) > squeezed


async def test_head_is_answered_like_get_without_the_body(gate):
    async with gate.anonymous.head("/") as response:
        assert response.status == 200
        assert int(response.headers["Content-Length"]) > 0
        assert await response.read() == b""


async def test_the_page_may_load_only_from_us_and_stand_in_no_frame(gate):
    async with gate.anonymous.get("/") as response:
        policy = response.headers["Content-Security-Policy"]
    for rule in ("default-src 'none'", "script-src 'self'", "connect-src 'self'",
                 "frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'"):  # fmt: skip
        assert rule in policy
    assert "unsafe" not in policy


def test_the_hash_changes_with_any_file(pages):
    before = Pages(pages).hash
    assert Pages(pages).hash == before
    (pages / "parts" / "list.js").write_text("export const x = 1;\n")
    assert Pages(pages).hash != before


def test_for_developers_files_are_read_anew(pages):
    served = Pages(pages, fresh=True)
    before = served.hash
    (pages / "main.js").write_text("changed\n")
    served._renew()
    assert served.hash != before
    assert served._files["main.js"].body == b"changed\n"


def test_a_dashboard_without_its_document_is_refused(tmp_path):
    with pytest.raises(Unavailable, match=r"index\.html"):
        Pages(tmp_path)


def test_only_types_that_browsers_need_are_known():
    assert set(CONTENT_TYPES) == {".js", ".css", ".svg", ".html"}

"""Who may do what: keys, sessions, origins, and the key file."""

import asyncio
import stat

import pytest
from aiohttp import CookieJar

from bus.errors import InvalidRequest
from services.gateway.app import ROUTES, Options
from services.gateway.auth import Access, admin_key, is_loopback

PARTS_OF_PATHS = {
    "name": "echo", "host": "here", "capability": "echo.say", "model": "m", "version": "1",
    "job": "a1", "dataset": "d", "entry": "e", "subject": "s", "rejection": "r", "imported": "i",
}  # fmt: skip
GUARDED = [(m, p.format_map(PARTS_OF_PATHS)) for m, p, _, a in ROUTES if a is not Access.OPEN]
OPEN = ["/livez", "/health", "/", "/plugins", "/plugins/echo/logs"]


@pytest.mark.parametrize(("method", "path"), GUARDED)
async def test_without_a_key_every_guarded_route_is_401(gate, method, path):
    async with gate.anonymous.request(method, path) as response:
        assert response.status == 401
        assert response.headers["WWW-Authenticate"].startswith("Bearer")
        assert response.content_type == "application/problem+json"
        assert "admin.key" in (await response.json(content_type=None))["detail"]


@pytest.mark.parametrize("path", OPEN)
async def test_what_is_open_needs_no_key(gate, path):
    async with gate.anonymous.get(path) as response:
        assert response.status == 200


@pytest.mark.parametrize(
    "given",
    ["Bearer wrong", "Bearer ", "Bearer the-right-key ", "bearer  the-right-key", "Basic abc",
     "the-right-key", "Bearer the-right-keyx", "Bearer é"],
)  # fmt: skip
async def test_only_the_right_key_is_taken(gate, given):
    expected = (
        200 if given.split() in (["Bearer", "the-right-key"], ["bearer", "the-right-key"]) else 401
    )
    headers = {"Authorization": given}
    async with gate.anonymous.get("/api/plugins", headers=headers) as response:
        assert response.status == expected


async def test_many_wrong_keys_are_429_and_the_right_one_still_works(gate):
    statuses = []
    for _ in range(14):
        async with gate.anonymous.get(
            "/api/plugins", headers={"Authorization": "Bearer wrong"}
        ) as response:
            statuses.append(response.status)
            retry = response.headers.get("Retry-After")
    assert statuses == [401] * 10 + [429] * 4
    assert int(retry) > 0
    await gate.json("/api/plugins")


async def test_asking_without_a_key_is_never_429(gate):
    for _ in range(20):
        async with gate.anonymous.get("/api/plugins") as response:
            assert response.status == 401


# --- Sessions -------------------------------------------------------------------------------------


async def test_opening_the_page_with_the_key_signs_in_and_leads_the_key_away(gate):
    async with gate.anonymous.get("/?key=the-right-key", allow_redirects=False) as response:
        assert (response.status, response.headers["Location"]) == (303, "/")
        cookie = response.headers["Set-Cookie"]
        assert response.headers["Referrer-Policy"] == "no-referrer"
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert "Path=/" in cookie
    assert "the-right-key" not in cookie
    async with gate.anonymous.get("/api/plugins") as response:
        assert response.status == 200


async def test_opening_the_page_with_a_wrong_key_shows_it_with_401(gate):
    async with gate.anonymous.get("/?key=wrong") as response:
        assert response.status == 401
        assert response.content_type == "text/html"
        assert "Set-Cookie" not in response.headers


async def test_a_session_is_had_shown_and_ended(gate):
    session = "/auth/session"
    async with gate.anonymous.post(session, json={"key": "the-right-key"}) as response:
        assert response.status == 204
    async with gate.anonymous.get(session) as response:
        told = await response.json()
    assert (told["role"], told["auth"]) == ("admin", "session")
    assert told["version"]
    async with gate.anonymous.delete(session) as response:
        assert response.status == 204
    async with gate.anonymous.get(session) as response:
        assert response.status == 401


async def test_a_session_that_was_ended_cannot_be_used_again(gate):
    async with gate.anonymous.post("/auth/session", json={"key": "the-right-key"}) as response:
        cookie = response.headers["Set-Cookie"].split(";")[0]
    await (await gate.anonymous.delete("/auth/session")).release()
    gate.anonymous._cookie_jar = CookieJar(unsafe=True)
    async with gate.anonymous.get("/api/plugins", headers={"Cookie": cookie}) as response:
        assert response.status == 401


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"key":"wrong"}', 401),
        (b"", 400),
        (b"{}", 400),
        (b'{"key":3}', 400),
        (b'{"key":""}', 400),
        (b"x", 400),
        (b'{"key":"%b"}' % (b"x" * 2_000), 400),
    ],
)
async def test_no_session_for_anything_else(gate, body, status):
    async with gate.anonymous.post("/auth/session", data=body) as response:
        assert response.status == status
        assert "Set-Cookie" not in response.headers


async def test_the_key_itself_is_a_sign_in_too(gate):
    assert (await gate.json("/auth/session"))["auth"] == "key"


@pytest.mark.parametrize(("origin", "status"), [(None, 404), ("own", 404), ("http://evil", 403)])
async def test_a_write_by_cookie_must_come_from_our_own_page(gate, origin, status):
    await (await gate.anonymous.get("/?key=the-right-key")).release()
    headers = {"Origin": gate.url if origin == "own" else origin} if origin else {}
    async with gate.anonymous.post("/api/plugins/nobody/stop", headers=headers) as response:
        assert response.status == status


async def test_a_write_by_key_may_come_from_anywhere(gate):
    await gate.post("/api/plugins/x/stop", status=404, headers={"Origin": "http://tool.example"})


# --- Reading for all, no sign-in at all -----------------------------------------------------------


async def test_public_reading_opens_reads_and_the_socket_but_no_writes(start):
    gate = await start(public_read=True)
    async with gate.anonymous.get("/api/plugins") as response:
        assert response.status == 200
    async with gate.anonymous.get("/auth/session") as response:
        told = await response.json()
        assert (told["role"], told["auth"]) == ("viewer", "public")
    async with gate.anonymous.ws_connect("/ws/plugins") as ws:
        assert (await ws.receive_json())["type"] == "bootstrap"
    for path in ("/api/plugins/echo/start", "/api/capabilities/echo.say"):
        async with gate.anonymous.post(path) as response:
            assert response.status == 401
    async with gate.anonymous.get("/admin/plugins") as response:
        assert response.status == 401


async def test_no_auth_opens_everything_to_this_machine_and_our_own_page(start):
    gate = await start(no_auth=True)
    async with gate.anonymous.get("/admin/plugins") as response:
        assert response.status == 200
    async with gate.anonymous.get("/auth/session") as response:
        assert (await response.json())["auth"] == "off"
    async with gate.anonymous.post("/api/plugins/x/stop") as response:
        assert response.status == 404
    headers = {"Origin": "http://evil.example"}
    async with gate.anonymous.post("/api/plugins/x/stop", headers=headers) as response:
        assert response.status == 403


async def test_no_auth_is_not_for_another_name_that_leads_here(start):
    gate = await start(no_auth=True)
    async with gate.anonymous.get("/api/plugins", headers={"Host": "evil.example"}) as response:
        assert response.status == 403


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "bkg.example"])  # noqa: S104
def test_no_auth_is_refused_unless_bound_to_loopback(host):
    with pytest.raises(InvalidRequest, match="loopback"):
        Options.from_env({"BKG_NO_AUTH": "1", "BKG_HOST": host})
    assert Options.from_env({"BKG_NO_AUTH": "1"}).no_auth


@pytest.mark.parametrize(
    ("host", "here"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("[::1]", True), ("localhost", True),
     ("LOCALHOST", True), ("x.localhost", True), ("", False), ("10.0.0.1", False),
     ("localhost.evil", False), ("127.0.0.1.evil", False)],
)  # fmt: skip
def test_what_counts_as_this_machine(host, here):
    assert is_loopback(host) is here


@pytest.mark.parametrize(
    ("name", "value"),
    [("BKG_PORT", "x"), ("BKG_PORT", "65536"), ("BKG_PORT", "-1"), ("BKG_NO_AUTH", "maybe"),
     ("BKG_READY_FD", "x")],
)  # fmt: skip
def test_a_setting_that_there_cannot_be_is_named(name, value):
    with pytest.raises(InvalidRequest, match=name):
        Options.from_env({name: value})


# --- The key file ---------------------------------------------------------------------------------


def test_the_key_is_made_once_readable_by_its_owner_only(tmp_path):
    home = tmp_path / "new" / "data"
    key = admin_key(home)
    assert len(key) >= 32
    assert admin_key(home) == key
    assert (home / "admin.key").read_text() == f"{key}\n"
    assert stat.S_IMODE((home / "admin.key").stat().st_mode) == 0o600
    assert [path.name for path in home.iterdir()] == ["admin.key"]


@pytest.mark.parametrize("text", ["own key with spaces\n", "no-newline"])
def test_a_key_that_is_there_is_kept_as_its_whole_line(tmp_path, text):
    (tmp_path / "admin.key").write_text(text)
    assert admin_key(tmp_path) == text.removesuffix("\n")


@pytest.mark.parametrize("body", [b"", b"\n", b"  \n", b"two\nlines\n", b"\xff\xfe"])
def test_a_key_file_without_one_key_is_refused_with_its_path(tmp_path, body):
    (tmp_path / "admin.key").write_bytes(body)
    with pytest.raises(InvalidRequest, match=r"admin\.key"):
        admin_key(tmp_path)


async def test_two_that_make_the_key_at_once_agree(tmp_path):
    keys = await asyncio.gather(*(asyncio.to_thread(admin_key, tmp_path) for _ in range(20)))
    assert len(set(keys)) == 1

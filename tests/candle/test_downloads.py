"""Downloads from a real HTTP server that breaks off, stalls, leads on and lies."""

import asyncio
import contextlib
import hashlib
import socket
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from bus.errors import (
    InvalidRequest,
    NoSpace,
    NotAllowed,
    NotFound,
    TooLarge,
    Unavailable,
    Unprocessable,
)
from bus.job_rules import heals
from bus.testing import until
from services.candle.fetching import downloads, hub
from services.candle.fetching.downloads import Downloads, Limits, Meter, Wanted
from services.candle.fetching.outside import rules_from

CONTENT = np.random.default_rng(7).bytes(3_000_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()
HOUSE = rules_from(allow=["127.0.0.0/8"])


@pytest.fixture(autouse=True)
def as_it_is_outside(no_proxy_from_outside, source):
    source.content = CONTENT


@pytest.fixture
def fetch(tmp_path, source) -> Callable:
    async def run(url: URL | None = None, *, rules=HOUSE, limits=None, told=None, **wanted):
        downloading = Downloads(tmp_path / "parts", rules)
        return await downloading.fetch(
            "job",
            Wanted(url=url or source.url, **wanted),
            limits or Limits(stall_s=20),
            told or (lambda _progress: None),
        )

    return run


def part(tmp_path: Path) -> Path:
    return tmp_path / "parts" / "job.part"


async def test_a_file_comes_whole_with_its_name_and_its_digest(source, fetch):
    told = []
    fetched = await fetch(sha256=DIGEST, told=told.append)
    assert fetched.path.read_bytes() == CONTENT
    assert (fetched.file_name, fetched.checksum, fetched.size_bytes) == (
        "m.onnx",
        DIGEST,
        len(CONTENT),
    )
    assert (told[-1].bytes, told[-1].total_bytes) == (len(CONTENT), len(CONTENT))


async def test_what_broke_off_goes_on_where_it_was(source, fetch, tmp_path):
    source.break_after = 1_000_000
    with pytest.raises(Unavailable, match="broke off") as broken:
        await fetch()
    assert heals(broken.value)
    have = part(tmp_path).stat().st_size
    assert 0 < have <= 1_000_000
    source.break_after = None
    fetched = await fetch(sha256=DIGEST)
    assert source.asked[1]["Range"] == f"bytes={have}-"
    assert source.asked[1]["If-Range"] == '"one"'
    assert fetched.checksum == DIGEST


async def test_without_an_etag_the_time_of_change_says_whether_it_goes_on(source, fetch):
    source.etag, source.modified = None, "Tue, 24 Nov 2026 10:00:00 GMT"
    source.break_after = 1_000_000
    with pytest.raises(Unavailable):
        await fetch()
    source.break_after = None
    assert (await fetch()).checksum == DIGEST
    assert source.asked[1]["If-Range"] == source.modified


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
async def test_what_cannot_be_told_apart_begins_anew(source, fetch, etag):
    source.etag, source.break_after = etag, 1_000_000
    with pytest.raises(Unavailable):
        await fetch()
    source.break_after = None
    assert (await fetch()).checksum == DIGEST
    assert "Range" not in source.asked[1]


async def test_a_file_that_changed_meanwhile_comes_from_the_beginning(source, fetch):
    source.break_after = 1_000_000
    with pytest.raises(Unavailable):
        await fetch()
    source.break_after, source.etag, source.content = None, '"two"', CONTENT[::-1]
    fetched = await fetch()
    assert "Range" in source.asked[1]
    assert fetched.path.read_bytes() == CONTENT[::-1]


async def test_a_server_without_ranges_sends_it_from_the_beginning(source, fetch):
    source.break_after, source.ranges = 1_000_000, False
    with pytest.raises(Unavailable):
        await fetch()
    source.break_after = None
    assert (await fetch(sha256=DIGEST)).size_bytes == len(CONTENT)


async def test_a_range_that_does_not_fit_is_not_glued_on(source, fetch, tmp_path):
    source.break_after = 1_000_000
    with pytest.raises(Unavailable):
        await fetch()
    source.break_after, source.shift = None, 10
    with pytest.raises(Unavailable, match="fetched anew"):
        await fetch()
    assert part(tmp_path).stat().st_size == 0
    assert (await fetch(sha256=DIGEST)).checksum == DIGEST


async def test_another_address_under_the_same_name_begins_anew(source, fetch):
    source.break_after = 1_000_000
    with pytest.raises(Unavailable):
        await fetch()
    source.break_after = None
    await fetch(source.url.with_path("/other.onnx"))
    assert "Range" not in source.asked[1]


async def test_a_file_that_is_there_already_is_not_fetched_again(source, fetch):
    await fetch()
    fetched = await fetch(sha256=DIGEST)
    assert fetched.checksum == DIGEST
    assert source.asked[1]["Range"] == f"bytes={len(CONTENT)}-"


async def test_a_part_that_was_spoilt_is_fetched_anew(source, fetch, tmp_path):
    source.break_after = 1_000_000
    with pytest.raises(Unavailable):
        await fetch()
    with part(tmp_path).open("r+b") as file:
        file.write(b"spoilt")
    source.break_after = None
    with pytest.raises(Unavailable, match="fetched anew"):
        await fetch(sha256=DIGEST)
    assert (await fetch(sha256=DIGEST)).checksum == DIGEST


async def test_another_digest_is_final_and_leaves_nothing(source, fetch, tmp_path):
    with pytest.raises(Unprocessable, match=f"has the SHA-256 {DIGEST}, not 000") as wrong:
        await fetch(sha256="0" * 64)
    assert not heals(wrong.value)
    assert part(tmp_path).stat().st_size == 0


async def test_a_length_that_is_not_kept_is_an_error_that_may_heal(source, fetch):
    source.declared = len(CONTENT) + 1_000
    with pytest.raises(Unavailable, match="broke off"):
        await fetch(limits=Limits(stall_s=5))
    source.declared, source.etag = None, '"two"'
    assert (await fetch(sha256=DIGEST)).size_bytes == len(CONTENT)


async def test_a_server_that_falls_silent_is_left(source, fetch):
    source.stall_after = 500_000
    with pytest.raises(Unavailable, match=r"sent nothing for 0.5 s \(import_stall_s\)"):
        await fetch(limits=Limits(stall_s=0.5))
    assert (await fetch(sha256=DIGEST)).checksum == DIGEST


async def test_a_download_that_takes_too_long_ends(source, fetch):
    source.stall_after = 500_000
    with pytest.raises(Unprocessable, match="did not come within 0.5 s"):
        await fetch(limits=Limits(total_s=0.5))


async def test_a_file_that_is_too_large_is_not_fetched(source, fetch, tmp_path):
    with pytest.raises(TooLarge, match="allowed are 1,000,000"):
        await fetch(limits=Limits(max_bytes=1_000_000))
    assert part(tmp_path).stat().st_size == 0


async def test_a_file_that_grows_too_large_is_cut_off(source, fetch, tmp_path, monkeypatch):
    """Nobody says how large it is: the server sends it in chunks."""

    async def chunked(request):
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await response.write(b"x" * 100_000)
        return response

    monkeypatch.setattr(source, "answer", chunked)
    async with source.serving():
        with pytest.raises(TooLarge):
            await fetch(limits=Limits(max_bytes=5_000_000))
    assert part(tmp_path).stat().st_size == 0


async def test_a_full_disk_is_said_before_anything_is_written(fetch, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "ROOM_BYTES", 1 << 60)
    says = r"needs 6,000,000 bytes more .*; [\d,]+ bytes are free: .*BKG_DATA_DIR"
    with pytest.raises(NoSpace, match=says):
        await fetch()
    assert part(tmp_path).stat().st_size == 0


async def test_what_could_not_be_kept_is_not_fetched(source, tmp_path):
    asked = []

    async def full(size_bytes: int, digest: str | None) -> None:
        asked.append((size_bytes, digest))
        raise NoSpace("the store is full")

    downloading = Downloads(tmp_path / "parts", HOUSE, check_room=full)
    with pytest.raises(NoSpace):
        await downloading.fetch("job", Wanted(url=source.url, sha256=DIGEST), Limits())
    assert asked == [(len(CONTENT), DIGEST)]
    assert part(tmp_path).stat().st_size == 0


@pytest.mark.parametrize(
    ("status", "error"),
    [(404, NotFound), (410, NotFound), (401, NotAllowed), (403, NotAllowed), (400, Unprocessable)],
)
async def test_what_will_not_heal_is_said_so(source, fetch, status, error):
    source.refusals = [(status, {})]
    with pytest.raises(error) as refused:
        await fetch(source.url.with_query(sig="geheim"))
    assert not heals(refused.value)
    assert "geheim" not in refused.value.message


async def test_a_busy_server_says_when_to_come_back(source, fetch):
    source.refusals = [(429, {"Retry-After": "7"}), (503, {})]
    with pytest.raises(Unavailable, match="answered 429") as busy:
        await fetch()
    assert busy.value.retry_after_s == 7
    with pytest.raises(Unavailable, match="answered 503"):
        await fetch()


async def test_a_name_that_tells_no_format_is_refused_before_it_is_fetched(source, fetch):
    limits = Limits(suffixes=(".onnx", ".json"))
    with pytest.raises(Unprocessable, match=r"served are \.onnx, \.json"):
        await fetch(source.url.with_path("/m.bin"), limits=limits)
    source.more = {"Content-Disposition": 'attachment; filename="../x/net.onnx"'}
    fetched = await fetch(source.url.with_path("/m"), limits=limits)
    assert fetched.file_name == "net.onnx"


async def test_compressed_bytes_are_refused(source, fetch):
    source.more = {"Content-Encoding": "gzip"}
    with pytest.raises(Unprocessable, match="compressed"):
        await fetch()
    assert source.asked[0]["Accept-Encoding"] == "identity"


# --- Who is asked ---------------------------------------------------------------------------------


async def test_loopback_is_not_asked_unless_it_is_allowed(source, fetch):
    with pytest.raises(NotAllowed, match="import_allow"):
        await fetch(rules=rules_from())
    with pytest.raises(NotAllowed, match="import_allow"):
        await fetch(URL(f"http://localhost:{source.port}/m.onnx"), rules=rules_from())
    for disguised in ("2130706433", "127.1", "0x7f.0.0.1"):
        with pytest.raises((NotAllowed, InvalidRequest)):
            await fetch(URL(f"http://{disguised}:{source.port}/m.onnx"), rules=rules_from())
    assert source.asked == []


async def test_a_redirect_is_followed_to_whom_may_be_asked(source, fetch):
    source.redirects = {"/m.onnx": "/a.onnx", "/a.onnx": f"http://127.0.0.2:{source.port}/b.onnx"}
    with pytest.raises(NotAllowed, match=r"127\.0\.0\.2"):
        await fetch(rules=rules_from(allow=["127.0.0.1"]))
    assert [one["path"] for one in source.asked] == ["/m.onnx", "/a.onnx"]


async def test_a_redirect_without_end_is_left(source, fetch):
    source.redirects = {"/m.onnx": "/m.onnx"}
    with pytest.raises(Unprocessable, match="more than 5 times"):
        await fetch()
    assert len(source.asked) == 6


@pytest.mark.parametrize("to", ["ftp://127.0.0.1/m.onnx", "http://[::1/", "file:///etc/passwd"])
async def test_a_redirect_to_no_address_is_refused(source, fetch, to):
    source.redirects = {"/m.onnx": to}
    with pytest.raises((Unprocessable, InvalidRequest)):
        await fetch()


async def test_credentials_stay_with_the_host_that_they_are_for(source, another_source, fetch):
    async with another_source(CONTENT) as other:
        source.redirects = {"/m.onnx": "/n.onnx", "/n.onnx": str(other.url)}
        await fetch(headers={"Authorization": "Bearer geheim"})
        assert [one.get("Authorization") for one in source.asked] == ["Bearer geheim"] * 2
        assert "Authorization" not in other.asked[0]


class Names(AbstractResolver):
    """Resolves every name to the same addresses."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses

    async def resolve(self, host, port=0, family=socket.AF_INET):  # noqa: ARG002
        return [
            {"hostname": host, "host": address, "port": port, "family": socket.AF_INET,
             "proto": 6, "flags": socket.AI_NUMERICHOST}
            for address in self.addresses
        ]  # fmt: skip

    async def close(self) -> None:
        pass


async def test_of_a_name_with_two_addresses_only_the_allowed_one_is_connected_to(source, tmp_path):
    url = URL(f"http://two.example:{source.port}/m.onnx")
    rules = rules_from(allow=["127.0.0.1"])
    two = Downloads(tmp_path, rules, resolver=Names("127.0.0.2", "127.0.0.1"))
    assert (await two.fetch("a", Wanted(url=url), Limits())).checksum == DIGEST
    assert source.asked[0]["Host"] == f"two.example:{source.port}"
    denied = Downloads(tmp_path, rules, resolver=Names("127.0.0.2", "10.0.0.1"))
    with pytest.raises(NotAllowed, match=r"two\.example \((127\.0\.0\.2|10\.0\.0\.1)\)"):
        await denied.fetch("b", Wanted(url=url), Limits())
    assert len(source.asked) == 1


async def test_a_proxy_is_asked_where_the_environment_names_one(source, fetch, monkeypatch):
    """The proxy resolves the name; rules by name still hold."""
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{source.port}")
    assert (await fetch(URL("http://far.example/m.onnx"), rules=rules_from())).checksum == DIGEST
    assert source.asked[0]["Host"] == "far.example"
    with pytest.raises(NotAllowed, match="import_deny"):
        await fetch(URL("http://far.example/m.onnx"), rules=rules_from(deny=["far.example"]))


@pytest.fixture(scope="session")
def certificate(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    key, chain = folder / "key.pem", folder / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-keyout", key, "-out", chain, "-days", "2", "-subj", "/CN=127.0.0.1",
         "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    return key, chain


async def test_an_authority_of_the_house_is_trusted_when_it_is_named(
    tmp_path, certificate, source, another_source
):
    key, chain = certificate
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(chain, key)
    async with another_source(CONTENT, tls) as secure:
        wanted = Wanted(url=secure.url.with_scheme("https"))
        with pytest.raises(NotAllowed, match="import_ca_file"):
            await Downloads(tmp_path, HOUSE).fetch("a", wanted, Limits())
        trusting = Downloads(tmp_path, HOUSE, ca_file=str(chain))
        assert (await trusting.fetch("a", wanted, Limits())).checksum == DIGEST
        # From http to https it may lead, and not back.
        source.redirects = {"/m.onnx": str(wanted.url)}
        up = Wanted(url=source.url)
        assert (await trusting.fetch("b", up, Limits())).checksum == DIGEST
        secure.redirects = {"/m.onnx": str(source.url.with_path("/n.onnx"))}
        with pytest.raises(NotAllowed, match="from https to http"):
            await trusting.fetch("c", wanted, Limits())


# --- Two at a time, and what is told --------------------------------------------------------------


async def test_one_partial_file_is_written_by_one_alone(source, fetch, tmp_path):
    source.stall_after = 2_000_000
    first = asyncio.create_task(fetch())
    await until(lambda: part(tmp_path).exists() and part(tmp_path).stat().st_size > 0)
    with pytest.raises(Unavailable, match="written by another process"):
        await fetch()
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert (await fetch(sha256=DIGEST)).checksum == DIGEST
    assert "Range" in source.asked[-1]


def test_no_rate_is_told_at_once_and_no_end_without_a_rate():
    meter = Meter(0, 10_000, now=0)
    meter.count(1_000, now=1)
    assert meter.progress(now=1) == downloads.Progress(1_000, 10_000, None, None)
    meter.count(2_000, now=2)
    assert meter.progress(now=2) == downloads.Progress(2_000, 10_000, 1_000, 8)
    assert Meter(0, None, now=0).progress(now=9).eta_s is None


@given(st.lists(st.tuples(st.floats(0.1, 5), st.integers(0, 10**9)), max_size=20))
def test_a_rate_lies_between_the_slowest_and_the_fastest(steps):
    meter, now, have, rates = Meter(0, 10**12, now=0), 0.0, 0, []
    since, at = 0, 0.0
    for seconds, size in steps:
        now, have = now + seconds, have + size
        if now - at >= downloads.BLOCK_S / 2:
            rates.append((have - since) / (now - at))
            since, at = have, now
        meter.count(have, now)
    told = meter.progress(now)
    assert told.bytes == have
    if told.bytes_per_s is not None:
        assert min(rates) * 0.99 - 1 <= told.bytes_per_s <= max(rates) * 1.01 + 1


# --- The hub --------------------------------------------------------------------------------------


def test_an_address_of_the_hub_is_taken_apart():
    assert hub.parts_of("hf://owner/repo/a/b.onnx@v1") == ("owner/repo", "a/b.onnx", "v1")
    assert hub.parts_of("hf://owner/repo/b.onnx") == ("owner/repo", "b.onnx", None)
    assert hub.parts_of("hf://o/r/b.onnx@refs/pr/3") == ("o/r", "b.onnx", "refs/pr/3")


@pytest.mark.parametrize(
    "url", ["hf://owner/file", "hf://owner/repo/", "hf://o/r/../x.onnx", "hf://o/r/a//b", "hf://"]
)
def test_what_is_no_file_of_the_hub_is_refused(url):
    with pytest.raises(InvalidRequest, match="hf://owner/repo/file@revision"):
        hub.parts_of(url)


async def test_a_file_of_the_hub_comes_with_a_token_and_the_hubs_own_digest(
    source, another_source, fetch, monkeypatch
):
    async with another_source(CONTENT) as store:
        monkeypatch.setenv("HF_ENDPOINT", str(source.url.origin()))
        wanted = hub.on_the_hub("hf://owner/repo/a b.onnx@v1", "hf_geheim")
        source.redirects = {"/owner/repo/resolve/v1/a b.onnx": str(store.url)}
        source.more = {hub.DIGEST_HEADER: f'"{DIGEST}"'}
        fetched = await fetch(
            wanted.url, headers=wanted.headers, digest_header=wanted.digest_header
        )
        assert (fetched.file_name, fetched.checksum) == ("a b.onnx", DIGEST)
        assert source.asked[0]["Authorization"] == "Bearer hf_geheim"
        assert "Authorization" not in store.asked[0]
        store.content, store.etag = CONTENT[::-1], '"two"'
        with pytest.raises(Unprocessable, match="SHA-256"):
            await fetch(wanted.url, headers=wanted.headers, digest_header=wanted.digest_header)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(Unprocessable, match=r"pip install 'bkg\[hub\]'"):
        hub.on_the_hub("hf://owner/repo/b.onnx", None)

"""Who outside may be asked for a model."""

import ipaddress
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from bus.errors import InvalidRequest, NotAllowed
from services.candle.fetching.outside import (
    DeniedError,
    Door,
    on_the_internet,
    parsed,
    proxy_for,
    rules_from,
    shown,
    trusted,
)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.255.255.254", "0.0.0.1", "10.1.2.3", "172.16.0.1", "172.31.255.255",
        "192.168.1.1", "169.254.169.254", "100.64.0.1", "100.127.255.255", "192.0.0.8",
        "198.18.0.1", "203.0.113.9", "224.0.0.1", "239.255.255.250", "240.0.0.1",
        "255.255.255.255", "::", "::1", "fe80::1", "fec0::1", "fc00::1", "fd00::1", "ff02::1",
        "::ffff:127.0.0.1", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "64:ff9b::7f00:1",
        "64:ff9b:1::1", "2002:7f00:1::", "2001::1", "2001:db8::1", "100::1", "3fff::1",
        "::127.0.0.1",
    ],
)  # fmt: skip
def test_an_address_that_is_not_of_the_internet_is_denied(address):
    host = f"[{address}]" if ":" in address else address
    with pytest.raises(NotAllowed, match="import_allow can name it"):
        rules_from().check_url(URL(f"http://{host}/m.onnx"))


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "1.1.1.1", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "2a00:1450::200e"],
)
def test_an_address_of_the_internet_may_be_asked(address):
    host = f"[{address}]" if ":" in address else address
    rules_from().check_url(URL(f"https://{host}/m.onnx"))


@given(st.ip_addresses(v=4))
def test_what_carries_a_private_address_is_denied_as_that_is(inner):
    """Even where the carrying network itself is allowed."""
    rules = rules_from(allow=["64:ff9b::/96", "::ffff:0:0/96"])
    for outer in (f"64:ff9b::{inner}", f"::ffff:{inner}"):
        address = ipaddress.ip_address(outer)
        if on_the_internet(inner):
            rules.check_address("name", address)
        else:
            with pytest.raises(NotAllowed):
                rules.check_address("name", address)


@given(st.ip_addresses())
def test_the_deny_list_comes_before_every_other(address):
    rules = rules_from(allow=["*"], only=["*"], deny=[str(address)])
    with pytest.raises(NotAllowed, match="import_deny"):
        rules.check_address("name", address)


def test_import_allow_lets_a_private_network_or_a_name_be_asked():
    rules = rules_from(allow=["127.0.0.0/8", "models.lan", "*.house.lan"])
    rules.check_url(URL("http://127.0.0.1:8000/m.onnx"))
    for name in ("models.lan", "a.house.lan"):
        rules.check_address(name, ipaddress.ip_address("10.0.0.1"))
    for name in ("other.lan", "house.lan", "xhouse.lan"):
        with pytest.raises(NotAllowed, match=rf"{name} \(10\.0\.0\.1\)"):
            rules.check_address(name, ipaddress.ip_address("10.0.0.1"))


def test_import_only_leaves_nobody_else():
    rules = rules_from(only=["*.example.org"])
    rules.check_url(URL("https://cdn.example.org/m.onnx"))
    rules.check_url(URL("https://CDN.Example.ORG./m.onnx"))
    with pytest.raises(NotAllowed, match="import_only does not name example"):
        rules.check_url(URL("https://example.com/m.onnx"))
    with pytest.raises(NotAllowed, match="import_only"):
        rules.check_url(URL("https://8.8.8.8/m.onnx"))


def test_offline_nobody_is_asked():
    with pytest.raises(NotAllowed, match="import_offline is set"):
        rules_from(offline=True).check_url(URL("https://example.org/m.onnx"))


@pytest.mark.parametrize("url", ["ftp://example.org/m.onnx", "file:///etc/passwd", "m.onnx"])
def test_only_http_is_spoken(url):
    with pytest.raises(InvalidRequest, match="allowed are https://, http:// and hf://"):
        rules_from().check_url(URL(url))


@pytest.mark.parametrize("entry", ["", "a b", "10.0.0.0/33", "http://a.org", "*a.org", "a.*"])
def test_a_setting_that_is_no_host_is_named(entry):
    with pytest.raises(InvalidRequest, match=r"import_deny\[1\]"):
        rules_from(deny=["a.org", entry])


def test_a_socket_is_made_for_an_allowed_address_only():
    door = Door(rules_from(deny=["1.1.1.1"]), "name.example")
    with pytest.raises(DeniedError):
        door.socket((socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", 80)))
    assert door.denied
    assert door.passed == 0
    door.socket((socket.AF_INET, socket.SOCK_STREAM, 6, "", ("8.8.8.8", 80))).close()
    assert door.passed == 1


def test_a_password_leaves_the_address_and_is_shown_nowhere():
    url, secret = parsed("https://ann:pa%40ss@example.org/m.onnx?sig=abc#x")
    assert secret == "ann:pa@ss"
    assert str(url) == "https://example.org/m.onnx?sig=abc"
    assert shown(url) == "https://example.org/m.onnx"


@pytest.mark.parametrize(
    "text", ["http://ann:geheim@[::1/", "http://ann:geheim@a:99999999/", "https://ann:geheim@a b/"]
)
def test_an_address_that_cannot_be_read_is_not_repeated(text):
    with pytest.raises(InvalidRequest) as refused:
        parsed(text)
    assert "geheim" not in refused.value.message


@given(st.text())
def test_whatever_is_given_as_an_address_is_read_or_refused(text):
    try:
        url, _ = parsed(text)
        rules_from().check_url(url)
        shown(url)
    except (InvalidRequest, NotAllowed):
        pass


def test_the_environment_names_the_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    assert proxy_for(URL("https://a.org/")) is None
    monkeypatch.setenv("https_proxy", "http://proxy.lan:3128")
    monkeypatch.setenv("no_proxy", "b.org")
    assert proxy_for(URL("https://a.org/")) == URL("http://proxy.lan:3128")
    assert proxy_for(URL("https://b.org/")) is None
    assert proxy_for(URL("http://a.org/")) is None


def test_a_file_of_authorities_that_has_none_is_named(tmp_path):
    (tmp_path / "ca.pem").write_text("nothing")
    for name in ("ca.pem", "missing.pem"):
        with pytest.raises(InvalidRequest, match=f"import_ca_file.*{name}"):
            trusted(str(tmp_path / name))

"""Who outside may be asked for a model: rules for names and addresses, and sockets that keep them.

A name says little: it may resolve to an address of the house, and to another one a moment later. So
names are judged before anything is asked, and addresses where the socket is made, for each attempt
of each connection. What leads to a denied address never gets a packet.
"""

import errno
import ipaddress
import re
import socket
import ssl
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from yarl import URL

from bus.errors import InvalidRequest, NotAllowed

PORTS: Final = {"http": 80, "https": 443}

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# The IANA registry of special-purpose addresses, written out: what `ipaddress` calls global differs
# between releases of Python 3.11. Of IPv6 only 2000::/3 is given to hosts of the Internet, so that
# loopback, link-local, unique local, multicast, mapped and NAT64 addresses lie outside anyway.
_SPECIAL: Final = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16",
        "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16",
        "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
        "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20",
    )
)  # fmt: skip
_INTERNET_V6: Final = ipaddress.IPv6Network("2000::/3")
_NAT64: Final = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("64:ff9b:1::/48"))
_PATTERN: Final = re.compile(r"(?:\*|(?:\*\.)?[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_])?)")


class DeniedError(OSError):
    """An address that may not be connected to; an `OSError`, so that the next one is tried."""


@dataclass(frozen=True)
class Hosts:
    """Some names and networks, as people write them into settings."""

    names: tuple[str, ...] = ()
    networks: tuple[Network, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.names or self.networks)

    def names_it(self, host: str) -> bool:
        """Tell whether a pattern fits a name: `a.org` that name, `*.a.org` all below it."""
        return any(
            pattern in ("*", host) or (pattern[0] == "*" and host.endswith(pattern[1:]))
            for pattern in self.names
        )

    def hold(self, address: Address) -> bool:
        """Tell whether an address is in one of the networks."""
        return any(address in network for network in self.networks)


@dataclass(frozen=True)
class Rules:
    """Who may be asked.

    Attributes:
        allow: These may have addresses that are not of the Internet.
        deny: These are never asked.
        only: If there are any, nobody else is asked.
        offline: Nobody is asked at all.
    """

    allow: Hosts = field(default_factory=Hosts)
    deny: Hosts = field(default_factory=Hosts)
    only: Hosts = field(default_factory=Hosts)
    offline: bool = False

    def check_url(self, url: URL) -> None:
        """Judge an address before anything is asked, by its scheme, its name or its literal.

        Raises:
            NotAllowed: It may not be asked; says by which rule.
            InvalidRequest: It is none of http or https.
        """
        if self.offline:
            raise NotAllowed(
                "import_offline is set: nothing is fetched from elsewhere; upload the file, or put "
                "it into the models folder",
                field="url",
            )
        if url.scheme not in PORTS or not url.host:
            raise InvalidRequest(
                f"url: {shown(url)} is no address that can be fetched; allowed are https://, "
                "http:// and hf://",
                field="url",
            )
        host = name_in(url)
        if address := address_in(host):
            self.check_address(host, address)
            return
        if self.deny.names_it(host):
            raise NotAllowed(f"import_deny forbids to ask {host}", field="url")
        if self.only and not self.only.networks and not self.only.names_it(host):
            raise NotAllowed(f"import_only does not name {host}", field="url")

    def check_address(self, host: str, address: Address) -> None:
        """Judge the address that a name has led to, or that stands in its place.

        An address that carries another one (mapped, NAT64) has to pass as both.

        Raises:
            NotAllowed: It may not be asked; says by which rule.
        """
        said = str(address) if host == str(address) else f"{host} ({address})"
        if self.deny.hold(address) or self.deny.names_it(host):
            raise NotAllowed(f"import_deny forbids to ask {said}", field="url")
        if self.only and not (self.only.names_it(host) or self.only.hold(address)):
            raise NotAllowed(f"import_only does not name {said}", field="url")
        if not on_the_internet(address) and not (
            self.allow.hold(address) or self.allow.names_it(host)
        ):
            raise NotAllowed(
                f"{said} is no address of the Internet; import_allow can name it, or its network",
                field="url",
            )
        if (inner := _carried(address)) is not None:
            self.check_address(host, inner)


class Door:
    """Makes the sockets of one attempt to fetch, and remembers whom it has turned away.

    Args:
        rules: Who may be asked.
        host: By which name.
    """

    def __init__(self, rules: Rules, host: str) -> None:
        self._rules = rules
        self._host = host
        self.passed = 0
        self.denied: NotAllowed | None = None

    def socket(self, found: tuple[Any, ...]) -> socket.socket:
        """Return a socket for an entry of `getaddrinfo`; aiohttp's `socket_factory`.

        Raises:
            DeniedError: The address may not be asked.
        """
        family, kind, protocol, _, where = found
        try:
            self._rules.check_address(self._host, ipaddress.ip_address(where[0].partition("%")[0]))
        except NotAllowed as error:
            self.denied = error
            raise DeniedError(errno.EACCES, error.message) from None
        self.passed += 1
        return socket.socket(family, kind, protocol)


def rules_from(
    allow: Iterable[str] = (),
    deny: Iterable[str] = (),
    only: Iterable[str] = (),
    *,
    offline: bool = False,
) -> Rules:
    """Return the rules that settings make.

    Raises:
        InvalidRequest: An entry is neither a name, a pattern, an address nor a network.
    """
    return Rules(
        allow=_hosts(allow, "import_allow"),
        deny=_hosts(deny, "import_deny"),
        only=_hosts(only, "import_only"),
        offline=offline,
    )


def parsed(text: str) -> tuple[URL, str | None]:
    """Return an address without user and password, and those as `user:password`.

    Raises:
        InvalidRequest: It cannot be read.
    """
    try:
        url = URL(text.strip())
        port, secret = url.port, None
        if url.user is not None or url.password is not None:
            secret = f"{url.user or ''}:{url.password or ''}"
            url = url.with_user(None)
    except ValueError:
        port = 0
    if port == 0 or any(c.isspace() or not c.isprintable() for c in text.strip()):
        # Not the text itself: what cannot be read may be a password.
        raise InvalidRequest(
            "url: cannot be read as an address; example: https://example.org/model.onnx",
            field="url",
        )
    return url.with_fragment(None), secret


def shown(url: URL) -> str:
    """Return an address as it may stand in errors and logs: without query, user and password."""
    try:
        return str(url.with_user(None).with_query(None).with_fragment(None))
    except ValueError:
        # An address without a host.
        return f"{url.scheme}:{url.path}"[:200]


def name_in(url: URL) -> str:
    """Return the host of an address as it is compared: lower case, ASCII, without a last dot."""
    return (url.raw_host or "").lower().rstrip(".")


def address_in(host: str) -> Address | None:
    """Return the IP address that a text is, or None for a name."""
    try:
        return ipaddress.ip_address(host.partition("%")[0].strip("[]"))
    except ValueError:
        return None


def on_the_internet(address: Address) -> bool:
    """Tell whether an address is one that hosts of the Internet have."""
    if isinstance(address, ipaddress.IPv6Address) and address not in _INTERNET_V6:
        return False
    return not any(address in network for network in _SPECIAL if network.version == address.version)


def proxy_for(url: URL) -> URL | None:
    """Return the proxy that the environment names for an address, or None.

    By `https_proxy`, `http_proxy`, `all_proxy` and `no_proxy`.
    """
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass(f"{url.host}:{url.port}"):
        return None
    return URL(proxy if "://" in proxy else f"http://{proxy}")


def trusted(ca_file: str | None) -> ssl.SSLContext:
    """Return whom to trust: the system's authorities, or `SSL_CERT_FILE`; and those of a file.

    Raises:
        InvalidRequest: The file cannot be read, or has no certificate in it.
    """
    context = ssl.create_default_context()
    if ca_file is not None:
        try:
            context.load_verify_locations(cafile=Path(ca_file))
        except (OSError, ssl.SSLError) as error:
            why = getattr(error, "strerror", None) or "no certificate in it"
            raise InvalidRequest(
                f"import_ca_file: {ca_file!r} cannot be used: {why}", field="import_ca_file"
            ) from None
    return context


def _hosts(texts: Iterable[str], setting: str) -> Hosts:
    names: list[str] = []
    networks: list[Network] = []
    for i, text in enumerate(texts):
        one = text.strip().lower().rstrip(".")
        try:
            networks.append(ipaddress.ip_network(one.strip("[]"), strict=False))
            continue
        except ValueError:
            pass
        try:
            one = one.encode("idna").decode() if not one.isascii() else one
        except UnicodeError:
            one = ""
        if not _PATTERN.fullmatch(one):
            raise InvalidRequest(
                f"{setting}[{i}]: {text[:80]!r} is no host; allowed are names (models.lan), "
                "patterns (*.example.org), addresses and networks (10.0.0.0/8)",
                field=f"{setting}[{i}]",
            )
        names.append(one)
    return Hosts(tuple(names), tuple(networks))


def _carried(address: Address) -> ipaddress.IPv4Address | None:
    """Return the IPv4 address that an IPv6 one stands for."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if any(address in network for network in _NAT64):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return None

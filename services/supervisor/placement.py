"""Which host runs which replica: worked out alike by every supervisor, so that none has to lead.

Rendezvous hashing (Thaler and Ravishankar, 1998): each place prefers the hosts in an order of its
own, so that a host that comes or goes moves few replicas. With a bound on the load of each host
(Mirrokni, Thorup and Zadimoghaddam, 2016), because the plain method puts both of two replicas on
one host half of the time, and the loss of that host is then the loss of the plugin.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache


@dataclass(frozen=True)
class Host:
    """A host that is there.

    Attributes:
        labels: What plugins can require.
        draining: Whether it takes no replicas.
        room_bytes: Memory that is free for more.
    """

    labels: Mapping[str, str] = field(default_factory=dict)
    draining: bool = False
    room_bytes: int = 0


def placed(
    plugin: str, replicas: int, requires: Mapping[str, str], hosts: Mapping[str, Host]
) -> list[str | None]:
    """Return the host of each slot, and of one more, which a roll-out may need for a while.

    No host has more than its share of the replicas, rounded up. None stands for a slot for which
    no host fits.
    """
    fit = sorted(name for name, host in hosts.items() if _fits(host, requires))
    return list(_placed(plugin, replicas, tuple(fit))) if fit else [None] * (replicas + 1)


def why_unplaced(requires: Mapping[str, str], hosts: Mapping[str, Host]) -> str:
    """Return in words why no host fits."""
    if not hosts:
        return "no host is there"
    wanted = ", ".join(f"{key}={value}" for key, value in sorted(requires.items()))
    fitting = [name for name, host in hosts.items() if _has(host, requires)]
    if fitting:
        return f"no host takes replicas: {', '.join(sorted(fitting))} is being drained"
    return f"no host has the labels {wanted}; hosts: {', '.join(map(_told, sorted(hosts.items())))}"


# Asked at every tick, and nearly always the same.
@lru_cache(maxsize=1024)
def _placed(plugin: str, replicas: int, fit: tuple[str, ...]) -> tuple[str, ...]:
    share = math.ceil(replicas / len(fit))
    load = dict.fromkeys(fit, 0)
    chosen: list[str] = []
    for slot in range(replicas):
        ranks = {name: _rank(name, plugin, slot) for name in fit if load[name] < share}
        best = max(ranks, key=ranks.__getitem__)
        load[best] += 1
        chosen.append(best)
    extra = {name: (-load[name], _rank(name, plugin, replicas)) for name in fit}
    return (*chosen, max(extra, key=extra.__getitem__))


def _fits(host: Host, requires: Mapping[str, str]) -> bool:
    return not host.draining and _has(host, requires)


def _has(host: Host, requires: Mapping[str, str]) -> bool:
    return all(host.labels.get(key) == value for key, value in requires.items())


def _told(named: tuple[str, Host]) -> str:
    name, host = named
    labels = ", ".join(f"{key}={value}" for key, value in sorted(host.labels.items()))
    return f"{name} ({labels or 'no labels'})"


def _rank(host: str, plugin: str, slot: int) -> bytes:
    # With separators, so that no two triples read alike; the name breaks a tie of digests.
    said = f"{host}\0{plugin}\0{slot}".encode()
    return hashlib.blake2b(said, digest_size=8).digest() + host.encode()

"""Where replicas go: alike for everyone, spread, and moved rarely."""

import math

from hypothesis import given
from hypothesis import strategies as st

from services.supervisor.placement import Host, placed, why_unplaced

names = st.text("abcdefgh-", min_size=1, max_size=8)
host_sets = st.sets(names, min_size=1, max_size=8)


def of(*hosts: str) -> dict[str, Host]:
    return {name: Host() for name in hosts}


@given(names, st.integers(1, 12), host_sets, st.randoms())
def test_every_supervisor_finds_the_same_places(plugin, replicas, hosts, random):
    shuffled = list(hosts)
    random.shuffle(shuffled)
    assert placed(plugin, replicas, {}, of(*hosts)) == placed(plugin, replicas, {}, of(*shuffled))


@given(names, st.integers(1, 12), host_sets)
def test_no_host_has_more_than_its_share(plugin, replicas, hosts):
    *chosen, extra = placed(plugin, replicas, {}, of(*hosts))
    share = math.ceil(replicas / len(hosts))
    assert all(chosen.count(host) <= share for host in hosts)
    assert chosen.count(extra) == min(chosen.count(host) for host in hosts)


def test_a_host_that_joins_moves_few_replicas_and_one_that_leaves_hardly_more_than_its_own():
    moved = left = total = 0
    for plugin in (f"plugin-{i}" for i in range(50)):
        before = placed(plugin, 20, {}, of("a", "b", "c", "d"))[:-1]
        more = placed(plugin, 20, {}, of("a", "b", "c", "d", "e"))[:-1]
        fewer = placed(plugin, 20, {}, of("a", "b", "c"))[:-1]
        total += 20
        moved += sum(x != y for x, y in zip(before, more, strict=True))
        left += sum(x not in (y, "d") for x, y in zip(before, fewer, strict=True))
    # A fifth has to move; plain hashing modulo the hosts would move four fifths.
    assert moved < total * 0.35
    assert left < total * 0.15


def test_only_hosts_with_the_labels_that_do_not_drain_are_chosen():
    hosts = {
        "plain": Host(),
        "gpu": Host({"gpu": "yes", "zone": "cellar"}),
        "other": Host({"gpu": "no"}),
        "leaving": Host({"gpu": "yes"}, draining=True),
    }
    assert placed("candle", 3, {"gpu": "yes"}, hosts) == ["gpu"] * 4
    assert set(placed("candle", 6, {}, hosts)) == {"plain", "gpu", "other"}


def test_a_place_for_which_no_host_fits_has_none_and_the_reason_is_told():
    hosts = {"a": Host({"gpu": "no"}), "b": Host()}
    assert placed("candle", 2, {"gpu": "yes"}, hosts) == [None, None, None]
    assert why_unplaced({"gpu": "yes"}, hosts) == (
        "no host has the labels gpu=yes; hosts: a (gpu=no), b (no labels)"
    )
    draining = {"a": Host({"gpu": "yes"}, draining=True), "b": Host()}
    assert why_unplaced({"gpu": "yes"}, draining) == ("no host takes replicas: a is being drained")
    assert why_unplaced({}, {}) == "no host is there"

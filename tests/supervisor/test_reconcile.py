"""The rules of a replica's life, by table, and by a whole cluster that hypothesis drives."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.supervisor.placement import Host
from services.supervisor.reconcile import (
    BACKOFF_MAX_S,
    SILENCE_S,
    STARTUP_GRACE_S,
    STARTUP_MAX_S,
    STOP_GRACE_S,
    Forget,
    Key,
    Kill,
    Seen,
    Start,
    Stop,
    Wanted,
    backoff_s,
    reconcile,
)

C0, C1, C2 = (Key("candle", slot) for slot in range(3))
NOW = 1_000.0
NO_ROOM = 10**18


def seen(phase: str, generation: int = 1, ago: float = 0.0, **more: object) -> Seen:
    return Seen(phase, generation, NOW - ago, **{"host": "a", "heard": NOW, **more})


def decide(replicas: int, there: dict[Key, Seen], generation: int = 1, *, room: bool = False):
    """What the only host does for candle."""
    wanted = Wanted(generation, replicas, replica_bytes=0 if room else NO_ROOM)
    return reconcile("a", {"candle": wanted} if replicas else {}, there, {"a": Host()}, NOW)


@pytest.mark.parametrize(
    ("replicas", "generation", "there", "actions"),
    [
        # What is wanted and not there is started, and the other way round.
        (2, 1, {}, [Start(C0, 1), Start(C1, 1)]),
        (0, 1, {C0: seen("running"), C1: seen("starting")}, [Stop(C0), Stop(C1)]),
        (0, 1, {C0: seen("stopping"), C1: seen("ended", crashes=4)}, [Forget(C1)]),
        (1, 1, {C0: seen("running"), C1: seen("running")}, [Stop(C1)]),
        # All is well.
        (1, 1, {C0: seen("running")}, []),
        (1, 1, {C0: seen("starting", ago=STARTUP_GRACE_S - 1)}, []),
        # One that beats while it starts is slow, not hung.
        (1, 1, {C0: seen("starting", ago=STARTUP_GRACE_S + 1)}, []),
        # One that ended waits, longer each time.
        (1, 1, {C0: seen("ended", crashes=1, ago=0.4)}, []),
        (1, 1, {C0: seen("ended", crashes=1, ago=0.6)}, [Start(C0, 1)]),
        (1, 1, {C0: seen("ended", crashes=4, ago=3.9)}, []),
        (1, 1, {C0: seen("ended", crashes=4, ago=4.1)}, [Start(C0, 1)]),
        (1, 1, {C0: seen("ended", crashes=0)}, [Start(C0, 1)]),
        # A newer generation does not wait for the old one's pause.
        (1, 2, {C0: seen("ended", crashes=9)}, [Start(C0, 2)]),
        (1, 2, {C0: seen("starting")}, [Stop(C0)]),
        # Without room a restart replaces one replica at a time, while every other one runs.
        (2, 2, {C0: seen("running"), C1: seen("running")}, [Stop(C0)]),
        (2, 2, {C0: seen("stopping"), C1: seen("running")}, []),
        (2, 2, {C0: seen("starting", 2), C1: seen("running")}, []),
        (2, 2, {C0: seen("running", 2), C1: seen("running")}, [Stop(C1)]),
        (2, 2, {C0: seen("ended", 2, crashes=3), C1: seen("running")}, []),
        (2, 2, {C1: seen("running")}, [Start(C0, 2)]),
    ],
)
def test_the_rules_on_one_host(replicas, generation, there, actions):
    assert decide(replicas, there, generation) == actions


@pytest.mark.parametrize(
    ("there", "actions"),
    [
        # With room one more is there before the first one leaves, and leaves when all are new.
        ({C0: seen("running"), C1: seen("running")}, [Start(C2, 2)]),
        ({C0: seen("running"), C1: seen("running"), C2: seen("starting", 2)}, []),
        ({C0: seen("running"), C1: seen("running"), C2: seen("running", 2)}, [Stop(C0)]),
        ({C0: seen("starting", 2), C1: seen("running"), C2: seen("running", 2)}, []),
        ({C0: seen("running", 2), C1: seen("running"), C2: seen("running", 2)}, [Stop(C1)]),
        ({C0: seen("running", 2), C1: seen("running", 2), C2: seen("running", 2)}, [Stop(C2)]),
        # It does not come up: all the others stay.
        ({C0: seen("running"), C1: seen("running"), C2: seen("ended", 2, crashes=3)}, []),
        # Nor does the first that was replaced: it goes no further.
        ({C0: seen("ended", 2, crashes=3), C1: seen("running"), C2: seen("running", 2)}, []),
    ],
)
def test_a_restart_with_room_never_has_fewer_than_all(there, actions):
    assert decide(2, there, generation=2, room=True) == actions


@pytest.mark.parametrize(
    ("there", "why"),
    [
        (seen("starting", ago=99, heard=NOW - STARTUP_GRACE_S - 1), "gave no sign of life"),
        (seen("starting", ago=STARTUP_MAX_S + 1), "did not get ready"),
        (seen("running", ago=99, heard=NOW - SILENCE_S - 1), "no sign of life"),
        (seen("stopping", ago=STOP_GRACE_S + 1), "did not stop"),
        (seen("running", fault="took too much memory"), "too much memory"),
        (seen("starting", fault="took too much memory"), "too much memory"),
    ],
)
def test_what_does_not_go_on_is_killed_and_the_reason_said(there, why):
    [action] = decide(1, {C0: there})
    assert isinstance(action, Kill)
    assert why in action.why


def test_the_pause_doubles_up_to_a_cap():
    assert [backoff_s(n) for n in range(6)] == [0, 0.5, 1, 2, 4, 8]
    assert backoff_s(7) == backoff_s(10_000) == BACKOFF_MAX_S


def test_a_host_leaves_alone_what_is_on_another_one():
    hosts = {"a": Host(), "b": Host()}
    there = {C0: seen("running", host="b"), C1: seen("stopping", host="b", ago=99)}
    wanted = {"candle": Wanted(1, 2)}
    assert [a for a in reconcile("a", wanted, there, hosts, NOW) if a.key in there] == []


def test_what_a_host_had_that_is_gone_is_started_elsewhere():
    there = {C0: seen("running", host="gone"), C1: seen("running")}
    actions = reconcile("a", {"candle": Wanted(1, 2)}, there, {"a": Host()}, NOW)
    assert actions == [Start(C0, 1)]


def test_where_no_host_fits_nothing_is_started_and_what_is_there_is_stopped():
    wanted = {"candle": Wanted(1, 2, requires={"gpu": "yes"})}
    hosts = {"a": Host({"gpu": "no"})}
    assert reconcile("a", wanted, {}, hosts, NOW) == []
    assert reconcile("a", wanted, {C0: seen("running")}, hosts, NOW) == [Stop(C0)]


class Cluster:
    """Hosts whose processes do what they are told, and supervisors that all see the same."""

    def __init__(self) -> None:
        self.hosts: dict[str, Host] = {}
        self.wanted: dict[str, Wanted] = {}
        self.there: dict[Key, Seen] = {}
        self.broken: set[tuple[str, int]] = set()
        self.now = NOW
        self.fewest: dict[str, int] = {}

    def running(self, plugin: str) -> int:
        return sum(k.plugin == plugin and s.phase == "running" for k, s in self.there.items())

    def round(self, order: list[str] | None = None) -> bool:
        """Let each host act once, then the processes; return whether anything was done."""
        self.now += 1.0
        acted = False
        for host in order or sorted(self.hosts):
            if host in self.hosts:
                for action in reconcile(host, self.wanted, self.there, self.hosts, self.now):
                    self._carry_out(host, action)
                    acted = True
        for key, one in list(self.there.items()):
            self._go_on(key, one)
        return acted

    def lose(self, host: str) -> None:
        self.hosts.pop(host)
        self.there = {key: one for key, one in self.there.items() if one.host != host}

    def settle(self) -> None:
        for _ in range(600):
            if not self.round() and all(s.phase == "running" for s in self.there.values()):
                return
        raise AssertionError((self.wanted, self.there, self.hosts))

    def _carry_out(self, host: str, action: Start | Stop | Kill | Forget) -> None:
        key = action.key
        before = self.there.get(key)
        match action:
            case Start(_, generation):
                # Never two processes in one place, on whichever hosts.
                assert before is None or (before.phase == "ended" and before.host == host)
                crashes = before.crashes if before and before.generation == generation else 0
                self.there[key] = Seen("starting", generation, self.now, host, crashes, self.now)
            case Stop() | Kill():
                assert before
                assert before.host == host
                assert before.phase in ("starting", "running")
                if before.phase == "running" and key.plugin in self.wanted:
                    left = self.running(key.plugin) - 1
                    self.fewest[key.plugin] = min(self.fewest.get(key.plugin, left), left)
                self.there[key] = Seen("stopping", before.generation, self.now, host, 0, self.now)
            case Forget():
                assert before
                assert before.host == host
                assert before.phase == "ended"
                del self.there[key]

    def _go_on(self, key: Key, one: Seen) -> None:
        phase, crashes = one.phase, one.crashes
        if phase == "starting":
            fails = (key.plugin, one.generation) in self.broken
            phase, crashes = ("ended", crashes + 1) if fails else ("running", crashes)
        elif phase == "stopping":
            phase = "ended"
        since = one.since if phase == one.phase else self.now
        self.there[key] = Seen(phase, one.generation, since, one.host, crashes, self.now)


PLUGINS = ("candle", "rustyface")
NAMES = tuple("abcdef")
labels = st.sampled_from([{}, {"gpu": "yes"}, {"gpu": "no"}])
requires = st.sampled_from([{}, {}, {"gpu": "yes"}])


names, plugins = st.sampled_from(NAMES), st.sampled_from(PLUGINS)
happenings = st.one_of(
    st.tuples(st.just("join"), names, labels, st.sampled_from([0, 10])),
    st.tuples(st.just("lose"), names),
    st.tuples(st.just("drain"), names, st.booleans()),
    st.tuples(st.just("want"), plugins, st.integers(0, 5), st.booleans(), requires),
    st.tuples(st.just("switch off"), plugins),
    st.tuples(st.just("crash"), st.builds(Key, plugins, st.integers(0, 5))),
)


def happen(cluster: Cluster, what: str, *more: object) -> None:
    match what, *more:
        case "join", name, labels, room:
            cluster.hosts.setdefault(name, Host(labels, room_bytes=room))
        case "lose", name if name in cluster.hosts and len(cluster.hosts) > 1:
            cluster.lose(name)
        case "drain", name, draining if name in cluster.hosts:
            host = cluster.hosts[name]
            cluster.hosts[name] = Host(host.labels, draining, host.room_bytes)
        case "want", plugin, replicas, newer, requires:
            before = cluster.wanted.get(plugin, Wanted(1, 0))
            cluster.wanted[plugin] = Wanted(before.generation + newer, replicas, requires, 5)
        case "switch off", plugin:
            cluster.wanted.pop(plugin, None)
        case "crash", key if key in cluster.there and cluster.there[key].phase != "ended":
            one = cluster.there[key]
            cluster.there[key] = Seen(
                "ended", one.generation, cluster.now, one.host, one.crashes + 1
            )


@settings(max_examples=300)
@given(
    st.lists(
        st.tuples(happenings, st.lists(st.permutations(NAMES), max_size=3)),
        min_size=1, max_size=12,
    )
)  # fmt: skip
def test_whatever_happens_no_place_has_two_processes_and_all_comes_right(story):
    """In `Cluster.round` each start is checked; here the end is."""
    cluster = Cluster()
    cluster.hosts = {"a": Host({"gpu": "yes"}, room_bytes=10), "b": Host(room_bytes=10)}
    cluster.wanted = {"candle": Wanted(1, 3, replica_bytes=5), "rustyface": Wanted(1, 1)}
    cluster.settle()
    for happening, orders in story:
        happen(cluster, *happening)
        for order in orders:
            cluster.round(order)
    cluster.settle()
    for plugin in PLUGINS:
        wanted = cluster.wanted.get(plugin, Wanted(0, 0))
        fit = {
            name
            for name, host in cluster.hosts.items()
            if not host.draining and wanted.requires.items() <= host.labels.items()
        }
        running = {k.slot: s for k, s in cluster.there.items() if k.plugin == plugin}
        assert set(running) == (set(range(wanted.replicas)) if fit else set())
        assert {one.generation for one in running.values()} <= {wanted.generation}
        assert {one.host for one in running.values()} <= fit


def steady(hosts: int, replicas: int, *, room: bool) -> Cluster:
    cluster = Cluster()
    cluster.hosts = {NAMES[i]: Host(room_bytes=10 if room else 0) for i in range(hosts)}
    cluster.wanted = {"candle": Wanted(1, replicas, replica_bytes=5)}
    cluster.settle()
    return cluster


def renewed(cluster: Cluster) -> None:
    wanted = cluster.wanted["candle"]
    cluster.wanted["candle"] = Wanted(wanted.generation + 1, wanted.replicas, replica_bytes=5)


@given(
    st.integers(1, 4), st.integers(1, 5), st.booleans(),
    st.lists(
        st.tuples(st.sampled_from(["restart", "join", "drain"]), st.integers(0, 12)), max_size=4
    ),
)  # fmt: skip
def test_restarts_moves_and_drains_never_go_below_the_floor(hosts, replicas, room, disturbances):
    cluster = steady(hosts, replicas, room=room)
    for what, rounds in disturbances:
        awake = [name for name, host in cluster.hosts.items() if not host.draining]
        if what == "restart":
            renewed(cluster)
        elif what == "join":
            free = next(name for name in (*NAMES, "g", "h", "i") if name not in cluster.hosts)
            cluster.hosts[free] = Host(room_bytes=10 if room else 0)
        elif len(awake) > 1:
            host = cluster.hosts[awake[0]]
            cluster.hosts[awake[0]] = Host(host.labels, draining=True, room_bytes=host.room_bytes)
        for _ in range(rounds):
            cluster.round()
    cluster.settle()
    assert cluster.fewest.get("candle", replicas) >= replicas - (not room)


@given(st.integers(1, 3), st.integers(1, 5), st.booleans())
def test_a_generation_that_does_not_come_up_leaves_the_old_one_in_place(hosts, replicas, room):
    cluster = steady(hosts, replicas, room=room)
    renewed(cluster)
    cluster.broken.add(("candle", 2))
    for _ in range(100):
        cluster.round()
    assert cluster.running("candle") >= replicas - (not room)
    # The next one, which is sound, goes through.
    renewed(cluster)
    cluster.settle()
    assert {one.generation for one in cluster.there.values()} == {3}

"""The rules of a replica's life, by table and by property."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    backoff_s,
    reconcile,
)

C0, C1, C2 = (Key("candle", slot) for slot in range(3))
NOW = 1_000.0


def seen(phase: str, generation: int = 1, ago: float = 0.0, **more: float) -> Seen:
    return Seen(phase, generation, NOW - ago, **{"heard": NOW, **more})


@pytest.mark.parametrize(
    ("wanted", "there", "actions"),
    [
        # What is wanted and not there is started, and the other way round.
        ({C0: 1, C1: 1}, {}, [Start(C0, 1), Start(C1, 1)]),
        ({}, {C0: seen("running"), C1: seen("starting")}, [Stop(C0), Stop(C1)]),
        ({}, {C0: seen("stopping"), C1: seen("ended", crashes=4)}, [Forget(C1)]),
        ({C0: 1}, {C0: seen("running"), C1: seen("running")}, [Stop(C1)]),
        # All is well.
        ({C0: 1}, {C0: seen("running")}, []),
        ({C0: 1}, {C0: seen("starting", ago=STARTUP_GRACE_S - 1)}, []),
        # One that beats while it starts is slow, not hung.
        ({C0: 1}, {C0: seen("starting", ago=STARTUP_GRACE_S + 1)}, []),
        # One that ended waits, longer each time.
        ({C0: 1}, {C0: seen("ended", crashes=1, ago=0.4)}, []),
        ({C0: 1}, {C0: seen("ended", crashes=1, ago=0.6)}, [Start(C0, 1)]),
        ({C0: 1}, {C0: seen("ended", crashes=4, ago=3.9)}, []),
        ({C0: 1}, {C0: seen("ended", crashes=4, ago=4.1)}, [Start(C0, 1)]),
        ({C0: 1}, {C0: seen("ended", crashes=0)}, [Start(C0, 1)]),
        # A newer generation does not wait for the old one's pause.
        ({C0: 2}, {C0: seen("ended", crashes=9)}, [Start(C0, 2)]),
        ({C0: 2}, {C0: seen("starting")}, [Stop(C0)]),
        # A restart replaces one replica at a time, while every other one runs.
        ({C0: 2, C1: 2}, {C0: seen("running"), C1: seen("running")}, [Stop(C0)]),
        ({C0: 2, C1: 2}, {C0: seen("stopping"), C1: seen("running")}, []),
        ({C0: 2, C1: 2}, {C0: seen("starting", 2), C1: seen("running")}, []),
        ({C0: 2, C1: 2}, {C0: seen("running", 2), C1: seen("running")}, [Stop(C1)]),
        ({C0: 2, C1: 2}, {C0: seen("ended", 2, crashes=3), C1: seen("running")}, []),
        ({C0: 2, C1: 2}, {C1: seen("running")}, [Start(C0, 2)]),
    ],
)
def test_the_rules(wanted, there, actions):
    assert reconcile(wanted, there, NOW) == actions


@pytest.mark.parametrize(
    ("there", "why"),
    [
        (seen("starting", ago=99, heard=NOW - STARTUP_GRACE_S - 1), "gave no sign of life"),
        (seen("starting", ago=STARTUP_MAX_S + 1), "did not get ready"),
        (seen("running", ago=99, heard=NOW - SILENCE_S - 1), "no sign of life"),
        (seen("stopping", ago=STOP_GRACE_S + 1), "did not stop"),
    ],
)
def test_what_does_not_go_on_is_killed_and_the_reason_said(there, why):
    [action] = reconcile({C0: 1}, {C0: there}, NOW)
    assert isinstance(action, Kill)
    assert why in action.why


def test_the_pause_doubles_up_to_a_cap():
    assert [backoff_s(n) for n in range(6)] == [0, 0.5, 1, 2, 4, 8]
    assert backoff_s(7) == backoff_s(10_000) == BACKOFF_MAX_S


keys = st.builds(Key, st.sampled_from(["candle", "rustyface"]), st.integers(0, 3))
anything = st.builds(
    Seen,
    st.sampled_from(["starting", "running", "stopping", "ended"]),
    st.integers(1, 3),
    st.floats(NOW - 100, NOW),
    st.integers(0, 20),
    st.floats(NOW - 100, NOW),
)


@given(st.dictionaries(keys, st.integers(1, 3)), st.dictionaries(keys, anything))
def test_no_replica_has_two_processes_and_no_action_is_aimless(wanted, there):
    actions = reconcile(wanted, there, NOW)
    assert len({action.key for action in actions}) == len(actions)
    for action in actions:
        present = action.key in there and there[action.key].phase != "ended"
        match action:
            case Start():
                assert not present
                assert wanted[action.key] == action.generation
            case Stop() | Kill():
                assert present
            case Forget():
                assert not present
                assert action.key not in wanted


@given(st.dictionaries(keys, st.integers(1, 3)), st.dictionaries(keys, anything))
def test_a_restart_never_takes_two_running_replicas_of_a_plugin(wanted, there):
    stops = [
        action.key
        for action in reconcile(wanted, there, NOW)
        if isinstance(action, Stop)
        and action.key in wanted
        and there[action.key].phase == "running"
    ]
    assert len({key.plugin for key in stops}) == len(stops)
    for stop in stops:
        others = [key for key in wanted if key.plugin == stop.plugin and key != stop]
        assert all(there[key].phase == "running" for key in others)


@given(st.dictionaries(keys, st.integers(1, 3)), st.dictionaries(keys, anything))
def test_from_anywhere_it_converges_when_processes_do_what_they_are_told(wanted, there):
    now, state = NOW, dict(there)
    for _ in range(200):
        now += 1.0
        for key, one in list(state.items()):
            # A process that was started gets ready, one that was stopped ends, all are heard.
            phase = {"starting": "running", "stopping": "ended"}.get(one.phase, one.phase)
            since = one.since if phase == one.phase else now
            crashes = 0 if one.phase == "stopping" else one.crashes
            state[key] = Seen(phase, one.generation, since, crashes, now)
        actions = reconcile(wanted, state, now)
        for action in actions:
            match action:
                case Start(key, generation):
                    state[key] = Seen("starting", generation, now, 0, now)
                case Stop(key) | Kill(key, _):
                    state[key] = Seen("stopping", state[key].generation, now, 0, now)
                case Forget(key):
                    del state[key]
    assert {key: one.generation for key, one in state.items()} == wanted
    assert all(one.phase == "running" for one in state.values())

"""What is missing until a command has come true, without a clock and without a bus."""

from datetime import UTC, datetime

import pytest

from bus import messages as m
from bus.errors import Conflict
from services.supervisor.missing import until_scaled, until_started, until_stopped, until_taken

START = datetime(2026, 1, 1, tzinfo=UTC)
CONFIG = m.PluginConfig(name="w", description="", entrypoint="x", capabilities=[], replicas=2)


def wanted(generation=1, *, enabled=True):
    return m.DesiredState(
        config=CONFIG, enabled=enabled, generation=generation, changed_by="t", changed_at=START
    )


def place(slot, status="running", generation=1, **more: object):
    return m.InstanceState(
        slot=slot, host="h", status=status, since=START, restarts=0, generation=generation, **more
    )


def seen(*places: m.InstanceState, replicas=2, generation=1):
    return m.PluginState(
        name="w",
        status="running",
        capabilities=[],
        config=CONFIG,
        replicas=m.Replicas(desired=replicas, ready=0),
        instances=list(places),
        generation=generation,
        revision=1,
    )


@pytest.mark.parametrize(
    ("places", "missing"),
    [
        ([place(0), place(1)], None),
        ([place(0)], "replica 1 is not there yet"),
        ([place(0), place(1, "starting")], "replica 1 is starting"),
        ([place(0), place(1, "error", error="no such file")], "replica 1 is error (no such file)"),
        ([place(0), place(1), place(100, "starting")], None),
    ],
)
def test_a_plugin_has_started_when_all_its_replicas_run(places, missing):
    assert until_started(seen(*places), wanted(), 1) == missing


def test_a_roll_out_is_waited_for_replica_by_replica():
    state = seen(place(0, generation=2), place(1), generation=2)
    assert until_started(state, wanted(2), 1) == "replica 1 runs generation 1 still"


def test_a_roll_out_that_halts_says_why_first():
    failed = place(0, "error", generation=2, error="ended with status 1")
    said = until_started(seen(failed, place(1), generation=2), wanted(2), 1)
    assert said.startswith("the roll-out halts, because a replica of generation 2 does not come up")
    assert "replica 1 runs generation 1 still" in said


def test_a_plugin_has_stopped_when_nothing_is_left_but_what_was_started_by_hand():
    stopping = seen(place(0, "stopping"), place(100), replicas=0)
    assert until_stopped(stopping, wanted(enabled=False), 1) == "replica 0 is stopping"
    assert until_stopped(seen(place(100), replicas=0), wanted(enabled=False), 1) is None


def test_a_plugin_is_scaled_down_when_those_too_many_have_gone():
    state = seen(place(0), place(1, "stopping"), replicas=1)
    assert until_scaled(state, wanted(), 1) == "replica 1 is stopping still"
    assert until_scaled(seen(place(0), replicas=1), wanted(), 1) is None


def test_a_configuration_is_taken_when_all_that_tell_have_its_revision():
    old, silent = place(0, config_revision=6), place(1)
    said = until_taken(seen(old, silent), wanted(), 7)
    assert said == "replica 0 has the configuration of revision 6 still"
    assert until_taken(seen(place(0, config_revision=7), silent), wanted(), 7) is None


def test_who_waits_is_told_when_another_command_came_first():
    with pytest.raises(Conflict, match="stopped meanwhile"):
        until_started(seen(replicas=0, generation=2), wanted(1), 1)
    with pytest.raises(Conflict, match="started meanwhile"):
        until_stopped(seen(place(0), generation=2), wanted(1, enabled=False), 1)

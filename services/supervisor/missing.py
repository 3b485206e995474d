"""What is missing until a command has come true: from what is wanted and what was seen.

Each rule returns a sentence for who waits, and None when nothing is missing. Replicas that were
started by hand do not count.
"""

from bus.errors import Conflict
from bus.messages import DesiredState, PluginState
from bus.registration import FIRST_FREE_SLOT


def until_started(state: PluginState, desired: DesiredState, _revision: int) -> str | None:
    """Return what is missing until every replica runs a generation.

    Raises:
        Conflict: Another command has stopped the plugin since.
    """
    _check_not_overtaken(state, desired)
    return _until_ready(state, desired)


def until_stopped(state: PluginState, desired: DesiredState, _revision: int) -> str | None:
    """Return what is missing until no replica is left.

    Raises:
        Conflict: Another command has started the plugin since.
    """
    _check_not_overtaken(state, desired)
    left = [
        f"replica {place.slot} is {place.status}"
        for place in state.instances
        if place.slot < FIRST_FREE_SLOT
    ]
    return "; ".join(left) or None


def until_scaled(state: PluginState, desired: DesiredState, _revision: int) -> str | None:
    """Return what is missing until there are as many replicas as wanted, and not more."""
    missing = [_until_ready(state, desired)]
    missing += [
        f"replica {place.slot} is {place.status} still"
        for place in state.instances
        if state.replicas.desired <= place.slot < FIRST_FREE_SLOT
    ]
    return "; ".join(filter(None, missing)) or None


def until_taken(state: PluginState, desired: DesiredState, revision: int) -> str | None:
    """Return what is missing until every replica has a configuration, of those that tell."""
    missing = [until_scaled(state, desired, revision)]
    missing += [
        f"replica {place.slot} has the configuration of revision {place.config_revision} still"
        for place in state.instances
        if place.slot < state.replicas.desired and 0 < (place.config_revision or 0) < revision
    ]
    return "; ".join(filter(None, missing)) or None


def _until_ready(state: PluginState, desired: DesiredState) -> str | None:
    places = {place.slot: place for place in state.instances if place.slot < FIRST_FREE_SLOT}
    missing, old = [], []
    for slot in range(state.replicas.desired):
        there = places.get(slot)
        if there is None:
            missing.append(f"replica {slot} is not there yet")
        elif there.status != "running":
            said = f" ({there.error})" if there.error else ""
            missing.append(f"replica {slot} is {there.status}{said}")
        elif (there.generation or 0) < desired.generation:
            old.append(f"replica {slot} runs generation {there.generation} still")
    failed = next(
        (p for p in places.values() if p.error and (p.generation or 0) >= desired.generation), None
    )
    if failed and old:
        missing.insert(
            0,
            f"the roll-out halts, because a replica of generation {failed.generation} does not "
            f"come up ({failed.error})",
        )
    return "; ".join(missing + old) or None


def _check_not_overtaken(state: PluginState, desired: DesiredState) -> None:
    """Raise Conflict when a later command wants a plugin to stop that was started, or to run."""
    if state.generation <= desired.generation:
        return
    if desired.enabled and state.config and state.config.replicas and not state.replicas.desired:
        raise Conflict(f"{state.name} was stopped meanwhile by another command")
    if not desired.enabled and state.replicas.desired:
        raise Conflict(f"{state.name} was started meanwhile by another command")

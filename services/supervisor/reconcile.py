"""What to do next: from what is wanted and what was seen, without a clock and without I/O.

Every supervisor asks this for its own host, and all of them decide alike from the same buckets. All
rules of a replica's life stand here:

- Each slot has a host (`placement.py`). What is wanted there and runs nowhere is started; what is
  not wanted is stopped. What a host that is gone had counts as gone.
- One that ended by itself is started again after a pause that doubles with each end in a row.
- One that is silent although its process lives is killed; one that still starts may be silent for
  longer, because it builds or reads. Its end then counts like any other. One that beats is slow,
  not hung: it has much more time to get ready, but not for ever. One with a fault is killed too.
- A replica of another generation, or on another host than its slot's, is outdated. Outdated ones
  are replaced one after the other, the lowest slot first. Where there is memory for one more, a
  further slot is filled first and emptied last, so that never fewer than all run; else never fewer
  than all but one. One that does not come up stops the roll-out there, and the rest goes on with
  the old generation.
- Whoever does not stop when asked is killed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from services.supervisor.placement import Host, placed

# Silence while it starts: the time to load and register, or to compute without a beat.
STARTUP_GRACE_S: Final = 30.0
STARTUP_MAX_S: Final = 600.0
# More than the ten seconds in which an instance finishes its requests.
STOP_GRACE_S: Final = 15.0
SILENCE_S: Final = 10.0
BACKOFF_FIRST_S: Final = 0.5
BACKOFF_MAX_S: Final = 30.0
# One that ran for this long is well: its earlier ends are forgotten.
HEALTHY_S: Final = 60.0

Phase = Literal["starting", "running", "stopping", "ended"]


@dataclass(frozen=True, order=True)
class Key:
    """A replica: the plugin, and the number of its place."""

    plugin: str
    slot: int


@dataclass(frozen=True)
class Wanted:
    """What should be of a plugin.

    Attributes:
        generation: The generation that its replicas should run.
        replicas: How many there should be.
        requires: Labels that a host must have.
        replica_bytes: Memory that one more needs while the others are replaced.
    """

    generation: int
    replicas: int = 1
    requires: Mapping[str, str] = field(default_factory=dict)
    replica_bytes: int = 0


@dataclass(frozen=True)
class Seen:
    """A replica as it was last seen.

    Attributes:
        phase: `ended` is a process that is gone while its place is remembered.
        generation: The generation that it was started for.
        since: When it entered the phase, in monotonic seconds; counts on its own host alone.
        host: Where it is.
        crashes: How often in a row it ended by itself.
        heard: When it was last heard of; counts while it starts and runs.
        fault: Why it has to be replaced though it gives signs of life: it fails its health
            checks, or takes more memory than it may.
    """

    phase: Phase
    generation: int
    since: float
    host: str
    crashes: int = 0
    heard: float = 0.0
    fault: str | None = None


@dataclass(frozen=True)
class Start:
    """Start a process for a place."""

    key: Key
    generation: int


@dataclass(frozen=True)
class Stop:
    """Ask a process to end."""

    key: Key


@dataclass(frozen=True)
class Kill:
    """End a process."""

    key: Key
    why: str


@dataclass(frozen=True)
class Forget:
    """Remember a place no longer."""

    key: Key


Action = Start | Stop | Kill | Forget


def backoff_s(crashes: int) -> float:
    """Return the pause before the next start after so many ends in a row."""
    if crashes <= 0:
        return 0.0
    return float(min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2 ** min(crashes - 1, 16)))


def reconcile(
    me: str,
    wanted: Mapping[str, Wanted],
    seen: Mapping[Key, Seen],
    hosts: Mapping[str, Host],
    now: float,
) -> list[Action]:
    """Return what this host has to do to bring `seen` nearer to `wanted`, one action a replica.

    Args:
        me: This host, one of `hosts`.
        wanted: What should run, by plugin.
        seen: The replicas that are there, on whichever host.
        hosts: The hosts that are there.
        now: The present time, in the seconds of `Seen`.
    """
    present = {key: there for key, there in seen.items() if there.host in hosts}
    actions: list[Action] = []
    for plugin in sorted({*wanted, *(key.plugin for key in present)}):
        mine = {key: there for key, there in present.items() if key.plugin == plugin}
        actions += _reconcile_plugin(me, plugin, wanted.get(plugin), mine, hosts, now)
    return actions


def _reconcile_plugin(
    me: str,
    plugin: str,
    wanted: Wanted | None,
    seen: Mapping[Key, Seen],
    hosts: Mapping[str, Host],
    now: float,
) -> list[Action]:
    roll = _Rollout.of(plugin, wanted, seen, hosts)
    actions: list[Action] = []
    for key in sorted({*roll.places, *seen}):
        there, place = seen.get(key), roll.places.get(key)
        if there is None:
            if place == me and wanted:
                actions.append(Start(key, wanted.generation))
        elif there.host != me:
            continue
        elif place is None or wanted is None:
            actions += _unwanted(key, there, now)
        elif there.phase == "running" and roll.is_outdated(key, there):
            actions += [Stop(key)] if roll.next == key else _silent(key, there, now)
        elif place != me and there.phase == "ended":
            actions.append(Forget(key))
        else:
            actions += _wanted(key, there, place, wanted.generation, now)
    return actions


@dataclass(frozen=True)
class _Rollout:
    """How far the replicas of a plugin are from what is wanted of them.

    Attributes:
        generation: What they should run.
        places: The host of each slot that is wanted; None for a slot that no host can have.
        next: The outdated replica that may be stopped now, if one may.
    """

    generation: int
    places: Mapping[Key, str | None]
    next: Key | None

    @classmethod
    def of(
        cls, plugin: str, wanted: Wanted | None, seen: Mapping[Key, Seen], hosts: Mapping[str, Host]
    ) -> "_Rollout":
        if wanted is None or wanted.replicas == 0:
            return cls(0, {}, None)
        *chosen, extra = placed(plugin, wanted.replicas, wanted.requires, hosts)
        places = {Key(plugin, slot): host for slot, host in enumerate(chosen)}
        plain = cls(wanted.generation, places, None)
        running = [key for key in places if key in seen and seen[key].phase == "running"]
        outdated = [key for key in running if plain.is_outdated(key, seen[key])]
        surge = Key(plugin, wanted.replicas)
        surging = surge in seen and seen[surge].phase in ("starting", "running")
        done = len(running) == len(places) and not outdated
        least = len(places)
        has_room = extra is not None and hosts[extra].room_bytes >= wanted.replica_bytes
        if extra is not None and not done and (surging or (outdated and has_room)):
            places[surge] = seen[surge].host if surging else extra
            if surging and seen[surge].phase == "running":
                running.append(surge)
                # One of an older generation is of no use for this one: it is replaced like others.
                if seen[surge].generation != wanted.generation:
                    outdated.append(surge)
        else:
            least -= 1
        may = bool(outdated) and len(running) - 1 >= least
        return cls(wanted.generation, places, outdated[0] if may else None)

    def is_outdated(self, key: Key, there: Seen) -> bool:
        return there.generation != self.generation or there.host != self.places[key]


def _unwanted(key: Key, there: Seen, now: float) -> list[Action]:
    match there.phase:
        case "ended":
            return [Forget(key)]
        case "stopping":
            return _stubborn(key, there, now)
        case _:
            return [Stop(key)]


def _wanted(key: Key, there: Seen, place: str, generation: int, now: float) -> list[Action]:
    match there.phase:
        case "ended":
            # Another generation is a new chance: it does not wait for the old one's pause.
            waited = now - there.since >= backoff_s(there.crashes)
            return [Start(key, generation)] if waited or there.generation != generation else []
        case "stopping":
            return _stubborn(key, there, now)
        case "starting" if there.generation != generation or there.host != place:
            return [Stop(key)]
        case "starting":
            return _late(key, there, now)
        case _:
            return _silent(key, there, now)


def _late(key: Key, there: Seen, now: float) -> list[Action]:
    if there.fault:
        return [Kill(key, there.fault)]
    if now - there.since > STARTUP_MAX_S:
        return [Kill(key, f"did not get ready within {STARTUP_MAX_S:g} s")]
    if now - max(there.heard, there.since) > STARTUP_GRACE_S:
        return [Kill(key, f"started, then gave no sign of life for {STARTUP_GRACE_S:g} s")]
    return []


def _stubborn(key: Key, there: Seen, now: float) -> list[Action]:
    late = now - there.since > STOP_GRACE_S
    return [Kill(key, f"did not stop within {STOP_GRACE_S:g} s")] if late else []


def _silent(key: Key, there: Seen, now: float) -> list[Action]:
    if there.fault:
        return [Kill(key, there.fault)]
    silent = now - max(there.heard, there.since) > SILENCE_S
    return [Kill(key, f"gave no sign of life for {SILENCE_S:g} s")] if silent else []

"""What to do next: from what is wanted and what was seen, without a clock and without I/O.

All rules of a replica's life stand here:

- What is wanted and not there is started; what is there and not wanted is stopped.
- One that ended by itself is started again after a pause that doubles with each end in a row.
- One that is silent although its process lives is killed; one that still starts may be silent for
  longer, because it builds or reads. Its end then counts like any other. One that beats is slow,
  not hung: it has much more time to get ready, but not for ever.
- Another generation replaces one replica at a time, and only while every other one runs: a
  generation that does not come up stops there, and the rest goes on with the old one.
- Whoever does not stop when asked is killed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

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
class Seen:
    """A replica as it was last seen.

    Attributes:
        phase: `ended` is a process that is gone while its place is remembered.
        generation: The generation that it was started for.
        since: When it entered the phase, in monotonic seconds.
        crashes: How often in a row it ended by itself.
        heard: When it was last heard of; counts while it starts and runs.
    """

    phase: Phase
    generation: int
    since: float
    crashes: int = 0
    heard: float = 0.0


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


def reconcile(wanted: Mapping[Key, int], seen: Mapping[Key, Seen], now: float) -> list[Action]:
    """Return the actions that bring `seen` nearer to `wanted`, at most one for each replica.

    Args:
        wanted: The replicas that should run, and their generation.
        seen: The replicas that are there.
        now: The present time, in the seconds of `Seen`.
    """
    actions: list[Action] = []
    replaced: set[str] = set()
    for key in sorted({*wanted, *seen}):
        there, generation = seen.get(key), wanted.get(key)
        if there is None:
            assert generation is not None  # noqa: S101 - it came from one of the two
            actions.append(Start(key, generation))
        elif generation is None:
            actions += _unwanted(key, there, now)
        elif there.phase == "running" and there.generation != generation:
            # Two of a plugin in one round would be two of them down at once.
            if key.plugin not in replaced and _others_run(key, wanted, seen):
                replaced.add(key.plugin)
                actions.append(Stop(key))
            else:
                actions += _silent(key, there, now)
        else:
            actions += _wanted(key, there, generation, now)
    return actions


def _unwanted(key: Key, there: Seen, now: float) -> list[Action]:
    match there.phase:
        case "ended":
            return [Forget(key)]
        case "stopping":
            return _stubborn(key, there, now)
        case _:
            return [Stop(key)]


def _wanted(key: Key, there: Seen, generation: int, now: float) -> list[Action]:
    match there.phase:
        case "ended":
            # Another generation is a new chance: it does not wait for the old one's pause.
            waited = now - there.since >= backoff_s(there.crashes)
            return [Start(key, generation)] if waited or there.generation != generation else []
        case "stopping":
            return _stubborn(key, there, now)
        case "starting" if there.generation != generation:
            return [Stop(key)]
        case "starting":
            return _late(key, there, now)
        case _:
            return _silent(key, there, now)


def _late(key: Key, there: Seen, now: float) -> list[Action]:
    if now - there.since > STARTUP_MAX_S:
        return [Kill(key, f"did not get ready within {STARTUP_MAX_S:g} s")]
    if now - max(there.heard, there.since) > STARTUP_GRACE_S:
        return [Kill(key, f"started, then gave no sign of life for {STARTUP_GRACE_S:g} s")]
    return []


def _stubborn(key: Key, there: Seen, now: float) -> list[Action]:
    late = now - there.since > STOP_GRACE_S
    return [Kill(key, f"did not stop within {STOP_GRACE_S:g} s")] if late else []


def _silent(key: Key, there: Seen, now: float) -> list[Action]:
    silent = now - max(there.heard, there.since) > SILENCE_S
    return [Kill(key, f"gave no sign of life for {SILENCE_S:g} s")] if silent else []


def _others_run(key: Key, wanted: Mapping[Key, int], seen: Mapping[Key, Seen]) -> bool:
    """Tell whether every other wanted replica of the plugin runs, of whatever generation."""
    return all(
        other in seen and seen[other].phase == "running"
        for other in wanted
        if other.plugin == key.plugin and other != key
    )

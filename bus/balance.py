"""Which instance a request is best sent to, from how fast each has answered. Pure: time is given.

Queue groups pick at random, so one slow replica beside a fast one holds the slowest requests of
all. Answers say which slot they come from; with two or more known for a subject, a caller picks
among them by itself. It expects of each slot the time of its latest answers for each request that
it had, times the requests that it would have: so a slow one is sent as much as it can answer as
soon as the others. Smoothed latency times load is Finagle's "peak EWMA"; dividing each sample by
its load keeps a slot that was flooded once from being shunned, and one that was idle from being
flooded.

What may be asked twice finds out by copies how fast slow and unknown ones are, and has one more
asked when an answer is late (`bus.hedging`): within a budget that is earned by answers, as gRPC's
retry throttling is.
"""

import math
import random
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal

import msgspec

# Of subjects, the least recently used leaves; of the slots of a subject, no more are learned.
SUBJECTS_MAX: Final = 4_096
SLOTS_MAX: Final = 64
# Slots that are at most so many times slower than the best one, or by `FINE_S`, are as good.
BAND: Final = 2.0
FINE_S: Final = 0.001
# Time in which a measurement loses about two thirds of its weight.
MEMORY_S: Final = 1.0
PROBE_S: Final = 1.0
BUSY_S: Final = 0.1
# One in so many requests goes by the group, to find slots that are not known.
EXPLORE: Final = 256
# An answer is late when it takes so many times as long as expected; sooner is the machine's noise.
LATE: Final = 3.0
LATE_MIN_S: Final = 0.003
# What answers earn for asking one more: a share of one each, and what may be saved up.
EARNED: Final = 0.02
SAVED_MAX: Final = 32.0
# Of so many requests the usual size of a body is a mean.
USUAL: Final = 64
# In place of a slot: whoever the broker picks.
GROUP: Final = ""
# After so many answers of one slot to what the group was asked, there is no other: the broker picks
# at random.
ALONE: Final = 32
# How long a subject is left to the group once somebody without a slot has answered.
FOREIGN_S: Final = 60.0
# How long a slot is passed over whose process has ended; another one takes a second at least.
ENDED_S: Final = 2.0
# The request may be what ended it, and would end who is asked next: so long nothing is asked twice.
ONCE_S: Final = 30.0

# What became of a request: answered; refused, or failed, by who did get it; refused because it
# had too much to do; no answer, or nobody there who serves this; who had it has ended; given up by
# the caller.
Outcome = Literal["answered", "failed", "busy", "gone", "ended", "dropped"]


class Choice(msgspec.Struct, frozen=True, gc=False):
    """Whom to ask.

    Attributes:
        slot: Who is asked.
        copy: Who is sent a copy whose answer nobody waits for; `GROUP`, or None: nobody.
        late_s: How long the answer may take until one `more` is asked; None: none is.
        weight: How many usual requests this one is, by its size; at least one.
    """

    slot: str
    copy: str | None = None
    late_s: float | None = None
    weight: float = 1.0


# It becomes part of a subject.
_SLOT = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}\.\d{1,9}")


@dataclass(slots=True)
class _Slot:
    """What is known of one instance.

    Attributes:
        each_s: Time of its answers for each request that it had from here, smoothed.
        measured_at: When the last one came.
        in_flight: Requests from here that it has.
        progress_at: When it last answered, or was idle.
        sent_at: When it was last sent one.
        busy_until: Until when it is passed over.
        ended: Whether that is because its process has ended, and none has answered since.
        idempotent: Whether it says that it may be asked the same twice.
    """

    each_s: float
    measured_at: float
    in_flight: int = 0
    progress_at: float = 0.0
    sent_at: float = 0.0
    busy_until: float = 0.0
    ended: bool = False
    idempotent: bool = False

    def sent(self, now: float) -> None:
        """Take note of one more request."""
        if not self.in_flight:
            self.progress_at = now
        self.in_flight += 1
        self.sent_at = now

    def expected_s(self, now: float) -> float:
        """Return how long one more answer takes; longer, when none has come for longer."""
        if not self.in_flight:
            return self.each_s
        return max(self.each_s * (self.in_flight + 1), now - self.progress_at)


@dataclass(slots=True)
class _Subject:
    """What is known of a subject.

    Attributes:
        slots: Who answers it.
        idempotent: Whether all of them say that they may be asked the same twice.
        saved: How many more usual requests may be sent for late answers.
        usual_bytes: What the body of one has; None: not known.
        answers: How many came since a slot was learned or forgotten.
        foreign_until: Until when no slots are learned.
        once_until: Until when nothing is asked twice, nor by the group to find others.
    """

    slots: dict[str, _Slot] = field(default_factory=dict)
    idempotent: bool = False
    saved: float = SAVED_MAX
    usual_bytes: float | None = None
    answers: int = 0
    foreign_until: float = 0.0
    once_until: float = 0.0

    def agree(self) -> None:
        """Take note of what all slots say."""
        self.idempotent = all(slot.idempotent for slot in self.slots.values())

    def weight(self, size: int) -> float:
        """Return how many usual requests one of so many bytes is, and learn from it."""
        usual = self.usual_bytes
        if size == usual:
            return 1.0
        if usual is None:
            usual = size
        self.usual_bytes = usual + (size - usual) / USUAL
        return size / usual if 0 < usual < size else 1.0


class Balance:
    """Chooses between the instances that answer a subject.

    Every `choose` is followed by one `ended`, and so is each that is sent besides: to the slot of
    a `Choice.copy`, or of `more`.

    Args:
        subjects_max: How many subjects are remembered.
        draw: Returns a random number from 0 to 1, without 1.
    """

    def __init__(
        self, subjects_max: int = SUBJECTS_MAX, draw: Callable[[], float] = random.random
    ) -> None:
        self._max = subjects_max
        self._draw = draw
        self._subjects: OrderedDict[str, _Subject] = OrderedDict()

    def known(self, subject: str) -> frozenset[str]:
        """Return the slots that have answered a subject."""
        found = self._subjects.get(subject)
        return frozenset(found.slots) if found else frozenset()

    def alone(self, subject: str, slot: str | None) -> bool:
        """Return whether a slot is the only one that answers a subject, as far as can be known."""
        found = self._subjects.get(subject)
        return found is not None and found.answers >= ALONE and found.slots.keys() == {slot}

    def choose(
        self, subject: str, now: float, size: int | None = None, *, again: bool = False
    ) -> Choice | None:
        """Return whom to ask, or None: the group.

        Args:
            subject: What is asked.
            now: Seconds of any clock that only goes forward.
            size: Bytes of its body, if it could be sent twice.
            again: Whether somebody has been asked already, and had too much to do.
        """
        found = self._subjects.get(subject)
        if found is None:
            return None
        self._subjects.move_to_end(subject)
        twice = found.idempotent and now >= found.once_until
        copied = size is not None and twice and not again
        explores = False
        if not again:
            if len(found.slots) < 2:
                return None
            explores = self._draw() * EXPLORE < 1 and now >= found.once_until
            if explores and not copied:
                return None
        open_ = {name: slot for name, slot in found.slots.items() if slot.busy_until <= now}
        if not open_:
            # Asked by slot it is known who has it; one that is not there again costs no time.
            open_ = {name: slot for name, slot in found.slots.items() if slot.ended}
        if not open_:
            return None
        weight = found.weight(size) if copied and size is not None else None
        choice = self._best(open_, now, weight)
        open_[choice.slot].sent(now)
        if explores:
            return Choice(choice.slot, GROUP, choice.late_s, choice.weight)
        if choice.copy is not None:
            open_[choice.copy].sent(now)
        return choice

    def _best(self, open_: dict[str, _Slot], now: float, weight: float | None) -> Choice:
        expected = {name: slot.expected_s(now) for name, slot in open_.items()}
        best_s = min(expected.values())
        limit_s = max(BAND * best_s, best_s + FINE_S)
        choice, copy, fewest, ties = "", None, math.inf, 0
        for name, slot in open_.items():
            if expected[name] > limit_s:
                # It may have become faster. One at a time: what hangs holds no second one up.
                if not slot.in_flight and now - slot.sent_at >= PROBE_S:
                    if weight is None:
                        return Choice(name)
                    copy = name
            elif slot.in_flight < fewest:
                choice, fewest, ties = name, slot.in_flight, 1
            elif slot.in_flight == fewest:
                ties += 1
                if self._draw() * ties < 1:
                    choice = name
        if weight is None:
            return Choice(choice)
        # What is larger may take longer.
        late_s = max(LATE_MIN_S, LATE * expected[choice] * weight)
        return Choice(choice, copy, late_s, weight)

    def more(
        self, subject: str, asked: str, waited_s: float, now: float, weight: float = 1.0
    ) -> str | None:
        """Return who is asked as well because an answer is late; None: nobody.

        That is whoever is likely to be done before as much time has passed once more. Where all
        are late, nobody is.

        Args:
            subject: What was asked.
            asked: Who was.
            waited_s: Since when.
            now: As in `choose`.
            weight: As in `Choice`: what is larger costs more.
        """
        found = self._subjects.get(subject)
        if found is None or found.saved < weight or not found.idempotent:
            return None
        if now < found.once_until:
            return None
        others = [
            (slot.expected_s(now), name)
            for name, slot in found.slots.items()
            if name != asked and slot.busy_until <= now
        ]
        if not others:
            return None
        expected_s, name = min(others)
        if BAND * expected_s > waited_s:
            return None
        found.saved -= weight
        found.slots[name].sent(now)
        return name

    def ended(
        self,
        subject: str,
        asked: str | None,
        outcome: Outcome,
        now: float,
        by: str | None = None,
        took_s: float = 0.0,
        idempotent: bool = False,
    ) -> None:
        """Take note of what became of a request.

        Args:
            subject: What was asked.
            asked: The slot that was chosen; None or `GROUP`: the group.
            outcome: What became of it.
            now: As in `choose`.
            by: The slot that the answer names.
            took_s: How long the answer took.
            idempotent: Whether it says that the same may be asked twice.
        """
        found = self._subjects.get(subject)
        slot = found.slots.get(asked) if found and asked else None
        load = slot.in_flight if slot and asked == by else 1
        if slot is not None:
            slot.in_flight = max(0, slot.in_flight - 1)
            if outcome != "dropped":
                slot.progress_at = now
        if outcome == "gone":
            if found and asked and found.slots.pop(asked, None):
                # It may be back: whether another is alone is not known any more.
                found.answers = 0
                found.agree()
        elif outcome == "ended":
            if found:
                found.once_until = now + ONCE_S
            if slot:
                slot.ended, slot.busy_until = True, now + ENDED_S
        elif outcome == "busy":
            if found and by in found.slots:
                found.slots[by].busy_until = now + BUSY_S
        elif outcome == "answered":
            self._learn(subject, by, took_s / max(1, load), now, idempotent)

    def _learn(
        self, subject: str, by: str | None, each_s: float, now: float, idempotent: bool
    ) -> None:
        found = self._subjects.get(subject)
        if found is None:
            if by is None or not _SLOT.fullmatch(by):
                return
            found = self._subjects[subject] = _Subject()
            if len(self._subjects) > self._max:
                self._subjects.popitem(last=False)
        found.answers += 1
        if found.saved < SAVED_MAX:
            found.saved += EARNED
        if by is None:
            # Somebody who cannot be asked by slot would get next to nothing otherwise.
            found.slots.clear()
            found.foreign_until = now + FOREIGN_S
        elif (slot := found.slots.get(by)) is not None:
            weight = math.exp(-max(0.0, now - slot.measured_at) / MEMORY_S)
            slot.each_s = weight * slot.each_s + (1 - weight) * each_s
            slot.measured_at = now
            if slot.ended:
                slot.ended, slot.busy_until = False, 0.0
            if slot.idempotent != idempotent:
                slot.idempotent = idempotent
                found.agree()
        elif now >= found.foreign_until and len(found.slots) < SLOTS_MAX and _SLOT.fullmatch(by):
            found.slots[by] = _Slot(
                each_s, now, progress_at=now, sent_at=now, idempotent=idempotent
            )
            found.answers = 0
            found.agree()

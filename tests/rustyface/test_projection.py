"""Events into galleries: whoever was there and whoever replays what is left hold the same."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus import codec
from bus import messages as m
from bus.streams import Stored
from bus.subjects import (
    GALLERY_ENTRY,
    GALLERY_HEAD,
    GALLERY_IMPORT,
    GALLERY_REJECTION,
    GALLERY_SETTINGS,
    GALLERY_SUBJECT,
)
from services.rustyface.galleries.persons import Moves
from services.rustyface.galleries.projection import Dead, Projection
from services.rustyface.galleries.search import Search

THREADS = ThreadPoolExecutor(1)
NAMES = ["ann", "bob", "cat"]
ENTRIES = [f"e{i}" for i in range(6)]
IMPORTS = ["i1", "i2"]
REJECTIONS = ["r1", "r2"]


class Log:
    """A stream as the broker keeps it: the last message of each subject."""

    def __init__(self) -> None:
        self.seq = 0
        self.last: dict[str, Stored] = {}
        self.all: list[Stored] = []
        self.live = Projection(THREADS)
        self.dead: list[Dead] = []
        # Up to where the events of an entry are erased for sure.
        self.erased: dict[str, int] = {}

    def append(self, feed, event, content_type=codec.JSON, **tokens: str) -> None:
        self.seq += 1
        subject = feed.subject("r", gallery="g", **tokens)
        headers = {codec.CONTENT_TYPE: content_type}
        stored = Stored(
            subject, self.seq, codec.encode(event, content_type), headers, self.seq * 10**9
        )
        self.last[subject] = stored
        self.all.append(stored)
        self.dead += self.live.apply([stored])

    def head(self, *, deleted: bool, settings: m.DatasetSettings | None = None) -> None:
        event = m.GalleryHead(
            id="g", at=m.now(), embedder="t", dimensions=2, settings=settings, deleted=deleted
        )
        self.append(GALLERY_HEAD, event)

    def entry(self, name, vector, **more) -> None:
        body = None if vector is None else np.array(vector, "<f4").tobytes()
        # Entries come with times of their own, of before and of after.
        at = m.now() + timedelta(days=1_000 * (self.seq % 3 - 1))
        event = m.GalleryEntry(id=name, at=at, embedding=body, **more)
        self.append(GALLERY_ENTRY, event, codec.MSGPACK, entry=name)

    def move(self, name: str, into: str | None) -> None:
        there = self.live.galleries.get("g")
        moves = there.moves if there else Moves()
        self.append(GALLERY_SUBJECT, moves.next(name, into), subject=name)

    def reject(self, rejection: str, name: str, vector, imported: str | None = None) -> None:
        body = None if vector is None else np.array(vector, "<f4").tobytes()
        event = m.GalleryRejection(
            id=rejection, at=m.now(), subject=name, embedding=body, imported=imported
        )
        self.append(GALLERY_REJECTION, event, codec.MSGPACK, rejection=rejection)

    def imported(self, name: str, state) -> None:
        event = m.GalleryImport(id=name, at=m.now(), source="f", format="json", state=state)
        self.append(GALLERY_IMPORT, event, imported=name)

    def set(self, threshold: float) -> None:
        changed = m.DatasetSettings(threshold=threshold)
        self.append(GALLERY_SETTINGS, m.GallerySettings(at=m.now(), settings=changed))

    def clear(self) -> None:
        """Delete what need not be there, as a replica does some time after."""
        gone = {one.seq for one in self.dead}
        for one in self.dead:
            if one.older:
                kind = GALLERY_REJECTION if one.entry is None else GALLERY_ENTRY
                token = "rejection" if one.entry is None else "entry"
                subject = kind.subject("r", gallery="g", **{token: one.older})
                self.erased[subject] = max(one.seq, self.erased.get(subject, 0))
        self.last = {subject: one for subject, one in self.last.items() if one.seq not in gone}

    def replayed(self, batch: int, older: Iterable[Stored] = ()) -> Projection:
        """Return what a replica holds that begins anew; `older` was not erased yet either."""
        left = {one.seq: one for one in (*older, *self.last.values())}
        events = [left[seq] for seq in sorted(left)]
        projection = Projection(THREADS)
        for i in range(0, len(events), batch):
            projection.apply(events[i : i + batch])
        return projection


def held(projection: Projection, *, revisions: bool = True) -> dict:
    """Return all that can be told from outside."""
    return {
        name: {
            "entries": {
                one.id: (
                    one.seq,
                    one.since,
                    one.at,
                    one.person.name if one.person else None,
                    one.metadata,
                    one.image,
                    one.quality,
                    one.imported,
                    there.matrix.vector(one.id).tobytes(),
                )
                for one in there.entries.values()
            },
            "persons": {
                name: (sorted(one.entries), sorted(one.rejections))
                for name, one in there.persons.items()
            },
            "rejections": {
                one.id: (one.seq, one.person.name, one.imported, one.vector.tobytes())
                for one in there.rejections.values()
            },
            "imports": there.imports,
            "settings": there.settings,
            "revision": (there.revision, there.updated_at) if revisions else None,
            "head": there.head_seq,
            "images": there.images,
            "lists": (there.names(), there.ordered(), sorted(there.matrix.ids())),
        }
        for name, there in projection.galleries.items()
    } | {"images": dict(projection.images)}


vectors = st.sampled_from([[1, 0], [0, 1], [1, 1], [-1, 2], [1, 0], [0, 1], [0, 0]])
names = st.sampled_from(NAMES)
entry_steps = st.tuples(
    st.just("entry"),
    st.sampled_from(ENTRIES),
    vectors,
    st.sampled_from([*NAMES, *NAMES, None]),
    st.sampled_from([None, None, *IMPORTS]),
    st.sampled_from([None, "i" * 64]),
)
# Somebody has to be there for what happens to them: entries come often, all of it goes seldom.
steps = st.sampled_from([entry_steps] * 10 + [
    st.tuples(st.just("remove"), st.sampled_from(ENTRIES)),
    *[
        st.tuples(st.just("move"), names, st.sampled_from([None, *NAMES, *NAMES])).filter(
            lambda step: step[1] != step[2]
        )
    ] * 4,
    *[
        st.tuples(
            st.just("reject"),
            st.sampled_from(REJECTIONS),
            names,
            vectors,
            st.sampled_from([None, *IMPORTS]),
        )
    ] * 2,
    st.tuples(st.just("withdraw"), st.sampled_from(REJECTIONS), names),
    st.tuples(st.just("import"), st.sampled_from(IMPORTS), st.sampled_from(["running", "done"])),
    st.tuples(st.just("undo"), st.sampled_from(IMPORTS)),
    st.tuples(st.just("set"), st.sampled_from([0.1, 0.2])),
    st.tuples(st.just("clear")),
    st.tuples(st.just("recreate"), st.booleans()),
]).flatmap(lambda step: step)  # fmt: skip


def carry_out(log: Log, step: tuple) -> None:
    there = log.live.galleries["g"]
    match step:
        case ("entry", name, vector, subject, imported, image):
            log.entry(name, vector, subject=subject, imported=imported, image=image)
        case ("remove", name):
            log.entry(name, None)
        case ("move", name, into):
            log.move(name, into)
        case ("reject", rejection, name, vector, imported):
            log.reject(rejection, name, vector, imported)
        case ("withdraw", rejection, name):
            log.reject(rejection, name, None)
        case ("import", name, state):
            # What was undone stays so: whoever appends sees to that.
            if name not in there.imports or there.imports[name].state != "undone":
                log.imported(name, state)
        case ("undo", name):
            log.imported(name, "undone")
        case ("set", threshold):
            log.set(threshold)
        case ("clear",):
            log.clear()
        case ("recreate", cleared):
            log.head(deleted=True)
            if cleared:
                head = GALLERY_HEAD.subject("r", gallery="g")
                log.last = {subject: one for subject, one in log.last.items() if subject == head}
            log.head(deleted=False, settings=m.DatasetSettings(threshold=0.3) if cleared else None)


@settings(max_examples=400)
@given(st.lists(steps, max_size=40), st.integers(1, 50))
def test_whoever_was_there_and_whoever_replays_what_is_left_hold_the_same(
    changes: list[tuple], batch: int
):
    log = Log()
    log.head(deleted=False)
    for step in changes:
        carry_out(log, step)
        # What is kept to be told again has to be given up with the next change.
        held(log.live)
        if step[0] == "clear":
            assert held(log.replayed(batch), revisions=False) == held(log.live, revisions=False)
    # What came too late and was cleared is the newest event only to those who were there.
    assert held(log.replayed(batch), revisions=not log.dead) == held(
        log.live, revisions=not log.dead
    )
    log.clear()
    assert held(log.replayed(batch), revisions=False) == held(log.live, revisions=False)


@settings(max_examples=200)
@given(st.lists(steps, max_size=40), st.integers(1, 50), st.randoms(use_true_random=False))
def test_whatever_else_is_left_of_what_was_replaced_a_replay_ends_alike(
    changes: list[tuple], batch: int, chance
):
    """Whoever replaced an event erases the one before a moment later, or the next one to start.

    Unless the later one is erased sooner: then the one before is erased before that.
    """
    log = Log()
    log.head(deleted=False)
    for step in changes:
        carry_out(log, step)
    dead = {one.seq for one in log.dead}
    older = [
        one
        for one in log.all
        if one.seq not in dead
        or (one.seq > log.erased.get(one.subject, 0) and chance.random() < 0.5)
    ]
    assert held(log.replayed(batch, older), revisions=False) == held(log.live, revisions=False)


def told(bears: dict[str, tuple], step: tuple, undone: set[str]) -> dict[str, tuple]:
    """Return whom each entry shows after a step, and by which import: as one would say it."""
    match step:
        case ("entry", name, vector, subject, imported, _):
            rest = {one: known for one, known in bears.items() if one != name}
            counts = any(vector) and imported not in undone
            return rest | {name: (subject, imported)} if counts else rest
        case ("remove", name):
            return {one: known for one, known in bears.items() if one != name}
        case ("move", name, into):
            moved = {
                one: (into if known[0] == name else known[0], known[1])
                for one, known in bears.items()
            }
            return {
                one: known
                for one, known in moved.items()
                if into is not None or bears[one][0] != name
            }
        case ("undo", name):
            undone.add(name)
            return {one: known for one, known in bears.items() if known[1] != name}
        case ("recreate", _):
            undone.clear()
            return {}
    return bears


@settings(max_examples=300)
@given(st.lists(steps, max_size=40))
def test_whom_an_entry_shows_is_what_one_would_say(changes: list[tuple]):
    log, bears, undone = Log(), dict[str, tuple](), set[str]()
    log.head(deleted=False)
    for step in changes:
        carry_out(log, step)
        bears = told(bears, step, undone)
        for projection in (log.live, log.replayed(50)):
            entries = projection.galleries["g"].entries.values()
            shown = {
                one.id: (one.person.name if one.person else None, one.imported) for one in entries
            }
            assert shown == bears


@settings(max_examples=150)
@given(st.lists(steps, max_size=40), st.sampled_from([[1, 0], [2, 3]]), st.booleans())
def test_both_find_the_same_to_the_last_bit(changes: list[tuple], query, by_group: bool):
    log = Log()
    log.head(deleted=False)
    for step in changes:
        carry_out(log, step)
    answers = []
    for projection in (log.live, log.replayed(7)):
        there = projection.galleries["g"]
        [found] = there.matrix.search(
            Search(
                query=there.matrix.unit(query),
                k=3,
                threshold=-1.0,
                by_group=by_group,
                rejected=there.rejected() or None,
            )
        )
        answers.append([msgspec.structs.replace(hit, group=0) for hit in found.hits])
    assert answers[0] == answers[1]


@pytest.fixture
def log() -> Log:
    made = Log()
    made.head(deleted=False)
    return made


def persons(log: Log) -> dict[str, list[str]]:
    there = log.live.galleries["g"]
    return {name: sorted(one.entries) for name, one in there.persons.items()}


def test_a_gallery_changed_when_its_newest_event_was_stored_whatever_entries_say(log: Log):
    for _ in range(3):
        log.entry("e1", [1, 0])
        there = log.live.galleries["g"]
        assert there.updated_at == datetime.fromtimestamp(log.seq, UTC)


def test_of_images_that_no_entry_names_any_more_nothing_is_kept(log: Log):
    log.entry("e1", [1, 0], image="i" * 64)
    log.entry("e2", [1, 0], image="i" * 64)
    log.entry("e1", [1, 0], image="j" * 64)
    assert dict(log.live.images) == {"i" * 64: 1, "j" * 64: 1}
    assert log.live.galleries["g"].images == 2
    log.entry("e2", None)
    log.entry("e1", None)
    assert dict(log.live.images) == {}
    assert log.live.galleries["g"].images == 0


def test_a_move_takes_all_that_bore_the_name_and_nothing_that_comes_later(log: Log):
    log.entry("e1", [1, 0], subject="ann")
    log.entry("e2", [1, 0], subject="ann")
    log.move("ann", "bob")
    log.entry("e3", [1, 0], subject="ann")
    assert persons(log) == {"bob": ["e1", "e2"], "ann": ["e3"]}
    log.move("bob", "ann")
    assert persons(log) == {"ann": ["e1", "e2", "e3"]}
    log.move("ann", None)
    assert persons(log) == {}
    assert not log.live.galleries["g"].entries


def test_a_name_s_earlier_moves_are_not_for_those_who_come_to_it_later(log: Log):
    log.entry("e1", [1, 0], subject="ann")
    log.move("bob", "cat")
    log.move("ann", "bob")
    log.move("bob", "dan")
    assert persons(log) == {"dan": ["e1"]}
    assert held(log.replayed(9)) == held(log.live)


def test_what_a_removal_took_away_is_named_so_that_it_can_be_cleared(log: Log):
    log.entry("e1", [1, 0], subject="ann", image="i" * 64)
    log.reject("r1", "ann", [0, 1])
    log.move("ann", None)
    told = [(one.seq, one.entry, one.removal, one.image) for one in log.dead]
    assert told == [(2, "e1", 4, "i" * 64), (3, None, 4, None)]


def test_an_entry_that_an_import_brings_after_it_was_undone_does_not_count(log: Log):
    log.entry("e1", [1, 0], imported="i1")
    log.entry("e2", [1, 0], imported="i1")
    log.entry("e2", [0, 1])
    log.imported("i1", "undone")
    log.entry("e3", [1, 0], imported="i1")
    assert list(log.live.galleries["g"].entries) == ["e2"]
    assert [one.entry for one in log.dead] == ["e2", "e1", "e3"]


def test_somebody_whose_entries_change_places_in_one_batch_stays_the_same_person(log: Log):
    """Taken one by one, ann would have nothing for a moment, and be somebody else after it."""
    log.entry("e1", [1, 0], subject="ann")
    log.reject("r1", "ann", [1, 0])
    batch = Log()
    batch.seq = log.seq
    batch.entry("e1", [1, 0], subject="bob")
    batch.entry("e2", [0, 1], subject="ann")
    log.live.apply(sorted(batch.last.values(), key=lambda one: one.seq))
    assert persons(log) == {"ann": ["e2"], "bob": ["e1"]}
    assert list(log.live.galleries["g"].persons["ann"].rejections) == ["r1"]


def test_a_person_s_event_that_cannot_be_read_makes_the_gallery_unusable(log: Log):
    """Those that it has replaced are lost: people would bear names that they have no more."""
    log.entry("e1", [1, 0], subject="ann")
    log.move("ann", "bob")
    log.append(GALLERY_SUBJECT, m.GallerySubject(id="ann", at=m.now(), moves=[]), subject="ann")
    assert not log.live.galleries
    assert log.live.unreadable == {"g": 4}
    assert log.replayed(1).unreadable == {"g": 4}
    assert not log.live.images.total()


def test_settings_that_cannot_be_read_are_the_usual_ones(log: Log):
    log.set(0.7)
    log.append(GALLERY_SETTINGS, m.Empty())
    assert log.live.galleries["g"].settings == m.DatasetSettings()
    assert held(log.replayed(1), revisions=False) == held(log.live, revisions=False)


def test_a_gallery_that_was_made_with_settings_that_cannot_be_read_has_the_usual_ones():
    made = Log()
    head = m.GalleryHead(id="g", at=m.now(), embedder="t", dimensions=2, imported="i1")
    said = codec.plain(head) | {"settings": {"threshold": 0.7, "quality": {"sharpness_min": 1e31}}}
    made.append(GALLERY_HEAD, said)
    made.entry("e1", [1, 0])
    for one in (made.live, made.replayed(1)):
        there = one.galleries["g"]
        assert there.settings == m.DatasetSettings()
        assert codec.plain(there.head) == codec.plain(head)
        assert list(there.entries) == ["e1"]


def test_an_entry_of_before_there_were_persons_is_read_as_it_was(log: Log):
    old = {"id": "e1", "at": m.now(), "embedding": np.array([3, 4], "<f4").tobytes()}
    log.append(GALLERY_ENTRY, old, codec.MSGPACK, entry="e1")
    there = log.live.galleries["g"]
    assert there.matrix.vector("e1").tolist() == pytest.approx([0.6, 0.8])
    assert there.entries["e1"].person is None


def test_somebody_who_loses_one_entry_and_gets_another_at_once_stays(log: Log):
    log.entry("e0", [1, 0], subject="ann")
    log.entry("e0", [0, 0], subject="ann")
    log.entry("e1", [1, 0], subject="ann")
    # All in one batch, as a replica reads them that begins anew.
    batch = log.replayed(2, log.all[:2])
    assert batch.galleries["g"].names() == ["ann"]


def test_an_import_that_is_undone_takes_its_rejections_along_and_they_stay_out(log: Log):
    log.entry("e1", [1, 0], subject="ann")
    log.reject("mine", "ann", [0, 1])
    log.imported("i1", "running")
    log.reject("theirs", "ann", [1, 1], "i1")
    log.imported("i1", "undone")
    # Sent before the undoing was known, it is stored after it.
    log.reject("late", "ann", [1, 1], "i1")
    assert sorted(log.live.galleries["g"].rejections) == ["mine"]
    assert [one.seq for one in log.dead] == [5, 7]
    assert held(log.replayed(9))["g"]["rejections"] == held(log.live)["g"]["rejections"]


def test_a_gallery_is_set_as_it_was_made_until_it_is_set_otherwise():
    made = Log()
    made.head(deleted=False, settings=m.DatasetSettings(threshold=0.7))
    assert made.live.galleries["g"].settings.threshold == 0.7
    made.set(0.2)
    assert made.live.galleries["g"].settings.threshold == 0.2
    made.head(deleted=True)
    made.head(deleted=False)
    assert made.live.galleries["g"].settings == m.DatasetSettings()

"""Moves of names: who a name stands for, and which names somebody has borne."""

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus import codec
from bus import messages as m
from services.rustyface.galleries.persons import Moves

NAMES = ["ann", "bob", "cat"]

names = st.sampled_from(NAMES)


def test_moves_that_do_not_rise_are_refused():
    for seqs in ([3, 2], [2, 2], [4, 9]):
        event = m.GallerySubject(
            id="a", at=m.now(), moves=[m.SubjectMove(into="b", seq=seq) for seq in seqs]
        )
        with pytest.raises(Exception, match="have to rise up to 5"):
            Moves().learn(event, 5)


@given(st.lists(st.tuples(names, st.sampled_from([None, *NAMES])), max_size=30))
def test_a_trail_has_every_name_that_led_to_somebody_when_it_did_and_no_other(pairs):
    """Against the walk: what was told of a name belongs to whom it leads from there."""
    moves = Moves()
    for seq, (name, into) in enumerate(pairs, 1):
        if name != into:
            moves.learn(moves.next(name, into), seq)
    end = len(pairs) + 1
    for name, until in itertools.product(NAMES, range(1, end + 1)):
        trail = moves.trail(name, until)
        for told, at in itertools.product(NAMES, range(1, until + 1)):
            belongs = moves.walk(told, at - 1, before=until)[0] == name
            assert belongs == any(b.name == told and b.after < at <= b.until for b in trail)


@given(st.lists(st.tuples(names, st.sampled_from([None, *NAMES])), max_size=30))
def test_a_walk_ends_where_going_one_by_one_ends(pairs: list[tuple[str, str | None]]):
    """Against the plainest way to say it: every name's holders, moved as the events come."""
    moves = Moves()
    bears: dict[int, str | None] = {}
    seq = 0
    for name, into in pairs:
        seq += 1
        bears[seq] = name
        if name == into:
            continue
        seq += 1
        moves.learn(moves.next(name, into), seq)
        bears = {one: into if bore == name else bore for one, bore in bears.items()}
    first = dict(zip(bears, [pair[0] for pair in pairs], strict=True))
    for one, bore in bears.items():
        assert moves.walk(first[one], one)[0] == bore


def test_a_name_cannot_be_moved_into_itself():
    with pytest.raises(Exception, match="is called 'ann' already"):
        Moves().next("ann", "ann")


def test_events_are_told_without_loss():
    moves = Moves()
    moves.learn(moves.next("ann", "bob"), 5)
    event = moves.next("ann", None)
    assert [(move.seq, move.into) for move in event.moves] == [(5, "bob"), (None, None)]
    assert msgspec.json.decode(codec.encode(event), type=m.GallerySubject) == event

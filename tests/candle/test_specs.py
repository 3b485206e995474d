"""What wishes make of a model's entry: whatever comes in whatever order, some things stay true."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus import messages as m
from bus.errors import BusError, Conflict
from services.candle.repository import specs

NAMES = st.sampled_from(["1", "2", "9", "blue", "green"])
BYTES = st.sampled_from([digit * 64 for digit in "abcd"])


def made(checksum: str, *, sound: bool = True) -> m.ModelVersion:
    return m.ModelVersion(
        version="1",
        path="x.json",
        checksum=checksum,
        format="linear",
        added_at=m.now(),
        sound=sound,
    )


def add(checksum: str, version: str | None = None) -> m.AddModel:
    return m.AddModel(id="m", checksum=checksum, file_name="x.json", version=version)


WISHES = st.one_of(
    st.tuples(st.just("add"), BYTES, st.none() | NAMES),
    st.tuples(st.just("load"), BYTES, st.none() | NAMES),
    st.tuples(st.just("want"), NAMES, st.none()),
    st.tuples(st.just("unwant"), NAMES, st.none()),
    st.tuples(st.just("alias"), st.sampled_from(["default", "stable"]), NAMES),
    st.tuples(st.just("remove"), NAMES, st.none()),
)


def follow(spec: m.ModelSpec | None, wish: tuple[str, str, str | None]) -> m.ModelSpec | None:
    what, first, second = wish
    if what == "add":
        return specs.entered(spec, add(first, second), made(first))[0]
    if what == "load":
        wish_of = m.LoadModel(id="m", path="x.json", version=second)
        return specs.loaded(spec, wish_of, made(first))[0]
    if what == "want":
        version = specs.found_version(spec, "m", first)
        return specs.wanted_again(spec, version, None)
    if what == "unwant":
        return specs.unwanted(spec, "m", first)
    if what == "alias":
        return specs.aliased(spec, m.AliasModel(id="m", alias=first, version=second))
    leaving = specs.to_remove(spec, m.RemoveModel(id="m", version=first))
    return specs.without(spec, {version.version for version in leaving})


@given(st.lists(WISHES, max_size=30))
def test_whatever_is_wished_a_version_keeps_its_bytes_and_no_alias_leads_nowhere(wishes):
    spec: m.ModelSpec | None = None
    for wish in wishes:
        before = {v.version: v.checksum for v in spec.versions} if spec else {}
        with contextlib.suppress(BusError):
            spec = follow(spec, wish)
        if spec is None:
            continue
        names = [version.version for version in spec.versions]
        assert len(names) == len(set(names)) > 0
        assert set(spec.aliases.values()) <= set(names)
        for version in spec.versions:
            assert before.get(version.version, version.checksum) == version.checksum


@given(st.lists(st.tuples(BYTES, st.none() | NAMES), max_size=20))
def test_what_was_added_is_there_and_adding_it_again_changes_nothing(added):
    spec: m.ModelSpec | None = None
    for checksum, name in added:
        try:
            spec, version, _ = specs.entered(spec, add(checksum, name), made(checksum))
        except Conflict:
            continue
        assert specs.found_version(spec, "m", version).checksum == checksum
        assert name in {None, version}
        again = specs.entered(spec, add(checksum, name), made(checksum))
        assert again == (spec, version, False)


@given(st.lists(st.booleans(), min_size=40, max_size=60))
def test_what_is_wanted_or_new_is_never_forgotten(wanted):
    spec = m.ModelSpec(id="m", versions=[])
    held = set()
    for i, want in enumerate(wanted):
        spec, name, _ = specs.entered(spec, add(f"{i:064x}"), made(f"{i:064x}"))
        assert specs.found_version(spec, "m", name).checksum == f"{i:064x}"
        if want:
            held.add(name)
            spec = specs.wanted_again(spec, specs.found_version(spec, "m", name), None)
    assert held <= {version.version for version in spec.versions}
    unwanted = [version for version in spec.versions if not version.wanted]
    assert len(spec.versions) <= max(specs.VERSIONS_KEPT, len(held) + len(unwanted[-1:]))


def test_a_number_that_is_free_is_named_where_a_version_is_taken():
    spec, *_ = specs.entered(None, add("a" * 64, "41"), made("a" * 64))
    with pytest.raises(Conflict, match="next free number is 42"):
        specs.entered(spec, add("b" * 64, "41"), made("b" * 64))


def test_a_model_without_its_last_version_is_gone():
    spec, name, _ = specs.entered(None, add("a" * 64), made("a" * 64))
    assert specs.without(spec, {name}) is None
    assert specs.without(spec, {"another"}) == spec


@pytest.mark.parametrize(
    ("problems", "says"),
    [
        ([], "it is not sound"),
        ([m.ModelProblem(where="", what="no ONNX")], "no ONNX"),
        ([m.ModelProblem(where="bias", what="is text")], "bias: is text"),
        ([m.ModelProblem(where="bias", what="bias length 0")], "bias length 0"),
    ],
)
def test_the_first_problem_is_told_in_a_sentence(problems, says):
    report = m.ModelReport(checksum="a" * 64, sound=False, validated_at=m.now(), problems=problems)
    assert specs.problem_of(report) == says

"""What somebody looks for: times, texts, expressions."""

from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.errors import InvalidRequest
from bus.log_search import matcher, moment_in, seconds_in
from bus.messages import LogEvent

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


def record(message="model.loaded", **fields):
    trace = fields.pop("trace", None)
    return LogEvent(
        plugin="p", level="info", message=message, timestamp=NOW, fields=fields, trace=trace
    )


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("15m", NOW - timedelta(minutes=15)),
        ("2h", NOW - timedelta(hours=2)),
        ("1d", NOW - timedelta(days=1)),
        ("1.5h", NOW - timedelta(minutes=90)),
        ("2026-03-01T11:00:00Z", NOW - timedelta(hours=1)),
        ("2026-03-01T12:00:00+01:00", NOW - timedelta(hours=1)),
        ("2026-03-01T12:00:00 01:00", NOW - timedelta(hours=1)),
        ("2026-03-01t12:00:00.123456789z", NOW + timedelta(microseconds=123_456)),
        ("99999999w", datetime.min.replace(tzinfo=UTC)),
    ],
)  # fmt: skip
def test_a_time_is_rfc_3339_or_so_long_ago(text, moment):
    assert moment_in(text, "since", NOW) == moment


@pytest.mark.parametrize(
    "text",
    ["", "x", "15", "-1h", "yesterday", "2026-03-01", "2026-03-01T11:00:00", "2026-13-01T11:00:00Z",
     "١٥m", "1h30m", "0001-01-01T00:00:00+23:59"],
)  # fmt: skip
def test_what_is_no_time_is_refused_and_named(text):
    with pytest.raises(InvalidRequest, match="since") as refused:
        moment_in(text, "since", NOW)
    assert refused.value.field == "since"


@given(st.datetimes(timezones=st.just(UTC), min_value=datetime(1970, 1, 1)))  # noqa: DTZ001
def test_every_moment_is_read_as_it_was_written(moment):
    assert moment_in(moment.isoformat().replace("+00:00", "Z"), "since", NOW) == moment


@given(st.text(max_size=30))
def test_any_text_is_a_time_or_refused(text):
    with suppress(InvalidRequest):
        assert moment_in(text, "since", NOW).tzinfo is UTC


def test_a_duration_has_its_unit():
    assert seconds_in("10m", "for") == 600
    with pytest.raises(InvalidRequest):
        seconds_in("10", "for")


def test_text_is_found_in_message_fields_and_trace_in_any_case():
    loaded = record("Model.Loaded", path={"name": "Größe"}, n=3, trace="abc123")
    for text in ("model.l", "GRÖSSE", "n=3", "ABC123", ""):
        assert matcher(text)(loaded), text
    assert not matcher("absent")(loaded)


def test_an_expression_is_found_in_message_and_fields_line_by_line():
    loaded = record("first\nsecond line", path="/a/b.onnx")
    for regex in (r"^second", r"first$", r"\.onnx$", r"^path=/a/\w+", "(?i)FIRST"):
        assert matcher(regex=regex)(loaded), regex
    assert not matcher(regex="FIRST")(loaded)
    assert not matcher("second", regex="absent")(loaded)


@pytest.mark.parametrize("regex", ["(", "a)(b", r"\1", "(?=x)", "[", "(a{1000}){1000}", "x" * 1001])
def test_an_expression_that_cannot_be_is_refused(regex):
    with pytest.raises(InvalidRequest) as refused:
        matcher(regex=regex)
    assert refused.value.field == "regex"


def test_no_expression_takes_more_than_linear_time():
    # Takes a backtracking engine longer than the universe has been there.
    assert not matcher(regex=r"(a+)+(a+)+(a+)+$")(record("a" * 10_000 + "!"))


@given(st.text(max_size=40))
def test_any_expression_matches_or_is_refused(regex):
    with suppress(InvalidRequest):
        assert matcher(regex=regex)(record("some text", a=[1, "two"])) in {True, False}

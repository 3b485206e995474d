"""Names to subjects and messages to bytes, and back, for anything that hypothesis finds."""

import contextlib
import json
import string
from datetime import UTC

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus import codec
from bus import messages as m
from bus.errors import _KINDS as KINDS
from bus.errors import BusError, Conflict, InvalidRequest, body_of, error_from
from bus.subjects import ENDPOINTS, FEEDS, LOG, MODEL_RUN, name_of, token


@given(st.text(min_size=1, alphabet=st.characters(exclude_categories=["Cs"])))
def test_a_token_is_safe_in_a_subject_and_stands_for_its_name(name):
    made = token(name)
    assert set(made) <= set(string.ascii_letters + string.digits + "-_=")
    assert name_of(made) == name


@given(st.text(alphabet=string.ascii_letters + "=0123456789ABCDEF-_", max_size=20))
def test_any_token_can_be_read(text):
    assert isinstance(name_of(text), str)


def test_a_feed_without_a_value_is_a_wildcard():
    assert LOG.subject("bkg", plugin="candle") == "bkg.log.candle.*.*"
    assert LOG.subject("bkg", plugin="a.b", slot=0, level="info") == "bkg.log.a=2Eb.0.info"


def test_no_two_endpoints_or_feeds_share_a_subject():
    assert len({e.capability for e in ENDPOINTS}) == len(ENDPOINTS)
    assert len({f.template for f in FEEDS}) == len(FEEDS)


@given(st.binary(max_size=200), st.sampled_from([codec.JSON, codec.MSGPACK, "text/html", ""]))
def test_any_bytes_are_a_message_or_an_invalid_request(body, content_type):
    with contextlib.suppress(InvalidRequest):
        assert isinstance(codec.decode(body, m.RunModel, content_type), m.RunModel)


@given(
    st.lists(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=4), max_size=4),
    st.sampled_from([codec.JSON, codec.MSGPACK]),
)
def test_a_message_survives_the_way_there(rows, content_type):
    sent = m.RunModel(id="m", inputs=rows)
    assert codec.decode(codec.encode(sent, content_type), m.RunModel, content_type) == sent


@given(st.none() | st.binary(max_size=64), st.datetimes(timezones=st.just(UTC)))
def test_bytes_and_times_survive_in_message_pack(embedding, at):
    sent = m.GalleryEntry(id="e", at=at, embedding=embedding, metadata={"n": [1, None]})
    assert codec.decode(codec.encode(sent, codec.MSGPACK), m.GalleryEntry, codec.MSGPACK) == sent


@pytest.mark.parametrize(
    "body", [b"\xc1", b"\xdd\xff\xff\xff\xff", b"\x81\x01\x02", b"\x91" * 5000, b"\x80\x80"]
)
def test_what_is_no_message_pack_is_refused_in_words(body):
    with pytest.raises(InvalidRequest, match="not MessagePack: "):
        codec.decode(body, m.RunModel, codec.MSGPACK)


@given(st.sampled_from(KINDS), st.text(), st.none() | st.text(), st.none() | st.floats(0, 100))
def test_an_error_survives_the_way_there(kind, message, field, retry_after_s):
    error = kind(message, field=field, retry_after_s=retry_after_s)
    back = error_from(codec.decode(codec.encode(body_of(error)), type(body_of(error))))
    assert (type(back), back.message, back.field) == (kind, message, field)
    assert back.retry_after_s == retry_after_s


def test_a_conflict_carries_the_present_revision_and_an_error_all_its_reasons():
    error = Conflict("another change came first", revision=7, reasons=["one", "two"])
    back = error_from(codec.decode(codec.encode(body_of(error)), type(body_of(error))))
    assert (back.revision, back.reasons) == (7, ["one", "two"])


@pytest.mark.parametrize(
    ("body", "field", "says"),
    [
        (b'{"id": 3, "inputs": []}', "id", "Expected `str`"),
        (b'{"id": "m", "inputs": [[1, "x"]]}', "inputs[0][1]", "Expected `float`"),
        (b'{"id": "m"}', "inputs", "missing required field"),
        (b'{"id": "../m", "inputs": []}', "id", "must be a name: letters"),
        (b"", "id", "missing"),
        (b"[]", None, "Expected `object`"),
        (b"{", None, "not JSON"),
        (b'{"id": "\xff"}', None, "not JSON"),
        (b'{"inputs":' + b"[" * 100_000, "inputs[0][0]", "Expected `float`"),
        (b'{"x":' + b"[" * 100_000, None, "not JSON"),
    ],
)
def test_a_body_that_does_not_fit_says_where(body, field, says):
    with pytest.raises(BusError) as raised:
        codec.decode(body, m.RunModel)
    assert raised.value.field == field
    assert says in raised.value.message


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"scoring": "worst"}', "scoring: Invalid enum value 'worst'; allowed are best, mean"),
        (
            b'{"quality": {"below": "sometimes"}}',
            "quality.below: Invalid enum value 'sometimes'; allowed are off, reject, warn",
        ),
    ],
)
def test_a_word_that_there_is_not_is_told_with_those_that_there_are(body, says):
    with pytest.raises(InvalidRequest) as caught:
        codec.decode(body, m.DatasetSettings)
    assert caught.value.message == says


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"setings": {}}', "unknown field `setings`; did you mean `settings`?"),
        (b'{"zzz": 1}', "known are name, description, entrypoint"),
    ],
)  # fmt: skip
def test_an_unknown_field_names_the_nearest_known_one(body, says):
    whole = {"name": "w", "description": "", "entrypoint": "x", "capabilities": []}
    given_body = json.dumps({**whole, **json.loads(body)}).encode()
    with pytest.raises(InvalidRequest) as raised:
        codec.decode(given_body, m.PluginConfig)
    assert says in raised.value.message
    for around, kind in (
        (b'{"name": "w", "config": %b}', m.ConfigurePlugin),
        (b"[%b]", list[m.PluginConfig]),
        (b'{"x": %b}', dict[str, m.PluginConfig]),
    ):
        with pytest.raises(InvalidRequest) as raised:
            codec.decode(around % given_body, kind)
        assert says.partition("; ")[2] in raised.value.message


def test_the_subject_of_a_body_is_read_without_its_tensors():
    body = b'{"inputs": [["no number"]], "id": "my model"}'
    assert MODEL_RUN.subject_of_body("bkg", body, None) == "bkg.call.candle.model.run.my=20model"


def test_readers_pass_over_fields_that_they_do_not_know():
    body = b'{"id": "m", "inputs": [], "tomorrow": 1}'
    assert codec.decode(body, m.RunModel).inputs == []


def test_every_message_has_a_schema():
    for endpoint in ENDPOINTS:
        assert codec.schema(endpoint.request)
        assert codec.schema(endpoint.reply)
    assert all(issubclass(feed.payload, msgspec.Struct) for feed in FEEDS)

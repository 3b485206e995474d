"""What may stand in a log: no secret gets through, and nothing else is lost."""

import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.redaction import MASK, TEXT_MAX_CHARS, clean_text, is_secret, redacted, redacted_fields

# Made up, and found nowhere else: so that a test can look for it in what came out.
SECRET = st.text("abcdefghijkmnpqrstuvwxyz23456789", min_size=8, max_size=40).map("zQ".__add__)
SECRET_NAME = st.sampled_from(
    ["password", "dbPassword", "DB_PASSWORD", "secret", "client_secret", "token", "access_token",
     "refreshToken", "X-Api-Key", "apiKey", "api_keys", "private_key", "authorization",
     "Proxy-Authorization", "Set-Cookie", "credentials", "BKG_KEY", "passphrase", "pwd", "jwt"]
)  # fmt: skip
PLAIN_NAME = st.sampled_from(
    ["key", "keys", "sort_key", "public_key", "model", "path", "dataset", "entry", "compass",
     "bypass", "tokenizer", "token_type", "password_file", "monkey", "slot"]
)  # fmt: skip
PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**63), st.floats(allow_nan=False),
    st.text("abc äöü.,-_/\n\t", max_size=50),
)  # fmt: skip


def nested(leaf):
    return st.recursive(
        leaf,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(PLAIN_NAME, inner, max_size=3),
        max_leaves=8,
    )


@given(SECRET_NAME, SECRET, st.lists(st.sampled_from(["in a list", "in a dict"]), max_size=6))
def test_a_secret_field_is_masked_however_deep_it_stands(name, secret, way):
    value = {name: secret}
    for step in way:
        value = [value, 1] if step == "in a list" else {"inner": value, "x": 1}
    kept = msgspec.json.encode(redacted_fields({"outer": value})).decode()
    assert secret not in kept
    assert MASK in kept


@given(SECRET_NAME, nested(SECRET))
def test_all_that_a_secret_field_holds_is_masked(name, value):
    assert redacted(value, name) == MASK


@given(st.dictionaries(PLAIN_NAME, nested(PLAIN)))
def test_what_is_no_secret_stays_as_it_is(fields):
    assert redacted_fields(fields) == fields


@given(
    st.sampled_from(["nats", "tls", "https", "postgresql+psycopg", "redis"]),
    st.text("abcdefgh-_.%", min_size=1, max_size=20),
    SECRET,
    st.sampled_from(["", "see ", "(", "a b\n", "url="]),
)
def test_credentials_in_urls_are_masked_wherever_they_stand(scheme, user, secret, before):
    text = f"{before}{scheme}://{user}:{secret}@host:4222/x?a=b, {scheme}://{secret}@other"
    for kept in (clean_text(text), redacted({"list": [text]})["list"][0]):
        assert secret not in kept
        assert f"{scheme}://{user}:{MASK}@host:4222/x?a=b" in kept
        assert f"{scheme}://{MASK}@other" in kept


@given(SECRET_NAME, SECRET)
def test_assignments_in_text_are_masked(name, secret):
    for text in (
        f"{name}={secret}", f"x?a=1&{name}={secret}&b=2", f'{{"{name}": "{secret}", "b": 2}}',
        f"{{'{name}': '{secret}'}}", f"{name} = {secret}; more",
    ):  # fmt: skip
        assert secret not in clean_text(text)


@given(SECRET)
def test_what_is_a_secret_by_its_form_is_masked(secret):
    for text in (
        f"Authorization: Bearer {secret}", f"authorization: Basic {secret}",
        f"got Bearer {secret}{secret}", f"eyJ{secret}.eyJ{secret}.{secret}",
    ):  # fmt: skip
        assert secret not in clean_text(text)
    assert clean_text("SU" + "A2" * 28) == MASK


@given(st.text())
def test_any_text_comes_out_short_printable_and_the_same_when_cleaned_again(text):
    once = clean_text(text)
    assert len(once) <= max(TEXT_MAX_CHARS, len(text))
    assert not any(ord(c) < 32 and c not in "\t\n" for c in once)
    assert clean_text(once) == once
    msgspec.json.encode(once)


@pytest.mark.parametrize(
    "text",
    ["model.loaded", "loaded in 3 ms: /a/b", "tokens=512 max_tokens=1024", "key=abc", "a@b.de",
     "http://host:80/@x", "password=None", "12:30:00 token: expected ')'", "Basic information",
     'File "/x.py", line 3, in y\n    raise ValueError("why")'],
)  # fmt: skip
def test_ordinary_text_stays_as_it_is(text):
    assert clean_text(text) == text


def test_terminal_escapes_leave_and_their_text_stays():
    assert clean_text("\x1b[1;31mred\x1b[0m \x1b]0;title\x07\x1b(Bdone\r\n") == "red done\n"


def test_a_number_of_tokens_is_a_count_and_a_flag_tells_nothing():
    assert redacted({"tokens": 512, "has_password": True, "password": None}) == {
        "tokens": 512, "has_password": True, "password": None,
    }  # fmt: skip
    assert redacted({"password": 1234}) == {"password": MASK}


def test_what_json_cannot_carry_is_made_so_that_it_can():
    deep = []
    for _ in range(500):
        deep = [deep]
    kept = redacted({"huge": 2**70, "half": "\ud800", "deep": deep})
    assert msgspec.json.decode(msgspec.json.encode(kept))["huge"] == str(2**70)


@pytest.mark.parametrize(
    "text", ["a" * 10**6, "://" * 10**5, 'a="' * 10**5, "://" + "a:" * 10**5, "'a':" * 10**5,
             " " * 10**5 + "=", "\x1b[" + "0" * 10**6, "eyJaaaaaaaaa." * 10**4]
)  # fmt: skip
def test_no_text_takes_more_than_linear_time(text):
    # A few milliseconds; an expression that goes back and forth would take minutes.
    began = time.perf_counter()
    clean_text(text)
    assert time.perf_counter() - began < 10


def test_the_list_of_names_is_about_words_not_letters():
    assert is_secret("userPassword2")
    assert is_secret("APIKey")
    assert not is_secret("keyboard")
    assert not is_secret("secretary")

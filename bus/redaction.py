"""What may stand in a log: text without terminal escapes, fields without secrets.

A field is masked for its name, whatever it holds and however deep it stands. In text, messages
and tracebacks included, masked are the credentials of URLs, `password=...` and `"password": "..."`
under such names, `Authorization` headers, and what is a secret by its form: bearer tokens, JSON
Web Tokens, the seeds of NATS keys. It errs on the side of masking, except for what an operator
of models needs: `key` alone names an entry, and a number of tokens is a count.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final

MASK: Final = "***"
TEXT_MAX_CHARS: Final = 16_384
DEPTH_MAX: Final = 24
_INTEGERS: Final = range(-(2**63), 2**64)


def is_secret(name: str) -> bool:
    """Tell whether a field of this name holds a secret: `dbPassword`, `X-Api-Key`, `token`."""
    return _is_secret(name[:200])


def redacted(value: Any, name: str = "") -> Any:
    """Return a value of builtin types as it may be logged; containers are copied.

    Args:
        value: Anything that JSON can carry.
        name: The field that holds it.
    """
    return _redacted(value, name, 0)


def redacted_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a record as they may be logged."""
    return {clean_text(name): _redacted(value, name, 0) for name, value in fields.items()}


def clean_text(text: str) -> str:
    """Return text as it may be logged: short enough, printable, and without secrets."""
    # Bounded before it is searched: whoever logs a megabyte pays for 16 KiB.
    text = text[:TEXT_MAX_CHARS]
    if not text.isprintable():
        text = _ESCAPES.sub("", text)
        # What came from file names may hold halves of characters, which JSON cannot carry.
        text = text.encode(errors="replace").decode()
    if "://" in text:
        text = _URL.sub(_url_without_credentials, text)
    if "=" in text or ":" in text:
        text = _HEADER.sub(rf"\1{MASK}", text)
        text = _ASSIGNED.sub(_without_value, text)
    return _BY_FORM.sub(_without_form, text)


def _redacted(value: Any, name: str, depth: int) -> Any:
    # Whether there is one may be told.
    if value is None or isinstance(value, bool):
        return value
    if name and _is_secret(name[:200]) and not _is_count(value, name):
        return MASK
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, int):
        return value if value in _INTEGERS else str(value)[:TEXT_MAX_CHARS]
    if isinstance(value, dict):
        if depth >= DEPTH_MAX:
            return "{...}"
        return {
            clean_text(str(key)): _redacted(inner, str(key), depth + 1)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        if depth >= DEPTH_MAX:
            return "[...]"
        return [_redacted(inner, "", depth + 1) for inner in value]
    return value


def _is_count(value: Any, name: str) -> bool:
    """Tell whether this is a number of tokens, or of what passed, and not one of them."""
    return isinstance(value, int | float) and bool(_COUNTED.search(name))


@lru_cache(maxsize=4_096)
def _is_secret(name: str) -> bool:
    words = [word.lower() for word in _WORD.findall(name)]
    if not words or words[-1] in _ABOUT_IT:
        return False
    if any(word.endswith(_SECRET_ENDINGS) for word in words):
        return True
    if words[-1] == "pass" or not _SECRET_WORDS.isdisjoint(words):
        return True
    return any(word in {"key", "keys"} and before in _KEYS_OF for before, word in pairwise(words))


# `maxTokens`, `X-Api-Key`, `APIKey`, `db_password2`: words of one case, digits left out.
_WORD: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_SECRET_ENDINGS: Final = (
    "password", "passwords", "passwd", "passphrase", "passcode", "secret", "secrets", "apikey",
    "apikeys", "accesskey", "privatekey", "secretkey", "token", "tokens", "credential",
    "credentials", "authorization", "cookie", "cookies",
)  # fmt: skip
_SECRET_WORDS: Final = {"pwd", "creds", "jwt", "bearer", "otp", "totp", "nkey", "apitoken"}
# `key` alone is a key of a data set, and `sort_key`, `public_key` are none to hide.
_KEYS_OF: Final = {
    "access", "account", "admin", "api", "auth", "bkg", "client", "encryption", "license",
    "master", "private", "secret", "service", "session", "shared", "signing", "ssh", "user",
}  # fmt: skip
# `token_type`, `password_file`: they speak about a secret, and are none.
_ABOUT_IT: Final = {
    "age", "count", "counts", "dir", "exists", "expires", "expiry", "file", "length", "limit",
    "min", "max", "name", "path", "policy", "present", "required", "total", "ttl", "type", "usage",
    "used",
}  # fmt: skip
_COUNTED: Final = re.compile(r"(?i)(?:tokens?|pass)\W*$")

# Escape sequences of terminals (ECMA-48), and control characters but tab and new line.
_ESCAPES: Final = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]+[0-~]|.)?"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)
# Each begins at a fixed text or at the beginning of a word, and never gives back what it took:
# so none takes more than linear time, whatever somebody logs.
_URL: Final = re.compile(r"://([^\s/?#\"'<>`\\]*)@")
_HEADER: Final = re.compile(
    r"(?i)(?<![\w-])((?:proxy-)?authorization[\"']?\s*+[:=]\s*+[\"']?)"
    r"(?:[A-Za-z]{1,20}+[ ]+)?[^\s,;\"'*]++"
)
_ASSIGNED: Final = re.compile(
    r"(?<![\w.-])([A-Za-z_][\w.-]{0,80}+)"
    r"(\s{0,3}+=\s{0,3}+|[\"']\s{0,3}+:\s{0,3}+)"
    r"(\"(?:[^\"\\]|\\.)*+\"?|'(?:[^'\\]|\\.)*+'?|[^\s,;&\"'}\])]++)"
)
_BY_FORM: Final = re.compile(
    r"(?i:(\bbearer )\s*+[\w.~+/=-]{16,}+)"
    r"|\beyJ[\w-]{8,}+\.eyJ[\w-]{8,}+\.[\w-]*+"
    r"|\bS[AUNOCX][A-Z2-7]{56}\b"
)


def _url_without_credentials(found: re.Match[str]) -> str:
    user, colon, _ = found[1].partition(":")
    return f"://{user}:{MASK}@" if colon else f"://{MASK}@"


def _without_value(found: re.Match[str]) -> str:
    name, between, value = found[1], found[2], found[3]
    if not _is_secret(name) or value in _TELLS_NOTHING:
        return found[0]
    if _COUNTED.search(name) and value.replace(".", "", 1).isdecimal():
        return found[0]
    quote = value[0] if value[0] in "\"'" else ""
    return f"{name}{between}{quote}{MASK}{quote}"


def _without_form(found: re.Match[str]) -> str:
    return f"{found[1] or ''}{MASK}"


_TELLS_NOTHING: Final = {"null", "None", "true", "false", "True", "False", '""', "''", MASK}

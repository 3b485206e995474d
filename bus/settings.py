"""What every process of ours is told from outside: the environment, read once."""

import os
import socket
from pathlib import Path

import msgspec
import platformdirs

from bus.errors import InvalidRequest
from bus.subjects import DEFAULT_ROOT

DEFAULT_NATS_URL = "nats://127.0.0.1:4222"
# What the object store of artefacts may hold, in bytes.
ARTEFACTS_MAX_BYTES = "BKG_ARTEFACTS_MAX_BYTES"
# How many bytes the body of a request may have that is too large for one message.
BODY_MAX_BYTES = "BKG_BODY_MAX_BYTES"
BODY_MAX_BYTES_DEFAULT = 64 * 1024 * 1024
# How many bytes of such bodies one process may have in their store at a time.
BODIES_SHARE_BYTES = "BKG_BODIES_SHARE_BYTES"
BODIES_SHARE_BYTES_DEFAULT = 512 * 1024 * 1024


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The environment of a process.

    Attributes:
        nats_url: `BKG_NATS_URL`, the broker.
        root: `BKG_ROOT`, the first token of every subject.
        data_dir: `BKG_DATA_DIR`, what this host keeps.
        slot: `BKG_SLOT`, the place that this worker fills; None: the lowest free one.
        generation: `BKG_GENERATION`, of the desired state that it was started for.
        log_level: `BKG_LOG_LEVEL`, the least level that is published.
        host: `BKG_HOST_NAME`, this host's name.
        labels: `BKG_HOST_LABELS`, `key=value` with commas between: what plugins can require of it.
        probe_port: `BKG_PROBE_PORT`, the loopback HTTP port of this worker; 0: a free one.
    """

    nats_url: str
    root: str
    data_dir: Path
    slot: int | None
    generation: int
    log_level: str
    host: str
    labels: dict[str, str] = {}
    probe_port: int = 0

    @property
    def cache_dir(self) -> Path:
        """What can be made again at any time."""
        return self.data_dir / "cache"

    @classmethod
    def from_env(cls) -> "Settings":
        """Read the environment.

        Raises:
            InvalidRequest: A variable has a value that it cannot have; names it.
        """
        level = os.environ.get("BKG_LOG_LEVEL", "info").lower()
        if level not in {"debug", "info", "warn", "error"}:
            raise InvalidRequest(
                f"BKG_LOG_LEVEL is {level!r}; allowed are debug, info, warn and error",
                field="BKG_LOG_LEVEL",
            )
        return cls(
            nats_url=os.environ.get("BKG_NATS_URL") or DEFAULT_NATS_URL,
            root=os.environ.get("BKG_ROOT") or DEFAULT_ROOT,
            data_dir=Path(os.environ.get("BKG_DATA_DIR") or default_data_dir()),
            slot=_number("BKG_SLOT"),
            generation=_number("BKG_GENERATION") or 0,
            log_level=level,
            host=os.environ.get("BKG_HOST_NAME") or socket.gethostname(),
            labels=labels_in(os.environ.get("BKG_HOST_LABELS", "")),
            probe_port=_number("BKG_PROBE_PORT", most=65_535) or 0,
        )


class LogLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How much the log stream keeps; what is not set stays as the stream has it.

    Attributes:
        max_records: `BKG_LOG_MAX_RECORDS`, for each plugin, slot and level.
        max_bytes: `BKG_LOG_MAX_BYTES`, of all together.
        max_days: `BKG_LOG_MAX_DAYS`.
    """

    max_records: int | None = None
    max_bytes: int | None = None
    max_days: int | None = None

    @classmethod
    def from_env(cls) -> "LogLimits":
        """Read the environment.

        Raises:
            InvalidRequest: A variable has a value that it cannot have; names it.
        """
        return cls(
            max_records=_between("BKG_LOG_MAX_RECORDS", 10, 10_000_000),
            max_bytes=_between("BKG_LOG_MAX_BYTES", 1024 * 1024, 1024**4),
            max_days=_between("BKG_LOG_MAX_DAYS", 1, 3_650),
        )


def artefacts_max_bytes() -> int | None:
    """Return what the store of artefacts may hold; None: what it may hold already.

    Raises:
        InvalidRequest: `BKG_ARTEFACTS_MAX_BYTES` is none; says what is allowed.
    """
    # Twice that still fits beside all else into the broker's `max_file`.
    return _between(ARTEFACTS_MAX_BYTES, 1024 * 1024, 256 * 1024**3)


def body_max_bytes() -> int:
    """Return how large the body of a request may be that goes by reference.

    Raises:
        InvalidRequest: `BKG_BODY_MAX_BYTES` is none; says what is allowed.
    """
    # A larger one would outlast what is kept of it, and leave the store no room for others.
    return _between(BODY_MAX_BYTES, 8 * 1024 * 1024, 128 * 1024 * 1024) or BODY_MAX_BYTES_DEFAULT


def bodies_share_bytes() -> int:
    """Return how many bytes this process may have in the store of large bodies at a time.

    Raises:
        InvalidRequest: `BKG_BODIES_SHARE_BYTES` is none; says what is allowed.
    """
    # Less than the largest body would never be enough, and more than that the store does not hold.
    least, most = body_max_bytes(), 1024 * 1024 * 1024
    return _between(BODIES_SHARE_BYTES, least, most) or BODIES_SHARE_BYTES_DEFAULT


def default_data_dir() -> Path:
    """Return where this platform keeps a user's application data."""
    return Path(platformdirs.user_data_dir("bkg", appauthor=False))


def labels_in(text: str) -> dict[str, str]:
    """Read `key=value,key=value`.

    Raises:
        InvalidRequest: A part is no `key=value`; shows it.
    """
    labels = {}
    for part in filter(None, (one.strip() for one in text.split(","))):
        key, equals, value = part.partition("=")
        if not (key.strip() and equals):
            raise InvalidRequest(
                f"the label {part!r} is no key=value; example: gpu=yes,zone=cellar",
                field="BKG_HOST_LABELS",
            )
        labels[key.strip()] = value.strip()
    return labels


def _number(variable: str, most: int | None = None) -> int | None:
    text = os.environ.get(variable)
    if not text:
        return None
    if not text.isdecimal():
        raise InvalidRequest(f"{variable} is {text!r}, not a whole number", field=variable)
    if most is not None and int(text) > most:
        raise InvalidRequest(f"{variable} is {text}; allowed is up to {most}", field=variable)
    return int(text)


def _between(variable: str, least: int, most: int) -> int | None:
    text = os.environ.get(variable)
    if not text:
        return None
    if not (text.isascii() and text.isdecimal()) or not least <= int(text) <= most:
        raise InvalidRequest(
            f"{variable} is {text[:40]!r}; allowed are whole numbers from {least:,} to {most:,}",
            field=variable,
        )
    return int(text)

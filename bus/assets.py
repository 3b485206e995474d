"""Every bucket, stream and object store: what it is for, what it takes, and how it is kept."""

from typing import Any, Final

from bus.settings import LogLimits
from bus.streams import MIB, NS
from bus.subjects import (
    BROKER_TELEMETRY,
    EVENT,
    GALLERY_CHANGE,
    GALLERY_ENTRY,
    GALLERY_HEAD,
    GALLERY_IMPORT,
    GALLERY_REJECTION,
    GALLERY_SETTINGS,
    GALLERY_SUBJECT,
    HOST_TELEMETRY,
    LIVE_LOG,
    LOG,
    STATUS,
    TELEMETRY,
)

# A key of the observed bucket leaves when it was not written again for this long.
OBSERVED_TTL_S: Final = 30
# A body outlives its request by nothing but accident: the longest takes 540 s to come in, and 300 s
# to be answered.
BODY_AGE_S: Final = 900
# What of the log stream's limits can be set, and what one of them is to the broker.
LOG_LIMITS: Final = {"max_msgs_per_subject": 1, "max_bytes": 1, "max_age": 86_400 * NS}


def declared(root: str) -> list[dict[str, Any]]:
    """Return the configuration of every stream.

    Logs, telemetry and status are floods that do not deserve an fsync each: `persist_mode` async
    overrides the broker's `sync_interval: always` for them. All else is state.
    """
    flood = {"storage": "file", "discard": "old", "allow_direct": True, "persist_mode": "async"}
    rings = [
        {
            "name": f"{root}-logs",
            "description": "log records, a ring for each plugin, slot and level",
            "subjects": [LOG.subject(root)],
            "max_msgs_per_subject": 2_000,
            "max_bytes": 256 * MIB,
            "max_age": 30 * 86_400 * NS,
            "republish": {"src": LOG.subject(root), "dest": _republished(root)},
            **flood,
        },
        {
            "name": f"{root}-telemetry",
            "description": "telemetry of instances, hosts and the broker, a ring for each",
            "subjects": [
                feed.subject(root) for feed in (TELEMETRY, HOST_TELEMETRY, BROKER_TELEMETRY)
            ],
            # An hour at one snapshot a second, two at one every other.
            "max_msgs_per_subject": 3_600,
            "max_bytes": 128 * MIB,
            "max_age": 86_400 * NS,
            **flood,
        },
        {
            "name": f"{root}-events",
            "description": "what happened to plugins and hosts",
            "subjects": [EVENT.subject(root)],
            "max_msgs_per_subject": 5_000,
            "max_bytes": 64 * MIB,
            "max_age": 30 * 86_400 * NS,
            **flood,
        },
        {
            "name": f"{root}-status",
            "description": "changes of status, a ring for each slot",
            "subjects": [STATUS.subject(root)],
            "max_msgs_per_subject": 200,
            "max_bytes": 32 * MIB,
            "max_age": 30 * 86_400 * NS,
            **flood,
        },
    ]
    galleries = {
        "name": f"{root}-galleries",
        "description": "the events of all galleries: the last one of each entry and person",
        "subjects": [
            feed.subject(root)
            for feed in (
                GALLERY_HEAD,
                GALLERY_SETTINGS,
                GALLERY_ENTRY,
                GALLERY_SUBJECT,
                GALLERY_REJECTION,
                GALLERY_IMPORT,
            )
        ],
        "storage": "file",
        # The last one counts. Those before it are there until whoever wrote it has erased them:
        # what the broker itself displaces it leaves in its files, a face as well. So many an entry
        # may have while erasing is behind, and so many tombstones at last.
        "max_msgs_per_subject": 64,
        "max_bytes": 2_048 * MIB,
        "discard": "new",
        "allow_direct": True,
        # Many entries are stored as one: see `Stream.append_batch`.
        "allow_atomic": True,
    }
    changes = {
        "name": f"{root}-gallery-history",
        "description": "what was done to galleries, a ring for each person",
        "subjects": [GALLERY_CHANGE.subject(root)],
        "storage": "file",
        "max_msgs_per_subject": 1_000,
        "max_bytes": 256 * MIB,
        "max_age": 365 * 86_400 * NS,
        "discard": "old",
        "allow_direct": True,
    }
    return [
        *rings,
        galleries,
        changes,
        _bucket(f"{root}-desired", "what each plugin should be", history=64),
        _bucket(
            f"{root}-models",
            "models, and which of them candle should serve",
            history=8,
            max_bytes=128 * MIB,
        ),
        _bucket(f"{root}-jobs", "jobs; keys expire", history=1, max_age=7 * 86_400 * NS),
        _bucket(
            f"{root}-uploads",
            "unfinished uploads, and answers for those who ask again; keys expire",
            history=1,
            max_age=86_400 * NS,
            # Whoever uploads most only makes its own and others' second chance shorter.
            discard="old",
        ),
        _bucket(
            f"{root}-hosts",
            "hosts that are there; keys expire",
            history=1,
            max_age=OBSERVED_TTL_S * NS,
            subject_delete_marker_ttl=60 * NS,
            allow_msg_ttl=True,
        ),
        _bucket(
            f"{root}-observed",
            "what was last seen; keys expire",
            history=1,
            max_age=OBSERVED_TTL_S * NS,
            # Followers are told of an expiry by a marker.
            subject_delete_marker_ttl=60 * NS,
            allow_msg_ttl=True,
        ),
        {
            "name": f"OBJ_{root}-artefacts",
            "description": "artefacts by SHA-256",
            "subjects": [f"$O.{root}-artefacts.C.>", f"$O.{root}-artefacts.M.>"],
            "storage": "file",
            "discard": "new",
            "allow_rollup_hdrs": True,
            "allow_direct": True,
            "max_bytes": 4_096 * MIB,
        },
        {
            "name": f"OBJ_{root}-faces",
            "description": "kept images of galleries, and files that are imported or exported",
            "subjects": [f"$O.{root}-faces.C.>", f"$O.{root}-faces.M.>"],
            "storage": "file",
            "discard": "new",
            "allow_rollup_hdrs": True,
            "allow_direct": True,
            "max_bytes": 4_096 * MIB,
        },
        {
            "name": f"OBJ_{root}-bodies",
            "description": "bodies of requests that are too large for one message, until their end",
            "subjects": [f"$O.{root}-bodies.C.>", f"$O.{root}-bodies.M.>"],
            "storage": "file",
            # They need not survive the broker: no fsync.
            "persist_mode": "async",
            "discard": "new",
            "allow_rollup_hdrs": True,
            "allow_direct": True,
            "max_age": BODY_AGE_S * NS,
            "max_bytes": 1_024 * MIB,
        },
    ]


def limits_of(logs: LogLimits) -> dict[str, int]:
    """Return those limits of the log stream that are given, as the broker wants them."""
    wanted = zip(LOG_LIMITS.items(), (logs.max_records, logs.max_bytes, logs.max_days), strict=True)
    return {name: one * count for (name, one), count in wanted if count is not None}


def _bucket(name: str, description: str, *, history: int, **more: Any) -> dict[str, Any]:
    """Return the stream behind a key-value bucket, as ADR-8 lays it out."""
    return {
        "name": f"KV_{name}",
        "description": description,
        "subjects": [f"$KV.{name}.>"],
        "max_msgs_per_subject": history,
        "max_bytes": 32 * MIB,
        "storage": "file",
        "discard": "new",
        "allow_rollup_hdrs": True,
        "deny_delete": True,
        "allow_direct": True,
        **more,
    }


def _republished(root: str) -> str:
    """Return where the log stream's records appear live: the wildcards by number."""
    numbers = iter(range(1, 10))
    tokens = LIVE_LOG.subject(root).split(".")
    return ".".join(f"{{{{wildcard({next(numbers)})}}}}" if t == "*" else t for t in tokens)

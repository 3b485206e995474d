"""`docs/subjects.md`: it is what the declarations say, and its examples are real messages."""

import json
import re
from pathlib import Path
from typing import Annotated

import msgspec
import pytest
from msgspec import Meta
from nats.aio.client import Client as Nats

from bus import codec
from bus import messages as m
from bus.reference import example, render
from bus.state import Bucket, Store
from bus.subjects import ENDPOINTS, FEEDS

PAGE = Path(__file__).parents[2] / "docs" / "subjects.md"
PAYLOADS = sorted(
    {e.request for e in ENDPOINTS} | {e.reply for e in ENDPOINTS} | {f.payload for f in FEEDS},
    key=lambda kind: kind.__name__,
)


def test_the_page_is_what_the_declarations_say():
    assert PAGE.read_text() == render(), (
        "docs/subjects.md is not what bus/subjects.py, bus/messages/ and bus/state.py declare: "
        "run `make docs`, or `python -m bus.reference docs/subjects.md`, and commit it"
    )


@pytest.mark.parametrize("kind", PAYLOADS)
def test_an_example_on_the_page_can_be_read_as_what_it_is_an_example_of(kind):
    block = re.search(
        rf"^### {kind.__name__}\n.+?```json\n(.+?)```", render(), re.MULTILINE | re.DOTALL
    )
    assert block is not None
    assert codec.decode(block[1].encode(), kind) == example(kind)


def test_every_request_can_be_copied():
    page = render()
    for endpoint in ENDPOINTS:
        asked = example(endpoint.request)
        subject = endpoint.subject_of("bkg", asked)
        command = re.search(rf"`nats req {re.escape(subject)} '(.*?)'`", page)
        assert command is not None, f"{endpoint.capability} has no command"
        assert codec.decode(command[1].encode(), endpoint.request) == asked


def test_every_bucket_stands_there_with_the_key_that_it_takes():
    page = render()
    for bucket in vars(Store(Nats(), "bkg")).values():
        if isinstance(bucket, Bucket):
            name = bucket._stream.name.removeprefix("KV_")
            keys = re.findall(
                rf"^\| `{name}` \| `(\S+)` \| \[{bucket._kind.__name__}\]", page, re.MULTILINE
            )
            assert len(keys) == 1, name
            assert len(re.findall(r"<\w+>", keys[0])) == bucket._width
            assert keys[0].endswith(bucket._suffix)


def test_a_type_that_nobody_made_an_example_for_has_one():
    class Unheard(m.State, frozen=True):
        job_id: Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]
        kind: Annotated[str, Meta(min_length=3, max_length=4)]
        percent: Annotated[float, Meta(gt=5, le=100)]
        parts: Annotated[list[m.TensorInfo], Meta(min_length=2)]
        mode: m.Level | None
        digest: bytes
        why: str | None = None

    made = example(Unheard)
    assert made.why is None
    assert len(made.parts) == 2
    assert codec.decode(codec.encode(made), Unheard) == made
    assert set(json.loads(codec.encode(made))) >= {"jobId", "percent", "parts", "mode"}


def test_a_type_that_nothing_known_fits_is_named():
    class Odd(msgspec.Struct):
        odd: Annotated[str, Meta(pattern=r"\Azz-\d{7}-zz\Z")]

    with pytest.raises(ValueError, match=r"Odd\.odd"):
        example(Odd)

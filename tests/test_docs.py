"""The pages of docs/ that are written by hand say what the code does."""

import re
from pathlib import Path

import pytest
import typer

from bus import codec, instance, registration
from bus import messages as m
from bus.assets import BODY_AGE_S, OBSERVED_TTL_S
from bus.bodies import CHUNK_MIN_BYTES, IN_ITS_PLACE, REFERENCE
from bus.errors import _KINDS as KINDS
from bus.errors import ErrorBody
from bus.settings import BODIES_SHARE_BYTES_DEFAULT, BODY_MAX_BYTES_DEFAULT
from services.cli import up
from services.cli.faces_parser import faces_app
from services.gateway import inference, patience
from services.gateway.routes import capabilities
from services.rustyface import calibration
from services.supervisor import process, reconcile, replicas

DOCS = Path(__file__).parents[1] / "docs"
PROTOCOL = (DOCS / "worker-protocol.md").read_text()
OPERATIONS = (DOCS / "operations.md").read_text()
FACES = (DOCS / "faces.md").read_text()
EXAMPLES = re.findall(r"```json (\w+)\n(.+?)```", PROTOCOL, re.DOTALL)


@pytest.mark.parametrize(("kind", "body"), EXAMPLES, ids=[kind for kind, _ in EXAMPLES])
def test_an_example_of_the_workers_protocol_is_read_whole(kind, body):
    type_ = ErrorBody if kind == "ErrorBody" else getattr(m, kind)
    sent = codec.decode(body.encode(), dict)
    read = codec.decode(body.encode(), type_)
    assert codec.decode(codec.encode(read), dict).keys() == sent.keys(), "a field was passed over"


def test_the_answers_of_models_that_a_gateway_waits_for_are_as_many_as_the_page_says():
    assert f"for models' for {inference.RELAYING_MAX:,}" in OPERATIONS


def test_every_message_of_a_worker_has_its_example():
    told = {
        "PluginConfig", "Registration", "Heartbeat", "TelemetrySnapshot", "LogEvent", "CancelCall",
    }  # fmt: skip
    assert {kind for kind, _ in EXAMPLES} == told | {"ErrorBody"}


def test_every_error_stands_in_the_workers_protocol_with_its_number():
    assert {(f"`{kind.code}`", str(kind.number)) for kind in KINDS} == set(
        re.findall(r"^\| (`[a-z-]+`) \| (\d{3}) \|", PROTOCOL, re.MULTILINE)
    )


@pytest.mark.parametrize(
    "says",
    [
        f"expire {OBSERVED_TTL_S} s after",
        f"and every {registration.REGISTER_AGAIN_S:g} s",
        f"from `{registration.FIRST_FREE_SLOT}` to `{registration.LAST_FREE_SLOT}`",
        f"silent for {reconcile.SILENCE_S:g} s is killed",
        f"may be silent for {reconcile.STARTUP_GRACE_S:g} s",
        f"it has {reconcile.STARTUP_MAX_S:g} s to become",
        f"{reconcile.STOP_GRACE_S:g} s after SIGTERM",
        f"already after {replicas.STOP_ALL_S:g} s",
        f"again after {reconcile.BACKOFF_FIRST_S:g} s, then 1 s, 2 s",
        f"up to {reconcile.BACKOFF_MAX_S:g} s; after {reconcile.HEALTHY_S:g} s of running well",
        f"more than {process.LINE_MAX_BYTES:,} bytes",
        f"`BKG_BODY_MAX_BYTES` ({BODY_MAX_BYTES_DEFAULT >> 20} MiB) of whoever asks",
        f"`BKG_BODIES_SHARE_BYTES` ({BODIES_SHARE_BYTES_DEFAULT >> 20} MiB)",
        f"less than {CHUNK_MIN_BYTES:,} bytes on average",
        f"goes {BODY_AGE_S // 60} minutes after it was written",
        f"the words `{IN_ITS_PLACE.decode()}`",
        *(f"| `{name}` |" for name in sorted(REFERENCE)),
    ],
)
def test_the_figures_of_the_workers_protocol_are_those_of_the_code(says):
    assert says in PROTOCOL


@pytest.mark.parametrize(
    "says",
    [
        f"{reconcile.BACKOFF_FIRST_S:g} s, doubled each time, at most",
        f"at most {reconcile.BACKOFF_MAX_S:g} s | forgotten",
        f"forgotten after {reconcile.HEALTHY_S:g} s",
        f"at most {up.LONGEST_WAIT_S:g} s, less up to a fifth by chance | after {up.WELL_S:g} s",
        f"silent for {reconcile.SILENCE_S:g} s",
        f"{instance.MAX_IN_FLIGHT:,} requests at a time",
        f"waits for {capabilities.RELAYING_MAX} answers",
        f"nothing comes for {patience.PATIENCE_S:g} s",
        f"`{patience.RATE_SETTING}` ({patience.RATE_DEFAULT >> 10} KiB) a second",
        f"`BKG_BODIES_SHARE_BYTES` ({BODIES_SHARE_BYTES_DEFAULT >> 20} MiB)",
        f"killed {reconcile.STOP_GRACE_S:g} s after it was asked",
        f"killed after {reconcile.STARTUP_GRACE_S:g} s without",
        f"after {reconcile.STARTUP_MAX_S:g} s of heartbeats",
        f"{OBSERVED_TTL_S} s after",
    ],
)
def test_the_figures_of_the_operators_page_are_those_of_the_code(says):
    assert says in OPERATIONS


@pytest.mark.parametrize("cosine", ["0.363", "0.40", "0.42", "0.45"])
def test_the_rates_of_the_page_about_faces_are_those_that_are_told(cosine):
    [row] = re.findall(rf"^\| {cosine} \| ([0-9.]+)", FACES, re.MULTILINE)
    rate = calibration.false_match_rate("sface", float(cosine))
    assert float(row) == pytest.approx(rate, rel=0.01)


def test_the_thresholds_of_the_page_about_faces_are_those_of_the_code():
    defaults = dict(
        re.findall(r"^\| ([0-9.]+) \|.*\| \*\*(verify|search)\*\*", FACES, re.MULTILINE)
    )
    assert defaults == {
        str(calibration.VERIFY_THRESHOLDS["sface"]): "verify",
        str(calibration.THRESHOLDS["sface"]): "search",
    }
    assert f"`--size-min`, {m.QualityBounds().size_min_px} unless set" in FACES


def test_every_command_that_the_page_about_faces_names_is_there():
    known = set(typer.main.get_command(faces_app).commands)
    named = set(re.findall(r"bkg faces ([a-z]+)", FACES))
    assert named <= known
    assert not known - set(re.findall(r"[a-z]+", FACES)), "a command that the page does not name"

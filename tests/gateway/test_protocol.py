"""Models in Triton's words, there and back."""

import contextlib
import json
from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus import messages as m
from bus.errors import InvalidRequest
from services.gateway.examples import Place, examples_of
from services.gateway.protocol import configuration, load_request

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
# What a configuration has, and what others have in such a place.
WORDS = st.sampled_from(
    ["parameters", "dynamic_batching", "instance_group", "max_batch_size", "string_value", "count",
     "kind", "max_queue_delay_microseconds", "KIND_GPU", *m.ModelConfig.__struct_fields__]
)  # fmt: skip
NEAR = st.recursive(
    PLAIN | WORDS | st.sampled_from(["1.", "00", ".5", "٣", "1e-05", "nan", "inf", "NULL", "-1"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from(["config", "file:", "file:1/model.onnx", "file:..", "file:a/b/c"])
CONFIGS = st.builds(
    m.ModelConfig,
    max_batch_rows=st.none() | st.integers(1, 65_536),
    max_waiting_rows=st.none() | st.integers(1, 1_048_576),
    max_delay_ms=st.none() | st.floats(0, 10_000),
    instances=st.none() | st.integers(1, 64),
    threads=st.none() | st.integers(1, 256),
    provider=st.none() | st.sampled_from(["cpu", "cuda", "null", "123", "true"])
    | st.from_regex(r"\A[a-z0-9_-]{1,32}\Z"),
    pinned=st.booleans(),
    keep_alive_s=st.none() | st.floats(0, 31_536_000, exclude_min=True),
)  # fmt: skip
SETTINGS = st.fixed_dictionaries(
    {}, optional={"max_batch_rows": st.integers(1, 65_536), "max_delay_ms": st.floats(0, 10_000)}
)


def told(
    config: m.ModelConfig, settings: dict[str, object], *, batched: bool = True, instances: int = 0
) -> dict:
    """Return a configuration as a client reads it."""
    version = m.ModelVersion(
        version="1",
        path="a.onnx",
        checksum="0" * 64,
        format="onnx",
        added_at=datetime.now(UTC),
        config=config,
        inputs=[m.TensorInfo(name="x", datatype="FP32", shape=[-1, 3])],
        batched=batched,
    )
    spec = m.ModelSpec(id="a", versions=[version])
    said = configuration(spec, version, settings, instances)
    return json.loads(msgspec.json.encode(said))


def read(said: object, settings: dict[str, object] | None = None) -> m.ModelConfig | None:
    return load_request("a", {"config": json.dumps(said)}, settings).config


@given(st.dictionaries(NAMES | st.text(), PLAIN | NEAR.map(json.dumps), max_size=3))
def test_whatever_a_load_request_holds_it_is_read_or_refused(parameters):
    with contextlib.suppress(InvalidRequest):
        load_request("a", parameters)


@given(st.dictionaries(WORDS, NEAR, max_size=5))
def test_whatever_a_configuration_holds_it_is_read_or_refused(said):
    with contextlib.suppress(InvalidRequest):
        read(said)


@pytest.mark.parametrize(
    "config",
    ["[" * 100_000, '{"a":' * 100_000, "\ud800", "", "null", None, 5, [],
     '{"dynamic_batching": {"max_queue_delay_microseconds": 1' + "0" * 400 + "}}"],
)  # fmt: skip
def test_a_configuration_that_is_no_object_is_refused(config):
    with pytest.raises(InvalidRequest, match="parameters"):
        load_request("a", {"config": config})


@given(CONFIGS, SETTINGS, st.booleans(), st.integers(0, 64))
def test_what_a_client_sends_back_unchanged_changes_nothing(config, settings, batched, instances):
    said = told(config, settings, batched=batched, instances=instances)
    assert read(said, settings) == config


def test_the_count_is_what_is_run_and_not_said_where_nobody_knows():
    (group,) = told(m.ModelConfig(), {}, instances=4)["instance_group"]
    assert group["count"] == 4
    (group,) = told(m.ModelConfig(instances=3), {}, instances=4)["instance_group"]
    assert group["count"] == 3
    (group,) = told(m.ModelConfig(), {})["instance_group"]
    assert "count" not in group


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_count_that_a_client_writes_itself_is_taken(count):
    assert read({"instance_group": [{"count": count}]}).instances == count


@given(CONFIGS, SETTINGS, st.integers(1, 64), st.integers(0, 64))
def test_what_a_client_changes_is_what_changes(config, settings, count, instances):
    said = told(config, settings, instances=instances)
    said["max_batch_size"] = 7
    said["dynamic_batching"]["max_queue_delay_microseconds"] = 1_500
    said["instance_group"][0]["count"] = count
    changed = read(said, settings)
    again = told(changed, settings, instances=instances)
    assert again["max_batch_size"] == 7
    assert again["dynamic_batching"]["max_queue_delay_microseconds"] == 1_500
    assert again["instance_group"][0]["count"] == count
    assert (changed.threads, changed.pinned, changed.keep_alive_s, changed.max_waiting_rows) == (
        config.threads, config.pinned, config.keep_alive_s, config.max_waiting_rows,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("before", "kind", "after"),
    [("cpu", "KIND_GPU", "cuda"), ("cuda", "KIND_CPU", "cpu"), ("tensorrt", "KIND_GPU", "tensorrt"),
     (None, "KIND_CPU", None)],
)  # fmt: skip
def test_a_client_can_move_a_model_to_another_processor(before, kind, after):
    said = told(m.ModelConfig(provider=before), {})
    said["instance_group"][0]["kind"] = kind
    assert read(said).provider == after


def test_an_unknown_parameter_is_refused_by_name():
    with pytest.raises(InvalidRequest, match="'confog' is not taken here; allowed are `config`"):
        load_request("a", {"confog": "{}"})


def test_an_example_for_any_number_of_axes_has_the_shape_that_was_run():
    tensors = [m.TensorInfo(name="x", datatype="FP32", shape=[-1])]
    place = Place(url="http://here", root="bkg", with_key=False)
    told = examples_of(place, "a", None, (tensors, tensors), {"x": [2, 3]})
    assert '"shape":[2,3]' in told.curl.replace(" ", "")

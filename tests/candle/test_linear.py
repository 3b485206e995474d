"""Linear models: what else their files must not hold, and what a pass may give."""

import json
import re

import numpy as np
import pytest

from bus.errors import InvalidRequest, Unprocessable
from services.candle.runtimes import linear as linear_file
from services.candle.runtimes.linear import Linear


def content(**changes: object) -> bytes:
    model = {"input_dim": 2, "output_dim": 1, "weights": [1, 2], "bias": [0.5]} | changes
    return json.dumps({k: v for k, v in model.items() if v is not ...}).encode()


def test_bytes_are_as_good_as_a_file(tmp_path):
    (tmp_path / "m.json").write_bytes(content())
    x = np.array([[3, 4]], np.float32)
    for model in (Linear.load(content()), Linear.load(tmp_path / "m.json")):
        assert model.run({"inputs": x})["outputs"].tolist() == [[11.5]]


@pytest.mark.parametrize("field", ["input_dim", "output_dim", "weights", "bias"])
def test_a_missing_field_is_named(field):
    with pytest.raises(Unprocessable, match=f"missing required field `{field}`"):
        Linear.load(content(**{field: ...}))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"input_dim": True}, "input_dim"),
        ({"input_dim": 2.5}, "input_dim"),
        ({"output_dim": -1}, "output_dim"),
        ({"output_dim": linear_file.MAX_DIM + 1}, "output_dim"),
        ({"weights": [1, "2"]}, "weights[1]"),
        ({"weights": [1, None]}, "weights[1]"),
        ({"bias": [1e39]}, "bias[0]"),
        ({"metadata": []}, "metadata"),
    ],
)
def test_a_wrong_value_is_named_by_its_place(changes, field):
    with pytest.raises(Unprocessable, match=re.escape(field)) as raised:
        Linear.load(content(**changes))
    assert raised.value.field == field


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_that_is_none_is_refused(number):
    with pytest.raises(Unprocessable, match="no linear model"):
        Linear.load(content().replace(b"0.5", number.encode()))


def test_dimensions_that_promise_gigabytes_cost_nothing():
    with pytest.raises(Unprocessable, match="weights length 2 does not match shape 1000000x"):
        Linear.load(content(input_dim=1_000_000, output_dim=1_000_000))


def test_a_file_too_large_is_refused_by_its_size(tmp_path):
    with (tmp_path / "m.json").open("wb") as file:
        file.truncate(linear_file.MAX_BYTES + 1)
    with pytest.raises(Unprocessable, match=r"268,435,457 bytes.* may have 268,435,456"):
        Linear.load(tmp_path / "m.json")


def test_a_file_that_is_gone_is_said_to_be(tmp_path):
    with pytest.raises(Unprocessable, match=r"m\.json cannot be read: No such file"):
        Linear.load(tmp_path / "m.json")


def test_what_overflows_float32_comes_out_infinite():
    model = Linear.load(content(weights=[3e38, 3e38]))
    assert model.run({"inputs": np.full((1, 2), 3e38, np.float32)})["outputs"] == [[np.inf]]


def test_rows_of_another_type_or_length_are_refused():
    model = Linear.load(content())
    model.warm_up()
    for wrong in (np.zeros((1, 3), np.float32), np.zeros((1, 2)), np.zeros(2, np.float32)):
        with pytest.raises(InvalidRequest, match="the model takes") as raised:
            model.run({"inputs": wrong})
        assert raised.value.field == "inputs"

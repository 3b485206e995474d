"""What a cosine means."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus import messages as m
from services.rustyface import calibration
from services.rustyface.calibration import (
    Thresholds,
    cosine_at,
    expected_false,
    false_match_rate,
    rate_min,
)

cosines = st.floats(-1, 1)
rates = st.floats(1e-9, 1, exclude_max=True)


@pytest.mark.parametrize(
    ("cosine", "rate"), [(0.363, 1.5e-3), (0.40, 2.7e-4), (0.42, 1e-4), (0.45, 1.3e-5)]
)
def test_the_rates_that_were_measured_come_back(cosine: float, rate: float):
    assert false_match_rate("sface", cosine) == pytest.approx(rate)
    assert cosine_at("sface", rate) == pytest.approx(cosine)


@given(cosines, cosines)
def test_a_higher_cosine_never_has_a_higher_rate(a: float, b: float):
    low, high = (false_match_rate("sface", cosine) for cosine in sorted((a, b)))
    assert low is None or high <= low


@given(rates)
def test_what_is_promised_for_a_rate_keeps_it(rate: float):
    cosine = cosine_at("sface", rate)
    if cosine is None:
        assert rate < rate_min("sface")
    else:
        # What is told has three digits.
        assert false_match_rate("sface", cosine) <= rate * 1.0051


def test_nothing_is_claimed_beyond_what_was_measured():
    assert false_match_rate("sface", 0.36) is None
    assert false_match_rate("sface", 1.0) == false_match_rate("sface", 0.45)
    assert cosine_at("sface", 1e-9) is None
    assert cosine_at("sface", 0.5) == 0.363


@pytest.mark.parametrize("embedder", ["pixel32", "somebody's"])
def test_of_other_embedders_no_rate_is_known(embedder: str):
    assert false_match_rate(embedder, 0.9) is None
    assert cosine_at(embedder, 0.01) is None
    assert expected_false(embedder, 0.9, 1_000) is None
    assert rate_min(embedder) is None


def test_false_matches_grow_with_the_gallery():
    assert expected_false("sface", 0.42, 10_000) == pytest.approx(1)
    assert expected_false("sface", 0.42, 30) == pytest.approx(0.003)
    assert expected_false("sface", 0.42, 0) == 0


@pytest.mark.parametrize("cosine", [0.363, 0.38, 0.45, 0.9])
def test_rates_have_three_digits_as_they_were_measured_no_better(cosine: float):
    for rate in (false_match_rate("sface", cosine), expected_false("sface", cosine, 12_345)):
        assert rate == float(f"{rate:.3g}")


def test_a_dataset_has_its_own_threshold_or_the_plugins_or_the_embedders():
    thresholds = Thresholds("sface")
    plain = m.DatasetSettings()
    assert thresholds.search("sface", plain) == calibration.THRESHOLDS["sface"] == 0.45
    assert thresholds.verify("sface") == calibration.VERIFY_THRESHOLDS["sface"] == 0.363
    thresholds.plugin = 0.5
    assert thresholds.search("sface", plain) == 0.5
    assert thresholds.search("sface", m.DatasetSettings(threshold=0.6)) == 0.6
    assert thresholds.search("sface", m.DatasetSettings(threshold=0.0)) == 0.0
    assert thresholds.verify("sface", m.DatasetSettings(verify_threshold=0.4)) == 0.4


def test_an_embedder_that_somebody_brought_brings_its_thresholds_for_its_own_datasets():
    thresholds = Thresholds("mine", 0.3, 0.2)
    assert thresholds.both("mine", m.DatasetSettings()) == (0.3, 0.2)
    assert thresholds.both("sface", m.DatasetSettings()) == (0.45, 0.363)
    assert thresholds.both("pixel32", m.DatasetSettings()) == (0.99, 0.99)


def test_without_any_threshold_nobody_is_named():
    assert Thresholds("unknown").search("unknown", m.DatasetSettings()) == 1

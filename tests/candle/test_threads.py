"""The processors that a worker may use are divided among its models, and filled by each."""

import pytest

from bus import messages as m
from services.candle.settings import INSTANCES_MAX, CandleSettings, instances_of, threads_of


@pytest.mark.parametrize(
    ("processors", "models", "threads"), [(8, 1, 8), (8, 3, 2), (2, 3, 1), (0.5, 1, 1), (4, 0, 4)]
)
def test_threads_of_a_run_are_a_fair_share_of_the_processors(processors, models, threads):
    assert threads_of(m.ModelConfig(), CandleSettings(), processors, models) == threads


def test_threads_are_as_the_model_says_or_else_as_the_plugin_does():
    assert threads_of(m.ModelConfig(threads=3), CandleSettings(threads=5), 8, 1) == 3
    assert threads_of(m.ModelConfig(), CandleSettings(threads=5), 8, 1) == 5


@pytest.mark.parametrize(
    ("threads", "processors", "instances"),
    [(1, 2, 2), (2, 2, 1), (2, 8, 4), (8, 2, 1), (1, 0.5, 1), (1, 500, INSTANCES_MAX)],
)
def test_as_many_runs_go_on_as_fill_the_processors(threads, processors, instances):
    assert instances_of(m.ModelConfig(), threads, processors) == instances


def test_runs_at_the_same_time_are_as_the_model_says():
    assert instances_of(m.ModelConfig(instances=5), 1, 2) == 5


def test_another_provider_has_one_run_at_a_time():
    assert instances_of(m.ModelConfig(provider="cuda"), 1, 8) == 1
    assert instances_of(m.ModelConfig(provider="cpu"), 1, 8) == 8

"""The sample models: what their README promises."""

from pathlib import Path

import numpy as np
import pytest

from services.candle.models import make
from services.candle.runtimes import open_model

SHIPPED = Path(make.__file__).parent


def test_the_linear_sample_can_be_checked_by_hand():
    model = open_model(SHIPPED / "linear-demo.json")
    x = np.array([[1, 2, 3]], np.float32)
    assert model.run({"inputs": x})["outputs"].tolist() == [[6, -1.5]]


def test_the_iris_sample_names_the_flowers_of_its_readme():
    model = open_model(SHIPPED / "iris.onnx")
    flowers = np.array([[5.1, 3.5, 1.4, 0.2], [6.7, 3.0, 5.2, 2.3]], np.float32)
    given = model.run({"flower": flowers})
    assert given["species"].tolist() == [0, 2]
    assert given["probabilities"].max(axis=1) == pytest.approx([0.998, 0.998], abs=5e-4)
    assert given["probabilities"].sum(axis=1) == pytest.approx([1, 1], abs=1e-6)


def test_the_flowers_held_back_from_training_are_named_as_well_as_its_readme_says():
    values, species = make.iris()
    held = np.random.default_rng(1936).permutation(150)[120:]
    model = open_model(SHIPPED / "iris.onnx")
    said = model.run({"flower": values[held].astype(np.float32)})["species"]
    assert (said == species[held]).all()
    assert model.metadata["accuracy_on_30_held_back"] == "1.000"


def test_making_them_twice_gives_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        make.make(tmp_path / folder)
    for name in ("linear-demo.json", "iris.onnx"):
        a, b = (tmp_path / folder / name for folder in ("a", "b"))
        assert a.read_bytes() == b.read_bytes()

"""Photos and a pipeline with the real nets."""

from collections.abc import Callable
from pathlib import Path

import pytest

from services.rustyface import images, samples
from services.rustyface import pipeline as pipelines
from services.rustyface.images import Image
from services.rustyface.pipeline import Pipeline

Photo = Callable[[str], Image]


@pytest.fixture(scope="session")
def samples_dir() -> Path:
    """Where the sample photos lie."""
    return Path(next(iter(samples.__path__)))


@pytest.fixture(scope="session")
def photo(samples_dir: Path) -> Photo:
    """Gives a sample photo's pixels by name, such as ``astronaut``."""
    return lambda name: images.decode((samples_dir / f"{name}.jpg").read_bytes())


@pytest.fixture(scope="session")
def weights_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the repaired nets of this run are kept."""
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="session")
def pipeline(weights_cache: Path) -> Pipeline:
    """YuNet and SFace, loaded once for all tests."""
    return pipelines.load(weights_cache)

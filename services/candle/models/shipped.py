"""The sample models: what each is for, and under which licence it comes."""

import hashlib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Final

from bus import messages as m

LICENCE: Final = "Apache-2.0"
# File name to what it shows. The README beside this file tells more of them.
SAMPLES: Final[Mapping[str, str]] = {
    "iris.onnx": "a sample: iris species from four measurements, trained on Fisher's iris data",
    "linear-demo.json": "a sample: two sums over three numbers, to be checked by hand",
}


def licence_of(checksum: str) -> str | None:
    """Return the licence of the sample with these bytes; None if they are no sample's."""
    return LICENCE if checksum in _digests() else None


def shipped() -> list[m.ShippedModel]:
    """Return the sample models with their licences."""
    folder = files("services.candle.models")
    found = []
    for name, used_for in SAMPLES.items():
        content = folder.joinpath(name).read_bytes()
        found.append(
            m.ShippedModel(
                name=name,
                version="1",
                checksum=hashlib.sha256(content).hexdigest(),
                size_bytes=len(content),
                licence=LICENCE,
                source="made by bkg: services/candle/models/make.py",
                used_for=used_for,
            )
        )
    return found


@cache
def _digests() -> frozenset[str]:
    return frozenset(one.checksum for one in shipped())

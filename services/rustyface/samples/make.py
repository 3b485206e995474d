"""Make the sample photos anew from the pictures that scikit-image carries.

Run ``python -m services.rustyface.samples.make`` where scikit-image is installed (it comes with
the development dependencies). The files are in the repository; this says how they came about.
"""

from importlib import import_module
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np

HERE: Final = Path(__file__).parent


def main() -> None:
    """Write the four photos beside this file."""
    # Imported here by name: only who makes the photos anew needs it, and it carries no types.
    data: Any = import_module("skimage.data")
    astronaut = cv2.cvtColor(data.astronaut(), cv2.COLOR_RGB2BGR)
    _write("astronaut", astronaut)
    _write("astronaut-changed", changed(astronaut))
    _write("cameraman", data.camera())
    _write("coffee", cv2.cvtColor(data.coffee(), cv2.COLOR_RGB2BGR))


def changed(photo: Any) -> Any:
    """Return a photo as another camera might have taken it: mirrored, darker, smaller."""
    height, width = photo.shape[:2]
    size = (round(width * 0.6), round(height * 0.6))
    small = cv2.resize(photo[:, ::-1], size, interpolation=cv2.INTER_AREA)
    return np.asarray(small * 0.6, np.uint8)


def _write(name: str, photo: Any) -> None:
    if not cv2.imwrite(str(HERE / f"{name}.jpg"), photo, [cv2.IMWRITE_JPEG_QUALITY, 85]):
        raise OSError(f"{name}.jpg cannot be written")


if __name__ == "__main__":
    main()

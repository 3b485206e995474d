"""Photos as large as cameras make them, of one face that is in the sample photos."""

from functools import cache
from pathlib import Path

import cv2
import numpy as np

from services.rustyface import samples

SAMPLES = Path(next(iter(samples.__path__)))


@cache
def camera_photo(megabytes: int = 12) -> bytes:
    """Return a JPEG of 16 megapixels with a large face, of at least so many million bytes."""
    small = cv2.imread(str(SAMPLES / "astronaut.jpg"))
    photo = cv2.resize(small, (4_000, 4_000), interpolation=cv2.INTER_CUBIC)
    # What a sensor adds, and no encoder can leave out.
    noise = np.random.default_rng(7).integers(-24, 25, photo.shape, np.int16)
    noisy = (photo + noise).clip(0, 255).astype(np.uint8)
    for quality in range(80, 101, 2):
        done, data = cv2.imencode(".jpg", noisy, [cv2.IMWRITE_JPEG_QUALITY, quality])
        assert done
        if len(data) >= megabytes * 1_000_000:
            return data.tobytes()
    raise AssertionError(f"no quality gives {megabytes} MB")

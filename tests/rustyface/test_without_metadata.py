"""Pictures as they are kept: the same picture, and nothing else of the file."""

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.errors import BusError, TooLarge, Unprocessable
from services.rustyface.photos.exif import orientation_of
from services.rustyface.photos.images import decode, without_metadata
from tests.rustyface.files import (
    PICTURE,
    SECRETS,
    chunk,
    encoded,
    exif_of,
    tiff,
    with_exif,
)

HOLES = np.dstack([PICTURE, np.where(PICTURE[:, :, 0] > 60, 255, 90).astype(np.uint8)])
LOSSLESS = (cv2.IMWRITE_WEBP_QUALITY, 101)


def files(orientation: int) -> dict[str, bytes]:
    exif = exif_of(orientation)
    tiff_with_place = tiff(PICTURE, orientation=orientation) + exif
    return {
        "JPEG": with_exif(encoded(".jpg"), exif),
        "progressive JPEG": with_exif(
            encoded(".jpg", PICTURE, cv2.IMWRITE_JPEG_PROGRESSIVE, 1), exif
        ),
        "grey JPEG": with_exif(encoded(".jpg", PICTURE[:, :, 0]), exif),
        "PNG": with_exif(encoded(".png"), exif),
        "PNG with holes": with_exif(encoded(".png", HOLES), exif),
        "16-bit PNG": with_exif(encoded(".png", HOLES.astype(np.uint16) * 257), exif),
        "lossy WebP": with_exif(encoded(".webp", PICTURE, cv2.IMWRITE_WEBP_QUALITY, 80), exif),
        "WebP": with_exif(encoded(".webp", PICTURE, *LOSSLESS), exif),
        "WebP with holes": with_exif(encoded(".webp", HOLES, *LOSSLESS), exif),
        "lossy WebP with holes": with_exif(
            encoded(".webp", HOLES, cv2.IMWRITE_WEBP_QUALITY, 80), exif
        ),
        "BMP": encoded(".bmp") + exif,
        "TIFF": tiff_with_place,
        "GIF": encoded(".gif") + exif,
    }


@pytest.mark.parametrize("kind", files(1))
@pytest.mark.parametrize("orientation", [1, 6, 7])
def test_what_is_kept_shows_the_same_picture_and_tells_no_place_no_maker_no_text(
    kind: str, orientation: int
):
    data = files(orientation)[kind]
    assert any(secret in data for secret in SECRETS)
    kept = without_metadata(data)
    assert (decode(kept) == decode(data)).all()
    for secret in SECRETS:
        assert secret not in kept


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "lossy WebP"])
def test_coded_pixels_are_not_coded_again(kind: str):
    """A second loss would give other vectors; and nothing grows."""
    data = files(6)[kind]
    kept = without_metadata(data)
    assert len(kept) < len(data)
    assert without_metadata(kept) == kept


def test_a_viewer_turns_what_is_kept_as_it_turned_the_photo():
    data = with_exif(encoded(".jpg"), exif_of(6))
    shown, kept = (
        cv2.imdecode(np.frombuffer(one, np.uint8), cv2.IMREAD_COLOR)
        for one in (data, without_metadata(data))
    )
    assert shown.shape == (40, 24, 3)
    assert (shown == kept).all()


def test_an_upright_photo_is_kept_without_any_exif(samples_dir: Path):
    plain = (samples_dir / "astronaut.jpg").read_bytes()
    kept = without_metadata(with_exif(plain, exif_of(1)))
    assert b"Exif" not in kept
    assert (decode(kept) == decode(plain)).all()


def test_of_an_animation_one_picture_is_kept():
    frame = struct.pack(">IIIIIHHBB", 0, 40, 24, 0, 0, 1, 10, 0, 0)
    second = chunk(b"fcTL", struct.pack(">I", 1) + frame[4:])
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in PICTURE[:, :, ::-1]))
    plain = encoded(".png")
    head, rest = plain[:33], plain[33:-12]
    animated = b"".join(
        [
            head,
            chunk(b"acTL", struct.pack(">II", 2, 0)),
            chunk(b"fcTL", frame),
            rest,
            second,
            chunk(b"fdAT", struct.pack(">I", 2) + pixels),
            plain[-12:],
        ]
    )
    kept = without_metadata(animated)
    assert (decode(kept) == decode(animated)).all()
    assert b"fdAT" not in kept


def test_what_would_become_too_long_is_kept_with_a_little_loss():
    noise = np.random.default_rng(1).integers(0, 255, (200, 200, 3), np.uint8)
    data = encoded(".bmp", cv2.GaussianBlur(noise, (0, 0), 2))
    assert without_metadata(data).startswith(b"\x89PNG")
    short = without_metadata(data, max_bytes=60_000)
    assert short.startswith(b"\xff\xd8")
    assert len(short) < 60_000
    assert decode(short) == pytest.approx(decode(data), abs=40)


def test_what_is_no_picture_is_refused():
    with pytest.raises(Unprocessable, match="the image is text"):
        without_metadata(b"hello")


def test_a_chunk_that_says_it_is_shorter_than_it_is_leaves_a_picture_all_the_same():
    data = bytearray(files(6)["WebP"])
    at = data.index(b"VP8L") + 4
    data[at : at + 4] = bytes(4)
    assert decode(without_metadata(bytes(data))).shape == decode(data).shape


@given(st.sampled_from(list(files(6).values())), st.data())
@settings(max_examples=300)
def test_whatever_can_be_decoded_can_be_kept_however_damaged(file: bytes, choose: st.DataObject):
    data = bytearray(file)
    for _ in range(choose.draw(st.integers(1, 6))):
        data[choose.draw(st.integers(0, len(data) - 1))] = choose.draw(st.integers(0, 255))
    try:
        image = decode(data, max_pixels=10_000)
        kept = without_metadata(bytes(data))
    except BusError:
        return
    assert decode(kept).shape == image.shape


@given(st.binary(max_size=200))
def test_whatever_a_camera_noted_there_is_a_way_up(noted: bytes):
    assert 1 <= orientation_of(noted) <= 8
    assert 1 <= orientation_of(b"Exif\0\0MM\0*\0\0\0\x08" + noted) <= 8


def test_how_large_a_picture_may_be_is_the_callers_to_say():
    for kind in (".jpg", ".gif"):
        data = encoded(kind)
        # A GIF takes twice the memory.
        most = 2 * 960 if kind == ".gif" else 960
        assert without_metadata(data, max_pixels=most)
        with pytest.raises(TooLarge, match="40 x 24 pixels"):
            without_metadata(data, max_pixels=most - 1)

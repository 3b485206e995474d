"""Bytes into pixels."""

import base64
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.errors import BusError, InvalidRequest, TooLarge, Unprocessable
from services.rustyface.images import Image, decode, from_base64

FORMATS = [".jpg", ".png", ".webp", ".bmp", ".tiff", ".gif"]
SLOPES = np.indices((24, 40)).sum(0)
PICTURE: Image = np.stack([SLOPES * 3, SLOPES * 2, 255 - SLOPES * 4], axis=2).astype(np.uint8)


def encoded(extension: str, pixels: np.ndarray = PICTURE, *parameters: int) -> bytes:
    done, data = cv2.imencode(extension, pixels, parameters)
    assert done
    return data.tobytes()


def with_orientation(jpeg: bytes, orientation: int) -> bytes:
    """Add the note that a camera makes about how it was held."""
    exif = b"Exif\0\0MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x112, 3, 1, orientation, 0, 0)
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]


@pytest.mark.parametrize("extension", FORMATS)
def test_every_allowed_format_gives_bgr_pixels(extension: str):
    pixels = decode(encoded(extension))
    assert pixels.shape == (24, 40, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - PICTURE).mean() < 24  # a GIF has 216 colours here


@pytest.mark.parametrize("extension", [".png", ".bmp", ".tiff"])
def test_formats_without_loss_give_the_very_pixels(extension: str):
    assert (decode(memoryview(encoded(extension))) == PICTURE).all()


def test_a_progressive_jpeg_is_read_to_its_last_scan():
    data = encoded(".jpg", PICTURE, cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    assert decode(data).shape == (24, 40, 3)
    assert decode(data + b"what cameras append").shape == (24, 40, 3)


def test_grey_16_bits_and_transparency_become_bgr_of_8_bits():
    grey = decode(encoded(".png", PICTURE[:, :, 0]))
    assert (grey == PICTURE[:, :, :1]).all()
    assert (decode(encoded(".png", PICTURE.astype(np.uint16) * 257)) == PICTURE).all()
    assert (decode(encoded(".png", np.dstack([PICTURE, PICTURE[:, :, 0]]))) == PICTURE).all()


@pytest.mark.parametrize(
    ("orientation", "turns", "mirrored"),
    [(1, 0, False), (2, 0, True), (3, 2, False), (6, 3, False), (8, 1, False)],
)
def test_the_picture_stands_upright_however_the_camera_was_held(
    orientation: int, turns: int, mirrored: bool
):
    plain = encoded(".jpg")
    upright = np.rot90(decode(plain), turns)
    if mirrored:
        upright = upright[:, ::-1]
    assert (decode(with_orientation(plain, orientation)) == upright).all()


def test_too_many_bytes_or_pixels_are_refused_with_both_numbers():
    data = encoded(".png")
    with pytest.raises(TooLarge, match=f"{len(data)} bytes, 50 are allowed"):
        decode(data, max_bytes=50)
    with pytest.raises(TooLarge, match="40 x 24 pixels, 959 in all"):
        decode(data, max_pixels=959, field="image_base64")
    assert decode(data, max_pixels=960).size == 960 * 3


@pytest.mark.parametrize("extension", FORMATS)
def test_the_pixels_are_counted_in_the_header(extension: str):
    with pytest.raises(TooLarge, match="40 x 24 pixels"):
        decode(encoded(extension), max_pixels=100)


def test_a_few_bytes_that_claim_to_be_a_huge_picture_are_refused_before_decoding():
    small = bytearray(encoded(".png"))
    small[16:24] = struct.pack(">II", 60_000, 60_000)
    with pytest.raises(TooLarge, match="60000 x 60000"):
        decode(small)


@pytest.mark.parametrize("length", [0x7FFFFFFF, 0xFF000000, 100_000])
def test_a_png_that_claims_a_chunk_longer_than_itself_takes_no_memory(length: int):
    small = bytearray(encoded(".png"))
    small[33:37] = struct.pack(">I", length)
    with pytest.raises(Unprocessable, match="PNG image is cut off or damaged"):
        decode(small)


@pytest.mark.parametrize("order", "<>")
def test_a_tiff_with_tiles_far_larger_than_the_picture_is_refused(order: str):
    tags = [(256, 40), (257, 24), (322, 32), (323, 6_000_000)]
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, side) for tag, side in tags)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    with pytest.raises(Unprocessable, match="TIFF image is cut off or damaged"):
        decode(mark + struct.pack(order + "IH", 8, len(tags)) + entries + bytes(400))


@pytest.mark.parametrize("extension", FORMATS)
@given(share=st.floats(0, 1, exclude_max=True))
@settings(max_examples=60)
def test_a_file_cut_off_is_refused_unless_no_pixel_is_missing(extension: str, share: float):
    data = encoded(extension)
    whole = decode(data)
    try:
        pixels = decode(data[: int(len(data) * share)])
    except (Unprocessable, InvalidRequest):
        return
    assert (pixels == whole).all()


@pytest.mark.parametrize("missing", [1, 2, 500, 20_000])
def test_a_photo_without_its_end_is_said_to_be_cut_off(samples_dir: Path, missing: int):
    data = (samples_dir / "astronaut.jpg").read_bytes()
    with pytest.raises(Unprocessable, match="JPEG image is cut off or damaged"):
        decode(data[:-missing])


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"hello, I am no picture", "the image is text; JPEG, PNG, WebP, BMP"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC picture"),
        (b"\0\0\0\x1cftypavif", "an AVIF picture"),
        (b"\0\0\0\x1cftypisom", "a film"),
        (b"%PDF-1.7", "a PDF document"),
        (b"<svg xmlns='x'/>", "an SVG drawing or a web page"),
        (b"PK\x03\x04....", "an archive"),
        (b"\x01\x02\x03\x04", "it begins with 01 02 03 04"),
    ],
)
def test_other_files_are_refused_with_what_they_are(data: bytes, found: str):
    with pytest.raises(Unprocessable, match=found) as refused:
        decode(data, field="image_base64")
    assert refused.value.field == "image_base64"


def test_no_bytes_are_an_invalid_request():
    with pytest.raises(InvalidRequest, match="no bytes"):
        decode(b"")


BEGINNINGS = [encoded(e)[:n] for e in FORMATS for n in (4, 14, 30, 60)] + [b"", b"\0\0\0\x18ftyp"]


@given(st.sampled_from(BEGINNINGS), st.binary(max_size=200))
@settings(max_examples=300)
def test_whatever_the_bytes_are_they_give_a_picture_or_a_clear_refusal(head: bytes, tail: bytes):
    try:
        pixels = decode(head + tail, max_pixels=10_000)
    except BusError:
        return
    assert pixels.ndim == 3


@given(st.sampled_from(FORMATS), st.data())
@settings(max_examples=300)
def test_damaged_pictures_give_a_picture_or_a_clear_refusal(extension: str, choose: st.DataObject):
    data = bytearray(encoded(extension))
    for _ in range(choose.draw(st.integers(1, 6))):
        data[choose.draw(st.integers(0, len(data) - 1))] = choose.draw(st.integers(0, 255))
    try:
        pixels = decode(data, max_pixels=10_000)
    except BusError:
        return
    assert pixels.shape[0] * pixels.shape[1] <= 10_000


@given(st.binary(max_size=60))
def test_base64_comes_back_plain_broken_into_lines_unpadded_or_as_a_data_url(data: bytes):
    text = base64.b64encode(data).decode()
    lines = base64.encodebytes(data).decode()
    for form in (text, lines, text.rstrip("="), "data:image/png;base64," + text):
        assert from_base64(form) == data


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ab$d", r"character 2 is '\$'"),
        ("abcde", "5 characters are one too many or too few"),
        ("data:image/png,abcd", "no ';base64,'"),
        ("data:image/png;base64", "no ';base64,'"),
        ("é", "character 0 is 'é'"),
    ],
)
def test_what_is_no_base64_is_refused_with_the_field(text: str, said: str):
    with pytest.raises(InvalidRequest, match=said) as refused:
        from_base64(text)
    assert refused.value.field == "image_base64"


def test_base64_of_too_many_bytes_is_refused_before_it_is_unfolded():
    with pytest.raises(TooLarge, match="75 bytes, 74 are allowed"):
        from_base64("A" * 100, max_bytes=74)

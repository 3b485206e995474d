"""Bytes into pixels."""

import base64
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.errors import BusError, InvalidRequest, TooLarge, Unprocessable
from services.rustyface.photos.formats import JPEG_SCAN, jpeg_parts
from services.rustyface.photos.images import decode, from_base64
from tests.rustyface.files import PICTURE, SLOPES, chunk, encoded, exif_of, tiff, with_exif

FORMATS = [".jpg", ".png", ".webp", ".bmp", ".tiff", ".gif"]
DEEP = PICTURE.astype(np.uint16) * 257
# What lengths and offsets are that lead nowhere.
EXTREMES = (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\x80\0\0\0")
ALPHA = (SLOPES * 4).astype(np.uint8)
UPRIGHT = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: np.rot90(p, 1),
}


def with_orientation(extension: str, orientation: int) -> bytes:
    """Write the picture with the note that a camera makes about how it was held."""
    note = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x112, 3, 1, orientation, 0, 0)
    if extension == ".tiff":
        return tiff(PICTURE, orientation=orientation)
    return with_exif(encoded(extension), note)


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


@pytest.mark.parametrize("extension", [".png", ".tiff", ".bmp"])
def test_grey_becomes_three_equal_channels(extension: str):
    assert (decode(encoded(extension, PICTURE[:, :, 0])) == PICTURE[:, :, :1]).all()


@pytest.mark.parametrize("extension", [".png", ".tiff"])
def test_16_bits_become_8(extension: str):
    assert (decode(encoded(extension, DEEP)) == PICTURE).all()
    assert (decode(encoded(extension, DEEP[:, :, 0])) == PICTURE[:, :, :1]).all()


def on_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return pixels * (alpha[:, :, None] / 255) + (255 - alpha[:, :, None])


@pytest.mark.parametrize("values", [PICTURE, DEEP])
@pytest.mark.parametrize("colours", [1, 3])
def test_what_is_transparent_in_a_png_is_white(values: np.ndarray, colours: int):
    # Grey comes with its transparency as two channels; OpenCV writes only four.
    below, alpha = (PICTURE, ALPHA) if colours == 3 else (PICTURE[:, :, :1].repeat(3, 2), ALPHA)
    shown = np.dstack([below, alpha]).astype(values.dtype) * (257 if values is DEEP else 1)
    data = png_of_grey(shown) if colours == 1 else encoded(".png", shown)
    assert decode(data) == pytest.approx(on_white(below, alpha), abs=1)


def png_of_grey(shown: np.ndarray) -> bytes:
    """Write grey with transparency (colour type 4) by hand."""
    height, width = shown.shape[:2]
    pairs = np.ascontiguousarray(shown[:, :, [0, 3]]).astype(shown.dtype.newbyteorder(">"))
    rows = b"".join(b"\0" + row.tobytes() for row in pairs)
    depth = 8 * shown.dtype.itemsize
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 4, 0, 0, 0)),
            chunk(b"IDAT", zlib.compress(rows)),
            chunk(b"IEND", b""),
        ]
    )


def test_a_webp_without_loss_keeps_its_holes_white():
    data = encoded(".webp", np.dstack([PICTURE, ALPHA]), cv2.IMWRITE_WEBP_QUALITY, 101)
    assert decode(data) == pytest.approx(on_white(PICTURE, ALPHA), abs=1)


def test_a_gif_with_holes_shows_white_in_them():
    holes = np.where(SLOPES > 30, 255, 0).astype(np.uint8)
    pixels = decode(encoded(".gif", np.dstack([PICTURE, holes])))
    assert (pixels[holes == 0] == 255).all()
    assert (pixels[holes == 255] < 255).any()


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("extra", [0, 1, 2])
def test_a_tiff_is_transparent_only_where_it_says_so(bits: int, extra: int):
    """0 is a mask that somebody drew, 1 has colours multiplied by it already, 2 has not."""
    below = PICTURE
    if extra == 1:
        below = (PICTURE * (ALPHA[:, :, None] / 255)).round().astype(np.uint8)
    shown = PICTURE if extra == 0 else on_white(PICTURE, ALPHA)
    data = tiff(np.dstack([below, ALPHA]), bits=bits, extra=extra)
    assert decode(data) == pytest.approx(shown, abs=2)


def test_a_cut_out_face_on_nothing_is_still_found(samples_dir: Path, pipeline):
    image = decode((samples_dir / "astronaut.jpg").read_bytes())
    mask = np.zeros(image.shape[:2], np.uint8)
    cv2.ellipse(mask, (222, 110), (75, 95), 0, 0, 360, 255, -1)
    for hidden in (image, np.where(mask[:, :, None], image, 0)):
        cut = decode(encoded(".png", np.dstack([hidden, mask])))
        assert len(pipeline.analyse(cut)) == 1


@pytest.mark.parametrize("extension", [".jpg", ".png", ".webp", ".tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_picture_stands_upright_however_the_camera_was_held(extension: str, orientation: int):
    turned = with_orientation(extension, orientation)
    upright = UPRIGHT[orientation](decode(with_orientation(extension, 1)))
    assert decode(turned).shape == upright.shape
    assert (decode(turned) == upright).all()


@pytest.mark.parametrize(
    "damage", [b"", b"MM", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff"]
)
def test_a_damaged_note_of_the_camera_is_no_reason_to_refuse_a_picture(damage: bytes):
    noted = encoded(".png")
    noted = noted[:33] + chunk(b"eXIf", damage) + noted[33:]
    assert (decode(noted) == PICTURE).all()


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


@pytest.mark.parametrize("extension", FORMATS)
@pytest.mark.parametrize("side", [30_000, 60_000])
def test_what_a_header_claims_is_refused_before_a_decoder_sees_the_file(
    extension: str, side: int, monkeypatch: pytest.MonkeyPatch
):
    def unexpected(*_given: object) -> None:
        raise AssertionError("it was decoded")

    claims = claiming(extension, side)
    monkeypatch.setattr(cv2, "imdecode", unexpected)
    for data in claims:
        assert len(data) < 20_000
        with pytest.raises(TooLarge, match=r"is \d+ x \d+ pixels"):
            decode(data)


def claiming(extension: str, side: int) -> list[bytes]:
    """Return small files whose headers say that they are huge."""
    data = bytearray(encoded(extension))
    match extension:
        case ".jpg":
            frame = next(part for part in jpeg_parts(bytes(data)) if part.kind in b"\xc0\xc1\xc2")
            data[frame.body_begin + 1 : frame.body_begin + 5] = struct.pack(">HH", side, side)
        case ".png":
            data[16:24] = struct.pack(">II", side, side)
        case ".bmp":
            data[18:26] = struct.pack("<ii", side, -side)
        case ".gif":
            data[6:10] = struct.pack("<HH", side, side)
        case ".tiff":
            big = bytearray(tiff(PICTURE))
            at = big.index(struct.pack("<HHII", 256, 3, 1, 40))
            big[at : at + 24] = struct.pack("<HHIIHHII", 256, 4, 1, side, 257, 4, 1, side)
            return [bytes(big)]
        case ".webp":
            extended = bytearray(with_exif(bytes(data), exif_of(1)))
            sides = struct.pack("<I", side - 1)[:3] * 2
            extended[24:30] = sides
            # Without that head there is room for 14 bits.
            most = (1 << 14) - 1
            lossy = bytearray(encoded(".webp", PICTURE, cv2.IMWRITE_WEBP_QUALITY, 80))
            at = lossy.index(b"\x9d\x01\x2a") + 3
            lossy[at : at + 4] = struct.pack("<HH", most, most)
            lossless = bytearray(encoded(".webp", PICTURE, cv2.IMWRITE_WEBP_QUALITY, 101))
            at = lossless.index(b"VP8L") + 9
            lossless[at : at + 4] = struct.pack("<I", (most - 1) << 14 | (most - 1))
            return [bytes(extended), bytes(lossy), bytes(lossless)]
    return [bytes(data)]


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


def test_a_jpeg_that_keeps_a_decoder_busy_with_empty_scans_is_refused():
    data = encoded(".jpg", PICTURE, cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    last = [part.whole for part in jpeg_parts(data) if part.kind == JPEG_SCAN][-1]
    assert decode(data[:-2] + 50 * last + data[-2:]).shape == (24, 40, 3)
    with pytest.raises(Unprocessable, match="JPEG image is cut off or damaged"):
        decode(data[:-2] + 5_000 * last + data[-2:])


MEASURE = """
import sys
import cv2
from services.rustyface.photos.images import MAX_BYTES, decode
cv2.setNumThreads(1)
def peak():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))
data = open(sys.argv[1], "rb").read()
before = peak()
decode(data, max_bytes=10**9)
print(peak() - before)
"""


@pytest.mark.parametrize(
    ("extension", "deep", "alpha", "weight"),
    [
        (".jpg", False, False, 1),
        (".png", False, True, 1),
        (".png", True, True, 2),
        (".webp", False, True, 1),
        (".tiff", True, False, 1),
        (".gif", False, False, 2),
    ],
)
def test_decoding_takes_ten_bytes_for_each_pixel_that_is_allowed(
    tmp_path: Path, extension: str, deep: bool, alpha: bool, weight: int
):
    slopes = (np.indices((3_000, 3_000)).sum(0) // 32).astype(np.uint8)
    pixels = np.dstack([slopes] * (4 if alpha else 3)).astype(np.uint16 if deep else np.uint8)
    data = encoded(extension, pixels * 257 if deep else pixels)
    if extension == ".jpg":
        data = with_exif(data, exif_of(6))
    with pytest.raises(TooLarge):
        decode(data, max_pixels=weight * 9_000_000 - 1)
    (tmp_path / "image").write_bytes(data)
    run = [sys.executable, "-c", MEASURE, str(tmp_path / "image")]
    done = subprocess.run(run, check=True, capture_output=True, text=True)
    # Beside what its decoder takes for itself, and the file.
    assert int(done.stdout) < 10 * weight * 9_000_000 + 16_000_000


def test_16_bits_with_transparency_count_twice_for_they_take_more_memory():
    data = encoded(".png", np.dstack([DEEP, DEEP[:, :, 0]]))
    assert decode(data, max_pixels=2 * 960).shape == (24, 40, 3)
    with pytest.raises(
        TooLarge, match="40 x 24 pixels of a kind that takes twice the memory, 959 in all"
    ):
        decode(data, max_pixels=2 * 960 - 1)


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


SMALL = np.ascontiguousarray(PICTURE[:6, :8])
SOUND = [
    *(encoded(extension, SMALL) for extension in FORMATS),
    *(with_exif(encoded(kind, SMALL), exif_of(6)) for kind in (".jpg", ".png", ".webp")),
    tiff(SMALL),
    encoded(".png", DEEP[:6, :8]),
    encoded(".png", np.dstack([SMALL, SMALL[:, :, 0]])),
    encoded(".webp", np.dstack([SMALL, SMALL[:, :, 0]]), cv2.IMWRITE_WEBP_QUALITY, 101),
]


def damaged(sound: bytes, chance: random.Random) -> bytes:
    """Return a file as it may have been damaged on its way, or by somebody's hand."""
    data = bytearray(sound)
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(data))
        match chance.randrange(5):
            case 0:
                data[at] = chance.randrange(256)
            case 1:
                data[at : at + 4] = chance.choice(EXTREMES)
            case 2:
                del data[at : at + chance.randrange(1, 40)]
            case 3:
                data[at:at] = data[: chance.randrange(1, 60)]
            case 4:
                data[at:at] = chance.randbytes(chance.randrange(1, 20))
        data = data or bytearray(b"x")
    return bytes(data)


def is_refused(data: bytes) -> bool:
    """Decode what may be anything: it is a picture within the limit, or refused in a sentence."""
    try:
        pixels = decode(data, max_pixels=10_000)
    except BusError as error:
        assert 10 < len(error.message) < 500  # noqa: PT017 - it may be a picture as well
        return True
    assert (pixels.dtype, pixels.shape[2:]) == (np.uint8, (3,))
    assert 0 < pixels.shape[0] * pixels.shape[1] <= 10_000
    return False


def test_thousands_of_broken_files_give_a_picture_or_a_clear_refusal():
    """The same ones each time."""
    chance = random.Random(11)  # noqa: S311 - a test wants the same ones
    refused = sum(is_refused(damaged(SOUND[i % len(SOUND)], chance)) for i in range(6_000))
    # Neither is the guard deaf, nor the damage harmless.
    assert 2_000 < refused < 6_000


@settings(max_examples=3_000)
@given(sound=st.sampled_from(SOUND), seed=st.integers(0, 2**40))
def test_thousands_of_files_broken_anew_give_a_picture_or_a_clear_refusal(sound: bytes, seed: int):
    is_refused(damaged(sound, random.Random(seed)))  # noqa: S311 - no secret


@given(st.sampled_from(BEGINNINGS), st.binary(max_size=200))
@settings(max_examples=300)
def test_whatever_the_bytes_are_they_give_a_picture_or_a_clear_refusal(head: bytes, tail: bytes):
    is_refused(head + tail)


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

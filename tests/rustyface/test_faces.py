"""What is asked of faces beside the contract's rows: detect, verify, quality, persons, images."""

import base64
import hashlib

import cv2
import numpy as np
import pytest

from bus import codec
from bus import messages as m
from bus.errors import InvalidRequest, NotFound, TooLarge, Unprocessable
from bus.subjects import (
    DATASET_MANAGE,
    FACES_DETECT,
    FACES_ENCODE,
    FACES_SEARCH,
    FACES_VERIFY,
)
from bus.testing import until
from services.rustyface import calibration
from services.rustyface.photos import images
from services.rustyface.photos.encoder import FaceEncoder, PixelEncoder
from services.rustyface.photos.pipeline import Pipeline
from tests.rustyface.files import SECRETS, encoded, exif_of, with_exif


@pytest.fixture
def file(samples_dir):
    return lambda name: (samples_dir / f"{name}.jpg").read_bytes()


@pytest.fixture
def both(photo) -> bytes:
    """The astronaut, and smaller than her the cameraman."""
    image = photo("astronaut").copy()
    image[330:450, 20:140] = cv2.resize(photo("cameraman")[60:260, 120:320], (120, 120))
    return encoded(".png", image)


async def ask(client, endpoint, request):
    """Ask as the gateway does: in MessagePack, where an image is its bytes."""
    answer = await client.relay(
        endpoint.subject(client.root),
        codec.encode(request, codec.MSGPACK),
        headers={codec.CONTENT_TYPE: codec.MSGPACK},
    )
    return codec.decode(answer.body, endpoint.reply, codec.MSGPACK)


async def encode(client, image: bytes, **more) -> m.EncodedFace:
    return await ask(client, FACES_ENCODE, m.EncodeFace(image=image, **more))


async def search(client, **asked) -> m.FaceMatches:
    return await ask(client, FACES_SEARCH, m.SearchFaces(**asked))


async def detect(client, image: bytes, **asked) -> m.DetectedFaces:
    return await ask(client, FACES_DETECT, m.DetectFaces(image=image, **asked))


async def verify(client, a: m.FaceSide, b: m.FaceSide, **asked) -> m.VerifiedFaces:
    return await ask(client, FACES_VERIFY, m.VerifyFaces(a=a, b=b, **asked))


async def configure(client, dataset: str = "default", **settings) -> None:
    asked = m.ManageDataset(
        action="configure", dataset=dataset, settings=m.DatasetSettings(**settings)
    )
    await client.call(DATASET_MANAGE, asked)


async def manage(client, action: str, **more) -> m.DatasetList:
    return await client.call(DATASET_MANAGE, m.ManageDataset(action=action, **more))


# --- An image as it comes -------------------------------------------------------------------------


async def test_bytes_in_messagepack_give_what_base64_in_json_gives(client, worker, file):
    image = file("astronaut")
    asked = m.EncodeFace(image_base64=base64.b64encode(image).decode(), persist=False)
    async with worker():
        as_text = await client.call(FACES_ENCODE, asked)
        as_bytes = await encode(client, image, persist=False)
    assert as_bytes.checksum == as_text.checksum


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({}, "give either image_base64 or image; there is neither"),
        ({"image": b"x", "image_base64": "eA=="}, "there is both"),
    ],
)
async def test_an_image_is_given_once(client, worker, asked, says):
    async with worker():
        for endpoint, request in ((FACES_ENCODE, m.EncodeFace), (FACES_DETECT, m.DetectFaces)):
            with pytest.raises(InvalidRequest, match=says) as no:
                await ask(client, endpoint, request(**asked))
            assert no.value.field == "image_base64"


async def test_a_refused_image_names_the_field_that_it_came_in(client, worker):
    async with worker():
        with pytest.raises(Unprocessable, match="the image is text") as no:
            await encode(client, b"hello")
        assert no.value.field == "image"


async def test_the_largest_image_is_a_setting(client, worker, file, pipeline: Pipeline):
    async with worker(encoder=FaceEncoder(pipeline, max_pixels=100_000)):
        with pytest.raises(TooLarge, match="512 x 512 pixels, 100000 in all"):
            await detect(client, file("astronaut"))


# --- faces.detect ---------------------------------------------------------------------------------


async def test_faces_are_found_with_their_quality_and_without_vectors(client, worker, both):
    async with worker():
        found = await detect(client, both)
    assert (found.width, found.height) == (512, 512)
    large, small = found.faces
    assert large.quality.keys() == {"size_px", "sharpness", "yaw", "pitch", "roll"}
    assert large.quality["size_px"] > small.quality["size_px"]
    assert len(large.landmarks) == 5
    assert large.embedding is None
    assert not large.warnings


async def test_no_face_is_no_error_of_a_detection(client, worker, file):
    async with worker():
        assert (await detect(client, file("coffee"))).faces == []


async def test_a_detection_is_as_sure_and_as_long_as_it_was_asked_to_be(client, worker, both):
    async with worker():
        assert len((await detect(client, both, faces_max=1)).faces) == 1
        assert len((await detect(client, both, score_min=0.99)).faces) == 0


async def test_small_faces_are_found_on_demand(client, worker, photo):
    canvas = np.full((2_000, 3_000, 3), 160, np.uint8)
    canvas[300:400, 2_000:2_100] = cv2.resize(photo("astronaut")[:256, 100:356], (100, 100))
    image = encoded(".png", canvas)
    async with worker():
        assert (await detect(client, image)).faces == []
        (face,) = (await detect(client, image, small=True)).faces
    assert face.box[:2] == [pytest.approx(2_030, abs=15), pytest.approx(325, abs=15)]


async def test_an_embedder_of_whole_pictures_says_that_it_looks_for_no_faces(client, worker, file):
    async with worker(encoder=PixelEncoder()):
        with pytest.raises(Unprocessable, match="embedder pixel32.*looks for no faces"):
            await detect(client, file("astronaut"))


# --- faces.verify ---------------------------------------------------------------------------------


async def test_two_photos_of_one_person_are_one_and_of_two_are_two(client, worker, file):
    eileen, again, other = (
        m.FaceSide(image=file(name)) for name in ("astronaut", "astronaut-changed", "cameraman")
    )
    async with worker():
        same = await verify(client, eileen, again)
        different = await verify(client, eileen, other)
    assert same.same
    assert same.similarity > 0.7
    assert (same.threshold, same.false_match_rate) == (0.363, pytest.approx(0.0015))
    assert same.false_match_rate_here == pytest.approx(1.3e-5)
    assert (same.embedder, len(same.faces_a), len(same.faces_b)) == ("sface", 1, 1)
    assert not different.same
    assert different.false_match_rate_here is None


async def test_a_photo_and_a_vector_can_be_compared_and_two_vectors(client, worker, file):
    async with worker():
        vector = (await encode(client, file("astronaut"), persist=False)).embedding
        by_vector = m.FaceSide(embedding=[3 * value for value in vector])
        mixed = await verify(client, m.FaceSide(image=file("astronaut")), by_vector)
        plain = await verify(client, by_vector, by_vector)
    assert mixed.similarity == pytest.approx(1, abs=1e-5)
    assert plain.similarity == pytest.approx(1, abs=1e-5)
    assert plain.faces_a == []


async def test_what_counts_is_the_asked_threshold_the_rate_the_dataset_or_the_embedder(
    client, worker, file
):
    side = m.FaceSide(image=file("astronaut"))
    async with worker():
        await configure(client, verify_threshold=0.2)
        every = {"threshold": 0.9, "false_match_rate": 1e-4, "dataset": "default"}
        found = []
        for left_out in ((), ("threshold",), ("threshold", "false_match_rate"), tuple(every)):
            asked = {name: value for name, value in every.items() if name not in left_out}
            found.append((await verify(client, side, side, **asked)).threshold)
    assert found == [0.9, pytest.approx(0.42), 0.2, 0.363]


@pytest.mark.parametrize(
    ("asked", "kind", "says", "field"),
    [
        ({"false_match_rate": 1e-9}, InvalidRequest, "rates from 1.3e-05 on", "false_match_rate"),
        ({"dataset": "none"}, NotFound, "no dataset 'none'", "dataset"),
        ({"a": {}}, InvalidRequest, "a: give either image_base64 or embedding; there is neither",
         "a.image_base64"),
        ({"b": {"embedding": [1.0, 2.0]}}, InvalidRequest, "2 dimensions, those of sface have 128",
         "b.embedding"),
        ({"b": {"embedding": [0.0] * 128}}, InvalidRequest, "b.embedding: it has no direction",
         "b.embedding"),
        ({"b": {"image": b"hello"}}, Unprocessable, "the image is text", "b.image"),
        ({"b": {"image_base64": "!"}}, InvalidRequest, "not base64", "b.image_base64"),
    ],
)  # fmt: skip
async def test_what_cannot_be_compared_is_refused_with_its_side(
    client, worker, asked, kind, says, field
):
    sides = {"a": {"embedding": [1.0] * 128}, "b": {"embedding": [1.0] * 128}}
    request = codec.convert(sides | asked, m.VerifyFaces)
    async with worker():
        with pytest.raises(kind, match=says) as no:
            await ask(client, FACES_VERIFY, request)
        assert no.value.field == field


# --- Quality --------------------------------------------------------------------------------------


@pytest.fixture
def small(photo) -> bytes:
    """A face of some 20 pixels."""
    return encoded(".png", cv2.resize(photo("astronaut"), (128, 128), interpolation=cv2.INTER_AREA))


async def test_a_poor_face_is_enrolled_with_a_warning_and_its_measures(client, worker, small):
    async with worker():
        face = await encode(client, small, entry_id="poor")
        (entry,) = (await manage(client, "entries", dataset="default")).entries
    assert face.warnings == face.faces[0].warnings
    assert "pixels wide, 32 are needed" in face.warnings[0]
    assert entry.id == "poor"
    assert entry.quality.keys() == {"score", "size_px", "sharpness", "yaw", "pitch", "roll"}
    assert entry.quality["size_px"] < 32


async def test_a_dataset_can_refuse_poor_faces_and_says_why(client, worker, small, file):
    async with worker():
        await configure(client, quality=m.QualityBounds(below="reject", size_min_px=40))
        with pytest.raises(Unprocessable, match="'default' takes no such face: .* 40 are") as no:
            await encode(client, small)
        assert no.value.field == "image"
        assert no.value.details["size_px"]["bound"] == 40
        assert (await manage(client, "stats", dataset="default")).dataset.entries == 0
        assert not (await encode(client, file("astronaut"))).warnings


async def test_a_request_can_ask_for_another_policy_than_the_datasets(client, worker, small):
    async with worker():
        await configure(client, quality=m.QualityBounds(below="reject"))
        assert (await encode(client, small, quality="warn")).warnings
        assert not (await encode(client, small, quality="off")).warnings
        with pytest.raises(Unprocessable, match="this request takes no such face"):
            await encode(client, small, persist=False, quality="reject")


# --- Persons --------------------------------------------------------------------------------------


async def test_a_person_is_named_by_the_subject_that_was_enrolled(client, worker, file):
    async with worker():
        enrolled = await encode(client, file("astronaut"), subject="Eileen")
        await encode(client, file("cameraman"), subject="Sandy")
        found = await search(client, image=file("astronaut-changed"), group_by="subject")
        stranger = await search(client, image=file("cameraman"), filter={"subject": "Eileen"})
    assert enrolled.subject == "Eileen"
    assert (found.known, found.subject, found.searched) == (True, "Eileen", 2)
    best = found.results[0]
    assert (best.subject, best.subject_entries) == ("Eileen", 1)
    assert best.subject_score == pytest.approx(best.score, abs=1e-5)
    assert (stranger.known, stranger.subject) == (False, None)
    assert [r.subject for r in stranger.results] == ["Eileen"]


async def test_a_match_says_how_many_strangers_would_reach_it(client, worker, file):
    async with worker():
        await encode(client, file("astronaut"))
        await encode(client, file("cameraman"))
        near, far = (await search(client, image=file("astronaut-changed"))).results
    assert near.expected_false == pytest.approx(calibration.expected_false("sface", near.score, 2))
    assert far.expected_false is None


async def test_rates_that_were_measured_for_one_embedder_are_told_of_no_other(client, worker, file):
    async with worker(encoder=PixelEncoder()):
        made = await encode(client, file("coffee"))
    async with worker():
        (match,) = (await search(client, embedding=made.embedding)).results
    assert match.score == pytest.approx(1)
    assert match.expected_false is None


async def test_the_threshold_of_a_dataset_decides_who_is_known(client, worker, file):
    async with worker():
        await encode(client, file("astronaut"))
        await configure(client, threshold=0.99)
        found = await search(client, image=file("astronaut-changed"))
        assert (found.threshold, found.known, found.results[0].known) == (0.99, False, False)
        await configure(client, threshold=0.5)
        assert (await search(client, image=file("astronaut-changed"))).known


async def test_whoever_was_rejected_is_not_named_again(client, worker, file):
    async with worker():
        await encode(client, file("astronaut"), subject="Eileen", entry_id="e")
        vector = (await encode(client, file("astronaut-changed"), persist=False)).embedding
        await manage(client, "reject-match", dataset="default", subject="Eileen", embedding=vector)
        found = await search(client, image=file("astronaut-changed"))
    assert found.results[0].score > 0.7
    assert (found.results[0].rejected, found.results[0].known) == (True, False)
    assert (found.known, found.subject) == (False, None)


async def test_every_face_of_an_image_can_be_embedded_and_searched(client, worker, both, file):
    async with worker():
        await encode(client, file("astronaut"), subject="Eileen")
        await encode(client, file("cameraman"), subject="Sandy")
        made = await encode(client, both, persist=False, every_face=True)
        found = await search(client, image=both, every_face=True)
        plain = await search(client, image=both)
    assert [len(face.embedding) for face in made.faces] == [128, 128]
    assert made.faces[0].embedding == made.embedding
    assert [face.matches[0].subject for face in found.faces] == ["Eileen", "Sandy"]
    assert found.faces[0].matches == found.results
    assert all(face.matches is None and face.embedding is None for face in plain.faces)


# --- Kept images ----------------------------------------------------------------------------------


async def stored(client) -> list[str]:
    return [one.digest for one in await client.store.faces.all()]


async def only(client, other_than: str) -> bool:
    there = await stored(client)
    return len(there) == 1 and other_than not in there


async def nothing(client) -> bool:
    return not await stored(client)


async def test_no_image_is_kept_unless_the_dataset_says_so(client, worker, file):
    async with worker():
        await encode(client, file("astronaut"))
        assert await stored(client) == []


async def test_a_kept_image_shows_the_face_and_has_lost_place_and_maker(client, worker, file):
    photo = with_exif(file("astronaut"), exif_of(1))
    async with worker():
        await configure(client, keep_images=True)
        made = await encode(client, photo, entry_id="e")
        (entry,) = (await manage(client, "entries", dataset="default")).entries
        kept = b"".join([block async for block in client.store.faces.read(entry.image)])
        again = await encode(client, kept, persist=False)
    assert hashlib.sha256(kept).hexdigest() == entry.image
    assert kept == images.without_metadata(photo)
    assert not any(secret in kept for secret in SECRETS)
    assert again.checksum == made.checksum


async def test_how_large_a_kept_image_may_be_is_the_same_setting(
    client, worker, file, pipeline: Pipeline, monkeypatch
):
    # As if what is allowed unless it is set were less than the photo has, and set to more.
    monkeypatch.setattr(
        images.without_metadata, "__kwdefaults__", {"max_bytes": 1, "max_pixels": 1}
    )
    async with worker(encoder=FaceEncoder(pipeline, max_pixels=512 * 512)):
        await configure(client, keep_images=True)
        await encode(client, file("astronaut"), entry_id="e")
        assert len(await stored(client)) == 1
        wide = cv2.copyMakeBorder(
            cv2.imdecode(np.frombuffer(file("astronaut"), np.uint8), cv2.IMREAD_COLOR),
            *(0, 1, 0, 0), cv2.BORDER_REPLICATE,
        )  # fmt: skip
        with pytest.raises(TooLarge, match="512 x 513 pixels"):
            await encode(client, encoded(".png", wide))
        assert len(await stored(client)) == 1


async def test_a_kept_image_goes_with_the_last_entry_that_has_it(client, worker, file):
    async with worker():
        await configure(client, keep_images=True)
        await encode(client, file("astronaut"), entry_id="one")
        await encode(client, file("astronaut"), entry_id="two")
        assert len(await stored(client)) == 1
        await manage(client, "remove-entry", dataset="default", entry_id="one")
        assert len(await stored(client)) == 1
        (entry,) = (await manage(client, "entries", dataset="default")).entries
        assert await stored(client) == [entry.image]
        await encode(client, file("cameraman"), entry_id="two")
        # Whoever enrols waits for the event alone; what it has replaced goes a moment later.
        await until(lambda: only(client, other_than=entry.image))
        await manage(client, "delete-dataset", dataset="default")
        await until(lambda: nothing(client))


async def test_what_is_refused_leaves_no_image(client, worker, small):
    async with worker():
        await configure(
            client, keep_images=True, quality=m.QualityBounds(below="reject", size_min_px=60)
        )
        with pytest.raises(Unprocessable):
            await encode(client, small)
        assert await stored(client) == []

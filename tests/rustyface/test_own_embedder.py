"""A net of one's own: where its file comes from, what it has to be, and what it then gives."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto

from bus import messages as m
from bus.errors import BusError, InvalidRequest, NotFound, Unprocessable
from bus.subjects import DATASET_MANAGE, FACES_ENCODE, FACES_SEARCH, FACES_VERIFY
from services.rustyface.photos import weights
from services.rustyface.photos.embedding import ArcFace
from services.rustyface.photos.encoder import open_encoder
from services.rustyface.photos.nets import Nets
from services.rustyface.settings import NetFiles, OwnEmbedder, RustyfaceSettings
from tests.rustyface.nets import arcface

CROP = (np.add.outer(np.arange(112), 2 * np.arange(112))[:, :, None] + [0, 40, 90]) % 256


@pytest.fixture
def net(tmp_path: Path):
    def write(**how) -> Path:
        path = tmp_path / "net.onnx"
        path.write_bytes(arcface(**how))
        return path

    return write


def test_it_gives_vectors_of_length_one_of_its_own_dimensions(net):
    embedder = ArcFace(net(dimensions=8), name="mine")
    crop = CROP.astype(np.uint8)
    together = embedder.embed([crop, crop[::-1], crop])
    assert (embedder.dimensions, together.shape) == (8, (3, 8))
    assert np.linalg.norm(together, axis=1) == pytest.approx(1, abs=1e-6)
    assert (together[0] == together[2]).all()
    assert float(together[0] @ together[1]) < 0.99


def test_pixels_reach_it_in_the_channels_and_levels_that_were_set(net):
    crop = CROP.astype(np.uint8)
    path = net()
    rgb = ArcFace(path, name="mine", channels="rgb", mean=(1, 2, 3), std=(4, 5, 6))
    bgr = ArcFace(path, name="mine", channels="bgr", mean=(1, 2, 3), std=(4, 5, 6))
    levels = (crop[:, :, ::-1].astype(np.float32) - [1, 2, 3]) / [4, 5, 6]
    row = levels.transpose(2, 0, 1).reshape(3, 14, 8, 14, 8).mean((2, 4)).ravel()
    weight = np.random.default_rng(5).normal(size=(588, 8)).astype(np.float32)
    by_hand = row @ weight
    assert rgb.embed([crop])[0] == pytest.approx(by_hand / np.linalg.norm(by_hand), abs=1e-5)
    assert bgr.embed([crop[:, :, ::-1]])[0] == pytest.approx(rgb.embed([crop])[0], abs=1e-6)


def test_its_digest_is_another_one_with_another_file_or_other_levels(net):
    path = net()
    made = [
        ArcFace(path, name="mine"),
        ArcFace(path, name="mine", channels="bgr"),
        ArcFace(path, name="mine", mean=0.0),
        ArcFace(path, name="mine", std=(128, 128, 127)),
    ]
    digests = {one.digest for one in made}
    digests.add(ArcFace(net(dimensions=9), name="mine").digest)
    assert len(digests) == 5
    assert ArcFace(net(), name="other").digest == made[0].digest


@pytest.mark.parametrize("batch", [1, "batch", -1])
def test_its_batch_may_be_fixed_to_one_or_free(net, batch):
    shape = (batch, 3, 112, 112) if batch != -1 else ("n", 3, "h", "w")
    assert ArcFace(net(shape=shape), name="mine").dimensions == 8


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (
            {"shape": (1, 3, 160, 160), "flat": False},
            r"picture: tensor\(float\) \[1, 3, 160, 160\]",
        ),
        ({"shape": (4, 3, 112, 112)}, "is not for aligned faces"),
        ({"shape": (1, 112, 112, 3), "flat": False}, "is not for aligned faces"),
        ({"kind": TensorProto.UINT8}, r"takes picture: tensor\(uint8\)"),
        ({"outputs": 2}, "gives vector0, vector1; one input .* and one output are needed"),
        ({"flat": False}, r"array of shape \[1, 3, 14, 14\] for one face"),
        ({"dimensions": 1}, "a vector of 2 to 16384 values is needed"),
    ],
)
def test_what_is_no_such_net_is_refused_with_what_it_takes_and_gives(net, how, says):
    with pytest.raises(Unprocessable, match=says):
        ArcFace(net(**how), name="mine")


def test_what_is_no_net_at_all_is_refused(tmp_path: Path):
    (tmp_path / "net.onnx").write_bytes(b"no net")
    with pytest.raises(Unprocessable, match="model 'mine' cannot be opened"):
        ArcFace(tmp_path / "net.onnx", name="mine")


# --- Where files come from ------------------------------------------------------------------------


@pytest.fixture
def nets(client, settings) -> Nets:
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    return Nets(client.store, settings.data_dir, settings.data_dir / "cache" / "nets")


async def stored(client, content: bytes) -> str:
    async with client.store.artefacts.writing() as upload:
        await upload.write(content)
        return (await upload.commit()).digest


async def in_repository(client, *contents: bytes, **more) -> list[str]:
    digests = [await stored(client, content) for content in contents]
    versions = [
        m.ModelVersion(
            version=str(i), path="", checksum=digest, added_at=m.now(), **{"format": "onnx"} | more
        )
        for i, digest in enumerate(digests, 1)
    ]
    await client.store.models.put(m.ModelSpec(id="face", versions=versions), "face")
    return digests


async def test_a_file_is_named_by_model_by_version_or_by_digest(client, nets):
    first, second = await in_repository(client, b"one", b"two")
    found = [
        (await nets.file(named, setting="x")).read_bytes()
        for named in ("face", "face@1", "face@2", "face@latest", first, second)
    ]
    assert found == [b"two", b"one", b"two", b"two", b"one", b"two"]


async def test_an_artefact_is_fetched_once_and_again_when_its_file_was_changed(client, nets):
    digest = await stored(client, b"one")
    path = await nets.file(digest, setting="x")
    path.write_bytes(b"other")
    assert (await nets.file(digest, setting="x")).read_bytes() == b"one"
    await client.store.artefacts.delete(digest)
    assert (await nets.file(digest, setting="x")).read_bytes() == b"one"


async def test_a_path_is_one_below_the_data_directory(settings, nets):
    inside = settings.data_dir / "nets" / "mine.onnx"
    inside.parent.mkdir()
    inside.write_bytes(b"net")
    assert await nets.file("nets/mine.onnx", setting="x") == inside.resolve()


@pytest.mark.parametrize(
    ("named", "kind", "says"),
    [
        ("../mine.onnx", InvalidRequest, "own.model: '../mine.onnx' leads out of the data dir"),
        ("/etc/mine.onnx", InvalidRequest, "leads out of the data directory"),
        ("gone.onnx", NotFound, "own.model: there is no file .*gone.onnx"),
        ("nobody", NotFound, "own.model: there is no model 'nobody'"),
        ("face@9", NotFound, "the model 'face' has no version '9'; there are: 1, 2"),
        ("0" * 64, NotFound, "own.model: the artefact 0000.* is not stored"),
    ],
)
async def test_what_is_not_there_is_told_with_the_setting(client, nets, named, kind, says):
    await in_repository(client, b"one", b"two")
    with pytest.raises(kind, match=says) as no:
        await nets.file(named, setting="own.model")
    assert no.value.field == "own.model"


@pytest.mark.parametrize(
    ("version", "says"),
    [
        ({"format": "linear"}, "is linear, not onnx"),
        ({"sound": False, "problem": "no inputs"}, "is not sound: no inputs"),
    ],
)
async def test_a_version_that_cannot_be_used_is_refused(client, nets, version, says):
    await in_repository(client, b"one", **version)
    with pytest.raises(Unprocessable, match=says):
        await nets.file("face", setting="own.model")


# --- From the settings to an encoder --------------------------------------------------------------


async def opened(client, settings, **changes):
    return await open_encoder(
        RustyfaceSettings(**changes), client.store, settings.data_dir, settings.data_dir / "cache"
    )


async def test_the_settings_name_a_net_of_the_repository_and_it_embeds_faces(
    client, settings, samples_dir
):
    await in_repository(client, arcface(dimensions=16))
    own = OwnEmbedder(model="face@1", name="mine", threshold=0.3)
    encoder = await opened(client, settings, own_embedder=own)
    vector, faces = encoder.encode((samples_dir / "astronaut.jpg").read_bytes())
    assert (encoder.name, encoder.dimensions, vector.shape) == ("mine", 16, (16,))
    assert len(faces) == 1


async def test_single_weights_are_named_by_digest(client, settings, samples_dir):
    file = weights.find(weights.SFACE).read_bytes()
    digest = await stored(client, file)
    encoder = await opened(client, settings, weights=NetFiles(sface=digest))
    assert encoder.digest == digest == hashlib.sha256(file).hexdigest()
    plain = await opened(client, settings)
    photo = (samples_dir / "astronaut.jpg").read_bytes()
    assert (encoder.encode(photo)[0] == plain.encode(photo)[0]).all()


async def test_a_net_that_does_not_fit_stops_with_its_sentence(client, settings):
    await in_repository(client, arcface(shape=(1, 3, 160, 160), flat=False))
    own = OwnEmbedder(model="face", name="mine", threshold=0.3)
    with pytest.raises(BusError, match="model 'mine' is not for aligned faces"):
        await opened(client, settings, own_embedder=own)


# --- At work --------------------------------------------------------------------------------------


async def test_datasets_belong_to_it_and_its_thresholds_count(client, settings, worker, picture):
    await in_repository(client, arcface(dimensions=16))
    own = OwnEmbedder(model="face", name="mine", threshold=0.25, verify_threshold=0.2)
    encoder = await opened(client, settings, own_embedder=own)
    face = m.EncodeFace(image_base64=picture("astronaut"), entry_id="e")
    side = m.FaceSide(image_base64=picture("astronaut-changed"))
    async with worker(encoder=encoder, own_embedder=own):
        made = await client.call(FACES_ENCODE, face)
        found = await client.call(
            FACES_SEARCH, m.SearchFaces(image_base64=picture("astronaut-changed"))
        )
        same = await client.call(FACES_VERIFY, m.VerifyFaces(a=side, b=side))
        told = await client.call(DATASET_MANAGE, m.ManageDataset(action="stats", dataset="default"))
    assert (made.embedder, made.dimensions) == ("mine", 16)
    assert (found.threshold, found.results[0].id) == (0.25, "e")
    assert (same.threshold, same.false_match_rate) == (0.2, None)
    assert (told.dataset.embedder, told.dataset.embedder_digest) == ("mine", encoder.digest)
    assert (told.dataset.threshold, told.dataset.verify_threshold) == (0.25, 0.2)


async def test_the_same_net_with_other_levels_is_not_mixed_in(client, settings, worker, picture):
    await in_repository(client, arcface(dimensions=16))
    own = OwnEmbedder(model="face", name="mine", threshold=0.25)
    face = m.EncodeFace(image_base64=picture("astronaut"))
    async with worker(encoder=await opened(client, settings, own_embedder=own), own_embedder=own):
        await client.call(FACES_ENCODE, face)
    other = OwnEmbedder(model="face", name="mine", threshold=0.25, mean=0.0)
    async with worker(
        encoder=await opened(client, settings, own_embedder=other), own_embedder=other
    ):
        with pytest.raises(InvalidRequest, match="'default' holds vectors of mine .* mixed"):
            await client.call(FACES_ENCODE, face)

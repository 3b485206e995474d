"""Stock clients of the Open Inference Protocol: Triton's over HTTP, and a bare one over NATS."""

import asyncio
import io
import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import nats
import numpy as np
import pytest
import pytest_asyncio
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from onnx import TensorProto, helper, save
from tritonclient.utils import InferenceServerException

from bus.testing import until

TYPES = {
    "BOOL": (TensorProto.BOOL, np.bool_), "FP16": (TensorProto.FLOAT16, np.float16),
    "FP32": (TensorProto.FLOAT, np.float32), "FP64": (TensorProto.DOUBLE, np.float64),
    "UINT8": (TensorProto.UINT8, np.uint8), "UINT16": (TensorProto.UINT16, np.uint16),
    "UINT32": (TensorProto.UINT32, np.uint32), "UINT64": (TensorProto.UINT64, np.uint64),
    "INT8": (TensorProto.INT8, np.int8), "INT16": (TensorProto.INT16, np.int16),
    "INT32": (TensorProto.INT32, np.int32), "INT64": (TensorProto.INT64, np.int64),
    "BYTES": (TensorProto.STRING, np.object_),
}  # fmt: skip


def onnx(
    path: Path, kind: int = TensorProto.FLOAT, node: str = "Identity", gives=None, **shapes: list
) -> None:
    """Write a model of one node from the inputs to the output `y`."""
    shapes = shapes or {"x": ["n", "m"]}
    inputs = [helper.make_tensor_value_info(name, kind, shape) for name, shape in shapes.items()]
    output = helper.make_tensor_value_info("y", kind, gives or next(iter(shapes.values())))
    graph = helper.make_graph([helper.make_node(node, [*shapes], ["y"])], "g", inputs, [output])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    save(made, path)


@pytest.fixture(scope="module", autouse=True)
def models(platform) -> Path:
    folder = platform.data_dir / "models"
    for name, (kind, _) in TYPES.items():
        onnx(folder / f"same-{name.lower()}.onnx", kind)
    onnx(folder / "sum.onnx", TensorProto.FLOAT, "Add", a=["n", 3], b=["n", 3])
    onnx(folder / "image.onnx", x=["n", 3, "h", "w"])
    mean = {"node": "GlobalAveragePool", "gives": ["n", 3, 1, 1]}
    onnx(folder / "mean.onnx", **mean, x=["n", 3, "h", "w"])
    (folder / "double.json").write_text(
        '{"input_dim": 2, "output_dim": 2, "weights": [2, 0, 0, 2], "bias": [0, 0]}'
    )
    return folder


@pytest.fixture
def auth(platform) -> dict[str, str]:
    return {"Authorization": f"Bearer {platform.key}"}


@pytest.fixture
def client(platform) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(urlsplit(platform.url).netloc) as one:
        yield one


@pytest_asyncio.fixture
async def aio_client(platform):
    async with triton_aio.InferenceServerClient(urlsplit(platform.url).netloc) as one:
        yield one


def tensor(name: str, array: np.ndarray, datatype: str, *, binary: bool = True):
    given = triton.InferInput(name, list(array.shape), datatype)
    return given.set_data_from_numpy(array, binary_data=binary)


ROW = np.array([[1, 2, 3]], np.float32)


def test_the_server_tells_what_it_is_and_that_it_is_there(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    said = client.get_server_metadata()
    assert said["name"] == "bkg"
    assert {"binary_tensor_data", "model_repository", "statistics"} <= set(said["extensions"])


def test_a_model_is_loaded_described_counted_and_unloaded(client, auth):
    assert not client.is_model_ready("sum", headers=auth)
    client.load_model("sum", headers=auth)
    assert client.is_model_ready("sum", headers=auth)
    assert client.is_model_ready("sum", "1", headers=auth)
    described = client.get_model_metadata("sum", headers=auth)
    assert described == client.get_model_metadata("sum", "1", headers=auth)
    assert described["platform"] == "onnxruntime_onnx"
    assert described["versions"] == ["1"]
    assert described["inputs"] == [
        {"name": name, "datatype": "FP32", "shape": [-1, 3]} for name in "ab"
    ]
    config = client.get_model_config("sum", headers=auth)
    assert config == client.get_model_config("sum", "1", headers=auth)
    assert config["max_batch_size"] == 256
    assert config["input"][0] == {"name": "a", "data_type": "TYPE_FP32", "dims": [3]}
    index = client.get_model_repository_index(headers=auth)
    assert {"name": "sum", "version": "1", "state": "READY"} in index
    before = client.get_inference_statistics("sum", headers=auth)["model_stats"][0]
    tensors = [tensor("a", ROW, "FP32"), tensor("b", ROW, "FP32")]
    assert client.infer("sum", tensors, headers=auth).as_numpy("y").tolist() == [[2, 4, 6]]
    counted = client.get_inference_statistics("sum", "1", headers=auth)["model_stats"][0]
    assert counted["inference_count"] == before["inference_count"] + 1
    assert counted["inference_stats"]["success"]["count"] >= 1
    assert counted["inference_stats"]["compute_infer"]["ns"] > 0
    assert counted["last_inference"] > 0
    everything = client.get_inference_statistics(headers=auth)["model_stats"]
    assert "sum" in {one["name"] for one in everything}
    client.unload_model("sum", headers=auth)
    assert not client.is_model_ready("sum", headers=auth)
    index = client.get_model_repository_index(headers=auth)
    assert {"name": "sum", "version": "1", "state": "UNAVAILABLE", "reason": "unloaded"} in index


def test_a_model_is_loaded_with_another_configuration(client, auth):
    config = {"max_batch_size": 4, "dynamic_batching": {"max_queue_delay_microseconds": 500}}
    client.load_model("same-fp32", headers=auth, config=json.dumps(config))
    told = client.get_model_config("same-fp32", headers=auth)
    assert told["max_batch_size"] == 4
    assert told["dynamic_batching"]["max_queue_delay_microseconds"] == 500
    # What a client sends back unchanged changes nothing.
    client.load_model("same-fp32", headers=auth, config=json.dumps(told))
    assert client.get_model_config("same-fp32", headers=auth) == told


def test_a_model_is_loaded_from_a_file_that_comes_with_the_request(client, auth, models):
    content = (models / "sum.onnx").read_bytes()
    client.load_model("sent", headers=auth, config="{}", files={"file:7/model.onnx": content})
    assert client.is_model_ready("sent", "7", headers=auth)
    tensors = [tensor("a", ROW, "FP32"), tensor("b", ROW, "FP32")]
    reply = client.infer("sent", tensors, model_version="7", headers=auth)
    assert reply.get_response()["model_version"] == "7"


@pytest.mark.parametrize(
    ("datatype", "binary_in", "binary_out"),
    [
        (datatype, binary_in, binary_out)
        for datatype in TYPES
        for binary_in in (True, False)
        for binary_out in (True, False)
        # Triton's client has no FP16 in JSON.
        if datatype != "FP16" or (binary_in and binary_out)
    ],
)
def test_tensors_of_every_type_come_back_as_they_went(
    client, auth, datatype, binary_in, binary_out
):
    model = f"same-{datatype.lower()}"
    if not client.is_model_ready(model, headers=auth):
        client.load_model(model, headers=auth)
    values = [["a", ""], ["ö", "long" * 50]] if datatype == "BYTES" else [[0, 1], [1, 0]]
    array = np.array(values, TYPES[datatype][1])
    reply = client.infer(
        model,
        [tensor("x", array, datatype, binary=binary_in)],
        outputs=[triton.InferRequestedOutput("y", binary_data=binary_out)],
        request_id="here",
        headers=auth,
    )
    given = reply.as_numpy("y")
    if datatype == "BYTES":
        given = np.vectorize(lambda v: v.decode() if isinstance(v, bytes) else v)(given)
    assert given.tolist() == array.tolist()
    assert reply.get_response()["id"] == "here"


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("there", [None, "gzip", "deflate"])
@pytest.mark.parametrize("back", [None, "gzip", "deflate"])
def test_bodies_are_compressed_as_the_client_likes(client, auth, there, back, binary):
    if not client.is_model_ready("image", headers=auth):
        client.load_model("image", headers=auth)
    image = np.arange(3 * 40 * 40, dtype=np.float32).reshape(1, 3, 40, 40)
    reply = client.infer(
        "image",
        [tensor("x", image, "FP32", binary=binary)],
        outputs=[triton.InferRequestedOutput("y", binary_data=binary)],
        request_compression_algorithm=there,
        response_compression_algorithm=back,
        headers=auth,
    )
    assert np.array_equal(reply.as_numpy("y"), image)


def test_the_default_size_limit_takes_a_large_image(client, auth):
    if not client.is_model_ready("image", headers=auth):
        client.load_model("image", headers=auth)
    image = np.random.default_rng(1).random((1, 3, 640, 640), np.float32)
    reply = client.infer("image", [tensor("x", image, "FP32")], headers=auth)
    assert np.array_equal(reply.as_numpy("y"), image)
    large = np.zeros((1, 3, 1000, 1000), np.float32)
    with pytest.raises(InferenceServerException, match=r"one message, has 12,000,\d+ bytes"):
        client.infer("image", [tensor("x", large, "FP32")], headers=auth)


def test_many_requests_in_flight_each_get_their_own_answer(platform, auth):
    netloc = urlsplit(platform.url).netloc
    with triton.InferenceServerClient(netloc, concurrency=16) as client:
        if not client.is_model_ready("double", headers=auth):
            client.load_model("double", headers=auth)
        asked = [
            client.async_infer(
                "double", [tensor("inputs", np.array([[n, 1]], np.float32), "FP32")], headers=auth
            )
            for n in range(200)
        ]
        given = [one.get_result().as_numpy("outputs").tolist() for one in asked]
    assert given == [[[2 * n, 2]] for n in range(200)]


def test_the_best_classes_are_told_by_value_and_index(client, auth):
    if not client.is_model_ready("iris", headers=auth):
        client.load_model("iris", headers=auth)
    flower = np.array([[6.7, 3.0, 5.2, 2.3]], np.float32)
    described = client.get_model_metadata("iris", headers=auth)
    features = described["inputs"][0]["name"]
    best = triton.InferRequestedOutput("probabilities", class_count=2)
    reply = client.infer("iris", [tensor(features, flower, "FP32")], outputs=[best], headers=auth)
    first = reply.as_numpy("probabilities")[0][0].decode()
    assert first.split(":")[1] == "2"


@pytest.mark.parametrize(
    ("model", "name", "array", "says"),
    [
        ("nobody", "x", ROW, "there is no model 'nobody', loaded or not; there are: "),
        ("double", "x", ROW[:, :2], "'x'.*inputs"),
        ("double", "inputs", ROW, r"\[1, 3\].*\[-1, 2\]"),
        ("double", "inputs", ROW[:, :2].astype(np.float64), "FP64"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(client, auth, model, name, array, says):
    if not client.is_model_ready("double", headers=auth):
        client.load_model("double", headers=auth)
    datatype = "FP64" if array.dtype == np.float64 else "FP32"
    with pytest.raises(InferenceServerException, match=says):
        client.infer(model, [tensor(name, array, datatype)], headers=auth)


def test_calls_about_models_that_are_not_there_say_so(client, auth):
    for call in (client.get_model_metadata, client.get_model_config, client.unload_model):
        with pytest.raises(InferenceServerException, match="no model 'nobody'"):
            call("nobody", headers=auth)
    with pytest.raises(InferenceServerException, match="no file nobody.onnx"):
        client.load_model("nobody", headers=auth)


def test_without_the_key_nothing_is_run_or_told(client):
    for call in (
        lambda: client.get_model_metadata("double"),
        lambda: client.infer("double", [tensor("inputs", ROW[:, :2], "FP32")]),
        lambda: client.load_model("double"),
    ):
        with pytest.raises(InferenceServerException, match="needs the admin key"):
            call()


async def test_every_call_of_the_asyncio_client_works_the_same(aio_client, auth, models):
    assert await aio_client.is_server_live()
    assert await aio_client.is_server_ready()
    assert (await aio_client.get_server_metadata())["name"] == "bkg"
    assert not await aio_client.is_model_ready("twice", headers=auth)
    content = (models / "sum.onnx").read_bytes()
    config = json.dumps({"max_batch_size": 4})
    await aio_client.load_model(
        "twice", headers=auth, config=config, files={"file:7/model.onnx": content}
    )
    for version in ("", "7"):
        assert await aio_client.is_model_ready("twice", version, headers=auth)
        told = await aio_client.get_model_metadata("twice", version, headers=auth)
        assert (told["name"], told["versions"]) == ("twice", ["7"])
        told = await aio_client.get_model_config("twice", version, headers=auth)
        assert (told["name"], told["max_batch_size"]) == ("twice", 4)
    tensors = [tensor("a", ROW, "FP32"), tensor("b", ROW, "FP32", binary=False)]
    replies = await asyncio.gather(
        *(
            aio_client.infer(
                "twice", tensors, model_version=version, request_id=str(n), headers=auth
            )
            for n, version in enumerate(["", "7"] * 10)
        )
    )
    assert all(reply.as_numpy("y").tolist() == [[2, 4, 6]] for reply in replies)
    assert [reply.get_response()["id"] for reply in replies] == [str(n) for n in range(20)]
    for version in ("", "7"):
        (told,) = (await aio_client.get_inference_statistics("twice", version, headers=auth))[
            "model_stats"
        ]
        assert (told["name"], told["version"], told["inference_count"]) == ("twice", "7", 20)
    everything = await aio_client.get_inference_statistics(headers=auth)
    assert "twice" in {one["name"] for one in everything["model_stats"]}
    index = await aio_client.get_model_repository_index(headers=auth)
    assert {"name": "twice", "version": "7", "state": "READY"} in index
    await aio_client.unload_model("twice", headers=auth)
    assert not await aio_client.is_model_ready("twice", headers=auth)
    with pytest.raises(InferenceServerException, match="not loaded"):
        await aio_client.infer("twice", tensors, headers=auth)


@pytest.mark.parametrize("binary_out", [True, False])
@pytest.mark.parametrize("binary_in", [True, False])
async def test_the_asyncio_client_sends_and_takes_tensors_of_every_type(
    aio_client, auth, binary_in, binary_out
):
    for datatype, (_, kind) in TYPES.items():
        if datatype == "FP16" and not (binary_in and binary_out):
            continue
        model = f"same-{datatype.lower()}"
        if not await aio_client.is_model_ready(model, headers=auth):
            await aio_client.load_model(model, headers=auth)
        array = np.array([["a", "ö"]] if datatype == "BYTES" else [[0, 1]], kind)
        reply = await aio_client.infer(
            model,
            [tensor("x", array, datatype, binary=binary_in)],
            outputs=[triton_aio.InferRequestedOutput("y", binary_data=binary_out)],
            headers=auth,
        )
        given = reply.as_numpy("y")
        if datatype == "BYTES":
            given = np.vectorize(lambda v: v.decode() if isinstance(v, bytes) else v)(given)
        assert given.tolist() == array.tolist(), datatype


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("there", [None, "gzip", "deflate"])
@pytest.mark.parametrize("back", [None, "gzip", "deflate"])
async def test_bodies_of_the_asyncio_client_are_compressed_as_it_likes(
    aio_client, auth, there, back, binary
):
    if not await aio_client.is_model_ready("image", headers=auth):
        await aio_client.load_model("image", headers=auth)
    image = np.arange(3 * 20 * 20, dtype=np.float32).reshape(1, 3, 20, 20)
    reply = await aio_client.infer(
        "image",
        [tensor("x", image, "FP32", binary=binary)],
        outputs=[triton_aio.InferRequestedOutput("y", binary_data=binary)],
        request_compression_algorithm=there,
        response_compression_algorithm=back,
        # Triton's client writes into the headers that it is given.
        headers=dict(auth),
    )
    assert np.array_equal(reply.as_numpy("y"), image)


def test_a_tensor_of_20_mb_is_run(client, auth):
    client.load_model("mean", headers=auth)
    image = np.random.default_rng(7).random((1, 3, 1_300, 1_300), np.float32)
    assert image.nbytes > 20_000_000
    found = client.infer("mean", [tensor("x", image, "FP32")], headers=auth).as_numpy("y")
    assert np.allclose(found[0, :, 0, 0], image.mean(axis=(0, 2, 3)), atol=1e-4)
    with pytest.raises(InferenceServerException, match="67,108,864; BKG_BODY_MAX_BYTES"):
        client.infer("mean", [tensor("x", np.tile(image, (4, 1, 1, 1)), "FP32")], headers=auth)


async def test_answers_name_version_artefact_and_instance(platform, auth):
    body = {"inputs": [{"name": "inputs", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}
    async with platform.session() as session:
        async with session.post("/v2/repository/models/double/load", json={}) as loaded:
            digest = (await loaded.json())["checksum"]
        async with session.post("/v2/models/double/infer", json=body) as answer:
            assert answer.status == 200
            assert answer.headers["Bkg-Model-Version"] == "1"
            assert answer.headers["Bkg-Model-Digest"] == digest
            assert answer.headers["Bkg-Instance"]
            assert (await answer.json())["outputs"][0]["data"] == [2, 4]


async def test_errors_are_problems_that_clients_of_both_kinds_can_read(platform):
    async with platform.session() as session:
        async with session.post("/v2/models/nobody/infer", data=b"{}") as answer:
            problem = await answer.json(content_type="application/problem+json")
        assert answer.status == problem["status"] == 404
        assert problem["error"] == problem["detail"]
        async with session.get("/v2/nothing") as answer:
            assert (await answer.json(content_type=None))["error"]
        async with session.post(
            "/v2/models/nobody/infer", data=io.BytesIO(b"x" * 68_000_000)
        ) as answer:
            assert answer.status == 413


async def test_a_model_that_is_not_loaded_says_how_to_load_it(platform):
    async with platform.session() as session:
        async with session.post("/v2/repository/models/same-int8/load", json={}) as answer:
            assert answer.status == 200
        async with session.post("/v2/repository/models/same-int8/unload", json={}) as answer:
            assert answer.status == 200

        async def said() -> str:
            async with session.post("/v2/models/same-int8/infer", data=b"{}") as answer:
                return (await answer.json(content_type=None))["error"]

        await until(lambda: _contains(said(), "POST /v2/repository/models/same-int8/load"))


async def _contains(said, text: str) -> bool:
    return text in await said


async def test_a_model_that_left_memory_comes_back_when_it_is_asked_for(platform):
    body = {"inputs": [{"name": "inputs", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}
    async with platform.session() as session:
        load = {"id": "nap", "path": "double.json", "config": {"keep_alive_s": 0.2}}
        async with session.post("/api/capabilities/candle.model.load", json=load) as answer:
            assert answer.status == 200
        states = []

        async def slept() -> bool:
            async with session.get("/v2/models/nap/ready") as answer:
                if answer.status == 503:
                    problem = await answer.json(content_type=None)
                    states.append(problem["state"])
                    assert int(answer.headers["Retry-After"]) >= 1
                    assert problem["host"]
                return answer.status == 503

        await until(slept)

        async def answers() -> bool:
            async with session.post("/v2/models/nap/infer", json=body) as answer:
                assert answer.status in {200, 503}
                return answer.status == 200

        await until(answers)
    assert set(states) <= {"leaving", "cold", "queued", "fetching", "loading"}


async def test_the_same_bodies_go_over_nats_with_no_code_of_ours(platform, auth):
    async with platform.session() as session:
        async with session.post("/v2/repository/models/double/load", json={}) as answer:
            assert answer.status == 200
    broker = await nats.connect(platform.nats_url)
    try:
        subject = "bkg.call.candle.model.infer.double"
        asked = {"name": "inputs", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}
        reply = await broker.request(subject, json.dumps({"inputs": [asked]}).encode(), timeout=5)
        assert json.loads(reply.data)["outputs"][0]["data"] == [2, 4]
        assert reply.headers["Bkg-Model-Version"] == "1"
        given = tensor("inputs", np.array([[1, 2]], np.float32), "FP32")
        body, length = triton.InferenceServerClient.generate_request_body([given])
        reply = await broker.request(
            f"{subject}.1",
            body,
            timeout=5,
            headers={"Inference-Header-Content-Length": str(length)},
        )
        parsed = triton.InferenceServerClient.parse_response_body(
            reply.data, header_length=int(reply.headers["Inference-Header-Content-Length"])
        )
        assert parsed.as_numpy("outputs").tolist() == [[2, 4]]
        reply = await broker.request(subject, b"{}", timeout=5)
        assert reply.headers["Nats-Service-Error-Code"] == "400"
        with pytest.raises(nats.errors.NoRespondersError):
            await broker.request("bkg.call.candle.model.infer.nobody", b"{}", timeout=5)
    finally:
        await broker.close()

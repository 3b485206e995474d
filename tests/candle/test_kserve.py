"""Bodies of the Open Inference Protocol, against Triton's own client as the other side."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

from bus.errors import InvalidRequest, Unprocessable
from services.candle import models
from services.candle.runtimes.base import DTYPES, Signature, TensorSpec
from services.candle.runtimes.onnx import Onnx
from services.candle.serving.kserve import HEADER_LENGTH, Codec, Output, Request

TINY = Signature((TensorSpec("x", "FP32", (-1, 2)),), (TensorSpec("y", "FP32", (-1, 2)),))
NUMBERS = [name for name in DTYPES if name != "BYTES"]
INTEGERS = [name for name in NUMBERS if "INT" in name]


def spec(name: str, array: np.ndarray, datatype: str = "") -> TensorSpec:
    found = next(key for key, dtype in DTYPES.items() if dtype == array.dtype)
    return TensorSpec(name, datatype or found, (-1,) * array.ndim)


def codec(signature: Signature = TINY) -> Codec:
    return Codec(signature, "m", "1")


def taking(*inputs: TensorSpec) -> Codec:
    return codec(Signature(inputs, TINY.outputs))


def giving(*outputs: TensorSpec) -> Codec:
    return codec(Signature(TINY.inputs, outputs))


def one(datatype: str, *shape: int) -> Codec:
    return taking(TensorSpec("x", datatype, shape or (-1,)))


def body(*inputs: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({"inputs": list(inputs), **more}).encode()


def x(data: Any = None, shape: Any = (1, 2), datatype: str = "FP32", **more: Any) -> dict[str, Any]:
    given = {"name": "x", "shape": shape, "datatype": datatype, **more}
    return given if data is None else {**given, "data": data}


def ask(**more: Any) -> bytes:
    return body(x([1, 2]), **more)


def binary(raw: bytes, size: int | None = None, **more: Any) -> tuple[bytes, str]:
    """Return a body with one binary tensor, and its header."""
    size = len(raw) if size is None else size
    head = body(x(**{"parameters": {"binary_data_size": size}, **more}))
    return head + raw, str(len(head))


def refused(codec: Codec, body: bytes, header: str | None = None) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as refusal:
        codec.read(body, header)
    return refusal.value


def same(left: np.ndarray, right: np.ndarray) -> bool:
    """Whether two arrays are the same to the last bit, texts as UTF-8."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    if left.dtype == np.object_:
        return [as_bytes(v) for v in left.ravel()] == [as_bytes(v) for v in right.ravel()]
    return left.tobytes() == right.tobytes()


def as_bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode()


# --- Round trips with Triton's client ---------------------------------------------------------


@st.composite
def tensors(draw, finite: bool, texts: st.SearchStrategy):
    """An array of any datatype and shape."""
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    datatype = draw(st.sampled_from(list(DTYPES)))
    if datatype == "BYTES":
        return draw(hnp.arrays(np.object_, shape, elements=texts, fill=texts))
    elements = {"allow_nan": not finite, "allow_infinity": not finite} if "FP" in datatype else {}
    return draw(hnp.arrays(DTYPES[datatype], shape, elements=elements))


# Without surrogates, which UTF-8 does not have.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
FOR_JSON = st.lists(tensors(finite=True, texts=TEXTS), min_size=1, max_size=3)
FOR_BINARY = st.lists(
    tensors(finite=False, texts=st.binary(max_size=8) | TEXTS), min_size=1, max_size=3
)


def from_client(arrays: list[np.ndarray], *, as_binary: list[bool], **more: Any):
    """Return what Triton's client sends for these inputs."""
    inputs = []
    for i, (array, in_binary) in enumerate(zip(arrays, as_binary, strict=True)):
        one = InferInput(f"t{i}", list(array.shape), spec("", array).datatype)
        inputs.append(one.set_data_from_numpy(array, binary_data=in_binary))
    sent, length = InferenceServerClient.generate_request_body(inputs, **more)
    return sent, None if length is None else str(length)


def at_client(answer: bytes, headers: dict[str, str]):
    length = headers.get(HEADER_LENGTH)
    return InferenceServerClient.parse_response_body(
        answer, header_length=None if length is None else int(length)
    )


def named(arrays: list[np.ndarray]) -> tuple[TensorSpec, ...]:
    return tuple(spec(f"t{i}", array) for i, array in enumerate(arrays))


@given(arrays=FOR_JSON)
def test_what_the_client_sends_as_json_is_read_to_the_last_bit(arrays):
    sent, header = from_client(arrays, as_binary=[False] * len(arrays))
    read = taking(*named(arrays)).read(sent, header)
    assert all(same(read.tensors[f"t{i}"], array) for i, array in enumerate(arrays))


@given(arrays=FOR_BINARY, front=st.integers(0, 8), view=st.booleans())
def test_what_the_client_sends_as_binary_data_is_read_wherever_it_lies(arrays, front, view):
    sent, header = from_client(arrays, as_binary=[True] * len(arrays))
    # Blanks before the JSON move the tensors over all alignments.
    sent, header = b" " * front + sent, str(int(header or 0) + front)
    read = taking(*named(arrays)).read(memoryview(sent) if view else sent, header)
    assert all(same(read.tensors[f"t{i}"], array) for i, array in enumerate(arrays))


@given(arrays=FOR_JSON, coins=st.lists(st.booleans(), min_size=3, max_size=3))
def test_json_and_binary_inputs_can_be_mixed(arrays, coins):
    sent, header = from_client(arrays, as_binary=coins[: len(arrays)])
    read = taking(*named(arrays)).read(sent, header)
    assert all(same(read.tensors[f"t{i}"], array) for i, array in enumerate(arrays))


@given(arrays=FOR_JSON)
def test_data_may_be_nested_like_the_shape(arrays):
    inputs = [
        {**x(array.tolist(), array.shape, spec("", array).datatype), "name": f"t{i}"}
        for i, array in enumerate(arrays)
        if array.ndim
    ]
    arrays = [array for array in arrays if array.ndim]
    read = taking(*(spec(given["name"], a) for given, a in zip(inputs, arrays, strict=True))).read(
        body(*inputs)
    )
    for given_, array in zip(inputs, arrays, strict=True):
        assert same(read.tensors[given_["name"]], array)


@given(arrays=FOR_JSON, turned=st.booleans())
def test_the_client_reads_what_is_written_as_json_to_the_last_bit(arrays, turned):
    arrays = [array.T if turned else array for array in arrays]
    written, headers = giving(*named(arrays)).write(
        Request({}, tuple(Output(f"t{i}") for i in range(len(arrays)))),
        {f"t{i}": array for i, array in enumerate(arrays)},
    )
    assert headers == {"Content-Type": "application/json"}
    result = at_client(written, headers)
    assert all(same(result.as_numpy(f"t{i}"), array) for i, array in enumerate(arrays))


@given(arrays=FOR_BINARY, turned=st.booleans())
def test_the_client_reads_what_is_written_as_binary_data(arrays, turned):
    arrays = [array.T if turned else array for array in arrays]
    written, headers = giving(*named(arrays)).write(
        Request({}, tuple(Output(f"t{i}", binary=True) for i in range(len(arrays)))),
        {f"t{i}": array for i, array in enumerate(arrays)},
    )
    assert headers["Content-Type"] == "application/octet-stream"
    assert orjson.loads(written[: int(headers[HEADER_LENGTH])])["model_name"] == "m"
    result = at_client(written, headers)
    assert all(same(result.as_numpy(f"t{i}"), array) for i, array in enumerate(arrays))


# --- Whatever comes, the answer is a sentence -------------------------------------------------


ANY_INPUTS = taking(
    TensorSpec("x", "FP32", (-1, 2)),
    TensorSpec("t", "BYTES", (-1,)),
    TensorSpec("b", "BOOL", (2,)),
)
SOUND, SOUND_HEADER = (
    body(
        x([1, 2]),
        {"name": "t", "shape": [2], "datatype": "BYTES", "parameters": {"binary_data_size": 11}},
        {"name": "b", "shape": [2], "datatype": "BOOL", "parameters": {"binary_data_size": 2}},
        outputs=[{"name": "y", "parameters": {"binary_data": True, "classification": 1}}],
        parameters={"timeout": 7, "binary_data_output": True},
    ),
    b"\x01\0\0\0a\x02\0\0\0bc\0\x01",
)
SOUND, SOUND_HEADER = SOUND + SOUND_HEADER, str(len(SOUND))


def read_or_refuse(codec: Codec, sent: bytes, header: str | None) -> None:
    with suppress(InvalidRequest):
        codec.read(sent, header)


def test_the_body_that_the_next_tests_spoil_is_sound():
    read = ANY_INPUTS.read(SOUND, SOUND_HEADER)
    assert read.tensors["t"].tolist() == [b"a", b"bc"]
    assert read.tensors["b"].tolist() == [False, True]
    assert read.timeout_us == 7


@given(sent=st.binary(max_size=200), header=st.none() | st.text(max_size=5))
@example(b"", None)
@example(b"[" * 100_000, None)
@example(b'{"inputs":' + b"[" * 100_000, None)
@example(b'{"inputs":[{"name":"x","data":' + b"[" * 100_000, None)
@example(b'{"other":' + b"[" * 100_000, None)
def test_arbitrary_bytes_are_refused_and_nothing_worse(sent, header):
    for reader in (ANY_INPUTS, codec()):
        read_or_refuse(reader, sent, header)


@given(end=st.integers(0, len(SOUND) - 1), move_header=st.booleans())
def test_a_body_cut_short_is_refused(end, move_header):
    header = str(min(end, int(SOUND_HEADER))) if move_header else SOUND_HEADER
    assert refused(ANY_INPUTS, SOUND[:end], header).message


@given(
    changes=st.lists(
        st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)), min_size=1, max_size=4
    ),
    header=st.sampled_from([SOUND_HEADER, str(len(SOUND)), "0", None]),
)
def test_a_body_with_bytes_changed_is_read_or_refused(changes, header):
    spoilt = bytearray(SOUND)
    for at, byte in changes:
        spoilt[at] = byte
    read_or_refuse(ANY_INPUTS, bytes(spoilt), header)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["x", "y", "FP32", "BOOL", 2**63, 2**64, -1, [1, 2], 10**400]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["name", "shape", "datatype", "data", "parameters", "timeout",
                         "binary_data_size", "binary_data", "classification"]),
        inner,
        max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@given(
    value=JSON_VALUES,
    place=st.sampled_from(["inputs", "outputs", "parameters", "id", "name", "shape", "datatype",
                           "data", "tensor_parameters"]),
)  # fmt: skip
def test_any_json_in_any_place_is_read_or_refused(value, place):
    sent = {"inputs": [x([1, 2])], "outputs": [{"name": "y"}], "parameters": {}}
    if place == "tensor_parameters":
        sent["inputs"][0]["parameters"] = value
    elif place in sent or place == "id":
        sent[place] = value
    else:
        sent["inputs"][0][place] = value
    raw = json.dumps(sent).encode()
    for reader in (codec(), taking(*TINY.inputs, TensorSpec("b", "BOOL", (1,)))):
        read_or_refuse(reader, raw, None)
        read_or_refuse(reader, raw + b"\0" * 8, str(len(raw)))


# --- Numbers, truth and texts in JSON ---------------------------------------------------------


@pytest.mark.parametrize("datatype", INTEGERS)
def test_integers_are_taken_to_the_ends_of_their_range_and_no_further(datatype):
    lengths = np.iinfo(DTYPES[datatype])
    ends = [int(lengths.min), int(lengths.max)]
    assert one(datatype).read(body(x(ends, [2], datatype))).tensors["x"].tolist() == ends
    for beyond in (ends[0] - 1, ends[1] + 1):
        error = refused(one(datatype), body(x([0, beyond], [2], datatype)))
        assert error.message == (
            f"inputs[0].data has {beyond} as value 1; {datatype} takes whole numbers from "
            f"{ends[0]} to {ends[1]}"
        )
        assert error.field == "inputs[0].data"


@pytest.mark.parametrize(
    ("datatype", "largest", "beyond"), [("FP16", 65504, 65520), ("FP32", 3.4e38, 3.5e38)]
)
def test_a_number_too_large_for_a_float_is_refused_and_not_made_infinite(datatype, largest, beyond):
    read = one(datatype).read(body(x([largest, -largest], [2], datatype)))
    assert np.isfinite(read.tensors["x"]).all()
    said = refused(one(datatype), body(x([-beyond], [1], datatype))).message
    assert f"-{beyond}" in said
    assert f"{datatype} takes numbers from -" in said


@pytest.mark.parametrize("datatype", NUMBERS)
@pytest.mark.parametrize("wrong", ["1", None, {}, [[1]]])
def test_a_value_of_another_type_is_refused_with_its_place(datatype, wrong):
    fine = True if datatype == "BOOL" else 1
    error = refused(one(datatype), body(x([fine, wrong], [2], datatype)))
    assert (error.field or "").startswith("inputs[0].data")
    assert "1" in error.message


@pytest.mark.parametrize("datatype", INTEGERS)
@pytest.mark.parametrize("wrong", [1.5, 1.0, True])
def test_floats_and_truth_are_no_integers(datatype, wrong):
    assert "inputs[0].data[0]" in refused(one(datatype), body(x([wrong], [1], datatype))).message


@pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64"])
def test_whole_numbers_are_floats_but_truth_is_not(datatype):
    assert one(datatype).read(body(x([3], [1], datatype))).tensors["x"].tolist() == [3.0]
    assert "got `bool`" in refused(one(datatype), body(x([True], [1], datatype))).message


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_nan_and_infinity_are_no_json_and_the_way_out_is_named(word):
    sent = body(x([1, 2])).replace(b"[1, 2]}", b"[1, %s]}" % word.encode())
    said = refused(codec(), sent).message
    assert said.startswith("the body is not JSON")
    assert said.endswith("JSON has no NaN and no Infinity: send the tensor as binary data")


def test_inputs_of_several_kinds_are_checked_as_strictly_as_those_of_one():
    mixed = taking(TensorSpec("x", "FP32", (-1,)), TensorSpec("b", "BOOL", (1,)))
    truth = {"name": "b", "shape": [1], "datatype": "BOOL", "data": [True]}
    assert mixed.read(body(x([1, 2.5], [2]), truth)).tensors["x"].tolist() == [1, 2.5]
    for wrong, found in [
        ("1", "'1'"), (True, "true"), (None, "null"), ([], "an array"), ({}, "an object"),
    ]:  # fmt: skip
        error = refused(mixed, body(x([1, wrong], [2]), truth))
        assert error.message.startswith(
            f"inputs[0].data has {found} as value 1; FP32 takes numbers"
        )
        assert error.field == "inputs[0].data"
    error = refused(mixed, body(x([1], [1]), {**truth, "data": [1]}))
    assert error.message == "inputs[1].data has 1 as value 0; BOOL takes true and false"


@pytest.mark.parametrize(("datatype", "fine"), [("BOOL", True), ("BYTES", "a"), ("INT8", 1)])
def test_a_list_among_flat_values_is_refused_for_every_kind(datatype, fine):
    error = refused(one(datatype, -1, 2), body(x([fine, []], [1, 2], datatype)))
    assert error.message.startswith(f"inputs[0].data has an array as value 1; {datatype} takes ")


def test_a_text_keeps_every_character():
    texts = ["", "größer", "\0", '"\\', "\U0001f600"]
    read = one("BYTES").read(body(x(texts, [5], "BYTES")))
    assert read.tensors["x"].tolist() == texts


# --- Shapes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [[2], [1, 2, 1], [1, 3], [], [2**63 - 1, 3], [1] * 100_000], ids=lambda s: str(s)[:20]
)
def test_a_shape_that_the_model_does_not_take_is_refused(shape):
    error = refused(codec(), body(x([1, 2], shape)))
    assert error.field == "inputs[0].shape"
    assert error.message.endswith("the model takes [-1, 2] for 'x' (-1: any length)")
    assert len(error.message) < 300


@pytest.mark.parametrize("length", [-1, 2**63, 10**400, 1.5, "1", None])
def test_a_length_must_be_a_whole_number_that_64_bits_hold(length):
    error = refused(codec(), body(x([1, 2], [length, 2])))
    assert (error.field or "").startswith("inputs[0].shape[0]")


@pytest.mark.parametrize("shape", [[2**62, 2], [10**15, 2], [2**63 - 1, 2]])
def test_a_shape_beyond_the_body_is_refused_before_memory_is_taken(shape):
    said = refused(codec(), body(x([1, 2], shape))).message
    assert said.startswith("inputs[0].data has 2 values, but the shape")
    said = refused(codec(), *binary(b"\0" * 8, shape=shape)).message
    assert said.startswith("inputs[0].parameters.binary_data_size is 8, but FP32 of the shape")
    texts = one("BYTES", -1, 2)
    raw = b"\0" * 8
    said = refused(texts, *binary(raw, shape=shape, datatype="BYTES")).message
    assert said.startswith("inputs[0] has 2 elements in its binary data, but the shape")


@pytest.mark.parametrize("datatype", ["FP32", "BYTES"])
def test_an_empty_tensor_longer_than_an_array_can_be_is_refused(datatype):
    empty = one(datatype, -1, -1, -1)
    shape = [0, 2**62, 2**62]
    for sent in ((body(x([], shape, datatype)), None), binary(b"", shape=shape, datatype=datatype)):
        error = refused(empty, *sent)
        assert error.field == "inputs[0].shape"
        assert "longer than an array can be" in error.message


@pytest.mark.parametrize(
    "data", [[], [1], [1, 2, 3], [[1], [2]], [[1, 2], [3, 4]], [[1, 2], []], [[[1, 2]]], [1, [2]],
             [[1, [2]]], [[1], 2]],
)  # fmt: skip
def test_data_that_is_neither_flat_nor_nested_like_the_shape_is_refused(data):
    assert (refused(codec(), body(x(data))).field or "").startswith("inputs[0].data")
    mixed = taking(*TINY.inputs, TensorSpec("b", "BOOL", (1,)))
    assert (refused(mixed, body(x(data))).field or "").startswith("inputs[0].data")


@pytest.mark.parametrize(
    ("shape", "data"),
    [([], [7]), ([3], [1, 2, 3]), ([0], []), ([2, 0], [[], []]), ([2, 2], [1, 2, 3, 4]),
     ([2, 2], [[1, 2], [3, 4]]), ([1, 1, 1, 2], [[[[1, 2]]]])],
)  # fmt: skip
def test_an_input_of_any_rank_takes_every_shape(shape, data):
    reader = taking(TensorSpec("x", "FP32", (-1,), any_rank=True))
    given = {"name": "x", "datatype": "FP32", "shape": shape, "data": data}
    array = reader.read(json.dumps({"inputs": [given]}).encode()).tensors["x"]
    assert array.tolist() == np.array(data, np.float32).reshape(shape).tolist()
    raw = np.array(data, np.float32).tobytes()
    given = {"name": "x", "datatype": "FP32", "shape": shape}
    head = json.dumps({"inputs": [given | {"parameters": {"binary_data_size": len(raw)}}]}).encode()
    array = reader.read(head + raw, str(len(head))).tensors["x"]
    assert array.shape == tuple(shape)


@pytest.mark.parametrize("data", [[1, 2, 3], [[1, 2], [3]], ["1", 2, 3, 4], [[1, 2], [3, None]]])
def test_an_input_of_any_rank_is_checked_as_strictly(data):
    reader = taking(TensorSpec("x", "FP32", (-1,), any_rank=True))
    given = {"name": "x", "datatype": "FP32", "shape": [2, 2], "data": data}
    with pytest.raises(InvalidRequest, match=r"inputs\[0\]\.data"):
        reader.read(json.dumps({"inputs": [given]}).encode())


def test_empty_data_must_be_nested_like_the_shape_as_well():
    rows = one("FP32", -1, -1)
    assert rows.read(body(x([[], []], [2, 0]))).tensors["x"].shape == (2, 0)
    assert "nested in another way" in refused(rows, body(x([[]], [2, 0]))).message


# --- Inputs -----------------------------------------------------------------------------------


TWO = taking(TensorSpec("x", "FP32", (-1, 2)), TensorSpec("z", "FP32", (1,)))


@pytest.mark.parametrize(
    ("sent", "field", "said"),
    [
        ([], "inputs", "inputs lack 'x', 'z'; the model takes 'x', 'z'"),
        ([x([1, 2])], "inputs", "inputs lack 'z'; the model takes 'x', 'z'"),
        ([x([1, 2]), x([1, 2])], "inputs[1].name", "inputs[1].name gives 'x' a second time"),
        (
            [{**x([1, 2]), "name": "q"}],
            "inputs[0].name",
            "inputs[0].name is 'q'; the model takes 'x', 'z'",
        ),
        (
            [x([1, 2], datatype="INT64")],
            "inputs[0].datatype",
            "inputs[0].datatype is 'INT64'; the model takes FP32 for 'x'",
        ),
        (
            [x(["a", "b"], datatype="BYTES")],
            "inputs[0].datatype",
            "inputs[0].datatype is 'BYTES'; the model takes FP32 for 'x'",
        ),
        (
            [x([1, 2], datatype="BF16")],
            "inputs[0].datatype",
            ("inputs[0].datatype is 'BF16'; the model takes FP32 for 'x', and BF16 is not "
             "supported at all"),
        ),
        (
            [x()],
            "inputs[0]",
            "inputs[0] has neither data nor parameters.binary_data_size",
        ),
        (
            [x(parameters={})],
            "inputs[0]",
            "inputs[0] has neither data nor parameters.binary_data_size",
        ),
        (
            [x([1, 2], parameters={"binary_data_size": 8})],
            "inputs[0]",
            "inputs[0] has both data and binary_data_size; one of them is allowed",
        ),
        (
            [x(parameters={"shared_memory_region": "r", "shared_memory_byte_size": 8})],
            "inputs[0].parameters.shared_memory_region",
            ("inputs[0].parameters.shared_memory_region is not supported; tensors travel in the "
             "body, as JSON or as binary data"),
        ),
    ],
)  # fmt: skip
def test_inputs_that_do_not_fit_the_model_are_refused_by_name(sent, field, said):
    error = refused(TWO, body(*sent))
    assert (error.message, error.field) == (said, field)


@pytest.mark.parametrize("missing", ["name", "shape", "datatype"])
def test_each_part_of_an_input_is_asked_for_by_name(missing):
    given = x([1, 2])
    del given[missing]
    assert refused(codec(), body(given)).field == f"inputs[0].{missing}"


def test_what_a_caller_has_sent_is_cut_short_in_errors():
    for sent in (
        {**x([1, 2]), "name": "q" * 10_000},
        x([1, 2], datatype="q" * 10_000),
        x([1, 2], [1] * 10_000),
    ):
        assert len(refused(codec(), body(sent)).message) < 300


def test_parameters_of_an_input_that_mean_nothing_here_are_passed_over():
    assert codec().read(body(x([1, 2], parameters={"mine": 1}))).tensors["x"].tolist() == [[1, 2]]


# --- Binary data ------------------------------------------------------------------------------


def test_binary_data_is_not_copied():
    sent, header = binary(np.array([1, 2], np.float32).tobytes())
    read = codec().read(sent, header)
    assert np.shares_memory(read.tensors["x"], np.frombuffer(sent, np.uint8))


@pytest.mark.parametrize("front", range(4))
def test_a_tensor_that_lies_unaligned_in_the_body_runs_as_it_is(front):
    iris = Onnx.load(Path(models.__file__).parent / "iris.onnx")
    row = np.array([[5.1, 3.5, 1.4, 0.2]], np.float32)
    (takes,) = iris.signature.inputs
    head = b" " * front + body(
        x(None, [1, 4], parameters={"binary_data_size": 16}) | {"name": takes.name}
    )
    read = codec(iris.signature).read(head + row.tobytes(), str(len(head)))
    given, expected = iris.run(read.tensors), iris.run({takes.name: row})
    assert all(same(given[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "header", ["", "-1", "+1", " 1", "1.0", "1_0", "x", "٣", "9" * 30, "9" * 5000]
)
def test_a_header_length_that_is_none_or_beyond_the_body_is_refused(header):
    error = refused(codec(), ask(), header)
    assert error.field == HEADER_LENGTH
    assert f"at most the body's {len(ask())}" in error.message
    assert len(error.message) < 300


def test_without_a_header_length_all_of_the_body_is_json():
    sent = body(x(parameters={"binary_data_size": 8}))
    error = refused(codec(), sent)
    assert error.field == HEADER_LENGTH
    assert "the header Inference-Header-Content-Length is missing" in error.message


def test_a_header_length_without_binary_data_is_fine():
    assert codec().read(ask(), str(len(ask()))).tensors["x"].tolist() == [[1, 2]]


@pytest.mark.parametrize(("raw", "size"), [(b"\0" * 8, 9), (b"\0" * 8, 2**63 - 1), (b"", 8)])
def test_binary_data_beyond_the_body_is_refused(raw, size):
    error = refused(codec(), *binary(raw, size))
    assert error.field == "inputs[0].parameters.binary_data_size"
    assert error.message.endswith(f"is {size}, but the body has only {len(raw)} more bytes")


@pytest.mark.parametrize("size", [-1, 2**63, 1.5, "8", True])
def test_a_binary_size_must_be_a_whole_number_that_64_bits_hold(size):
    error = refused(codec(), *binary(b"\0" * 8, size))
    assert error.field == "inputs[0].parameters.binary_data_size"


@pytest.mark.parametrize("size", [0, 4, 7, 12])
def test_binary_data_of_another_size_than_the_shape_says_is_refused(size):
    error = refused(codec(), *binary(b"\0" * size))
    assert error.message == (
        f"inputs[0].parameters.binary_data_size is {size}, but FP32 of the shape [1, 2] takes 8 "
        "bytes"
    )


def test_bytes_behind_the_last_tensor_are_refused():
    sent, header = binary(b"\0" * 8)
    error = refused(codec(), sent + b"abc", header)
    assert error.message.startswith("3 bytes are left behind the last binary tensor")
    assert error.field == HEADER_LENGTH


def test_a_byte_that_is_neither_true_nor_false_is_refused():
    error = refused(one("BOOL"), *binary(b"\0\x02", shape=[2], datatype="BOOL"))
    assert error.message == "inputs[0] has a byte 2 in its binary data; BOOL takes 0 and 1"


@pytest.mark.parametrize(
    "raw", [b"\0", b"\0\0\0", b"\x02\0\0\0a", b"\xff\xff\xff\xffab", b"\0\0\0\0\0"]
)
def test_binary_texts_whose_lengths_do_not_add_up_are_refused(raw):
    error = refused(one("BYTES"), *binary(raw, shape=[1], datatype="BYTES"))
    assert "has binary data that ends within element" in error.message
    assert error.field == "inputs[0]"


@pytest.mark.parametrize("raw", [b"", b"\0\0\0\0\0\0\0\0"])
def test_more_or_fewer_binary_texts_than_the_shape_says_are_refused(raw):
    error = refused(one("BYTES"), *binary(raw, shape=[1], datatype="BYTES"))
    assert error.message == (
        f"inputs[0] has {len(raw) // 4} elements in its binary data, but the shape [1] asks for 1"
    )


# --- What is asked for ------------------------------------------------------------------------


PAIR = giving(TensorSpec("y", "FP32", (-1, 2)), TensorSpec("label", "BYTES", (-1,)))


@pytest.mark.parametrize("more", [{}, {"outputs": []}, {"outputs": None}])
def test_without_outputs_all_are_given_in_the_order_of_the_model(more):
    assert PAIR.read(ask(**more)).outputs == (Output("y"), Output("label"))


def test_all_outputs_are_binary_where_the_request_says_so():
    read = PAIR.read(ask(parameters={"binary_data_output": True}))
    assert read.outputs == (Output("y", binary=True), Output("label", binary=True))


def test_an_output_is_as_it_asks_itself_before_what_the_request_says():
    outputs = [{"name": "label", "parameters": {"binary_data": False}}, {"name": "y"}]
    read = PAIR.read(ask(outputs=outputs, parameters={"binary_data_output": True}))
    assert read.outputs == (Output("label"), Output("y", binary=True))


def test_what_the_client_asks_for_is_understood():
    array = np.zeros((1, 2), np.float32)
    sent, header = from_client(
        [array],
        as_binary=[True],
        outputs=[
            InferRequestedOutput("y", binary_data=True, class_count=2),
            InferRequestedOutput("label", binary_data=False),
        ],
        request_id="42",
        timeout=1_500,
        priority=1,
        sequence_id=7,
        sequence_start=True,
        parameters={"mine": "kept"},
    )
    reader = codec(Signature(named([array]), (PAIR._outputs["y"], PAIR._outputs["label"])))
    read = reader.read(sent, header)
    assert read.outputs == (Output("y", binary=True, classes=2), Output("label"))
    assert (read.id, read.timeout_us, read.parameters["mine"]) == ("42", 1_500, "kept")


def test_no_timeout_and_one_of_zero_are_none():
    assert codec().read(ask()).timeout_us is None
    assert codec().read(ask(parameters={"timeout": 0})).timeout_us is None


@pytest.mark.parametrize(
    ("more", "field", "said"),
    [
        ({"outputs": [{"name": "q"}]}, "outputs[0].name", "is 'q'; the model gives 'y', 'label'"),
        ({"outputs": [{"name": "y"}, {"name": "y"}]}, "outputs[1].name", "'y' a second time"),
        (
            {"outputs": [{"name": "y", "parameters": {"shared_memory_region": "r"}}]},
            "outputs[0].parameters.shared_memory_region",
            "is not supported",
        ),
        (
            {"outputs": [{"name": "label", "parameters": {"classification": 1}}]},
            "outputs[0].parameters.classification",
            "which is of texts (BYTES)",
        ),
        (
            {"outputs": [{"name": "y", "parameters": {"classification": -1}}]},
            "outputs[0].parameters.classification",
            ">= 0",
        ),
        (
            {"outputs": [{"name": "y", "parameters": {"binary_data": 1}}]},
            "outputs[0].parameters.binary_data",
            "`bool",
        ),
        (
            {"parameters": {"binary_data_output": 1}},
            "parameters.binary_data_output",
            "is 1; it takes true or false",
        ),
        ({"parameters": {"timeout": -1}}, "parameters.timeout", "is -1; it takes whole micro"),
        ({"parameters": {"timeout": 1.5}}, "parameters.timeout", "is 1.5"),
        ({"parameters": {"timeout": True}}, "parameters.timeout", "is True"),
        ({"parameters": {"timeout": 2**63}}, "parameters.timeout", "is 9223372036854775808"),
        ({"id": 3}, "id", "Expected `str | null`, got `int`"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_by_place(more, field, said):
    error = refused(PAIR, ask(**more))
    assert error.field == field
    assert said in error.message


# --- Answers ----------------------------------------------------------------------------------


def write(array: Any, *, codec: Codec | None = None, **how: Any) -> dict[str, Any]:
    """Return the answer with this array as its only output, as JSON."""
    request = Request({}, (Output("y", **how),), "7")
    written, _ = (codec or giving(spec("y", array))).write(request, {"y": array})
    return orjson.loads(written)


def test_an_answer_names_the_model_its_version_and_the_request():
    assert write(np.array([[1, 2]], np.int64)) == {
        "model_name": "m",
        "model_version": "1",
        "id": "7",
        "outputs": [{"name": "y", "datatype": "INT64", "shape": [1, 2], "data": [1, 2]}],
    }


@pytest.mark.parametrize("more", [{}, {"id": None, "outputs": None, "parameters": None}])
def test_an_answer_to_a_request_without_an_id_has_none(more):
    written, _ = codec().write(codec().read(ask(**more)), {"y": np.zeros((1, 2), np.float32)})
    assert "id" not in orjson.loads(written)


def test_outputs_stand_in_the_order_asked_for_and_only_those():
    request = PAIR.read(ask(outputs=[{"name": "label"}]))
    both = {"y": np.zeros((1, 2), np.float32), "label": np.array(["a"], np.object_)}
    written, _ = PAIR.write(request, both)
    assert [given["name"] for given in orjson.loads(written)["outputs"]] == ["label"]


def test_json_and_binary_outputs_can_be_mixed():
    asked = [{"name": "y", "parameters": {"binary_data": True}}, {"name": "label"}]
    request = PAIR.read(ask(outputs=asked))
    both = {"y": np.array([[1, 2]], np.float32), "label": np.array(["a"], np.object_)}
    written, headers = PAIR.write(request, both)
    result = at_client(written, headers)
    assert result.as_numpy("y").tolist() == [[1, 2]]
    assert result.as_numpy("label").tolist() == ["a"]


def test_a_float32_is_written_short():
    written, _ = codec().write(codec().read(ask()), {"y": np.array([[0.1, 1e-10]], np.float32)})
    assert b'"data":[0.1,1e-10]' in written


@pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_json_cannot_say_is_refused_with_the_way_out(datatype, value):
    array = np.array([1, value], DTYPES[datatype])
    with pytest.raises(Unprocessable, match=r"'y' has -?(nan|inf) as value 1.*binary_data"):
        write(array)
    request = Request({}, (Output("y", binary=True),))
    assert giving(spec("y", array)).write(request, {"y": array})[0].endswith(array.tobytes())


def test_the_word_null_in_a_text_is_no_reason_to_refuse():
    assert write(np.array(["null"], np.object_))["outputs"][0]["data"] == ["null"]


def test_bytes_that_are_no_text_are_refused_in_json_with_the_way_out():
    with pytest.raises(Unprocessable, match=r"'y' has bytes that are not UTF-8.*binary_data"):
        write(np.array([b"\xff"], np.object_))


def test_a_type_that_the_protocol_lacks_is_named():
    with pytest.raises(Unprocessable, match="'y' has values of type complex64"):
        write(np.zeros(1, np.complex64), codec=codec())


# --- Classification ---------------------------------------------------------------------------


def classes(array: np.ndarray, count: int, shape: tuple[int, ...]) -> tuple[list[int], list[str]]:
    how = giving(TensorSpec("y", spec("y", array).datatype, shape))
    (output,) = write(array, codec=how, classes=count)["outputs"]
    assert output["datatype"] == "BYTES"
    return output["shape"], output["data"]


def test_the_highest_values_of_each_row_come_first_as_value_and_index():
    rows = np.array([[1, 5, 10, 4], [0.1, 0.3, 0.2, -1]], np.float32)
    given = classes(rows, 2, (-1, 4))
    assert given == ([2, 2], ["10.0:2", "5.0:1", "0.3:1", "0.2:2"])


def test_an_index_counts_through_all_values_of_a_row():
    assert classes(np.array([[[1, 2], [9, 3]]], np.int8), 1, (-1, 2, 2)) == ([1, 1], ["9:2"])


def test_a_model_without_batches_gives_the_highest_of_all():
    assert classes(np.array([1, 5, 10, 4], np.int32), 2, (4,)) == ([2], ["10:2", "5:1"])


@pytest.mark.parametrize("count", [3, 2**63 - 1])
def test_where_there_are_fewer_values_there_are_fewer_texts(count):
    assert classes(np.array([1, 2], np.uint8), count, (2,)) == ([2], ["2:1", "1:0"])


def test_of_equal_values_the_lower_index_comes_first_and_nan_last():
    array = np.array([1, np.nan, 1, np.inf], np.float16)
    assert classes(array, 4, (4,)) == ([4], ["inf:3", "1.0:0", "1.0:2", "nan:1"])


def test_truth_can_be_ranked():
    assert classes(np.array([False, True]), 1, (2,)) == ([1], ["1:1"])


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_no_rows_and_no_classes_give_no_texts(shape):
    assert classes(np.zeros(shape, np.float32), 2, (-1, -1))[1] == []


@given(
    array=hnp.arrays(
        # Those whose values Python compares as numpy does.
        st.sampled_from([np.dtype(name) for name in ("u1", "i4", "f2", "f4")]),
        hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=4),
    ),
    count=st.integers(1, 9),
    batched=st.booleans(),
)
def test_the_highest_values_are_those_of_a_plain_sort(array, count, batched):
    table = array.reshape(len(array) if batched else 1, -1)
    expected = []
    for row in table:
        ranked = sorted(range(len(row)), key=lambda i: (np.isnan(row[i]), -float(row[i]), i))
        expected += [f"{row[i]!s}:{i}" for i in ranked[:count]]
    shape = [len(array)] * batched + [min(count, table.shape[1])]
    model = (-1 if batched else len(array), *array.shape[1:])
    assert classes(array, count, model) == (shape, expected)

